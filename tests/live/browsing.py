"""A browser before a WebUI's page, and what people do there.

Needs playwright from PyPI and a Chromium (LORATORIO_CHROMIUM, or /usr/bin/chromium). Screenshots go to
LORATORIO_SCREENSHOTS, if that is set.
"""

import os
from contextlib import contextmanager
from pathlib import Path

import pytest

playwright = pytest.importorskip("playwright.sync_api")
expect = playwright.expect

QUIET = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")


@contextmanager
def launched():
    """The browser."""
    chromium = os.environ.get("LORATORIO_CHROMIUM", "/usr/bin/chromium")
    if not Path(chromium).exists():
        pytest.skip(f"there is no browser at {chromium}")
    with playwright.sync_playwright() as driver:
        expect.set_options(timeout=30_000)
        browser = driver.chromium.launch(executable_path=chromium, args=list(QUIET))
        yield browser
        browser.close()


@contextmanager
def visited(browser, url, height=1100):
    """The WebUI's page with the panel in it. ``errors`` of its scripts are none at the end."""
    page = browser.new_page(viewport={"width": 1240, "height": height})
    page.errors = errors = []
    page.on("pageerror", lambda error: errors.append(f"{error}\n{error.stack}"))
    page.goto(url, wait_until="domcontentloaded")
    page.wait_for_selector("#loratorio_txt2img-visible-checkbox", state="attached", timeout=120_000)
    yield page
    page.close()
    assert errors == []


def shoot(what, name, **options):
    """A screenshot of the page, or of an element."""
    folder = os.environ.get("LORATORIO_SCREENSHOTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        what.screenshot(path=Path(folder) / f"{name}.png", **options)


def says(page, tab="txt2img"):
    """The part of the panel that says what will be composed."""
    return page.locator(f"#loratorio_{tab}_found").first


def choose(page, menu, entry):
    page.click(f"#{menu} input")
    page.locator(f"#{menu} li, ul.options li").filter(has_text=entry).first.click()


def set_numbers(page, **numbers):
    """Width, height, steps and the like, of txt2img."""
    for name, value in numbers.items():
        page.fill(f"#txt2img_{name} input[type=number]", str(value))
        page.keyboard.press("Tab")
    page.wait_for_timeout(3000)
    page.errors.clear()  # the host's own, for every change of width or height, with our panel closed, too


PICTURES = "[...new Set([...document.querySelectorAll('#txt2img_gallery img')].map((image) => image.src))]"


def finished(page, count):
    """The addresses of so many pictures in the gallery once the generation is over, and the first one's infotext."""
    over = "getComputedStyle(document.querySelector('#txt2img_interrupt')).display === 'none'"
    page.wait_for_function(f"(count) => {over} && {PICTURES}.length === count", arg=count, timeout=120_000)
    return page.evaluate(PICTURES), page.locator("#html_info_txt2img").first.inner_text()


def generated(page, count):
    """What is `finished` after a press of the button."""
    page.click("#txt2img_generate")
    return finished(page, count)
