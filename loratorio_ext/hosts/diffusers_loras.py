"""LoRA files for diffusers pipelines: which layers there are, and what a file's tensors are to them.

Names go through the conversions that diffusers loads LoRAs with, so that a file means here what it means there.
"""

import inspect
import math
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.utils.state_dict_utils import (
    DIFFUSERS_OLD_TO_PEFT,
    DIFFUSERS_TO_PEFT,
    convert_state_dict,
    convert_unet_state_dict_to_peft,
)
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from torch import Tensor, nn

from loratorio_ext.errors import UnsupportedError
from loratorio_ext.headers import read_header
from loratorio_ext.hosts.diffusers_files import adapter_config, check_lora
from loratorio_ext.hosts.lycoris import branch_of, by_layer, is_lycoris
from loratorio_ext.isolation import Branch, Delta, LowRank, is_finite, is_inert
from loratorio_ext.multipliers import check_multiplier
from loratorio_ext.parts import check_parts
from loratorio_ext.triggers import phrases, trigger_words

DENOISERS = ("unet", "transformer")
TEXT_ENCODER = "text_encoder"
"""A text encoder's name, or its beginning where there are several."""
PEFT_FILE = "base_model.model."
"""How keys begin in files that PEFT itself saves."""


@dataclass(frozen=True)
class LoRA:
    """One LoRA at its weights, as branches by layer name (``unet.…``, ``transformer.…``, ``text_encoder_2.…``).

    ``pooled``: it belongs to a pool, and takes no part where LoRAs act merged. ``parts``: checked parts of its claim
    (see `loratorio_ext.parts`), each of which wins over a composition's options, as what a tag says does in a WebUI.
    ``words``: its trigger words as far as its file tells them, by phrases.
    """

    name: str
    branches: Mapping[str, Branch]
    pooled: bool = False
    parts: Mapping[str, Any] = field(default_factory=dict)
    words: tuple[str, ...] = ()

    @property
    def speaks_to_text_encoder(self) -> bool:
        return any(name.startswith(TEXT_ENCODER) for name in self.branches)


def denoiser_of(pipe: Any) -> str:
    """The name of the one model that denoises."""
    components = {name for name, model in pipe.components.items() if isinstance(model, nn.Module)}
    found = [name for name in components if name.rstrip("_0123456789") in DENOISERS]
    if len(found) != 1:
        what = " and ".join(sorted(found)) or "none"
        raise UnsupportedError(
            f"LoRAtorio: {type(pipe).__name__} must have one UNet or transformer to denoise, has {what}"
        )
    return found[0]


def text_encoders_of(pipe: Any) -> list[str]:
    """The names of the pipeline's text encoders."""
    components = pipe.components.items()
    return [name for name, model in components if name.startswith(TEXT_ENCODER) and isinstance(model, nn.Module)]


def layers_of(pipe: Any) -> dict[str, nn.Module]:
    """The layers that a LoRA may change, by component and name."""
    return {
        f"{component}.{name}": layer
        for component in (denoiser_of(pipe), *text_encoders_of(pipe))
        for name, layer in getattr(pipe, component).named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm)) and layer.weight is not None
    }


def to_peft_names(component: str, model: nn.Module, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of one component under PEFT's names (``LAYER.lora_A.weight``), by the conversions diffusers loads with.

    Name by name, since training scripts write attention in one layout and what is beyond it in another.
    """
    if component in DENOISERS:
        return convert_unet_state_dict_to_peft(values)
    names = convert_state_dict(values, DIFFUSERS_OLD_TO_PEFT | DIFFUSERS_TO_PEFT)
    if hasattr(model, "text_model"):
        return names
    return {name.removeprefix("text_model."): value for name, value in names.items()}


def default_scale(metadata: Mapping[str, Any], layer: str, rank: int) -> float:
    """A layer's scale by the PEFT configuration that a file may bring along; 1 where there is none."""
    patterns = metadata.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(patterns, layer), metadata.get("lora_alpha", rank))
    return alpha / (math.sqrt(rank) if metadata.get("use_rslora") else rank)


def component_branches(
    component: str, model: nn.Module, values: Mapping[str, Any], metadata: Mapping[str, Any], weight: float
) -> dict[str, LowRank]:
    """The branches of one component from its matrices and alphas, named alike; `KeyError` for what is neither."""
    matrices: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    for name, value in to_peft_names(component, model, values).items():
        layer, _, part = name.partition(".lora_")
        if name.endswith(".alpha"):
            alphas[layer.removesuffix(".alpha")] = float(value)
        elif part in ("A.weight", "B.weight"):
            matrices.setdefault(layer, {})[part] = value
        else:
            raise KeyError(f"{component}.{name}")
    branches = {}
    for layer, pair in matrices.items():
        if len(pair) < 2:
            raise KeyError(f"{component}.{layer} has no lora_{'B' if 'A.weight' in pair else 'A'}")
        down, up = pair["A.weight"], pair["B.weight"]
        if min(down.ndim, up.ndim) < 2:
            raise ValueError(f"{component}.{layer}: down {tuple(down.shape)}, up {tuple(up.shape)}")
        rank = len(down)
        scale = alphas[layer] / rank if layer in alphas else default_scale(metadata, layer, rank)
        branches[f"{component}.{layer}"] = LowRank(down, up, scale * weight)
    return branches


def misfit(branch: Branch, layer: nn.Module | None) -> str | None:
    """Why a branch cannot belong to a layer, in words and shapes, or None where it can."""
    if isinstance(branch, Delta):
        if layer is None:
            return "no such layer"
        changed, own = tuple(branch.weight.shape), tuple(layer.weight.shape)
        return None if changed == own else f"change {changed}; layer {own}"
    down, up = tuple(branch.down.shape), tuple(branch.up.shape)
    if layer is None:
        return f"no such layer (LoRA: down {down}, up {up})"
    fan_out, *kernel = tuple(layer.weight.shape)
    if isinstance(layer, nn.Linear):  # a quantised weight has another shape
        fan_out, kernel = layer.out_features, [layer.in_features]
    narrows = list(down[1:]) == kernel or (down[1] == math.prod(kernel) and set(down[2:]) <= {1})
    rank = down[0]
    if branch.mid is not None:
        rank, inside, *window = branch.mid.shape
        narrows = [down[1], *window] == kernel and inside == down[0] and set(down[2:]) <= {1}
    widens = up[:2] == (fan_out, rank) and set(up[2:]) <= {1}
    if not narrows or not widens:
        return f"LoRA down {down}, up {up}; layer {tuple(layer.weight.shape)}"
    return None


def check_fit(name: str, branches: Mapping[str, Branch], pipe: Any) -> None:
    """Raises `UnsupportedError` unless every branch belongs to a layer of the pipeline's models."""
    layers = layers_of(pipe)
    misfits = {layer: why for layer, branch in branches.items() if (why := misfit(branch, layers.get(layer)))}
    if misfits:
        examples = "; ".join(f"{layer}: {why}" for layer, why in list(misfits.items())[:3])
        raise UnsupportedError(
            f"LoRAtorio: {name} was made for another architecture than this {type(pipe).__name__}: "
            f"{len(misfits)} of its {len(branches)} layers do not fit ({examples}{'; …' if len(misfits) > 3 else ''})"
        )


def load_lora(
    pipe: Any,
    path: str | Path,
    te_weight: float = 1.0,
    unet_weight: float | None = None,
    name: str | None = None,
    **parts: Any,
) -> LoRA:
    """A LoRA file (kohya's, diffusers', PEFT's or LyCORIS' layout) at its multipliers, for text encoders and for UNet
    or transformer; ``unet_weight`` None: the text encoders' too.

    ``parts``: where, when and how much it acts: ``at="left"``, ``share=2``, ``steps="0-0.5"``, ``mask``, ``base=True``;
    see `loratorio_ext.parts`. Layers to which it adds nothing are left out.

    Raises `FileError` for what is no safetensors file, is no LoRA or holds NaN or infinity, `UnsupportedError` for
    kinds that are not known and for LoRAs of another architecture, and `SettingsError` for multipliers that are no
    numbers in range and for bad parts.
    """
    path = Path(path)
    name = name or path.stem
    parts = check_parts(name, parts)
    unet_weight = te_weight if unet_weight is None else unet_weight
    te_weight = check_multiplier(te_weight, name, "te_weight")
    unet_weight = check_multiplier(unet_weight, name, "unet_weight")
    header = read_header(path)
    check_lora(header)
    config = adapter_config(header)
    tensors = load_file(path)
    try:
        if is_lycoris(tensors):
            branches = lycoris_branches(pipe, tensors, te_weight, unet_weight)
        else:
            branches = plain_branches(pipe, tensors, config, te_weight, unet_weight)
    except Exception as error:  # whatever diffusers stumbles over in names that are not what it expects
        what = textwrap.shorten(str(error.args[0] if error.args else error), 300, placeholder=" …")
        raise UnsupportedError(f"LoRAtorio: {name} holds what is no LoRA that diffusers can read: {what}") from error
    check_fit(name, branches, pipe)
    for layer, branch in branches.items():
        if not is_finite(branch):
            raise header.refused(f"is damaged: what it holds for {layer} is not finite (NaN or infinity)")
    words = phrases(trigger_words(str(path), header.metadata))
    return LoRA(name, {layer: each for layer, each in branches.items() if not is_inert(each)}, parts=parts, words=words)


def plain_branches(
    pipe: Any, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], te_weight: float, unet_weight: float
) -> dict[str, Branch]:
    """The branches of a file of plain LoRAs; `KeyError` for what is none."""
    values = read_by_diffusers(pipe, tensors)
    check_nothing_dropped(tensors, values)
    branches: dict[str, Branch] = {}
    for component in dict.fromkeys(key.partition(".")[0] for key in values):
        mine = without_prefix(values, component)
        if not mine or not component.startswith((*DENOISERS, TEXT_ENCODER)):
            raise KeyError(next(key for key in values if key.startswith(component)))
        weight = te_weight if component.startswith(TEXT_ENCODER) else unet_weight
        model = getattr(pipe, component, None)
        branches |= component_branches(component, model, mine, without_prefix(metadata, component), weight)
    return branches


def lycoris_branches(
    pipe: Any, values: Mapping[str, Tensor], te_weight: float, unet_weight: float
) -> dict[str, Branch]:
    """The branches of a file of other networks; `KeyError` for parts and layers that are not known."""
    if any(key.startswith(PEFT_FILE) for key in values):
        raise KeyError(f"{PEFT_FILE}…, PEFT's own layout, whose scale is in another file; LyCORIS' layout has it")
    parts = by_layer(values)
    names, layers = names_of_layers(pipe, parts), layers_of(pipe)
    return {
        names[key]: branch_of(
            key, mine, layers[names[key]], te_weight if names[key].startswith(TEXT_ENCODER) else unet_weight
        )
        for key, mine in parts.items()
    }


def names_of_layers(pipe: Any, keys: Iterable[str]) -> dict[str, str]:
    """The pipeline's names of layers, by a file's; `KeyError` for one that names no layer, or several.

    Names are the pipeline's own, dotted or flat; or what its reader of LoRAs makes of them, which is asked with a LoRA
    of these layers in which the numbers tell them apart.
    """
    layers = layers_of(pipe)
    known = {name: name for name in layers}
    for name in layers:
        component, _, rest = name.partition(".")
        flat = rest.replace(".", "_")
        if component.startswith(TEXT_ENCODER):
            number = component.removeprefix(TEXT_ENCODER).removeprefix("_")
            prefixes = [f"lora_te{number}"] if number else ["lora_te", "lora_te1"]
            flat = f"text_model_{flat.removeprefix('text_model_')}"
        else:
            prefixes = ["lycoris", "lora_unet", "lora_transformer"]
        known |= {f"{prefix}_{flat}": name for prefix in prefixes}
    others = [key for key in keys if key not in known]
    if others:
        asked = {}
        for number, key in enumerate(others, start=1):
            asked |= {
                f"{key}.lora_down.weight": torch.full((1, 1), float(number)),
                f"{key}.lora_up.weight": torch.ones(1, 1),
            }
        try:
            answer = read_by_diffusers(pipe, asked)
        except Exception as error:  # whatever it stumbles over in names that it does not know
            raise KeyError(f"{others[0]}, which is no layer of this {type(pipe).__name__}") from error
        for component in dict.fromkeys(name.partition(".")[0] for name in answer):
            mine = to_peft_names(component, getattr(pipe, component, None), without_prefix(answer, component))
            for name, value in mine.items():
                if name.endswith(".lora_A.weight"):
                    known[others[int(value) - 1]] = f"{component}.{name.removesuffix('.lora_A.weight')}"
    for key in keys:
        if known.get(key) not in layers:
            raise KeyError(f"{key}, which is no layer of this {type(pipe).__name__}")
    return known


def read_by_diffusers(pipe: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A file's matrices and alphas by the pipeline's own reader, which knows its model's layouts; as they are where it
    has none (PixArt's)."""
    if not hasattr(pipe, "lora_state_dict"):
        return dict(tensors)
    given = {}
    if denoiser_of(pipe) == "unet":
        given["unet_config"] = pipe.unet.config
    elif "return_alphas" in inspect.signature(pipe.lora_state_dict).parameters:
        given["return_alphas"] = True
    read = pipe.lora_state_dict(dict(tensors), **given)
    matrices, alphas = read if isinstance(read, tuple) else (read, None)
    return {**matrices, **(alphas or {})}


def check_nothing_dropped(keys: Iterable[str], values: Mapping[str, Any]) -> None:
    """Raises `KeyError` for a kohya key of a text encoder of which the reader has left nothing."""
    read = {name.partition(".")[0] for name in values}
    for key in keys:
        if key.startswith("lora_te"):
            number = key.removeprefix("lora_te").partition("_")[0]
            encoder = TEXT_ENCODER if number in ("", "1") else f"{TEXT_ENCODER}_{number}"
            if encoder not in read:
                raise KeyError(key)


def without_prefix(values: Mapping[str, Any], component: str) -> dict[str, Any]:
    """The entries of one component, by their names inside it."""
    prefix = f"{component}."
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
