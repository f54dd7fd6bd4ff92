"""AUTOMATIC1111's LoRAs: its list of active ones, and what each adds to the UNet's layers, as branches."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

from modules import shared
from modules.sd_hijack import model_hijack
from torch import nn

from loratorio_ext.errors import FileFormatError, UnsupportedError
from loratorio_ext.generation import Generation
from loratorio_ext.hosts.neighbours import neighbour_at_work
from loratorio_ext.hosts.pool_files import POOL_FILES
from loratorio_ext.hosts.webui import leave_out, listed, pool_of, stop_where_asked
from loratorio_ext.isolation import Branch, Delta, LowRank, in_main_memory, is_finite, is_inert, scaled
from loratorio_ext.pool import Listed

logger = logging.getLogger("loratorio")


@contextmanager
def only(networks: ModuleType, active: Sequence[Any]) -> Iterator[None]:
    """While entered, the host's text encoders and UNet see just the LoRAs ``active``."""
    before = list(networks.loaded_networks)
    networks.loaded_networks[:] = active
    try:
        yield
    finally:
        networks.loaded_networks[:] = before


@contextmanager
def undisturbed(networks: ModuleType, fail: Callable[[Exception], None]) -> Iterator[None]:
    """While entered, nobody can load LoRAs in the middle of a model call: ``fail`` is told who tried.

    (The host swallows the exceptions of those who load.)
    """

    def refuse(*_: Any, **__: Any) -> None:
        error = UnsupportedError(
            f"LoRAtorio: {neighbour_at_work()} has LoRAs and prompts of its own for parts of the image, which cannot "
            "be composed; switch its regions off, or LoRAtorio"
        )
        fail(error)
        raise error

    load, networks.load_networks = networks.load_networks, refuse
    try:
        yield
    finally:
        networks.load_networks = load


@contextmanager
def embeddings_of(active: Sequence[Any], others: Sequence[Any]) -> Iterator[None]:
    """While entered, the prompt parser knows the embeddings that the files of ``active`` bring along, and none of those
    of ``others``.

    The host has made those of its own list known (``loaded``); those of a pool's LoRAs it has never heard of.
    """
    database, model = model_hijack.embedding_db, shared.sd_model
    known = [(name, each) for lora in others for name, each in lora.bundle_embeddings.items() if each.loaded]
    unheard = [(name, each) for lora in active for name, each in lora.bundle_embeddings.items() if each.loaded is None]
    added = []
    try:
        for name, _ in known:
            database.register_embedding_by_name(None, model, name)
        for name, embedding in unheard:
            fits = database.expected_shape in (-1, embedding.shape)
            if fits and name not in database.word_embeddings:
                database.register_embedding_by_name(embedding, model, name)
                added.append(name)
        yield
    finally:
        for name in added:
            database.register_embedding_by_name(None, model, name)
        for name, embedding in known:
            database.register_embedding_by_name(embedding, model, name)


def is_text_encoder(module: Any) -> bool:
    """Whether a LoRA's module sits in a text encoder, by the rule of the host's Lora extension."""
    return "transformer" in module.sd_key[:20]


def speaks_to_text_encoder(lora: Any) -> bool:
    """Whether a LoRA changes what the text encoders say at all."""
    return bool(lora.bundle_embeddings) or (
        lora.te_multiplier != 0 and any(map(is_text_encoder, lora.modules.values()))
    )


def low_rank(module: Any, layer: nn.Module) -> LowRank | None:
    """The branch of a LoRA or LoCon module, or None where its matrices do not have the layer's shape."""
    if getattr(module, "down_model", None) is None or module.dora_scale is not None or module.bias is not None:
        return None
    up, down = module.up_model.weight, module.down_model.weight
    mid = module.mid_model.weight if module.mid_model is not None else None
    dyn = module.network.dyn_dim
    if mid is None and dyn:
        up, down = up[:, :dyn], down[:dyn]
    shape = (up.shape[0], down.shape[1], *(down if mid is None else mid).shape[2:])
    if isinstance(layer, nn.Conv2d) and layer.weight.shape[1] == 9 and shape[1] == 4:
        # The first convolution of an inpainting model: the mask's and the masked image's channels are left alone.
        down = nn.functional.pad(down, (0, 0, 0, 0, 0, 5))
        shape = (shape[0], 9, *shape[2:])
    if shape != tuple(layer.weight.shape):
        return None
    return LowRank(down, up, module.calc_scale() * module.multiplier(), mid)


def full_delta(networks: ModuleType, module: Any, layer: nn.Module) -> Delta:
    """What the host itself would add to the layer's weight and bias; raises RuntimeError where it would fail, too."""
    networks.network_apply_weights(layer)  # with no LoRA listed: brings back the layer's own weight
    weight = layer.weight if getattr(layer, "fp16_weight", None) is None else layer.fp16_weight
    # In eight bits a small difference would vanish, which the low-rank file of the same difference does not suffer.
    dense = weight.float() if weight.element_size() == 1 else weight
    updown, bias = module.calc_updown(dense.to(layer.weight.device))
    if weight.ndim == 4 and weight.shape[1] == 9:
        updown = nn.functional.pad(updown, (0, 0, 0, 0, 0, 5))
    return Delta(updown.to(dense.dtype).expand(weight.shape), bias)


def unet_branches(networks: ModuleType, network: Any, layers: dict[str, nn.Module]) -> tuple[dict[str, Branch], list]:
    """A LoRA's branches for the UNet by layer name, and the layers that it does not fit."""
    branches, misfits = {}, []
    for name, module in network.modules.items():
        if is_text_encoder(module) or name not in layers:
            continue
        try:
            branches[name] = low_rank(module, layers[name]) or full_delta(networks, module, layers[name])
        except RuntimeError as error:
            misfits.append(name)
            logger.warning("%s does not fit layer %s: %s", network.name, name, error)
    return branches, misfits


@contextmanager
def bare(networks: ModuleType, everywhere: Sequence[Any]) -> Iterator[None]:
    """While entered, the model's weights are its own, or with the LoRAs that are in every pass, as soon as the host
    looks at them."""
    with only(networks, everywhere):
        if shared.opts.lora_functional:  # there the host leaves weights merged earlier as they are
            for layer in shared.sd_model.model.modules():
                networks.network_apply_weights(layer)
        yield


@dataclass(frozen=True)
class UnetLora:
    """What a LoRA adds to the UNet, by layer name; the layers that it does not fit; whether it adds anything."""

    branches: dict[str, Branch]
    misfits: list[str]
    acts: bool


def how_often(networks: ModuleType, lora: Any) -> int:
    """How often a LoRA acts where it acts: one that a prompt names twice is listed twice, and applied twice."""
    return max(1, networks.loaded_networks.count(lora))


def strength(lora: Any) -> tuple:
    """What a LoRA's branches depend on beside its file; extensions change it while sampling runs, and tell the host of
    changes to its modules by another name."""
    return lora.name, lora.unet_multiplier, lora.dyn_dim


def unet_lora(generation: Generation, networks: ModuleType, lora: Any, everywhere: Sequence[Any]) -> UnetLora:
    """A LoRA's part in the UNet that is loaded now, at its present strength, beside the LoRAs that are in every pass.

    Raises `FileFormatError` for numbers that are none.
    """

    times = how_often(networks, lora)

    def made() -> UnetLora:
        with bare(networks, everywhere):
            branches, misfits = unet_branches(networks, lora, shared.sd_model.network_layer_mapping)
        if not all(map(is_finite, branches.values())):
            raise not_finite(lora)
        if times > 1:
            branches = {name: scaled(branch, times) for name, branch in branches.items()}
        if generation.settings.pool:
            branches = {name: in_main_memory(branch) for name, branch in branches.items()}
        return UnetLora(branches, misfits, acts=not all(map(is_inert, branches.values())))

    key = (loaded_model(), strength(lora), times, *map(strength, everywhere))
    return generation.kept(("branches", lora), key, made)


def entry_of(lora: Any) -> Listed:
    """The host's listing of a LoRA's file."""
    return listed(lora.network_on_disk)


def not_finite(lora: Any) -> FileFormatError:
    """The error for a LoRA whose file holds NaN or infinite numbers."""
    file = lora.network_on_disk.filename
    return FileFormatError(f"LoRAtorio: {label(lora)} holds numbers that are NaN or infinite: {file} is damaged")


def label(lora: Any) -> str:
    """A LoRA's name as its file has it, whatever others call it meanwhile."""
    return lora.network_on_disk.name


def labels(loras: Iterable[Any]) -> list[str]:
    """Their names, and where two share one, their paths below the LoRA folder."""
    loras = list(loras)
    names = [label(lora) for lora in loras]
    return [entry_of(lora).path if names.count(name) > 1 else name for name, lora in zip(names, loras)]


def loaded_model() -> tuple[Any, Any]:
    """What is compared to notice that the host loaded another checkpoint (refiner), maybe into the same model."""
    return shared.sd_model, shared.sd_model.sd_checkpoint_info


def load_pool(generation: Generation, networks: ModuleType, active: Sequence[Any]) -> list[Any]:
    """The pool's LoRAs beside the ``active`` ones, loaded by the host's own code and unknown to the host.

    What cannot be read, and what was made for another model, is left out and named.
    """
    taken, loaded = [lora.network_on_disk.filename for lora in active], []
    for member in pool_of(generation, taken):
        stop_where_asked()
        name = member.lora.name
        entry = networks.available_networks[name]
        try:
            network = POOL_FILES.of((entry.filename, *loaded_model()), partial(networks.load_network, name, entry))
        except Exception as error:  # whatever a file may hold
            logger.warning("%s cannot be read: %s", member.lora.file, error, exc_info=True)
            leave_out(generation, name, f"its file cannot be read ({type(error).__name__})")
            continue
        network.te_multiplier, network.unet_multiplier, network.dyn_dim = member.text, member.unet, None
        if network.modules or network.bundle_embeddings:
            loaded.append(network)
        else:
            leave_out(generation, name, "made for another model, it has none of this one's layers")
    POOL_FILES.keep_used()
    return loaded


def fits(generation: Generation, networks: ModuleType, lora: Any, everywhere: Sequence[Any]) -> bool:
    """Whether a LoRA of the pool can take part; what was made for another model is left out and named."""
    try:
        misfits = unet_lora(generation, networks, lora, everywhere).misfits
    except FileFormatError:
        leave_out(generation, label(lora), "it holds numbers that are NaN or infinite")
        return False
    if misfits:
        leave_out(generation, label(lora), f"made for another model, {len(misfits)} layers have other shapes")
    return not misfits
