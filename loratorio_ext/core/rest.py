"""The rest: what no LoRA is clearly at home in, and how far the base model competes for it.

Where nobody diverges much one of the LoRAs wins all the same, and paints the surroundings that it would rather see: its
ghosts show there. (Not in the paper, where the LoRAs share out all of the image.)
"""

import torch
from torch import Tensor

from loratorio_ext.core.patches import in_unit_range

REST = 1.5
"""So many times its mean must a LoRA diverge to be at home in a patch that is the base model's otherwise."""
STRANGERS = 0.5
"""LoRAs that disagree by this much are strangers to one another: there is no less of a rest because they agree."""
CORNER = 0.75
"""So many times its mean is at most typical of a LoRA that has its corner of the image, and leaves a rest in full."""
ALIKE = 1e-3
"""LoRAs that disagree less differ by what rounding makes of equal ones, in half precision as well."""


def members_of(relative: Tensor, chosen: Tensor | None) -> Tensor:
    """Who takes part anywhere in an image, of ``relative [N, R, h, w]``: ``[N, R]``."""
    if chosen is None:
        return torch.ones(relative.shape[:2], dtype=torch.bool, device=relative.device)
    return chosen.flatten(-2).any(dim=-1)


def of_rest(relative: Tensor, chosen: Tensor | None = None) -> Tensor:
    """What the base model's pass competes by, ``[N, R, h, w] -> [1, R, h, w]``: in all patches alike, `REST` times the
    mean relative divergence of the loudest of those who are ``chosen`` anywhere."""
    means = relative.mean(dim=(-2, -1), keepdim=True) * members_of(relative, chosen)[..., None, None]
    return (REST * means.amax(dim=0, keepdim=True)).expand_as(relative[:1])


def at_least_rest(relative: Tensor, kept: Tensor, chosen: Tensor | None = None) -> Tensor:
    """Relative divergences ``[N, R, h, w]``, of who keeps the rest, ``kept [N, R]``, none below what the base model's
    pass would compete by (`of_rest`): others must clearly diverge to be at home in its image."""
    return torch.where(kept[..., None, None], torch.maximum(relative, of_rest(relative, chosen)), relative)


def disagreement(eps: Tensor, eps_base: Tensor, members: Tensor) -> Tensor:
    """How much of what LoRAs change is not common to them, ``[R]`` in [0, 1]: 0 for one LoRA and for copies of it, 1
    for changes that have nothing to do with one another. Of ``eps [N, R, C, H, W]``, ``eps_base [R, C, H, W]`` and the
    ``members [N, R]``.

    The variance of the changes over the members, in that of as many independent ones of the same size.
    """
    there = members.T[..., None, None, None]
    change = (eps.float() - eps_base.float()).transpose(0, 1).masked_fill(~there, 0)
    change = in_unit_range(change.flatten(1, 2)).view_as(change)
    count = members.sum(dim=0).float()
    mean = change.sum(dim=1, keepdim=True) / count.clamp(min=1).view(-1, 1, 1, 1, 1)
    apart = (change - mean).masked_fill(~there, 0).square().sum(dim=(1, 2, 3, 4))
    alone = change.square().sum(dim=(1, 2, 3, 4)).clamp(min=1)  # less only if nothing is changed: the largest one is 1
    found = apart / alone * count / (count - 1).clamp(min=1)
    return found.masked_fill(found < ALIKE, 0).clamp(max=1)


def room(relative: Tensor, usual: Tensor, members: Tensor) -> Tensor:
    """How far there is a rest at all, ``[R]`` in [0, 1]: none where one of the ``members [N, R]`` is at home in most of
    the image, as a style or a background is, so that its mean is typical of it; all where each has its `CORNER`. Of
    ``relative [N, R, h, w]`` and what is typical of each, ``usual [N, R]``."""
    mean = relative.mean(dim=(-2, -1))
    flat = usual / torch.where(mean == 0, torch.ones_like(mean), mean) * members
    return ((1 - flat.amax(dim=0)) / (1 - CORNER)).clamp(0, 1)


def base_claim(eps: Tensor, eps_base: Tensor, relative: Tensor, usual: Tensor, chosen: Tensor | None) -> Tensor:
    """The factor on the base model's weight where it competes for the rest, and on what it competes by: ``[R]`` in
    [0, 1]. For ``usual`` see `room`."""
    members = members_of(relative, chosen)
    strange = (disagreement(eps, eps_base, members) / STRANGERS).clamp(max=1)
    return strange * room(relative, usual, members)
