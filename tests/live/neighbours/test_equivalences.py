"""What must not matter beside a neighbour: two requests that ask for the same give the same composed image.

Each holds for the host by itself, which is asked, too.
"""

from dataclasses import dataclass

import pytest

from tests.contract.rows import TOLERANCE
from tests.live.neighbours.company import Difference
from tests.live.neighbours.rows import (
    LARGE,
    ONE,
    TWO,
    controlnet,
    dynamic_thresholding,
    regional_prompter,
    tiled,
    unit,
)

pytestmark = [pytest.mark.live, pytest.mark.usefixtures("clean")]

Request = tuple[dict, dict]


@dataclass(frozen=True)
class Equivalence:
    """Two requests, scripts and payload each, for the same image."""

    neighbour: str
    name: str
    first: Request
    second: Request
    also: tuple[str, ...] = ()

    @property
    def server(self) -> str:
        return self.neighbour

    one = ONE

    def request(self, prompt: str) -> Request:
        return self.second


def prompt(text: str, **payload) -> Request:
    return {}, {"prompt": f"a cat on a hill {text}", **payload}


PLAIN = {}, {"prompt": TWO}
BESIDE_LOCON = "<lora:locon:0.8>"

EQUIVALENCES = [
    Equivalence("controlnet", "weight 0 is none", (controlnet(unit(weight=0.0)), {"prompt": TWO}), PLAIN),
    Equivalence(
        "controlnet",
        "weight 0 is none, also where it is more important",
        (controlnet(unit(weight=0.0, control_mode="ControlNet is more important")), {"prompt": TWO}),
        PLAIN,
    ),
    Equivalence("controlnet", "a unit that is off is none", (controlnet(unit(enabled=False)), {"prompt": TWO}), PLAIN),
    Equivalence(
        "controlnet",
        "a batch of 2 is two images",
        (controlnet(unit(control_mode="ControlNet is more important")), {"prompt": TWO, "n_iter": 2}),
        (controlnet(unit(control_mode="ControlNet is more important")), {"prompt": TWO, "batch_size": 2}),
    ),
    Equivalence(
        "regional-prompter",
        "both regions alike is one prompt",
        (regional_prompter("Attention"), {"prompt": f"a cat on a hill BREAK a cat on a hill {TWO[15:]}"}),
        PLAIN,
    ),
    Equivalence(
        "regional-prompter",
        "a batch of 2 is two images",
        (regional_prompter("Attention"), {"prompt": f"a cat BREAK a hill {TWO[15:]}", "n_iter": 2}),
        (regional_prompter("Attention"), {"prompt": f"a cat BREAK a hill {TWO[15:]}", "batch_size": 2}),
    ),
    *(
        Equivalence(
            "multidiffusion",
            f"{method}: tile batch 1 is tile batch 4",
            (tiled(method, 1), LARGE | {"prompt": TWO}),
            (tiled(method, 4), LARGE | {"prompt": TWO}),
        )
        for method in ("MultiDiffusion", "Mixture of Diffusers")
    ),
    Equivalence(
        "loractl",
        "a schedule of constants is the constant",
        prompt(f"<lora:lora:0.8@0,0.8@0.5,0.8@1> {BESIDE_LOCON}"),
        PLAIN,
    ),
    Equivalence(
        "loractl",
        "never anything is not there",
        prompt(f"<lora:unet_only:0@0,0@1> {BESIDE_LOCON}"),
        prompt(BESIDE_LOCON),
    ),
    Equivalence(
        "lora-block-weight",
        "all ones is none",
        prompt(f"<lora:attention:0.8:lbw=ALL> {BESIDE_LOCON}"),
        prompt(f"<lora:attention:0.8> {BESIDE_LOCON}"),
    ),
    Equivalence(
        "lora-block-weight",
        "all halves is half the weight",
        prompt(f"<lora:attention:1:lbw=ALL0.5> {BESIDE_LOCON}"),
        prompt(f"<lora:attention:0.5> {BESIDE_LOCON}"),
    ),
    Equivalence(
        "lora-block-weight",
        "the output blocks alone are a file with no others",
        prompt(f"<lora:attention:1:lbw=OUTALL> {BESIDE_LOCON}"),
        prompt(f"<lora:output_blocks:1> {BESIDE_LOCON}"),
    ),
    Equivalence(
        "lora-block-weight",
        "from the first step on is always",
        prompt(f"<lora:attention:0.8:lbw=ALL:start=0> {BESIDE_LOCON}"),
        prompt(f"<lora:attention:0.8> {BESIDE_LOCON}"),
    ),
    Equivalence(
        "lora-block-weight",
        "not before the last step is not there",
        prompt(f"<lora:unet_only:0.8:lbw=ALL:start=99> {BESIDE_LOCON}"),
        prompt(BESIDE_LOCON),
    ),
    Equivalence(
        "dynamic-thresholding", "mimic scale is CFG scale", (dynamic_thresholding(7.0, 100.0), {"prompt": TWO}), PLAIN
    ),
]


@pytest.mark.parametrize("row", EQUIVALENCES, ids=lambda row: f"{row.neighbour}: {row.name}")
def test_equivalence(company, row):
    first, second = company.by_itself(*row.first).made, company.by_itself(*row.second).made
    by_itself = Difference.of(first, second)
    assert by_itself.largest <= TOLERANCE, f"not so with the host by itself: {by_itself}"
    composed = company.composed(*row.second).made
    if row.second != prompt(BESIDE_LOCON):  # one LoRA alone
        assert Difference.of(composed, second).mean > 0.5, "it is not seen that it is composed"
    difference = Difference.of(company.composed(*row.first).made, composed)
    assert difference.largest <= TOLERANCE, str(difference)
