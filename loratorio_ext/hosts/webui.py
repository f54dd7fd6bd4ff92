"""What every Stable Diffusion WebUI has alike: its registry of LoRAs, its prompts, its count of steps."""

import os
import sys
from collections.abc import Iterable, Sequence
from copy import copy
from types import ModuleType
from typing import Any

from modules import extra_networks, processing, shared

from loratorio_ext.core import Method, Plan
from loratorio_ext.errors import SettingsError, UnsupportedError
from loratorio_ext.generation import Generation
from loratorio_ext.pool import Listed, Member, path_below, resolve


def lora_extension() -> ModuleType:
    """The module ``networks`` of the host's Lora extension; raises `UnsupportedError` when that is switched off."""
    lora = extra_networks.extra_network_registry.get("lora")
    networks = getattr(sys.modules.get(type(lora).__module__), "networks", None)
    if networks is None:
        raise UnsupportedError("LoRAtorio: the WebUI's built-in Lora extension is needed, and it is disabled")
    return networks


def listed_loras() -> list[Listed]:
    """Every LoRA that the host lists, sorted by path."""
    networks = lora_extension()
    folder = os.path.abspath(shared.cmd_opts.lora_dir)
    listed = []
    for name, entry in list(networks.available_networks.items()):
        path = path_below(os.path.abspath(entry.filename), folder)
        ambiguous = entry.alias.lower() in networks.forbidden_network_aliases
        listed.append(Listed(name, entry.filename, path, "" if ambiguous else entry.alias, entry.metadata))
    return sorted(listed, key=lambda lora: lora.path)


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
    return [member for member in members if member.lora.file not in taken]


def leave_out(generation: Generation, name: str, why: str) -> None:
    """Say that a LoRA of the pool takes no part."""
    generation.note(f"{name} is left out of the pool: {why}")


def asked_loras(p: Any) -> list[Any]:
    """The ``<lora:...>`` tags of the prompt that the pass at hand uses, as the host has parsed them."""
    asked = p.hr_extra_network_data if getattr(p, "is_hr_pass", False) else p.extra_network_data
    return [params for params in asked.get("lora", []) if params.positional]


def tell_of_loras(generation: Generation, loaded: Sequence[str]) -> None:
    """Note what is otherwise than the prompt asks: ``loaded`` are the names the host found, in prompt order."""
    named = dict.fromkeys(params.positional[0] for params in asked_loras(generation.p))
    missing = [name for name in named if name not in loaded]
    if missing:
        generation.note(f"composed without {', '.join(missing)}: not found, or it failed to load")
    if len(set(loaded)) < len(loaded):
        generation.note("a LoRA named more than once takes part once, at its last multiplier")


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
    second_pass = getattr(p, "is_hr_pass", False)
    data = p.hr_extra_network_data if second_pass else p.extra_network_data
    return tuple((kind, tuple(tuple(params.items) for params in tags)) for kind, tags in data.items())


def encode(p: Any) -> tuple[Any, Any]:
    """The prompts' schedules of conditionings, positive and negative, with the text encoders as they are now.

    The host's own code computes them, on a copy of ``p`` with caches of its own: the host's caches know a
    conditioning by its prompt alone, and must never hold one that was made with other LoRAs than the prompt's.
    """
    own = copy(p)
    own.cached_c, own.cached_uc, own.cached_hr_c, own.cached_hr_uc = ([None, None] for _ in range(4))
    if getattr(p, "is_hr_pass", False):
        own.hr_c = None
        own.calculate_hr_conds()
        return own.hr_c, own.hr_uc
    processing.StableDiffusionProcessing.setup_conds(own)
    return own.c, own.uc


def interrupt() -> None:
    """Make the host stop sampling soon."""
    shared.state.interrupt()


def interrupted() -> bool:
    """Whether the user, or an error of ours, has told the host to stop."""
    return bool(shared.state.interrupted or shared.state.skipped)


def clean_up(p: Any) -> None:
    """Tell every script that the generation is over, as the host does not after an error: they put back what they have
    hooked into it."""
    if p.scripts is not None:
        p.scripts.postprocess(p, processing.Processed(p, []))


def forget_conditionings(p: Any) -> None:
    """Empty the host's caches of conditionings: ``p``'s own and those of the classes, which later requests share."""
    for name in ("cached_c", "cached_uc", "cached_hr_c", "cached_hr_uc"):
        for holder in (p, *type(p).__mro__):
            cache = vars(holder).get(name)
            if isinstance(cache, list):
                cache[:] = [None] * len(cache)


def plan_step(generation: Generation, method: Method, denoiser: Any, n: int, members: Sequence[int]) -> Plan:
    """The plan for the denoiser's next model call; outside the window from start to end the LoRAs act merged."""
    inside = generation.settings.composes_at(denoiser.step / denoiser.total_steps)
    return method.plan(denoiser.step, n, members) if inside else Plan(host=Plan.MERGED)
