"""Dynamic module selection: which LoRAs of a pool take part (paper, section "Dynamic module selection")."""

import torch
from torch import Tensor

SCOPES = ("image", "patch")


def top_k_mask(similarity: Tensor, top_k: int | None, scope: str = "image", prior: Tensor | None = None) -> Tensor:
    """A hard mask ``[N, B, h, w]``, true for the ``top_k`` LoRAs least similar to the base model.

    ``scope`` "image" ranks LoRAs by their mean over an image's patches, "patch" in every patch by itself.
    Of equals the earlier LoRA wins. ``top_k`` None, 0, or at least N keeps all.

    ``prior [N, 1, h, w]`` in [0, 1]: how far each LoRA may act in a patch. Where that is 0 it is never kept and takes
    nobody's place, and the mean over an image's patches is weighted by it: what a LoRA does elsewhere is no merit.
    """
    if scope not in SCOPES:
        raise ValueError(f"scope must be one of {', '.join(SCOPES)}, got {scope!r}")
    if top_k is not None and top_k < 0:
        raise ValueError(f"top_k must not be negative, got {top_k}")
    candidates = torch.ones_like(similarity, dtype=torch.bool) if prior is None else (prior > 0).expand_as(similarity)
    if not top_k or top_k >= similarity.shape[0]:
        return candidates
    if scope == "patch":
        ranked = similarity.masked_fill(~candidates, torch.inf)
    elif prior is None:
        ranked = similarity.mean(dim=(-2, -1), keepdim=True)
    else:
        ranked = mean_within(similarity, prior)
    chosen = ranked.argsort(dim=0, stable=True)[:top_k]
    return torch.zeros_like(ranked, dtype=torch.bool).scatter(0, chosen, True) & candidates


def mean_within(similarity: Tensor, prior: Tensor) -> Tensor:
    """An image's mean weighted by ``prior [N, 1, h, w]``: ``[N, B, h, w] -> [N, B, 1, 1]``; infinite where that is 0
    everywhere."""
    weighted, weight = ((each * prior).sum(dim=(-2, -1), keepdim=True) for each in (similarity, torch.ones_like(prior)))
    return torch.where(weight > 0, weighted / weight, torch.inf)
