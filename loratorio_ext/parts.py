"""The parts of a LoRA's claim as tags and options write them: at, share, steps, mask, words and base.

A checked part is plain JSON, and in one spelling whatever was given: ``at`` a name of `PLACES` or ``x0-y0-x1-y1``,
``share`` a number, ``steps`` ``first-last``, ``mask`` see `masks`, ``words`` phrases between commas, ``base`` true or
false. No host, no torch.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loratorio_ext import masks
from loratorio_ext.errors import SettingsError, nearest_name, shown
from loratorio_ext.triggers import phrases

Box = tuple[float, float, float, float]

PLACES: dict[str, Box] = {
    "left": (0.0, 0.0, 0.5, 1.0),
    "right": (0.5, 0.0, 1.0, 1.0),
    "top": (0.0, 0.0, 1.0, 0.5),
    "bottom": (0.0, 0.5, 1.0, 1.0),
    "centre": (0.25, 0.25, 0.75, 0.75),
}
"""Places by name: left, top, right and bottom edge in fractions of the image's sides, from its left top."""

LOWEST_SHARE, HIGHEST_SHARE = 0.01, 100.0
MOST_WORDS = 1000
"""Characters of a LoRA's trigger words."""
NUMBER = r"(\d+\.?\d*|\.\d+)"
BOX = re.compile("-".join([NUMBER] * 4), re.ASCII)
SPAN = re.compile("-".join([NUMBER] * 2), re.ASCII)

OTHERS = {"te", "unet", "dyn", "lbw", "lbwe", "start", "stop", "step", "in", "out", "hr", "hrte", "hrunet", "x"}
"""Parts of tags that the host and other extensions read, never a slip for one of ours."""


def fractions(pattern: re.Pattern, text: str) -> list[float]:
    """The numbers of a pattern's text, each from 0 to 1; ValueError for others."""
    found = pattern.fullmatch(text.strip())
    numbers = [round(float(number), 6) for number in found.groups()] if found else []
    if not numbers or max(numbers) > 1:
        raise ValueError(text)
    return numbers


def written(numbers: Sequence[float]) -> str:
    """Numbers between hyphens, without an exponent, which would bring one of its own."""
    return "-".join(f"{number:.6f}".rstrip("0").rstrip(".") for number in numbers)


def box_of(at: str) -> Box:
    """The edges that a part ``at`` means; ValueError for what means none."""
    if at in PLACES:
        return PLACES[at]
    left, top, right, bottom = fractions(BOX, at)
    if left >= right or top >= bottom:
        raise ValueError(at)
    return left, top, right, bottom


def span_of(steps: str) -> tuple[float, float]:
    """The fractions of the steps between which a part ``steps`` means; ValueError for what means none."""
    first, last = fractions(SPAN, steps)
    if first >= last:
        raise ValueError(steps)
    return first, last


def check_at(value: Any) -> str:
    name = value.strip().lower()
    name = {"center": "centre"}.get(name, name)
    return name if name in PLACES else written(box_of(name))


def check_share(value: Any) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not LOWEST_SHARE <= value <= HIGHEST_SHARE:
        raise ValueError(value)
    return float(value)


def check_steps(value: Any) -> str:
    return written(span_of(value))


def check_words(value: Any) -> str:
    if not value.isprintable() or len(value) > MOST_WORDS:
        raise ValueError(value)
    return ", ".join(phrases(value))


def check_base(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(value)
    return value


def share_in_tag(text: str) -> float:
    if not re.fullmatch(NUMBER, text, re.ASCII):
        raise ValueError(text)
    return check_share(float(text))


def base_in_tag(text: str) -> bool:
    return {"0": False, "1": True}[text]


@dataclass(frozen=True)
class Part:
    """One part: what it may be, in words; ``check`` of a value of an option, and ``read`` of a tag's text (None: no tag
    has it), which raise what `REFUSALS` names. ``known``: names to propose in place of a wrong one."""

    name: str
    allowed: str
    check: Callable[[Any], Any]
    read: Callable[[str], Any] | None
    allowed_in_tag: str = ""
    known: tuple[str, ...] = ()


REFUSALS = (ValueError, TypeError, AttributeError, KeyError, OverflowError)
"""What a check raises for values and types that it does not take."""

PARTS = {
    part.name: part
    for part in (
        Part(
            "at",
            f"one of {', '.join(PLACES)}, or x0-y0-x1-y1 in fractions of the image from its left top",
            check_at,
            check_at,
            known=(*PLACES, "center"),
        ),
        Part("share", f"a number from {LOWEST_SHARE:g} to {HIGHEST_SHARE:g}", check_share, share_in_tag),
        Part(
            "steps",
            "first-last in fractions of the steps, from 0 to 1, the first below the last (0-0.5)",
            check_steps,
            check_steps,
        ),
        Part("mask", masks.ALLOWED, masks.kept, None),
        Part(
            "words",
            f"trigger words in one line of at most {MOST_WORDS} characters, with commas between different ones",
            check_words,
            check_words,
        ),
        Part("base", "true or false", check_base, base_in_tag, "0 or 1"),
    )
}


def refused(where: str, part: Part, value: Any, allowed: str, error: Exception) -> SettingsError:
    """The error for a value that a part may not have."""
    hint = nearest_name(value.strip().lower(), part.known) if isinstance(value, str) and len(value) < 20 else ""
    why = f" ({error})" if isinstance(error, masks.MaskError) else ""
    message = f"LoRAtorio: {where} must be {allowed}, got {shown(value)}{why}{hint}"
    return SettingsError(message, field=where, value=value, allowed=allowed)


# --- tags -------------------------------------------------------------------------------------------------------------


def tag_text(items: Sequence[str]) -> str:
    """A tag as it stands in the prompt, shortened where it is very long."""
    text = ":".join(items)
    return f"<lora:{text if len(text) <= 80 else text[:77] + '...'}>"


def is_slip(wrong: str, right: str) -> bool:
    """Whether two words differ in one letter added, left out or changed, in two neighbours swapped, or in case."""
    if wrong.lower() == right:
        return True
    if len(right) < 4 or abs(len(wrong) - len(right)) > 1 or wrong in OTHERS:
        return False
    first = next((i for i, pair in enumerate(zip(wrong, right)) if pair[0] != pair[1]), min(len(wrong), len(right)))
    rest, wanted = wrong[first:], right[first:]
    swapped = rest[:2] == wanted[1::-1] and rest[2:] == wanted[2:]
    return swapped or rest[1:] == wanted or rest == wanted[1:] or rest[1:] == wanted[1:]


def parts_of_tag(items: Sequence[str], tag: str = "") -> dict[str, Any]:
    """Our parts of a tag, checked; ``items`` is what stands after ``lora:``, split at the colons, and ``tag`` how
    errors name the whole where that is otherwise than in a prompt.

    Parts of other names are the host's or other extensions' and are passed over, but for those that are plainly a slip
    for one of ours. Raises `SettingsError`, which names tag, part, value, and what is allowed.
    """
    tag = tag or tag_text(items)
    parts: dict[str, Any] = {}
    for item in items:
        name, equals, value = (each.strip() for each in str(item).partition("="))
        if not equals:
            continue
        where = f"{name} in {tag}"
        if name not in PARTS:
            meant = [part.name for part in PARTS.values() if part.read is not None and is_slip(name, part.name)]
            if meant:
                message = f"LoRAtorio: {tag} has a part {shown(name)}; did you mean {meant[0]}?"
                raise SettingsError(message, field=where, value=value, allowed=meant[0])
            continue
        part = PARTS[name]
        if part.read is None:
            message = f"LoRAtorio: {where} cannot be said in a tag; say it in the option loras"
            raise SettingsError(message, field=where, value=value)
        if name in parts:
            raise SettingsError(f"LoRAtorio: {where} is said twice", field=where, value=value, allowed="once")
        try:
            parts[name] = part.read(value)
        except REFUSALS as error:
            raise refused(where, part, value, part.allowed_in_tag or part.allowed, error) from error
    return parts


def items_of(parts: Mapping[str, Any]) -> list[str]:
    """Checked parts as a tag has them, which `parts_of_tag` reads back; without a mask, which no tag has."""
    texts = {name: f"{value:d}" if isinstance(value, bool) else str(value) for name, value in parts.items()}
    texts |= {name: str(value).removesuffix(".0") for name, value in parts.items() if isinstance(value, float)}
    return [f"{name}={text}" for name, text in texts.items() if PARTS[name].read is not None]


# --- the option -------------------------------------------------------------------------------------------------------


def check_parts(name: str, values: Any) -> dict[str, Any]:
    """The parts that the option ``loras`` gives a LoRA, checked; raises `SettingsError`."""
    where = f"loras.{name if len(name) <= 60 else name[:57] + '...'}"
    if not isinstance(values, Mapping):
        allowed = f"a mapping of {', '.join(PARTS)}"
        message = f"LoRAtorio: {where} must be {allowed}, got {shown(values)}"
        raise SettingsError(message, field=where, value=values, allowed=allowed)
    parts = {}
    for key, value in values.items():
        if key not in PARTS:
            hint = nearest_name(str(key), PARTS)
            message = f"LoRAtorio: {where} has no part {shown(key)}{hint} (parts: {', '.join(PARTS)})"
            raise SettingsError(message, field=f"{where}.{key}", value=value, allowed=f"one of {', '.join(PARTS)}")
        part = PARTS[key]
        try:
            parts[key] = part.check(value)
        except REFUSALS as error:
            raise refused(f"{where}.{key}", part, value, part.allowed, error) from error
    return parts
