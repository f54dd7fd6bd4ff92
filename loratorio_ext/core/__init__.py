"""The mathematics of LoRAtorio as pure tensor functions: no host, no I/O, no global state.

Shapes: ``N`` LoRAs, ``B`` images (or prompt rows), ``C`` latent channels, ``H x W`` latent pixels,
``h x w`` patches of ``patch_size`` latent pixels (``h = ceil(H / patch_size)``).
"""

from loratorio_ext.core.composition import (
    adaptive_temperature,
    compose,
    recenter,
    relative_divergence,
    relative_similarity,
    softmin_weights,
)
from loratorio_ext.core.gates import gates
from loratorio_ext.core.methods import (
    ComposedStep,
    Composite,
    LoRAtorio,
    Merge,
    Method,
    Plan,
    Predictions,
    Switch,
)
from loratorio_ext.core.momentum import Momentum
from loratorio_ext.core.patches import (
    DIVERGENCE,
    patch_divergence,
    patch_similarity,
    upsample_weights,
    window_divergence,
)
from loratorio_ext.core.registry import METHODS, method_from
from loratorio_ext.core.reselection import Reselection
from loratorio_ext.core.reuse import InTurn
from loratorio_ext.core.selection import top_k_mask

__all__ = [
    "DIVERGENCE",
    "METHODS",
    "ComposedStep",
    "Composite",
    "InTurn",
    "LoRAtorio",
    "Merge",
    "Method",
    "Momentum",
    "Plan",
    "Predictions",
    "Reselection",
    "Switch",
    "adaptive_temperature",
    "compose",
    "gates",
    "method_from",
    "patch_divergence",
    "patch_similarity",
    "recenter",
    "relative_divergence",
    "relative_similarity",
    "softmin_weights",
    "top_k_mask",
    "upsample_weights",
    "window_divergence",
]
