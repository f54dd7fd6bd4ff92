"""The tiny model that comes along, by its name: where its files lie in a clone, and in an installed package."""

from pathlib import Path

from loratorio_ext.errors import MissingFileError
from loratorio_ext.samplers import Sampling

NAME = "tinyworld"

PACKAGE = Path(__file__).resolve().parents[1]
PLACES = (PACKAGE / "tinyworld_weights", PACKAGE.parent / "tinyworld" / "weights")
"""Of an installed package, and of a clone."""

SAMPLING = Sampling(steps=20, cfg=3.0, sampler="DDIM")
"""The guidance that its pictures are judged with, and a few steps more; see its model card."""

PROMPT = (
    "a penguin bird on the left and an amanita mushroom on the right, in a skyline town "
    "<lora:penguin_quiet:1> <lora:amanita_quiet:1> <lora:skyline_quiet:1>"
)
"""What `loratorio demo` paints: three concepts that the model has not seen, of a LoRA each."""


def weights() -> Path:
    """The folder with the checkpoint, its configuration, and the LoRAs in ``lora``."""
    for folder in PLACES:
        if (folder / f"{NAME}.safetensors").is_file():
            return folder
    raise MissingFileError(
        f"LoRAtorio: the tiny world is in none of {', '.join(map(str, PLACES))}", field="model", value=NAME
    )


def loras() -> list[str]:
    """The names of its LoRAs."""
    return sorted(path.stem for path in (weights() / "lora").glob("*.safetensors"))
