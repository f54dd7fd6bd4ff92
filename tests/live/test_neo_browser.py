"""The panel in Forge Neo's page: an image made from it is the one that the API makes of the same prompt.

Needs playwright and a Chromium, as `test_browser.py` says."""

import base64
import os
import re
from pathlib import Path

import pytest

from tests.contract.rows import TWO, largest, mean
from tests.live.forge import Neo, small_webui
from tests.live.webui import decode_image

pytestmark = pytest.mark.live
playwright = pytest.importorskip("playwright.sync_api")

QUIET = ("--no-sandbox", "--disable-gpu", "--disable-background-networking")


@pytest.fixture(scope="module")
def webui(tmp_path_factory):
    with small_webui(Neo, tmp_path_factory, ui=True) as real:
        yield real


@pytest.fixture
def page(webui):
    chromium = os.environ.get("LORATORIO_CHROMIUM", "/usr/bin/chromium")
    if not Path(chromium).exists():
        pytest.skip(f"there is no browser at {chromium}")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=list(QUIET))
        yield browser.new_page(viewport={"width": 1300, "height": 1500})
        browser.close()


def test_an_image_made_from_the_panel_is_the_apis(webui, page):
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(webui.url, wait_until="domcontentloaded")
    page.wait_for_selector("#loratorio_txt2img-visible-checkbox", state="attached", timeout=120_000)
    page.fill("#txt2img_prompt textarea", TWO)
    for name, value in (("width", "64"), ("height", "64"), ("steps", "4")):
        page.fill(f"#txt2img_{name} input[type=number]", value)
        page.keyboard.press("Tab")
    page.evaluate("document.querySelector('#loratorio_txt2img-visible-checkbox').click()")
    page.click("#txt2img_generate")
    page.locator("#txt2img_gallery img").first.wait_for(timeout=120_000)
    shown = page.request.get(page.locator("#txt2img_gallery img").first.get_attribute("src")).body()
    text = page.locator("#html_info_txt2img").inner_text()
    assert "LoRAtorio version: " in text

    def said(key: str) -> str:
        return re.search(rf"\b{key}: ([^,\n]+)", text)[1]

    request = {"prompt": TWO, "seed": int(said("Seed")), "cfg_scale": float(said("CFG scale")), "steps": 4}
    request |= {"sampler_name": said("Sampler"), "scheduler": said("Schedule type")}
    image = [decode_image(base64.b64encode(shown).decode())]
    composed = webui.txt2img(**request, alwayson_scripts={"LoRAtorio": {"args": [{"enabled": True}]}})
    assert largest(image, composed.images) == 0
    assert mean(image, webui.txt2img(**request).images) > 1
    assert errors == []
