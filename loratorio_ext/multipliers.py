"""A LoRA's multipliers, as people write them: which numbers they may be."""

import math
import re
from typing import Any

from loratorio_ext.errors import SettingsError, shown

LIMIT = 100.0
"""No LoRA is trained for more than a few; beyond this a model's numbers overflow."""

ALLOWED = f"a number from {-LIMIT:g} to {LIMIT:g}"

NUMBER = re.compile(r"\s*[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?\s*", re.IGNORECASE | re.ASCII)


def check_multiplier(value: Any, of: str, field: str) -> float:
    """The multiplier as a float; raises `SettingsError`, which says ``of`` what it is, for what is none."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or abs(value) > LIMIT:
        raise SettingsError(
            f"LoRAtorio: a weight in {of} must be {ALLOWED}, got {shown(value)}",
            field=field,
            value=value,
            allowed=ALLOWED,
        )
    return float(value)


def parse_multiplier(text: str, of: str, field: str) -> float:
    """The multiplier that a text holds; see `check_multiplier`."""
    return check_multiplier(float(text) if NUMBER.fullmatch(text) else text, of, field)
