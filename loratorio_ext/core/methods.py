"""Ways to make one prediction of several LoRAs: each says which predictions a step needs and combines them.

LoRAtorio: arXiv 2508.11624. Merge, Switch and Composite: "Multi-LoRA Composition for Image Generation",
arXiv 2402.16843.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from loratorio_ext.core.composition import (
    adaptive_temperature,
    compose,
    recenter,
    relative_similarity,
    softmin_weights,
)
from loratorio_ext.core.patches import patch_similarity, upsample_weights
from loratorio_ext.core.selection import top_k_mask


@dataclass(frozen=True)
class Plan:
    """The model evaluations of one step.

    ``host`` is whose prediction the host's own pass delivers: ``BASE`` (no LoRA), ``MERGED`` (all of them, as the
    host does by itself), or the index of one LoRA. ``isolated`` are the LoRAs to evaluate beside it, each alone;
    ``uncond`` tells whether their unconditional rows are needed too.
    """

    BASE = -1
    MERGED = -2

    host: int
    isolated: tuple[int, ...] = ()
    uncond: bool = True


@dataclass(frozen=True)
class Predictions:
    """What the models said of one noisy latent: R conditional rows (several an image with AND), B images.

    ``host_cond [R, C, H, W]``, ``host_uncond [B, C, H, W] | None``: the host's own pass, in its own parameterisation.
    ``cond [N, R, C, H, W]``, ``uncond [N, B, C, H, W] | None``: the isolated LoRAs, likewise.
    ``eps_base [R, C, H, W]``, ``eps [N, R, C, H, W]``: the conditional rows as predicted noise.
    ``image_of_row``: for each conditional row the image it belongs to.
    ``gain``: how the host's parameterisation moves with the noise, ``output = a x + gain * eps``, equal for all rows.
    ``chosen [N, R, h, w]``: the LoRAs that take part, where that is settled already; None: the method chooses.
    """

    host_cond: Tensor
    host_uncond: Tensor | None
    cond: Tensor
    uncond: Tensor | None
    eps_base: Tensor
    eps: Tensor
    image_of_row: tuple[int, ...]
    gain: float | Tensor
    chosen: Tensor | None = None


@dataclass(frozen=True)
class ComposedStep:
    """A step's result: ``cond [R, C, H, W]``, ``uncond [B, C, H, W] | None``, patch ``weights [N, R, h, w] | None``."""

    cond: Tensor
    uncond: Tensor | None
    weights: Tensor | None = None


class Method(Protocol):
    """One way of composing ``n`` LoRAs."""

    def plan(self, step: int, n: int) -> Plan:
        """The evaluations that step ``step`` (counted in model calls from 0) needs."""

    def combine(self, predictions: Predictions) -> ComposedStep:
        """One conditional and one unconditional prediction from those the plan asked for.

        A host whose model guides in two calls asks twice for a plan: first without unconditional rows, then with them.
        """


def mean_over_rows(weights: Tensor, image_of_row: tuple[int, ...], images: int) -> Tensor:
    """An image's weights as the mean of its prompt rows': ``[N, R, H, W] -> [N, images, H, W]``."""
    rows = torch.tensor(image_of_row, device=weights.device)
    summed = torch.zeros(weights.shape[0], images, *weights.shape[2:], dtype=weights.dtype, device=weights.device)
    return summed.index_add(1, rows, weights) / rows.bincount(minlength=images).view(-1, 1, 1)


@dataclass(frozen=True)
class LoRAtorio:
    """Patch-wise SoftMin of similarity to the base model, and guidance re-centred on it (paper; `temperature_mode`
    "adaptive" and `relativity` above 0 are this project's)."""

    patch_size: int
    temperature: float
    temperature_mode: str = "fixed"
    relativity: float = 0.0
    base_share: float = 0.5
    upsampling: str = "nearest"
    top_k: int = 0
    selection_scope: str = "image"

    def plan(self, step: int, n: int) -> Plan:
        return Plan(host=Plan.BASE, isolated=tuple(range(n)), uncond=self.base_share < 1)

    def selects(self, n: int) -> bool:
        """Whether some of ``n`` LoRAs are left out."""
        return 0 < self.top_k < n

    def choose(self, similarity: Tensor) -> Tensor | None:
        """Who takes part, ``[N, R, h, w]``; None: all.

        Ranked by similarity itself: relative to its own mean, every LoRA of an image would rank alike.
        """
        return top_k_mask(similarity, self.top_k, self.selection_scope) if self.selects(len(similarity)) else None

    def weights(self, eps: Tensor, eps_base: Tensor, chosen: Tensor | None = None) -> Tensor:
        """Patch weights Omega ``[N, R, h, w]`` from the predicted noise of LoRAs and base model.

        Who is left out takes no part in anything: the adaptive temperature, too, is that of the ``chosen``.
        """
        similarity = patch_similarity(eps, eps_base, self.patch_size)
        chosen = self.choose(similarity) if chosen is None else chosen
        score = relative_similarity(similarity, self.relativity)
        adaptive = self.temperature_mode == "adaptive"
        temperature = adaptive_temperature(score, self.temperature, chosen) if adaptive else self.temperature
        if chosen is not None:
            score = score.masked_fill(~chosen, torch.inf)
        return softmin_weights(score, temperature)

    def combine(self, predictions: Predictions) -> ComposedStep:
        weights = self.weights(predictions.eps, predictions.eps_base, predictions.chosen)
        pixels = upsample_weights(weights, predictions.cond.shape[-2:], self.patch_size, self.upsampling)
        uncond = predictions.host_uncond
        if uncond is not None and self.base_share < 1:
            image_pixels = mean_over_rows(pixels, predictions.image_of_row, len(uncond))
            uncond = recenter(uncond, compose(predictions.uncond, image_pixels), self.base_share)
        return ComposedStep(compose(predictions.cond, pixels), uncond, weights)


@dataclass(frozen=True)
class Composite:
    """The plain mean over LoRAs of each one's own conditional and unconditional prediction."""

    def plan(self, step: int, n: int) -> Plan:
        return Plan(host=0, isolated=tuple(range(1, n)))

    def combine(self, predictions: Predictions) -> ComposedStep:
        def mean(first: Tensor, others: Tensor) -> Tensor:
            return torch.cat([first.unsqueeze(0), others]).mean(dim=0)

        uncond = predictions.host_uncond
        if uncond is not None:
            uncond = mean(uncond, predictions.uncond)
        return ComposedStep(mean(predictions.host_cond, predictions.cond), uncond)


@dataclass(frozen=True)
class Switch:
    """One LoRA at a time, in prompt order, the next every ``switch_every`` steps."""

    switch_every: int

    def plan(self, step: int, n: int) -> Plan:
        return Plan(host=step // self.switch_every % n)

    def combine(self, predictions: Predictions) -> ComposedStep:
        return ComposedStep(predictions.host_cond, predictions.host_uncond)


@dataclass(frozen=True)
class Merge:
    """All LoRAs' weights summed: what a host does by itself."""

    def plan(self, step: int, n: int) -> Plan:
        return Plan(host=Plan.MERGED)

    def combine(self, predictions: Predictions) -> ComposedStep:
        return ComposedStep(predictions.host_cond, predictions.host_uncond)
