"""Networks that are no plain LoRA, as exact differences of a layer's weight, by LyCORIS' own functions.

LoHa, LoKr, OFT, BOFT, GLoRA, IA3, full differences, norms and DoRA, under the names of kohya's files and LyCORIS',
layer by layer: a file may hold several kinds. A multiplier multiplies the difference. (LyCORIS' modules know the same,
but count alpha twice in the differences that they give for LoHa and LoKr.)
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from lycoris.functional import boft, diag_oft, weight_decompose
from lycoris.functional import loha as hadamard
from lycoris.functional import lokr as kronecker
from torch import Tensor, nn

from loratorio_ext.isolation import Branch, Delta, LowRank

Parts = Mapping[str, Tensor]
"""What a file holds of one layer, by the last part of its key."""

OTHER_NAMES = {
    "lora_A.weight": "lora_down.weight",
    "lora_B.weight": "lora_up.weight",
    "lora_magnitude_vector": "dora_scale",
    "lora_magnitude_vector.weight": "dora_scale",
}
"""PEFT's names, and ours."""


def alpha_by(parts: Parts, rank: int) -> float:
    """The scale of a product of this rank: alpha by rank; 1 without an alpha."""
    return float(parts["alpha"]) / rank if "alpha" in parts else 1.0


def low_rank(parts: Parts, weight: Tensor) -> Tensor:
    """``up @ [mid] @ down``."""
    up, down, mid = parts["lora_up.weight"], parts["lora_down.weight"], parts.get("lora_mid.weight")
    scale = alpha_by(parts, len(down))
    if mid is not None:
        return scale * torch.einsum("or, rskl, si -> oikl", up.flatten(1), mid, down.flatten(1))
    return scale * (up.flatten(1) @ down.flatten(1))


def loha(parts: Parts, weight: Tensor) -> Tensor:
    """The elementwise product of two low-rank matrices."""
    names = ("hada_w1_b", "hada_w1_a", "hada_w2_b", "hada_w2_a")
    cores = (parts.get("hada_t1"), parts.get("hada_t2"))
    gamma = alpha_by(parts, len(parts["hada_w1_b"]))
    return hadamard.diff_weight(*(parts[name] for name in names), *cores, gamma=gamma)


def lokr(parts: Parts, weight: Tensor) -> Tensor:
    """The Kronecker product of two matrices, each whole or of low rank; whole ones have no scale."""
    names = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
    w1, w1_a, w1_b, w2, w2_a, w2_b, core = (parts.get(name) for name in names)
    ranks = [len(factor) for factor in (w1_b, w2_b) if factor is not None]
    w2 = w2.flatten(1) if w2 is not None and core is None else w2
    return kronecker.kron_weight(
        w1, w1_a, w1_b, w2, w2_a, w2_b, core, scale=alpha_by(parts, ranks[0]) if ranks else 1.0
    )


def rotation(parts: Parts, weight: Tensor) -> Tensor:
    """Blocks of outputs rotated: once (OFT), or in several rounds (BOFT). Alpha bounds the norm of the blocks."""
    blocks, rescale = parts["oft_blocks"], parts.get("rescale")
    kind = boft if blocks.ndim == 4 else diag_oft
    rows = weight.flatten(1)
    rescale = None if rescale is None else rescale.reshape(-1, 1)
    return kind.diff_weight(rows, blocks, rescale, constraint=float(parts.get("alpha", 0)) * len(weight))


def glora(parts: Parts, weight: Tensor) -> Tensor:
    """``W a1 a2 + b1 b2``; in older files the numbers are the other way round."""
    a1, a2, b1, b2 = (parts[f"{name}.weight"] for name in ("a1", "a2", "b1", "b2"))
    if a1.shape[0] != weight.shape[1]:
        a1, a2, b1, b2 = a2, a1, b2, b1
    return alpha_by(parts, a1.shape[1]) * (weight @ a1 @ a2 + b1 @ b2)


def ia3(parts: Parts, weight: Tensor) -> Tensor:
    """A factor for each input, or for each output."""
    factor = parts["weight"].flatten()
    return weight * (factor if bool(parts["on_input"]) else factor.reshape(-1, *[1] * (weight.ndim - 1)))


def full(parts: Parts, weight: Tensor) -> Tensor:
    """The difference itself."""
    return parts["diff"]


def norm(parts: Parts, weight: Tensor) -> Tensor:
    return parts["w_norm"]


KINDS: dict[str, tuple[Callable[[Parts, Tensor], Tensor], frozenset[str]]] = {
    "lora_down.weight": (
        low_rank,
        frozenset({"lora_up.weight", "lora_down.weight", "lora_mid.weight", "alpha", "dora_scale"}),
    ),
    "hada_w1_a": (
        loha,
        frozenset({f"hada_{part}" for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")} | {"alpha", "dora_scale"}),
    ),
    "lokr_w": (
        lokr,
        frozenset(
            {f"lokr_{part}" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")} | {"alpha", "dora_scale"}
        ),
    ),
    "oft_blocks": (rotation, frozenset({"oft_blocks", "rescale", "alpha"})),
    "a1.weight": (glora, frozenset({"a1.weight", "a2.weight", "b1.weight", "b2.weight", "alpha"})),
    "on_input": (ia3, frozenset({"weight", "on_input"})),
    "diff": (full, frozenset({"diff", "diff_b"})),
    "w_norm": (norm, frozenset({"w_norm", "b_norm"})),
}
"""Kinds by the beginning of a part that tells them, with all parts that they have."""

MARKS = (
    "hada_",
    "lokr_",
    "oft_",
    "on_input",
    "diff",
    "w_norm",
    "dora_scale",
    "lora_magnitude",
    "lora_mid",
    "a1.weight",
)
"""Beginnings of parts that no plain LoRA has."""

ALL_PARTS = sorted({*OTHER_NAMES, *(part for _, parts in KINDS.values() for part in parts)}, key=len, reverse=True)


def part_of(key: str) -> str | None:
    """The part of a layer that a key names, if it is one known here."""
    return next((part for part in ALL_PARTS if key.endswith(f".{part}")), None)


def is_lycoris(keys: Iterable[str]) -> bool:
    """Whether a file holds other networks than plain LoRAs, or these under kohya's names with PEFT's parts."""
    return any(
        f".{mark}" in key for key in keys for mark in (*MARKS, *(["lora_A."] if key.startswith("lora_") else []))
    )


def by_layer(values: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """A file's tensors as parts of layers; `KeyError` for what is no part of any kind."""
    layers: dict[str, dict[str, Tensor]] = {}
    for key, value in values.items():
        part = part_of(key)
        if part is None:
            raise KeyError(key)
        layers.setdefault(key.removesuffix(f".{part}"), {})[OTHER_NAMES.get(part, part)] = value
    return layers


def branch_of(name: str, parts: Parts, layer: nn.Module, multiplier: float) -> Branch:
    """What the parts of a layer come to. Raises `KeyError` naming the part that does not belong to the kind or is
    missing, `ValueError` for shapes that do not fit and weights that cannot be looked at."""
    mark = next((mark for mark in KINDS if any(part.startswith(mark) for part in parts)), None)
    difference, known = KINDS[mark] if mark is not None else (None, frozenset())
    for part in parts:
        if part not in known:
            raise KeyError(f"{name}.{part}")
    try:
        return made_branch(name, difference, parts, layer, multiplier)
    except KeyError as error:
        raise KeyError(f"{name} has {', '.join(parts)}, but no {error.args[0]}") from error


def made_branch(
    name: str, difference: Callable[[Parts, Tensor], Tensor], parts: Parts, layer: nn.Module, multiplier: float
) -> Branch:
    """`branch_of` for parts that all belong to one kind; `KeyError` for a missing one."""
    if difference is low_rank and "dora_scale" not in parts:
        down, up = parts["lora_down.weight"], parts["lora_up.weight"]
        return LowRank(down, up, alpha_by(parts, len(down)) * multiplier, parts.get("lora_mid.weight"))
    weight = layer.weight
    plain = type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point() and weight.element_size() > 1
    if not plain or weight.is_meta:
        raise ValueError(f"{name} changes a layer that is quantised or offloaded")
    weight = weight.detach().to("cpu", torch.float32)
    try:
        parts = {part: value.float() if value.is_floating_point() else value for part, value in parts.items()}
        delta = difference(parts, weight).reshape(weight.shape)
        if "dora_scale" in parts:
            delta = decomposed(weight + delta, parts["dora_scale"]) - weight
    except RuntimeError as error:
        raise ValueError(f"{name}: {', '.join(parts)} do not fit a layer {tuple(weight.shape)}: {error}") from error
    bias = parts.get("diff_b", parts.get("b_norm"))
    return Delta(delta * multiplier, None if bias is None else bias * multiplier)


def decomposed(weight: Tensor, scale: Tensor) -> Tensor:
    """DoRA: the weight with its norms, of each output or of each input, brought to ``scale``, as many numbers."""
    on_outputs = scale.shape[0] == scale.numel()
    shape = (-1, 1) if on_outputs else (1, -1)
    return weight_decompose(weight, scale.reshape(*shape, *[1] * (weight.ndim - 2)), wd_on_out=on_outputs)
