"""Ways to make one prediction of several LoRAs: each says which predictions a step needs and combines them.

LoRAtorio: arXiv 2508.11624. Merge, Switch and Composite: "Multi-LoRA Composition for Image Generation",
arXiv 2402.16843.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from loratorio_ext.core.composition import (
    adaptive_temperature,
    compose,
    recenter,
    relative_divergence,
    softmin_weights,
)
from loratorio_ext.core.gates import gates
from loratorio_ext.core.patches import DIVERGENCE, patch_mean, upsample_weights
from loratorio_ext.core.regions import at_least_typical, log_neighbourhood, typical
from loratorio_ext.core.rest import at_least_rest, base_claim, members_of, of_rest
from loratorio_ext.core.selection import top_k_mask


@dataclass(frozen=True)
class Plan:
    """The model evaluations of one step.

    ``host`` is whose prediction the host's own pass delivers: ``BASE`` (no LoRA), ``MERGED`` (all of them, as the
    host does by itself), or the index of one LoRA. ``isolated`` are the LoRAs to evaluate beside it, each alone;
    ``uncond`` tells whether their unconditional rows are needed too. ``members`` are the LoRAs that take part, be they
    evaluated or not: the first axis of a step's weights, and of where and how much each of them may act.
    """

    BASE = -1
    MERGED = -2

    host: int
    isolated: tuple[int, ...] = ()
    uncond: bool = True
    members: tuple[int, ...] = ()


@dataclass(frozen=True)
class Predictions:
    """What the models said of one noisy latent: R conditional rows (several an image with AND), B images.

    ``host_cond [R, C, H, W]``, ``host_uncond [B, C, H, W] | None``: the host's own pass, in its own parameterisation.
    ``cond [N, R, C, H, W]``, ``uncond [N, B, C, H, W] | None``: the isolated LoRAs, likewise.
    ``eps_base [R, C, H, W]``, ``eps [N, R, C, H, W]``: the conditional rows as predicted noise.
    ``image_of_row``: for each conditional row the image it belongs to.
    ``gain``: how the host's parameterisation moves with the noise, ``output = a x + gain * eps``, equal for all rows.
    ``chosen [N, R, h, w]``: the LoRAs that take part, where that is settled already; None: the method chooses.
    ``relative [N, R, h, w]``: the LoRAs' relative divergence, where earlier steps have a part in it; None: this step's.
    ``among``: the positions, among the plan's members, of those N, where only some are left; None: all of them.
    ``place [M, H, W]``, or ``[M, R, H, W]`` where rows differ, in [0, 1]: where in the image each of the plan's M
    members may act; None: everywhere.
    ``share [M]``, above 0: a factor on each member's claim; None: 1 for all.
    ``rest [R]``: of which rows the host's own pass knows the surroundings, and is at home where no member clearly is;
    ``kept [M, R]``: of which each of the plan's members is at home there, however little it diverges; None: of none.
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
    relative: Tensor | None = None
    among: tuple[int, ...] | None = None
    place: Tensor | None = None
    share: Tensor | None = None
    rest: Tensor | None = None
    kept: Tensor | None = None


@dataclass(frozen=True)
class ComposedStep:
    """A step's result: ``cond [R, C, H, W]``, ``uncond [B, C, H, W] | None``, patch ``weights [M, R, h, w] | None``."""

    cond: Tensor
    uncond: Tensor | None
    weights: Tensor | None = None


class Method(Protocol):
    """One way of composing ``n`` LoRAs."""

    def plan(self, step: int, n: int, members: Sequence[int] | None = None, placed: bool = False) -> Plan:
        """The evaluations that step ``step`` (counted in model calls from 0) needs.

        ``members``: those of the ``n`` LoRAs that act in this step, in ascending order; None: all. The others cost
        nothing, and a step without any is the base model's. ``placed``: whether `Predictions.place` will be given.
        """

    def combine(self, predictions: Predictions) -> ComposedStep:
        """One conditional and one unconditional prediction from those the plan asked for.

        A host whose model guides in two calls asks twice for a plan: first without unconditional rows, then with them.
        """


def acting(n: int, members: Sequence[int] | None) -> tuple[int, ...]:
    """The LoRAs that act in a step."""
    return tuple(range(n)) if members is None else tuple(members)


def mean_over_rows(weights: Tensor, image_of_row: tuple[int, ...], images: int) -> Tensor:
    """An image's weights as the mean of its prompt rows': ``[N, R, H, W] -> [N, images, H, W]``."""
    rows = torch.tensor(image_of_row, device=weights.device)
    summed = torch.zeros(weights.shape[0], images, *weights.shape[2:], dtype=weights.dtype, device=weights.device)
    return summed.index_add(1, rows, weights) / rows.bincount(minlength=images).view(-1, 1, 1)


def by_row(place: Tensor) -> Tensor:
    """Places of all rows alike or of each row, as ``[N, 1 or R, ...]``."""
    return place if place.ndim == 4 else place.unsqueeze(1)


def whole(place: Tensor) -> Tensor:
    """In which rows of ``place [N, 1 or R, H, W]`` each LoRA may act in all of the image or nowhere: ``[1 or R]``."""
    even = place.amax(dim=(-2, -1)) == place.amin(dim=(-2, -1))
    return even.all(dim=0)


def coverage(place: Tensor) -> Tensor:
    """How much of a pixel or patch is the LoRAs' at all, the rest being the base model's: ``[N, ...] -> [...]``."""
    return place.sum(dim=0).clamp(max=1)


@dataclass(frozen=True)
class LoRAtorio:
    """Patch-wise SoftMin of similarity to the base model, and guidance re-centred on it (paper; `temperature_mode`
    "adaptive", `relativity` above 0, `combination` "gates", `patches` "sliding", `regions` and `rest` are this
    project's)."""

    patch_size: int
    temperature: float
    temperature_mode: str = "fixed"
    relativity: float = 0.0
    base_share: float = 0.5
    upsampling: str = "nearest"
    top_k: int = 0
    selection_scope: str = "image"
    combination: str = "shares"
    sharpness: float = 4.0
    patches: str = "grid"
    regions: bool = False
    rest: bool = False

    def plan(self, step: int, n: int, members: Sequence[int] | None = None, placed: bool = False) -> Plan:
        members = acting(n, members)
        return Plan(host=Plan.BASE, isolated=members, uncond=self.base_share < 1, members=members)

    def selects(self, n: int) -> bool:
        """Whether some of ``n`` LoRAs are left out."""
        return 0 < self.top_k < n

    def chooses(self, n: int, prior: Tensor | None) -> bool:
        """Whether there is a choice to make among ``n`` LoRAs: some are left out, or not all may act everywhere."""
        return prior is not None or self.selects(n)

    @property
    def side(self) -> int:
        """How many latent pixels one weight is for, in either direction."""
        return 1 if self.patches == "sliding" else self.patch_size

    @property
    def cells(self) -> int:
        """How many weights there are along a patch."""
        return self.patch_size // self.side

    def divergence(self, eps: Tensor, eps_base: Tensor) -> Tensor:
        """1 minus the cosine of LoRAs' and base model's predicted noise in every patch: ``[N, R, h, w]``."""
        return DIVERGENCE[self.patches](eps, eps_base, self.patch_size)

    def relative_divergence(self, predictions: Predictions) -> Tensor:
        """What LoRAs compete by, ``[N, R, h, w]``: the larger, the more weight."""
        return relative_divergence(self.divergence(predictions.eps, predictions.eps_base), self.relativity)

    def prior(self, place: Tensor | None) -> Tensor | None:
        """How far each LoRA may act in a patch, ``[N, 1 or R, h, w]``, from where it may act; None: everywhere."""
        return None if place is None else patch_mean(by_row(place).float(), self.side)

    def select(self, predictions: Predictions) -> Tensor | None:
        """Who takes part in a step; see `choose`."""
        divergence = self.divergence(predictions.eps, predictions.eps_base)
        return self.choose(1 - divergence, self.prior(predictions.place))

    def choose(self, similarity: Tensor, prior: Tensor | None = None) -> Tensor | None:
        """Who takes part, ``[N, R, h, w]``; None: all.

        Ranked by similarity itself: relative to its own mean, every LoRA of an image would rank alike.
        """
        if not self.chooses(len(similarity), prior):
            return None
        return top_k_mask(similarity, self.top_k, self.selection_scope, prior)

    def leaves_rest(self, n: int) -> bool:
        """Whether the base model competes with ``n`` LoRAs for what none of them is clearly at home in."""
        return self.rest and n > 1

    def claim_of_base(
        self,
        eps: Tensor,
        eps_base: Tensor,
        relative: Tensor,
        usual: Tensor | None,
        chosen: Tensor | None,
        place: Tensor | None,
        rest: Tensor | None,
        kept: Tensor | None,
    ) -> Tensor | None:
        """The factor on the base model's weight where it competes, and on what it competes by, ``[R]`` in [0, 1]; None:
        it does nowhere.

        In full in rows of ``rest``, where its pass knows the surroundings. In others as far as the LoRAs disagree and
        none is at home in most of the image (`base_claim`), but where that is known by other means: somebody has a
        place, or somebody keeps the rest (``kept [N, R]``).
        """
        if not self.leaves_rest(len(eps)):
            return None if rest is None else rest.float()
        claim = base_claim(eps, eps_base, relative, usual, chosen)
        if place is not None:
            claim = claim * whole(by_row(place))
        if kept is not None:
            claim = claim.masked_fill(kept.any(dim=0), 0)
        return claim if rest is None else claim.masked_fill(rest, 1)

    def weights(
        self,
        eps: Tensor,
        eps_base: Tensor,
        chosen: Tensor | None = None,
        place: Tensor | None = None,
        share: Tensor | None = None,
        relative: Tensor | None = None,
        rest: Tensor | None = None,
        kept: Tensor | None = None,
    ) -> Tensor:
        """Patch weights Omega ``[N, R, h, w]``, or gates, from the predicted noise of LoRAs and base model.

        Who is left out takes no part in anything: the adaptive temperature, too, is that of the ``chosen``. It follows
        the divergences themselves, before `regions` change what they count.

        With ``place [N, (R,) H, W]`` and ``share [N]`` (see `Predictions`) a weight is proportional to
        ``prior * share * exp(-score / temperature)``, and the weights of a patch add up to its coverage: the sum of the
        priors of the chosen, at most 1. So a LoRA alone has its prior as weight, halves with soft edges that meet leave
        no gap between them, and the rest is the base model's.

        Where the base model competes, too (`claim_of_base`), it does in every patch alike (`of_rest`), and what it wins
        the weights lack. It has a part in the temperature where its pass knows the surroundings. Gates need no such
        rival: who fades leaves the base model's prediction. Where a LoRA keeps the rest, ``kept [N, R]``, it competes
        by no less than that (`at_least_rest`).
        """
        prior = self.prior(place)
        choosing = chosen is None and self.chooses(len(eps), prior)
        if choosing or relative is None:
            divergence = self.divergence(eps, eps_base)
            chosen = self.choose(1 - divergence, prior) if choosing else chosen
            relative = relative_divergence(divergence, self.relativity) if relative is None else relative
        if self.combination == "gates":
            return gates(relative, self.sharpness, chosen, prior, share)
        if kept is not None and self.leaves_rest(len(eps)):
            kept = kept & members_of(relative, chosen)
            relative = at_least_rest(relative, kept, chosen)
        log_claim = torch.zeros_like(relative)
        if share is not None:
            log_claim = log_claim + share.float().log().view(-1, 1, 1, 1)
        if prior is not None:
            log_claim = log_claim + prior.log()
        if chosen is not None:
            log_claim = log_claim.masked_fill(~chosen, -torch.inf)
        measured = chosen
        usual = typical(relative) if self.regions or self.leaves_rest(len(eps)) else None
        base = self.claim_of_base(eps, eps_base, relative, usual, chosen, place, rest, kept)
        if base is not None:
            everyone = torch.ones_like(relative, dtype=torch.bool) if chosen is None else chosen
            known = torch.zeros_like(base, dtype=torch.bool) if rest is None else rest
            base, known = (each.view(1, -1, 1, 1).expand_as(relative[:1]) for each in (base, known))
            measured = torch.cat([everyone, known])
            relative = torch.cat([relative, base * of_rest(relative, chosen)])
            log_claim = torch.cat([log_claim, base.log()])
        adaptive = self.temperature_mode == "adaptive"
        temperature = adaptive_temperature(-relative, self.temperature, measured) if adaptive else self.temperature
        if self.regions:
            loras, rival = relative.tensor_split([len(eps)])
            relative = torch.cat([at_least_typical(loras, usual), rival])
            alone = softmin_weights(-relative, temperature, log_claim=log_claim)
            log_claim = log_claim + log_neighbourhood(alone, self.cells)
        weights = softmin_weights(-relative, temperature, log_claim=log_claim)
        weights = weights if base is None else weights[:-1]
        return weights if prior is None else weights * coverage(prior * chosen)

    def combine(self, predictions: Predictions) -> ComposedStep:
        """With ``place``, what the weights leave of a pixel is the base model's; gates let through differences from it.

        Unconditional predictions are combined alike, by an image's mean weights, before they are re-centred.
        """
        cond, uncond, size = predictions.cond, predictions.host_uncond, predictions.host_cond.shape[-2:]
        if not len(cond):
            nobody = patch_mean(cond.new_zeros(0, len(predictions.host_cond), *size), self.side)
            return ComposedStep(predictions.host_cond, uncond, nobody.float())
        partial = predictions.place is not None or predictions.rest is not None or self.leaves_rest(len(cond))
        with_base = partial or self.combination == "gates"
        weights = self.weights(
            predictions.eps,
            predictions.eps_base,
            predictions.chosen,
            predictions.place,
            predictions.share,
            predictions.relative,
            predictions.rest,
            predictions.kept,
        )
        pixels = upsample_weights(weights, size, self.side, self.upsampling)
        if uncond is not None and self.base_share < 1:
            image_pixels = mean_over_rows(pixels, predictions.image_of_row, len(uncond))
            composed = compose(predictions.uncond, image_pixels, uncond if with_base else None)
            uncond = recenter(uncond, composed, self.base_share)
        return ComposedStep(compose(cond, pixels, predictions.host_cond if with_base else None), uncond, weights)


def mean_weights(place: Tensor, share: Tensor | None) -> Tensor:
    """Weights of a mean over LoRAs, ``[N, R, H, W]`` as ``place`` is: proportional to place and share, they add up to
    the coverage."""
    claim = place.float() if share is None else place.float() * share.float().view(-1, 1, 1, 1)
    total = claim.sum(dim=0)
    return claim / torch.where(total == 0, torch.ones_like(total), total) * coverage(place.float())


@dataclass(frozen=True)
class Composite:
    """The plain mean over LoRAs of each one's own conditional and unconditional prediction.

    Where a LoRA has a place or a share of its own, the mean is weighted by them; what the places leave uncovered of a
    pixel is the base model's, whose prediction is needed then.
    """

    def plan(self, step: int, n: int, members: Sequence[int] | None = None, placed: bool = False) -> Plan:
        members = acting(n, members)
        if placed or not members:
            return Plan(host=Plan.BASE, isolated=members, members=members)
        return Plan(host=members[0], isolated=members[1:], members=members)

    def combine(self, predictions: Predictions) -> ComposedStep:
        place, share, uncond = predictions.place, predictions.share, predictions.host_uncond
        if any(each is not None and not len(each) for each in (place, share)):
            return ComposedStep(predictions.host_cond, uncond)

        def mean(host: Tensor, isolated: Tensor, weights: Tensor | None) -> Tensor:
            if weights is not None:
                return compose(isolated, weights, host)
            everyone = torch.cat([host.unsqueeze(0), isolated])
            if share is None:
                return everyone.mean(dim=0)
            return compose(everyone, (share.float() / share.float().sum()).view(-1, 1, 1, 1))

        weights = of_image = None if place is None else mean_weights(by_row(place), share)
        if uncond is not None:
            if weights is not None and weights.shape[1] > 1:
                of_image = mean_over_rows(weights, predictions.image_of_row, len(uncond))
            uncond = mean(uncond, predictions.uncond, of_image)
        return ComposedStep(mean(predictions.host_cond, predictions.cond, weights), uncond)


@dataclass(frozen=True)
class Switch:
    """One LoRA at a time, in prompt order, the next every ``switch_every`` steps."""

    switch_every: int

    def plan(self, step: int, n: int, members: Sequence[int] | None = None, placed: bool = False) -> Plan:
        members = acting(n, members)
        turn = step // self.switch_every
        return Plan(host=members[turn % len(members)] if members else Plan.BASE, members=members)

    def combine(self, predictions: Predictions) -> ComposedStep:
        return ComposedStep(predictions.host_cond, predictions.host_uncond)


@dataclass(frozen=True)
class Merge:
    """All LoRAs' weights summed: what a host does by itself."""

    def plan(self, step: int, n: int, members: Sequence[int] | None = None, placed: bool = False) -> Plan:
        return Plan(host=Plan.MERGED)

    def combine(self, predictions: Predictions) -> ComposedStep:
        return ComposedStep(predictions.host_cond, predictions.host_uncond)
