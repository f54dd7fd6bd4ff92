"""What is said of an image beside a neighbour: names as the user wrote them, and every image's own."""

import re

import pytest

from tests.live.neighbours.company import Difference
from tests.live.neighbours.rows import TWO, Row, adetailer, controlnet, unit

pytestmark = [pytest.mark.live, pytest.mark.usefixtures("clean")]

TOP = {"top_k": 1}
MISSING = f"{TWO} <lora:no_such:1>"

WEIGHTS = {
    "a preset's weights": "<lora:lora:1:lbw=OUTALL>",
    "all ones": "<lora:lora:1:lbw=ALL>",
    "starts": "<lora:lora:1:lbw=ALL:start=2>",
    "block weights that stop": "<lora:lora:1:lbw=OUTALL:stop=3>",
}
BLOCKS = [Row("lora-block-weight", name, two=f"a cat {tag} <lora:locon:0.8>") for name, tag in WEIGHTS.items()]


@pytest.mark.parametrize("row", BLOCKS, ids=lambda row: row.name)
def test_loras_keep_their_names(company, row):
    infotext = company.composed({}, {"prompt": row.two}, **TOP).infotext
    assert "LoRAtorio picked: " in infotext
    picked = re.search(r"LoRAtorio picked: (\"[^\"]*\"|[^,]*)", infotext)[1]
    assert set(re.findall(r"[a-z]\w*", picked)) <= {"lora", "locon"}, picked
    assert "LBW" not in infotext.partition("LoRAtorio")[2]
    assert "not found" not in infotext


DETAIL = [
    Row("adetailer", "a batch of 2", adetailer(), {"batch_size": 2}),
    Row("adetailer", "two batches", adetailer(), {"n_iter": 2}),
    Row("adetailer", "two batches of 2", adetailer(), {"n_iter": 2, "batch_size": 2}),
]


@pytest.mark.parametrize("row", DETAIL, ids=lambda row: row.name)
def test_every_image_has_its_own(company, row):
    info = company.composed(*row.request(MISSING), **TOP).info
    infotexts = info["infotexts"][info.get("index_of_first_image", 0) :]
    assert len(infotexts) == row.payload.get("n_iter", 1) * row.payload.get("batch_size", 1)
    for number, infotext in enumerate(infotexts):
        assert "LoRAtorio picked: " in infotext, f"image {number}"
        assert "no_such" in infotext.partition("LoRAtorio note")[2], f"image {number}"


NOTHING = {
    "at weight 0": "<lora:lora:0>",
    "an empty file": "<lora:empty:1>",
    "all zero": "<lora:all_zero:1>",
    "alpha 0": "<lora:alpha_zero:1>",
}
IDLE = [Row("built in", name, two=f"a cat {tag} <lora:locon:0.7>") for name, tag in NOTHING.items()]


@pytest.mark.parametrize("options", [{}, {"preset": "paper"}], ids=["defaults", "paper"])
@pytest.mark.parametrize("row", IDLE, ids=lambda row: row.mode)
def test_a_lora_that_does_nothing_takes_no_share(company, row, options):
    alone = company.cost({}, {"prompt": "a cat <lora:locon:0.7>"}, **options).generation.images
    difference = Difference.of(alone, company.composed({}, {"prompt": row.two}, **options).images)
    assert difference.rounding, str(difference)


PLOT = [Row("controlnet", "a plot over its weight", controlnet(unit()))]


@pytest.mark.parametrize("row", PLOT, ids=lambda row: row.name)
def test_plot(company, row):
    """Cells of an X/Y/Z plot over ControlNet's own axis are composed by themselves."""
    scripts = company.webui.get("/sdapi/v1/script-info")
    (plot,) = [each for each in scripts if each["name"] == "x/y/z plot" and not each["is_img2img"]]
    axis = plot["args"][0]["choices"].index("[ControlNet] Weight")
    arguments = [axis, "0.3,1.0", [], 0, "", [], 0, "", [], False, True, False, False, False, False, False, 0, False]
    request = {"prompt": TWO, "script_name": "x/y/z plot", "script_args": arguments}
    cells = company.composed(row.scripts, request).images
    shape = (64, 64, 3)
    cells = [cell for cell in cells if cell.shape == shape]
    for cell, weight in zip(cells, (0.3, 1.0)):
        alone = company.composed(controlnet(unit(weight=weight)), {"prompt": TWO}).images[:1]
        assert Difference.of([cell], alone).none
    assert Difference.of(cells[:1], cells[1:2]).mean > 0.5
