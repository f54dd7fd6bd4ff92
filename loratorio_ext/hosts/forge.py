"""Forge and its relatives: the base model's pass and the isolated ones, all through the host's own evaluation.

The LoRAs are taken from a clone of the UNet's patcher before sampling, so that the host loads the bare model; what a
LoRA does is added row by row. The composed predictions take the place of the host's own evaluation of a step:
guidance, samplers, previews and inpainting go on as ever.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from modules import prompt_parser, shared
from torch import Tensor

from loratorio_ext.claims import Claim
from loratorio_ext.core import ComposedStep, Plan, Predictions, method_from
from loratorio_ext.errors import UnsupportedError
from loratorio_ext.generation import Generation
from loratorio_ext.hosts.forge_backends import Backend, backend_of
from loratorio_ext.hosts.forge_patches import Patches, branches, joined
from loratorio_ext.hosts.webui import (
    asked_loras,
    check_tags,
    clean_up,
    encode,
    forget_conditionings,
    interrupt,
    leave_out,
    lora_extension,
    plan_step,
    pool_of,
    prompts_of_pass,
    sampled,
    tell_of_loras,
    tell_of_none,
)
from loratorio_ext.isolation import ROWS_OF_A_POOL, BatchedCalls, Isolation, Row, Tally, in_main_memory

__all__ = ["check", "clean_up", "forget_conditionings", "interrupt", "open_sampling", "sampled"]

logger = logging.getLogger("loratorio")

LABEL = "loratorio_label"
ROOM_FOR_A_POOL = 2**30
REGIONAL = ("area", "mask", "timestep_start", "timestep_end")


# --- the prompt's LoRAs -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lora:
    """A LoRA of the prompt, or of the pool: its file and multipliers."""

    name: str
    file: str
    unet: float
    text: float
    pooled: bool = False


def on_disk(networks: ModuleType, name: str) -> Any:
    """The host's entry for a LoRA by the name in a prompt, or None."""
    ambiguous = name.lower() in networks.forbidden_network_aliases
    return (networks.available_networks if ambiguous else networks.available_network_aliases).get(name)


def active_loras(p: Any, networks: ModuleType) -> list[Lora]:
    """The prompt's LoRAs that there are, in prompt order, repetitions included.

    Read from the prompt, since the host drops all LoRAs when it does not find one.
    """
    found = []
    for params in asked_loras(p):
        name, *numbers = params.positional
        entry = on_disk(networks, name)
        if entry is not None:
            text = float(params.named.get("te", numbers[0] if numbers else 1.0))
            unet = float(params.named.get("unet", numbers[1] if len(numbers) > 1 else text))
            found.append(Lora(name, entry.filename, unet, text))
    return found


def pooled_loras(generation: Generation, active: Sequence[Lora]) -> list[Lora]:
    """The pool's LoRAs beside those of the prompt."""
    members = pool_of(generation, [lora.file for lora in active])
    return [Lora(each.lora.name, each.lora.file, each.unet, each.text, pooled=True) for each in members]


class LoadedLora:
    """A LoRA's patches of the UNet, and a text encoder (None: it does not change the host's) that has it alone."""

    def __init__(self, lora: Lora, model: Any, networks: ModuleType, backend: Backend):
        original = model.forge_objects_original
        weights = networks.load_lora_state_dict(lora.file)
        unet, clip = networks.load_lora_for_models(
            original.unet, original.clip, weights, lora.unet, lora.text, filename=lora.file
        )
        self.name, self.pooled = lora.name, lora.pooled
        self.patches = backend.patches(unet, original.unet)
        text_patches = backend.patches(clip.patcher, original.clip.patcher)
        self.clip = clip if text_patches and lora.text != 0 else None
        self.fits = bool(self.patches or text_patches) or lora.unet == lora.text == 0


# --- conditionings ----------------------------------------------------------------------------------------------------


@contextmanager
def text_encoder(model: Any, clip: Any) -> Iterator[None]:
    """While entered, the host encodes prompts with ``clip``."""
    before = model.forge_objects.clip
    model.forge_objects.clip = clip
    try:
        yield
    finally:
        model.forge_objects.clip = before


def rows_of(text: Any, rows: Sequence[int]) -> Any:
    """Rows of a conditioning, which is a tensor or a dict of tensors."""
    return text.advanced_indexing(rows) if hasattr(text, "advanced_indexing") else text[rows]


def text_at_step(texts: tuple[Any, Any], step: int) -> list[Any]:
    """A step's conditionings by entry, ``B`` rows each: one for every AND part, then the negative prompts' if any."""
    layout, text = prompt_parser.reconstruct_multicond_batch(texts[0], step)
    parts = [rows_of(text, [row for row, _ in part]) for part in zip(*layout)]
    return parts if texts[1] is None else [*parts, prompt_parser.reconstruct_cond_batch(texts[1], step)]


def with_text(entry: dict, text: Any) -> dict:
    """One of the host's entries with another text in it, everything else as it was."""
    crossattn, pooled = (text["crossattn"], text["vector"]) if isinstance(text, dict) else (text, None)
    old = entry["model_conds"]
    conds = old | {"c_crossattn": type(old["c_crossattn"])(crossattn)}
    if pooled is None:
        return entry | {"cross_attn": crossattn, "model_conds": conds}
    conds["y"] = type(old["y"])(pooled)
    return entry | {"cross_attn": crossattn, "pooled_output": pooled, "model_conds": conds}


class Label:
    """A number that rides along with an entry through the host's batching, in the manner of the host's conditions."""

    def __init__(self, number: int):
        self.number = number

    def process_cond(self, **_) -> "Label":
        return self

    def can_concat(self, other: "Label") -> bool:
        return True

    def concat(self, others: list["Label"]) -> list["Label"]:
        return [self, *others]

    def size(self) -> list[int]:
        return [1]


# --- one step ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HostStep:
    """What the host is about to evaluate: ``B`` images, an entry for every AND part and at most one unconditional."""

    model: Any
    cond: list[dict]
    uncond: list[dict]
    x: Tensor
    sigma: Tensor
    options: dict

    @property
    def entries(self) -> list[dict]:
        return [*self.cond, *self.uncond]

    def predicted_noise(self, denoised: Tensor) -> Tensor:
        """The noise that x0 predictions ``[..., B, C, H, W]`` mean; for flow models, the velocity."""
        return (self.x - denoised) / self.sigma.view(-1, 1, 1, 1)

    def of_images(self, rows: Tensor) -> Tensor:
        """The AND parts' predictions ``[J * B, C, H, W]`` as the host adds them up: ``[B, C, H, W]``."""
        strengths = torch.tensor([entry.get("strength", 1.0) for entry in self.cond]).to(rows)
        return torch.einsum("j, jbchw -> bchw", strengths / strengths.sum(), rows.unflatten(0, (len(self.cond), -1)))


class ForgeSampling:
    """Composition in one sampling pass.

    Wherever a LoRA's index is asked for, `Plan.BASE` stands for none of them and `Plan.MERGED` for all at once.
    """

    def __init__(self, generation: Generation, networks: ModuleType, loras: list[Lora]):
        self.generation, self.p = generation, generation.p
        self.method = method_from(generation.settings)
        self.steps = 0
        self.calls: BatchedCalls | None = None
        model = self.p.sd_model
        unet = model.forge_objects.unet.clone()
        self.backend = backend_of(unet)
        check_supported(self.p)
        key = (model, *loras)
        self.loras = generation.once(("loras", *key), lambda: self.load(model, networks, loras))
        # Made once for all batches that share them; and a host may announce a hires pass more than once.
        self.texts = generation.once(("texts", *key, *prompts_of_pass(self.p)), lambda: self.encode(model))
        self.key = ("isolation", *key)
        self.backend.strip(unet, model.forge_objects_after_applying_lora.unet, model.forge_objects_original.unet)
        unet.add_extra_preserved_memory_during_sampling(room_for(loras))
        self.undo = self.replace_evaluation(unet)
        model.forge_objects.unet = unet

    @property
    def tally(self) -> Tally | None:
        return None if self.calls is None else self.calls.tally

    def close(self) -> None:
        undo, self.undo = self.undo, None
        if undo is not None:
            undo()

    def replace_evaluation(self, unet: Any):
        def evaluation(model, cond, uncond, x, sigma, options):
            """A function and no method: the host deep-copies what it finds in a patcher's options."""
            try:
                return self.compose(HostStep(model, cond, uncond or [], x, sigma, options))
            except Exception as error:
                self.generation.fail(error)
                raise self.generation.error from error

        return self.backend.replace_evaluation(unet, evaluation)

    def load(self, model: Any, networks: ModuleType, loras: list[Lora]) -> list[LoadedLora]:
        loaded = []
        for lora in loras:
            try:
                each = LoadedLora(lora, model, networks, self.backend)
            except Exception as error:  # whatever a file may hold
                if not lora.pooled:
                    raise
                logger.warning("%s cannot be read: %s", lora.file, error, exc_info=True)
                leave_out(self.generation, lora.name, f"its file cannot be read ({type(error).__name__})")
                continue
            if not each.fits and lora.pooled:
                leave_out(self.generation, lora.name, "made for another model, it has none of this one's layers")
                continue
            if not each.fits:
                self.generation.note(f"{lora.name} has no layer of this model")
            loaded.append(each)
        return loaded

    def encode(self, model: Any) -> list[tuple[Any, Any]]:
        """Schedules of conditionings, positive and negative, for each LoRA alone, and last for none."""
        with text_encoder(model, model.forge_objects_original.clip):
            base = encode(self.p)
        texts = []
        for lora in self.loras:
            if lora.clip is None:
                texts.append(base)
            else:
                with text_encoder(model, lora.clip):
                    texts.append(encode(self.p))
        return [*texts, base]

    def isolate(self, model: Any, images: int) -> tuple[list[int], Isolation, BatchedCalls]:
        """Who takes part (a LoRA of the pool that does not fit is left out), and the branches of these for the model as
        it is now, with the prompt's LoRAs taken from its weights."""

        def made(name: str, store: Patches, pooled: bool = False) -> Any:
            fitting, misfits = branches(model, store, self.backend.dense, self.backend.merge)
            for parameter, error in misfits.items():
                logger.warning("%s does not fit %s: %s", name, parameter, error)
            if misfits and pooled:
                leave_out(self.generation, name, f"made for another model, {len(misfits)} layers have other shapes")
                return None
            if misfits:
                self.generation.note(f"{name} does not fit {len(misfits)} layers of this model")
            return {name: in_main_memory(branch) for name, branch in fitting.items()} if pooled else fitting

        alone = [made(lora.name, lora.patches, lora.pooled) for lora in self.loras]
        members = [index for index, fitting in enumerate(alone) if fitting is not None]
        if not members:
            tell_of_none(self.generation)
        settings = self.generation.settings
        windowed = settings.start > 0 or settings.end < 1
        of_the_prompt = [lora.patches for lora in self.loras if not lora.pooled]
        merged = made("the sum of LoRAs", joined(of_the_prompt)) if windowed else {}
        # So that Plan.MERGED and Plan.BASE are indices like any other:
        by_index = [*(alone[index] for index in members), merged, {}]
        names = {name for each in by_index for name in each}
        isolation = Isolation({name: model.get_submodule(name.rpartition(".")[0]) for name in names}, by_index)
        limit = max(1, ROWS_OF_A_POOL // images) if settings.pool else None
        return members, isolation, BatchedCalls(isolation.forget, limit)

    def compose(self, step: HostStep) -> tuple[Tensor, Tensor | None]:
        """The step's conditional and unconditional x0, ``[B, C, H, W]`` each."""
        self.steps += 1
        if any(key in entry for entry in step.entries for key in REGIONAL):
            raise UnsupportedError("LoRAtorio: conditions for a region or a part of the steps are not supported")
        # Not before the first model call: only then has the host taken its own LoRAs from the weights.
        members, self.isolation, self.calls = self.generation.once(
            self.key, lambda: self.isolate(step.model, len(step.x))
        )
        self.names = [self.loras[index].name for index in members]
        self.texts_of = [*(self.texts[index] for index in members), self.texts[Plan.BASE]]
        denoiser = self.p.sampler.model_wrap_cfg
        plan = Plan(host=Plan.MERGED)
        if members:
            plan = plan_step(self.generation, self.method, denoiser, [Claim()] * len(members))
        composed = self.predict(step, plan, denoiser.step)
        return step.of_images(composed.cond), composed.uncond

    def predict(self, step: HostStep, plan: Plan, number: int) -> ComposedStep:
        """One prediction an AND part and image, ``[J * B, C, H, W]``, and an unconditional one an image."""
        parts, everything = len(step.cond), len(step.entries)
        each = everything if plan.uncond else parts
        chunks = [(plan.host, entry) for entry in range(everything)]
        chunks += [(lora, entry) for lora in plan.isolated for entry in range(each)]

        output = self.calls(chunks, lambda batch: self.evaluate(step, number, batch))
        host, alone = output.split([everything, len(chunks) - everything])
        cond, uncond = host[:parts].flatten(0, 1), host[parts] if step.uncond else None
        if not plan.isolated:
            return ComposedStep(cond, uncond)
        alone = alone.unflatten(0, (len(plan.isolated), each))
        predictions = Predictions(
            host_cond=cond,
            host_uncond=uncond,
            cond=alone[:, :parts].flatten(1, 2),
            uncond=alone[:, parts] if plan.uncond and step.uncond else None,
            eps_base=step.predicted_noise(host[:parts]).flatten(0, 1),
            eps=step.predicted_noise(alone[:, :parts]).flatten(1, 2),
            image_of_row=tuple(range(len(step.x))) * parts,
            gain=-step.sigma[0],
        )
        composed = self.method.combine(predictions)
        self.generation.record(self.names, composed.weights, predictions.image_of_row)
        return composed

    def entry(self, step: HostStep, number: int, lora: int, index: int) -> dict:
        """One of the host's entries with the text that this LoRA's encoder makes of it."""
        if lora == Plan.MERGED:
            return step.entries[index]
        return with_text(step.entries[index], text_at_step(self.texts_of[lora], number)[index])

    def evaluate(self, step: HostStep, number: int, chunks: Sequence[Row]) -> Tensor:
        """``[len(chunks), B, C, H, W]``: x0 of each chunk, which is a LoRA and one of the host's entries."""
        others = step.options.get("model_function_wrapper")
        results: dict[int, Tensor] = {}

        def wrapper(apply_model, args):
            labels = [label.number for label in args["c"].pop(LABEL)]

            def isolated(x, sigma, **conditions):
                if len(x) != len(args["input"]):
                    raise UnsupportedError("LoRAtorio: another extension regroups the rows of the batch")
                with self.isolation.rows([chunks[label][0] for label in labels]):
                    return apply_model(x, sigma, **conditions)

            if others is not None:
                output = others(isolated, args)
            else:
                output = isolated(args["input"], args["timestep"], **args["c"])
            results.update(zip(labels, output.chunk(len(labels))))
            return output

        cond, uncond = [], []
        for label, (lora, index) in enumerate(chunks):
            entry = self.entry(step, number, lora, index)
            conds = entry["model_conds"] | {LABEL: Label(label)}
            (cond if index < len(step.cond) else uncond).append(entry | {"model_conds": conds})
        options = step.options | {"model_function_wrapper": wrapper}
        self.backend.evaluate(step.model, cond, uncond or None, step.x, step.sigma, options)
        return torch.stack([results[label] for label in range(len(chunks))])


# --- entering ---------------------------------------------------------------------------------------------------------


def room_for(loras: Sequence[Lora]) -> int:
    """Bytes to ask the host to keep free for the LoRAs' matrices; a pool's are only partly there at any time.

    The host takes files that it cannot read out of the way.
    """
    of_the_prompt, of_the_pool = (
        sum(os.path.getsize(lora.file) for lora in loras if lora.pooled is pooled and os.path.exists(lora.file))
        for pooled in (False, True)
    )
    return of_the_prompt + min(of_the_pool, ROOM_FOR_A_POOL)


def check_supported(p: Any) -> None:
    """Raises `UnsupportedError` for what cannot be composed here."""
    if getattr(shared.opts, "dynamic_clip_skip_enabled", False):
        raise UnsupportedError("LoRAtorio: dynamic clip skip is not supported")


def tell_of_the_pass(generation: Generation) -> None:
    """Note what the pass at hand does without."""
    p = generation.p
    if getattr(p, "refiner_checkpoint_info", None) is not None:
        generation.note("from the refiner on the LoRAs act merged")
    guidance = p.hr_cfg if getattr(p, "is_hr_pass", False) else p.cfg_scale
    if guidance == 1 and generation.settings.method == "loratorio":
        generation.note("no unconditional pass at CFG scale 1, so guidance is not re-centred")


def open_sampling(generation: Generation) -> ForgeSampling | None:
    """Composition for the sampling pass that is about to begin, or None where there is nothing to compose."""
    if generation.settings.method == "merge":
        return None
    networks = lora_extension()
    active = active_loras(generation.p, networks)
    tell_of_loras(generation, [lora.name for lora in active])
    loras = [*active, *pooled_loras(generation, active)]
    if not loras:
        tell_of_none(generation)
        return None
    tell_of_the_pass(generation)
    return ForgeSampling(generation, networks, list({lora.file: lora for lora in loras}.values()))


def check(generation: Generation) -> None:
    """Raise what speaks against a composition before any script has acted: the pool's entries, the prompts' tags."""
    if generation.settings.method != "merge":
        pool_of(generation, ())
        check_tags(generation.p)
