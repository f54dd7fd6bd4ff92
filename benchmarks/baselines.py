"""Ways of composing that the field compares with and that a WebUI has no use for.

Each is entered with a world, a combination of its LoRAs, these as they were loaded, and options; it yields what
`composed` does. CMLoRA: "Cached Multi-LoRA Composition for Multi-Concept Image Generation", arXiv 2502.04923.
Concatenation with coefficients: "LoRA Soups: Merging LoRAs for Practical Skill Composition Tasks", arXiv 2410.13025.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.soup import learned, similar_scenes, weighted
from loratorio_ext.core import ComposedStep, Composite, Plan, Predictions
from loratorio_ext.hosts.diffusers import LoRA, composed

BAND = 0.25
"""Cycles a pixel, half of what a grid can hold: from there on frequencies count as high."""
EARLY = 0.6
"""Of the steps: so long only the LoRAs of high frequencies dominate (120 of 200 in its code)."""


def high_frequency_share(rows: Tensor) -> Tensor:
    """How much of the energy of ``rows [N, R, C, H, W]`` is in high frequencies: ``[N]``; 0 of nothing."""
    energy = torch.fft.fft2(rows.float()).abs().square().sum(dim=(1, 2))
    down, across = (torch.fft.fftfreq(size, device=rows.device) for size in rows.shape[-2:])
    high = (down.view(-1, 1).square() + across.square()).sqrt() >= BAND
    total = energy.sum(dim=(-2, -1))
    return (energy * high).sum(dim=(-2, -1)) / torch.where(total == 0, torch.ones_like(total), total)


class CMLoRA:
    """A mean over all LoRAs in which one of them dominates, in turn, by the frequencies of what they change.

    As its public code does: all but the one of lowest frequencies take turns for 0.6 of the steps, then all but the one
    of highest; whoever dominates has ``n - 1/2`` times the weight of each other. Which frequencies are whose that code
    knows by category (backgrounds are low); here they are measured on what tells each LoRA's prediction from the mean.
    Its cache of deep features, which makes it faster, is left out: every LoRA is evaluated in every step. One object
    serves one sampling pass of ``steps``.
    """

    def __init__(self, steps: int):
        self.steps, self.step = steps, 0
        self.seen: list[Tensor] = []

    def plan(self, step: int, n: int, members: Sequence[int] | None = None, placed: bool = False) -> Plan:
        self.step = step
        return Composite().plan(step, n, members)

    def weights(self, cond: Tensor) -> Tensor:
        """Everyone's weight ``[N]`` in this step, from the conditional predictions ``[N, R, C, H, W]``."""
        n = len(cond)
        self.seen.append(high_frequency_share(cond - cond.mean(dim=0)))
        order = torch.stack(self.seen).mean(dim=0).argsort(descending=True, stable=True).tolist()
        turns = (order[:-1] if self.step < EARLY * self.steps else order[1:]) or order
        weights = torch.ones(n, device=cond.device)
        weights[turns[self.step % len(turns)]] = n - 0.5
        return weights / weights.sum()

    def combine(self, predictions: Predictions) -> ComposedStep:
        cond = torch.cat([predictions.host_cond.unsqueeze(0), predictions.cond])
        share, uncond = self.weights(cond), predictions.host_uncond
        if uncond is not None:
            uncond = torch.cat([uncond.unsqueeze(0), predictions.uncond])
        mean = [None if each is None else torch.einsum("n,n...->...", share.to(each), each) for each in (cond, uncond)]
        return ComposedStep(*mean)


Options = Mapping[str, Any]


@contextmanager
def by_frequency(world: Any, _combination: Any, loras: Sequence[LoRA], _options: Options) -> Iterator[Any]:
    with composed(world.pipe, loras, method="composite") as composition:
        composition.new_method = lambda: CMLoRA(world.call["num_inference_steps"])
        yield composition


@contextmanager
def concatenated(world: Any, _combination: Any, loras: Sequence[LoRA], options: Options) -> Iterator[Any]:
    """All LoRAs side by side in every layer, each at the coefficient ``n ** -power``; power 0 is Merge."""
    everywhere = len(loras) ** -options["power"]
    coefficients = [dict.fromkeys(lora.branches, everywhere) for lora in loras]
    with composed(world.pipe, weighted(loras, coefficients), method="merge") as composition:
        yield composition


@contextmanager
def soup(world: Any, combination: Any, loras: Sequence[LoRA], options: Options) -> Iterator[Any]:
    """The same at coefficients learned for every layer, in so many ``steps``, on other scenes of the same concepts."""
    coefficients = learned(world.pipe, loras, partial(similar_scenes, combination.scene), options["steps"])
    with composed(world.pipe, weighted(loras, coefficients), method="merge") as composition:
        yield composition


BASELINES = {"cmlora": by_frequency, "concatenated": concatenated, "soup": soup}
"""By their names in options."""
