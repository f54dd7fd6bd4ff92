"""The log's line, and the tally of model calls that it is made of."""

import pytest
import torch
from torch import nn

from loratorio_ext.isolation import IsolatedCalls, Isolation, LowRank, Tally
from loratorio_ext.summary import counted, step_line, summary


def tally_of(*calls):
    tally = Tally()
    for loras in calls:
        with tally.call(loras):
            pass
    return tally


def test_calls_and_rows_are_those_that_the_model_was_asked_for():
    """A batch that did not fit counts as the calls it was cut into, not as the one that failed."""
    layer = nn.Linear(4, 4)
    lora = LowRank(torch.ones(1, 4), torch.ones(4, 1), 1.0)
    calls = IsolatedCalls(Isolation({"layer": layer}, [{"layer": lora}, {"layer": lora}, {}]))

    def call(batch):
        if len(batch) > 3:
            raise RuntimeError("out of memory")
        return layer(torch.ones(len(batch), 4))

    calls([(-1, 0), (-1, 1), (0, 0), (0, 1), (1, 0), (1, 1)], call)
    assert sum(calls.tally.sizes) == 6 and max(calls.tally.sizes) <= 3
    assert calls.tally.alone == 4
    assert calls.tally.seconds > 0


@pytest.mark.parametrize(
    "sizes, text",
    [([6] * 8, "8 model calls of 6 rows"), ([1], "1 model call of 1 row"), ([4, 6], "2 model calls of 4 to 6 rows")],
)
def test_counted(sizes, text):
    assert counted(sizes) == text


def test_the_line():
    class Slow(Tally):
        seconds = 9.0

    tally = Slow()
    tally.sizes, tally.alone = [6, 6, 6], 12
    line = summary("loratorio", ["hat", "cat"], [tally], 10.0)
    assert line == (
        "LoRAtorio: loratorio of hat, cat; 3 model calls of 6 rows, 67% of which are a LoRA's alone; these took about "
        "60% of 10.0 s of sampling"
    )
    assert summary("merge", [], [], 2.0) == "LoRAtorio: merge; 2.0 s of sampling"
    assert summary("switch", ["a"], [tally_of()], 0.0) == "LoRAtorio: switch of a; 0.0 s of sampling"


def test_a_steps_line():
    assert step_line(3, ["a", "b"], [[0.25, 0.75], [1, 0]]) == "LoRAtorio: step 3: a 0.250, b 0.750 | a 1.000, b 0.000"
