"""The README says what the table of options says."""

from pathlib import Path

import pytest

from loratorio_ext.settings import OPTIONS, Claims, Lines

README = (Path(__file__).parents[1] / "README.md").read_text()


def row(option) -> str:
    """An option's line in the README's table."""
    if option.kind is bool:
        return f"| `{option.name}` | {str(option.default).lower()} | true, false | {option.help} |"
    if isinstance(option, (Lines, Claims)):
        return f"| `{option.name}` | {option.write(option.default)} | {option.allowed} | {option.help} |"
    allowed = ", ".join(option.choices) or f"{option.low:g} to {option.high:g}"
    return f"| `{option.name}` | {option.default} | {allowed} | {option.help} |"


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_every_option_has_its_row(option):
    assert row(option) in README


def test_rows_stand_in_the_tables_order():
    places = [README.index(row(option)) for option in OPTIONS]
    assert places == sorted(places)
