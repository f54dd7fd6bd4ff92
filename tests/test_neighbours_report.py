"""``docs/neighbours.md`` says what the committed results file says."""

import json

from tests.live.neighbours.report import DOCUMENT, RESULTS, document, in_order
from tests.live.neighbours.rows import TABLE

ROOT = DOCUMENT.parents[1]


def results() -> dict:
    return json.loads(RESULTS.read_text(encoding="utf-8"))


def test_document_is_made_from_the_results():
    made = document(in_order(results()), str(RESULTS.relative_to(ROOT)))
    assert DOCUMENT.read_text(encoding="utf-8") == made


def test_results_are_of_rows_that_there_are():
    assert set(results()) <= {row.name for row in TABLE}


def test_no_two_rows_have_one_name():
    assert len({row.name for row in TABLE}) == len(TABLE)


def test_a_broken_promise_is_seen():
    """A result other than the table's promise stands out, and comes with its difference."""
    result = {"neighbour": "loractl", "version": "1", "mode": "m", "expected": "right", "outcome": "differs"}
    made = document({"loractl: m": result | {"largest": 76, "mean": 9.5}}, "results.json")
    assert "| m | **differs** | 76 / 9.500 |  |  |" in made
    assert "## loractl (Dynamic Lora Weights), 1" in made
