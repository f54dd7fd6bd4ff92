"""What comes with Forge Neo and takes part in a step: beside each, one LoRA is the host's own image, or it is refused
by name; and plain images are afterwards what they were."""

from collections.abc import Iterator

import numpy as np
import pytest

from tests.contract.rows import TOLERANCE, Contract, largest, mean
from tests.live.forge import Neo, small_webui
from tests.live.webui import RequestError, encode_image

pytestmark = pytest.mark.live

PLAIN = "a cat on a hill"
ONE = f"{PLAIN} <lora:lora:1>"
TWO = f"{ONE} <lora:locon:0.8>"
TILES = ["Mixture of Diffusers", 128, 128, 64]


def control(**unit) -> dict:
    return {"ControlNet": {"args": [{"enabled": True, "weight": 1.0, "pixel_perfect": False, **unit}]}}


@pytest.fixture(scope="module")
def contract(tmp_path_factory) -> Iterator[Contract]:
    with small_webui(Neo, tmp_path_factory) as webui:
        yield Contract(webui, "neo")


@pytest.fixture(scope="module")
def picture(contract) -> np.ndarray:
    return contract.webui.txt2img(prompt="a red boat", seed=7, width=192, height=192, steps=1).images[0]


def generate(contract, scripts: dict, options: dict | None, **payload):
    ours = {} if options is None else {"LoRAtorio": {"args": [{"enabled": True, **options}]}}
    return contract.generate({"steps": 4, **payload}, {**scripts, **ours})


def neighbours(picture: np.ndarray) -> dict[str, tuple[dict, dict]]:
    """Scripts' arguments and payload by name."""
    small = picture[:64, :64]
    mask = np.zeros_like(small)
    mask[:, 32:] = 255
    inpaint = {"image": small, "mask": encode_image(mask), "denoising_strength": 0.8, "mask_blur": 2, "steps": 6}
    large = {"image": picture, "width": 192, "height": 192, "denoising_strength": 0.6, "steps": 2}
    return {
        "tiles": ({"MultiDiffusion Integrated": {"args": [True, *TILES, 1]}}, large),
        "tiles, four in a batch": ({"MultiDiffusion Integrated": {"args": [True, *TILES, 4]}}, large),
        "soft inpainting": ({"Soft Inpainting": {"args": [True, 1.0, 0.5, 4.0, 0.0, 0.5, 2.0]}}, inpaint),
    }


@pytest.mark.parametrize("name", neighbours(np.zeros((64, 64, 3), np.uint8)))
def test_one_lora_is_the_hosts_own_image(contract, picture, name):
    scripts, payload = neighbours(picture)[name]
    before = generate(contract, scripts, None, prompt=ONE, **payload)
    composed = generate(contract, scripts, {"base_share": 0.0}, prompt=ONE, **payload)
    assert largest(composed.images, before.images) <= TOLERANCE
    alone = generate(contract, {}, None, prompt=ONE, **payload)
    assert mean(before.images, alone.images) > 0.01  # it does take part
    two = generate(contract, scripts, {}, prompt=TWO, **payload)
    assert mean(two.images, generate(contract, scripts, None, prompt=TWO, **payload).images) > 0.3
    assert np.array_equal(before.images[0], generate(contract, scripts, None, prompt=ONE, **payload).images[0])


def test_who_evaluates_the_model_by_itself_is_refused(contract, picture):
    """The reference preprocessor takes down a pass of its own over the image that it refers to."""
    scripts = control(module="reference_only", image=encode_image(picture[:64, :64]), threshold_a=0.5)
    plain = contract.plain(prompt=TWO), generate(contract, scripts, None, prompt=TWO)
    assert mean(plain[0].images, plain[1].images) > 0.3
    with pytest.raises(RequestError) as caught:
        generate(contract, scripts, {}, prompt=TWO)
    assert caught.value.status == 422
    assert "forge_preprocessor_reference evaluates the model by itself" in caught.value.body
    assert np.array_equal(plain[0].images[0], contract.plain(prompt=TWO).images[0])
    assert np.array_equal(plain[1].images[0], generate(contract, scripts, None, prompt=TWO).images[0])


def test_token_merging_does_not_stop_a_composition(contract):
    options = {"host_options": {"token_merging_ratio": 0.3}}
    composed = contract.composed(prompt=TWO, **options)
    assert "one LoRA after the other" in composed.infotext


def test_xyz_plot(contract):
    """Every cell is composed by itself, from copies of one request."""
    arguments = [2, "2,3", [], 0, "", [], 0, "", [], False, True, False, False, False, False, False, 0, 0, False]
    scripts = {"LoRAtorio": {"args": [{"enabled": True, "patch_size": 2}]}}
    plot = contract.generate({"prompt": TWO, "script_name": "x/y/z plot", "script_args": arguments}, scripts)
    cells = [contract.composed({"patch_size": 2}, prompt=TWO, steps=steps).images[0] for steps in (2, 3)]
    assert len(plot.images) == 3
    assert largest(plot.images[1:], cells) == 0
    assert all("LoRAtorio patch size: 2" in infotext for infotext in plot.info["infotexts"])
