"""Forge's LoRAs: which ones a pass has, and what each of them adds to the UNet's layers and to the text encoders."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import Any

from torch import nn

from loratorio_ext.errors import FileFormatError, UnsupportedError
from loratorio_ext.generation import Generation
from loratorio_ext.hosts.forge_backends import Backend
from loratorio_ext.hosts.forge_patches import Patches, as_held, branches, strengths_of
from loratorio_ext.hosts.neighbours import callers_of, named
from loratorio_ext.hosts.pool_files import POOL_FILES
from loratorio_ext.hosts.webui import asked_loras, leave_out, listed, pool_of
from loratorio_ext.isolation import Branch, in_main_memory, is_finite, is_inert
from loratorio_ext.pool import Listed

logger = logging.getLogger("loratorio")

ROOM_FOR_A_POOL = 2**30


@dataclass(frozen=True)
class Lora:
    """A LoRA of prompt or pool: its listing, and its multipliers ``(unet, text)`` as often as it is named."""

    listed: Listed
    strengths: tuple[tuple[float, float], ...]
    pooled: bool = False

    @property
    def file(self) -> str:
        return self.listed.file


def on_disk(networks: ModuleType, name: str) -> Any:
    """The host's entry for a LoRA by the name in a prompt, or None."""
    ambiguous = name.lower() in networks.forbidden_network_aliases
    return (networks.available_networks if ambiguous else networks.available_network_aliases).get(name)


def active_loras(p: Any, networks: ModuleType) -> tuple[list[Lora], list[str]]:
    """The prompt's LoRAs that there are, in prompt order, each file once; and the names that they go by there,
    repetitions included.

    Read from the prompt, since a host may drop all LoRAs when it does not find one.
    """
    found: dict[str, Lora] = {}
    names = []
    for params in asked_loras(p):
        name, *numbers = params.positional
        entry = on_disk(networks, name)
        if entry is None:
            continue
        text = float(params.named.get("te", numbers[0] if numbers else 1.0))
        unet = float(params.named.get("unet", numbers[1] if len(numbers) > 1 else text))
        known = found.setdefault(entry.filename, Lora(listed(entry), ()))
        found[entry.filename] = replace(known, strengths=(*known.strengths, (unet, text)))
        names.append(name)
    return list(found.values()), names


def pooled_loras(generation: Generation, active: Sequence[Lora]) -> list[Lora]:
    """The pool's LoRAs beside those of the prompt."""
    members = pool_of(generation, [lora.file for lora in active])
    return [Lora(each.lora, ((each.unet, each.text),), pooled=True) for each in members]


def labels(loras: Sequence[Lora]) -> list[str]:
    """Their names, and where two share one, their paths below the LoRA folder."""
    names = [lora.listed.name for lora in loras]
    return [lora.listed.path if names.count(name) > 1 else name for name, lora in zip(names, loras)]


def room_for(loras: Sequence[Lora]) -> int:
    """Bytes to ask the host to keep free for the LoRAs' matrices; a pool's are only partly there at any time.

    The host takes files that it cannot read out of the way.
    """
    of_the_prompt, of_the_pool = (
        sum(os.path.getsize(lora.file) for lora in loras if lora.pooled is pooled and os.path.exists(lora.file))
        for pooled in (False, True)
    )
    return of_the_prompt + min(of_the_pool, ROOM_FOR_A_POOL)


# --- as the host loads them -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Patched:
    """Patchers of a model's UNet and text encoders with some LoRAs in them."""

    unet: Any
    clip: Any

    @classmethod
    def original(cls, model: Any) -> "Patched":
        return cls(model.forge_objects_original.unet, model.forge_objects_original.clip)

    @classmethod
    def by_the_host(cls, model: Any) -> "Patched":
        """With the prompt's LoRAs, as the host has loaded them."""
        return cls(model.forge_objects_after_applying_lora.unet, model.forge_objects_after_applying_lora.clip)

    def having(self, loras: Sequence[Lora], networks: ModuleType, backend: Backend) -> "Patched":
        """These with more LoRAs; what several multipliers of one come to is up to the host."""
        unet, clip = self.unet, self.clip
        for lora in loras:
            read = partial(backend.read, networks, lora.file)
            weights = POOL_FILES.of((lora.file,), read) if lora.pooled else read()
            for strengths in lora.strengths:
                own = dict(weights)  # a host renames some in place
                unet, clip = backend.load(networks, unet, clip, own, strengths, lora.file)
        return Patched(unet, clip)


@dataclass(frozen=True)
class LoadedLora:
    """A LoRA's patches of the UNet, and text encoders (None: it does not change them) that have it beside those that
    are in every pass."""

    lora: Lora
    name: str
    patches: Patches
    text_patches: Patches
    clip: Any

    @property
    def fits(self) -> bool:
        """Whether it has a layer of this model, or is not meant to act."""
        return bool(self.patches or self.text_patches) or not any(map(any, self.lora.strengths))


def load(lora: Lora, name: str, base: Patched, networks: ModuleType, backend: Backend) -> LoadedLora:
    """A LoRA by itself, on ``base``."""
    alone = base.having([lora], networks, backend)
    text = backend.patches(alone.clip.patcher, base.clip.patcher)
    speaks = text and any(of_text for _, of_text in lora.strengths)
    return LoadedLora(lora, name, backend.patches(alone.unet, base.unet), text, alone.clip if speaks else None)


def at_present_strengths(
    loaded: Sequence[LoadedLora], everywhere: Patched, model: Any, backend: Backend
) -> list[LoadedLora]:
    """The prompt's LoRAs with the host's own patches of the UNet, those of the prompt that are in every pass being in
    ``everywhere``; raises `UnsupportedError` where others have changed more than can be told apart."""
    original, host = Patched.original(model), Patched.by_the_host(model)
    in_every_pass = backend.patches(everywhere.unet, original.unet)
    held = backend.patches(host.unet, original.unet)
    text = [backend.patches(everywhere.clip.patcher, original.clip.patcher), *(each.text_patches for each in loaded)]
    held_text = backend.patches(host.clip.patcher, original.clip.patcher)
    repeated = any(len(each.lora.strengths) > 1 for each in loaded)
    own = [each.patches for each in loaded]
    same = strengths_of([in_every_pass, *own]) == strengths_of([held]) or not (held or held_text)
    try:
        if held_text and strengths_of(text) != strengths_of([held_text]):
            raise ValueError("the text encoders' patches have other strengths than the prompt says")
        if not same and (in_every_pass or repeated):
            raise ValueError("which of the LoRAs was changed cannot be told")
        now = own if same else as_held(own, held)
    except ValueError as error:
        raise UnsupportedError(
            f"LoRAtorio: {named(callers_of('cfg_denoiser'))} has changed the LoRAs that the WebUI has loaded, and what "
            f"it would make of a single one is not known ({error}); switch it off, or LoRAtorio"
        ) from error
    return [replace(each, patches=patches) for each, patches in zip(loaded, now)]


# --- branches ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class UnetLora:
    """What a LoRA adds to the UNet, by parameter name; and whether it adds anything."""

    branches: dict[str, Branch]
    acts: bool


NOTHING = UnetLora({}, acts=False)


def not_finite(lora: LoadedLora) -> FileFormatError:
    """The error for a LoRA whose file holds NaN or infinite numbers."""
    return FileFormatError(
        f"LoRAtorio: {lora.name} holds numbers that are NaN or infinite: {lora.lora.file} is damaged"
    )


def unet_lora(generation: Generation, backend: Backend, model: nn.Module, lora: LoadedLora) -> UnetLora | None:
    """A LoRA's part in the model as it is now; None for a LoRA of the pool that is left out, and why is noted.

    Raises `FileFormatError` for numbers of a prompt's LoRA that are none.
    """
    fitting, misfits = branches(model, lora.patches, backend.weight, backend.merge)
    pooled = lora.lora.pooled
    for parameter, error in misfits.items():
        logger.warning("%s does not fit %s: %s", lora.name, parameter, error)
    if misfits and pooled:
        leave_out(generation, lora.name, f"made for another model, {len(misfits)} layers have other shapes")
        return None
    if misfits:
        generation.note(f"{lora.name} does not fit {len(misfits)} layers of this model")
    if not all(map(is_finite, fitting.values())):
        if not pooled:
            raise not_finite(lora)
        leave_out(generation, lora.name, "it holds numbers that are NaN or infinite")
        return None
    acts = not all(map(is_inert, fitting.values()))
    return UnetLora({name: in_main_memory(each) for name, each in fitting.items()} if pooled else fitting, acts)
