"""What the pages say of options, presets and messages is what the code says."""

import importlib.util
import re
from pathlib import Path

import pytest

from loratorio_ext.settings import OPTIONS, PRESETS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def module(name):
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


tables = module("tables")


@pytest.mark.parametrize("page", tables.PAGES)
def test_tables_are_those_of_the_code(page):
    """`python docs/tables.py` writes them anew."""
    assert (DOCS / page).read_text() == tables.filled(page)


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_every_option_has_its_row_in_the_tables_order(option):
    rows = re.findall(r"^\| `(\w+)` \| .* \| .* \|", (DOCS / "api.md").read_text(), re.MULTILINE)
    assert rows[: len(OPTIONS)] == [each.name for each in OPTIONS]
    assert option.help in (DOCS / "api.md").read_text()


def test_every_preset_has_its_row():
    assert all(f"| **{name}** | " in (DOCS / "presets.md").read_text() for name in PRESETS)


MESSAGES = re.findall(
    r"^\| ([^|]+) \|", (DOCS / "messages.md").read_text().split("## Nothing is said")[0], re.MULTILINE
)
MESSAGES = [message for message in MESSAGES if message not in ("message", "---")]


def test_there_are_messages():
    assert len(MESSAGES) > 20


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_is_one_that_is_said(message):
    """Its words stand in the code: with a variable in it, piece by piece, over the lines of a string."""
    code = "".join(path.read_text() for path in sorted((ROOT / "loratorio_ext").rglob("*.py")))
    code = re.sub(r'"\s*\n\s*f?"', "", code)
    assert message in code or message.replace("start must be", "start must be {allowed}") in code


def links(text):
    return re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in sorted(DOCS.glob("*.md")))])
def test_links_lead_somewhere(page):
    path = ROOT / page
    missing = [link for link in links(path.read_text()) if not (path.parent / link).exists()]
    assert missing == []


def test_the_readme_is_a_screen():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 70
