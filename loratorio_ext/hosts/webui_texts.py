"""A WebUI's conditionings: schedules, a step's rows of them, and what other extensions have put around them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from modules import prompt_parser, shared
from torch import Tensor

HOST = -3
"""The index of the host's own conditionings, of the prompt's LoRAs, among those of all LoRAs. (Those that follow are
for `Plan.MERGED`, where a pool's LoRAs that are in every pass act, too, and for `Plan.BASE`.)"""

EDITED = 0.01
"""Two encodings of one prompt that differ by more than this share of their length were not made of the same words."""


def tokens_of(text: Any) -> Tensor:
    """The token vectors ``[rows, tokens, C]`` of a conditioning, which is just these or, for SDXL, a dict of them and a
    pooled vector."""
    return text["crossattn"] if isinstance(text, dict) else text


def with_tokens(text: Any, tokens: Tensor) -> Any:
    """A conditioning with other token vectors in it."""
    return type(text)({**text, "crossattn": tokens}) if isinstance(text, dict) else tokens


def token_count(text: Any) -> int:
    return tokens_of(text).shape[1]


def vectors(schedules: Any) -> Iterator[Tensor]:
    """Every tensor in the host's schedules of conditionings, which nest lists, dicts and objects of its own; None, what
    some hosts have of a negative prompt that they do not need, holds none."""
    if schedules is None:
        return
    if isinstance(schedules, Tensor):
        yield schedules
        return
    for name in ("batch", "schedules", "cond"):
        schedules = getattr(schedules, name, schedules)
    parts = schedules.values() if isinstance(schedules, dict) else schedules
    if isinstance(parts, Tensor):
        yield parts
        return
    for part in parts:
        yield from vectors(part)


def same_text(one: Any, other: Any) -> bool:
    """Whether two encodings of the same prompts are the same, bit by bit."""
    first, second = list(vectors(one)), list(vectors(other))
    return len(first) == len(second) and all(map(torch.equal, first, second))


def is_finite_text(schedules: Any) -> bool:
    """Whether no number of the schedules' is NaN or infinite."""
    return all(bool(each.isfinite().all()) for each in vectors(schedules))


def alike(one: Tensor, other: Tensor) -> bool:
    """Whether two encodings may be of the same words, but for rounding."""
    if one.shape != other.shape:
        return False
    return torch.equal(one, other) or bool((one.float() - other.float()).norm() <= EDITED * other.float().norm())


@dataclass(frozen=True)
class Affix:
    """Token vectors that another extension has put around those of the prompt, ``[rows, k, C]`` each."""

    before: Tensor
    after: Tensor

    @classmethod
    def between(cls, own: Any, given: Any) -> "Affix":
        """What is around ``own`` in ``given``; raises ValueError where it has been changed in any other way."""
        beside = [(own[key], given[key]) for key in own if key != "crossattn"] if isinstance(own, dict) else []
        text, whole = tokens_of(own), tokens_of(given)
        length, more = text.shape[1], whole.shape[1] - text.shape[1]
        if len(text) == len(whole) and all(alike(one, other) for one, other in beside):
            for start in range(more + 1):
                if alike(text, whole[:, start : start + length]):
                    return cls(whole[:, :start], whole[:, start + length :])
        raise ValueError("the conditioning is not what the prompt says")

    def __bool__(self) -> bool:
        return bool(self.before.shape[1] or self.after.shape[1])

    def around(self, text: Any) -> Any:
        """Another encoding of the same rows, with the same around it."""
        tokens = tokens_of(text)
        parts = [self.before.to(tokens), tokens, self.after.to(tokens)]
        return with_tokens(text, torch.cat(parts, dim=1)) if self else text

    def rows(self, first: int, last: int) -> "Affix":
        return Affix(self.before[first:last], self.after[first:last])


def pad_to_each_other(denoiser: Any, cond: Any, uncond: Any) -> tuple[Any, Any]:
    """Conditionings of equal token length where the user has chosen one of the host's ways of padding."""
    if cond.shape[1] != uncond.shape[1]:
        if shared.opts.pad_cond_uncond_v0:
            return denoiser.pad_cond_uncond_v0(cond, uncond)
        if shared.opts.pad_cond_uncond:
            return denoiser.pad_cond_uncond(cond, uncond)
    return cond, uncond


def text_at_step(text: tuple[Any, Any], step: int) -> tuple[list, Any, Any]:
    """The rows of each image (``conds_list``), and the conditionings of a step, positive and negative."""
    conds_list, cond = prompt_parser.reconstruct_multicond_batch(text[0], step)
    return conds_list, cond, prompt_parser.reconstruct_cond_batch(text[1], step)


def text_and_others(cond: dict[str, Any], like: Any) -> tuple[Any, dict[str, Tensor]]:
    """The conditions of a call of the host's denoiser: the text, in the form of ``like``, and what is not the text's
    (image conditioning, unCLIP's) by name, ``[rows, ...]`` each."""
    of_the_text = like if isinstance(like, dict) else ("c_crossattn",)
    values = {name: value[0] if isinstance(value, list) else value for name, value in cond.items()}
    text = {name: values.pop(name) for name in of_the_text}
    return (text if isinstance(like, dict) else text["c_crossattn"]), values


def as_condition(text: Any, besides: dict[str, Tensor]) -> dict[str, Any]:
    """The host's dict of conditions for its denoiser."""
    conditions = {name: value if name == "c_adm" else [value] for name, value in besides.items()}
    return {**text, **conditions} if isinstance(text, dict) else {"c_crossattn": [text], **conditions}
