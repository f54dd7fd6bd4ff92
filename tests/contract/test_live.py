"""While an image is made: a pressed button acts within one model call, and the host's progress is what is done."""

import numpy as np
import pytest

from tests.contract.rows import TWO

PLAIN = "a cat on a hill"
SEVERAL_CALLS = {"prompt": PLAIN, "batch_size": 4, "steps": 3}
"""With `POOL`, 32 rows a step, of which 16 fit into a model call."""
POOL = {"pool": ["lora", "locon:0.8", "unet_only"], "show_maps": True}


def equal(first: list[np.ndarray], second: list[np.ndarray]) -> bool:
    return len(first) == len(second) and all(map(np.array_equal, first, second))


def watched(contract, plan: dict, options: dict, **payload):
    """A composition that is watched and disturbed as planned, and its model calls."""
    scripts = {"LoRAtorio": {"args": [{"enabled": True, **options}]}, "LoRAtorio sabotage": {"args": [plan]}}
    generation = contract.generate(payload, scripts)
    return generation, seen(generation)["calls"]


def seen(generation) -> dict:
    return generation.info["extra_generation_params"]["LoRAtorio sabotage"]


def calls_of(calls: list[dict], image: int, step: int) -> int:
    return sum((call["image"], call["step"]) == (image, step) for call in calls)


@pytest.fixture
def before(contract):
    """Plain and composed images, which are the same after the test."""
    images = contract.plain(prompt=TWO), contract.plain(prompt=PLAIN), contract.composed(prompt=TWO)
    yield
    assert equal(images[0].images, contract.plain(prompt=TWO).images)
    assert equal(images[1].images, contract.plain(prompt=PLAIN).images)
    assert equal(images[2].images, contract.composed(prompt=TWO).images)


@pytest.mark.parametrize("step", [0, 1])
def test_an_interrupt_acts_within_one_model_call(contract, before, step):
    plan = {"error": "interrupt", "step": step, "call": 1}
    interrupted, calls = watched(contract, plan, POOL, **SEVERAL_CALLS, n_iter=2)
    assert [calls_of(calls, 0, each) for each in range(step + 1)] == [2] * step + [1]
    assert len(calls) == 2 * step + 1
    assert len(interrupted.info["all_seeds"]) >= 4 and len(interrupted.images) >= 4


@pytest.mark.parametrize("encoding", [1, 2, 3])
def test_an_interrupt_acts_before_the_prompts_are_encoded_for_the_next_lora(contract, before, encoding):
    """The first encoding is the host's own."""
    interrupted, calls = watched(contract, {"error": "interrupt", "encoding": encoding}, POOL, **SEVERAL_CALLS)
    assert (seen(interrupted)["encodings"], calls) == (encoding, [])


@pytest.mark.parametrize("step", [0, 1])
def test_skip_acts_within_one_model_call_and_the_next_image_is_composed(contract, before, step):
    whole, _ = watched(contract, {}, POOL, **SEVERAL_CALLS, n_iter=2)
    plan = {"error": "skip", "image": 0, "step": step, "call": 1}
    skipped, calls = watched(contract, plan, POOL, **SEVERAL_CALLS, n_iter=2)
    assert [calls_of(calls, 0, each) for each in range(3)] == [2] * step + [1] + [0] * (2 - step)
    assert [calls_of(calls, 1, each) for each in range(3)] == [2, 2, 2]
    assert not equal(skipped.made[:4], whole.made[:4])
    assert equal(skipped.made[4:8], whole.made[4:8])


def test_skip_in_the_first_of_two_passes(contract, before):
    """The second pass makes no model call, as in the host, and leaves the LoRAs to the next image as they were."""
    hires = {"enable_hr": True, "hr_scale": 1.5, "hr_upscaler": "Latent", "denoising_strength": 0.7}
    payload = SEVERAL_CALLS | hires | {"prompt": TWO, "n_iter": 2}
    whole, _ = watched(contract, {}, POOL, **payload)
    skipped, calls = watched(contract, {"error": "skip", "image": 0, "step": 1, "call": 1}, POOL, **payload)
    assert [call["step"] for call in calls if call["image"] == 0] == [0, 0, 1]
    assert equal(skipped.made[4:8], whole.made[4:8])


@pytest.mark.parametrize("image", [0, 1])
def test_what_is_said_of_an_image_that_was_skipped_before_it_began(contract, image):
    """Its own: nothing. Data, texts and pictures of the other batch's images keep their places."""
    skipped, _ = watched(contract, {"error": "skip", "image": image, "step": 0}, POOL, **SEVERAL_CALLS, n_iter=2)
    first, texts = skipped.info["index_of_first_image"], skipped.info["infotexts"]
    data = skipped.info["extra_generation_params"]["LoRAtorio steps"]
    made = [number for number in range(8) if number // 4 != image]
    assert [len(each) for each in data["shares"]] == [3 * (number in made) for number in range(8)]
    assert [len(each) for each in data["maps"]] == [3 * (number in made) for number in range(8)]
    assert ["LoRAtorio picked" in text for text in texts[first:][:8]] == [number in made for number in range(8)]
    assert texts[first + 8 :] == [texts[first + number] for number in made for _ in ("painted", "maps", "shares")]


UNEVEN = {
    "even": {},
    "the second half": {"start": 0.5},
    "in turn": {"refresh": 1},
    "one LoRA in the first half": {"loras": {"unet_only": {"steps": "0-0.5"}}},
    "a pool, looked through now and then": {"top_k": 1, "reselect_every": 4},
}


@pytest.mark.parametrize("name", UNEVEN)
def test_progress_is_the_rows_that_are_done(contract, name):
    """To within a step. Scripts, which run in the sampling thread, see the host's own count."""
    options = {"pool": ["lora", "locon:0.8", "unet_only", "rank_1"], "show_maps": True}
    _, calls = watched(contract, {}, options | UNEVEN[name], prompt=PLAIN, batch_size=2)
    rows = np.array([call["rows"] for call in calls])
    done = (rows.cumsum() - rows) / rows.sum()
    told = np.array([step / steps for step, steps in (call["told"]["elsewhere"] for call in calls)])
    assert all(steps == 8 for _, steps in (call["told"]["elsewhere"] for call in calls))
    assert np.abs(done - told).max() < 1 / 8
    assert (np.diff(told) >= 0).all()
    assert [call["told"]["here"][0] for call in calls] == [max(call["step"] - 1, 0) for call in calls]
