"""Side branches: what a LoRA adds to one layer's output, computed beside the layer instead of in its weight.

For a layer that is linear in its weight, ``f(x; W + dW) = f(x; W) + f(x; dW)``. A `LowRank` branch never forms
``dW``; a `Delta` branch holds it, for every kind of network that is no low-rank product.

``apply`` methods add to the output rows of one group: the batch holds the rows of ``k`` LoRAs one after the other,
equally many each (``R``), and segment ``j`` of it belongs to the group's ``j``-th LoRA.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class LowRank:
    """``dW = scale * up @ [mid] @ down``, for Linear and Conv2d layers.

    ``down``: ``[r, in]``, ``[r, in, kh, kw]`` or that flattened to ``[r, in * kh * kw]``; ``up``: ``[out, r]``; ``mid``
    (CP decomposition of a convolution): ``[r, r', kh, kw]`` with ``down`` then ``[r', in]``. Matrices may have trailing
    dimensions of one.
    """

    down: Tensor
    up: Tensor
    scale: float
    mid: Tensor | None = None


@dataclass(frozen=True)
class Delta:
    """The whole difference ``dW`` and ``db`` (either may be None), for any layer linear in its weight and bias."""

    weight: Tensor | None
    bias: Tensor | None = None


Branch = Union[LowRank, Delta]


def tensors_of(branch: Branch) -> dict[str, Tensor]:
    """The branch's tensors by field."""
    return {name: value for name, value in vars(branch).items() if isinstance(value, Tensor)}


def in_main_memory(branch: Branch) -> Branch:
    """The branch with its tensors on the CPU, for one of many that shall only come to the device batch by batch."""
    return replace(branch, **{name: value.cpu() for name, value in tensors_of(branch).items()})


def scaled(branch: Branch, factor: float) -> Branch:
    """The branch so many times as strong."""
    if isinstance(branch, LowRank):
        return replace(branch, scale=branch.scale * factor)
    return replace(branch, **{name: value * factor for name, value in tensors_of(branch).items()})


def is_finite(branch: Branch) -> bool:
    """Whether no number of the branch is NaN or infinite."""
    numbers = (value.float() for value in tensors_of(branch).values())  # float8 knows no isfinite
    return math.isfinite(getattr(branch, "scale", 1.0)) and all(bool(each.isfinite().all()) for each in numbers)


def is_inert(branch: Branch) -> bool:
    """Whether the branch adds nothing to any output: a factor of a product, or all of a difference, is zero."""
    zero = [not bool(value.float().any()) for value in tensors_of(branch).values()]
    return branch.scale == 0 or any(zero) if isinstance(branch, LowRank) else all(zero)


def nbytes(*tensors: Tensor | None) -> int:
    """The memory that tensors take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


class LinearBranches:
    """Low-rank branches of a Linear layer for a group of LoRAs: two batched products over stacked matrices.

    Smaller ranks are filled up with zeros. ``positions`` are the segments that have a branch here at all; a LoRA that
    has several segments of the batch is stacked once.
    """

    def __init__(self, branches: Sequence[LowRank], positions: Sequence[int], group_size: int, like: Tensor):
        def to_rank(branch: LowRank) -> Tensor:
            down = branch.down.flatten(1).to(like)
            return down if branch.mid is None else branch.mid.flatten(1).to(like) @ down

        distinct = {id(branch): branch for branch in branches}
        downs = [to_rank(branch) for branch in distinct.values()]
        ups = [(branch.up.flatten(1).to(like) * branch.scale) for branch in distinct.values()]
        for down, up in zip(downs, ups):
            if up.shape[1] != down.shape[0]:
                raise ValueError(f"up {tuple(up.shape)} and down {tuple(down.shape)} differ in rank")
        rank = max(down.shape[0] for down in downs)
        self.down = torch.stack([F.pad(down, (0, 0, 0, rank - down.shape[0])).T for down in downs])
        self.up = torch.stack([F.pad(up, (0, rank - up.shape[1])).T for up in ups])
        order = list(distinct)
        self.stacked = [order.index(id(branch)) for branch in branches]
        self.positions, self.group_size = positions, group_size
        self.nbytes = nbytes(self.down, self.up)

    def apply(self, layer: nn.Module, x: Tensor, out: Tensor) -> Tensor:
        """``x [k * R, ..., in]``, ``out [k * R, ..., out]``; returns ``out`` with the branches added."""
        xs = x.to(out.dtype).reshape(self.group_size, -1, x.shape[-1])
        ys = out.reshape(self.group_size, -1, out.shape[-1])
        first, last = self.positions[0], self.positions[-1]
        if last - first + 1 == len(self.positions):
            ours = slice(first, last + 1)
            one_each = len(self.down) == len(self.positions)
            down, up = (self.down, self.up) if one_each else (self.down[self.stacked], self.up[self.stacked])
            ys[ours].baddbmm_(torch.bmm(xs[ours], down).to(ys.dtype), up)
        else:
            for position, index in zip(self.positions, self.stacked):
                ys[position].addmm_(torch.mm(xs[position], self.down[index]).to(ys.dtype), self.up[index])
        return ys.view(out.shape)


class ConvBranches:
    """Low-rank branches of a Conv2d layer: a narrow convolution down to the rank, and a 1x1 one up.

    The narrow convolution takes the layer's own stride, padding and padding mode (tiling makes it circular).
    """

    def __init__(self, branches: Sequence[LowRank], positions: Sequence[int], group_size: int, like: Tensor):
        def kernel(weight: Tensor) -> Tensor:
            weight = weight.to(like)
            return weight if weight.ndim == 4 else weight[:, :, None, None]

        self.parts = [
            (
                position,
                kernel(branch.down),
                None if branch.mid is None else kernel(branch.mid),
                kernel(branch.up) * branch.scale,
            )
            for position, branch in zip(positions, branches)
        ]
        self.group_size = group_size
        self.nbytes = sum(nbytes(*tensors) for _, *tensors in self.parts)

    def apply(self, layer: nn.Conv2d, x: Tensor, out: Tensor) -> Tensor:
        """``x [k * R, in, H, W]``, ``out [k * R, out, H', W']``; returns ``out`` with the branches added."""
        xs, ys = x.chunk(self.group_size), out.chunk(self.group_size)
        for position, down, mid, up in self.parts:
            hidden = xs[position].to(out.dtype)
            if mid is None:
                if down.shape[1] != layer.in_channels:  # a whole kernel in linear shape
                    down = down.reshape(len(down), layer.in_channels, *layer.kernel_size)
                hidden = layer._conv_forward(hidden, down, None)
            else:
                hidden = layer._conv_forward(F.conv2d(hidden, down), mid, None)
            ys[position].add_(F.conv2d(hidden, up))
        return out


def apply_delta(layer: nn.Module, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """The layer's operation with another weight and bias in place of its own; without a weight, the bias alone."""
    if weight is None:
        channels_second = isinstance(layer, (nn.Conv2d, nn.GroupNorm))
        return bias.view(-1, *[1] * (x.ndim - 2)) if channels_second else bias
    if isinstance(layer, nn.GroupNorm):
        return F.group_norm(x, layer.num_groups, weight, bias, layer.eps)
    if isinstance(layer, nn.LayerNorm):
        return F.layer_norm(x, layer.normalized_shape, weight, bias, layer.eps)
    if isinstance(layer, nn.Conv2d):
        return layer._conv_forward(x, weight, bias)
    return F.linear(x, weight, bias)


class DeltaBranches:
    """Full-size branches of any layer: its own operation once more with the difference as weight."""

    def __init__(self, branches: Sequence[Delta], positions: Sequence[int], group_size: int, like: Tensor):
        def full(branch: Delta) -> tuple[Tensor, Tensor | None]:
            bias = None if branch.bias is None else branch.bias.to(like)
            return None if branch.weight is None else branch.weight.to(like), bias

        self.parts = [(position, *full(branch)) for position, branch in zip(positions, branches)]
        self.group_size = group_size
        self.nbytes = sum(nbytes(*tensors) for _, *tensors in self.parts)

    def apply(self, layer: nn.Module, x: Tensor, out: Tensor) -> Tensor:
        """``x [k * R, ...]``, ``out [k * R, ...]``; returns ``out`` with the branches added."""
        xs, ys = x.chunk(self.group_size), out.chunk(self.group_size)
        for position, weight, bias in self.parts:
            ys[position].add_(apply_delta(layer, xs[position].to(out.dtype), weight, bias))
        return out


def stack(layer: nn.Module, branches: Sequence[Branch | None], like: Tensor) -> list:
    """The branches of one layer for a group of LoRAs (None: this LoRA leaves the layer alone), ready to apply.

    ``like`` gives the device and dtype of the layer's output.
    """
    kinds = {LowRank: ConvBranches if isinstance(layer, nn.Conv2d) else LinearBranches, Delta: DeltaBranches}
    ready = []
    for kind, stacked in kinds.items():
        found = [(position, branch) for position, branch in enumerate(branches) if isinstance(branch, kind)]
        if found:
            positions, members = zip(*found)
            ready.append(stacked(members, positions, len(branches), like))
    return ready
