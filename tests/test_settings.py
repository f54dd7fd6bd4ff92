"""The table of options: what is let in, what is refused and in which words, and what survives a round trip."""

import base64
import copy
import dataclasses
import io
import json
import math
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from loratorio_ext import __version__, core, masks
from loratorio_ext.errors import LoRAtorioError, SettingsError
from loratorio_ext.infotext import quote
from loratorio_ext.settings import (
    OPTION,
    OPTIONS,
    PRESETS,
    UNTOUCHED_BY_PRESETS,
    Claims,
    Frozen,
    Lines,
    Option,
    Settings,
)

NUMBERS = [option for option in OPTIONS if option.kind in (int, float)]
WHOLE = [option for option in OPTIONS if option.kind is int]
CHOICES = [option for option in OPTIONS if option.choices]
named = pytest.mark.parametrize


def by_name(option):
    return option.name if isinstance(option, Option) else None


LINE = st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp")), min_size=1).filter(str.strip)
"""Text of one line, with all that separates names, weights and parameters from each other."""


def picture(size=(3, 2), grey=200, mode="L", **saved):
    """A picture in base64."""
    file = io.BytesIO()
    Image.new(mode, size, grey).save(file, saved.pop("format", "PNG"), **saved)
    return base64.b64encode(file.getvalue()).decode()


FRACTIONS = st.integers(0, 1000).map(lambda n: n / 1000)
CLAIM = st.fixed_dictionaries(
    {},
    optional={
        "at": st.sampled_from(["left", "right", "top", "bottom", "centre", "0-0.25-0.5-1", "0.001-0-1-0.5"]),
        "share": st.floats(0.01, 100),
        "steps": st.tuples(FRACTIONS, FRACTIONS).filter(lambda s: s[0] < s[1]).map(lambda s: f"{s[0]:g}-{s[1]:g}"),
        "mask": st.just(masks.kept(picture())),
        "words": st.sampled_from(["", "zorg robot", "zorg robot, \u673a\u5668\u4eba"]),
        "base": st.booleans(),
    },
)


def valid_value(option):
    if isinstance(option, Claims):
        return st.dictionaries(LINE, CLAIM.map(Frozen), max_size=3).map(Frozen)
    if isinstance(option, Lines):
        return st.lists(LINE, max_size=4).map(tuple)
    if option.kind is bool:
        return st.booleans()
    if option.choices:
        return st.sampled_from(option.choices)
    if option.kind is int:
        return st.integers(int(option.low), int(option.high))
    return st.floats(option.low, option.high)


@st.composite
def valid_values(draw):
    values = {option.name: draw(valid_value(option)) for option in OPTIONS}
    if values["start"] >= values["end"]:
        values["start"], values["end"] = sorted((values["start"], values["end"]))
        if values["start"] == values["end"]:
            values["start"], values["end"] = 0.0, 1.0
    return values


# What JSON, a form or a caller's mistake may put where an option's value belongs.
JUNK = [
    None,
    "",
    " ",
    "nan",
    "loratorio ",
    "LORATORIO",
    "1",
    "0.5",
    "True",
    [],
    [1],
    {},
    {"value": 1},
    (0.5,),
    {1},
    b"1",
    1j,
    object(),
    object,
    math.nan,
    math.inf,
    -math.inf,
    10**400,
    -(10**400),
    10**5000,
    -(10**5000),
    1e308,
    -1e308,
    np.array([1.0]),
]


def refuses(option, value):
    """The message with which ``option`` refuses ``value``."""
    with pytest.raises(SettingsError) as caught:
        Settings(**{option.name: value})
    return str(caught.value)


class TestTable:
    def test_names_of_the_options(self):
        promised = {
            "enabled", "method", "patch_size", "relativity", "temperature_mode", "temperature", "base_share",
            "upsampling", "start", "end", "switch_every",
        }  # fmt: skip
        assert promised <= set(OPTION)
        assert len(OPTION) == len(OPTIONS) == len({option.infotext_key for option in OPTIONS})
        assert OPTIONS[0].name == "enabled", "a dict of names stands in the first place"

    @named("option", OPTIONS, ids=by_name)
    def test_every_option_explains_itself(self, option):
        assert option.label and option.help.endswith(".")
        assert option.infotext_key.startswith("LoRAtorio ")
        assert not set(option.infotext_key) & set(',:"\n'), "an infotext key is read up to the next colon"
        assert option.check(option.default) == option.default and type(option.default) is option.kind

    def test_methods_are_the_cores(self):
        assert OPTION["method"].choices == tuple(core.METHODS)

    def test_ranges(self):
        assert (OPTION["patch_size"].low, OPTION["patch_size"].high) == (1, 64)
        assert (OPTION["temperature"].low, OPTION["temperature"].high) == (1e-4, 1e6)
        for name in ("relativity", "base_share", "start", "end"):
            assert (OPTION[name].low, OPTION[name].high) == (0, 1)

    def test_defaults(self):
        settings = Settings()
        assert settings.enabled is False
        assert settings.method == "loratorio" and settings.base_share == 0.25
        assert (settings.combination, settings.patches, settings.momentum) == ("shares", "sliding", 0.8)
        assert (settings.start, settings.end, settings.switch_every) == (0.0, 1.0, 5)

    def test_options_a_method_ignores(self):
        assert OPTION["switch_every"].used_by("switch") and not OPTION["switch_every"].used_by("loratorio")
        assert OPTION["patch_size"].used_by("loratorio") and not OPTION["patch_size"].used_by("composite")
        for method in OPTION["method"].choices:
            assert OPTION["enabled"].used_by(method) and OPTION["method"].used_by(method)

    def test_import_needs_no_torch(self):
        program = "import sys, loratorio_ext.settings; sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[1]).returncode == 0


class TestValues:
    @given(valid_values())
    def test_every_valid_value_is_taken_as_it_is(self, values):
        settings = Settings(**values)
        for option in OPTIONS:
            assert getattr(settings, option.name) == values[option.name]
            assert type(getattr(settings, option.name)) is option.kind

    @named("option", NUMBERS, ids=by_name)
    def test_both_ends_are_inside_and_the_next_number_is_not(self, option):
        for end, away in ((option.low, -math.inf), (option.high, math.inf)):
            assert option.check(end) == end
            beyond = end + math.copysign(1, away) if option.kind is int else math.nextafter(end, away)
            with pytest.raises(SettingsError):
                option.check(beyond)

    @named("option", OPTIONS, ids=by_name)
    @named("value", JUNK, ids=lambda value: type(value).__name__)
    def test_junk_is_refused_by_name_value_and_range(self, option, value):
        if isinstance(option, Lines) and isinstance(value, list) and not value:
            return
        if isinstance(option, Claims) and (value == {} or isinstance(value, str) and not value.strip()):
            assert option.check(value) == {}
            return
        if isinstance(option, Claims) and isinstance(value, dict):
            assert "loras.value must be a mapping of at, share, steps, mask, words, base, got 1" in refuses(
                option, value
            )
            return
        message = refuses(option, value)
        assert message.startswith(f"LoRAtorio: {option.name} must be {option.allowed}, got ")
        assert len(message) < 300, "a huge value is not repeated in full"

    @named("option", NUMBERS, ids=by_name)
    def test_message_names_field_value_and_range(self, option):
        message = refuses(option, -7.25)
        assert option.name in message and "-7.25" in message
        assert f"{option.low:g}" in message and f"{option.high:g}" in message

    @named("option", CHOICES, ids=by_name)
    def test_message_names_the_choices(self, option):
        message = refuses(option, "nonsense")
        assert option.name in message and "'nonsense'" in message
        assert all(choice in message for choice in option.choices)

    @named("option", NUMBERS, ids=by_name)
    @named("value", [True, False])
    def test_a_truth_value_is_no_number(self, option, value):
        assert repr(value) in refuses(option, value)

    @named("value", [0, 1, 0.0, 1.0, "true", "false", "on"])
    def test_a_number_or_text_is_no_truth_value(self, value):
        assert "true or false" in refuses(OPTION["enabled"], value)

    @named("option", WHOLE, ids=by_name)
    def test_whole_numbers(self, option):
        settings = Settings(**{option.name: 4.0})
        assert getattr(settings, option.name) == 4 and type(getattr(settings, option.name)) is int
        assert "a whole number" in refuses(option, 4.5)

    def test_a_whole_number_passes_for_a_fraction(self):
        settings = Settings(temperature=1, base_share=0)
        assert settings.temperature == 1.0 and type(settings.temperature) is float
        assert type(settings.base_share) is float

    def test_numpy_floats_become_plain_ones(self):
        assert type(Settings(temperature=np.float64(0.5)).temperature) is float

    def test_a_value_that_cannot_be_shown_is_refused_all_the_same(self):
        class Unshowable:
            def __repr__(self):
                raise RuntimeError("no")

        assert "patch_size" in refuses(OPTION["patch_size"], Unshowable())

    @named("start, end", [(0.5, 0.5), (0.6, 0.4), (1.0, 1.0), (0.0, 0.0), (1, 0)])
    def test_an_empty_window(self, start, end):
        with pytest.raises(SettingsError, match=f"start must be less than end .*{end:g}.*, got {start:g}"):
            Settings(start=start, end=end)

    def test_the_smallest_window(self):
        assert Settings(start=0.0, end=5e-324).end == 5e-324

    def test_an_error_is_one_for_the_api(self):
        with pytest.raises(SettingsError) as caught:
            Settings(patch_size=0)
        error = caught.value
        assert isinstance(error, (LoRAtorioError, ValueError))
        assert vars(error)["status_code"] == 422 and vars(error)["detail"] == str(error)

    def test_immutable(self):
        settings = Settings()
        for name in (*OPTION, "another"):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(settings, name, 1)
            with pytest.raises(dataclasses.FrozenInstanceError):
                delattr(settings, name)
        assert settings == Settings() and hash(settings) == hash(Settings())

    def test_copies_and_changes_are_checked_too(self):
        settings = Settings(patch_size=8)
        assert pickle.loads(pickle.dumps(settings)) == copy.deepcopy(settings) == settings
        with pytest.raises(SettingsError):
            dataclasses.replace(settings, patch_size=65)

    @named("value", ["robot", None, {}, {"a"}, [1], ["a", None], [""], [" "], ["a\nb"], ["\x00"], ["\ud800"],
                     ["\u2028"], [["a"]], range(2), 10**5000, iter(["a"])], ids=type)  # fmt: skip
    @named("option", [option for option in OPTIONS if isinstance(option, Lines)], ids=by_name)
    def test_lists_of_anything_but_lines(self, option, value):
        message = refuses(option, value)
        assert message.startswith(f"LoRAtorio: {option.name} must be a list of text, got ") and len(message) < 300

    @named("text", ["", "  ", "{}", " {}\n"])
    def test_claims_of_nobody(self, text):
        assert Settings(loras=text) == Settings() and type(Settings(loras=text).loras) is Frozen

    def test_claims_come_in_one_spelling(self):
        given = {"knight": {"at": " Center ", "share": 2, "steps": "0-.50"}, 'a:b, "c"': {"at": "0.-.1-0.5-1.0"}}
        said = {
            "knight": {"at": "centre", "share": 2.0, "steps": "0-0.5"},
            'a:b, "c"': {"at": "0-0.1-0.5-1"},
        }
        assert Settings(loras=given).loras == said
        assert Settings(loras=json.dumps(given)) == Settings(loras=given) == Settings(loras=said)
        assert type(Settings(loras=given).loras["knight"]["share"]) is float

    def test_claims_do_not_change(self):
        given = {"knight": {"share": 2}}
        settings = Settings(loras=given)
        given["knight"]["share"] = 3
        assert settings.loras == {"knight": {"share": 2.0}} and hash(settings) == hash(Settings(loras=settings.loras))
        for change in (
            lambda loras: loras.update(a={}),
            lambda loras: loras["knight"].__setitem__("share", 3),
            lambda loras: loras.pop("knight"),
            lambda loras: loras.__ior__({"a": {}}),
            lambda loras: loras.setdefault("b", {}),
        ):
            with pytest.raises(TypeError):
                change(settings.loras)
        assert pickle.loads(pickle.dumps(settings)) == copy.deepcopy(settings) == settings

    @named(
        "claim, named, allowed",
        [
            ({"at": "lft"}, "loras.a.at", "did you mean left?"),
            ({"at": "0.5-0-0.5-1"}, "loras.a.at", "x0-y0-x1-y1"),
            ({"at": "0-0-1-1.5"}, "loras.a.at", "x0-y0-x1-y1"),
            ({"at": "0-0-1"}, "loras.a.at", "left, right, top, bottom, centre"),
            ({"at": "-1-0-1-1"}, "loras.a.at", "x0-y0-x1-y1"),
            ({"at": "0-0-1e-1-1"}, "loras.a.at", "x0-y0-x1-y1"),
            ({"at": "\u0660-0-1-1"}, "loras.a.at", "x0-y0-x1-y1"),
            ({"at": ["left"]}, "loras.a.at", "left, right"),
            ({"at": None}, "loras.a.at", "left, right"),
            ({"share": 0}, "loras.a.share", "from 0.01 to 100"),
            ({"share": -1}, "loras.a.share", "from 0.01 to 100"),
            ({"share": 101}, "loras.a.share", "from 0.01 to 100"),
            ({"share": "2"}, "loras.a.share", "from 0.01 to 100"),
            ({"share": True}, "loras.a.share", "from 0.01 to 100"),
            ({"share": math.nan}, "loras.a.share", "from 0.01 to 100"),
            ({"share": 10**5000}, "loras.a.share", "from 0.01 to 100"),
            ({"steps": "0.5-0.5"}, "loras.a.steps", "the first below the last"),
            ({"steps": "0.5"}, "loras.a.steps", "first-last"),
            ({"steps": "0-2"}, "loras.a.steps", "from 0 to 1"),
            ({"steps": [0, 0.5]}, "loras.a.steps", "first-last"),
            ({"words": 3}, "loras.a.words", "trigger words in one line"),
            ({"words": "zorg\nrobot"}, "loras.a.words", "trigger words in one line"),
            ({"words": "a" * 1001}, "loras.a.words", "at most 1000 characters"),
            ({"base": 1}, "loras.a.base", "true or false"),
            ({"base": "true"}, "loras.a.base", "true or false"),
            ({"mask": ""}, "loras.a.mask", "PNG or JPEG"),
            ({"mask": 7}, "loras.a.mask", "PNG or JPEG"),
            ({"plcae": "left"}, "'plcae'", "parts: at, share, steps, mask, words, base"),
            ({"shares": 2}, "'shares'", "did you mean share?"),
            ({3: 2}, "loras.a has no part 3", "parts: at"),
            ([], "loras.a", "a mapping of at, share, steps, mask, words, base"),
            (None, "loras.a", "a mapping of at"),
            ("left", "loras.a", "a mapping of at"),
        ],
    )
    def test_bad_claims_are_refused_by_lora_part_value_and_range(self, claim, named, allowed):
        message = refuses(OPTION["loras"], {"good": {"at": "left"}, "a": claim})
        assert named in message and allowed in message and len(message) < 400

    @named("name", ["", " ", "a\nb", "\x00", "\ud800", None, 3, ("a",)], ids=ascii)
    def test_what_is_no_name_claims_nothing(self, name):
        assert "loras must be a mapping of LoRA names to mappings" in refuses(OPTION["loras"], {name: {"at": "left"}})

    def test_a_long_name_is_shortened_in_messages(self):
        assert len(refuses(OPTION["loras"], {"x" * 10_000: {"at": "y" * 10_000}})) < 400

    @named("text", ['{"a": {}, "a": {}}', '{"a": {"at": "left", "at": "right"}}', '{"a": {"at": "left"}', "[]", "null",
                    '"left"', "[" * 100_000, '{"\\ud800": {}}', "{" * 5], ids=lambda t: t[:12])  # fmt: skip
    def test_text_that_is_no_mapping(self, text):
        message = refuses(OPTION["loras"], text)
        assert message.startswith("LoRAtorio: loras must be a mapping") and len(message) < 300

    def test_lists_stay_in_order_and_do_not_change_with_the_callers(self):
        given = ["b", "a", "b"]
        settings = Settings(pool=given)
        given.append("c")
        assert settings.pool == ("b", "a", "b")


class TestNamed:
    def test_nothing_given(self):
        assert Settings.from_mapping({}) == Settings()

    @given(valid_values())
    def test_json_round_trip(self, values):
        settings = Settings(**values)
        carried = json.loads(json.dumps(dataclasses.asdict(settings), allow_nan=False))
        assert Settings.from_mapping(carried) == settings

    @named("wrong, meant", [("patchsize", "patch_size"), ("Patch_Size", "patch_size"), ("methods", "method"),
                            ("temprature", "temperature"), ("enable", "enabled"), ("presets", "preset")])  # fmt: skip
    def test_an_unknown_name_gets_a_hint(self, wrong, meant):
        with pytest.raises(SettingsError) as caught:
            Settings.from_mapping({wrong: 1})
        message = str(caught.value)
        assert repr(wrong) in message and f"did you mean {meant}?" in message
        assert all(option.name in message for option in OPTIONS)

    @named("name", ["", "zzz", "__class__", "OPTIONS", "to_infotext", 3, None, (), "x" * 10_000], ids=type)
    def test_a_name_like_none_is_refused_without_one(self, name):
        with pytest.raises(SettingsError, match="there is no option") as caught:
            Settings.from_mapping({name: 1})
        assert "did you mean" not in str(caught.value) and len(str(caught.value)) < 500

    def test_one_bad_value_among_good_ones(self):
        with pytest.raises(SettingsError, match="relativity"):
            Settings.from_mapping({"enabled": True, "patch_size": 4, "relativity": 1.5})

    def test_over_a_base(self):
        base = Settings(patch_size=8, relativity=0.25)
        assert Settings.from_mapping({"patch_size": 2}, base) == Settings(patch_size=2, relativity=0.25)
        assert base == Settings(patch_size=8, relativity=0.25)

    @named("values", [None, 3, "enabled", [1], [("enabled", True)]], ids=repr)
    def test_no_mapping_at_all(self, values):
        with pytest.raises(SettingsError):
            Settings.from_mapping(values)


class TestPresets:
    @named("name", PRESETS)
    def test_every_preset_is_valid_and_leaves_the_switch_alone(self, name):
        assert Settings.from_mapping({"preset": name}).enabled is False
        assert Settings.from_mapping({"preset": name, "enabled": True}).enabled is True

    @named("name", PRESETS)
    def test_no_preset_says_what_an_image_is_made_of(self, name):
        assert not set(PRESETS[name]) & set(UNTOUCHED_BY_PRESETS)

    def test_paper_is_the_literal_form(self):
        paper = Settings.from_mapping({"preset": "paper"})
        assert paper.method == "loratorio" and paper.temperature_mode == "fixed" and paper.temperature == 1.0
        assert paper.relativity == 0 and paper.base_share == 0.5 and paper.upsampling == "nearest"
        assert paper.top_k == 0 and (paper.start, paper.end) == (0, 1)

    def test_options_beside_a_preset_win_in_either_order(self):
        first = Settings.from_mapping({"preset": "paper", "temperature": 0.1})
        last = Settings.from_mapping({"temperature": 0.1, "preset": "paper"})
        assert first == last and first.temperature == 0.1 and first.temperature_mode == "fixed"

    def test_a_preset_wins_over_its_base(self):
        base = Settings(relativity=1.0, patch_size=2)
        settings = Settings.from_mapping({"preset": "paper"}, base)
        assert settings.relativity == 0 and settings.patch_size == 2

    def test_default_is_the_default(self):
        assert Settings.from_mapping({"preset": "default"}) == Settings()

    @named("value", ["Paper", "", None, 1, True, [], {}, ["paper"], math.nan, 10**5000], ids=type)
    def test_unknown_presets(self, value):
        with pytest.raises(SettingsError, match="preset must be one of default, paper"):
            Settings.from_mapping({"preset": value})


class TestArgs:
    VALUES = [
        True,
        "switch",
        8,
        "fixed",
        0.7,
        0.25,
        "bilinear",
        0.75,
        3,
        "patch",
        9,
        0.125,
        0.875,
        2,
        4,
        ("robot", "styles/*:0.6"),
        0.5,
        3,
        True,
        Frozen(knight=Frozen(at="left", share=2.0), city=Frozen(steps="0-0.5")),
        ("lcm", "*slider*"),
        "gates",
        2.5,
        "grid",
        0.75,
        "drop",
        "compete",
        False,
        False,
    ]

    def test_the_examples_differ_from_the_defaults(self):
        assert len(self.VALUES) == len(OPTIONS)
        assert all(value != option.default for value, option in zip(self.VALUES, OPTIONS))

    @named("length", range(len(OPTIONS) + 1))
    def test_positional_lists_of_every_length(self, length):
        settings = Settings.from_args(self.VALUES[:length])
        for index, option in enumerate(OPTIONS):
            expected = self.VALUES[index] if index < length else option.default
            assert getattr(settings, option.name) == expected

    def test_tuples_too(self):
        assert Settings.from_args(tuple(self.VALUES)) == Settings.from_args(self.VALUES)

    @named("extra", [[1], [None] * 50])
    def test_too_many(self, extra):
        with pytest.raises(SettingsError, match=f"at most {len(OPTIONS)} values, got {len(OPTIONS) + len(extra)}"):
            Settings.from_args([*self.VALUES, *extra])

    @named("index", range(len(OPTIONS)))
    def test_a_bad_value_is_named_by_its_place(self, index):
        values = list(self.VALUES)
        values[index] = None
        with pytest.raises(SettingsError, match=f"LoRAtorio: {OPTIONS[index].name} must be"):
            Settings.from_args(values)

    def test_a_dict_first(self):
        assert Settings.from_args([{"enabled": True, "patch_size": 8}]) == Settings(enabled=True, patch_size=8)
        assert Settings.from_args([{}]) == Settings()
        assert Settings.from_args([{"preset": "paper", "enabled": True}]).temperature == 1.0

    def test_a_dict_wins_over_the_values_that_follow(self):
        settings = Settings.from_args([{"enabled": True, "method": "merge"}, *self.VALUES[1:]])
        assert settings.method == "merge" and settings.enabled is True and settings.patch_size == 8

    def test_a_dict_first_does_not_switch_on_by_itself(self):
        assert Settings.from_args([{"patch_size": 8}, *self.VALUES[1:]]).enabled is False

    def test_a_dict_elsewhere_is_a_bad_value(self):
        with pytest.raises(SettingsError, match="method"):
            Settings.from_args([True, {"patch_size": 8}])

    def test_a_dict_with_too_many_behind_it(self):
        with pytest.raises(SettingsError, match="at most"):
            Settings.from_args([{}, *self.VALUES])

    @named("args", [None, 3, "ab", {"enabled": True}, True], ids=repr)
    def test_no_list_at_all(self, args):
        with pytest.raises(SettingsError):
            Settings.from_args(args)

    @given(valid_values())
    def test_what_the_ui_holds_comes_back(self, values):
        carried = json.loads(json.dumps([values[option.name] for option in OPTIONS]))
        assert Settings.from_args(carried) == Settings(**values)


class TestInfotext:
    @given(valid_values())
    def test_round_trip(self, values):
        settings = Settings(**values)
        written = settings.to_infotext()
        read = Settings.from_infotext({"Steps": "20", "Sampler": "Euler a", **written})
        assert read == (settings if settings.enabled else Settings())
        assert all(isinstance(value, str) for value in written.values())

    @given(st.lists(LINE, min_size=1, max_size=5))
    def test_names_survive_the_webuis_own_text(self, names):
        """Commas, colons, quotes, semicolons and backslashes: among other parameters, quoted as the WebUI does it."""
        written = Settings(enabled=True, pool=names).to_infotext()
        line = ", ".join(f"{key}: {quote(value)}" for key, value in {"Steps": 20, **written, "Version": "1"}.items())
        found = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', line)
        read = {key: json.loads(value) if value[:1] == value[-1:] == '"' else value for key, value in found}
        assert Settings.from_infotext(read).pool == tuple(names)

    @given(st.dictionaries(LINE, CLAIM, min_size=1, max_size=3))
    def test_claims_survive_the_webuis_own_text(self, loras):
        written = Settings(enabled=True, loras=loras).to_infotext()
        line = ", ".join(f"{key}: {quote(value)}" for key, value in {"Steps": 20, **written, "Version": "1"}.items())
        found = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', line)
        read = {key: json.loads(value) if value[:1] == value[-1:] == '"' else value for key, value in found}
        assert Settings.from_infotext(read) == Settings(enabled=True, loras=loras)

    def test_claims_as_they_stand_in_an_infotext(self):
        written = Settings(enabled=True, loras={"a": {"at": "left"}}, everywhere=["lcm"]).to_infotext()
        assert written["LoRAtorio loras"] == '{"a": {"at": "left"}}' and written["LoRAtorio everywhere"] == '["lcm"]'

    def test_a_list_as_it_stands_in_an_infotext(self):
        pool = ["robot", "styles/*:0.6", 'a "b", c;d']
        written = Settings(enabled=True, pool=pool).to_infotext()["LoRAtorio pool"]
        assert written == '["robot", "styles/*:0.6", "a \\"b\\", c;d"]'
        assert Settings.from_infotext({"LoRAtorio pool": written}).pool == tuple(pool)

    @named(
        "text",
        ['"robot"', "robot", "{}", '[["a"]]', "[null]", '["a"', "null", "[" * 100_000, '["\\ud800"]'],
        ids=lambda t: t[:9],
    )
    def test_text_that_is_no_list(self, text):
        with pytest.raises(SettingsError, match="pool must be a list of text") as caught:
            Settings.from_infotext({"LoRAtorio pool": text})
        assert len(str(caught.value)) < 300

    def test_what_has_an_effect_is_written(self):
        assert Settings(enabled=True).to_infotext() == {
            "LoRAtorio enabled": "True",
            "LoRAtorio method": "loratorio",
            "LoRAtorio patch size": "4",
            "LoRAtorio temperature mode": "adaptive",
            "LoRAtorio temperature": "0.3",
            "LoRAtorio relativity": "1.0",
            "LoRAtorio base share": "0.25",
            "LoRAtorio patches": "sliding",
            "LoRAtorio momentum": "0.8",
            "LoRAtorio styles": "surroundings",
            "LoRAtorio regions": "True",
            "LoRAtorio rest": "True",
            "LoRAtorio version": __version__,
        }
        assert Settings(enabled=True, combination="gates", patches="grid", momentum=0.0).to_infotext() == {
            "LoRAtorio enabled": "True",
            "LoRAtorio method": "loratorio",
            "LoRAtorio patch size": "4",
            "LoRAtorio relativity": "1.0",
            "LoRAtorio upsampling": "nearest",
            "LoRAtorio base share": "0.25",
            "LoRAtorio combination": "gates",
            "LoRAtorio sharpness": "4.0",
            "LoRAtorio styles": "surroundings",
            "LoRAtorio regions": "True",
            "LoRAtorio rest": "True",
            "LoRAtorio version": __version__,
        }
        assert Settings(enabled=True, method="merge").to_infotext().keys() == {
            "LoRAtorio enabled", "LoRAtorio method", "LoRAtorio version"
        }  # fmt: skip

    def test_what_was_set_is_written_even_if_without_effect(self):
        assert Settings(enabled=True, patch_size=8, method="switch").to_infotext() == {
            "LoRAtorio enabled": "True",
            "LoRAtorio method": "switch",
            "LoRAtorio patch size": "8",
            "LoRAtorio switch every": "5",
            "LoRAtorio version": __version__,
        }

    @named(
        "option, of",
        [
            ("selection_scope", "top_k"),
            ("warmup", "refresh"),
            ("pool_weight", "pool"),
            ("sharpness", "combination"),
        ],
    )
    def test_what_an_idle_option_is_needed_for_has_no_effect(self, option, of):
        busy = {"top_k": 1, "refresh": 1, "pool": ["a"], "combination": "gates"}[of]
        idle = OPTION[of].idle
        assert OPTION[option].infotext_key not in Settings(enabled=True, **{of: idle}).to_infotext()
        assert OPTION[option].infotext_key in Settings(enabled=True, **{of: busy}).to_infotext()

    @named(
        "option, of, busy",
        [
            ("temperature", "combination", "gates"),
            ("temperature_mode", "combination", "gates"),
            ("upsampling", "patches", "sliding"),
        ],
    )
    def test_what_another_option_takes_the_place_of_has_no_effect(self, option, of, busy):
        idle = OPTION[of].idle
        assert OPTION[option].infotext_key in Settings(enabled=True, **{of: idle}).to_infotext()
        assert OPTION[option].infotext_key not in Settings(enabled=True, **{of: busy}).to_infotext()
        composite = Settings(enabled=True, method="composite", **{of: busy})
        assert not composite.matters(OPTION[of]) and not composite.matters(OPTION[option])

    def test_off_writes_nothing_and_reads_as_off(self):
        assert Settings(patch_size=8).to_infotext() == {}
        assert Settings.from_infotext({}).enabled is False
        assert Settings.from_infotext({"Steps": "20", "Lora hashes": "a: b"}) == Settings()

    @named("text, value", [("true", True), ("True", True), (" FALSE ", False), ("false", False)])
    def test_truth_values_in_words(self, text, value):
        assert Settings.from_infotext({"LoRAtorio enabled": text}).enabled is value

    @named("text, value", [("8", 8), ("8.0", 8), (" 8 ", 8)])
    def test_whole_numbers_in_words(self, text, value):
        assert Settings.from_infotext({"LoRAtorio patch size": text}).patch_size == value

    @named("option", OPTIONS, ids=by_name)
    @named(
        "text",
        ["", "nan", "inf", "-inf", "1e400", "None", "yes", "1,5", "[1]", "9" * 5000, "\N{ARTIST PALETTE}"],
        ids=lambda text: ascii(text)[:9] if isinstance(text, str) else None,
    )
    def test_junk_is_refused_by_name(self, option, text):
        with pytest.raises(SettingsError) as caught:
            Settings.from_infotext({option.infotext_key: text})
        message = str(caught.value)
        assert message.startswith(f"LoRAtorio: {option.name} must be {option.allowed}, got ") and len(message) < 300

    @named("value", [None, [], {}, b"1"], ids=repr)
    @named("option", OPTIONS, ids=by_name)
    def test_what_is_no_text_is_refused_too(self, option, value):
        with pytest.raises(SettingsError, match=option.name):
            Settings.from_infotext({option.infotext_key: value})

    def test_an_empty_window_is_refused(self):
        with pytest.raises(SettingsError, match="start"):
            Settings.from_infotext({"LoRAtorio start": "0.9", "LoRAtorio end": "0.1"})


EARLIER = {
    "plain": (
        {"LoRAtorio enabled": "True"},
        {"enabled": True, "method": "loratorio", "patch_size": 4, "temperature_mode": "adaptive", "temperature": 0.3,
         "relativity": 0.5, "upsampling": "nearest", "base_share": 0.5, "top_k": 0, "selection_scope": "image",
         "switch_every": 5, "start": 0.0, "end": 1.0, "refresh": 0, "warmup": 1, "pool": (), "pool_weight": 1.0,
         "reselect_every": 1, "show_maps": False, "loras": Frozen(), "everywhere": (), "combination": "shares",
         "patches": "grid"},
    ),
    "some": (
        {"LoRAtorio enabled": "True", "LoRAtorio relativity": "1.0", "LoRAtorio refresh": "1"},
        {"enabled": True, "relativity": 1.0, "refresh": 1, "warmup": 1, "patch_size": 4, "base_share": 0.5},
    ),
    "with claims": (
        {"LoRAtorio enabled": "True", "LoRAtorio everywhere": '["lcm"]', "LoRAtorio refresh": "1"},
        {"enabled": True, "relativity": 1.0, "warmup": 2, "patch_size": 4, "everywhere": ("lcm",)},
    ),
    "0.1.0": (
        {"LoRAtorio enabled": "True", "LoRAtorio method": "loratorio", "LoRAtorio patch size": "4",
         "LoRAtorio temperature mode": "adaptive", "LoRAtorio temperature": "0.3", "LoRAtorio relativity": "1.0",
         "LoRAtorio upsampling": "nearest", "LoRAtorio base share": "0.5", "LoRAtorio version": "0.1.0"},
        {"enabled": True, "method": "loratorio", "patch_size": 4, "temperature_mode": "adaptive", "temperature": 0.3,
         "relativity": 1.0, "upsampling": "nearest", "base_share": 0.5, "top_k": 0, "start": 0.0, "end": 1.0,
         "refresh": 0, "pool": (), "reselect_every": 1, "show_maps": False, "loras": Frozen(), "everywhere": (),
         "combination": "shares", "patches": "grid", "styles": "compete", "regions": False, "rest": False},
    ),
    "0.1.0, before the rest was the bare model's": (
        {"LoRAtorio enabled": "True", "LoRAtorio method": "loratorio", "LoRAtorio patch size": "4",
         "LoRAtorio temperature mode": "adaptive", "LoRAtorio temperature": "0.3", "LoRAtorio relativity": "1.0",
         "LoRAtorio base share": "0.25", "LoRAtorio patches": "sliding", "LoRAtorio momentum": "0.8",
         "LoRAtorio styles": "surroundings", "LoRAtorio regions": "True", "LoRAtorio version": "0.1.0"},
        {"enabled": True, "base_share": 0.25, "patches": "sliding", "momentum": 0.8, "styles": "surroundings",
         "regions": True, "rest": False},
    ),
    "0.1.0, gates": (
        {"LoRAtorio enabled": "True", "LoRAtorio method": "loratorio", "LoRAtorio patch size": "2",
         "LoRAtorio relativity": "1.0", "LoRAtorio upsampling": "nearest", "LoRAtorio base share": "0.5",
         "LoRAtorio combination": "gates", "LoRAtorio sharpness": "4.0", "LoRAtorio version": "0.1.0"},
        {"enabled": True, "patch_size": 2, "combination": "gates", "sharpness": 4.0, "patches": "grid",
         "base_share": 0.5, "momentum": 0.0},
    ),
    "0.1.0, switch": (
        {"LoRAtorio enabled": "True", "LoRAtorio method": "switch", "LoRAtorio switch every": "5",
         "LoRAtorio version": "0.1.0"},
        {"enabled": True, "method": "switch", "switch_every": 5, "start": 0.0, "end": 1.0, "pool": ()},
    ),
}  # fmt: skip
"""Infotexts as they were written, and what the image was made with. These never change; add one for a new version."""


class TestEarlierInfotexts:
    @named("text, meant", EARLIER.values(), ids=EARLIER)
    def test_they_mean_what_they_meant(self, text, meant):
        read = Settings.from_infotext({"Steps": "20", **text})
        assert {name: getattr(read, name) for name in meant} == meant

    @named("text, meant", EARLIER.values(), ids=EARLIER)
    @named("option", OPTIONS, ids=by_name)
    def test_whatever_the_defaults_become(self, option, text, meant):
        """Each default in turn becomes another one, as a later version may decide."""
        others = {bool: [not option.default], str: [c for c in option.choices if c != option.default]}
        others |= {int: [option.high], float: [option.high, option.low]}
        value = next((v for v in others.get(option.kind, [("*",)]) if v != option.default), None)
        if isinstance(option, Claims):
            value = Frozen({"a": Frozen({"at": "left"})})
        changed = type(option)(
            **{f.name: getattr(option, f.name) for f in dataclasses.fields(option)} | {"default": value}
        )
        assert changed.default != option.default
        for name in meant.keys() & {option.name}:
            assert changed.read({"Steps": "20", **text}) == meant[name]

    @named("option", OPTIONS, ids=by_name)
    def test_an_option_that_older_texts_cannot_name_can_be_idle(self, option):
        """Each since the first version must be able to do nothing, or need one that is: what it is in older texts."""
        first = {name for _, meant in EARLIER.values() for name in meant}
        assert option.name in first or option.idle is not None or OPTION[option.needs].idle is not None

    @given(valid_values())
    def test_what_is_read_is_composed_alike_when_defaults_change(self, values):
        """All that matters is said: an absent entry is idle, or without effect."""
        settings = Settings(**{**values, "enabled": True})
        written = settings.to_infotext()
        for option in OPTIONS:
            if option.infotext_key not in written:
                idle = option.idle is not None and getattr(settings, option.name) == option.idle
                assert idle or not settings.matters(option)

    def test_images_without_composition_read_as_the_defaults_of_today(self):
        assert Settings.from_infotext({"Steps": "20", "Version": "v1.10.1"}) == Settings()


def test_no_default_is_a_container_that_python_3_10_refuses():
    defaults = [field.default for field in dataclasses.fields(Settings)]
    assert not [default for default in defaults if isinstance(default, (list, dict, set))]
