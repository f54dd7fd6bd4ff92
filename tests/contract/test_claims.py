"""Where, when and how much each LoRA acts, and LoRAs in every pass: in a WebUI, by tags and by options."""

import numpy as np
import pytest

from tests.contract.rows import HIRES, TOLERANCE, TWO, largest, mean
from tests.live.webui import RequestError, encode_image

CAT = "a cat on a hill"


def same(first, second, tolerance: int = 0) -> bool:
    return largest(first.images, second.images) <= tolerance


@pytest.fixture(autouse=True)
def the_host_comes_back_as_it_was(contract):
    before = contract.plain(prompt=TWO), contract.plain(prompt=CAT)
    yield
    assert same(before[0], contract.plain(prompt=TWO))
    assert same(before[1], contract.plain(prompt=CAT))


@pytest.mark.parametrize("parts", [":at=left", ":share=2", ":steps=0-0.5", ":base=1", ":at=0-0-0.3-1:steps=0.2-1"])
def test_unticked_the_parts_mean_nothing(contract, parts):
    assert same(contract.plain(prompt=TWO), contract.plain(prompt=TWO.replace("lora:1>", f"lora:1{parts}>")))


def apart(first, second, columns: slice) -> float:
    """Mean difference of two lists of images in some of their columns."""
    return mean([image[:, columns] for image in first], [image[:, columns] for image in second])


@pytest.mark.parametrize("request_", [{}, {"sampler_name": "Euler a"}, {"batch_size": 2}], ids=str)
def test_alone_in_a_place_it_acts_there_and_the_bare_model_elsewhere(contract, request_):
    """In one step: after it, what is on the left is seen from the right. A real decoder sees so far even then."""
    request_ = {**request_, "steps": 1}
    bare = contract.composed(prompt=f"{CAT} <lora:lora:0>", **request_).images
    whole = contract.composed(prompt=f"{CAT} <lora:lora:1>", **request_).images
    left = contract.composed(prompt=f"{CAT} <lora:lora:1:at=left>", **request_).images
    width = left[0].shape[1]
    for here, there, columns in ((whole, bare, slice(width // 4)), (bare, whole, slice(width * 3 // 4, width))):
        allowed = 0.05 if contract.host == "double" else 0.5 * apart(left, there, columns)
        assert apart(left, here, columns) <= allowed
        assert apart(left, there, columns) > 0.5


def test_a_place_in_both_passes(contract):
    composed = contract.composed(prompt=TWO.replace("lora:1>", "lora:1:at=left>"), **HIRES)
    assert mean(composed.images, contract.composed(prompt=TWO, **HIRES).images) > 0.5


def test_tags_and_options_say_the_same(contract):
    tagged = contract.composed(prompt=f"{CAT} <lora:lora:1:at=left:share=2> <lora:locon:0.8:steps=0.2-1>")
    options = {"loras": {"lora": {"at": "left", "share": 2}, "locon": {"steps": "0.2-1"}}}
    assert same(tagged, contract.composed(options, prompt=TWO))
    assert mean(tagged.images, contract.composed(prompt=TWO).images) > 0.5


def test_a_mask_is_a_place(contract):
    white = np.zeros((64, 64, 3), np.uint8)
    white[:, :32] = 255
    masked = contract.composed({"loras": {"lora": {"mask": encode_image(white)}}}, prompt=TWO)
    sharp = contract.composed({"loras": {"lora": {"at": "left"}}}, prompt=TWO)
    assert mean(masked.images, sharp.images) < mean(masked.images, contract.composed(prompt=TWO).images)


def test_the_infotext_brings_the_options_back(contract):
    options = {"loras": {"lora": {"at": "left", "steps": "0-0.5"}}, "everywhere": ["unet_only"]}
    composed = contract.composed(options, prompt=f"{TWO} <lora:unet_only:0.5>")
    try:
        again = contract.generate({"infotext": composed.infotext, "prompt": f"{TWO} <lora:unet_only:0.5>"})
    except RequestError as error:
        if contract.host in ("double", "a1111"):
            raise
        pytest.skip(f"this host's API cannot read even a plain image's infotext: {error}")
    assert same(composed, again)


def test_shares_move_the_weights(contract):
    def picked(share):
        composed = contract.composed({"top_k": 2, "loras": {"lora": {"share": share}}}, prompt=TWO)
        steps = composed.info["extra_generation_params"]["LoRAtorio steps"]
        return np.mean(steps["shares"], axis=(0, 1))[steps["loras"].index("lora")]

    shares = [picked(share) for share in (0.01, 1, 100)]
    assert shares[0] + 0.1 < shares[1] < shares[2] - 0.1


def test_outside_its_steps_it_takes_no_part_and_costs_nothing(contract):
    composed = contract.composed({"top_k": 2}, prompt=f"{CAT} <lora:lora:1> <lora:locon:0.8:steps=0-0.5>", steps=8)
    steps = composed.info["extra_generation_params"]["LoRAtorio steps"]
    late = np.array(steps["shares"])[0, 4:, steps["loras"].index("locon")]
    assert np.all(late == 0)
    before = len(contract.webui.log())
    scripts = {"LoRAtorio": {"args": [{"enabled": True}]}}
    scripts["LoRAtorio sabotage"] = {"args": [{"error": "memory", "rows": 4, "step": 6}]}
    contract.generate({"prompt": f"{CAT} <lora:lora:1> <lora:locon:0.8:steps=0-0.5>", "steps": 8}, scripts)
    assert "Out of memory" not in contract.webui.log()[before:]


@pytest.mark.parametrize("request_", [{}, HIRES, {"sampler_name": "DDIM"}, {"n_iter": 2}], ids=str)
@pytest.mark.parametrize("name", ["rank_16_half", "lora", "dora"])
def test_a_lora_in_every_pass_beside_one_is_the_hosts_sum_of_both(contract, name, request_):
    """With base share 0 and one LoRA that claims, the method gives that LoRA alone, over all the rest."""
    tag = f"<lora:{name}:0.6>"
    merged = contract.plain(prompt=f"{CAT} {tag} <lora:locon:0.8>", **request_)
    options = {"base_share": 0.0}
    by_tag = contract.composed(options, prompt=f"{CAT} <lora:{name}:0.6:base=1> <lora:locon:0.8>", **request_)
    by_option = contract.composed({**options, "everywhere": [name]}, prompt=f"{CAT} {tag} <lora:locon:0.8>", **request_)
    assert same(merged, by_tag, TOLERANCE) and same(by_tag, by_option)
    assert mean(merged.images, contract.plain(prompt=f"{CAT} <lora:locon:0.8>", **request_).images) > 0.5


def test_a_style_is_in_every_pass_as_if_its_tag_said_so(contract):
    def prompt(part):
        return f"{CAT} <lora:lora:1> <lora:rank_16_half:0.6:{part}> <lora:locon:0.8>"

    styles = {"styles": "everywhere"}
    by_words, by_tag = (contract.composed(styles, prompt=prompt(part)) for part in ("words=oil style", "base=1"))
    assert same(by_words, by_tag)
    assert "rank_16_half is a style" in by_words.infotext
    shared_out = {"styles": "compete", "rest": False}
    competing = contract.composed(shared_out, prompt=prompt("words=oil style"))
    assert same(competing, contract.composed(shared_out, prompt=prompt("share=1")))
    assert mean(by_words.images, competing.images) > 0.5


@pytest.mark.parametrize("request_", [{}, HIRES, {"sampler_name": "DDIM"}, {"n_iter": 2, "batch_size": 2}], ids=str)
@pytest.mark.parametrize(
    "kind, others",
    [
        ("oil style", "<lora:locon:0.8>"),
        ("skyline town", "<lora:locon:0.8>"),
        ("town", "<lora:lora:1> <lora:locon:0.8>"),
    ],
)
def test_the_rest_is_left_to_who_is_in_every_pass(contract, kind, others, request_):
    """What neither of the others is clearly at home in is the pass's that holds the style or the background."""
    plain = f"{CAT} <lora:rank_16_half:0.6> {others}"
    prompt = f"{CAT} <lora:rank_16_half:0.6:words={kind}> {others}"
    composed = contract.composed(prompt=prompt, **request_)
    reference = contract.brute_force(in_every_pass=["rank_16_half"], prompt=plain, **request_)
    contract.largest_difference = largest(composed.images, reference.images)
    assert contract.largest_difference <= TOLERANCE
    shared_out = contract.composed({"styles": "everywhere"}, prompt=prompt, **request_)
    assert mean(composed.images, shared_out.images) > 0.5
    assert "rank_16_half is " in composed.infotext


def test_loras_in_every_pass_alone_are_the_hosts_image(contract):
    prompt = f"{CAT} <lora:lora:1:base=1>"
    composed = contract.composed(prompt=prompt)
    assert same(contract.plain(prompt=prompt), composed)
    assert "LoRAtorio note: " in composed.infotext


@pytest.mark.parametrize("name", ["unet_only", "lora_peft"], ids=["not in the text", "in the text"])
@pytest.mark.parametrize(
    "options", [{}, {"start": 0.4}, {"end": 0.6}], ids=["composed", "merged before", "merged after"]
)
@pytest.mark.parametrize(
    "prompt",
    [TWO, f"{TWO} <lora:dora:0.7:base=1>", f"{CAT} <lora:cross_attention:1> <lora:down_blocks:1>"],
    ids=["two", "beside the prompt's", "others not in the text"],
)
def test_a_lora_of_the_pool_in_every_pass(contract, prompt, options, name):
    pooled = contract.composed({"pool": [f"{name}:0.6"], "everywhere": [name], **options}, prompt=prompt)
    assert same(pooled, contract.composed(options, prompt=f"{prompt} <lora:{name}:0.6:base=1>"), TOLERANCE)


BAD = {
    "<lora:lora:1:at=lft>": "at",
    "<lora:lora:1:share=0>": "share",
    "<lora:lora:1:steps=0.5-0.2>": "steps",
    "<lora:lora:1:base=maybe>": "base",
    "<lora:lora:1:base=1:at=left>": "at",
}


@pytest.mark.parametrize("tag", BAD)
def test_a_bad_part_is_refused_with_its_tag(contract, tag):
    with pytest.raises(RequestError) as caught:
        contract.composed(prompt=f"{CAT} {tag}")
    assert caught.value.status == 422
    assert BAD[tag] in caught.value.body and tag.strip("<>") in caught.value.body


def test_options_for_a_lora_that_is_not_there_are_said(contract):
    composed = contract.composed({"loras": {"nobody": {"at": "left"}}}, prompt=TWO)
    assert same(composed, contract.composed(prompt=TWO))
    assert "loras.nobody" in composed.infotext


@pytest.mark.parametrize("method", ["loratorio", "composite", "switch"])
def test_whom_the_prompt_does_not_name_is_left_out_and_said(contract, method):
    unnamed = f"{CAT} <lora:lora:1> <lora:locon:0.8:words=zorg robot>"
    options = {"method": method, "unnamed": "drop"}
    left_out = contract.composed(options, prompt=unnamed)
    assert same(left_out, contract.composed({"method": method}, prompt=f"{CAT} <lora:lora:1>"))
    assert "locon takes no part: the prompt has none of its trigger words (zorg robot)" in left_out.infotext
    everyone = contract.composed({"method": method}, prompt=TWO)
    for changed in ({"unnamed": "keep"}, {"unnamed": "drop_pooled"}):
        assert same(everyone, contract.composed({**options, **changed}, prompt=unnamed))
    in_prompt = f"{CAT} <lora:lora:1> <lora:locon:0.8:words=zorg robot, {CAT.split()[-1]}>"
    assert same(everyone, contract.composed(options, prompt=in_prompt))


def test_a_pool_from_which_words_choose(contract):
    options = {"pool": ["unet_only:0.6"], "loras": {"unet_only": {"words": "zorg"}}}
    assert same(contract.composed({**options, "unnamed": "drop_pooled"}, prompt=TWO), contract.composed(prompt=TWO))
    everyone = contract.composed({**options, "unnamed": "keep"}, prompt=TWO)
    assert not same(everyone, contract.composed(prompt=TWO))
    assert same(contract.composed(options, prompt=TWO), everyone), "the prompt names nobody of the pool"
    others = {**options, "pool": ["unet_only:0.6", "locon:0.5"], "loras": {**options["loras"], "locon": {"words": CAT}}}
    named = contract.composed(others, prompt=f"{CAT} <lora:lora:1>")
    assert same(named, contract.composed({"pool": ["locon:0.5"]}, prompt=f"{CAT} <lora:lora:1>"))
    assert "unet_only takes no part: the prompt has none of its trigger words (zorg)" in named.infotext


def test_a_background_that_takes_no_part_keeps_nothing_of_the_rest(contract):
    """It is one of a pool's, which the prompt does not name; beside a style, which is in every pass."""
    prompt = f"{CAT} <lora:rank_16_half:0.6:words=oil style> <lora:locon:0.8>"
    pool = {"pool": ["unet_only:0.6"], "loras": {"unet_only": {"words": "skyline town"}}}
    unnamed = contract.composed({**pool, "unnamed": "drop_pooled"}, prompt=prompt)
    assert same(unnamed, contract.composed(prompt=prompt))
    competing = contract.composed({**pool, "unnamed": "keep"}, prompt=prompt)
    shared_out = contract.composed({**pool, "unnamed": "keep", "styles": "everywhere"}, prompt=prompt)
    assert same(competing, shared_out)
    assert mean(unnamed.images, competing.images) > 0.5


@pytest.mark.parametrize("method", ["switch", "merge"])
def test_a_method_that_knows_no_place_says_so(contract, method):
    composed = contract.composed({"method": method}, prompt=f"{CAT} <lora:lora:1:at=left> <lora:locon:0.8>")
    assert same(composed, contract.composed({"method": method}, prompt=TWO))
    assert f"method {method} knows no place" in composed.infotext


def test_merge_says_nothing_of_parts_that_it_heeds_as_they_are(contract):
    """Of trigger words, and of a LoRA in every pass: of the sum they change nothing."""
    prompt = f"{CAT} <lora:lora:1:words=zorg> <lora:locon:0.8:base=1>"
    composed = contract.composed({"method": "merge"}, prompt=prompt)
    assert same(composed, contract.composed({"method": "merge"}, prompt=TWO))
    assert "knows no place" not in composed.infotext
