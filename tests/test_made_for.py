"""Which family of models a LoRA was made for: what its file says, what its layers show, and nothing beyond."""

import json
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from loratorio_ext.families import family_of_model, made_for, said_by, shown_by_file


@pytest.mark.parametrize(
    "metadata, family",
    [
        ({"ss_base_model_version": "sdxl_base_v1-0"}, "SDXL"),
        ({"ss_base_model_version": "sd_v1"}, "SD 1"),
        ({"ss_base_model_version": "sd_1.5"}, "SD 1"),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v/lora"}, "SD 2"),
        ({"modelspec.architecture": "stable-diffusion-3-m/lora"}, "SD 3"),
        ({"ss_base_model_version": "flux1"}, "Flux"),
        ({"modelspec.architecture": "Flux.1-dev/lora"}, "Flux"),
        ({"ss_base_model_version": "flux2_klein_4b"}, "Flux.2"),
        ({"modelspec.architecture": "chroma/lora", "ss_base_model_version": "flux1"}, "Chroma"),
        ({"modelspec.architecture": "lumina-2/lora"}, "Lumina 2"),
        ({"modelspec.architecture": "Qwen-Image-Edit-2511/lora"}, "Qwen-Image"),
        ({"modelspec.architecture": "Z-Image/lora"}, "Z-Image"),
        ({"ss_base_model_version": "zimage"}, "Z-Image"),
        ({"ss_base_model_version": "wan_2.1"}, "Wan"),
        ({"modelspec.architecture": "hunyuan-video/lora"}, None),
        ({"modelspec.architecture": "anima-preview", "ss_base_model_version": ""}, None),
        ({}, None),
    ],
)
def test_what_a_file_says(metadata, family):
    made = said_by(metadata)
    assert (made and made.families) == (family and {family})


KOHYA = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight"
PEFT = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v.lora_A.weight"


@pytest.mark.parametrize(
    "name, width, families, text",
    [
        (KOHYA, 768, {"SD 1"}, "SD 1"),
        (KOHYA, 1024, {"SD 2"}, "SD 2"),
        (PEFT, 2048, {"SDXL"}, "SDXL"),
        (KOHYA, 64, None, None),
        (KOHYA.replace("attn2", "attn1"), 768, None, None),
        (
            "lora_unet_double_blocks_0_img_attn_proj.lora_down.weight",
            3072,
            {"Flux", "Flux.2", "Chroma"},
            "a model like Flux",
        ),
        (
            "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight",
            3072,
            {"Flux", "Flux.2", "Chroma"},
            "a model like Flux",
        ),
        (
            "diffusion_model.noise_refiner.0.attention.to_q.lora_A.weight",
            3840,
            {"Lumina 2", "Z-Image"},
            "a model like Lumina 2",
        ),
        ("transformer.transformer_blocks.0.img_mlp.net.0.proj.lora_A.weight", 3072, {"Qwen-Image"}, "Qwen-Image"),
        ("transformer.transformer_blocks.0.attn.add_q_proj.lora_A.weight", 3072, None, None),
    ],
)
def test_what_a_files_layers_show(tmp_path, name, width, families, text):
    file = tmp_path / "a.safetensors"
    save_file(
        {"lora_te_x.lora_down.weight": np.zeros((2, 3), np.float32), name: np.zeros((4, width), np.float32)}, file
    )
    made = made_for({}, str(file))
    assert (made and made.families, made and made.text) == (families, text)


def test_what_a_file_says_goes_before_what_it_shows(tmp_path):
    file = tmp_path / "a.safetensors"
    save_file({KOHYA: np.zeros((4, 768), np.float32)}, file)
    assert made_for({"ss_base_model_version": "sdxl_base_v1-0"}, str(file)).families == {"SDXL"}
    assert made_for({"ss_base_model_version": "anima"}, str(file)).families == {"SD 1"}


def test_a_file_that_was_replaced_is_looked_at_again(tmp_path):
    file = tmp_path / "a.safetensors"
    assert made_for({}, str(file)) is None
    for time, (width, family) in enumerate([(768, "SD 1"), (2048, "SDXL")]):
        save_file({KOHYA: np.zeros((4, width), np.float32)}, file)
        os.utime(file, (time, time))
        assert made_for({}, str(file)).text == family


HEADERS = [
    "[]",
    "3",
    "{",
    "[" * 100_000,
    json.dumps({KOHYA: {}}),
    json.dumps({KOHYA: {"shape": [4]}}),
    json.dumps({KOHYA: {"shape": 4}}),
    json.dumps({KOHYA: {"shape": [4, [768]]}}),
    json.dumps({KOHYA: None}),
]


@pytest.mark.parametrize("header", HEADERS, ids=range(len(HEADERS)))
def test_of_a_damaged_file_nothing_is_known(tmp_path, header):
    file = tmp_path / "a.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header.encode())
    assert made_for({}, str(file)) is None


@given(st.binary(max_size=200))
def test_any_bytes_can_be_looked_at(tmp_path_factory, content):
    file = tmp_path_factory.mktemp("any") / "a.safetensors"
    file.write_bytes(content)
    assert shown_by_file(str(file), 0.0) is None


def test_a_hosts_model_by_its_flags_and_by_its_class():
    class ZImage:
        is_sdxl = False

    class Flagged:
        is_sd1 = True

    assert (family_of_model(ZImage()), family_of_model(Flagged()), family_of_model(None)) == ("Z-Image", "SD 1", None)
