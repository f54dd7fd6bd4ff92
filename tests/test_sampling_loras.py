"""Which LoRAs are proposed for every pass."""

import pytest

from loratorio_ext.pool import Listed
from loratorio_ext.sampling_loras import names_a_way_of_sampling, sampling_loras


@pytest.mark.parametrize(
    "name",
    [
        "lcm-lora-sdv1-5", "LCM_LoRA_Weights_SD15", "LCMTurboMix", "sdxl_lightning_4step_lora", "Hyper-SD15-8steps",
        "Hyper-SDXL-8steps-CFG-lora", "SDXLTurbo", "sd_xl_turbo_lora_v1", "add_detail", "more_details",
        "DetailTweaker_v1", "noise_offset", "offset noise v2", "epiNoiseoffset_v2", "age_slider", "AgeSlider-20",
        "weight_sliders", "Lightning2",
    ],
)  # fmt: skip
def test_ways_of_sampling(name):
    assert names_a_way_of_sampling(name)


@pytest.mark.parametrize(
    "name",
    [
        "hyperrealistic", "slidersuit", "knight", "detailed_eyes", "offset_printing", "noise", "turbocharger",
        "enlightning", "filcm", "lcmx", "noise_in_offset", "", "robot_arm", "hypernetwork", "retail",
    ],
)  # fmt: skip
def test_concepts(name):
    assert not names_a_way_of_sampling(name)


def test_by_name_alias_and_what_the_file_says():
    def lora(name, alias="", **metadata):
        return Listed(name, f"/{name}", name, alias, metadata)

    listed = [
        lora("knight", ss_noise_offset="0.05", ss_output_name="knight"),
        lora("a", alias="lcm_lora"),
        lora("pytorch_lora_weights", **{"modelspec.title": "LCM LoRA for SD 1.5"}),
        lora("b", ss_output_name="detail_slider_v4"),
        lora("c", **{"modelspec.tags": "style, watercolour", "ss_output_name": None, "modelspec.title": 3}),
        lora("speed/hyper_8"),
    ]
    assert [each.name for each in sampling_loras(listed)] == ["a", "pytorch_lora_weights", "b", "speed/hyper_8"]
