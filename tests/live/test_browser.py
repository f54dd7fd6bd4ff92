"""The panel in a browser, on real WebUIs: look, tick, generate, see who painted what, read the infotext back.

Needs what `browsing` does; LORATORIO_AXE names the file axe.min.js of axe-core.
"""

import base64
import os
import re
from pathlib import Path

import pytest
from PIL import Image

from tests.contract.rows import largest, mean
from tests.live.browsing import choose, expect, generated, says, set_numbers, shoot, visited
from tests.live.conftest import tiny_webui
from tests.live.forge import Neo, small_webui
from tests.live.webui import STYLE, decode_image

pytestmark = pytest.mark.live

HOSTS = {
    "a1111": lambda folders: tiny_webui("sd1", folders, ui=True),
    "neo": lambda folders: small_webui(Neo, folders, ui=True),
}
PROMPT = "a cat on a hill <lora:lora:0.9> <lora:locon:0.8>"
TABS = ("txt2img", "img2img")
QUICK = {"width": 64, "height": 64, "steps": 4}


@pytest.fixture(scope="module", params=HOSTS)
def webui(request, tmp_path_factory):
    with HOSTS[request.param](tmp_path_factory) as real:
        yield real


@pytest.fixture
def page(webui, browser, request):
    with visited(browser, webui.url) as page:
        yield page
        shoot(page, re.sub("[^a-z0-9]+", "-", request.node.name), full_page=True)


def opened(page, tab="txt2img", prompt=PROMPT):
    if tab == "img2img":
        page.get_by_role("tab", name="img2img").or_(
            page.get_by_role("button", name="img2img", exact=True)
        ).first.click()
    page.fill(f"#{tab}_prompt textarea", prompt)
    page.click(f"#loratorio_{tab} > .label-wrap")
    expect(says(page, tab)).to_contain_text("a step takes")


def preset(page):
    return expect(page.locator("#loratorio_txt2img_preset input"))


@pytest.mark.parametrize("tab", TABS)
def test_loras_and_cost_are_said_while_the_prompt_is_typed(page, tab):
    opened(page, tab)
    expected = expect(says(page, tab))
    expected.to_contain_text("2 LoRAs: a step takes about as long as 3 plain ones")
    page.fill(f"#{tab}_prompt textarea", f"{PROMPT} <lora:nowhere:1>")
    expected.to_contain_text("not found")
    page.fill(f"#{tab}_prompt textarea", f"{PROMPT} <lora:rank_1:1:at=up>")
    expected.to_contain_text("at in <lora:rank_1:1:at=up> must be")


def test_a_style_brings_its_loras(page):
    page.fill("#txt2img_prompt textarea", "a cat on a hill")
    page.click("#loratorio_txt2img > .label-wrap")
    expect(page.locator("#loratorio_txt2img .loratorio-badge")).to_have_text(re.compile("no LoRA"))
    choose(page, "txt2img_styles", STYLE[0])
    expect(says(page)).to_contain_text("rank_1 0.7, from a style")
    expect(page.locator("#loratorio_txt2img .loratorio-badge")).to_have_text("")


def test_a_loras_picture_is_shown(webui, page):
    Image.new("RGB", (16, 16), "red").save(webui.data / "models" / "Lora" / "lora.preview.png")
    opened(page)
    pictures = says(page).locator("img")
    expect(pictures).to_have_count(1)
    page.wait_for_function("image => image.naturalWidth === 16", arg=pictures.first.element_handle())


def test_a_preset_fills_in_and_a_changed_value_makes_it_custom(page):
    opened(page)
    choose(page, "loratorio_txt2img_preset", "fast")
    expect(page.locator("#loratorio_txt2img_sets").first).to_contain_text("LoRAs refreshed per step 1")
    page.click("#loratorio_txt2img_advanced > .label-wrap")
    number = page.locator("#loratorio_txt2img_refresh input[type=number]")
    expect(number).to_have_value("1")
    number.fill("2")
    page.keyboard.press("Tab")
    preset(page).to_have_value("custom")
    number.fill("1")
    page.keyboard.press("Tab")
    preset(page).to_have_value("fast")


def test_generate_and_see_who_painted_what_and_read_it_back(page):
    opened(page)
    page.check("#loratorio_txt2img_show_maps input")
    set_numbers(page, **QUICK)
    _, text = generated(page, 4)
    assert "LoRAtorio version: " in text and "LoRAtorio show maps: True" in text
    page.uncheck("#loratorio_txt2img_show_maps input")
    page.fill("#txt2img_prompt textarea", text.partition("Time taken")[0])
    page.click("#paste")
    expect(page.locator("#loratorio_txt2img_show_maps input")).to_be_checked()
    expect(page.locator("#txt2img_prompt textarea")).to_have_value(PROMPT)


def test_an_image_made_from_the_panel_is_the_apis(webui, page):
    opened(page)
    set_numbers(page, **QUICK)
    (address,), text = generated(page, 1)

    def said(key: str) -> str:
        return re.search(rf"\b{key}: ([^,\n]+)", text)[1]

    request = {"prompt": PROMPT, "seed": int(said("Seed")), "cfg_scale": float(said("CFG scale")), "steps": 4}
    request |= {"sampler_name": said("Sampler"), "scheduler": said("Schedule type")}
    image = [decode_image(base64.b64encode(page.request.get(address).body()).decode())]
    composed = webui.txt2img(**request, alwayson_scripts={"LoRAtorio": {"args": [{"enabled": True}]}})
    assert largest(image, composed.images) == 0
    assert mean(image, webui.txt2img(**request).images) > 1


def test_everything_is_reached_by_keyboard(page):
    opened(page)
    page.focus("#loratorio_txt2img_show_maps input")
    page.keyboard.press("Tab")
    expect(page.locator("#loratorio_txt2img_patch_size")).to_be_hidden()
    page.keyboard.press("Enter")
    expect(page.locator("#loratorio_txt2img_patch_size")).to_be_visible()


def test_axe_finds_nothing_serious(page):
    axe = os.environ.get("LORATORIO_AXE")
    if not axe:
        pytest.skip("LORATORIO_AXE does not name axe.min.js")
    opened(page)
    page.click("#loratorio_txt2img_advanced > .label-wrap")
    expect(page.locator("#loratorio_txt2img_patch_size")).to_be_visible()
    found = page.evaluate(
        "async (source) => { eval(source); const all = await axe.run('#loratorio_txt2img');"
        " return all.violations.map((each) => [each.id, each.impact, each.nodes.map((node) => node.html)]) }",
        Path(axe).read_text(),
    )
    theirs = "nested-interactive"  # the header is the host's: on Forge Neo a button with the tick box in it
    assert [each for each in found if each[1] in ("serious", "critical") and each[0] != theirs] == []
