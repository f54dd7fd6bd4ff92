"""Which rows of a batch belong to which LoRA, and the hooks that give each row its own."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from loratorio_ext.isolation.branches import Branch, stack


class Isolation:
    """LoRAs that can act row by row on a model that itself holds none of them.

    ``layers``: the model's layers by name; ``loras``: for each LoRA its branches by layer name. Nothing is hooked
    until `rows` is entered, and nothing stays hooked after it is left. Stacked matrices are made once for a group of
    LoRAs and kept until `forget`.
    """

    def __init__(self, layers: Mapping[str, nn.Module], loras: Sequence[Mapping[str, Branch]]):
        self.loras = loras
        touched = dict.fromkeys(name for lora in loras for name in lora)
        self.layers = {name: layers[name] for name in touched}
        self._stacks: dict[tuple, list] = {}

    def forget(self) -> None:
        """Free the stacked matrices, for a new split of the LoRAs into groups."""
        self._stacks.clear()

    @contextmanager
    def rows(self, group: Sequence[int]) -> Iterator[None]:
        """While entered, a batch holds the rows of the LoRAs ``group`` (indices), in this order, equally many each."""
        group = tuple(group)
        handles = []
        try:
            for name, layer in self.layers.items():
                if any(name in self.loras[index] for index in group):
                    handles.append(layer.register_forward_hook(self._hook(name, group)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def merged(self) -> Iterator[None]:
        """While entered, all LoRAs act on every row together, as if their weights were summed."""
        with ExitStack() as stack:
            for index in range(len(self.loras)):
                stack.enter_context(self.rows([index]))
            yield

    def _hook(self, name: str, group: tuple[int, ...]):
        def add_branches(layer: nn.Module, args: tuple, out: Tensor) -> Tensor:
            if out.shape[0] % len(group):
                raise ValueError(f"{out.shape[0]} rows at {name} cannot be shared equally by {len(group)} LoRAs")
            key = (name, group, out.device, out.dtype)
            ready = self._stacks.get(key)
            if ready is None:
                ready = self._stacks[key] = stack(layer, [self.loras[index].get(name) for index in group], out)
            with torch.no_grad():
                for branches in ready:
                    out = branches.apply(layer, args[0], out)
            return out

        return add_branches
