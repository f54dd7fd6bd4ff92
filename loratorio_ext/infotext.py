"""The WebUI's texts: LoRA tokens in a prompt, and the generation parameters that a PNG carries and that paste back."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from loratorio_ext.errors import SettingsError, UnsupportedError

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
    """The inside of a token, after ``lora:``: ``name``, ``name:weight``, ``name:te:unet``, ``name:te=…:unet=…``."""
    positional = [part for part in text.split(":") if "=" not in part]
    named = dict(part.split("=", 1) for part in text.split(":") if "=" in part)
    if len(positional) > 3 or "dyn" in named:
        raise UnsupportedError(f"LoRAtorio: <lora:{text}> asks for a part of the LoRA's rank, which is not supported")
    try:
        name, *weights = positional
        te_weight = float(named.get("te", weights[0] if weights else 1.0))
        return LoraToken(name, te_weight, float(named.get("unet", weights[1] if len(weights) > 1 else te_weight)))
    except ValueError as error:
        raise SettingsError(f"LoRAtorio: <lora:{text}> must be a name, and numbers for weights") from error


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
