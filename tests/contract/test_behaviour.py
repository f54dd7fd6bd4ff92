"""What the extension promises beside the image: off is off, the host comes back as it was, nothing fails in silence."""

import numpy as np
import pytest

from loratorio_ext.settings import OPTIONS, Settings
from tests.contract.rows import THREE, TWO, mean
from tests.live.webui import RequestError

PLAIN = "a cat on a hill"


def equal(first, second) -> bool:
    return all(map(np.array_equal, first.images, second.images))


def test_off_is_the_host(contract):
    merged = contract.plain(prompt=TWO)
    off = contract.composed({"enabled": False, "patch_size": 8}, prompt=TWO)
    assert equal(merged, off)
    assert "LoRAtorio" not in off.infotext


def test_merge_is_the_host(contract):
    assert equal(contract.plain(prompt=THREE), contract.composed({"method": "merge"}, prompt=THREE))


def test_without_a_lora_the_image_is_the_hosts_and_it_is_said(contract):
    composed = contract.composed(prompt=PLAIN)
    assert equal(contract.plain(prompt=PLAIN), composed)
    assert "LoRAtorio note: " in composed.infotext
    assert "no LoRA is active" in composed.infotext


def test_a_missing_lora_is_named(contract):
    composed = contract.composed(prompt=f"{PLAIN} <lora:lora:1> <lora:no_such_file:1>")
    assert equal(composed, contract.composed(prompt=f"{PLAIN} <lora:lora:1>"))
    assert "composed without no_such_file" in composed.infotext


def test_a_lora_named_twice_takes_part_once(contract):
    """With the multiplier that it comes to in the host: the last one twice, or in Forge's family the sum."""
    composed = contract.composed(prompt=f"{PLAIN} <lora:lora:0.4> <lora:locon:0.8> <lora:lora:0.3>")
    strength = 0.6 if contract.host in ("double", "a1111") else 0.7
    once = contract.composed(prompt=f"{PLAIN} <lora:lora:{strength}> <lora:locon:0.8>")
    assert mean(composed.images, once.images) < 0.5
    assert "named more than once" in composed.infotext
    twice = f"{PLAIN} <lora:lora:0.4> <lora:lora:0.3>"
    assert mean(contract.composed({"base_share": 0}, prompt=twice).images, contract.plain(prompt=twice).images) < 0.05


def test_all_zero_loras_give_the_base_models_image(contract):
    composed = contract.composed(prompt=f"{PLAIN} <lora:lora:0> <lora:locon:0>")
    assert mean(composed.images, contract.plain(prompt=PLAIN).images) < 0.05


def test_order_of_loras_does_not_matter(contract):
    one = contract.composed(prompt=f"{PLAIN} <lora:lora:1> <lora:locon:0.8> <lora:unet_only:1>")
    other = contract.composed(prompt=f"{PLAIN} <lora:unet_only:1> <lora:lora:1> <lora:locon:0.8>")
    assert mean(one.images, other.images) < 0.05


def test_an_image_does_not_depend_on_its_batch(contract):
    pair = contract.composed(prompt=TWO, batch_size=2, seed=5)
    assert mean(pair.images[-1:], contract.composed(prompt=TWO, seed=6).images) < 0.05


def test_the_host_comes_back_as_it_was(contract):
    """Plain and merged images before and after compositions of every kind, and no conditioning of ours in its cache."""
    before = contract.plain(prompt=PLAIN), contract.plain(prompt=TWO)
    for options in ({}, {"method": "composite"}, {"method": "switch"}, {"start": 0.5}):
        contract.composed(options, prompt=TWO)
        assert equal(before[1], contract.plain(prompt=TWO))
        assert equal(before[0], contract.plain(prompt=PLAIN))


def test_composition_is_not_disturbed_by_the_hosts_cache(contract):
    first = contract.composed(prompt=TWO)
    contract.plain(prompt=TWO)
    assert equal(first, contract.composed(prompt=TWO))


BAD = {
    "patch_size": [0, 65, 2.5, "4", True, None, [4]],
    "temperature": [0, -1, 1e9, "hot", None],
    "method": ["sum", 3, None],
    "base_share": [-0.1, 1.5, "half"],
    "enabled": ["yes", 1],
    "start": [1.0, -1],
}


@pytest.mark.parametrize("name", BAD)
def test_bad_values_are_refused_by_name(contract, name):
    for value in BAD[name]:
        with pytest.raises(RequestError) as caught:
            contract.composed({name: value}, prompt=TWO)
        assert caught.value.status == 422
        assert name in caught.value.body


def test_unknown_options_are_refused(contract):
    with pytest.raises(RequestError) as caught:
        contract.composed({"patchsize": 4}, prompt=TWO)
    assert caught.value.status == 422
    assert "did you mean patch_size?" in caught.value.body


def test_the_host_works_on_after_an_error(contract):
    before = contract.plain(prompt=TWO)
    with pytest.raises(RequestError):
        contract.composed({"patch_size": 0}, prompt=TWO)
    assert equal(before, contract.plain(prompt=TWO))
    contract.composed(prompt=TWO)


def test_positional_values_mean_the_same(contract):
    settings = Settings(enabled=True, method="loratorio", patch_size=2, temperature=0.7, relativity=1.0)
    values = [getattr(settings, option.name) for option in OPTIONS]
    named = contract.composed({"patch_size": 2, "temperature": 0.7, "relativity": 1.0}, prompt=TWO)
    positional = contract.generate({"prompt": TWO}, {"LoRAtorio": {"args": values}})
    short = contract.generate({"prompt": TWO}, {"LoRAtorio": {"args": [True, "loratorio", 2]}})
    assert equal(named, positional)
    assert equal(short, contract.composed({"patch_size": 2}, prompt=TWO))


def test_infotext_restores_every_option(contract):
    """An image's own generation parameters, sent back, make the image again; those of a plain image switch off."""
    plain = contract.plain(prompt=TWO)
    try:
        again = contract.generate({"infotext": plain.infotext, "prompt": TWO})
    except RequestError as error:
        if contract.host in ("double", "a1111"):
            raise
        pytest.skip(f"this host's API cannot read even a plain image's infotext: {error}")
    assert equal(plain, again)
    options = {"patch_size": 2, "temperature_mode": "fixed", "temperature": 0.02, "base_share": 0.25, "end": 0.9}
    composed = contract.composed(options, prompt=TWO)
    restored = contract.generate({"infotext": composed.infotext, "prompt": TWO})
    assert equal(composed, restored)
    assert Settings.from_infotext(parameters(composed.infotext)) == Settings(enabled=True, **options)


def parameters(infotext: str) -> dict[str, str]:
    """The ``key: value`` pairs on an infotext's last line."""
    pairs = (pair.partition(": ") for pair in infotext.splitlines()[-1].split(", "))
    return {key: value for key, _, value in pairs}


def sabotaged(contract, plan: dict, options: dict | None = None, **payload):
    """A composition during which model calls fail as planned."""
    composition = {"enabled": True, **(options or {})}
    scripts = {"LoRAtorio": {"args": [composition]}, "LoRAtorio sabotage": {"args": [plan]}}
    return contract.generate(payload, scripts)


@pytest.mark.parametrize("call", [1, 3], ids=["in the host's own pass", "in an isolated pass"])
def test_an_error_in_the_middle_reaches_the_user(contract, call):
    """It stops the generation with its reason, and the next one is untouched."""
    if call > 1 and contract.host not in ("double", "a1111"):
        pytest.skip("this host puts all rows in one call")
    alone = {"host_options": {"batch_cond_uncond": False}} if call > 1 else {}
    before = contract.plain(prompt=TWO), contract.plain(prompt=PLAIN), contract.composed(prompt=TWO)
    with pytest.raises(RequestError) as caught:
        sabotaged(contract, {"error": "runtime", "step": 3, "call": call}, prompt=TWO, **alone)
    assert caught.value.status == 500
    assert "sabotaged" in caught.value.body
    assert equal(before[0], contract.plain(prompt=TWO))
    assert equal(before[1], contract.plain(prompt=PLAIN))
    assert equal(before[2], contract.composed(prompt=TWO))


@pytest.mark.parametrize("options", [{}, {"base_share": 1}, {"refresh": 1}], ids=str)
def test_all_rows_of_a_step_are_evaluated_in_one_call(contract, options):
    whole = contract.composed(options, prompt=THREE)
    assert equal(whole, sabotaged(contract, {"error": "runtime", "call": 2}, options, prompt=THREE))


def test_out_of_memory_halves_the_batch_and_loses_nothing(contract):
    whole = contract.composed(prompt=THREE)
    before = len(contract.webui.log())
    split = sabotaged(contract, {"error": "memory", "rows": 2}, prompt=THREE)
    assert mean(whole.images, split.images) < 0.05
    assert "Out of memory with 8 rows in a batch: going on with 4" in contract.webui.log()[before:]
    assert "Out of memory with 4 rows in a batch: going on with 2" in contract.webui.log()[before:]


def test_out_of_memory_with_a_single_row_reaches_the_user(contract):
    before = contract.plain(prompt=TWO)
    with pytest.raises(RequestError) as caught:
        sabotaged(contract, {"error": "memory"}, prompt=TWO)
    assert "out of memory" in caught.value.body
    assert equal(before, contract.plain(prompt=TWO))


def test_an_interrupt_returns_the_image_so_far_and_leaves_nothing_behind(contract):
    before = contract.plain(prompt=TWO), contract.plain(prompt=PLAIN)
    interrupted = sabotaged(contract, {"error": "interrupt", "step": 3}, prompt=TWO)
    assert len(interrupted.images) == 1
    assert equal(before[0], contract.plain(prompt=TWO))
    assert equal(before[1], contract.plain(prompt=PLAIN))


def test_an_error_in_the_second_pass_reaches_the_user(contract):
    payload = {"prompt": TWO, "steps": 4, "enable_hr": True, "hr_scale": 1.5, "hr_upscaler": "Latent"}
    payload |= {"denoising_strength": 0.7, "hr_second_pass_steps": 12}
    before = contract.plain(**payload)
    with pytest.raises(RequestError) as caught:
        sabotaged(contract, {"error": "runtime", "step": 8}, **payload)
    assert "sabotaged" in caught.value.body
    assert equal(before, contract.plain(**payload))


def test_a_sampler_without_a_step_to_make_is_the_hosts_own_business(contract):
    """DDIM of one step calls no model, so there is nothing that a composition could be missing from."""
    payload = {"prompt": TWO, "sampler_name": "DDIM", "steps": 1}
    assert equal(contract.plain(**payload), contract.composed(**payload))


def test_a_lora_named_twice_in_one_pass_acts_once_in_the_other(contract):
    hires = {"enable_hr": True, "hr_scale": 1.5, "hr_upscaler": "Latent", "denoising_strength": 0.7}
    prompts = {"prompt": f"{PLAIN} <lora:lora:0.3> <lora:lora:0.3>", "hr_prompt": f"{PLAIN} <lora:lora:0.3>"}
    composed = contract.composed({"base_share": 0}, **prompts, **hires)
    assert mean(composed.images, contract.plain(**prompts, **hires).images) < 0.05
