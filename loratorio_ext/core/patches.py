"""From latent pixels to patches and back (paper, section "Spatially aware composition")."""

import torch
import torch.nn.functional as F
from torch import Tensor


def split_patches(latents: Tensor, patch_size: int) -> Tensor:
    """The patches phi of a latent, each one a vector of all its channels and pixels.

    ``[..., C, H, W] -> [..., h, w, C * patch_size**2]``. Patches at the right and bottom edge are filled up with
    zeros, which add nothing to a dot product or a norm: a partial patch counts with the pixels it has.
    """
    if patch_size < 1:
        raise ValueError(f"patch_size must be at least 1 latent pixel, got {patch_size}")
    p = patch_size
    *batch, channels, height, width = latents.shape
    padded = F.pad(latents, (0, -width % p, 0, -height % p))
    h, w = padded.shape[-2] // p, padded.shape[-1] // p
    grid = padded.reshape(*batch, channels, h, p, w, p)
    n = len(batch)
    return grid.permute(*range(n), n + 1, n + 3, n, n + 2, n + 4).reshape(*batch, h, w, channels * p * p)


def patch_mean(values: Tensor, patch_size: int) -> Tensor:
    """The mean over each patch, ``[..., H, W] -> [..., h, w]``; of a partial patch, over the pixels it has."""
    total, pixels = (
        split_patches(each.unsqueeze(-3), patch_size).sum(dim=-1) for each in (values, torch.ones_like(values))
    )
    return total / pixels


def unit_vectors(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors scaled to length one along the last dimension, and a mask of those that have a length at all.

    The largest component is divided out first, so that no square overflows or vanishes.
    """
    largest = vectors.abs().amax(dim=-1, keepdim=True)
    scaled = vectors / torch.where(largest == 0, torch.ones_like(largest), largest)
    norm = scaled.norm(dim=-1, keepdim=True)
    return scaled / torch.where(norm == 0, torch.ones_like(norm), norm), largest.squeeze(-1) != 0


def patch_similarity(eps: Tensor, eps_base: Tensor, patch_size: int) -> Tensor:
    """Cosine similarity of each LoRA's predicted noise to the base model's, patch by patch (paper: s_{i,k}).

    ``eps [N, B, C, H, W]``, ``eps_base [B, C, H, W] -> [N, B, h, w]`` in float32, whatever the input's dtype.
    A patch of zero norm is no evidence of divergence and counts as similarity 1.

    The cosine is taken as ``1 - |u - v|**2 / 2`` of the unit vectors, which keeps the small divergences of early
    steps (1e-3 and less) that a dot product near 1 would round away.
    """
    u, u_has_length = unit_vectors(split_patches(eps.float(), patch_size))
    v, v_has_length = unit_vectors(split_patches(eps_base.float(), patch_size))
    similarity = 1 - (u - v).square().sum(dim=-1) / 2
    return torch.where(u_has_length & v_has_length, similarity, torch.ones_like(similarity))


def upsample_weights(weights: Tensor, size: tuple[int, int], patch_size: int, mode: str = "nearest") -> Tensor:
    """Spread patch weights over latent pixels (paper: Omega^up): ``[N, B, h, w] -> [N, B, H, W]``, ``size = (H, W)``.

    ``nearest``: every pixel takes its patch's weight, the paper's reading. ``bilinear``: weights are those of the
    patch centres and blend linearly between them, without seams. Both keep the sum over N at 1.
    """
    height, width = size
    if mode == "nearest":
        grown = weights.repeat_interleave(patch_size, dim=-2).repeat_interleave(patch_size, dim=-1)
    elif mode == "bilinear":
        grown = F.interpolate(weights, scale_factor=patch_size, mode="bilinear", align_corners=False)
    else:
        raise ValueError(f"mode must be 'nearest' or 'bilinear', got {mode!r}")
    if grown.shape[-2] < height or grown.shape[-1] < width:
        raise ValueError(f"{tuple(weights.shape[-2:])} patches of {patch_size} do not cover {height}x{width} pixels")
    return grown[..., :height, :width]
