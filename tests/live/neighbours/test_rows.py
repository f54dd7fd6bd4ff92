"""Every row of the table: with a neighbour active the composed image is right, or it is refused by that name.

One LoRA with ``base_share`` 0 is the host's own image. A LoRA and its copy compose to what one of them does, and a
method that takes but the first LoRA's turn is that LoRA alone: no row may meet another LoRA's branch. Of two LoRAs one
of which is in every pass the other one has no rival: that is the host's own image of both. Where the brute-force
reference is itself right in this company, two different LoRAs equal it.
"""

import re
from dataclasses import asdict

import pytest

from tests.contract.rows import TOLERANCE
from tests.live.neighbours.company import Difference, refusal
from tests.live.neighbours.conftest import STYLE, record
from tests.live.neighbours.folder import NEIGHBOURS, version
from tests.live.neighbours.rows import REFUSES, RIGHT, TABLE, Row
from tests.live.webui import RequestError

pytestmark = [pytest.mark.live, pytest.mark.usefixtures("clean")]

VISIBLE = 0.5
"""Mean grey levels that a neighbour, or a LoRA, must change in the host's own image for its row to mean anything."""

FIRST = {"method": "switch", "switch_every": 999}

Found = Difference | RequestError


def attempts(row: Row) -> dict[str, tuple[str, dict]]:
    """Prompts and options that must all give the host's own image of one LoRA."""
    found = {"one LoRA": (row.one, {"base_share": 0})}
    if row.two and row.expected == RIGHT:
        found["it and its copy"] = row.twins, {"base_share": 0}
        if row.always:
            found["the first of two"] = row.two, FIRST
    return found


def outcome(row: Row, found: Found) -> str:
    if isinstance(found, Difference):
        return RIGHT if found.rounding else "differs"
    return REFUSES if refusal(found, (row.neighbour, *row.also)) else "fails"


def report(row: Row, found: dict[str, Found]) -> dict:
    """The row's entry in the results file: its worst attempt's."""
    worst = max(found.values(), key=lambda each: each.largest if isinstance(each, Difference) else 256)
    return {
        "neighbour": row.neighbour,
        "version": version(row.neighbour) if row.neighbour in NEIGHBOURS else "",
        "mode": row.mode,
        "expected": row.expected,
        "outcome": outcome(row, worst),
        **(asdict(worst) if isinstance(worst, Difference) else {"status": worst.status}),
    }


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_row(company, row):
    host = company.by_itself(*row.request(row.one)).images
    no_lora = company.by_itself(*row.request(row.without)).images
    assert Difference.of(host, no_lora).mean > VISIBLE, "the LoRA is not seen"
    if row.unlike is not None:
        without = company.by_itself(*row.request_without_neighbour(row.one)).images
        assert Difference.of(host, without).mean > VISIBLE, "the neighbour is not seen"

    found, took = {}, {}
    for name, (prompt, options) in attempts(row).items():
        try:
            took[name] = company.measured(*row.request(prompt), **options)
            found[name] = Difference.of(host, took[name].generation.images)
        except RequestError as error:
            found[name] = error
    result = report(row, found)
    if "it and its copy" in took:
        both, options = took["it and its copy"], attempts(row)["it and its copy"][1]
        alone = company.cost(*row.request_without_neighbour(row.twins), **options)
        result["time"] = round(both.seconds / alone.seconds, 2)
        result |= {"calls": both.calls, "calls without": alone.calls, "rows": both.rows, "rows without": alone.rows}
    record(row, result)

    if result["outcome"] == "differs":
        again = Difference.of(host, company.generate(*row.request(row.one)).images)
        assert again.rounding, f"the host by itself makes another image the second time: {again}"
    log = "\n".join(company.log().splitlines()[-25:])
    broken = [
        f"{name}: {outcome(row, each)}: {each}" for name, each in found.items() if outcome(row, each) != row.expected
    ]
    assert not broken, "\n".join([row.name, *broken, "the server's log ends with", log])


@pytest.mark.parametrize("row", [row for row in TABLE if row.brute_force], ids=lambda row: row.name)
def test_brute_force(company, row):
    host = company.by_itself(*row.request(row.one)).images
    trusted = company.brute_force(*row.request(row.one), base_share=0).images
    assert Difference.of(host, trusted).rounding, "the reference itself is not right in this company"
    composed = company.composed(*row.request(row.two)).images
    reference = company.brute_force(*row.request(row.two)).images
    assert Difference.of(composed, reference).largest <= TOLERANCE
    assert Difference.of(composed, company.by_itself(*row.request(row.two)).images).mean > VISIBLE


IN_EVERY_PASS = {
    "by its name": lambda prompt: prompt.replace("<lora:lora:", f"<lora:{STYLE}:"),
    "by hand": lambda prompt: re.sub("(<lora:locon:[^>]*)>", r"\1:base=1>", prompt),
}
"""Ways to put one of a prompt's two LoRAs into every pass, the base model's included."""


@pytest.mark.parametrize("way", IN_EVERY_PASS)
@pytest.mark.parametrize("row", [row for row in TABLE if row.expected == RIGHT and row.two], ids=lambda row: row.name)
def test_in_every_pass(company, row, way):
    host = company.by_itself(*row.request(row.two)).images
    request = row.request(IN_EVERY_PASS[way](row.two))
    composed = company.composed(*request, styles="everywhere", base_share=0).images
    difference = Difference.of(host, composed)
    assert difference.rounding, str(difference)


@pytest.mark.parametrize("row", [row for row in TABLE if row.brute_force], ids=lambda row: row.name)
def test_a_style_in_every_pass_by_brute_force(company, row):
    request = row.request(IN_EVERY_PASS["by its name"](row.two))
    reference = company.brute_force(*request, in_every_pass=(STYLE,)).images
    assert Difference.of(company.composed(*request).images, reference).largest <= TOLERANCE


CHOSEN = {
    "controlnet": ("Balanced",),
    "regional-prompter": ("Attention",),
    "multidiffusion": ("MultiDiffusion, tile batch 4",),
    "loractl": ("a weight for the first fifth",),
}
OPTIONS = {
    "start 0.5": {"start": 0.5},
    "end 0.5": {"end": 0.5},
    "refresh 1": {"refresh": 1, "warmup": 0},
    "reselect_every 2": {"top_k": 1, "reselect_every": 2},
    "base_share 1": {"base_share": 1.0},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(
    "row", [row for row in TABLE if row.mode in CHOSEN.get(row.neighbour, ())], ids=lambda row: row.name
)
def test_options(company, row, options):
    """Steps that are merged, partly evaluated, or picked from: right with one LoRA; with two as by brute force."""
    host = company.by_itself(*row.request(row.one)).images
    if "base_share" not in options:
        one = company.composed(*row.request(row.one), base_share=0, **options).images
        difference = Difference.of(host, one)
        assert difference.rounding, f"one LoRA: {difference}"
    two = company.composed(*row.request(row.two), **options).images
    if row.brute_force:
        reference = company.brute_force(*row.request(row.two), **options).images
        assert Difference.of(two, reference).largest <= TOLERANCE
