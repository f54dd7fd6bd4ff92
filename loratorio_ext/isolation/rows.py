"""Which rows of a batch belong to which LoRA, and the hooks that give each row its own."""

import math
import sys
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import groupby

import torch
from torch import Tensor, nn

from loratorio_ext.isolation.branches import Branch, stack
from loratorio_ext.isolation.memory import budget_for_matrices


def shared_length(group: Sequence[int]) -> int:
    """The largest number of consecutive rows into which ``group``, the LoRA of each row, can be cut so that no piece
    holds two LoRAs' rows: 2 for ``0 0 1 1 2 2``, 1 for ``0 0 1 2``."""
    return math.gcd(*(len(list(run)) for _, run in groupby(group)))


class Stacks:
    """What was stacked for layers and groups, the least recently used given up where it would take more than ``budget``
    bytes (None: what `budget_for_matrices` says, asked when the first is kept)."""

    def __init__(self, budget: int | None = None):
        self._asked = self.budget = budget
        self.nbytes = 0
        self._kept: OrderedDict[tuple, tuple[list, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def clear(self) -> None:
        self._kept.clear()
        self.nbytes, self.budget = 0, self._asked

    def get(self, key: tuple) -> list | None:
        if key not in self._kept:
            return None
        self._kept.move_to_end(key)
        return self._kept[key][0]

    def keep(self, key: tuple, ready: list, device: torch.device) -> None:
        """Keep what fits into the budget by itself, and make room for it."""
        size = sum(each.nbytes for each in ready)
        if self.budget is None:
            self.budget = budget_for_matrices(device)
        if size > self.budget:
            return
        while self.nbytes + size > self.budget:
            _, (_, given_up) = self._kept.popitem(last=False)
            self.nbytes -= given_up
        self._kept[key] = (ready, size)
        self.nbytes += size


def uncompiled() -> AbstractContextManager:
    """While entered, modules that `torch.compile` was asked for run as they are written: code that was compiled before
    does not look for hooks that came later. (PyTorch 2.6 and later; nothing else before.)"""
    if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
        return torch.compiler.set_stance("force_eager")
    return nullcontext()


class Isolation:
    """LoRAs that can act row by row on a model that itself holds none of them.

    ``layers``: the model's layers by name; ``loras``: for each LoRA its branches by layer name. Nothing is hooked
    until `rows` is entered, and nothing stays hooked after it is left. Stacked matrices are made once for a group of
    LoRAs and kept until `forget`, or until they would take more memory than ``budget`` bytes (see `Stacks`): then they
    are made again when they are needed.
    """

    def __init__(
        self, layers: Mapping[str, nn.Module], loras: Sequence[Mapping[str, Branch]], budget: int | None = None
    ):
        self.loras = loras
        touched = dict.fromkeys(name for lora in loras for name in lora)
        self.layers = {name: layers[name] for name in touched}
        self.ran: set[str] = set()
        """The layers with a branch that were called under the rows entered last."""
        self._stacks = Stacks(budget)

    def forget(self) -> None:
        """Free the stacked matrices, for a new split of the LoRAs into groups."""
        self._stacks.clear()

    @contextmanager
    def rows(self, group: Sequence[int]) -> Iterator[None]:
        """While entered, a batch holds the rows of the LoRAs ``group`` (indices), in this order, equally many for each
        entry."""
        group = tuple(group[:: shared_length(group) or 1])  # few segments, so that each LoRA is stacked once
        handles = []
        self.ran = set()
        try:
            for name, layer in self.layers.items():
                if any(name in self.loras[index] for index in group):
                    handles.append(layer.register_forward_hook(self._hook(name, group)))
            with uncompiled() if handles else nullcontext():
                yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def merged(self, members: Iterable[int] | None = None) -> Iterator[None]:
        """While entered, LoRAs (None: all) act on every row together, as if their weights were summed."""
        with ExitStack() as stack:
            for index in range(len(self.loras)) if members is None else members:
                stack.enter_context(self.rows([index]))
            yield

    def _hook(self, name: str, group: tuple[int, ...]):
        def add_branches(layer: nn.Module, args: tuple, out: Tensor) -> Tensor:
            self.ran.add(name)
            if out.shape[0] % len(group):
                raise ValueError(f"{out.shape[0]} rows at {name} cannot be shared equally by {len(group)} LoRAs")
            key = (name, group, out.device, out.dtype)
            ready = self._stacks.get(key)
            if ready is None:
                ready = stack(layer, [self.loras[index].get(name) for index in group], out)
                self._stacks.keep(key, ready, out.device)
            with torch.no_grad():
                for branches in ready:
                    out = branches.apply(layer, args[0], out)
            return out

        return add_branches
