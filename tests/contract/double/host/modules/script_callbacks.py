"""Callbacks around each call of the UNet. Their exceptions are reported and go no further."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from modules import errors


@dataclass
class CFGDenoiserParams:
    x: Tensor
    image_cond: Tensor
    sigma: Tensor
    sampling_step: int
    total_sampling_steps: int
    text_cond: Any
    text_uncond: Any
    denoiser: Any = None


@dataclass
class CFGDenoisedParams:
    x: Tensor
    sampling_step: int
    total_sampling_steps: int
    inner_model: Any


@dataclass
class AfterCFGCallbackParams:
    x: Tensor
    sampling_step: int
    total_sampling_steps: int


@dataclass(frozen=True)
class ScriptCallback:
    callback: Callable


callback_map: dict[str, list[ScriptCallback]] = {
    "callbacks_cfg_denoiser": [],
    "callbacks_cfg_denoised": [],
    "callbacks_cfg_after_cfg": [],
}


def on_before_ui(callback: Callable, *, name: str | None = None) -> None:
    callback()


def on_ui_settings(callback: Callable, *, name: str | None = None) -> None:
    callback()


def on_cfg_denoiser(callback: Callable, *, name: str | None = None) -> None:
    callback_map["callbacks_cfg_denoiser"].append(ScriptCallback(callback))


def on_cfg_denoised(callback: Callable, *, name: str | None = None) -> None:
    callback_map["callbacks_cfg_denoised"].append(ScriptCallback(callback))


def on_cfg_after_cfg(callback: Callable, *, name: str | None = None) -> None:
    callback_map["callbacks_cfg_after_cfg"].append(ScriptCallback(callback))


def remove_callbacks_for_function(function: Callable) -> None:
    for registered in callback_map.values():
        for each in [each for each in registered if each.callback == function]:
            registered.remove(each)


def call(category: str, params: Any) -> None:
    """Run a category's callbacks; as in the host, one that is removed meanwhile makes the loop miss its successor."""
    for each in callback_map[f"callbacks_{category}"]:
        try:
            each.callback(params)
        except Exception:
            errors.report(f"Error executing callback {category}", exc_info=True)
