"""Generation parameters as text, and back."""

import json
import re
from typing import Any

PARAMETER = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


def quote(value: Any) -> Any:
    """The value, in quotes if it holds a character with a meaning of its own."""
    return json.dumps(value, ensure_ascii=False) if re.search("[,:\n]", str(value)) else value


def unquote(text: str) -> str:
    try:
        return json.loads(text) if text[:1] == text[-1:] == '"' else text
    except ValueError:
        return text


def parse_generation_parameters(text: str) -> dict[str, str]:
    """Parameters by name; those of the last line only if it has three or more of them."""
    *lines, last = text.strip().split("\n")
    found = PARAMETER.findall(last)
    if len(found) < 3:
        lines, found = [*lines, last], []
    prompt, _, negative = "\n".join(line.strip() for line in lines).partition("Negative prompt:")
    params = {"Prompt": prompt.strip(), "Negative prompt": negative.strip()}
    for name, value in found:
        if size := re.fullmatch(r"(\d+)x(\d+)", value):
            params[f"{name}-1"], params[f"{name}-2"] = size.groups()
        else:
            params[name] = unquote(value)
    return params
