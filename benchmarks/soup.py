"""LoRA Soups: all LoRAs side by side in every layer, at coefficients that are learned (arXiv 2410.13025).

Here on a few scenes that show the same concepts as the one that is asked for, with the model's own training error.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from benchmarks.world import BACKGROUNDS, render
from loratorio_ext.hosts.diffusers import LoRA
from loratorio_ext.isolation.branches import LowRank, scaled

BATCH = 8
RATE = 0.05
SEED = 0

Coefficients = Sequence[Mapping[str, float]]
"""For each LoRA, of every layer that it changes."""
Scenes = Callable[[int, np.random.Generator], tuple[Tensor, list[str]]]
"""Gives so many pictures ``[count, 3, H, W]`` in -1..1 and their captions."""


def weighted(loras: Sequence[LoRA], coefficients: Coefficients) -> list[LoRA]:
    """The LoRAs with every branch at its coefficient."""
    return [
        replace(lora, branches={name: scaled(branch, each[name]) for name, branch in lora.branches.items()})
        for lora, each in zip(loras, coefficients)
    ]


def similar_scenes(scene: Any, count: int, rng: np.random.Generator) -> tuple[Tensor, list[str]]:
    """Pictures of the scene's concepts at other places and in other company, and their captions."""
    images, captions = [], []
    for _ in range(count):
        things = [
            replace(thing, colour=str(rng.choice(list(render.COLOURS)))) if thing.colour else thing
            for thing in scene.things
        ]
        places = [thing.place for thing in things]
        things = [replace(thing, place=place) for thing, place in zip(rng.permutation(np.array(things)), places)]
        plain = scene.background not in render.CONCEPTS
        background = str(rng.choice(BACKGROUNDS)) if plain else scene.background
        other = replace(scene, background=background, things=tuple(things))
        images.append(np.asarray(render.render(other, rng)))
        captions.append(render.caption(other))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1, captions


def difference(branch: LowRank, weight: Tensor) -> Tensor:
    """What a LoRA adds to a layer's weight."""
    return branch.scale * (branch.up.flatten(1) @ branch.down.flatten(1)).view_as(weight)


def error(
    pipe: Any, weights: Mapping[str, Tensor], pictures: Tensor, captions: Sequence[str], generator: torch.Generator
) -> Tensor:
    """The model's mean squared error at random times, with these weights of layers (``unet.…``, ``text_encoder.…``)."""
    schedule = pipe.scheduler

    def call(component: str, *args: Any) -> Any:
        own = {name.split(".", 1)[1]: value for name, value in weights.items() if name.split(".")[0] == component}
        return functional_call(getattr(pipe, component), {f"{name}.weight": each for name, each in own.items()}, args)

    with torch.no_grad():
        x = pipe.vae.encode(pictures).latent_dist.mean * pipe.vae.config.scaling_factor
    noise = torch.randn(x.shape, generator=generator)
    t = torch.randint(schedule.config.num_train_timesteps, (len(x),), generator=generator)
    ids = pipe.tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="pt").input_ids
    predicted = call("unet", schedule.add_noise(x, noise, t), t, call("text_encoder", ids)[0]).sample
    with_v = schedule.config.prediction_type == "v_prediction"
    return (predicted - (schedule.get_velocity(x, noise, t) if with_v else noise)).square().mean()


def merged(pipe: Any, loras: Sequence[LoRA], coefficients: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """The layers' weights with all LoRAs in them."""
    found: dict[str, Tensor] = {}
    for lora, each in zip(loras, coefficients):
        for name, branch in lora.branches.items():
            component, _, layer = name.partition(".")
            weight = getattr(pipe, component).get_submodule(layer).weight.detach()
            found[name] = found.get(name, weight) + each[name] * difference(branch, weight)
    return found


def learned(pipe: Any, loras: Sequence[LoRA], scenes: Scenes, steps: int) -> Coefficients:
    """The coefficients that predict the noise in such scenes best, from 1 for all."""
    rng, generator = np.random.default_rng(SEED), torch.Generator().manual_seed(SEED)
    coefficients = [{name: torch.ones((), requires_grad=True) for name in lora.branches} for lora in loras]
    optimizer = torch.optim.Adam([value for each in coefficients for value in each.values()], lr=RATE)
    for _ in range(steps):
        loss = error(pipe, merged(pipe, loras, coefficients), *scenes(BATCH, rng), generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [{name: value.item() for name, value in each.items()} for each in coefficients]
