"""From latent pixels to patches and back (paper, section "Spatially aware composition")."""

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_DIVERGENCE = 1e-10
"""Less than this is what rounding makes of two parallel vectors in float32, and counts as none."""


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


def resolved(divergence: Tensor, known: Tensor) -> Tensor:
    """Divergences where they are ``known`` and more than rounding; elsewhere none."""
    return torch.where(known & ~(divergence < MIN_DIVERGENCE), divergence, torch.zeros_like(divergence))


def patch_divergence(eps: Tensor, eps_base: Tensor, patch_size: int) -> Tensor:
    """How far each LoRA's predicted noise is from the base model's, patch by patch: 1 minus the cosine of the two.

    ``eps [N, B, C, H, W]``, ``eps_base [B, C, H, W] -> [N, B, h, w]`` in float32, whatever the input's dtype.
    A patch of zero norm is no evidence of divergence.

    It is taken as ``|u - v|**2 / 2`` of the unit vectors, which keeps the small divergences of early steps (1e-3 and
    less) that a dot product near 1 would round away.
    """
    u, u_has_length = unit_vectors(split_patches(eps.float(), patch_size))
    v, v_has_length = unit_vectors(split_patches(eps_base.float(), patch_size))
    return resolved((u - v).square().sum(dim=-1) / 2, u_has_length & v_has_length)


def patch_similarity(eps: Tensor, eps_base: Tensor, patch_size: int) -> Tensor:
    """Cosine similarity of each LoRA's predicted noise to the base model's, patch by patch (paper: s_{i,k}); see
    `patch_divergence`."""
    return 1 - patch_divergence(eps, eps_base, patch_size)


def window_sum(values: Tensor, patch_size: int) -> Tensor:
    """The sum over what lies up to half a patch away from each pixel, ``[..., H, W] -> [..., H, W]``; rows and columns
    at just that distance count half, so that every window is centred on its pixel, whether the size is odd or even."""
    reach = patch_size // 2
    counts = values.new_ones(2 * reach + 1)
    if patch_size % 2 == 0:
        counts[0] = counts[-1] = 0.5
    padded = F.pad(values, (reach, reach, reach, reach))
    # No convolution: GPUs may round its inputs to ten bits.
    rows = (padded.unfold(-1, 2 * reach + 1, 1) * counts).sum(dim=-1)
    return (rows.unfold(-2, 2 * reach + 1, 1) * counts).sum(dim=-1)


def in_unit_range(rows: Tensor) -> Tensor:
    """``[..., C, H, W]`` with each row's largest magnitude divided out, so that no square overflows."""
    largest = rows.abs().amax(dim=(-3, -2, -1), keepdim=True)
    return rows / torch.where(largest == 0, torch.ones_like(largest), largest)


def window_divergence(eps: Tensor, eps_base: Tensor, patch_size: int) -> Tensor:
    """As `patch_divergence`, of a window of ``patch_size`` around every latent pixel: ``[N, B, H, W]``, no borders.

    A window at the edge counts with the pixels it has. What is near 1e-19 of the largest magnitude of its row counts
    as zero.

    With ``delta = a - b`` and ``t = 1 - |a| / |b|``, ``|u - v|**2 |a|**2 = |delta|**2 + 2 t b delta + t**2 |b|**2``:
    sums over windows of what is small where vectors are close, as needed for the same reason as there.
    """
    if patch_size < 1:
        raise ValueError(f"patch_size must be at least 1 latent pixel, got {patch_size}")
    a, b = in_unit_range(eps.float()), in_unit_range(eps_base.float())

    def dot(first: Tensor, second: Tensor) -> Tensor:
        return window_sum((first * second).sum(dim=-3), patch_size)

    delta = a - b
    aa, bb, delta_delta, b_delta = dot(a, a), dot(b, b), dot(delta, delta), dot(b, delta)
    known = (aa != 0) & (bb != 0)
    one = torch.ones_like(aa)
    aa, bb = torch.where(known, aa, one), torch.where(known, bb, one)
    norms = (aa * bb).sqrt()
    t = -(2 * b_delta + delta_delta) / (bb + norms)
    near = (delta_delta + 2 * t * b_delta + t.square() * bb) / (2 * aa)
    far = 1 - dot(a, b.expand_as(a)) / norms
    return resolved(torch.where(delta_delta < aa, near, far), known)


DIVERGENCE = {"grid": patch_divergence, "sliding": window_divergence}
"""By how patches lie: beside one another, or one around every pixel."""


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
