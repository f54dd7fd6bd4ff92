"""Forge Neo's families of models through the running server, with random checkpoints in small sizes: the extension's
images against brute force, and against the host's own where one LoRA is all there is to compose."""

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from tests.contract.rows import TOLERANCE, Contract, largest, mean
from tests.live.forge import REFERENCE, ROOT, Neo, installed
from tests.live.webui import RequestError, WebUI, host_python, prepare_data_dir

pytestmark = pytest.mark.live

HERE = Path(__file__).parent
EXTENSION = HERE / "neo_family_extension"
FAMILIES = ("sdxl", "rectified", "flux", "schnell", "zimage", "qwen", "chroma", "klein", "lumina", "anima", "ernie")
FAMILIES += ("wan", "krea")
EDITING = {"kontext": 0.1, "klein": 0.01, "qwen-edit": 0.05, "anima": 0.05}
"""Models that edit an image, and by how many grey levels in the mean another such image changes theirs at least."""
REFERRING = {"anima_do_reference": True}
"""The host's option without which one of them does not look at the image."""
READS_IMAGES = ("qwen-edit",)
"""Of those, whose text encoder looks at the images, too."""
UNSHARED = 0.5
"""Grey levels in the mean: so much at least a composition differs from the sum of weights."""


class InSimpleSteps(Neo):
    """With a scheduler that is named: the host's own choice for SDXL makes the last step of a rectified flow at a noise
    of zero, by which it divides."""

    def _generate(self, path: str, payload: dict):
        return super()._generate(path, {"scheduler": "Simple", **payload})


KINDS = {"rectified": InSimpleSteps}
"""Servers of families that need more than others."""

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
def family_webui(
    family: str,
    folder: Path,
    *,
    storage: str = "half",
    options: dict | None = None,
    kind: type[Neo] = Neo,
    extensions: tuple[Path, ...] = (),
    variables: dict[str, str] | None = None,
) -> Iterator[WebUI]:
    """An installed Neo with a checkpoint and LoRAs of this family; ``options`` are the host's, from the start on;
    ``variables`` are more of its environment."""
    host = installed(Neo)
    data = prepare_data_dir(folder, (ROOT, REFERENCE, EXTENSION, *extensions))
    checkpoints, loras = data / "models" / "Stable-diffusion", data / "models" / "Lora"
    command = [host_python(host, "NEO"), HERE / "neo_checkpoints.py", family, "--storage", storage]
    command += ["--checkpoints", checkpoints, "--loras", loras]
    subprocess.run(command, check=True, cwd=host, env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    checkpoint, chosen = checkpoints / f"small-{family}.safetensors", dict(options or {})
    if storage == "gguf":
        checkpoint = checkpoint.with_suffix(".gguf")
        chosen["forge_additional_modules"] = [str(checkpoints / f"{n}.safetensors") for n in ("clip_l", "t5xxl", "vae")]
    config = data / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text(encoding="utf-8")) | chosen), encoding="utf-8")
    variables = {"LORATORIO_FAMILY": family, **(variables or {})}
    with kind(host, data, checkpoint, flags=(Neo.lora_flag, str(loras)), variables=variables) as webui:
        webui.lora_names = ("a", "b", "c")
        yield webui


def payload(row: dict) -> dict:
    return {"negative_prompt": "two dogs in fog", "cfg_scale": 4.0, "steps": 4, **row}


@pytest.fixture(scope="module", params=FAMILIES)
def contract(request, tmp_path_factory) -> Iterator[Contract]:
    kind = KINDS.get(request.param, Neo)
    with family_webui(request.param, tmp_path_factory.mktemp(request.param), kind=kind) as webui:
        yield Contract(webui, request.param)


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_images_are_brute_forces(contract, row):
    if contract.host == "wan" and "batch_size" in row:
        pytest.skip("a batch is a video")
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


def test_loras_change_the_text_encoders(contract):
    """Without which there would be nothing to see in rows where text and model are apart."""
    texts = [contract.plain(**payload({"prompt": prompt})) for prompt in (PLAIN, f"{PLAIN} <lora:a:1:0>")]
    assert mean(*(each.images for each in texts)) > 0.1


def test_the_host_comes_back_as_it_was(contract):
    rows = payload({"prompt": PLAIN}), payload({"prompt": TWO})
    before = [contract.plain(**row) for row in rows]
    contract.composed(**rows[1])
    for row, earlier in zip(rows, before):
        assert all(map(np.array_equal, earlier.images, contract.plain(**row).images))


@pytest.fixture(scope="module", params=EDITING)
def editing(request, tmp_path_factory) -> Iterator[Contract]:
    with family_webui(request.param, tmp_path_factory.mktemp(request.param), options=REFERRING) as webui:
        yield Contract(webui, request.param)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_an_edit_model_keeps_the_image_that_it_refers_to(editing, guidance):
    """Beside LoRAs, too, for which the prompt is encoded once more; or such LoRAs are refused."""
    image = editing.webui.txt2img(prompt="a red boat", seed=7, steps=1).images[0]
    row = payload({"image": image, "denoising_strength": 1.0, "negative_prompt": "fog", "cfg_scale": guidance})
    other = row | {"image": 255 - image}
    rows = [each | {"prompt": prompt} for each in (row, other) for prompt in (PLAIN, ONE, f"{PLAIN} <lora:a:0:0.8>")]
    before = [editing.plain(**each) for each in rows]
    assert mean(before[0].images, before[3].images) > EDITING[editing.host]  # it is looked at
    for each, expected in zip(rows, before):
        if editing.host in READS_IMAGES and "<lora:a:0.8>" in each["prompt"]:
            with pytest.raises(RequestError) as caught:
                editing.composed({"base_share": 0.0}, **each)
            assert caught.value.status == 422
            assert "text encoder of this model reads the images" in caught.value.body
            assert "te=0" in caught.value.body
        elif "<lora" in each["prompt"]:
            composed = editing.composed({"base_share": 0.0}, **each)
            assert largest(composed.images, expected.images) <= TOLERANCE
    for each, earlier in zip(rows, before):
        assert np.array_equal(earlier.images[0], editing.plain(**each).images[0])


def test_a_video_is_refused(contract):
    if contract.host != "wan":
        pytest.skip("no model of videos")
    row = payload({"prompt": TWO})
    before = contract.plain(**row), contract.plain(**row | {"batch_size": 5})
    with pytest.raises(RequestError) as caught:
        contract.composed(**row | {"batch_size": 5})
    assert caught.value.status == 422
    assert "videos are not supported (5 frames" in caught.value.body
    for earlier, frames in zip(before, (1, 5)):
        assert all(map(np.array_equal, earlier.images, contract.plain(**row | {"batch_size": frames}).images))
