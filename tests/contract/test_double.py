"""The double itself: a host that composes as its reference script does, and that is left as it was found."""

import sys
from dataclasses import asdict

import numpy as np
import pytest

from loratorio_ext.settings import Settings
from tests.contract.double import Double, RequestError
from tests.live.lora_files import CATALOGUE
from tests.live.webui import encode_image

PROMPT = "a cat on a hill"
TWO = f"{PROMPT} <lora:locon:0.8> <lora:down_blocks:1:0.7>"
LONG = "word " * 80


@pytest.fixture(scope="module")
def webui(tmp_path_factory):
    with Double(tmp_path_factory.mktemp("double")) as double:
        yield double


@pytest.fixture(scope="module")
def plain(webui):
    """The image without a LoRA, before anything else has happened."""
    return webui.txt2img(prompt=PROMPT)


@pytest.fixture(autouse=True)
def untouched(webui, plain):
    """After every test the plain image is the same still, and nothing is left registered."""
    yield
    assert difference(plain, webui.txt2img(prompt=PROMPT)) == 0
    callbacks = webui.module("modules.script_callbacks").callbacks
    assert {name: len(registered) for name, registered in callbacks.items()} == {
        "cfg_denoiser": 1,  # the reference script's
        "cfg_denoised": 1,
        "cfg_after_cfg": 0,
    }


def difference(first, second) -> int:
    return max(np.abs(a.astype(int) - b.astype(int)).max() for a, b in zip(first.images, second.images, strict=True))


def composed(webui, options=None, image=None, **payload):
    """The extension's images and the reference script's."""
    settings = Settings.from_mapping({"enabled": True, **(options or {})})
    generate = webui.txt2img if image is None else lambda **request: webui.img2img(image, **request)
    payload = {"prompt": TWO} | payload
    before = len(webui.log())
    ours = generate(**payload, alwayson_scripts={"LoRAtorio": {"args": [asdict(settings)]}})
    reference = generate(**payload, alwayson_scripts={"LoRAtorio reference": {"args": [asdict(settings)]}})
    assert "Traceback" not in webui.log()[before:]
    return ours, reference


PADDING = [{}, {"pad_cond_uncond": True}, {"pad_cond_uncond_v0": True}, {"batch_cond_uncond": False}]
PLAIN_OPTIONS = {
    "pad_cond_uncond": False,
    "pad_cond_uncond_v0": False,
    "batch_cond_uncond": True,
    "skip_early_cond": 0.0,
    "s_min_uncond": 0.0,
    "s_min_uncond_all": False,
    "lora_functional": False,
}

ROWS = {
    "plain": {},
    "batch": {"batch_size": 2, "n_iter": 2},
    "AND": {"prompt": f"{TWO} AND a dog :0.6 AND a tree", "batch_size": 2},
    "prompt editing": {"prompt": f"[cat:dog:0.5] on a [hill::3] {TWO}"},
    "CFG 1": {"cfg_scale": 1.0},
    "negative": {"negative_prompt": "fog [rain:snow:4]"},
    "not square, odd": {"width": 72, "height": 104},
    "DDIM": {"sampler_name": "DDIM"},
    "DDIM CFG++": {"sampler_name": "DDIM CFG++"},
    "Heun": {"sampler_name": "Heun"},
    "LCM": {"sampler_name": "LCM"},
    "DPM++ 2M": {"sampler_name": "DPM++ 2M"},
    "Euler a": {"sampler_name": "Euler a"},
    "hires": {"enable_hr": True, "hr_scale": 1.5, "hr_second_pass_steps": 4, "batch_size": 2},
    "hires prompt": {"enable_hr": True, "hr_scale": 1.5, "hr_prompt": "a boat <lora:lora:1> <lora:rank_1:0.5>"},
    "NGMS": {"override_settings": {"s_min_uncond": 4.0}},
    "NGMS, all steps": {"override_settings": {"s_min_uncond": 4.0, "s_min_uncond_all": True}, "batch_size": 2},
    "skip early": {"override_settings": {"skip_early_cond": 0.4}, "prompt": f"{TWO} AND a dog :0.6"},
    "beside the weights": {"override_settings": {"lora_functional": True}},
    **{f"long, {options}": {"prompt": LONG + TWO, "override_settings": options} for options in PADDING},
    **{f"long negative, {options}": {"negative_prompt": LONG, "override_settings": options} for options in PADDING},
}

SAID = {
    "NGMS": ["NGMS: 4.0"],
    "NGMS, all steps": ["NGMS: 4.0", "NGMS all steps: True"],
    "skip early": ["Skip Early CFG: 0.4"],
    "long, {'pad_cond_uncond': True}": ["Pad conds: True"],
    "long negative, {'pad_cond_uncond_v0': True}": ["Pad conds v0: True"],
}
"""What the infotext says where a row does take effect."""


@pytest.mark.parametrize("row", ROWS)
def test_extension_composes_as_the_reference(webui, row):
    payload = {**ROWS[row]}
    payload["override_settings"] = PLAIN_OPTIONS | payload.get("override_settings", {})
    ours, reference = composed(webui, **payload)
    assert difference(ours, reference) <= 2
    assert difference(ours, webui.txt2img(**{"prompt": TWO} | payload)) > 5
    for word in SAID.get(row, ()):
        assert word in ours.infotext


@pytest.mark.parametrize("payload", [{}, {"sampler_name": "DDIM"}, {"batch_size": 2}], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_extension_composes_from_an_image(webui, payload, masked):
    image = webui.txt2img(prompt="a red boat").images[0]
    if masked:
        mask = np.zeros_like(image)
        mask[16:48, 24:] = 255
        payload = payload | {
            "mask": encode_image(mask),
            "inpaint_full_res": False,
            "inpainting_fill": 1,
            "mask_blur": 2,
        }
    ours, reference = composed(webui, image=image, denoising_strength=0.8, **payload)
    assert difference(ours, reference) <= 2
    changed = np.abs(ours.images[0].astype(int) - image)
    assert changed.mean() > 5
    if masked:
        assert changed[:8].max() <= 1


@pytest.mark.parametrize("recipe", CATALOGUE, ids=lambda recipe: recipe.name)
def test_every_kind_of_lora_changes_the_image_and_composes(webui, plain, recipe):
    before = len(webui.log())
    merged = webui.txt2img(prompt=f"{PROMPT} <lora:{recipe.name}:1>")
    assert difference(plain, merged) > 10
    assert f'Lora hashes: "{recipe.name}:' in merged.infotext
    assert "Networks with errors" not in webui.log()[before:]
    ours, reference = composed(webui, prompt=f"{PROMPT} <lora:{recipe.name}:0.9:0.7> <lora:up_blocks:0.8>")
    assert difference(ours, reference) <= 2


@pytest.mark.parametrize("method", ["composite", "switch", "merge"])
def test_other_methods(webui, method):
    ours, reference = composed(webui, {"method": method, "switch_every": 2})
    assert difference(ours, reference) <= 2


@pytest.mark.parametrize("family", ["sd2v", "sdxl"])
def test_other_models(tmp_path, family):
    with Double(tmp_path, family=family) as webui:
        for row in ("plain", "DDIM", "AND", "hires"):
            assert difference(*composed(webui, **ROWS[row])) <= 2
        for options in PADDING:
            payload = {"prompt": LONG + TWO, "override_settings": PLAIN_OPTIONS | options}
            assert difference(*composed(webui, **payload)) <= 2


def test_a_listed_lora_is_in_the_weights(webui):
    networks, shared = webui.module("networks"), webui.module("modules.shared")
    layer = shared.sd_model.network_layer_mapping["diffusion_model_out_2"]
    own = layer.weight.clone()
    networks.load_networks(["locon"], [1.0], [0.5], [None])
    module = networks.loaded_networks[0].modules["diffusion_model_out_2"]
    down, up = module.down_model.weight, module.up_model.weight
    expected = own + 0.25 * (up.flatten(1) @ down.flatten(1)).reshape(own.shape)  # 0.5, and alpha / rank = 1/2
    networks.network_apply_weights(layer)
    assert np.allclose(layer.weight, expected, atol=1e-6)
    assert not np.allclose(layer.weight, own, atol=1e-3)
    networks.load_networks([])
    networks.network_apply_weights(layer)
    assert np.array_equal(layer.weight, own)


def test_a_missing_lora_is_skipped(webui):
    with_missing = webui.txt2img(prompt=f"{PROMPT} <lora:nowhere:1> <lora:lora:1>")
    assert difference(with_missing, webui.txt2img(prompt=f"{PROMPT}  <lora:lora:1>")) == 0
    assert "Couldn't find network with name nowhere" in webui.log()


@pytest.mark.parametrize(
    "scripts, status, text",
    [
        ({"No such script": {"args": []}}, 422, "Script 'No such script' not found"),
        ({"LoRAtorio": {"args": {"enabled": True}}}, 500, "KeyError"),
        ({"loratorio": {"args": [{"enabled": True, "patch_size": 0}]}}, 422, "patch_size"),
        ({"LoRAtorio": {"args": [{"enabled": True, "no_such_option": 0}]}}, 422, "no_such_option"),
    ],
)
def test_refusals(webui, scripts, status, text):
    with pytest.raises(RequestError) as caught:
        webui.txt2img(prompt=TWO, alwayson_scripts=scripts)
    assert caught.value.status == status
    assert text in caught.value.body


def test_exceptions_in_scripts_and_callbacks_are_only_logged(webui, plain):
    callbacks = webui.module("modules.script_callbacks")

    def fail(params):
        raise ValueError("as expected")

    callbacks.on_cfg_denoiser(fail)
    try:
        assert difference(plain, webui.txt2img(prompt=PROMPT)) == 0
    finally:
        callbacks.remove_callbacks_for_function(fail)
    assert webui.log().count("ValueError: as expected") == 8


def test_infotext_fills_in_what_the_request_leaves_open(webui):
    options = {"enabled": True, "patch_size": 2, "temperature": 0.5}
    first = webui.txt2img(prompt=TWO, alwayson_scripts={"LoRAtorio": {"args": [options]}})
    again = webui.txt2img(prompt=TWO, infotext=first.infotext)
    assert difference(first, again) == 0
    assert again.infotext == first.infotext
    off = webui.txt2img(prompt=TWO, infotext=first.infotext, alwayson_scripts={"LoRAtorio": {"args": [False]}})
    assert difference(off, webui.txt2img(prompt=TWO)) == 0


def test_the_interpreter_is_left_as_it_was(tmp_path):
    def host_modules():
        names = ("modules", "networks", "gradio", "extra_networks_lora", "loratorio_ext")
        return {name: module for name, module in sys.modules.items() if name.partition(".")[0] in names}

    before, path = host_modules(), list(sys.path)
    with Double(tmp_path) as webui:
        webui.txt2img(prompt=TWO)
    assert host_modules() == before
    assert sys.path == path


@pytest.mark.parametrize(
    "prompt, steps, hires_steps, expected",
    [
        ("a cat", 8, None, [(8, "a cat")]),
        ("a [cat:dog:0.5]", 8, None, [(4, "a cat"), (8, "a dog")]),
        ("a [cat:3]", 8, None, [(3, "a "), (8, "a cat")]),
        ("a [cat::3]", 8, None, [(3, "a cat"), (8, "a ")]),
        ("a [b:[c:d:2]:1]", 3, None, [(1, "a b"), (2, "a c"), (3, "a d")]),
        ("[cat|dog]", 3, None, [(1, "cat"), (2, "dog"), (3, "cat")]),
        ("a [cat:dog:0.5]", 8, 8, [(8, "a dog")]),
        ("a [cat:dog:1.5]", 8, 8, [(4, "a cat"), (8, "a dog")]),
    ],
)
def test_prompt_schedules(webui, prompt, steps, hires_steps, expected):
    assert webui.module("modules.prompt_parser").schedule(prompt, steps, hires_steps, False) == expected
