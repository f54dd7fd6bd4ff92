"""Forge Neo's families of models through the running server, with random checkpoints in small sizes: the extension's
images against brute force, and against the host's own where one LoRA is all there is to compose."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from tests.contract.rows import TOLERANCE, Contract, largest, mean
from tests.live.forge import REFERENCE, ROOT, Neo
from tests.live.webui import WebUI, host_python, prepare_data_dir

pytestmark = pytest.mark.live

HERE = Path(__file__).parent
EXTENSION = HERE / "neo_family_extension"
FAMILIES = ("sdxl", "flux", "schnell", "zimage", "qwen", "chroma", "klein", "lumina", "anima", "ernie")
UNSHARED = 0.5
"""Grey levels in the mean: so much at least a composition differs from the sum of weights."""

PLAIN = "a cat on a hill"
ONE = f"{PLAIN} <lora:a:0.8>"
TWO = f"{PLAIN} <lora:a:0.8> <lora:b:1>"
THREE = f"{TWO} <lora:c:0.7>"
ROWS = {
    "one LoRA": {"prompt": ONE},
    "two LoRAs": {"prompt": TWO},
    "three LoRAs": {"prompt": THREE},
    "three LoRAs, batch of 2": {"prompt": THREE, "batch_size": 2},
    "two LoRAs, CFG 1": {"prompt": TWO, "cfg_scale": 1.0},
    "text and model apart": {"prompt": f"{PLAIN} <lora:a:0.3:1> <lora:b:0.6> <lora:c:1:0.2>"},
    "no text encoder": {"prompt": f"{PLAIN} <lora:a:0:1> <lora:b:1>"},
}


@contextmanager
def family_webui(family: str, folder: Path) -> Iterator[WebUI]:
    """An installed Neo with a checkpoint and LoRAs of this family."""
    host = os.environ.get("LORATORIO_NEO_DIR")
    if not host:
        pytest.skip("LORATORIO_NEO_DIR does not name an installed Neo")
    data = prepare_data_dir(folder, (ROOT, REFERENCE, EXTENSION))
    checkpoints, loras = data / "models" / "Stable-diffusion", data / "models" / "Lora"
    command = [host_python(Path(host), "NEO"), HERE / "neo_checkpoints.py", family]
    command += ["--checkpoints", checkpoints, "--loras", loras]
    subprocess.run(command, check=True, cwd=host, env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    before = os.environ.get("LORATORIO_FAMILY")
    os.environ["LORATORIO_FAMILY"] = family
    try:
        flags = (Neo.lora_flag, str(loras))
        with Neo(Path(host), data, checkpoints / f"small-{family}.safetensors", flags=flags) as webui:
            webui.lora_names = ("a", "b", "c")
            yield webui
    finally:
        if before is None:
            del os.environ["LORATORIO_FAMILY"]
        else:
            os.environ["LORATORIO_FAMILY"] = before


def payload(row: dict) -> dict:
    return {"negative_prompt": "two dogs in fog", "cfg_scale": 4.0, "steps": 4, **row}


@pytest.fixture(scope="module", params=FAMILIES)
def contract(request, tmp_path_factory) -> Iterator[Contract]:
    with family_webui(request.param, tmp_path_factory.mktemp(request.param)) as webui:
        yield Contract(webui, request.param)


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_images_are_brute_forces(contract, row):
    composed = contract.composed(**payload(row))
    assert largest(composed.images, contract.brute_force(**payload(row)).images) <= TOLERANCE
    if row is not ROWS["one LoRA"]:
        assert mean(composed.images, contract.plain(**payload(row)).images) >= UNSHARED


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_one_lora_is_the_hosts_own_image(contract, guidance):
    """With a share of 0 for the base there is nothing that composition could change."""
    row = payload({"prompt": ONE, "cfg_scale": guidance, "negative_prompt": "fog"})
    assert largest(contract.composed({"base_share": 0.0}, **row).images, contract.plain(**row).images) <= TOLERANCE
    assert mean(contract.plain(**row).images, contract.plain(**row | {"prompt": PLAIN}).images) >= UNSHARED


def test_the_host_comes_back_as_it_was(contract):
    rows = payload({"prompt": PLAIN}), payload({"prompt": TWO})
    before = [contract.plain(**row) for row in rows]
    contract.composed(**rows[1])
    for row, earlier in zip(rows, before):
        assert all(map(np.array_equal, earlier.images, contract.plain(**row).images))
