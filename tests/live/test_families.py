"""The contract's most telling rows on other model families: SD 2.x v-prediction and SDXL."""

import pytest

from tests.contract.rows import TWO, Contract
from tests.live.conftest import tiny_webui

pytestmark = pytest.mark.live

ROWS = {
    "defaults": {"prompt": TWO, "negative_prompt": "fog"},
    "paper": {"prompt": TWO, "options": {"preset": "paper", "temperature": 0.001}},
    "base share 1": {"prompt": TWO, "options": {"base_share": 1.0}},
    "composite": {"prompt": TWO, "options": {"method": "composite"}},
    "switch": {"prompt": TWO, "options": {"method": "switch", "switch_every": 3}},
    "DDIM": {"prompt": TWO, "sampler_name": "DDIM"},
    "DPM++ 2M": {"prompt": TWO, "sampler_name": "DPM++ 2M"},
    "LCM": {"prompt": TWO, "sampler_name": "LCM"},
    "batch of 2 with AND": {"prompt": f"{TWO} AND a dog :0.5", "batch_size": 2},
    "long prompt": {"prompt": "a cat on a hill, " * 20 + TWO},
    "long prompt, padded": {"prompt": "a cat on a hill, " * 20 + TWO, "host_options": {"pad_cond_uncond": True}},
    "NGMS": {"prompt": TWO, "s_min_uncond": 4.0},
    "hires": {"prompt": TWO, "enable_hr": True, "hr_scale": 1.5, "hr_upscaler": "Latent", "denoising_strength": 0.7},
    "other kinds": {"prompt": "a cat on a hill <lora:dora:0.8> <lora:norm:1> <lora:full:0.8>"},
    "text encoder only": {"prompt": "a cat on a hill <lora:text_only:1> <lora:lora:0.8>"},
}


@pytest.fixture(scope="module", params=["sd2v", "sdxl"])
def family(request, tmp_path_factory):
    with tiny_webui(request.param, tmp_path_factory) as webui:
        yield Contract(webui, request.param)


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_family(family, row, record_property):
    family.assert_composes(**row)
    record_property("largest difference", family.largest_difference)
    print(f"largest difference: {family.largest_difference}")


def test_plain_images_stay_the_same(family):
    before = family.plain(prompt=TWO).images[0], family.plain(prompt="a cat").images[0]
    family.composed(prompt=TWO)
    assert (family.plain(prompt=TWO).images[0] == before[0]).all()
    assert (family.plain(prompt="a cat").images[0] == before[1]).all()
