"""Images of one combination of LoRAs, composed in one way, and what is to be measured of them in any world."""

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.baselines import BASELINES
from benchmarks.ceiling import in_every_pass, informed, true_renders
from benchmarks.statistics import figures
from benchmarks.variants import BASELINE, PERFECT, TRUTH, Options, of_product
from loratorio_ext.hosts.diffusers import composed, generators

LARGEST = 99.0  # decibels, in place of infinity


@dataclass(frozen=True)
class Painting:
    """The images of one call of the pipeline, and what was seen of its steps."""

    images: list[Any]
    steps: list[Any]
    seconds: float

    @property
    def cost(self) -> float:
        """Rows evaluated by the model, as a multiple of what merged LoRAs need."""
        rows = [2 + len(step.plan.isolated) * (1 + step.plan.uncond) for step in self.steps]
        return float(np.mean(rows)) / 2 if rows else 0.0


def composing(world: Any, combination: Any, loras: Sequence[Any], options: Options) -> AbstractContextManager:
    """While entered, the world's pipeline composes in this way."""
    if BASELINE in options:
        return BASELINES[options[BASELINE]](world, combination, loras, options)
    return composed(world.pipe, loras, **options)


def paint(world: Any, combination: Any, kind: str, options: Options, seeds: Sequence[int]) -> Painting:
    """Images of what the combination's prompt asks for, one a seed."""
    started = time.perf_counter()
    if options == TRUTH:
        return Painting(true_renders(combination, seeds), [], time.perf_counter() - started)
    perfect = options.get(PERFECT)
    loras = {c: world.lora(c, kind) for c in (combination.named if perfect else combination.loras)}
    claims = informed(combination, loras) if perfect else {}
    if (concept := in_every_pass(combination, options)) in loras:
        claims[loras[concept].name] = {"base": True}
    options = {**of_product(options), **({"loras": claims} if claims else {})}
    with composing(world, combination, list(loras.values()), options) as composition:
        images = world.pipe(
            combination.prompt,
            num_images_per_prompt=len(seeds),
            generator=generators(seeds),
            **world.call,
        ).images
    return Painting(images, composition.steps, time.perf_counter() - started)


def psnr(images: Sequence[Any], exact: Sequence[Any]) -> list[float]:
    """Peak signal to noise ratio of each image against its exact counterpart, in decibels."""
    errors = [np.mean((np.float64(a) - np.float64(b)) ** 2) for a, b in zip(images, exact)]
    return [round(min(LARGEST, 10 * float(np.log10(255**2 / error))) if error else LARGEST, 2) for error in errors]


def step_statistics(steps: Sequence[Any]) -> dict[str, list[float]]:
    """Step by step, the mean similarity to the base model and its spread over the LoRAs; each LoRA's mean weight, 0 in
    steps in which it took no part."""
    weighed = [step for step in steps if step.weights is not None]
    if not weighed:
        return {}
    weights = np.zeros((len(weighed), len(weighed[0].loras)))
    for row, step in zip(weights, weighed):
        row[list(step.plan.members)] = step.weights.flatten(1).mean(1).numpy()
    return {
        "similarity": figures(step.similarity.mean() for step in weighed),
        "spread": figures(step.similarity.std(dim=0, correction=0).mean() for step in weighed),
        "weights": figures(weights.mean(axis=0)),
    }
