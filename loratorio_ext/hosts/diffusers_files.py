"""Model and LoRA files: what their headers say, before any of their numbers are read. Imports no torch, no diffusers.

Everything here goes by names, shapes and the text that a file brings along, none of which can be trusted. A file that
is not what it should be raises `FileFormatError`, which names the file and what is wrong with it.
"""

import json
import math
import os
import re
from pathlib import Path
from typing import Any

from loratorio_ext.errors import FileFormatError
from loratorio_ext.headers import Header

ADAPTER_CONFIG_KEY = "lora_adapter_metadata"
"""Under which diffusers keeps a PEFT configuration in a LoRA file."""

FLOATS = re.compile(r"F\d+.*|BF16")
"""Safetensors' names of floating-point types, 8-bit ones included."""

LORA_KEY = re.compile(
    r"\.(lora_(up|down|mid|A|B)\b|lora\.(up|down)\.|lora_linear_layer\.|processor\.\w+_lora\.|hada_|lokr_|dora_scale)"
)

COMPONENTS = {
    "UNet or transformer": ("model.diffusion_model.",),
    "text encoder": ("cond_stage_model.", "conditioner.", "text_encoders.", "cond_stage_model_"),
    "VAE": ("first_stage_model.", "vae."),
}
"""What a whole checkpoint holds, and by which names."""


def check_folder(path: Path) -> None:
    """Raises `FileFormatError` for what is no folder of diffusers'."""
    if not (path / "model_index.json").is_file():
        raise FileFormatError(
            f"LoRAtorio: {path} is not a diffusers folder: it has no model_index.json", value=str(path)
        )


def is_lora(header: Header) -> bool:
    """Whether most of the file's tensors are named as those of LoRAs are."""
    named = sum(bool(LORA_KEY.search(name)) for name in header.shapes)
    return named > len(header.shapes) / 3


def check_checkpoint(header: Header) -> None:
    """Raises `FileFormatError` for what cannot be a whole model: a LoRA, or a part alone."""
    if is_lora(header):
        raise header.refused("is a LoRA, not a model; give it with --lora, and with --model the model it is for")
    missing = [
        part
        for part, prefixes in COMPONENTS.items()
        if not any(name.startswith(prefix) for name in header.shapes for prefix in prefixes)
    ]
    if missing:
        raise header.refused(f"is not a whole model: it holds no {' and no '.join(missing)}")


def check_lora(header: Header) -> None:
    """Raises `FileFormatError` for what no kind of LoRA can look like, whatever model it is for."""
    if header.path.suffix.lower() != ".safetensors":
        raise header.refused("must be named .safetensors")
    for name, shape in header.shapes.items():
        size = math.prod(shape)
        if name.endswith(".alpha"):
            if size != 1:
                raise header.refused(f"is no LoRA: {name} should be one number, and holds {size}")
        elif size == 0:
            raise header.refused(f"is no LoRA: {name} is empty, of shape {shape}")
        elif not FLOATS.fullmatch(header.types[name]) and not name.endswith(".on_input"):  # IA3's yes or no
            raise header.refused(f"is no LoRA: {name} is of type {header.types[name]}, not floating point")
    adapter_config(header)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9


def adapter_config(header: Header) -> dict[str, Any]:
    """The PEFT configuration that the file brings along, by component (``unet.lora_alpha``); empty where it has none.

    Of it ``lora_alpha``, ``alpha_pattern`` and ``use_rslora`` are used here, and checked.
    """
    text = header.metadata.get(ADAPTER_CONFIG_KEY)
    if not text:
        return {}
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        why = "nested too deep" if isinstance(error, RecursionError) else str(error)
        raise header.refused(f"has {ADAPTER_CONFIG_KEY} that is not JSON: {why}") from error
    if not isinstance(config, dict):
        raise header.refused(f"has {ADAPTER_CONFIG_KEY} that is no JSON object")
    for name, value in config.items():
        option = name.rpartition(".")[2]
        patterns = value if option == "alpha_pattern" and isinstance(value, dict) else {}
        # A pattern is a regular expression; real ones are names of layers, and no other is run.
        wrong = (
            (option == "lora_alpha" and not is_number(value))
            or (option == "alpha_pattern" and value is not None and not isinstance(value, dict))
            or (option == "use_rslora" and not isinstance(value, bool))
            or any(not re.fullmatch(r"\^?[\w.\\-]*\$?", key) or not is_number(each) for key, each in patterns.items())
        )
        if wrong:
            raise header.refused(f"has {ADAPTER_CONFIG_KEY} in which {name[:100]} is not what PEFT writes")
    return config


def same_file(path: str | os.PathLike) -> tuple[int, int] | str:
    """What two paths have in common exactly when they lead to one file."""
    try:
        found = os.stat(path)
    except OSError:
        return os.path.abspath(path)
    return (found.st_dev, found.st_ino)
