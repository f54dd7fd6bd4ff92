"""Forge Neo's families of models through the running server, with random checkpoints in small sizes: the extension's
images against brute force, and against the host's own where one LoRA is all there is to compose."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from tests.contract.rows import TOLERANCE, Contract, largest, mean
from tests.live.forge import REFERENCE, ROOT, Neo, installed
from tests.live.webui import RequestError, WebUI, encode_image, host_python, prepare_data_dir

pytestmark = pytest.mark.live

HERE = Path(__file__).parent
EXTENSION = HERE / "neo_family_extension"
FAMILIES = ("sdxl", "rectified", "flux", "schnell", "zimage", "qwen", "chroma", "klein", "lumina", "anima", "ernie")
FAMILIES += ("wan", "krea")
EDITING = {"kontext": 0.05, "klein": 0.01, "qwen-edit": 0.25, "anima": 0.05, "krea": 0.5}
"""Models that edit an image, and by how many grey levels in the mean another such image changes theirs at least: about
half of what was measured, at the guidance scale where it was less (0.10, 0.02, 0.55, 0.10, 1.17)."""
REFERRING = {"anima_do_reference": True}
"""The host's option without which one of them does not look at the image."""
READS_IMAGES = ("qwen-edit", "krea")
"""Of those, whose text encoder looks at the images, too."""
STITCHED = ("krea",)
"""Of those, which see images only that come through the host's own script for them."""
STITCHES = ("imagestitch integrated", "多图参考")
"""Titles of that script in two distributions."""
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


def referring(contract: Contract, image: np.ndarray) -> tuple[dict, dict]:
    """Payload, and scripts' arguments, with which the model edits this image."""
    if contract.host not in STITCHED:
        return {"image": image, "denoising_strength": 1.0}, {}
    titles = contract.webui.get("/sdapi/v1/scripts")["txt2img"]
    unlimited = 0
    return {}, {title: {"args": [True, [encode_image(image)], unlimited]} for title in titles if title in STITCHES}


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_an_edit_model_keeps_the_image_that_it_refers_to(editing, guidance):
    """Beside LoRAs, too, for which the prompt is encoded once more; or such LoRAs are refused."""
    image = editing.webui.txt2img(prompt="a red boat", seed=7, steps=1).images[0]
    ours = {"LoRAtorio": {"args": [{"enabled": True, "base_share": 0.0}]}}
    common = payload({"negative_prompt": "fog", "cfg_scale": guidance})
    rows = []
    for shown in (image, 255 - image):
        row, scripts = referring(editing, shown)
        rows += [(common | row | {"prompt": each}, scripts) for each in (PLAIN, ONE, f"{PLAIN} <lora:a:0:0.8>")]
    before = [editing.generate(*each) for each in rows]
    assert mean(before[0].images, before[3].images) > EDITING[editing.host]  # it is looked at
    for (row, scripts), expected in zip(rows, before):
        if editing.host in READS_IMAGES and "<lora:a:0.8>" in row["prompt"]:
            with pytest.raises(RequestError) as caught:
                editing.generate(row, scripts | ours)
            assert caught.value.status == 422
            assert "text encoder of this model reads the images" in caught.value.body
            assert "te=0" in caught.value.body
        elif "<lora" in row["prompt"]:
            assert largest(editing.generate(row, scripts | ours).images, expected.images) <= TOLERANCE
    for each, earlier in zip(rows, before):
        assert np.array_equal(earlier.images[0], editing.generate(*each).images[0])


def refused_video(contract: Contract) -> dict:
    """A payload for five frames, which the extension has just refused."""
    if contract.host != "wan":
        pytest.skip("no model of videos")
    row = payload({"prompt": TWO, "batch_size": 5})
    with pytest.raises(RequestError) as caught:
        contract.composed(**row)
    assert caught.value.status == 422
    assert "videos are not supported (5 frames" in caught.value.body
    return row


def test_a_video_is_refused(contract):
    row = payload({"prompt": TWO})
    before = contract.plain(**row)
    refused_video(contract)
    assert np.array_equal(before.images[0], contract.plain(**row).images[0])


@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="without ffmpeg the host makes no video")
def test_the_hosts_video_comes_back_as_it_was(contract):
    row = refused_video(contract)
    before = contract.plain(**row)
    refused_video(contract)
    contract.composed(**row | {"batch_size": 1})
    after = contract.plain(**row)
    assert len(before.images) == len(after.images) == 5
    assert all(map(np.array_equal, before.images, after.images))
