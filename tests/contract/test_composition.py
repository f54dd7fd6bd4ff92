"""Every way in which a WebUI calls its model: the extension's image is the brute-force reference's."""

import numpy as np
import pytest

from tests.contract.rows import HIRES, THREE, TWO
from tests.live.webui import encode_image

SAMPLERS = [
    *("Euler", "Euler a", "LMS", "Heun", "DPM2", "DPM2 a", "DPM fast", "DPM adaptive", "Restart", "LCM"),
    *("DPM++ 2S a", "DPM++ 2M", "DPM++ SDE", "DPM++ 2M SDE", "DPM++ 2M SDE Heun", "DPM++ 3M SDE"),
    *("DDIM", "DDIM CFG++", "PLMS", "UniPC"),
]

OPTIONS = {
    "defaults": {},
    "paper": {"preset": "paper"},
    "paper, small temperature": {"preset": "paper", "temperature": 0.001, "patch_size": 2},
    "per pixel": {"patch_size": 1},
    "ragged patches": {"patch_size": 3},
    "one patch": {"patch_size": 64},
    "bilinear": {"upsampling": "bilinear", "patch_size": 3},
    "relativity 1": {"relativity": 1.0},
    "relativity 0": {"relativity": 0.0},
    "base share 0": {"base_share": 0.0},
    "base share 1": {"base_share": 1.0},
    "top 1 of the image": {"top_k": 1},
    "top 2 of each patch": {"top_k": 2, "selection_scope": "patch"},
    "composite": {"method": "composite"},
    "switch": {"method": "switch", "switch_every": 2},
    "early steps only": {"end": 0.5},
    "late steps only": {"start": 0.25},
    "gates": {"combination": "gates"},
    "gates, top 2, base share 0": {"combination": "gates", "sharpness": 1.0, "top_k": 2, "base_share": 0.0},
    "gates in sliding patches with momentum": {"combination": "gates", "patches": "sliding", "momentum": 0.5},
    "momentum, one refreshed a step": {"momentum": 0.5, "refresh": 1},
    "momentum, selected every other step": {"momentum": 0.5, "top_k": 2, "reselect_every": 2},
    "one refreshed a step": {"refresh": 1},
    "two refreshed a step, from the first on": {"refresh": 2, "warmup": 0},
    "one refreshed a step, base share 1": {"refresh": 1, "base_share": 1.0},
    "composite in the middle": {"method": "composite", "start": 0.25, "end": 0.75},
}

PROMPTS = {
    "one LoRA": "a cat on a hill <lora:lora:1>",
    "two LoRAs": TWO,
    "three LoRAs": THREE,
    "weights of text and UNet apart": "a cat <lora:lora:0.2:1> <lora:locon:te=1.2:unet=0.3>",
    "no text encoder weight": "a cat <lora:lora:0:1> <lora:locon:0:0.8>",
    "no UNet weight": "a cat <lora:lora:1:0> <lora:locon:1:0.5>",
    "negative weight": "a cat <lora:lora:-0.7> <lora:locon:0.8>",
    "dyn": "a cat <lora:lora:1:1:2> <lora:locon:dyn=1>",
    "UNet only and text encoder only": "a cat <lora:unet_only:1> <lora:text_only:1>",
    "different ranks": "a cat <lora:rank_1:1> <lora:rank_16_half:1>",
    "different layers": "a cat <lora:down_blocks:1> <lora:up_blocks:1> <lora:cross_attention:1>",
    "AND": "a cat <lora:lora:1> AND a dog in the rain :0.6 <lora:locon:0.8> AND fog :-0.2",
    "prompt editing": "a [cat:dog:0.5] on a [hill|boat] <lora:lora:1> <lora:locon:0.8>",
    "emphasis": "a (cat:1.4) on a [hill] <lora:lora:1> <lora:locon:0.8>",
}

KINDS = [
    *("lora_no_alpha", "lora_scale", "lora_peft", "lora_reshaped", "lora_bias", "locon_mid", "dora", "loha"),
    *("loha_tucker", "lokr", "lokr_factored", "lokr_tucker", "ia3", "oft", "oft_constrained", "oft_rescaled"),
    *("oft_diag", "boft", "glora", "full", "norm"),
]

LONG = "a cat on a hill, " * 20
LENGTHS = {
    "long prompt": {"prompt": LONG + TWO},
    "long negative prompt": {"prompt": TWO, "negative_prompt": LONG},
    "both long": {"prompt": LONG + TWO, "negative_prompt": LONG},
}
PADDINGS = {"unpadded": {}, "padded": {"pad_cond_uncond": True}, "padded v0": {"pad_cond_uncond_v0": True}}

REQUESTS = {
    "batch of 2": {"prompt": THREE, "batch_size": 2},
    "batch of 2 with AND": {"prompt": f"{TWO} AND a dog :0.5", "batch_size": 2},
    "2 batches": {"prompt": TWO, "n_iter": 2},
    "2 batches of 2": {"prompt": TWO, "n_iter": 2, "batch_size": 2},
    "wide": {"prompt": TWO, "width": 112, "height": 64},
    "tall, ragged patches": {"prompt": TWO, "width": 80, "height": 112},
    "CFG 1": {"prompt": TWO, "cfg_scale": 1.0},
    "CFG 1 with AND": {"prompt": f"{TWO} AND a dog :0.5", "cfg_scale": 1.0},
    "no negative prompt": {"prompt": TWO, "negative_prompt": ""},
    "NGMS": {"prompt": TWO, "s_min_uncond": 4.0},
    "NGMS in all steps": {"prompt": TWO, "s_min_uncond": 4.0, "host_options": {"s_min_uncond_all": True}},
    "NGMS with AND": {"prompt": f"{TWO} AND a dog :0.5", "batch_size": 2, "s_min_uncond": 4.0},
    "skip early CFG": {"prompt": TWO, "host_options": {"skip_early_cond": 0.4}},
    "skip early CFG, DDIM": {"prompt": TWO, "sampler_name": "DDIM", "host_options": {"skip_early_cond": 0.4}},
    "cond and uncond in calls of their own": {"prompt": TWO, "host_options": {"batch_cond_uncond": False}},
    "calls of their own, batch of 2 with AND": {
        "prompt": f"{TWO} AND a dog :0.5",
        "batch_size": 2,
        "host_options": {"batch_cond_uncond": False},
    },
    "LoRAs applied in forward": {"prompt": TWO, "host_options": {"lora_functional": True}},
    "clip skip": {"prompt": TWO, "host_options": {"CLIP_stop_at_last_layers": 2}},
    "old scheduling": {"prompt": f"[dog:{TWO}:3]", "host_options": {"use_old_scheduling": True}},
    "tiling": {"prompt": TWO, "tiling": True},
    "subseed": {"prompt": TWO, "subseed": 5, "subseed_strength": 0.4},
}

HIRES_ROWS = {
    "same prompt": {},
    "steps of its own": {"hr_second_pass_steps": 5},
    "prompt and LoRAs of its own": {"hr_prompt": "a red boat <lora:unet_only:1> <lora:rank_1:0.7>"},
    "no LoRA in the second pass": {"hr_prompt": "a red boat"},
    "LoRAs in the second pass only": {"prompt": "a red boat", "hr_prompt": TWO},
    "sampler of its own": {"hr_sampler_name": "DDIM"},
    "batch of 2": {"batch_size": 2},
}


@pytest.fixture(scope="module")
def picture(webui) -> np.ndarray:
    """An image to start from."""
    return webui.txt2img(prompt="a red boat", seed=7).images[0]


def mask(size: int = 64) -> np.ndarray:
    """White where to paint: the right half."""
    white = np.zeros((size, size, 3), np.uint8)
    white[:, size // 2 :] = 255
    return white


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(contract, options):
    contract.assert_composes(options, prompt=THREE, negative_prompt="fog")


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_prompts(contract, prompt):
    contract.assert_composes(prompt=prompt, negative_prompt="fog")


@pytest.mark.parametrize("method", ["composite", "switch"])
def test_other_methods_with_and(contract, method):
    contract.assert_composes({"method": method, "switch_every": 3}, prompt=PROMPTS["AND"], batch_size=2)


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(contract, kind):
    contract.assert_composes(prompt=f"a cat on a hill <lora:{kind}:0.8> <lora:lora:1>")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers(contract, sampler):
    contract.assert_composes(prompt=TWO, negative_prompt="fog", sampler_name=sampler)


@pytest.mark.parametrize("sampler", ["DDIM", "Heun", "LCM"])
def test_samplers_with_reuse(contract, sampler):
    contract.assert_composes({"refresh": 1}, prompt=THREE, negative_prompt="fog", sampler_name=sampler)


def test_reuse_with_and_and_ngms(contract):
    prompt = f"{THREE} AND a dog :0.5"
    contract.assert_composes({"refresh": 1}, prompt=prompt, batch_size=2, s_min_uncond=4.0)


@pytest.mark.parametrize("padding", PADDINGS.values(), ids=PADDINGS)
@pytest.mark.parametrize("prompts", LENGTHS.values(), ids=LENGTHS)
def test_prompt_lengths(contract, prompts, padding):
    contract.assert_composes(**prompts, host_options=padding)


@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
def test_requests(contract, request_):
    contract.assert_composes(**request_)


@pytest.mark.parametrize("row", HIRES_ROWS.values(), ids=HIRES_ROWS)
def test_hires(contract, row):
    contract.assert_composes(**({"prompt": TWO} | HIRES | row))


@pytest.mark.parametrize("sampler", ["Euler", "DDIM"])
def test_img2img(contract, picture, sampler):
    contract.assert_composes(image=picture, prompt=TWO, denoising_strength=0.6, sampler_name=sampler, steps=12)


@pytest.mark.parametrize("sampler", ["Euler", "DDIM"])
def test_inpainting(contract, picture, sampler):
    row = {"image": picture, "mask": encode_image(mask()), "mask_blur": 0, "inpainting_fill": 1}
    composed = contract.assert_composes(prompt=TWO, denoising_strength=0.8, sampler_name=sampler, steps=12, **row)
    kept = np.abs(composed.images[0][:, :24].astype(int) - picture[:, :24].astype(int))
    assert kept.mean() < np.abs(composed.images[0][:, 40:].astype(int) - picture[:, 40:].astype(int)).mean()
