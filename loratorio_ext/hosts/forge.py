"""Forge and its relatives: the base model's pass and the isolated ones, all through the host's own evaluation.

The LoRAs are taken from a clone of the UNet's patcher before sampling, so that the host loads the bare model (with the
LoRAs that are in every pass); what a LoRA does is added row by row. The composed predictions take the place of the
host's own evaluation of a step: guidance, samplers, previews and inpainting go on as ever.

In company, where others take part in the model's evaluation, one LoRA after the other is evaluated in exactly the
host's own entries: as if the host had been asked for this LoRA alone.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from modules import prompt_parser, shared
from torch import Tensor

from loratorio_ext.claims import Claim
from loratorio_ext.core import ComposedStep, Plan, Predictions, method_from
from loratorio_ext.costs import rows_by_step
from loratorio_ext.errors import UnsupportedError
from loratorio_ext.generation import Generation
from loratorio_ext.hosts.forge_backends import WRAPPER, backend_of
from loratorio_ext.hosts.forge_company import (
    Company,
    Watched,
    alone,
    controls_of,
    made_of,
    name_of,
    name_of_control,
)
from loratorio_ext.hosts.forge_loras import (
    NOTHING,
    LoadedLora,
    Lora,
    Patched,
    active_loras,
    at_present_strengths,
    labels,
    load,
    not_finite,
    pooled_loras,
    room_for,
    unet_lora,
)
from loratorio_ext.hosts.forge_patches import branches, joined
from loratorio_ext.hosts.neighbours import TELLING, callers_of, named
from loratorio_ext.hosts.pool_files import POOL_FILES
from loratorio_ext.hosts.progress import Progress
from loratorio_ext.hosts.webui import (
    attended,
    check_tags,
    check_texts,
    claimed,
    claims_on,
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
    stop_where_asked,
    tell_of_loras,
    tell_of_merge,
    tell_of_none,
    unless_stopped,
)
from loratorio_ext.hosts.webui_texts import HOST, Affix, is_finite_text, same_text, token_count
from loratorio_ext.isolation import ROWS_OF_A_POOL, BatchedCalls, Isolation, Row, Tally

__all__ = ["attended", "check", "clean_up", "forget_conditionings", "interrupt", "open_sampling", "sampled"]

logger = logging.getLogger("loratorio")

LABEL = "loratorio_label"
REGIONAL = ("area", "mask", "timestep_start", "timestep_end")


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


def text_in(entry: dict) -> Any:
    """The text of an entry of the host's: token vectors ``[B, tokens, C]``, or a dict of them and a pooled vector."""
    if "pooled_output" not in entry:
        return entry["cross_attn"]
    return {"crossattn": entry["cross_attn"], "vector": entry["pooled_output"]}


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
    """What the host is about to evaluate: ``B`` images, an entry for every AND part and at most one unconditional.

    ``x`` is ``[B, C, H, W]``, or ``[B, C, 1, H, W]`` for models of videos.
    """

    model: Any
    cond: list[dict]
    uncond: list[dict]
    x: Tensor
    sigma: Tensor
    options: dict

    @property
    def entries(self) -> list[dict]:
        return [*self.cond, *self.uncond]

    @property
    def images(self) -> Tensor:
        """``x`` as images: ``[B, C, H, W]``."""
        return self.x if self.x.ndim == 4 else self.x.squeeze(2)

    def predicted_noise(self, denoised: Tensor) -> Tensor:
        """The noise that x0 predictions ``[..., B, C, H, W]`` mean; for flow models, the velocity."""
        return (self.images - denoised) / self.sigma.view(-1, 1, 1, 1)

    def of_images(self, rows: Tensor) -> Tensor:
        """The AND parts' predictions ``[J * B, C, H, W]`` as the host adds them up, in the shape of ``x``."""
        strengths = torch.tensor([entry.get("strength", 1.0) for entry in self.cond]).to(rows)
        parts = rows.unflatten(0, (len(self.cond), -1))
        return torch.einsum("j, jbchw -> bchw", strengths / strengths.sum(), parts).view_as(self.x)


class ForgeSampling:
    """Composition in one sampling pass.

    Wherever a LoRA's index is asked for, `Plan.BASE` stands for none of them and `Plan.MERGED` for all at once.
    """

    def __init__(
        self,
        generation: Generation,
        networks: ModuleType,
        loras: Sequence[Lora],
        claims: Sequence[Claim],
        everywhere: Sequence[Lora],
    ):
        self.generation, self.p, self.networks = generation, generation.p, networks
        self.settings, self.everywhere = generation.settings, everywhere
        self.method = method_from(self.settings)
        self.steps = 0
        self.calls: BatchedCalls | None = None
        self.at_work = False
        self.asked: int | None = None
        """The sampler's model call that was composed last."""
        self.progress: Progress | None = None
        model = self.p.sd_model
        unet = model.forge_objects.unet.clone()
        self.backend = backend_of(unet)
        self.backend.check(self.p)
        self.key = (model, *loras, *everywhere)
        self.base = self.having(model, everywhere)
        loaded = generation.once(("loras", *self.key), lambda: self.load(model, loras))
        of = {lora.file: claim for lora, claim in zip(loras, claims)}
        self.loras = loaded
        self.claims = [of[each.lora.file] for each in loaded]
        # Made once for all batches that share them; and a host may announce a hires pass more than once.
        self.texts, self.speaks = generation.once(
            ("texts", *self.key, *prompts_of_pass(self.p)), lambda: self.encode_all(model)
        )
        host, original = Patched.by_the_host(model), Patched.original(model)
        self.backend.strip(unet, host.unet, original.unet, self.base.unet)
        setattr(unet, self.backend.store, Watched(getattr(unet, self.backend.store), self.refuse_change))
        unet.add_extra_preserved_memory_during_sampling(room_for(loras))
        self.hooked = ExitStack()
        self.hooked.callback(self.replace_evaluation(unet))
        self.hooked.enter_context(alone(unet.model, lambda: self.at_work, self.refuse_call, self.patcher_options))
        model.forge_objects.unet = unet

    @property
    def tally(self) -> Tally | None:
        return None if self.calls is None else self.calls.tally

    def close(self) -> None:
        self.hooked.close()
        if self.progress is not None:
            self.progress.close()

    def patcher_options(self) -> dict:
        """The UNet patcher's options as they are now; scripts that are run later put others in its place."""
        return self.p.sd_model.forge_objects.unet.model_options

    def refuse_call(self, who: str) -> Exception:
        """The error for a call of the model that is not the composition's."""
        error = UnsupportedError(
            f"LoRAtorio: {who} evaluates the model by itself, and what its share in a composition would be is not "
            "known; switch it off, or LoRAtorio"
        )
        self.generation.fail(error)
        return self.generation.error

    def refuse_change(self, who: str) -> None:
        """Somebody would change the prompt's LoRAs while sampling runs."""
        self.generation.fail(
            UnsupportedError(
                f"LoRAtorio: {who} changes LoRAs while the image is made, which cannot be composed in this WebUI; say "
                "steps=0-0.5 in the LoRA's tag in its place, or switch off LoRAtorio"
            )
        )

    def replace_evaluation(self, unet: Any):
        def evaluation(model, cond, uncond, x, sigma, options):
            """A function and no method: the host deep-copies what it finds in a patcher's options."""
            try:
                if self.generation.error is not None:  # somebody else has swallowed it
                    raise self.generation.error
                return self.compose(HostStep(model, cond, uncond or [], x, sigma, options))
            except Exception as error:
                self.generation.fail(error)
                raise self.generation.error from error

        return self.backend.replace_evaluation(unet, evaluation)

    # --- before sampling ---

    def having(self, model: Any, loras: Sequence[Lora]) -> Patched:
        """The model with LoRAs that are in every pass."""
        return self.generation.once(
            ("base", model, *loras), lambda: Patched.original(model).having(loras, self.networks, self.backend)
        )

    def load(self, model: Any, loras: Sequence[Lora]) -> list[LoadedLora]:
        """The LoRAs, each by itself beside those that are in every pass; those of the pool that cannot take part are
        left out, and why is noted."""
        loaded = []
        for lora, name in zip(loras, labels(loras)):
            stop_where_asked()
            try:
                each = load(lora, name, self.base, self.networks, self.backend)
            except Exception as error:  # whatever a file may hold
                if not lora.pooled:
                    raise
                logger.warning("%s cannot be read: %s", lora.file, error, exc_info=True)
                leave_out(self.generation, name, f"its file cannot be read ({type(error).__name__})")
                continue
            if not each.fits and lora.pooled:
                leave_out(self.generation, name, "made for another model, it has none of this one's layers")
                continue
            if not each.fits:
                self.generation.note(f"{name} has no layer of this model")
            loaded.append(each)
        POOL_FILES.keep_used()
        of_the_prompt = [each for each in loaded if not each.lora.pooled]
        by_the_host = self.having(model, [lora for lora in self.everywhere if not lora.pooled])
        held = at_present_strengths(of_the_prompt, by_the_host, model, self.backend)
        return [*held, *(each for each in loaded if each.lora.pooled)]

    def encode_all(self, model: Any) -> tuple[list[Any], list[bool]]:
        """Schedules of conditionings, positive and negative: each LoRA's, then the host's own (`HOST`), that of a
        merged step (`Plan.MERGED`), and last the base's (`Plan.BASE`); and which LoRAs change the base's.

        None for all of them where no LoRA changes the text encoders, but those that the host has in them by itself:
        then the host's own are everybody's, and nothing is encoded again. (For edit models the images that they refer
        to are a part of it.)
        """
        original, host = Patched.original(model), Patched.by_the_host(model)
        together = host.having([lora for lora in self.everywhere if lora.pooled], self.networks, self.backend)
        unheard = self.backend.patches(together.clip.patcher, host.clip.patcher)
        speaking = [lora for lora in self.loras if lora.clip is not None]
        if not speaking and not unheard:
            return [None] * (len(self.loras) + 3), [False] * len(self.loras)

        def encoded(clip: Any) -> tuple[Any, Any]:
            with text_encoder(model, clip):
                return encode(self.p)

        with self.backend.encoding(model):
            base = encoded(self.base.clip)
            alone = [base if lora.clip is None else encoded(lora.clip) for lora in self.loras]
            in_prompt = [text for lora, text in zip(self.loras, alone) if lora.clip and not lora.lora.pooled]
            if self.base.clip is original.clip and len(in_prompt) < 2:
                hosts = in_prompt[0] if in_prompt else base
            else:
                hosts = encoded(host.clip)
            merged = encoded(together.clip) if unheard else hosts
        for index, (lora, text) in enumerate(zip(self.loras, alone)):
            if text is base or is_finite_text(text):
                continue
            if not lora.lora.pooled:
                raise not_finite(lora)
            alone[index] = base  # its other half is refused, or left out, when the branches are made
        speaks = [text is not base and not all(map(same_text, text, base)) for text in alone]
        return [*alone, hosts, merged, base], speaks

    # --- while sampling ---

    def isolate(self, model: Any, images: int) -> tuple[list[bool], Isolation, BatchedCalls]:
        """Which LoRAs do anything, and the branches of all for the model as it is now, with the prompt's LoRAs taken
        from its weights; a LoRA of the pool that does not fit does nothing."""
        made = [unet_lora(self.generation, self.backend, model, lora) for lora in self.loras]
        if not any(made):
            tell_of_none(self.generation)
        acts = [each is not None and (each.acts or speaks) for each, speaks in zip(made, self.speaks)]
        merged = {}
        if self.settings.start > 0 or self.settings.end < 1:
            of_the_prompt = joined([lora.patches for lora in self.loras if not lora.lora.pooled])
            merged, _ = branches(model, of_the_prompt, self.backend.weight, self.backend.merge)
        # So that Plan.MERGED and Plan.BASE are indices like any other:
        by_index = [*((each or NOTHING).branches for each in made), merged, {}]
        names = {name for each in by_index for name in each}
        isolation = Isolation({name: model.get_submodule(name.rpartition(".")[0]) for name in names}, by_index)
        limit = max(1, ROWS_OF_A_POOL // images) if self.settings.pool else None
        return acts, isolation, BatchedCalls(isolation.forget, limit)

    def compose(self, step: HostStep) -> tuple[Tensor, Tensor | None]:
        """The step's conditional and unconditional x0, in the shape of ``x``."""
        self.steps += 1
        if step.x.ndim == 5 and step.x.shape[2] > 1:
            raise UnsupportedError(f"LoRAtorio: videos are not supported ({step.x.shape[2]} frames were asked for)")
        if any(key in entry for entry in step.entries for key in REGIONAL):
            raise UnsupportedError("LoRAtorio: conditions for a region or a part of the steps are not supported")
        # Not before the first model call: only then has the host taken its own LoRAs from the weights.
        acts, self.isolation, self.calls = self.generation.once(
            ("isolation", *self.key), lambda: self.isolate(step.model, len(step.x))
        )
        denoiser = self.p.sampler.model_wrap_cfg
        if denoiser.step == self.asked:
            others = step.options.get("conditioning_modifiers", [])
            raise self.refuse_call(named(dict.fromkeys(map(name_of, others))))
        self.asked = denoiser.step
        acting = [index for index, acting in enumerate(acts) if acting]
        plan = plan_step(self.generation, self.method, denoiser, self.claims, acting)
        self.tell_progress(step, denoiser, acting)
        if plan.host != Plan.MERGED:
            check_texts(self.generation, self.speaks)
        self.meet_company(step, denoiser.step)
        self.at_work = True
        try:
            composed = self.predict(step, plan)
        finally:
            self.at_work = False
        return step.of_images(composed.cond), None if composed.uncond is None else composed.uncond.view_as(step.x)

    def tell_progress(self, step: HostStep, denoiser: Any, acting: Sequence[int]) -> None:
        """A step begins; its rows are the host's entries."""
        if self.progress is None:
            claims = [self.claims[index] for index in acting]
            rows = rows_by_step(self.settings, claims, denoiser.total_steps, len(step.cond), len(step.uncond))
            self.progress = Progress(rows)
        self.progress.begin(denoiser.step)

    def meet_company(self, step: HostStep, number: int) -> None:
        """Look who else takes part, and take each LoRA's text for this step, with what others have put around the
        host's."""
        if self.steps == 1:
            self.check_controls(step)
        self.company = Company(step.model, step.options, step.entries)
        if self.company:
            self.generation.note(f"beside {self.company} one LoRA after the other was evaluated, which takes longer")
        self.text: dict[int, list[Any]] = {}
        if self.texts[HOST] is None:
            return
        given = [text_in(entry) for entry in step.entries]
        hosts = text_at_step(self.texts[HOST], number)
        try:
            affixes = [Affix.between(self.comparable(own, other), other) for own, other in zip(hosts, given)]
        except ValueError as error:
            suspects = named(dict.fromkeys([*self.company.names, *callers_of("cfg_denoiser")]))
            raise UnsupportedError(
                f"LoRAtorio: {suspects} changes the prompt's conditioning while the image is made, and what it would "
                "make of a single LoRA's is not known; switch it off, or LoRAtorio"
            ) from error
        others = [*range(len(self.loras)), Plan.BASE]
        others += [Plan.MERGED] if self.texts[Plan.MERGED] is not self.texts[HOST] else []
        for index in others:
            texts = text_at_step(self.texts[index], number)
            self.text[index] = [affix.around(text) for affix, text in zip(affixes, texts)]

    @staticmethod
    def check_controls(step: HostStep) -> None:
        """Raises `UnsupportedError` for a control model in which the host's LoRAs would act, too."""
        for control in controls_of(step.entries):
            if made_of(control, step.model):
                raise UnsupportedError(
                    f"LoRAtorio: {name_of_control(control)} is made of the model's own weights with all LoRAs in them, "
                    "and what it would be for a single one is not known; switch it off, or LoRAtorio"
                )

    @staticmethod
    def comparable(own: Any, given: Any) -> Any:
        """A conditioning of ours with just what an entry of the host's tells of its own."""
        return {key: own[key] for key in given} if isinstance(given, dict) else own

    def predict(self, step: HostStep, plan: Plan) -> ComposedStep:
        """One prediction an AND part and image, ``[J * B, C, H, W]``, and an unconditional one an image."""
        parts, everything = len(step.cond), len(step.entries)
        one_by_one = bool(self.company) or self.is_padded(step) or self.backend.counts_rows()
        each = everything if plan.uncond or one_by_one else parts
        host_rows = [(plan.host, entry) for entry in range(everything)]
        isolated = [[(lora, entry) for entry in range(each)] for lora in plan.isolated]
        if one_by_one:
            host = self.evaluate(step, host_rows)
            if self.company:
                self.check_even_handed(step, host_rows, host)
            alone = [self.evaluate(step, rows) for rows in isolated]
        else:
            rows = [*host_rows, *(row for rows in isolated for row in rows)]
            host, *alone = self.calls(rows, lambda batch: self.evaluate(step, batch)).split(
                [everything, *[each] * len(isolated)]
            )
        cond, uncond = host[:parts].flatten(0, 1), host[parts] if step.uncond else None
        if plan.host == Plan.MERGED:
            return ComposedStep(cond, uncond)
        by_lora = torch.stack(alone) if alone else host.new_empty(0, each, *host.shape[1:])
        image_of_row = tuple(range(len(step.x))) * parts
        predictions = Predictions(
            host_cond=cond,
            host_uncond=uncond,
            cond=by_lora[:, :parts].flatten(1, 2),
            uncond=by_lora[:, parts] if plan.uncond and step.uncond else None,
            eps_base=step.predicted_noise(host[:parts]).flatten(0, 1),
            eps=step.predicted_noise(by_lora[:, :parts]).flatten(1, 2),
            image_of_row=image_of_row,
            gain=-step.sigma[0],
            **claimed(plan, self.claims, step.images, image_of_row),
        )
        composed = self.method.combine(predictions)
        names = [self.loras[member].name for member in plan.members]
        self.generation.record(names, composed.weights, predictions.image_of_row)
        return composed

    def is_padded(self, step: HostStep) -> bool:
        """Whether the host repeats some prompts until all in a batch are of one length, and the model sees it: then a
        row depends on which others are in its batch. (Cross-attention does not see repetitions.)"""
        model = self.p.sd_model
        cross_attends = getattr(model, "is_sd1", False) or getattr(model, "is_sdxl", False)
        texts = [*map(text_in, step.entries), *(text for texts in self.text.values() for text in texts)]
        return not cross_attends and len(set(map(token_count, texts))) > 1

    def check_even_handed(self, step: HostStep, rows: Sequence[Row], known: Tensor) -> None:
        """Now and then (in model calls 1, 2, 4, 8 ...): what the same rows make must not depend on how often somebody
        was asked. (The host's own token merging draws its tokens by lot.)"""
        if self.steps & (self.steps - 1) or self.p.get_token_merging_ratio():
            return
        again = self.evaluate(step, rows)
        if (again - known).float().norm() > TELLING * known.float().norm():
            raise UnsupportedError(
                f"LoRAtorio: {self.company} makes something else of a step when it is asked again, so LoRAs cannot be "
                "evaluated one after the other; switch it off, or LoRAtorio"
            )

    def entry(self, step: HostStep, lora: int, index: int) -> dict:
        """One of the host's entries with the text that this LoRA's encoder makes of it."""
        texts = self.text.get(lora)
        return step.entries[index] if texts is None else with_text(step.entries[index], texts[index])

    def evaluate(self, step: HostStep, chunks: Sequence[Row]) -> Tensor:
        """``[len(chunks), B, C, H, W]``: x0 of each chunk, which is a LoRA and one of the host's entries."""
        others = step.options.get(WRAPPER)
        results: dict[int, Tensor] = {}

        def wrapper(apply_model, args):
            numbers = [label.number for label in args["c"].pop(LABEL)]
            group = [chunks[number][0] for number in numbers]

            asked = []

            def isolated(x, sigma, **conditions):
                asked.append(len(x))
                stop_where_asked()
                with self.isolation.rows(group if len(set(group)) > 1 else group[:1]):
                    return apply_model(x, sigma, **conditions)

            if others is not None:
                output = others(isolated, args)
                if not asked:
                    raise UnsupportedError(
                        f"LoRAtorio: {self.company} leaves out calls of the model and goes by earlier ones, which were "
                        "other LoRAs'; switch it off, or LoRAtorio"
                    )
            else:
                output = isolated(args["input"], args["timestep"], **args["c"])
            results.update(zip(numbers, output.chunk(len(numbers))))
            self.progress.evaluated(len(numbers))
            return output

        cond, uncond = [], []
        for label, (lora, index) in enumerate(chunks):
            entry = self.entry(step, lora, index)
            conds = entry["model_conds"] | {LABEL: Label(label)}
            (cond if index < len(step.cond) else uncond).append(entry | {"model_conds": conds})
        options = step.options | {WRAPPER: wrapper}
        self.backend.evaluate(step.model, cond, uncond or None, step.x, step.sigma, options)
        return torch.stack([results[label].view_as(step.images) for label in range(len(chunks))])


# --- entering ---------------------------------------------------------------------------------------------------------


def check_supported(p: Any) -> None:
    """Raises `UnsupportedError` for what cannot be composed here."""
    if getattr(shared.opts, "dynamic_clip_skip_enabled", False):
        raise UnsupportedError("LoRAtorio: dynamic clip skip is not supported")
    backend_of(p.sd_model.forge_objects_original.unet).check(p)


def tell_of_the_pass(generation: Generation) -> None:
    """Note what the pass at hand does without."""
    p = generation.p
    if getattr(p, "refiner_checkpoint_info", None) is not None:
        generation.note("from the refiner on the LoRAs act merged")
    guidance = p.hr_cfg if getattr(p, "is_hr_pass", False) else p.cfg_scale
    if guidance == 1 and generation.settings.method == "loratorio":
        generation.note("no unconditional pass at CFG scale 1, so guidance is not re-centred")


@unless_stopped
def open_sampling(generation: Generation) -> ForgeSampling | None:
    """Composition for the sampling pass that is about to begin, or None where there is nothing to compose."""
    if generation.settings.method == "merge":
        tell_of_merge(generation)
        return None
    check_supported(generation.p)
    networks = lora_extension()
    active, names = active_loras(generation.p, networks)
    tell_of_loras(generation, names, "at what the WebUI makes of its multipliers")
    found = [*active, *pooled_loras(generation, active)]
    claims = dict(zip(found, claims_on(generation, [lora.listed for lora in found])))
    everywhere = [lora for lora, claim in claims.items() if claim.base]
    loras = [lora for lora in found if lora not in everywhere]
    if not loras:
        tell_of_none(generation)
        return None
    tell_of_the_pass(generation)
    return ForgeSampling(generation, networks, loras, [claims[lora] for lora in loras], everywhere)


def check(generation: Generation) -> None:
    """Raise what speaks against a composition before any script has acted: the pool's entries, the prompts' tags, the
    kind of model."""
    if generation.settings.method == "merge":
        return
    pool, tagged = pool_of(generation, ()), check_tags(generation.p)
    if pool or tagged:
        check_supported(generation.p)
