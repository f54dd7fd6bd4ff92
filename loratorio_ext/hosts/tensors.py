"""Tensors in what models, and other people's functions, hand over or keep."""

from collections.abc import Iterator
from math import inf
from typing import Any

from torch import Tensor


def tensors_in(value: Any, depth: float = inf) -> Iterator[Tensor]:
    """All tensors in nested dicts, lists and tuples, in their order; at most ``depth`` containers deep."""
    if isinstance(value, Tensor):
        yield value
    elif depth > 0 and isinstance(value, (dict, list, tuple)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(each, depth - 1)
