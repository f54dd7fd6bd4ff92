"""The live kit itself: an untouched WebUI, tiny checkpoints and every kind of LoRA file."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.live.lora_files import CATALOGUE
from tests.live.webui import RequestError, WebUI

pytestmark = pytest.mark.live

PROMPT = "a cat on a hill"


def difference(first: np.ndarray, second: np.ndarray) -> float:
    """Mean absolute difference of two uint8 images, in grey levels."""
    return np.abs(first.astype(int) - second.astype(int)).mean()


@pytest.fixture(scope="module", params=["sd1", "sd2v", "sdxl"])
def webui(request, host, tiny_data):
    data, checkpoint = tiny_data(request.param)
    with WebUI(host, data, checkpoint, debug=True) as server:
        yield server


@pytest.fixture(scope="module")
def plain(webui) -> np.ndarray:
    """Image without a LoRA, made before any other."""
    return webui.txt2img(prompt=PROMPT).images[0]


def complaints(log: str) -> list[str]:
    """Lines in which the host says that a network or one of its layers was not used."""
    words = ("didn't match keys", "Couldn't find network", "loading network", "DEBUG [root] Network", "Traceback")
    return [line for line in log.splitlines() if any(word in line for word in words)]


def test_images_follow_prompt_and_seed(webui, plain):
    assert plain.shape == (64, 64, 3)
    assert plain.std() > 20
    assert np.isin(plain, (0, 255)).mean() < 0.05
    assert difference(plain, webui.txt2img(prompt="a red boat").images[0]) > 5
    assert difference(plain, webui.txt2img(prompt=PROMPT, seed=2).images[0]) > 5
    assert difference(plain, webui.txt2img(prompt=PROMPT, negative_prompt="fog").images[0]) > 2


def test_img2img(webui, plain):
    answer = webui.img2img(plain, prompt="a red boat", denoising_strength=0.5)
    assert difference(plain, answer.images[0]) > 2


@pytest.mark.parametrize("recipe", CATALOGUE, ids=lambda recipe: recipe.name)
def test_lora_is_recognised_and_seen(webui, plain, recipe):
    before = len(webui.log())
    answer = webui.txt2img(prompt=f"{PROMPT} <lora:{recipe.name}:1>")
    assert f'Lora hashes: "{recipe.name}:' in answer.infotext
    assert complaints(webui.log()[before:]) == []
    assert 5 < difference(plain, answer.images[0]) < 40
    assert np.isin(answer.images[0], (0, 255)).mean() < 0.05


def test_foreign_keys_are_complained_about(webui):
    """The host does say what it cannot use, so that its silence above means something."""
    weights = {
        "lora_unet_nowhere.lora_down.weight": torch.ones(4, 8),
        "lora_unet_nowhere.lora_up.weight": torch.ones(8, 4),
    }
    save_file(weights, webui.data / "models" / "Lora" / "foreign.safetensors")
    before = len(webui.log())
    webui.txt2img(prompt=f"{PROMPT} <lora:foreign:1>")
    assert any("didn't match keys" in line for line in complaints(webui.log()[before:]))


def test_refused_request_is_an_exception(webui):
    with pytest.raises(RequestError) as caught:
        webui.txt2img(prompt=PROMPT, alwayson_scripts={"No such script": {"args": []}})
    assert caught.value.status == 422
    assert "no such script" in caught.value.body.lower()


def test_plain_image_is_the_same_at_the_end(webui, plain):
    assert np.array_equal(plain, webui.txt2img(prompt=PROMPT).images[0])
