"""docs/first-image.md walked through in a browser, on real WebUIs: what it names is there, and does what it says.

On AUTOMATIC1111 with the tiny world, which makes the page's own pictures: LORATORIO_SCREENSHOTS=docs/img.
"""

import json
import re
import shutil
import struct
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.live.browsing import choose, expect, finished, generated, says, set_numbers, shoot, visited
from tests.live.conftest import ROOT, installed_host
from tests.live.forge import Neo, small_webui
from tests.live.test_tinyworld import LORAS, PROMPT, lay_out
from tests.live.webui import STYLE, WebUI

pytestmark = pytest.mark.live

PAGE = (ROOT / "docs" / "first-image.md").read_text(encoding="utf-8")
NAMED = {word for bold in re.findall(r"\*\*(.+?)\*\*", PAGE) for word in bold.split(" → ")}
"""What is set in bold on the page: words of the WebUI or of the panel."""
TAGS = "<lora:lora:0.9> <lora:locon:0.8> <lora:unet_only:1>"


@contextmanager
def tiny_world(folders):
    host = installed_host()
    data, checkpoint = lay_out(folders.mktemp("first"))
    loras = data / "models" / "Lora"
    shutil.copy(loras / "comet_quiet.safetensors", loras / "rank_1.safetensors")  # the style's
    with WebUI(host, data, checkpoint, ui=True) as webui:
        yield webui


HOSTS = {
    "a1111": (
        tiny_world,
        f"{PROMPT} {LORAS}",
        {"width": 256, "height": 256, "steps": 20, "cfg_scale": 4},
        "DDIM",
        "2 LoRAs: a step takes about as long as 3 plain ones",  # the background is in every pass
    ),
    "neo": (
        lambda folders: small_webui(Neo, folders, ui=True),
        f"a cat {TAGS}",
        {"width": 64, "height": 64, "steps": 6},
        "Euler",
        "3 LoRAs: a step takes about as long as 4 plain ones",
    ),
}


def with_metadata(source: Path, target: Path, metadata: dict[str, str]):
    """A copy of a safetensors file that says this of itself."""
    content = source.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.dumps(json.loads(content[8:][:length]) | {"__metadata__": metadata}).encode()
    target.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])


@pytest.fixture(params=HOSTS)
def walk(request, tmp_path_factory):
    """The WebUI, a prompt, numbers, a sampler, and what the panel says a step costs; and a LoRA, ``xl``, that was made
    for another model."""
    start, *told = HOSTS[request.param]
    prompt = told[0]
    with start(tmp_path_factory) as webui:
        loras = webui.data / "models" / "Lora"
        file = loras / f"{re.search('<lora:([^:]+):', prompt)[1]}.safetensors"
        with_metadata(file, loras / "xl.safetensors", {"ss_base_model_version": "sdxl_base_v1-0"})
        webui.post("/sdapi/v1/refresh-loras")
        yield webui, *told


def test_first_image(walk, browser, tmp_path):
    webui, prompt, numbers, sampler, cost = walk
    with visited(browser, webui.url, height=900) as page:
        shown = ""

        def look():
            nonlocal shown
            shown += page.inner_text("body")

        def show(name):
            page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
            shoot(page, name)

        def open_tab(name):
            page.locator("button", has_text=re.compile(rf"^\s*{name}\s*$")).filter(visible=True).first.click()
            page.wait_for_timeout(500)
            look()

        open_tab("Extensions")
        open_tab("Install from URL")
        open_tab("txt2img")

        header = page.locator("#loratorio_txt2img > .label-wrap")
        ticked = page.locator("#loratorio_txt2img-visible-checkbox")
        typed = page.locator("#txt2img_prompt textarea")
        assert not ticked.is_checked() and says(page).is_hidden()
        choose(page, "txt2img_sampling", sampler)
        set_numbers(page, **numbers)
        show("closed")
        header.click()
        expect(ticked).to_be_checked()
        expect(says(page)).to_be_visible()

        typed.fill(f"{prompt} <lora:astronaut:1>")
        expect(says(page)).to_contain_text(cost)
        expect(says(page)).to_contain_text("astronaut 1, not found")
        look()
        shoot(page.locator("#loratorio_txt2img"), "first-screen")
        typed.fill(prompt)
        open_tab("Lora")
        open_tab("Generation")

        tick = page.locator("#loratorio_txt2img_show_maps input")
        tick.check()
        page.click("#txt2img_generate")
        page.wait_for_selector("#txt2img_interrupt", state="visible")
        look()
        pictures, said = finished(page, 4)
        composed = page.request.get(pictures[0]).body()
        page.locator("#txt2img_gallery .thumbnails button").nth(1).click()
        page.wait_for_timeout(1000)
        show("result")

        # Now that a model is loaded on every host.
        typed.fill(f"{prompt} <lora:xl:1>")
        choose(page, "txt2img_styles", STYLE[0])
        expect(says(page)).to_contain_text("rank_1 0.7, from a style")
        look()
        page.locator("#txt2img_styles .token-remove").first.click()
        typed.fill(prompt)
        expect(says(page)).to_contain_text(cost)

        seed = re.search(r"Seed: (\d+)", said)[1]
        page.click("#txt2img_reuse_seed")
        expect(page.locator("#txt2img_seed input").first).to_have_value(seed)
        ticked.click()
        (picture,), said = generated(page, 1)
        assert f"Seed: {seed}" in said and "LoRAtorio" not in said
        assert page.request.get(picture).body() != composed

        (file := tmp_path / "composed.png").write_bytes(composed)
        open_tab("PNG Info")
        page.set_input_files("#pnginfo_image input[type=file]", file)
        expect(page.locator("#tab_pnginfo")).to_contain_text("LoRAtorio show maps: True")
        open_tab("Send to txt2img")
        expect(typed).to_have_value(prompt)
        expect(tick).to_be_checked()
        expect(ticked).to_be_checked()

        typed.fill("")
        page.locator("#paste").first.click()
        expect(typed).to_have_value(prompt)
        expect(ticked).not_to_be_checked()
    one_of_two = {"Apply and restart UI", "Apply and quit"}
    assert NAMED - one_of_two <= {word for word in NAMED if word in shown}
    assert any(word in shown for word in one_of_two)
