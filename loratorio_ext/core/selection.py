"""Dynamic module selection: which LoRAs of a pool take part (paper, section "Dynamic module selection")."""

import torch
from torch import Tensor

SCOPES = ("image", "patch")


def top_k_mask(similarity: Tensor, top_k: int | None, scope: str = "image") -> Tensor:
    """A hard mask ``[N, B, h, w]``, true for the ``top_k`` LoRAs least similar to the base model.

    ``scope`` "image" ranks LoRAs by their mean over an image's patches, "patch" in every patch by itself.
    Of equals the earlier LoRA wins. ``top_k`` None, 0, or at least N keeps all.
    """
    if scope not in SCOPES:
        raise ValueError(f"scope must be one of {', '.join(SCOPES)}, got {scope!r}")
    if top_k is not None and top_k < 0:
        raise ValueError(f"top_k must not be negative, got {top_k}")
    if not top_k or top_k >= similarity.shape[0]:
        return torch.ones_like(similarity, dtype=torch.bool)
    ranked = similarity.mean(dim=(-2, -1), keepdim=True) if scope == "image" else similarity
    chosen = ranked.argsort(dim=0, stable=True)[:top_k]
    return torch.zeros_like(ranked, dtype=torch.bool).scatter(0, chosen, True).expand_as(similarity)
