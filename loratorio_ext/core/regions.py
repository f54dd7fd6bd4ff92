"""Whole regions: who is at home in a patch is also told by what is typical of a LoRA, and by who is around.

A LoRA's home is larger than the spots where it diverges. In a background's sky it agrees with the base model, and what
diverges most there may be another LoRA that would rather see surroundings of its own. (Not in the paper, where every
patch stands for itself.)
"""

import torch
from torch import Tensor

from loratorio_ext.core.patches import window_sum

TYPICAL = 0.6
"""The quantile of a LoRA's divergences over the image that is typical of it: high for one that is at home in most of
it, low for one that has a corner."""
COHESION = 4.0
"""The power of a LoRA's mean weight around a patch that its weight there is multiplied by."""
LEAST = 1e-4
"""A mean weight counts at least this much: who is nowhere around may still win by divergence."""


def typical(relative: Tensor) -> Tensor:
    """What is typical of each LoRA in its image, ``[N, R, h, w] -> [N, R]``."""
    return torch.quantile(relative.flatten(-2), TYPICAL, dim=-1)


def at_least_typical(relative: Tensor, usual: Tensor) -> Tensor:
    """Relative divergences ``[N, R, h, w]``, none below what is typical of its LoRA in its image, ``usual [N, R]``."""
    return torch.maximum(relative, usual[..., None, None])


def log_neighbourhood(weights: Tensor, reach: int) -> Tensor:
    """The logarithm of the factor on each weight by the weights in a window of ``2 * reach`` cells around it, ``[N, R,
    h, w] -> [N, R, h, w]``; at an edge, of the cells that there are."""
    cells = window_sum(torch.ones_like(weights[:1, :1]), 2 * reach)
    return COHESION * (window_sum(weights, 2 * reach) / cells).clamp(min=LEAST).log()
