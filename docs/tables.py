"""Write the pages' tables of options, presets and measurements anew: ``python docs/tables.py``. A test sees to it that
they are."""

import sys
from functools import cache
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent))

from benchmarks.evaluate import RESULTS, read_rows  # noqa: E402
from benchmarks.report import MERGE_NAME, SHIPPED_NAME, difference_table, overview_table, price_table  # noqa: E402
from benchmarks.statistics import painted_in_every_way  # noqa: E402
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


@cache
def rows_of(*suites: str) -> list[dict[str, Any]]:
    """The suites' rows of scenes that name all of their LoRAs, as far as every way has painted them."""
    rows = [row for suite in suites for row in read_rows(RESULTS / f"{suite}.jsonl")]
    return painted_in_every_way([row for row in rows if not row["intruders"]])


def ceiling() -> str:
    return overview_table(rows_of("ceiling"))


def confirm() -> str:
    return overview_table(rows_of("confirm"))


def against_defaults() -> str:
    """Each way on the confirming half against the defaults."""
    return difference_table(rows_of("confirm"), SHIPPED_NAME)


def five() -> str:
    """Five LoRAs on the confirming half, in more images."""
    return overview_table(rows_of("five"))


def against_defaults_with_five() -> str:
    return difference_table(rows_of("five"), SHIPPED_NAME)


def others() -> str:
    return overview_table(rows_of("others"))


def soup() -> str:
    """Soups beside merged LoRAs and the defaults, on the images that soups were made for."""
    ways = {MERGE_NAME, SHIPPED_NAME} | {row["variant"] for row in read_rows(RESULTS / "soup.jsonl")}
    return overview_table([row for row in rows_of("others", "soup") if row["variant"] in ways])


def sweep() -> str:
    return overview_table(rows_of("sweep"))


def against_each_option() -> str:
    """The defaults with one option otherwise against the defaults."""
    return difference_table(rows_of("sweep"), SHIPPED_NAME)


def price() -> str:
    """What the turbo modes cost and lose."""
    return price_table(rows_of("others"), SHIPPED_NAME)


def pool() -> str:
    """All LoRAs loaded, beside scenes that are given those they name alone; as far as every way has painted them."""
    return overview_table(painted_in_every_way(read_rows(RESULTS / "pool.jsonl")))


def with_a_style() -> str:
    """What the confirming half's rows say of prompts that name a style."""
    return overview_table([row for row in rows_of("confirm") if "neon" in row["present"]])


PAGES = {
    "api.md": {"options": options},
    "presets.md": {"presets": presets},
    "evidence.md": {
        "ceiling": ceiling,
        "confirm": confirm,
        "against the defaults": against_defaults,
        "five": five,
        "against the defaults with five": against_defaults_with_five,
        "with a style": with_a_style,
        "sweep": sweep,
        "against each option": against_each_option,
        "others": others,
        "soup": soup,
        "price": price,
        "pool": pool,
    },
}
"""By page, its tables: between comments of their names, each made by a function."""


def filled(page: str) -> str:
    """The page's text with its tables as they should be."""
    text = (DOCS / page).read_text(encoding="utf-8")
    for name, table in PAGES[page].items():
        before, start, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- /{name} -->")
        text = f"{before}{start}\n{table()}\n\n{end}{after}"
    return text


if __name__ == "__main__":
    for page in PAGES:
        (DOCS / page).write_text(filled(page), encoding="utf-8")
