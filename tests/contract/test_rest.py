"""What no LoRA is clearly at home in is the bare model's: as by brute force, and where it must not be, it is not.

By single pixels, each by itself: only their divergences, of the tiny models', are uneven enough to leave much.
"""

import pytest

from tests.contract.rows import HIRES, THREE, TOLERANCE, TWO, largest, mean

PER_PIXEL = {"patch_size": 1, "patches": "grid", "momentum": 0.0, "regions": False}
SHARED_OUT = {**PER_PIXEL, "rest": False}

REQUESTS = {
    "two": {"prompt": TWO},
    "three": {"prompt": THREE},
    "AND": {"prompt": f"{TWO} AND a dog :0.5"},
    "batches": {"prompt": TWO, "batch_size": 2, "n_iter": 2},
    "hires": {"prompt": TWO, **HIRES},
    "DDIM": {"prompt": TWO, "sampler_name": "DDIM"},
    "DPM++ 2M": {"prompt": TWO, "sampler_name": "DPM++ 2M"},
    "CFG 1": {"prompt": TWO, "cfg_scale": 1.0},
}
OPTIONS = {
    "whole regions": {"regions": True},
    "sliding, with momentum": {"patches": "sliding", "momentum": 0.8},
    "fixed temperature": {"temperature_mode": "fixed", "temperature": 0.1},
    "top 2 of the image": {"top_k": 2},
    "one refreshed a step": {"refresh": 1},
    "selected every other step": {"top_k": 2, "reselect_every": 2},
    "base share 0": {"base_share": 0.0},
    "base share 1": {"base_share": 1.0},
}


@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
def test_requests(contract, request_):
    composed = contract.assert_composes(PER_PIXEL, **request_)
    assert mean(composed.images, contract.composed(SHARED_OUT, **request_).images) > 0.5


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(contract, options):
    contract.assert_composes({**PER_PIXEL, **options}, prompt=THREE)


@pytest.mark.parametrize("options", [{"top_k": 1}, {"combination": "gates"}, {"method": "composite"}], ids=str)
def test_what_knows_no_rest(contract, options):
    """One LoRA that was picked has nobody to disagree with; gates and other methods leave nothing."""
    left, shared_out = (contract.composed({**each, **options}, prompt=THREE) for each in (PER_PIXEL, SHARED_OUT))
    assert largest(left.images, shared_out.images) == 0


@pytest.mark.parametrize("words", ["oil style", "skyline town"])
def test_a_known_style_or_background_that_competes_keeps_it(contract, words):
    """It is at home there, though it diverges no more than others."""
    options = {**PER_PIXEL, "styles": "compete"}
    prompt = TWO.replace("<lora:lora:1>", f"<lora:lora:1:words={words}>")
    kept, left = (contract.composed(options, prompt=each) for each in (prompt, TWO))
    reference = contract.brute_force(options, keeping=["lora"], prompt=TWO)
    contract.largest_difference = largest(kept.images, reference.images)
    assert contract.largest_difference <= TOLERANCE
    shared_out = contract.composed({**options, "rest": False}, prompt=prompt)
    for others in (left, shared_out):
        assert mean(kept.images, others.images) > 0.5


@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
def test_a_background_beside_a_style_in_every_pass_keeps_it(contract, request_):
    def asking(style="", background=""):
        tags = f"<lora:rank_16_half:0.6{style}> <lora:dora:0.6{background}>"
        return {**request_, "prompt": f"{tags} {request_['prompt']}"}

    told = asking(":words=oil style", ":words=skyline town")
    kept, shared_out = (contract.composed(options, **told) for options in (PER_PIXEL, SHARED_OUT))
    reference = contract.brute_force(PER_PIXEL, in_every_pass=["rank_16_half"], keeping=["dora"], **asking())
    contract.largest_difference = largest(kept.images, reference.images)
    assert contract.largest_difference <= TOLERANCE
    assert mean(kept.images, shared_out.images) > 0.5


@pytest.mark.parametrize("part", ["at=left", "at=0-0-1-1", "steps=0-0.5"])
def test_beside_a_place_nothing_is_left(contract, part):
    """But what is the whole image is no place, and steps are none."""
    prompt = TWO.replace("<lora:lora:1>", f"<lora:lora:1:{part}>")
    left, shared_out = (contract.composed(options, prompt=prompt) for options in (PER_PIXEL, SHARED_OUT))
    same = largest(left.images, shared_out.images) <= TOLERANCE
    assert same == (part == "at=left")
