"""What every Stable Diffusion WebUI has alike: its registry of LoRAs, its prompts, its count of steps."""

import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from functools import wraps
from types import ModuleType
from typing import Any

from modules import extra_networks, processing, shared
from modules.sd_samplers_common import InterruptedException
from torch import Tensor

from loratorio_ext.claims import (
    Claim,
    Tagged,
    claims_of,
    heeding,
    in_words,
    left_out,
    not_heeded,
    places_and_shares,
)
from loratorio_ext.core import Method, Plan
from loratorio_ext.errors import SettingsError, UnsupportedError
from loratorio_ext.generation import Generation
from loratorio_ext.hosts.limits import most_bytes, most_files
from loratorio_ext.hosts.neighbours import asker, named
from loratorio_ext.parts import parts_of_tag
from loratorio_ext.pool import Listed, Member, check_size, path_below, resolve
from loratorio_ext.triggers import phrases, trigger_words

logger = logging.getLogger("loratorio")


def show_warnings() -> None:
    """Let the extension's warnings into the log of a host that takes errors only, unless the user has chosen that."""
    asked = getattr(shared.cmd_opts, "loglevel", None) or os.environ.get("SD_WEBUI_LOG_LEVEL")
    if not asked and logger.getEffectiveLevel() > logging.WARNING:
        logger.setLevel(logging.WARNING)


def lora_extension() -> ModuleType:
    """The module ``networks`` of the host's Lora extension; raises `UnsupportedError` when that is switched off."""
    lora = extra_networks.extra_network_registry.get("lora")
    networks = getattr(sys.modules.get(type(lora).__module__), "networks", None)
    if networks is None:
        raise UnsupportedError("LoRAtorio: the WebUI's built-in Lora extension is needed, and it is disabled")
    return networks


def folder_of(file: str) -> str:
    """The host's LoRA folder that holds a file; some hosts look for LoRAs in several."""
    folders = [shared.cmd_opts.lora_dir, *(getattr(shared.cmd_opts, "lora_dirs", None) or ())]
    holding = [folder for folder in map(os.path.abspath, folders) if file.startswith(os.path.join(folder, ""))]
    return max(holding, key=len, default=os.path.abspath(folders[0]))


def listed(entry: Any) -> Listed:
    """The host's entry for a file, as the pool's entries and the options know it."""
    networks = lora_extension()
    file = os.path.abspath(entry.filename)
    path = path_below(file, folder_of(file))
    ambiguous = entry.alias.lower() in networks.forbidden_network_aliases
    return Listed(entry.name, entry.filename, path, "" if ambiguous else entry.alias, entry.metadata)


def listed_loras() -> list[Listed]:
    """Every LoRA that the host lists, sorted by path."""
    entries = list(lora_extension().available_networks.values())
    return sorted(map(listed, entries), key=lambda lora: lora.path)


def list_anew() -> None:
    """Let the host look through its LoRA folders again."""
    lora_extension().list_available_networks()


def pool_of(generation: Generation, taken: Iterable[str]) -> list[Member]:
    """The LoRAs of the pool whose files are not ``taken`` already; raises `SettingsError` for what there is not.

    Like the host with the names in a prompt, it looks through the folders once more before it gives up.
    """
    settings, taken = generation.settings, set(taken)
    if not settings.pool:
        return []
    try:
        members = resolve(settings.pool, listed_loras(), settings.pool_weight)
    except SettingsError:
        list_anew()
        members = resolve(settings.pool, listed_loras(), settings.pool_weight)
    sized = [replace(member, lora=replace(member.lora, size=os.path.getsize(member.lora.file))) for member in members]
    check_size(sized, most_files(), most_bytes())
    return [member for member in members if member.lora.file not in taken]


def leave_out(generation: Generation, name: str, why: str) -> None:
    """Say that a LoRA of the pool takes no part."""
    generation.note(f"{name} is left out of the pool: {why}")


def asked_networks(p: Any) -> dict[str, list[Any]]:
    """The tags of the prompt that the pass at hand uses, by their kinds, as the host has parsed them."""
    return p.hr_extra_network_data if getattr(p, "is_hr_pass", False) else p.extra_network_data


def asked_loras(p: Any) -> list[Any]:
    """The ``<lora:...>`` tags among them."""
    return [params for params in asked_networks(p).get("lora", []) if params.positional]


def tell_of_loras(generation: Generation, loaded: Sequence[str], repeated: str) -> None:
    """Note what is otherwise than the prompt asks: ``loaded`` are the names the host found, in prompt order;
    ``repeated`` says how one acts that is named more than once."""
    named = dict.fromkeys(params.positional[0] for params in asked_loras(generation.p))
    missing = [name for name in named if name not in loaded]
    if missing:
        generation.note(f"composed without {', '.join(missing)}: not found, or it failed to load")
    if len(set(loaded)) < len(loaded):
        generation.note(f"a LoRA named more than once takes part once, {repeated}")


def check_tags(p: Any) -> bool:
    """Whether the prompts, as they are before any script has acted, name a LoRA; raises `SettingsError` for a part of a
    tag that is not allowed."""
    _, tags = extra_networks.parse_prompts([*p.all_prompts, *(getattr(p, "all_hr_prompts", None) or ())])
    for params in tags.get("lora", ()):
        parts_of_tag(params.items)
    return bool(tags.get("lora"))


def tell_of_merge(generation: Generation) -> None:
    """Note what tags ask for and the sum of the LoRAs' weights cannot have."""
    said = [parts_of_tag(params.items) for params in asked_loras(generation.p)]
    note = not_heeded("merge", map(Claim.of, [*said, *generation.settings.loras.values()]))
    if note:
        generation.note(note)


def tell_of_none(generation: Generation) -> None:
    """Note that neither prompt nor pool has a LoRA to compose."""
    generation.note("no LoRA is active, so there is nothing to compose")


def prompts_of_pass(p: Any) -> tuple:
    """What tells the prompts of the pass at hand from another's: first or second pass, prompts, negative prompts."""
    if getattr(p, "is_hr_pass", False):
        return True, tuple(p.hr_prompts), tuple(p.hr_negative_prompts)
    return False, tuple(p.prompts), tuple(p.negative_prompts)


def tags_of_pass(p: Any) -> tuple:
    """The prompts' tags of the pass at hand, as they stand there: with the prompts, what the host keeps conditionings
    by."""
    return tuple((kind, tuple(tuple(params.items) for params in tags)) for kind, tags in asked_networks(p).items())


def encode(p: Any) -> tuple[Any, Any]:
    """The prompts' schedules of conditionings, positive and negative, with the text encoders as they are now.

    The host's own code computes them, on a copy of ``p`` with caches of its own: the host's caches know a
    conditioning by its prompt alone, and must never hold one that was made with other LoRAs than the prompt's.
    """
    stop_where_asked()
    own = copy(p)
    own.cached_c, own.cached_uc, own.cached_hr_c, own.cached_hr_uc = ([None, None] for _ in range(4))
    if getattr(p, "is_hr_pass", False):
        own.hr_c = None
        own.calculate_hr_conds()
        return own.hr_c, own.hr_uc
    processing.StableDiffusionProcessing.setup_conds(own)
    return own.c, own.uc


@contextmanager
def attended(generation: Generation) -> Iterator[None]:
    """While entered, keep who has texts of its own encoded: the text encoders hold all of the prompt's LoRAs then."""
    model = shared.sd_model
    encode, own = model.get_learned_conditioning, vars(model).get("get_learned_conditioning")

    def look(*args, **kwargs):
        who = asker(processing.__file__)
        if who is not None:
            generation.encoders[who] = None
        return encode(*args, **kwargs)

    model.get_learned_conditioning = look
    try:
        yield
    finally:
        del model.get_learned_conditioning
        if own is not None:
            model.get_learned_conditioning = own


def check_texts(generation: Generation, speaks: Iterable[bool]) -> None:
    """Raises `UnsupportedError` where others have brought texts of their own and one of the LoRAs changes the text
    encoders (``speaks``)."""
    if generation.encoders and any(speaks):
        raise UnsupportedError(
            f"LoRAtorio: {named(generation.encoders)} gives the model texts of its own, which it has had encoded with "
            "all LoRAs at once; set the LoRAs' text encoder weight to 0 (te=0), or switch it off, or LoRAtorio"
        )


def interrupt() -> None:
    """Make the host stop sampling soon."""
    shared.state.interrupt()


def stop_where_asked() -> None:
    """End sampling here, as the host itself does only at the beginning of a step, where the user has pressed
    **Interrupt** or **Skip**."""
    if shared.state.interrupted or shared.state.skipped:
        raise InterruptedException


def unless_stopped(open_sampling: Callable[[Generation], Any]) -> Callable[[Generation], Any]:
    """``open_sampling``, which may be stopped: then there is nothing to compose, and the host makes no model call."""

    @wraps(open_sampling)
    def opened(generation: Generation) -> Any:
        try:
            return open_sampling(generation)
        except InterruptedException:
            return None

    return opened


def sampled(p: Any) -> bool:
    """Whether the host has called its model in the pass at hand; a sampler may have no step to make."""
    return p.sampler.model_wrap_cfg.step > 0


def clean_up(p: Any, early: bool = False) -> None:
    """Tell the scripts that the generation is over, as the host does not after an error: they put back what they have
    hooked into it. ``early``: only those that act before scripts process it."""
    if p.scripts is None:
        return
    processed = processing.Processed(p, [])
    if not early:
        p.scripts.postprocess(p, processed)
        return
    for script in p.scripts.ordered_scripts("before_process"):
        try:
            script.postprocess(p, processed, *p.script_args[script.args_from : script.args_to])
        except Exception:
            logger.exception("%s failed to clean up", script.filename)


def forget_conditionings(p: Any) -> None:
    """Empty the host's caches of conditionings: ``p``'s own and those of the classes, which later requests share."""
    for name in ("cached_c", "cached_uc", "cached_hr_c", "cached_hr_uc"):
        for holder in (p, *type(p).__mro__):
            cache = vars(holder).get(name)
            if isinstance(cache, list):
                cache[:] = [None] * len(cache)


def claims_on(generation: Generation, loras: Sequence[Listed]) -> list[Claim]:
    """Where, when and how much each of the active LoRAs may act, in their order; what cannot be so is noted."""
    items = {params.positional[0]: tuple(params.items) for params in asked_loras(generation.p)}
    of_tags = [next((items[name] for name in lora.names if name in items), ()) for lora in loras]
    tagged = [
        Tagged(lora, of_tag, words=phrases(trigger_words(lora.file, lora.metadata)), pooled=not of_tag)
        for lora, of_tag in zip(loras, of_tags)
    ]
    claims, unnamed = claims_of(generation.settings, tagged), generation.settings.unnamed
    _, prompts, _ = prompts_of_pass(generation.p)
    each = heeding(claims.each, [tag.pooled for tag in tagged], prompts, unnamed)
    generation.everywhere = dict.fromkeys(lora.name for lora, claim in zip(loras, each) if claim.base)
    notes = [f"{unused} is no LoRA of this image" for unused in claims.unused]
    notes += [*in_words(claims), not_heeded(generation.settings.method, each)]
    notes += left_out([lora.name for lora in loras], each)
    for note in filter(None, notes):
        generation.note(note)
    return each


def plan_step(
    generation: Generation, method: Method, denoiser: Any, claims: Sequence[Claim], acting: Iterable[int] | None = None
) -> Plan:
    """The plan for the denoiser's next model call, of the LoRAs with these ``claims``; ``acting`` are those that do
    anything at all (None: all). Outside the window from start to end the LoRAs act merged."""
    progress = denoiser.step / denoiser.total_steps
    if not generation.settings.composes_at(progress):
        return Plan(host=Plan.MERGED)
    acting = range(len(claims)) if acting is None else acting
    members = [index for index in acting if claims[index].acts_at(progress)]
    placed = any(claims[index].placed for index in members)
    return method.plan(denoiser.step, len(claims), members, placed)


def claimed(plan: Plan, claims: Sequence[Claim], like: Tensor, image_of_row: Sequence[int]) -> dict[str, Tensor | None]:
    """Where and how much the plan's members may act in latents of the size and on the device of ``like``, in rows of
    these images."""
    return places_and_shares([claims[index] for index in plan.members], like, image_of_row)
