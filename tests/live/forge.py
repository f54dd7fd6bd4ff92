"""Forge, reForge and Neo as the tests drive them: `WebUI` with their flags, payloads and a small checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from tests.live.lora_files import CATALOGUE, Layer, read_layers, write_lora
from tests.live.small_checkpoint import write_small_checkpoint
from tests.live.webui import CPU_FLAGS, WebUI, prepare_data_dir

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
REFERENCE = HERE / "forge_reference_extension"
SABOTAGE = HERE / "sabotage_extension"

LORAS = (
    *("lora", "lora_no_alpha", "lora_peft", "lora_reshaped", "locon", "locon_mid", "dora", "loha", "loha_tucker"),
    *("lokr", "lokr_factored", "lokr_tucker", "glora", "full", "norm", "unet_only", "text_only", "rank_1"),
    *("rank_16_half", "cross_attention", "down_blocks", "up_blocks"),
)
"""The files of the catalogue that hold what Forge and its relatives read."""


class Forge(WebUI):
    """A Forge server process. It loads its checkpoint with the first image."""

    name = "FORGE"
    cpu_flags = (*CPU_FLAGS, "--always-cpu", "--all-in-fp32")
    lora_flag = "--lora-dir"
    loaded = "Startup time"
    hires = {"hr_additional_modules": ["Use same choices"]}
    """what a payload for hires fix must say here"""
    upscaler = "Latent"

    def __enter__(self) -> Forge:
        super().__enter__()
        self.lora_names = LORAS
        self.option_names = self.get("/sdapi/v1/options").keys()
        self.sampler_names = [sampler["name"] for sampler in self.get("/sdapi/v1/samplers")]
        return self

    def _generate(self, path: str, payload: dict):
        if payload.get("enable_hr"):
            payload = {"hr_cfg": payload.get("cfg_scale", 7.0), **self.hires, **payload}
            if payload.get("hr_upscaler") == "Latent":
                payload["hr_upscaler"] = self.upscaler
        return super()._generate(path, payload)

    def img2img(self, image: np.ndarray, **payload):
        """The host draws from an unseeded generator when it encodes an image: every one starts where it is put here."""
        self.txt2img(steps=1)
        return super().img2img(image, **payload)


class ReForge(Forge):
    """A reForge server process."""

    name = "REFORGE"
    hires = {}


class Neo(Forge):
    """A server process of Forge Neo. It takes its checkpoint from the options, and files of LoRAs from several
    folders."""

    name = "NEO"
    cpu_flags = (
        *("--api", "--server-name", "127.0.0.1", "--skip-prepare-environment", "--skip-torch-cuda-test"),
        *("--skip-python-version-check", "--skip-version-check", "--skip-install", "--disable-console-progressbars"),
        *("--cpu", "--force-fp32", "--fp32-unet", "--fp32-vae", "--fp32-text-enc"),
    )
    lora_flag = "--lora-dirs"
    upscaler = "None"
    """it has no latent ones; this one resizes"""

    def __init__(self, host: Path, data: Path, checkpoint: Path, **options):
        super().__init__(host, data, checkpoint, **options)
        at = self.command.index("--ckpt")
        del self.command[at : at + 2]
        # With its data elsewhere it neither serves its own page's scripts nor makes the folder for the page's images.
        self.command += ["--gradio-allowed-path", str(self.host)]
        (self.data / "tmp").mkdir(exist_ok=True)
        config = self.data / "config.json"
        chosen = {"sd_model_checkpoint": Path(checkpoint).name, "VERSION_UID": "PY313"}  # the latter: or it asks
        config.write_text(json.dumps(json.loads(config.read_text(encoding="utf-8")) | chosen), encoding="utf-8")
        # From its second start on a prompt is pasted: this is what the first has left behind.
        prompts = {f"{tab}/Prompt/value": "" for tab in ("txt2img", "img2img")}
        (self.data / "ui-config.json").write_text(json.dumps(prompts), encoding="utf-8")


def is_small(layer: Layer) -> bool:
    """Of the text encoder's twelve layers, LoRAs touch the first two: files stay small."""
    return layer.part == "unet" or any(f"layers_{number}_" in layer.name for number in (0, 1))


def lay_out_small_data(folder: Path, extensions: tuple[Path, ...]) -> tuple[Path, Path]:
    """A data folder with a small checkpoint and LoRA files for it; also the checkpoint's path."""
    data = prepare_data_dir(folder, extensions)
    checkpoint = write_small_checkpoint(data / "models" / "Stable-diffusion" / "small-sd15.safetensors")
    layers = [layer for layer in read_layers(checkpoint) if is_small(layer)]
    for recipe in CATALOGUE:
        if recipe.name in LORAS:
            write_lora(data / "models" / "Lora" / f"{recipe.name}.safetensors", layers, recipe)
    return data, checkpoint


def installed(kind: type[Forge]) -> Path:
    """Folder of the installed host of this kind; skips the test where there is none."""
    variable = f"LORATORIO_{kind.name}_DIR"
    folder = os.environ.get(variable)
    if not folder:
        pytest.skip(f"{variable} does not name an installed {kind.__name__}")
    return Path(folder)


@contextmanager
def small_webui(kind: type[Forge], tmp_path_factory, **options) -> Iterator[Forge]:
    """An installed host of this kind with the extension, the tests' own scripts, and a small checkpoint."""
    host = installed(kind)
    data, checkpoint = lay_out_small_data(tmp_path_factory.mktemp(kind.name.lower()), (ROOT, REFERENCE, SABOTAGE))
    with kind(host, data, checkpoint, flags=(kind.lora_flag, str(data / "models" / "Lora")), **options) as webui:
        yield webui
