"""Beside other extensions the result is right, or generation stops with the neighbour's name; nothing is left behind.

The neighbour is an extension of the tests' own, which does what other people's do, one kind of it at a time. One LoRA
with base share 0 is, by the method's mathematics, the host's own image with this LoRA.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.contract.rows import HIRES, THREE, TOLERANCE, TWO, Contract, largest, mean
from tests.live.webui import RequestError

HERE = Path(__file__).parent
ONE = "a cat on a hill <lora:lora:1>"
EXACT = {"base_share": 0.0}


@pytest.fixture(
    scope="module",
    params=["double", "double, the neighbour last", pytest.param("a1111", marks=pytest.mark.live)],
)
def webui(request, tmp_path_factory):
    """A host with the neighbour among its extensions, installed from a folder of its own."""
    neighbour = tmp_path_factory.mktemp("neighbours") / "a-neighbour"
    shutil.copytree(HERE / "company_extension", neighbour)
    if request.param == "a1111":
        from tests.live.conftest import tiny_webui

        with tiny_webui("sd1", tmp_path_factory, neighbours=[neighbour]) as real:
            yield real
    else:
        from tests.contract.double import EXTENSIONS, Double

        last = "last" in request.param
        extensions = (*EXTENSIONS, neighbour) if last else (neighbour, *EXTENSIONS)
        with Double(tmp_path_factory.mktemp("double"), extensions) as double:
            yield double


@pytest.fixture
def contract(webui, request) -> Contract:
    return Contract(webui, request.node.callspec.params["webui"].partition(",")[0])


@pytest.fixture(autouse=True)
def the_host_comes_back_as_it_was(contract):
    before = contract.plain(prompt=ONE).images, contract.plain(prompt="a cat").images
    yield
    assert largest(before[0], contract.plain(prompt=ONE).images) == 0
    assert largest(before[1], contract.plain(prompt="a cat").images) == 0


def beside(contract, kind, options=None, **payload):
    """The host's image with the neighbour, with our options if there are any."""
    scripts = {"Company": {"args": [kind]}}
    if options is not None:
        scripts["LoRAtorio"] = {"args": [{"enabled": True, **options}]}
    return contract.generate({"prompt": ONE, **payload}, scripts)


TAKES_PART = ["marks_the_text", "remembers_the_first_call", "halves_the_batch", "cuts_into_tiles"]
TAKES_PART += ["draws_at_random"]
ELSEWHERE = ["changes_the_prediction", "changes_strengths_in_its_callback", "has_strengths_that_follow_the_steps"]
ELSEWHERE += ["renames_networks", "runs_scripts_on_a_copy"]
REFUSED = ["has_loras_of_its_own", "has_texts_of_its_own", "changes_the_text", "decides_where_loras_act", "alternates"]
REFUSED += ["takes_parts_from_the_step_before", "gathers_what_it_sees", "brings_texts_of_its_own"]

REQUESTS = {
    "as it is": {},
    "batch of 2": {"batch_size": 2},
    "2 batches": {"n_iter": 2},
    "DDIM": {"sampler_name": "DDIM"},
    "AND": {"prompt": f"{ONE} AND a dog :0.5"},
    "long prompt": {"prompt": "a cat on a hill, " * 20 + ONE},
    "cond and uncond in calls of their own": {"host_options": {"batch_cond_uncond": False}},
    "hires": HIRES,
}
SHAPED = {"remembers_the_first_call", "halves_the_batch"}
"""Neighbours that know one shape of batch only, with whom the host by itself fails elsewhere."""


@pytest.mark.parametrize("request_", REQUESTS, ids=REQUESTS)
@pytest.mark.parametrize("kind", [*TAKES_PART, *ELSEWHERE])
def test_one_lora_is_the_hosts_own_image(contract, kind, request_):
    payload = REQUESTS[request_]
    if kind in SHAPED and request_ in ("AND", "long prompt", "cond and uncond in calls of their own"):
        pytest.skip("the host by itself fails with this neighbour here, or is changed by nothing")
    expected = beside(contract, kind, **payload)
    composed = beside(contract, kind, EXACT, **payload)
    assert largest(expected.images, composed.images) <= TOLERANCE
    if kind not in ("runs_scripts_on_a_copy",):
        assert mean(composed.images, contract.plain(**{"prompt": ONE, **payload}).images) > 0.3


@pytest.mark.parametrize("options", [{}, {"start": 0.5}, {"end": 0.5}, {"refresh": 1}, {"base_share": 1.0}], ids=str)
@pytest.mark.parametrize("kind", TAKES_PART)
def test_every_plan_goes_through_in_the_hosts_own_rows(contract, kind, options):
    """Two LoRAs: the composition is made, it is said that it is slower, and it is neither the merged image nor that
    without the neighbour."""
    composed = beside(contract, kind, options, prompt=TWO)
    assert "a-neighbour" in composed.infotext
    assert mean(composed.images, contract.composed(options, prompt=TWO).images) > 0.3
    if options in ({}, {"base_share": 1.0}):
        assert mean(composed.images, beside(contract, kind, prompt=TWO).images) > 0.3


def test_company_is_exact_with_several_loras(contract):
    """A neighbour whose part does not depend on the batch: in company as in one batch."""
    expected = contract.composed(prompt=THREE)
    composed = beside(contract, "watches", {}, prompt=THREE)
    assert largest(expected.images, composed.images) <= 1
    assert "a-neighbour" in composed.infotext


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_right_is_refused_by_name(contract, kind):
    with pytest.raises(RequestError) as caught:
        beside(contract, kind, EXACT)
    assert caught.value.status == 422
    assert "a-neighbour" in caught.value.body


def test_texts_of_others_are_right_where_no_lora_changes_the_text_encoder(contract):
    prompt = "a cat on a hill <lora:lora:0:1>"
    expected = beside(contract, "brings_texts_of_its_own", prompt=prompt)
    composed = beside(contract, "brings_texts_of_its_own", EXACT, prompt=prompt)
    assert largest(expected.images, composed.images) <= TOLERANCE
    assert mean(composed.images, contract.plain(prompt=prompt).images) > 0.3


@pytest.mark.parametrize(
    "payload", [{"host_options": {"batch_cond_uncond": False}}, {"prompt": REQUESTS["long prompt"]["prompt"]}]
)
def test_a_neighbour_that_tells_cond_from_uncond_by_their_order(contract, payload):
    """It takes turns, which comes out even where the host makes two calls a step: each LoRA has both, in this order."""
    expected = beside(contract, "alternates", **payload)
    assert largest(expected.images, beside(contract, "alternates", EXACT, **payload).images) <= TOLERANCE
    assert mean(expected.images, contract.plain(**{"prompt": ONE, **payload}).images) > 0.3


BAD = {"a pool's typo": {"pool": ["typo"]}, "a bad value": {"patch_size": 0}, "no such option": {"patchsize": 4}}


@pytest.mark.parametrize("options", BAD.values(), ids=BAD)
def test_a_refusal_comes_before_any_script_has_acted(contract, options):
    """Nobody has hooked anything in: the next image is plain (see the fixture), the neighbour was not even asked."""
    before = len(contract.webui.log())
    with pytest.raises(RequestError) as caught:
        beside(contract, "speaks", options)
    assert caught.value.status == 422
    assert "neighbour processes" not in contract.webui.log()[before:]
    beside(contract, "speaks", EXACT)
    assert "neighbour processes" in contract.webui.log()[before:]


@pytest.mark.parametrize("options", BAD.values(), ids=BAD)
def test_who_acts_before_that_cleans_up(contract, options):
    with pytest.raises(RequestError) as caught:
        beside(contract, "acts_before_all_others", options)
    assert caught.value.status == 422


@pytest.mark.parametrize("step", [0, 3])
@pytest.mark.parametrize("kind", [*TAKES_PART, *ELSEWHERE])
def test_after_an_error_every_script_cleans_up(contract, kind, step):
    scripts = {"Company": {"args": [kind]}, "LoRAtorio": {"args": [{"enabled": True}]}}
    scripts["LoRAtorio sabotage"] = {"args": [{"error": "runtime", "step": step}]}
    with pytest.raises(RequestError) as caught:
        contract.generate({"prompt": TWO}, scripts)
    assert "sabotaged" in caught.value.body


@pytest.mark.parametrize("button, steps_of_the_next", [("interrupt", 0), ("skip", 8)])
@pytest.mark.parametrize("kind", ["marks_the_text", "draws_at_random"])
def test_a_button_acts_within_one_model_call(contract, kind, button, steps_of_the_next):
    """Not after the other LoRAs' calls of the step, nor after those that look who takes part."""
    scripts = {"Company": {"args": [kind]}, "LoRAtorio": {"args": [{"enabled": True}]}}
    scripts["LoRAtorio sabotage"] = {"args": [{"error": button, "image": 0, "step": 1, "call": 1}]}
    generation = contract.generate({"prompt": TWO, "n_iter": 2}, scripts)
    calls = generation.info["extra_generation_params"]["LoRAtorio sabotage"]["calls"]
    assert [call["step"] for call in calls if call["image"] == 0].count(1) == 1
    assert max(call["step"] for call in calls if call["image"] == 0) == 1
    assert len({call["step"] for call in calls if call["image"] == 1}) == steps_of_the_next


def test_a_request_can_be_sent_away_before_it_is_processed(contract):
    before = len(contract.webui.log())
    composed = beside(contract, "sends_the_request_away", {}, prompt=TWO)
    assert "neighbour cannot" not in contract.webui.log()[before:]
    assert largest(composed.images, contract.composed(prompt=TWO).images) == 0


def test_a_merged_window_after_a_neighbour_that_marks_the_text(contract):
    expected = contract.composed({"start": 0.5}, prompt=TWO)
    beside(contract, "marks_the_text", {}, prompt=TWO)
    again = contract.composed({"start": 0.5}, prompt=TWO)
    assert largest(expected.images, again.images) == 0


def test_renamed_networks_keep_their_names(contract):
    composed = beside(contract, "renames_networks", {"top_k": 2}, prompt=TWO)
    assert "renamed" not in composed.infotext
    assert "composed without" not in composed.infotext
    picked = composed.info["extra_generation_params"]["LoRAtorio steps"]["loras"]
    assert sorted(picked) == ["locon", "lora"]


def test_what_was_picked_is_said_of_every_image(contract):
    """Also where a neighbour runs the scripts once more on a copy of the request."""
    composed = beside(contract, "runs_scripts_on_a_copy", {"top_k": 2}, prompt=f"{TWO} <lora:no_such:1>", n_iter=2)
    assert len(composed.info["infotexts"]) == 2
    for infotext in composed.info["infotexts"]:
        assert "LoRAtorio picked: " in infotext
        assert "composed without no_such" in infotext
    assert np.array(composed.info["extra_generation_params"]["LoRAtorio steps"]["shares"]).shape[0] == 2


def test_every_picture_has_a_seed_and_prompts(contract):
    """By its place in the answer, as those look them up who share the work out over several WebUIs."""
    composed = contract.composed({"show_maps": True}, prompt=TWO, batch_size=2)
    assert len(composed.images) > 3
    for name in ("all_prompts", "all_negative_prompts", "all_seeds", "infotexts"):
        assert len(composed.info[name]) >= len(composed.images)
    assert composed.info["all_seeds"][:2] == [1, 2]
    assert set(composed.info["all_seeds"]) == {1, 2}


@pytest.mark.parametrize("options", [{"preset": "paper"}, {"method": "composite"}, {"method": "switch"}], ids=str)
def test_a_lora_that_does_nothing_takes_no_share(contract, options):
    """At weight 0 it is as if it were not named."""
    alone = contract.composed(options, prompt="a cat <lora:locon:0.7>")
    beside_it = contract.composed(options, prompt="a cat <lora:lora:0> <lora:locon:0.7>")
    assert largest(alone.images, beside_it.images) == 0
    assert json.dumps(beside_it.info).count("<lora:lora:0>") > 0


def test_a_lora_at_weight_0_alone_is_the_bare_model(contract):
    composed = contract.composed(prompt="a cat <lora:lora:0>")
    assert largest(composed.images, contract.plain(prompt="a cat <lora:lora:0>").images) <= 1
