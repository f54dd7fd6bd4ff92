"""Prompts with weights, and longer than 75 tokens, by compel: ``a (red)1.3 cat, forest--``.

::

    with weighted_prompts(pipe), composed(pipe, loras):
        image = pipe("a (red)1.3 cat in a forest--").images[0]

Compel runs the pipeline's own text encoders, so LoRAs that change these change the weighted texts, too.
"""

import functools
import inspect
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from loratorio_ext.errors import UnsupportedError
from loratorio_ext.hosts.diffusers import replaced

try:
    import compel
except ImportError as error:
    raise UnsupportedError("LoRAtorio: prompts with weights need compel: pip install compel") from error

COMPEL_FOR = {
    "FluxPipeline": compel.CompelForFlux,
    "StableDiffusionPipeline": compel.CompelForSD,
    "StableDiffusionXLPipeline": compel.CompelForSDXL,
}
"""Compel's encoders for pipelines, and those made from them, by class."""

ENCODED = {
    "prompt_embeds": "embeds",
    "pooled_prompt_embeds": "pooled_embeds",
    "negative_prompt_embeds": "negative_embeds",
    "negative_pooled_prompt_embeds": "negative_pooled_embeds",
}
"""Arguments of ``encode_prompt`` that hold texts encoded already, and compel's names of these."""


@contextmanager
def weighted_prompts(pipe: Any) -> Iterator[None]:
    """While entered, the pipeline reads its prompts as compel does. To be entered before a composition.

    Raises `UnsupportedError` for pipelines that compel does not know, and in a call for what would be lost: a second
    prompt of its own (``prompt_2``), ``clip_skip``.
    """
    kind = next((each.__name__ for each in type(pipe).__mro__ if each.__name__ in COMPEL_FOR), None)
    if kind is None:
        known = ", ".join(COMPEL_FOR)
        raise UnsupportedError(f"LoRAtorio: prompts have weights in {known}, not in {type(pipe).__name__}")
    encode = pipe.encode_prompt

    @functools.wraps(encode)
    def encode_prompt(*args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(encode).bind(*args, **kwargs).arguments
        if given.get("prompt") is None:
            return encode(**given)
        weigh = COMPEL_FOR[kind](pipe)  # anew: it keeps what it once encoded, under whatever LoRA
        check_length(weigh, given)
        texts = weighed(pipe, weigh, given, inspect.signature(encode).parameters)
        return encode(**given | without_prompts(given) | texts)

    with replaced(pipe, "encode_prompt", encode_prompt):
        yield


def without_prompts(given: Mapping[str, Any]) -> dict[str, None]:
    """The arguments that are texts, emptied. Raises `UnsupportedError` for those that compel cannot honour."""
    for name in ("prompt_2", "negative_prompt_2", "clip_skip"):
        if given.get(name) not in (None, given.get(name.removesuffix("_2")) if name.endswith("_2") else None):
            raise UnsupportedError(f"LoRAtorio: {name} does not go with weights in prompts; leave it out")
    return {name: None for name in given if name.removesuffix("_2") in ("prompt", "negative_prompt")}


def check_length(weigh: Any, given: Mapping[str, Any]) -> None:
    """Raises `UnsupportedError` where compel encodes another number of tokens than ``max_sequence_length``."""
    length = given.get("max_sequence_length")
    if length is not None and length != weigh.compel_2.conditioning_provider.max_token_count:
        tokens = weigh.compel_2.conditioning_provider.max_token_count
        raise UnsupportedError(f"LoRAtorio: with weights in prompts max_sequence_length must be {tokens}, is {length}")


def weighed(pipe: Any, weigh: Callable[..., Any], given: Mapping[str, Any], known: Container[str]) -> dict[str, Tensor]:
    """The texts of ``encode_prompt``'s arguments as embeddings, by the names of the arguments that are ``known``.

    Stable Diffusion XL takes zeros for an empty negative prompt, where it is so configured.
    """
    negative = None
    if given.get("do_classifier_free_guidance") and (
        given.get("negative_prompt") is not None or not pipe.config.get("force_zeros_for_empty_prompt")
    ):
        negative = given.get("negative_prompt") or ""
    texts = weigh(given["prompt"], negative_prompt=negative)
    return {name: getattr(texts, field) for name, field in ENCODED.items() if name in known}
