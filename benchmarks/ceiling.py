"""What perfect information reaches: where each LoRA acts is read off the scene's own geometry, not from predictions.

Whatever weighs by place can do no better, and what falls short of it here is the models', not the placing.
"""

import base64
import io
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.variants import Options
from benchmarks.world import render


def written(mask: Image.Image) -> str:
    """A mask as the option ``loras`` takes it."""
    file = io.BytesIO()
    mask.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode("ascii")


def informed(combination: Any, names: dict[str, str], options: Options) -> dict[str, Any]:
    """Options with a mask for each concept that the scene names; ``names``: the LoRAs' own, by concept."""
    masks = {name: {"mask": written(render.region(combination.scene, c))} for c, name in names.items()}
    return {**options, "loras": masks}


def true_renders(combination: Any, seeds: Any) -> list[Image.Image]:
    """What the judge ought to call complete: the scene as the renderer draws it."""
    return [render.render(combination.scene, np.random.default_rng(seed)) for seed in seeds]
