"""With the box off we are not there: bit for bit the same images, every neighbour installed, with us and without."""

import pytest

from tests.live.neighbours.company import Difference
from tests.live.neighbours.folder import NEIGHBOURS, present, require
from tests.live.neighbours.rows import (
    ADETAILER,
    BLOCK_WEIGHT,
    CONTROLNET,
    DYNAMIC_THRESHOLDING,
    LORACTL,
    REGIONAL_PROMPTER,
    TILED_DIFFUSION,
)

pytestmark = pytest.mark.live

ROWS = [
    *(row for row in CONTROLNET if row.mode in ("Balanced", "ControlNet is more important", "hires", "reference_only")),
    *(row for row in REGIONAL_PROMPTER if row.mode in ("Attention", "Latent, the LoRA in one region")),
    *(
        row
        for row in TILED_DIFFUSION
        if row.mode in ("MultiDiffusion, tile batch 4", "Region Prompt Control, MultiDiffusion")
    ),
    *LORACTL[:1],
    *BLOCK_WEIGHT[:3],
    *ADETAILER[:2],
    *DYNAMIC_THRESHOLDING[:1],
]


@pytest.fixture(scope="module")
def without_us(open_company):
    """Images by row's name, from a server that has never heard of us."""
    company = open_company(NEIGHBOURS, with_us=False)
    there = [row for row in ROWS if row.neighbour in present()]
    images = {row.name: company.generate(*row.request(row.two or row.one)).images for row in there}
    company.close()
    return images


@pytest.fixture(scope="module")
def with_us(open_company):
    company = open_company(NEIGHBOURS)
    yield company
    company.close()


@pytest.mark.parametrize("subject", ROWS, ids=lambda row: row.name)
def test_box_off(without_us, with_us, subject):
    require(subject.neighbour)
    images = with_us.generate(*subject.request(subject.two or subject.one)).images
    assert Difference.of(without_us[subject.name], images).none
