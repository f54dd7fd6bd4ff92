"""The stores of LoRAs of Forge's family, and side branches made of what is in them.

A store holds patches by parameter name (``diffusion_model.....weight``). A patch is the sequence ``strength, value,
strength of the weight, offset, function``, whatever the host; the last three are for values that are not simply added
to the whole parameter. What may follow is of no account for what is added.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loratorio_ext.isolation import Branch, Delta, LowRank

Patches = dict[str, list[Sequence[Any]]]
"""Patches by parameter name."""

WITHOUT_BRANCHES = (nn.Conv1d, nn.Conv3d, nn.modules.conv._ConvTransposeNd, nn.Embedding)
"""Layers that side branches know no operation of."""

Merge = Callable[[list, Tensor, str], Tensor]
"""``merge(patches, weight, name)``: the host's own arithmetic, on a copy of the weight."""


def joined(stores: Sequence[Patches]) -> Patches:
    """All stores' patches, one LoRA's after the other's, as the host merges them."""
    names = dict.fromkeys(name for store in stores for name in store)
    return {name: [patch for store in stores for patch in store.get(name, ())] for name in names}


def strengths_of(stores: Sequence[Patches]) -> dict[str, Counter]:
    """How often each strength occurs at each parameter."""
    found: dict[str, Counter] = {}
    for store in stores:
        for name, patches in store.items():
            found.setdefault(name, Counter()).update(float(patch[0]) for patch in patches)
    return {name: counter for name, counter in found.items() if counter}


def as_held(own: Sequence[Patches], held: Patches) -> list[Patches]:
    """Each LoRA's patches as the host holds them, in prompt order: other extensions may have changed their strengths,
    block by block say. Raises ValueError where it cannot be told whose they are."""
    if not held or strengths_of(own) == strengths_of([held]):
        return list(own)
    counts = Counter(name for store in own for name, patches in store.items() for _ in patches)
    if counts != {name: len(patches) for name, patches in held.items() if patches}:
        raise ValueError("the host holds other patches than the prompt's files have")
    rest = {name: iter(patches) for name, patches in held.items()}
    return [{name: [next(rest[name]) for _ in patches] for name, patches in store.items()} for store in own]


def matrices(value: Any) -> tuple | None:
    """Up, down, alpha, mid and whatever follows, of a patch's value; None where that is no LoRA or LoCon."""
    kind, weights = (value.name, value.weights) if hasattr(value, "weights") else (value[0], value[-1])
    return tuple(weights) if isinstance(kind, str) and kind == "lora" else None


def low_rank(patches: Sequence[Sequence[Any]], shape: torch.Size) -> LowRank | None:
    """One branch for all patches of a weight of this shape, or None where some are no plain low-rank product of it."""
    parts = []
    for strength, value, strength_of_weight, offset, function, *_ in patches:
        found = matrices(value)
        if found is None or strength_of_weight != 1 or function is not None:
            return None
        up, down, alpha, mid, *others = found
        if any(other is not None for other in others):
            return None
        up = up.flatten(1).float() * (strength * (1.0 if alpha is None else float(alpha) / down.shape[0]))
        if mid is not None:
            fits = (len(up), down.shape[1], *mid.shape[2:]) == tuple(shape) and offset is None
            return LowRank(down, up, 1.0, mid) if fits and len(patches) == 1 else None
        if offset is not None:  # rows of a projection that holds several, one after the other
            dimension, first, length = offset
            if dimension != 0 or len(up) != length:
                return None
            up = F.pad(up, (0, 0, first, shape[0] - first - length))
        if len(up) != shape[0] or down[0].numel() != shape[1:].numel():
            return None
        parts.append((up, down.reshape(len(down), *shape[1:])))
    ups, downs = zip(*parts)
    return LowRank(torch.cat([down.to(downs[0]) for down in downs]), torch.cat(ups, dim=1), 1.0)


def check_size(patches: Sequence[Sequence[Any]], shape: torch.Size) -> None:
    """Raises ValueError for matrices whose product cannot be a change of a weight of this shape.

    Some hosts only log that they cannot merge such a patch, and leave the weight as it is.
    """
    for _, value, _, offset, *_ in patches:
        found = matrices(value)
        if found is None or offset is not None or found[3] is not None:
            continue
        up, down = found[:2]
        if len(up) * down[0].numel() != shape.numel():
            raise ValueError(f"it is for a layer of {len(up)} x {down[0].numel()}, this one has {tuple(shape)}")


def delta(patches: Sequence[Sequence[Any]], weight: Tensor, name: str, merge: Merge) -> Tensor:
    """What merging would add to the weight; raises where the host would fail, too."""
    check_size(patches, weight.shape)
    exact = weight.float()
    change = merge(list(patches), exact, name) - exact
    if change.shape != exact.shape:
        raise ValueError(f"it would change the shape {tuple(exact.shape)} to {tuple(change.shape)}")
    return change.to(weight.dtype) if weight.dtype.itemsize > 1 else change


def owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The layer that holds a parameter, and the parameter's name in it."""
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def branch(layer: nn.Module, leaf: str, patches: Sequence[Sequence[Any]], weight: Tensor, merge: Merge) -> Branch:
    """The side branch of these patches at a layer's ``weight`` or ``bias``; raises where there can be none."""
    if leaf == "bias":
        return Delta(None, delta(patches, weight, leaf, merge))
    if leaf != "weight" or isinstance(layer, WITHOUT_BRANCHES):
        raise ValueError(f"{type(layer).__name__}.{leaf} takes no side branch")
    plain = isinstance(layer, nn.Conv2d) or weight.ndim == 2
    return (low_rank(patches, weight.shape) if plain else None) or Delta(delta(patches, weight, leaf, merge))


def branches(
    model: nn.Module, store: Patches, weight: Callable[[nn.Module, str], Tensor], merge: Merge
) -> tuple[Mapping[str, Branch], dict[str, Exception]]:
    """A LoRA's branches by parameter name, and the parameters that it does not fit with what was wrong.

    ``weight(layer, leaf)`` is a layer's weight or bias as the layer uses it.
    """
    fitting, misfits = {}, {}
    for name, patches in store.items():
        try:
            layer, leaf = owner(model, name)
            fitting[name] = branch(layer, leaf, patches, weight(layer, leaf), merge)
        except (AttributeError, RuntimeError, ValueError) as error:
            misfits[name] = error
    return fitting, misfits
