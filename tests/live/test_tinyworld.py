"""The tiny world in a real WebUI: the shipped checkpoint and LoRAs load there, and compose there as by brute force."""

import shutil
from pathlib import Path

import pytest

from tests.contract.rows import Contract
from tests.live.conftest import REFERENCE, ROOT, installed_host
from tests.live.webui import WebUI, prepare_data_dir

pytestmark = pytest.mark.live

WEIGHTS = ROOT / "tinyworld" / "weights"
PROMPT = "a zorg robot on the left and an amanita mushroom on the right, in a skyline town"
LORAS = " ".join(f"<lora:{name}_quiet:1>" for name in ("zorg", "amanita", "skyline"))
IMAGE = {"width": 256, "height": 256, "steps": 20, "cfg_scale": 4.0, "sampler_name": "DDIM"}


def lay_out(folder: Path) -> tuple[Path, Path]:
    """A data folder with the tiny world in it, as its model card says; also the checkpoint's path."""
    data = prepare_data_dir(folder, extensions=(ROOT, REFERENCE))
    checkpoint = data / "models" / "Stable-diffusion" / "tinyworld.safetensors"
    shutil.copy(WEIGHTS / "tinyworld.safetensors", checkpoint)
    config = (WEIGHTS / "tinyworld.yaml").read_text()
    checkpoint.with_suffix(".yaml").write_text(
        config.replace("version: tokenizer", f"version: {WEIGHTS / 'tokenizer'}")
    )
    for lora in (WEIGHTS / "lora").glob("*.safetensors"):
        shutil.copy(lora, data / "models" / "Lora")
    return data, checkpoint


@pytest.fixture(scope="module")
def contract(tmp_path_factory):
    host = installed_host()
    if not any((WEIGHTS / "lora").glob("*.safetensors")):
        pytest.skip("the tiny world has no trained weights here")
    with WebUI(host, *lay_out(tmp_path_factory.mktemp("tinyworld")), debug=True) as webui:
        yield Contract(webui, "a1111")


def test_three_loras_compose(contract):
    contract.assert_composes(prompt=f"{PROMPT} {LORAS}", **IMAGE)


def test_each_lora_is_used(contract):
    """No LoRA file is left out, and every one changes the picture."""
    plain = contract.plain(prompt=PROMPT, **IMAGE).images[0]
    for lora in sorted((WEIGHTS / "lora").glob("*.safetensors")):
        answer = contract.plain(prompt=f"{PROMPT} <lora:{lora.stem}:1>", **IMAGE)
        assert (answer.images[0] != plain).any(), lora.stem
        assert f'Lora hashes: "{lora.stem}:' in answer.infotext


def test_every_part_of_a_lora_finds_its_layer(contract):
    """Of all the images above: neither the host nor the extension says otherwise."""
    log = contract.webui.log()
    assert [words for words in ("didn't match keys", "DEBUG [root] Network", "does not fit") if words in log] == []
