"""What the panel says before an image is made: who takes part, what a step costs, which preset the values are."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratorio_ext.errors import SettingsError
from loratorio_ext.pool import Listed
from loratorio_ext.preview import (
    BY_PRESETS,
    CUSTOM,
    cost,
    cost_in_words,
    preset_in_words,
    preset_of,
    preset_values,
    seen,
    tags_of,
)
from loratorio_ext.settings import PRESETS, Settings


def listed(*names):
    return [Listed(name.rpartition("/")[2], f"/loras/{name}.safetensors", name) for name in names]


HOST = listed("hat", "cat", "dog", "lcm", "styles/oil", "styles/ink")
THREE = "a <lora:hat:0.8> and <lora:cat:1> <lora:dog:0.5:1>"


def names(prompt, **options):
    return [each.name for each in seen(prompt, Settings(**options), HOST)]


class TestSeen:
    def test_the_prompts_then_the_pools_without_those_already_there(self):
        found = seen("<lora:oil:0.3> <lora:nowhere>", Settings(pool=["styles/*:0.6", "hat:0.2:1"]), HOST)
        assert [(each.name, each.weights, each.lora is not None, each.pooled) for each in found] == [
            ("oil", "0.3", True, False),
            ("nowhere", "1", False, False),
            ("ink", "0.6", True, True),
            ("hat", "0.2, 1", True, True),
        ]

    @pytest.mark.parametrize(
        "tag, weights",
        [("hat", "1"), ("hat:0.8", "0.8"), ("hat:0.5:1", "0.5, 1"), ("hat:te=0.2:unet=0.4", "0.2, 0.4"),
         ("hat:0.7:at=left", "0.7"), ("hat:1:1:dyn=4", "1")],
    )  # fmt: skip
    def test_weights_as_they_stand_in_the_tag(self, tag, weights):
        (found,) = seen(f"<lora:{tag}>", Settings(), HOST)
        assert found.weights == weights

    def test_of_a_lora_named_twice_the_last(self):
        assert tags_of("<lora:a:1> <lora:b> <lora:a:0.5> <hypernet:c:1>") == [("a", "0.5"), ("b",)]

    def test_a_style_is_in_every_pass_and_costs_no_rows_of_its_own(self):
        prompt = "<lora:hat:1> <lora:cat:1> <lora:oil:0.5>"
        found, competing = (seen(prompt, Settings(styles=each), HOST) for each in ("everywhere", "compete"))
        assert [each.everywhere for each in found] == [False, False, True]
        assert not any(each.everywhere for each in competing)
        assert cost(Settings(), found) == cost(Settings(), found[:2]) < cost(Settings(), competing)

    def test_an_alias_is_a_name(self):
        (found,) = seen("<lora:top hat:1>", Settings(), [Listed("hat", "/hat", "hat", alias="top hat")])
        assert found.lora.name == "hat"

    @pytest.mark.parametrize(
        "prompt, options, said",
        [
            ("<lora:hat:1:at=up>", {}, "at in <lora:hat:1:at=up>"),
            ("", {"pool": ["haat"]}, "did you mean hat"),
            ("<lora:hat:1:base=1>", {"loras": {"hat": {"at": "left"}}}, "in every pass"),
        ],
    )
    def test_what_will_be_refused_is_said_at_once(self, prompt, options, said):
        with pytest.raises(SettingsError, match=said):
            seen(prompt, Settings(**options), HOST)

    @given(st.text(max_size=60))
    def test_any_prompt_can_be_looked_at(self, prompt):
        """While somebody types: every beginning of a tag has been there for a moment."""
        for end in range(len(text := f"{prompt}<lora:hat:0.8:at=left>")):
            try:
                seen(text[:end], Settings(), HOST)
            except SettingsError:
                pass

    def test_what_comes_from_a_style_and_is_not_typed(self):
        found = seen("<lora:hat> <lora:cat:0.5> <lora:dog>", Settings(pool=["ink"]), HOST, typed="<lora:hat>")
        assert [each.name for each in found if each.styled] == ["cat", "dog"]
        assert not any(each.styled for each in seen(THREE, Settings(), HOST))


class TestCost:
    @pytest.mark.parametrize(
        "options, expected",
        [
            ({}, 4.0),
            ({"base_share": 1.0}, 2.5),
            ({"method": "merge"}, 1.0),
            ({"method": "switch"}, 1.0),
            ({"method": "composite"}, 3.0),
            ({"end": 0.5}, 2.5),
            ({"top_k": 1}, 4.0),
            ({"top_k": 1, "reselect_every": 2}, 3.0),
            ({"loras": {"dog": {"steps": "0-0.5"}}}, 3.5),
            ({"everywhere": ["dog"]}, 3.0),
            ({"loras": {"dog": {"at": "left"}}, "method": "composite"}, 4.0),
        ],
    )
    def test_of_three_loras(self, options, expected):
        settings = Settings(**options)
        assert cost(settings, seen(THREE, settings, HOST)) == pytest.approx(expected)

    def test_refreshing_in_turn_is_cheaper_however_many_there_are(self):
        def of(count, **options):
            settings = Settings(styles="compete", **options)
            prompt = " ".join(f"<lora:{name}>" for name in ("hat", "cat", "dog", "oil", "ink")[:count])
            return cost(settings, seen(prompt, settings, HOST))

        assert of(5) == 6 and 1.5 < of(5, refresh=1) < 2.4
        assert of(5, refresh=1) - of(3, refresh=1) == pytest.approx(2 * 2 / 20, abs=0.05), "two exact steps"

    def test_who_is_not_found_costs_nothing(self):
        assert cost(Settings(), seen("<lora:hat> <lora:nowhere>", Settings(), HOST)) == 2

    def test_in_words(self):
        def said(prompt, **options):
            settings = Settings(**options)
            return cost_in_words(settings, seen(prompt, settings, HOST))

        assert said(THREE) == (
            "3 LoRAs: a step takes about as long as 4 plain ones, as 2 with preset balanced, as 1.6 with preset fast."
        )
        assert said(THREE, refresh=1) == (
            "3 LoRAs: a step takes about as long as 2 plain ones, as 1.6 with preset fast."
        )
        assert said("<lora:hat>", method="switch") == "1 LoRA: a step takes about as long as a plain one."
        assert said("<lora:nowhere>").startswith("No LoRA to compose")


class TestPresets:
    @pytest.mark.parametrize("name", PRESETS)
    def test_a_presets_values_are_that_preset(self, name):
        settings = Settings(**preset_values(name), pool=["hat"], show_maps=True)
        assert preset_of(settings) == preset_of(settings, CUSTOM) == name

    @pytest.mark.parametrize("name", PRESETS)
    @pytest.mark.parametrize("option", BY_PRESETS, ids=lambda option: option.name)
    def test_one_value_changed_is_custom(self, name, option):
        values = preset_values(name)
        choices = {str: option.choices, int: (option.low, option.high), float: (0.3, 0.6), bool: (False, True)}
        others = choices[option.kind]
        values[option.name] = next(value for value in others if value != values[option.name])
        found = preset_of(Settings(**values), name)
        assert found != name and (found == CUSTOM or preset_values(found) == values)

    def test_in_words(self):
        assert preset_in_words(Settings()) == "Everything is at its default: exact in every step."
        assert preset_in_words(Settings(**preset_values("fast"))) == (
            "Sets Base share of guidance 1.0, LoRAs refreshed per step 1; the rest is at its default."
        )
        assert "Patch size 8" in preset_in_words(Settings(patch_size=8, pool=["hat"]))
