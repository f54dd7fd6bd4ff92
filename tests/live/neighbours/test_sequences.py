"""Nothing is left behind: after a composed image with a neighbour, whatever became of it, later images are as before.

Checked are, bit for bit, the host's own image of the same prompt, one that is composed in a window of steps only, and
the host's with the neighbour.
"""

from dataclasses import dataclass, field

import pytest

from tests.live.neighbours.company import STEPS, Difference, refusal
from tests.live.neighbours.rows import (
    HIRES,
    LARGE,
    REGIONS,
    TWO,
    TWO_REGIONS,
    Row,
    adetailer,
    controlnet,
    dynamic_thresholding,
    picture,
    reference,
    regional_prompter,
    tiled,
    unit,
)
from tests.live.webui import RequestError

pytestmark = pytest.mark.live

WINDOW = {"start": 0.5}


@dataclass(frozen=True)
class Course:
    """What is done with the neighbour active."""

    payload: dict = field(default_factory=dict)
    options: dict = field(default_factory=dict)
    sabotage: dict | None = None
    error: str = ""
    """what the answer must say; empty: images"""


IMAGE = {"image": picture(), "denoising_strength": 0.8}
TYPO, UNKNOWN = {"pool": ["typo"]}, {"patchsize": 4}

LONG_SECOND_PASS = HIRES | {"hr_second_pass_steps": 12}

SHORT = {
    "made": Course(),
    "refused: a pool's typo": Course(options=TYPO, error="typo"),
    "refused: no such option": Course(options=UNKNOWN, error="patchsize"),
    "refused: a pool's typo, img2img": Course(IMAGE, TYPO, error="typo"),
    "an error in the first step": Course(sabotage={"error": "runtime", "step": 0}, error="sabotaged"),
    "an error in the middle": Course(sabotage={"error": "runtime", "step": STEPS // 2}, error="sabotaged"),
    "interrupted": Course(sabotage={"error": "interrupt", "step": STEPS // 2}),
}
LONG = SHORT | {
    "made with start 0.5": Course(options=WINDOW),
    "made with end 0.5": Course(options={"end": 0.5}),
    "made with refresh 1": Course(options={"refresh": 1}),
    "made with reselect_every 2": Course(options={"top_k": 1, "reselect_every": 2}),
    "hires": Course(HIRES),
    "an error in hires": Course(LONG_SECOND_PASS, sabotage={"error": "runtime", "step": 8}, error="sabotaged"),
    "DDIM": Course({"sampler_name": "DDIM"}),
    "UniPC": Course({"sampler_name": "UniPC"}),
    "AND": Course({"prompt": f"{TWO} AND a dog :0.5"}),
    "img2img": Course(IMAGE),
    "an error in img2img": Course(IMAGE, sabotage={"error": "runtime", "step": 2}, error="sabotaged"),
}

SCHEDULE, BLOCKS = "<lora:lora:1@0,0@0.5>", "<lora:lora:1:lbw=OUTALL:stop=3>"
SUBJECTS = [
    (Row("controlnet", "Balanced", controlnet(unit())), LONG),
    (Row("controlnet", "reference_only", controlnet(reference("reference_only"))), SHORT),
    (
        Row("regional-prompter", "Attention", regional_prompter("Attention"), {"prompt": REGIONS}, two=TWO_REGIONS),
        SHORT | {name: LONG[name] for name in ("made with start 0.5", "made with refresh 1", "hires", "img2img")},
    ),
    (
        Row("regional-prompter", "Latent", regional_prompter("Latent"), {"prompt": "a cat <lora:lora:1> BREAK a hill"}),
        SHORT,
    ),
    (Row("multidiffusion", "MultiDiffusion", tiled("MultiDiffusion"), LARGE | {"steps": STEPS}), SHORT),
    (Row("loractl", "a schedule", {}, {"prompt": f"a cat {SCHEDULE}"}, two=f"a cat {SCHEDULE} <lora:locon:1>"), SHORT),
    (
        Row("lora-block-weight", "stops", {}, {"prompt": f"a cat {BLOCKS}"}, two=f"a cat {BLOCKS} <lora:locon:1>"),
        SHORT,
    ),
    (Row("adetailer", "one image", adetailer()), SHORT),
    (Row("dynamic-thresholding", "mimic scale 4", dynamic_thresholding(4.0)), SHORT),
]

SEQUENCES = [
    pytest.param(row, course, id=f"{row.name}: {name}") for row, courses in SUBJECTS for name, course in courses.items()
]


def follow(company, row: Row, course: Course) -> None:
    """The composed generation with the neighbour, of which the answer is as the course wants it."""
    scripts, payload = row.request(row.two if row.mode != "Latent" else row.one)
    if course.sabotage:
        scripts["LoRAtorio sabotage"] = {"args": [course.sabotage]}
    try:
        company.composed(scripts, payload | course.payload, **course.options)
    except RequestError as error:
        wanted = course.error and course.error in error.body
        assert wanted or refusal(error, (row.neighbour,)), error.body
    else:
        assert not course.error, f"an answer, where there should be an error that says {course.error}"


@pytest.mark.parametrize("row, course", SEQUENCES)
def test_later_images_are_as_before(company, row, course):
    plain, alone, neighbour = ({}, {"prompt": row.one}), ({}, {"prompt": TWO}), row.request(row.one)
    before = {
        "plain": company.by_itself(*plain).images,
        "composed from half way on": company.cost(*alone, **WINDOW).generation.images,
        "plain with the neighbour": company.by_itself(*neighbour).images,
    }
    try:
        follow(company, row, course)
        after = {
            "plain": company.generate(*plain).images,
            "composed from half way on": company.composed(*alone, **WINDOW).images,
            "plain with the neighbour": company.generate(*neighbour).images,
        }
        differences = {name: Difference.of(before[name], after[name]) for name in before}
        spoilt = [f"{name}: {difference}" for name, difference in differences.items() if not difference.none]
        assert not spoilt, "; ".join(spoilt)
    except BaseException:
        company.close()
        raise
