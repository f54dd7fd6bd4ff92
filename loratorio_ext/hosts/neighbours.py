"""Who else has a hand in the model: other extensions' functions where the host's or PyTorch's own used to be.

They are told by what is replaced and by whose code it is, never by name, so that one nobody has heard of is seen, too.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from types import CodeType, FunctionType, MethodType
from typing import Any

from modules import extensions, script_callbacks
from modules.paths_internal import script_path
from torch import nn

OURS = Path(__file__).resolve().parents[2]
REPLACEABLE = ("forward", "_forward")
"""What a module's caller runs: PyTorch's name for it, and the one that UNet blocks of the LDM family checkpoint."""
PATCHED_BY_THE_HOST = (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm, nn.MultiheadAttention)
"""The kinds of layers whose ``forward`` applies the host's LoRAs."""
DEPTH = 4
"""So many functions within functions are looked into: wrappers, decorators, what a closure holds."""


def functions_in(function: Any, depth: int = DEPTH) -> Iterator[CodeType]:
    """The code of a function, and of those that it wraps: as a partial, a decorator, a closure or a callable object."""
    if depth == 0:
        return
    if isinstance(function, partial):
        yield from functions_in(function.func, depth)
        return
    if isinstance(function, MethodType):
        function = function.__func__
    if not isinstance(function, FunctionType):
        if callable(function) and not isinstance(function, (type, nn.Module)) and hasattr(function, "__dict__"):
            yield from functions_in(type(function).__call__, depth - 1)
            for inner in vars(function).values():
                yield from functions_in(inner, depth - 1)
        return
    yield function.__code__
    yield from functions_in(getattr(function, "__wrapped__", None), depth - 1)
    for cell in function.__closure__ or ():
        try:
            inner = cell.cell_contents
        except ValueError:  # a variable that has no value yet
            continue
        if callable(inner) and not isinstance(inner, (type, nn.Module)):
            yield from functions_in(inner, depth - 1)


def place(path: Any) -> str:
    """Where a path leads, in the one spelling that the system compares paths by."""
    return os.path.normcase(os.path.realpath(path))


def below(file: str, folder: Any) -> bool:
    return file.startswith(os.path.join(place(folder), ""))


@lru_cache(maxsize=4096)
def owner_of_file(file: str) -> str | None:
    """Whose code lies in a file: an extension's name, or that of whatever else is neither the host's, nor a package's,
    nor our own."""
    file = place(file)
    if not os.path.isfile(file):  # made up as it ran
        return None
    if below(file, OURS):
        return None
    for extension in extensions.extensions:
        if below(file, extension.path):
            return None if extension.is_builtin else extension.name
    if any(below(file, folder) for folder in (script_path, sys.prefix, sys.base_prefix)):
        return None
    return os.path.basename(file)


def owner(function: Any) -> str | None:
    """The neighbour whose function this is, or whose function it wraps; None: the host's own, or a package's."""
    return next(filter(None, (owner_of_file(code.co_filename) for code in functions_in(function))), None)


def owner_of_kind(kind: type) -> str | None:
    """The neighbour who has replaced a method of a class of modules."""
    return next(filter(None, (owner(getattr(kind, name, None)) for name in REPLACEABLE)), None)


def replacements(module: nn.Module) -> Iterator[Any]:
    """The functions that a module has of its own, in the place of its class's or around it."""
    own = vars(module)
    for name in REPLACEABLE:
        if name in own:
            yield own[name]
    yield from module._forward_pre_hooks.values()
    yield from module._forward_hooks.values()


def company(modules: Iterable[nn.Module], others: Iterable[Callable] = ()) -> list[str]:
    """The neighbours that take part in a model's evaluation, by name: who has replaced, wrapped or hooked the forward
    of any of ``modules``, or of a class of theirs, or one of the functions ``others``."""
    found: dict[str, None] = {}
    kinds = set()
    for module in modules:
        kinds.add(type(module))
        for function in replacements(module):
            found[owner(function)] = None
    for kind in kinds:
        found[owner_of_kind(kind)] = None
    for function in others:
        found[owner(function)] = None
    found.pop(None, None)
    return list(found)


def meddlers_with_loras() -> list[str]:
    """The neighbours that have replaced what applies the host's LoRAs, and so decide for themselves which ones act."""
    found = (owner_of_kind(kind) for kind in PATCHED_BY_THE_HOST)
    return list(dict.fromkeys(filter(None, found)))


def callers_of(category: str) -> list[str]:
    """The neighbours with a callback of this kind."""
    found = (owner(each.callback) for each in script_callbacks.callback_map[f"callbacks_{category}"])
    return list(dict.fromkeys(filter(None, found)))


def neighbour_at_work() -> str:
    """The nearest caller of ours that is a neighbour."""
    frame = sys._getframe(1)
    while frame is not None:
        found = owner_of_file(frame.f_code.co_filename)
        if found is not None:
            return found
        frame = frame.f_back
    return "another extension"


def named(neighbours: Iterable[str]) -> str:
    """Neighbours as a sentence names them."""
    return ", ".join(neighbours) or "another extension"
