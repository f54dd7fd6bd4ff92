"""Axes for the hosts' X/Y/Z plot, made from the table of options. No host is imported: its script is handed over.

An axis puts its value, by name, in front of the values that the host hands the extension's script, where it wins over
the panel's; so what an axis asks for reaches other machines as what any request asks for.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from loratorio_ext.errors import SettingsError, nearest_name, shown
from loratorio_ext.settings import OPTION, OPTIONS, PRESETS, UNTOUCHED_BY_PRESETS, Claims, Lines, Option

TITLE = "LoRAtorio"
FILE = "xyz_grid.py"
SWITCH = {"off": False, "on": True}
METHODS = {name: "LoRAtorio" if name == "loratorio" else name.capitalize() for name in OPTION["method"].choices}
"""The methods by the names that people know them by."""


def values_of(p: Any) -> tuple[int, list[Any]]:
    """Where the script's values begin among all scripts', and these."""
    script = next(script for script in p.scripts.scripts if script.title() == TITLE)
    return script.args_from, list(p.script_args[script.args_from : script.args_to])


def named(first: Any) -> dict[str, Any]:
    """The options by name that the first of a script's values holds, or the switch alone."""
    return dict(first) if isinstance(first, Mapping) else {"enabled": first}


def replace_values(p: Any, start: int, values: list[Any]) -> None:
    """Give ``p`` its own values: those of the request that it is a copy of stay as they are."""
    before = list(p.script_args)
    p.script_args = (*before[:start], *values, *before[start + len(values) :])


def set_option(p: Any, name: str, value: Any) -> None:
    start, (first, *rest) = values_of(p)
    replace_values(p, start, [{**named(first), name: value}, *rest])


def set_preset(p: Any, name: str) -> None:
    """As when the preset is chosen in the panel: what it does not name is at its default. Other axes win over it."""
    start, (first, *rest) = values_of(p)
    kept = [
        value if option.name in UNTOUCHED_BY_PRESETS else option.default for option, value in zip(OPTIONS[1:], rest)
    ]
    replace_values(p, start, [{**named(first), "preset": name}, *kept])


def meant(text: str, names: Iterable[str]) -> str:
    """The name that a value on an axis means, whatever its case."""
    by_lower = {name.lower(): name for name in names}
    wanted = text.strip().lower()
    if wanted not in by_lower:
        allowed = ", ".join(by_lower.values())
        hint = nearest_name(wanted, by_lower)
        raise SettingsError(f"LoRAtorio: an X/Y/Z value must be one of {allowed}, got {shown(text)}{hint}")
    return by_lower[wanted]


def read(option: Option, value: Any) -> Any:
    """An option's value from one on an axis: of a list, its entries between semicolons, or the list in JSON."""
    if option.name == "method":
        by_nice = {nice: name for name, nice in METHODS.items()}
        return by_nice[meant(value, by_nice)]
    if isinstance(option, Lines) and not str(value).lstrip().startswith("["):
        return option.check([entry.strip() for entry in str(value).split(";") if entry.strip()])
    if isinstance(option, Claims):
        return option.check(value)
    return option.parse(value) if isinstance(value, str) else option.check(value)


def plain(value: Any) -> Any:
    """A checked value as JSON knows it."""
    return list(value) if isinstance(value, tuple) else dict(value) if isinstance(value, Mapping) else value


def axis(AxisOption: type, label: str, kind: type, read: Callable, write: Callable, say: Callable, choices=None) -> Any:
    """An axis of the host's own class. ``read``: its values, where bad ones are refused before anything is painted;
    ``write(p, value)``: to one cell's request; ``say``: a value's legend."""
    return AxisOption(
        f"[{TITLE}] {label}",
        kind,
        lambda p, value, values: write(p, read(value)),
        format_value=lambda p, option, value: say(read(value)),
        confirm=lambda p, values: list(map(read, values)),
        choices=None if choices is None else partial(list, choices),
    )


def option_axis(AxisOption: type, option: Option) -> Any:
    def write(p: Any, value: Any) -> None:
        set_option(p, option.name, plain(value))

    def say(value: Any) -> str:
        if option.name == "method":
            return METHODS[value]
        return f"{option.label}: {option.write(round(value, 8) if option.kind is float else value)}"

    choices = METHODS.values() if option.name == "method" else option.choices or None
    choices = ["False", "True"] if option.kind is bool else choices
    kind = option.kind if option.kind in (int, float) else str
    return axis(AxisOption, option.label, kind, partial(read, option), write, say, choices)


def axes(AxisOption: type) -> list[Any]:
    """On and off, presets, and every option of the table."""

    def switch(value: str) -> bool:
        return SWITCH[meant(value, SWITCH)]

    return [
        axis(
            AxisOption,
            "on/off",
            str,
            switch,
            lambda p, on: set_option(p, "enabled", on),
            lambda on: f"{TITLE} {'on' if on else 'off'}",
            SWITCH,
        ),
        axis(
            AxisOption, "Preset", str, lambda v: meant(v, PRESETS), set_preset, lambda name: f"Preset: {name}", PRESETS
        ),
        *(option_axis(AxisOption, option) for option in OPTIONS if option.name != "enabled"),
    ]


def add_axes(scripts: Iterable[Any]) -> None:
    """Add the axes to the X/Y/Z script among the host's ``scripts``, where they are not there yet."""
    for script in scripts:
        if os.path.basename(getattr(script, "path", "")) == FILE:
            known = {each.label for each in script.module.axis_options}
            script.module.axis_options.extend(
                each for each in axes(script.module.AxisOption) if each.label not in known
            )
