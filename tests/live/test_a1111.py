"""What only an installed AUTOMATIC1111 can show: other checkpoints in one generation, embeddings that come with a LoRA,
scripts that generate many times, and the API page's own examples."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.contract.rows import HIRES, TWO, Contract, largest
from tests.live.conftest import ROOT, installed_host, lay_out_data
from tests.live.webui import WebUI

pytestmark = pytest.mark.live


def write_second_checkpoint(checkpoint: Path) -> None:
    """Another model of the same layout: the first one's weights, disturbed."""
    generator = torch.Generator().manual_seed(3)
    weights = load_file(checkpoint)
    for name, weight in weights.items():
        if weight.numel() > 1 and weight.is_floating_point() and not name.startswith("first_stage_model"):
            weights[name] = weight + 0.15 * weight.std() * torch.randn(weight.shape, generator=generator)
    second = checkpoint.with_name("second.safetensors")
    save_file(weights, second)
    shutil.copy(checkpoint.with_suffix(".yaml"), second.with_suffix(".yaml"))


def write_lora_with_embedding(folder: Path, name: str, word: str, tokens: int) -> None:
    """The LoRA ``lora`` with a word of so many tokens in its file."""
    weights = load_file(folder / "lora.safetensors")
    embedding = 0.3 * torch.randn(tokens, 64, generator=torch.Generator().manual_seed(4))
    save_file(weights | {f"bundle_emb.{word}.string_to_param.*": embedding}, folder / f"{name}.safetensors")


@pytest.fixture(scope="module")
def contract(tmp_path_factory):
    host, folder = installed_host(), tmp_path_factory.mktemp("a1111")
    data, checkpoint = lay_out_data(host, folder, "sd1", extensions=(ROOT, ROOT / "tests/live/reference_extension"))
    write_second_checkpoint(checkpoint)
    write_lora_with_embedding(data / "models" / "Lora", "bundled", "zorp", tokens=2)
    write_lora_with_embedding(data / "models" / "Lora", "bundled_long", "quux", tokens=74)
    with WebUI(host, data, checkpoint) as webui:
        yield Contract(webui, "a1111")


@pytest.fixture(autouse=True)
def the_host_comes_back_as_it_was(contract):
    before = contract.plain(prompt=TWO).images, contract.plain(prompt="a cat").images
    yield
    assert largest(before[0], contract.plain(prompt=TWO).images) == 0
    assert largest(before[1], contract.plain(prompt="a cat").images) == 0


def test_refiner(contract):
    """Half way the host loads another checkpoint: conditionings and branches follow."""
    contract.assert_composes(prompt=TWO, refiner_checkpoint="second", refiner_switch_at=0.5)


def test_checkpoint_of_its_own_for_hires(contract):
    contract.assert_composes(prompt=TWO, **HIRES, hr_checkpoint_name="second.safetensors")


def test_embedding_in_a_lora_file(contract):
    """The word is known to its own LoRA alone, and to the host again afterwards."""
    prompt = "a zorp on a hill <lora:bundled:1> <lora:locon:0.8>"
    before = contract.plain(prompt=prompt).images
    contract.assert_composes(prompt=prompt)
    assert largest(before, contract.plain(prompt=prompt).images) == 0


def test_embedding_that_makes_the_prompt_longer(contract):
    """The prompt has 154 tokens for its own LoRA, where it has 77 for the others and the bare model."""
    contract.assert_composes(prompt="a quux on a hill <lora:bundled_long:1> <lora:locon:0.8> <lora:unet_only:1>")


def test_embeddings_of_a_pool(contract):
    """Known to their own LoRA alone, though the host has never heard of them, and to nobody afterwards."""
    before = contract.plain(prompt="a zorp and a quux on a hill")
    pool = {"pool": ["bundled", "bundled_long:0.8", "locon:0.8"]}
    contract.assert_composes(pool, prompt="a zorp and a quux on a hill")
    assert largest(before.images, contract.plain(prompt="a zorp and a quux on a hill").images) == 0


@pytest.mark.parametrize(
    "payload",
    [
        {"refiner_checkpoint": "second", "refiner_switch_at": 0.5},
        {**HIRES, "hr_checkpoint_name": "second.safetensors"},
    ],
    ids=["refiner", "checkpoint of its own for hires"],
)
def test_a_pool_and_another_checkpoint(contract, payload):
    contract.assert_composes({"pool": ["unet_only", "locon:0.8", "rank_1"]}, prompt="a cat", **payload)


def test_xyz_plot_with_a_pool(contract):
    """Cells are composed by themselves; what was picked is said of each, and the steps' data are in no text."""
    arguments = [4, "3,5", [], 0, "", [], 0, "", [], False, True, False, False, False, False, False, 0, False]
    options = {"enabled": True, "pool": ["unet_only", "locon:0.8", "rank_1"], "top_k": 1}
    scripts = {"LoRAtorio": {"args": [options]}}
    plot = contract.generate({"prompt": "a cat", "script_name": "x/y/z plot", "script_args": arguments}, scripts)
    cells = [contract.composed(options, prompt="a cat", steps=steps) for steps in (3, 5)]
    assert largest(plot.images[1:], [cell.images[0] for cell in cells]) == 0
    for infotext, cell in zip(plot.info["infotexts"][1:], cells):
        assert "LoRAtorio steps" not in infotext
        picked = re.search(r"LoRAtorio picked: ([^,]*)", infotext)[1]
        assert picked in cell.infotext


def test_xyz_plot(contract):
    """Every cell is composed by itself, from copies of one request."""
    arguments = [4, "3,5", [], 0, "", [], 0, "", [], False, True, False, False, False, False, False, 0, False]
    scripts = {"LoRAtorio": {"args": [{"enabled": True, "patch_size": 2}]}}
    plot = contract.generate({"prompt": TWO, "script_name": "x/y/z plot", "script_args": arguments}, scripts)
    cells = [contract.composed({"patch_size": 2}, prompt=TWO, steps=steps).images[0] for steps in (3, 5)]
    assert len(plot.images) == 3
    assert largest(plot.images[1:], cells) == 0
    assert all("LoRAtorio patch size: 2" in infotext for infotext in plot.info["infotexts"])


@pytest.mark.parametrize("language", ["bash", "python"])
def test_example_of_the_api_page(contract, language, tmp_path):
    """The API page's examples, run as they stand but for the server's port, the LoRAs' names, and a smaller image."""
    blocks = re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs/api.md").read_text(), re.DOTALL)
    (example,) = [block for block in blocks if "alwayson_scripts" in block]
    example = example.replace("7860", contract.webui.url.rpartition(":")[2])
    example = example.replace('"steps": 20', '"steps": 4, "width": 64, "height": 64')
    example = example.replace("steps=20", "steps=4, width=64, height=64")
    example = example.replace("lora:character", "lora:lora").replace("lora:style", "lora:locon")
    command = {"bash": ["bash", "-c"], "python": [sys.executable, "-c"]}[language]
    done = subprocess.run([*command, example], cwd=tmp_path, capture_output=True, text=True, check=True)
    if language == "bash":
        assert "LoRAtorio enabled: True" in done.stdout
    else:
        assert (tmp_path / "cat.png").exists()
