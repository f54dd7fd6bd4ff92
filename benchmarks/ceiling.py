"""What perfect information reaches: where each LoRA acts is read off the scene's own geometry, not from predictions.

Whatever weighs by place can do no better, and what falls short of it here is the models', not the placing.
"""

import base64
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.variants import EVERYWHERE, Options
from benchmarks.world import render


def written(mask: Image.Image) -> str:
    """A mask as the option ``loras`` takes it."""
    file = io.BytesIO()
    mask.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode("ascii")


def informed(combination: Any, loras: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """A mask for each concept of the scene, as the option ``loras`` takes it; ``loras`` by concept."""
    return {lora.name: {"mask": written(render.region(combination.scene, c))} for c, lora in loras.items()}


def in_every_pass(combination: Any, options: Options) -> str:
    """Which of the scene's concepts is in every pass, by the option `EVERYWHERE`; "": none is."""
    if EVERYWHERE not in options:
        return ""
    style, background = combination.scene.style, combination.scene.background
    found = {"everywhere": (style,), "surroundings": (style, background)}[options[EVERYWHERE]]
    return next((concept for concept in found if concept in render.CONCEPTS), "")


def true_renders(combination: Any, seeds: Any) -> list[Image.Image]:
    """What the judge ought to call complete: the scene as the renderer draws it."""
    return [render.render(combination.scene, np.random.default_rng(seed)) for seed in seeds]
