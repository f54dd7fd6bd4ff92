"""Who else has a hand in a step of Forge's family: functions in a patcher's options, and calls of the model that are
not the host's own."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from modules import extensions
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from loratorio_ext.hosts.forge_backends import WRAPPER
from loratorio_ext.hosts.neighbours import (
    OURS,
    below,
    company,
    functions_in,
    named,
    neighbour_at_work,
    owner,
    owner_of_file,
)
from loratorio_ext.isolation import uncompiled


def functions_of(options: Any) -> Iterator[Callable]:
    """Every function in a tree of options."""
    if isinstance(options, Mapping):
        options = options.values()
    elif not isinstance(options, (list, tuple)):
        if callable(options) and not isinstance(options, (type, nn.Module)):
            yield options
        return
    for each in options:
        yield from functions_of(each)


def name_of(function: Callable) -> str:
    """Whose function it is: an extension's, built in or not, else the file of the host's that it comes from."""
    found = owner(function)
    if found is not None:
        return found
    files = [os.path.realpath(each.__code__.co_filename) for each in functions_in(function)]
    built_in = [each for each in extensions.extensions if each.is_builtin]
    for file in files:
        for extension in built_in:
            if below(file, extension.path):
                return extension.name
    return Path(files[0]).stem if files else type(function).__name__


def controls_of(entries: Iterable[dict]) -> list[Any]:
    """The entries' control models: each with those that were linked to it before."""
    found = {}
    for control in (entry.get("control") for entry in entries):
        while control is not None:
            found[id(control)] = control
            control = getattr(control, "previous_controlnet", None)
    return list(found.values())


def name_of_control(control: Any) -> str:
    """Whose control model it is: an extension's, else what the host calls it."""
    kind = type(control)
    return owner_of_file(getattr(sys.modules.get(kind.__module__), "__file__", None) or "") or kind.__name__


def places_of(module: nn.Module) -> set[int]:
    """Where in memory a module's weights lie, as far as they tell."""
    places = set()
    for weight in module.parameters():
        with suppress(RuntimeError, NotImplementedError):  # quantised ones may have no memory of their own
            places.add(weight.untyped_storage().data_ptr())
    return places - {0}


def made_of(control: Any, model: nn.Module) -> bool:
    """Whether a control model has weights of the model itself: then LoRAs that are merged into the one act in the
    other, too."""
    modules = [each for each in vars(control).values() if isinstance(each, nn.Module)]
    return not set().union(*map(places_of, modules)).isdisjoint(places_of(model))


class Company:
    """Those who take part in the evaluation of one step's entries.

    ``names``: who they are. They know nothing of a batch that holds several LoRAs' rows (control models may remember
    how many rows there were at first), so beside them one LoRA after the other is evaluated.
    """

    def __init__(self, model: Any, options: dict, entries: Iterable[dict]):
        functions = dict.fromkeys(functions_of(options.get("transformer_options", {})))  # one may be at many places
        if WRAPPER in options:
            functions[options[WRAPPER]] = None
        others = company((model, *model.modules()), (model.apply_model, scaled_dot_product_attention))
        controls = map(name_of_control, controls_of(entries))
        self.names = list(dict.fromkeys([*others, *map(name_of, functions), *controls]))

    def __bool__(self) -> bool:
        return bool(self.names)

    def __str__(self) -> str:
        return named(self.names)


class Watched(dict):
    """A patcher's store of LoRAs that tells who goes through it beside the host: to change, in the middle of sampling,
    LoRAs that are not there."""

    def __init__(self, store: Mapping, tell: Callable[[str], Any]):
        super().__init__(store)
        self.tell = tell

    def items(self):
        who = owner_of_file(sys._getframe(1).f_code.co_filename)
        if who is not None:
            self.tell(who)
        return super().items()


@contextmanager
def alone(
    model: nn.Module, ours: Callable[[], bool], refuse: Callable[[str], Exception], options: Callable[[], Mapping]
) -> Iterator[None]:
    """While entered, the model answers only while ``ours()`` is true; ``refuse`` is told who else has called it:
    an extension, or a function among ``options()``, the patcher's. Nor is the model run as it was compiled: such code
    looks for nobody who asks who has called it."""

    def look(_module: nn.Module, _args: tuple) -> None:
        if not ours():
            raise refuse(caller(options()))

    handle = model.diffusion_model.register_forward_pre_hook(look)
    try:
        with uncompiled():
            yield
    finally:
        handle.remove()


def caller(options: Mapping) -> str:
    """The nearest caller that is an extension, built in or not, or one of the functions in a patcher's options."""
    found = neighbour_at_work()
    frame = sys._getframe(1)
    built_in = [each for each in extensions.extensions if each.is_builtin]
    functions = {each.__code__: each for outer in functions_of(options) for each in functions_in(outer)}
    while frame is not None and found == "another extension":
        file = os.path.realpath(frame.f_code.co_filename)
        found = next((each.name for each in built_in if below(file, each.path)), found)
        if found == "another extension" and frame.f_code in functions and not below(file, OURS):
            found = name_of(functions[frame.f_code])
        frame = frame.f_back
    return found
