"""The tiny world in a real WebUI: the shipped checkpoint and LoRAs load there, and compose there as by brute force.

On Forge Neo, too, to which the tests tell the model's sizes.
"""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from tests.contract.rows import TOLERANCE, Contract, largest
from tests.live import forge
from tests.live.conftest import HERE, REFERENCE, ROOT, installed_host
from tests.live.webui import WebUI, prepare_data_dir

pytestmark = pytest.mark.live

WEIGHTS = ROOT / "tinyworld" / "weights"
PROMPT = "a zorg robot on the left and an amanita mushroom on the right, in a skyline town"
LORAS = " ".join(f"<lora:{name}_quiet:1>" for name in ("zorg", "amanita", "skyline"))
IMAGE = {"width": 256, "height": 256, "steps": 20, "cfg_scale": 4.0, "sampler_name": "DDIM"}
UNMATCHED = r"didn't match keys|DEBUG \[root\] Network|unmatched keys|[Mm]ismatch|skipped [1-9]|does not fit"
"""What hosts, and the extension, say of parts of a LoRA that find no layer, or do not fit one."""


def lay_out(folder: Path, extensions: tuple[Path, ...] = (ROOT, REFERENCE)) -> tuple[Path, Path]:
    """A data folder with the tiny world in it, as its model card says; also the checkpoint's path."""
    data = prepare_data_dir(folder, extensions)
    checkpoint = data / "models" / "Stable-diffusion" / "tinyworld.safetensors"
    shutil.copy(WEIGHTS / "tinyworld.safetensors", checkpoint)
    config = (WEIGHTS / "tinyworld.yaml").read_text()
    checkpoint.with_suffix(".yaml").write_text(
        config.replace("version: tokenizer", f"version: {WEIGHTS / 'tokenizer'}")
    )
    for lora in (WEIGHTS / "lora").glob("*.safetensors"):
        shutil.copy(lora, data / "models" / "Lora")
    return data, checkpoint


@contextmanager
def on_a1111(folder: Path) -> Iterator[WebUI]:
    host = installed_host()
    with WebUI(host, *lay_out(folder), debug=True) as webui:
        yield webui


@contextmanager
def on_neo(folder: Path) -> Iterator[WebUI]:
    host = forge.installed(forge.Neo)
    data, checkpoint = lay_out(folder, (ROOT, forge.REFERENCE, HERE / "neo_tinyworld_extension"))
    flags, variables = (forge.Neo.lora_flag, str(data / "models" / "Lora")), {"LORATORIO_TINYWORLD": str(WEIGHTS)}
    with forge.Neo(host, data, checkpoint, flags=flags, variables=variables) as webui:
        webui.lora_names = None
        yield webui


HOSTS = {"a1111": on_a1111, "neo": on_neo}


@pytest.fixture(scope="module", params=HOSTS)
def contract(request, tmp_path_factory) -> Iterator[Contract]:
    if not any((WEIGHTS / "lora").glob("*.safetensors")):
        pytest.skip("the tiny world has no trained weights here")
    with HOSTS[request.param](tmp_path_factory.mktemp("tinyworld")) as webui:
        yield Contract(webui, request.param)


def test_three_loras_compose(contract):
    """The skyline is in every pass, as its trigger words say that it is a background."""
    contract.assert_composes(prompt=f"{PROMPT} {LORAS}", in_every_pass=["skyline_quiet"], **IMAGE)


def test_one_lora_is_the_hosts_own_image(contract):
    row = IMAGE | {"prompt": f"{PROMPT} <lora:zorg_leaky:1>"}
    composed, own = contract.composed({"base_share": 0.0}, **row), contract.plain(**row)
    assert largest(composed.images, own.images) <= TOLERANCE


def test_each_lora_is_used(contract):
    """No LoRA file is left out, and every one changes the picture."""
    plain = contract.plain(prompt=PROMPT, **IMAGE).images[0]
    for lora in sorted((WEIGHTS / "lora").glob("*.safetensors")):
        answer = contract.plain(prompt=f"{PROMPT} <lora:{lora.stem}:1>", **IMAGE)
        assert not np.array_equal(answer.images[0], plain), lora.stem
        assert f'Lora hashes: "{lora.stem}:' in answer.infotext


def test_every_part_of_a_lora_finds_its_layer(contract):
    """Of all the images above: neither the host nor the extension says otherwise."""
    assert re.findall(UNMATCHED, contract.webui.log()) == []
