"""Axes of the X/Y/Z plot: every option has one, and a cell's request is what its values ask for.

The host's own script runs with them in `live/test_xyz.py`.
"""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from loratorio_ext.errors import SettingsError
from loratorio_ext.settings import OPTION, OPTIONS, PRESETS, Frozen, Settings
from loratorio_ext.xyz import METHODS, TITLE, add_axes, axes


@dataclass
class AxisOption:
    """With the host's names and order."""

    label: str
    type: type
    apply: Any
    format_value: Any = None
    confirm: Any = None
    cost: float = 0.0
    choices: Any = None
    prepare: Any = None


AXES = {axis.label.removeprefix(f"[{TITLE}] "): axis for axis in axes(AxisOption)}


def request(*args):
    """A host's request: another script's values stand around ours."""
    given = [*args, *(option.default for option in OPTIONS[len(args) :])]
    script = SimpleNamespace(title=lambda: TITLE, args_from=1, args_to=1 + len(OPTIONS))
    other = SimpleNamespace(title=lambda: "Other", args_from=0, args_to=1)
    return SimpleNamespace(scripts=SimpleNamespace(scripts=[other, script]), script_args=["before", *given, "after"])


def settings_of(p):
    assert (p.script_args[0], p.script_args[-1], len(p.script_args)) == ("before", "after", len(OPTIONS) + 2)
    return Settings.from_args(p.script_args[1:-1])


def apply(p, **values):
    for label, value in values.items():
        axis = AXES[label.replace("_", " ")]
        value = axis.type(value)
        axis.confirm(p, [value])
        axis.apply(p, value, [value])
    return settings_of(p)


def test_every_option_has_an_axis():
    assert list(AXES) == ["on/off", "Preset", *(option.label for option in OPTIONS if option.name != "enabled")]


@pytest.mark.parametrize("option", [o for o in OPTIONS if o.name != "enabled"], ids=lambda o: o.name)
def test_a_value_from_an_axis_is_the_options(option):
    text, value = {
        "method": ("Composite", "composite"),
        "pool": ("robot:0.8; styles/*", ("robot:0.8", "styles/*")),
        "everywhere": ('["a; b"]', ("a; b",)),
        "loras": ('{"a": {"at": "left"}}', Frozen({"a": Frozen({"at": "left"})})),
    }.get(option.name, (None, None))
    if text is None:
        value = True if option.kind is bool else option.choices[-1] if option.choices else option.high
        value = 0.5 if option.name == "end" else 0.25 if option.name == "start" else value
        text = str(value)
    found = apply(request(True), **{option.label: text})
    assert getattr(found, option.name) == value
    assert found == Settings.from_mapping({"enabled": True, option.name: value})


def test_numbers_are_numbers_so_that_ranges_of_them_can_be_asked_for():
    assert AXES["Patch size"].type is int and AXES["Temperature"].type is float


def test_on_and_off():
    assert apply(request(True), **{"on/off": "off"}).enabled is False
    assert apply(request(False), **{"on/off": "On"}).enabled is True


def test_two_axes_and_the_apis_own_options_go_together():
    p = request({"enabled": True, "patch_size": 2})
    found = apply(p, Preset="fast", Relativity="0.5", Base_share_of_guidance="0.25")
    assert (found.patch_size, found.refresh, found.base_share, found.relativity) == (2, 1, 0.25, 0.5)
    other = request({"enabled": True, "patch_size": 2})
    assert found == apply(other, Base_share_of_guidance="0.25", Relativity="0.5", Preset="fast"), "in any order"


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_what_the_panel_makes_of_it(name):
    """Whatever else is set in the panel; what presets leave alone stays."""
    panel = Settings.from_mapping({"enabled": True, "patch_size": 7, "refresh": 3, "pool": ["a"]})
    p = request(*(getattr(panel, option.name) for option in OPTIONS))
    assert apply(p, Preset=name.upper()) == Settings.from_mapping({"preset": name, "enabled": True, "pool": ["a"]})


def test_the_request_that_a_cell_is_a_copy_of_stays_as_it_was():
    p = request({"enabled": True})
    before = list(p.script_args)
    first = p.script_args[1]
    cell = SimpleNamespace(**vars(p))
    apply(cell, Patch_size="8")
    assert p.script_args == before and first == {"enabled": True}


@pytest.mark.parametrize(
    "label, value, said",
    [
        ("Patch size", 0, "patch_size must be a whole number from 1 to 64, got 0"),
        ("Method", "Compose", "did you mean composite"),
        ("Preset", "slow", "must be one of default, paper, balanced, fast"),
        ("Where, when, how much", '{"a": {"at": "up"}}', "loras.a.at must be"),
    ],
)
def test_bad_values_are_refused_before_anything_is_painted(label, value, said):
    with pytest.raises(SettingsError, match=said):
        AXES[label].confirm(None, [value])


def test_legends():
    def legend(label, value):
        return AXES[label].format_value(None, AXES[label], value)

    assert [legend("Method", name) for name in METHODS.values()] == ["LoRAtorio", "Composite", "Switch", "Merge"]
    assert legend("on/off", "off") == "LoRAtorio off" and legend("Preset", "fast") == "Preset: fast"
    assert legend("Temperature", 0.1 + 0.2) == "Temperature: 0.3"
    assert AXES["Method"].choices() == ["LoRAtorio", "Composite", "Switch", "Merge"]
    assert AXES["Upsampling"].choices() == list(OPTION["upsampling"].choices)


def test_axes_are_added_once_and_to_the_hosts_script_alone():
    module = SimpleNamespace(AxisOption=AxisOption, axis_options=[])
    others = [SimpleNamespace(path="/host/scripts/loopback.py", module=None), SimpleNamespace()]
    scripts = [*others, *(SimpleNamespace(path="/host/scripts/xyz_grid.py", module=module) for _ in range(2))]
    add_axes(scripts)
    add_axes(scripts)
    assert [axis.label for axis in module.axis_options] == [axis.label for axis in AXES.values()]
