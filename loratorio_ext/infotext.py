"""The WebUI's texts: LoRA tokens in a prompt, and the generation parameters that a PNG carries and that paste back."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loratorio_ext.errors import SettingsError, UnsupportedError, nearest_name
from loratorio_ext.multipliers import parse_multiplier
from loratorio_ext.parts import PARTS, items_of, parts_of_tag, tag_text

PNG_KEY = "parameters"
"""The text chunk in which WebUIs keep an image's infotext."""

TOKEN = re.compile(r"<(\w+):([^>]+)>")

MULTIPLIERS = ("te", "unet")
KNOWN = (*MULTIPLIERS, *(part.name for part in PARTS.values() if part.read is not None))
"""What a token may say by name."""


@dataclass(frozen=True)
class LoraToken:
    """``<lora:name:te:unet:part=…>``: a LoRA by name, its multipliers in text encoders and UNet, and the checked parts
    of its claim (see `parts`)."""

    name: str
    te_weight: float = 1.0
    unet_weight: float = 1.0
    parts: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        weights = dict.fromkeys((f"{self.te_weight:g}", f"{self.unet_weight:g}"))
        return f"<lora:{':'.join((self.name, *weights, *items_of(self.parts)))}>"


def parse_items(name: str, items: Sequence[str], said: str, where: str) -> LoraToken:
    """What follows a LoRA's name, split at the colons: ``weight``, ``te:unet``, ``te=…``, ``unet=…`` and parts.

    ``said`` is how errors name the whole, ``where`` the field that holds it. Raises `UnsupportedError` for what other
    extensions write there (``dyn=…``, ``lbw=…``, ``start=…``), and `SettingsError` for bad multipliers and parts.
    """
    positional = [item for item in items if "=" not in item]
    named = {key.strip(): value for key, _, value in (item.partition("=") for item in items if "=" in item)}
    if len(positional) > 2 or "dyn" in named:
        raise UnsupportedError(f"LoRAtorio: {said} asks for a part of the LoRA's rank, which is not supported")
    parts = parts_of_tag(items, said)
    unknown = sorted(set(named) - set(KNOWN))
    if unknown:
        raise UnsupportedError(
            f"LoRAtorio: {said} says {', '.join(unknown)}, of which nothing is known here"
            f"{nearest_name(unknown[0], KNOWN)} (it may say {', '.join(KNOWN)})",
            field=where,
            value=said,
            allowed=f"a weight, or two, and {', '.join(f'{name}=…' for name in KNOWN)}",
        )
    te_weight = parse_multiplier(named.get("te", positional[0] if positional else "1"), said, where)
    unet = named.get("unet", positional[1] if len(positional) > 1 else None)
    return LoraToken(name, te_weight, te_weight if unet is None else parse_multiplier(unet, said, where), parts)


def parse_token(text: str) -> LoraToken:
    """The inside of a token, after ``lora:``: a name, and what `parse_items` reads."""
    name, *items = text.split(":")
    said = tag_text([name, *items])
    if not name.strip() or "=" in name:
        raise SettingsError(f"LoRAtorio: {said} must begin with a LoRA's name", field="prompt", value=said)
    return parse_items(name, items, said, "prompt")


def split_prompt(prompt: str) -> tuple[str, list[LoraToken]]:
    """The prompt without its LoRA tokens, and those; of a name that occurs twice the last, as in the WebUI."""
    tokens: dict[str, LoraToken] = {}

    def take(match: re.Match) -> str:
        kind, inside = match.groups()
        if kind not in ("lora", "lyco"):
            raise UnsupportedError(f"LoRAtorio: {match.group()} is no LoRA, and nothing else of the kind is supported")
        token = parse_token(inside)
        tokens[token.name] = token
        return ""

    return TOKEN.sub(take, prompt), list(tokens.values())


def join_prompt(prompt: str, tokens: Iterable[LoraToken]) -> str:
    """The prompt with LoRA tokens after it."""
    return f"{prompt} {''.join(map(str, tokens))}".strip()


def quote(value: Any) -> str:
    """A parameter's value as the WebUI writes it: quoted where it holds what separates parameters."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ",\n:") else text


def infotext(prompt: str, negative: str, parameters: Mapping[str, Any]) -> str:
    """An image's generation parameters as the WebUI writes them; those that are None are left out."""
    listed = ", ".join(f"{key}: {quote(value)}" for key, value in parameters.items() if value is not None)
    return "\n".join([prompt, *([f"Negative prompt: {negative}"] if negative else []), listed])
