"""Write the pages' tables of options and presets anew: ``python docs/tables.py``. A test sees to it that they are."""

import re
import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent))

from loratorio_ext.preview import BY_PRESETS, preset_values  # noqa: E402
from loratorio_ext.settings import OPTIONS, PRESETS, Claims, Lines, Option  # noqa: E402


def row(option: Option) -> str:
    """An option's line: name, default, what it may be, methods that use it, and its help."""
    if option.kind is bool:
        default, allowed = str(option.default).lower(), "true, false"
    elif isinstance(option, (Lines, Claims)):
        default, allowed = option.write(option.default), option.allowed
    else:
        default, allowed = str(option.default), ", ".join(option.choices) or f"{option.low:g} to {option.high:g}"
    return f"| `{option.name}` | {default} | {allowed} | {', '.join(option.methods) or 'all'} | {option.help} |"


def options() -> str:
    head = "| option | default | range | methods | what it does |\n| --- | --- | --- | --- | --- |\n"
    return head + "\n".join(map(row, OPTIONS))


def presets() -> str:
    """What each preset sets, where it is not the default."""
    lines = ["| preset | sets |", "| --- | --- |"]
    for name in PRESETS:
        values = preset_values(name)
        changed = [option for option in BY_PRESETS if values[option.name] != option.default]
        said = ", ".join(f"`{option.name}` {option.write(values[option.name])}" for option in changed)
        lines.append(f"| **{name}** | {said or 'everything at its default: exact in every step'} |")
    return "\n".join(lines)


PAGES = {"api.md": ("options", options), "presets.md": ("presets", presets)}


def filled(page: str) -> str:
    """The page's text with its table as it should be."""
    name, table = PAGES[page]
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    return pattern.sub(lambda found: f"{found[1]}\n{table()}\n\n{found[2]}", (DOCS / page).read_text(encoding="utf-8"))


if __name__ == "__main__":
    for page in PAGES:
        (DOCS / page).write_text(filled(page), encoding="utf-8")
