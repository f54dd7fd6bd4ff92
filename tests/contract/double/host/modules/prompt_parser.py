"""Prompts whose text changes over the steps (``[cat:dog:0.5]``) or has several parts (``AND``)."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

MOMENT = re.compile(r":\s*([-+]?(?:\d+\.?\d*|\.\d+))\s*\]")
EDIT = re.compile(r"\[(?:([^\[\]:|]*):)?([^\[\]:|]*)" + MOMENT.pattern)
ALTERNATION = re.compile(r"\[([^\[\]:|]*(?:\|[^\[\]:|]*)+)\]")
WEIGHTED = re.compile(r"(.*?)(?:\s*:\s*([-+]?(?:\d+\.?\d*|\.\d+)))?\s*", re.DOTALL)


class SdConditioning(list):
    """Prompts, and the size of the image they are for."""

    def __init__(self, prompts: Sequence[str], is_negative_prompt: bool = False, width=None, height=None):
        super().__init__(prompts)
        self.is_negative_prompt = is_negative_prompt
        self.width, self.height = width, height


class ScheduledPromptConditioning(NamedTuple):
    """A conditioning ``[T, C]``, and the last step at which it holds."""

    end_at_step: int
    cond: Any


class ComposableScheduledPromptConditioning(NamedTuple):
    """A part of a prompt with AND."""

    schedules: list[ScheduledPromptConditioning]
    weight: float


class MulticondLearnedConditioning:
    """The parts of every image's prompt."""

    def __init__(self, batch: list[list[ComposableScheduledPromptConditioning]]):
        self.batch = batch
        self.shape = (len(batch),)


class DictWithShape(dict):
    """Conditionings of a model that takes more than the tokens' vectors."""

    @property
    def shape(self) -> torch.Size:
        return self["crossattn"].shape


def schedule(prompt: str, base_steps: int, hires_steps: int | None, old: bool) -> list[tuple[int, str]]:
    """The texts of a prompt in their order, each with the last step (from 1) at which it holds.

    In a hires pass whole numbers count on from the first pass, and fractions from 1.0.
    """
    hires = hires_steps is not None and not old
    steps = hires_steps if hires else base_steps

    def moment(text: str) -> int:
        value = float(text)
        if old:
            value = value * steps if value < 1 else value
        elif "." in text:
            value = (value - hires) * steps
        else:
            value -= base_steps * hires
        return min(steps, int(value))

    def at(step: int) -> str:
        text, before = prompt, None
        while text != before:  # the innermost brackets first
            before = text
            text = EDIT.sub(lambda m: (m[1] or "") if step <= moment(m[3]) else m[2], text)
            text = ALTERNATION.sub(lambda m: m[1].split("|")[(step - 1) % (m[1].count("|") + 1)], text)
        return text

    ends = {moment(text) for text in MOMENT.findall(prompt)} | {steps}
    if ALTERNATION.search(prompt):
        ends |= set(range(1, steps + 1))
    return [(end, at(end)) for end in sorted(ends) if end >= 1]


def get_learned_conditioning(
    model: Any, prompts: Sequence[str], steps: int, hires_steps: int | None = None, use_old_scheduling: bool = False
) -> list[list[ScheduledPromptConditioning]]:
    """Each prompt's schedule of conditionings; the texts of one prompt are encoded together."""
    known = {}
    for prompt in prompts:
        if prompt not in known:
            ends, texts = zip(*schedule(prompt, steps, hires_steps, use_old_scheduling))
            conds = model.get_learned_conditioning(
                SdConditioning(
                    texts,
                    getattr(prompts, "is_negative_prompt", False),
                    getattr(prompts, "width", None),
                    getattr(prompts, "height", None),
                )
            )
            known[prompt] = [ScheduledPromptConditioning(end, pick(conds, i)) for i, end in enumerate(ends)]
    return [known[prompt] for prompt in prompts]


def get_multicond_learned_conditioning(
    model: Any, prompts: Sequence[str], steps: int, hires_steps: int | None = None, use_old_scheduling: bool = False
) -> MulticondLearnedConditioning:
    """The same for prompts whose parts are joined by AND and may end in a weight (``a dog :1.5``)."""
    parts = [[WEIGHTED.fullmatch(part).groups() for part in re.split(r"\bAND\b", prompt)] for prompt in prompts]
    texts = list(dict.fromkeys(text for images_parts in parts for text, _ in images_parts))
    width, height = getattr(prompts, "width", None), getattr(prompts, "height", None)
    conditioning = SdConditioning(texts, width=width, height=height)
    schedules = dict(zip(texts, get_learned_conditioning(model, conditioning, steps, hires_steps, use_old_scheduling)))
    return MulticondLearnedConditioning(
        [
            [ComposableScheduledPromptConditioning(schedules[text], float(weight or 1)) for text, weight in each]
            for each in parts
        ]
    )


def pick(conds: Any, index: int) -> Any:
    """The conditioning of one row."""
    return {key: value[index] for key, value in conds.items()} if isinstance(conds, dict) else conds[index]


def shape_of(cond: Any) -> torch.Size:
    return (cond["crossattn"] if isinstance(cond, dict) else cond).shape


def stack(conds: list) -> Any:
    """Rows of one batch; the shorter ones are filled up with their last vector."""
    if isinstance(conds[0], dict):
        return DictWithShape({key: stack([cond[key] for cond in conds]) for key in conds[0]})
    longest = max(len(cond) for cond in conds)
    return torch.stack(
        [torch.cat([cond, cond[-1:].repeat(longest - len(cond), *[1] * (cond.ndim - 1))]) for cond in conds]
    )


def at_step(schedules: list[ScheduledPromptConditioning], step: int) -> Any:
    """What holds at a step; after the last one, the first again, as in the host."""
    return next((each.cond for each in schedules if step <= each.end_at_step), schedules[0].cond)


def reconstruct_cond_batch(c: list[list[ScheduledPromptConditioning]], current_step: int) -> Tensor | DictWithShape:
    """The prompts' conditionings at a step, which must be of one length."""
    conds = [at_step(schedules, current_step) for schedules in c]
    if len({shape_of(cond) for cond in conds}) > 1:
        raise RuntimeError("negative prompts of different lengths in one batch")
    return stack(conds)


def reconstruct_multicond_batch(c: MulticondLearnedConditioning, current_step: int) -> tuple[list, Any]:
    """The rows of every image with their weights, and the conditionings of all rows at a step."""
    rows = [part for parts in c.batch for part in parts]
    numbers = iter(range(len(rows)))
    conds_list = [[(next(numbers), part.weight) for part in parts] for parts in c.batch]
    return conds_list, stack([at_step(part.schedules, current_step) for part in rows])
