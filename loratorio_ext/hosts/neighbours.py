"""Who else has a hand in the model: other extensions' functions where the host's or PyTorch's own used to be.

They are told by what is replaced and by whose code it is, never by name, so that one nobody has heard of is seen, too.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

from modules import extensions, script_callbacks
from modules.paths_internal import script_path
from torch import nn

from loratorio_ext.hosts.tensors import tensors_in

OURS = Path(__file__).resolve().parents[2]
REPLACEABLE = ("forward", "_forward")
"""What a module's caller runs: PyTorch's name for it, and the one that UNet blocks of the LDM family checkpoint."""
PATCHED_BY_THE_HOST = (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm, nn.MultiheadAttention)
"""The kinds of layers whose ``forward`` applies the host's LoRAs."""
TELLING = 1e-3
"""Two outputs of a model for the same rows that differ by more than this share of their length differ not by rounding.
"""
DEPTH = 4
"""So many functions within functions are looked into: wrappers, decorators, what a closure holds."""
CONTAINERS = 2
"""So deep containers that a function keeps are looked into for tensors."""


def functions_in(function: Any, depth: int = DEPTH) -> Iterator[FunctionType]:
    """A function, and those that it wraps: as a partial, a decorator, a closure or a callable object."""
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
    yield function
    yield from functions_in(getattr(function, "__wrapped__", None), depth - 1)
    for inner in held_by(function):
        if callable(inner) and not isinstance(inner, (type, nn.Module)):
            yield from functions_in(inner, depth - 1)


def held_by(function: FunctionType) -> Iterator[Any]:
    """What a function's closure holds."""
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # a variable that has no value yet
            continue


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
    return next(filter(None, (owner_of_file(each.__code__.co_filename) for each in functions_in(function))), None)


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


def taking_part(modules: Iterable[nn.Module], others: Iterable[Callable] = ()) -> dict[str, list[Any]]:
    """The neighbours that take part in a model's evaluation, by name, and their functions: what has replaced, wrapped
    or hooked the forward of any of ``modules``, or of a class of theirs, or one of the functions ``others``."""
    kinds, functions = set(), list(others)
    for module in modules:
        kinds.add(type(module))
        functions += replacements(module)
    functions += [getattr(kind, name, None) for kind in kinds for name in REPLACEABLE]
    found: dict[str, list[Any]] = {}
    for function in functions:
        whose = owner(function)
        if whose is not None:
            found.setdefault(whose, []).append(function)
    return found


def company(modules: Iterable[nn.Module], others: Iterable[Callable] = ()) -> list[str]:
    """As `taking_part`, the names alone."""
    return list(taking_part(modules, others))


def tensors_kept(functions: Iterable[Any]) -> dict[tuple, tuple]:
    """What tensors neighbours' functions keep between calls, as far as it can be seen: in the variables of their files
    and in what their closures hold. By where it is found, each with its shape and its sum."""
    kept = {}
    for function in {id(each): each for outer in functions for each in functions_in(outer)}.values():
        if owner_of_file(function.__code__.co_filename) is None:
            continue
        values = list(function.__globals__.values())
        for held in held_by(function):
            values.append(held)
            if hasattr(held, "__dict__") and not isinstance(held, (type, nn.Module, FunctionType, MethodType)):
                values += vars(held).values()
        for where, value in enumerate(values):
            for number, tensor in enumerate(tensors_in(value, CONTAINERS)):
                kept[id(function), where, number] = tuple(tensor.shape), float(tensor.float().sum())
    return kept


def meddlers_with_loras() -> list[str]:
    """The neighbours that have replaced what applies the host's LoRAs, and so decide for themselves which ones act."""
    found = (owner_of_kind(kind) for kind in PATCHED_BY_THE_HOST)
    return list(dict.fromkeys(filter(None, found)))


def callers_of(category: str) -> list[str]:
    """The neighbours with a callback of this kind."""
    found = (owner(each.callback) for each in script_callbacks.callback_map[f"callbacks_{category}"])
    return list(dict.fromkeys(filter(None, found)))


def keepers_of(loras: Iterable[Any], registry_entry: Any) -> list[str]:
    """The neighbours that have a hand in the host's LoRAs themselves: in their class, or in what reads the prompt's
    tags."""
    members = [each for kind in {type(registry_entry), *map(type, loras)} for each in vars(kind).values()]
    found = (owner(each.fget if isinstance(each, property) else each) for each in members)
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


def asker(host_file: str) -> str | None:
    """Who has asked for what its caller does: a neighbour, or None where code in the host's own file is nearer."""
    frame, host_file = sys._getframe(1), place(host_file)
    while frame is not None and place(frame.f_code.co_filename) != host_file:
        found = owner_of_file(frame.f_code.co_filename)
        if found is not None:
            return found
        frame = frame.f_back
    return None


def named(neighbours: Iterable[str]) -> str:
    """Neighbours as a sentence names them."""
    return ", ".join(neighbours) or "another extension"
