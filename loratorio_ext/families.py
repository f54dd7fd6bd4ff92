"""Which family of models a LoRA was made for, as far as its file says so, or its layers' names and widths show it.

No host is needed. Nothing is guessed: of a file that neither says nor shows it, nothing is known.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from loratorio_ext.errors import FileError
from loratorio_ext.headers import read_header


@dataclass(frozen=True)
class Made:
    """What a LoRA was made for, in words, and the families of models that may be."""

    text: str
    families: frozenset[str]

    @classmethod
    def of(cls, *families: str) -> "Made":
        return cls(families[0] if len(families) == 1 else f"a model like {families[0]}", frozenset(families))


SAID = {
    "SD 1": ("sdv1", "sd1", "stablediffusionv1"),
    "SD 2": ("sdv2", "sd2", "stablediffusionv2"),
    "SD 3": ("sd3", "stablediffusion3", "stablediffusionv3"),
    "SDXL": ("sdxl", "stablediffusionxl"),
    "Flux": ("flux1", "fluxdev", "fluxschnell"),
    "Flux.2": ("flux2",),
    "Chroma": ("chroma",),
    "Lumina 2": ("lumina2",),
    "Qwen-Image": ("qwenimage",),
    "Wan": ("wan2",),
    "Z-Image": ("zimage",),
}
"""How files begin to say it, in small letters and figures alone (as sd-scripts, musubi-tuner and ai-toolkit write)."""

CROSS_ATTENTION = re.compile(r"attn2[._]to_[kv]\.(lora_down|lora_A|lora_A\.default)\.weight$")
TEXT_WIDTHS = {768: Made.of("SD 1"), 1024: Made.of("SD 2"), 2048: Made.of("SDXL")}
"""By the width of the text that a UNet's cross-attention reads."""

LAYERS = {
    re.compile(r"(^|[._])(double_blocks|single_transformer_blocks)[._]"): Made.of("Flux", "Flux.2", "Chroma"),
    re.compile(r"(^|[._])(noise_refiner|context_refiner)[._]"): Made.of("Lumina 2", "Z-Image"),
    re.compile(r"(^|[._])transformer_blocks[._]\d+[._](img|txt)_mlp[._]"): Made.of("Qwen-Image"),
}
"""By layers that only they have; several families share most of theirs."""

CLASSES = {
    "Chroma": "Chroma",
    "Flux": "Flux",
    "Flux2": "Flux.2",
    "Lumina2": "Lumina 2",
    "QwenImage": "Qwen-Image",
    "StableDiffusion3": "SD 3",
    "Wan": "Wan",
    "ZImage": "Z-Image",
}
"""What hosts call their models that are neither SD 1, SD 2 nor SDXL."""
FLAGS = {"is_sdxl": "SDXL", "is_sd3": "SD 3", "is_sd2": "SD 2", "is_sd1": "SD 1"}


def family_of_model(model: Any) -> str | None:
    """The family of a host's model; None where it is another, or where there is none yet."""
    flagged = next((family for flag, family in FLAGS.items() if getattr(model, flag, False)), None)
    return flagged or CLASSES.get(type(model).__name__)


def said_by(metadata: Mapping[str, Any]) -> Made | None:
    """What a file's metadata says; where two entries differ, the one that tells more families apart."""
    for key in ("modelspec.architecture", "ss_base_model_version"):
        text = re.sub(r"[^a-z0-9]", "", str(metadata.get(key, "")).lower())
        for family, starts in SAID.items():
            if text.startswith(starts):
                return Made.of(family)
    return None


def shown_by(shapes: Mapping[str, tuple[int, ...]]) -> Made | None:
    """What a file's layers show, by their names and shapes."""
    for name, shape in shapes.items():
        if CROSS_ATTENTION.search(name):
            return TEXT_WIDTHS.get(shape[1])
        for pattern, made in LAYERS.items():
            if pattern.search(name):
                return made
    return None


@lru_cache(maxsize=512)
def shown_by_file(file: str, changed: float) -> Made | None:
    """As `shown_by`, of a safetensors file; None of any other, and of a damaged one."""
    try:
        return shown_by(read_header(file).shapes)
    except (FileError, IndexError):
        return None


def made_for(metadata: Mapping[str, Any], file: str) -> Made | None:
    """What a LoRA was made for: as its metadata says, else as its layers show; None: nothing is known."""
    said = said_by(metadata)
    if said is not None or not file.endswith(".safetensors") or not os.path.isfile(file):
        return said
    return shown_by_file(file, os.path.getmtime(file))
