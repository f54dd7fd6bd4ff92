"""The WebUI's texts: LoRA tokens in a prompt, and the generation parameters that a PNG carries and that paste back."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from loratorio_ext.errors import SettingsError, UnsupportedError
from loratorio_ext.multipliers import parse_multiplier

PNG_KEY = "parameters"
"""The text chunk in which WebUIs keep an image's infotext."""

TOKEN = re.compile(r"<(\w+):([^>]+)>")


@dataclass(frozen=True)
class LoraToken:
    """``<lora:name:te:unet>``: a LoRA by name, and its multipliers in text encoders and UNet."""

    name: str
    te_weight: float = 1.0
    unet_weight: float = 1.0

    def __str__(self) -> str:
        weights = dict.fromkeys((f"{self.te_weight:g}", f"{self.unet_weight:g}"))
        return f"<lora:{':'.join((self.name, *weights))}>"


def parse_token(text: str) -> LoraToken:
    """The inside of a token, after ``lora:``: ``name``, ``name:weight``, ``name:te:unet``, ``name:te=…:unet=…``.

    Raises `UnsupportedError` for what other extensions write there (``dyn=…``, ``lbw=…``, ``start=…``), and
    `SettingsError` for what is no name or no number.
    """
    said = f"<lora:{text}>"
    name, *parts = text.split(":")
    positional = [part for part in parts if "=" not in part]
    named = dict(part.split("=", 1) for part in parts if "=" in part)
    if len(positional) > 2 or "dyn" in named:
        raise UnsupportedError(f"LoRAtorio: {said} asks for a part of the LoRA's rank, which is not supported")
    unknown = sorted(set(named) - {"te", "unet"})
    if unknown:
        raise UnsupportedError(
            f"LoRAtorio: {said} says {', '.join(unknown)}, of which nothing is known here; it may say te and unet",
            field="prompt",
            value=said,
            allowed="<lora:name>, <lora:name:weight>, <lora:name:te:unet>, <lora:name:te=…:unet=…>",
        )
    if not name.strip() or "=" in name:
        raise SettingsError(f"LoRAtorio: {said} must begin with a LoRA's name", field="prompt", value=said)
    te_weight = parse_multiplier(named.get("te", positional[0] if positional else "1"), said, "prompt")
    unet = named.get("unet", positional[1] if len(positional) > 1 else None)
    return LoraToken(name, te_weight, te_weight if unet is None else parse_multiplier(unet, said, "prompt"))


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
