"""X/Y/Z plots on a real host: its own script with our axes."""

import numpy as np
import pytest

from loratorio_ext.settings import PRESETS
from tests.contract.rows import TWO, largest
from tests.live.conftest import tiny_webui
from tests.live.forge import Forge, Neo, small_webui
from tests.live.webui import RequestError

pytestmark = pytest.mark.live

HOSTS = {
    "a1111": lambda folders: tiny_webui("sd1", folders),
    "forge": lambda folders: small_webui(Forge, folders),
    "neo": lambda folders: small_webui(Neo, folders),
}
STEPS = 2


@pytest.fixture(scope="module", params=HOSTS)
def webui(request, tmp_path_factory):
    with HOSTS[request.param](tmp_path_factory) as real:
        yield real


def arguments(webui, tab, axes: dict[str, str | list[str]]) -> list:
    """The script's values by its own description of them, which differs from host to host: up to three axes by label,
    each with its values, as text, or as chosen from its menu."""
    (info,) = [
        info
        for info in webui.get("/sdapi/v1/script-info")
        if info["name"] == "x/y/z plot" and info["is_img2img"] == tab
    ]
    values = [arg["value"] for arg in info["args"]]
    labels = [arg["label"] for arg in info["args"]]
    for name, (label, text) in zip("XYZ", axes.items()):
        place = labels.index(f"{name} type")
        values[place] = info["args"][place]["choices"].index(label)
        values[place + (1 if isinstance(text, str) else 2)] = text
    for name in "XYZ"[len(axes) :]:
        values[labels.index(f"{name} type")] = 0
    values[labels.index("Use text inputs instead of dropdowns")] = all(isinstance(text, str) for text in axes.values())
    values[labels.index("Draw legend")] = True
    values[labels.index("Include Sub Images")] = True
    return values


def plot(webui, axes, **payload):
    options = payload.pop("options", {"enabled": True})
    return webui.txt2img(
        **{"prompt": TWO, "steps": STEPS, **payload},
        script_name="x/y/z plot",
        script_args=arguments(webui, False, axes),
        alwayson_scripts={"LoRAtorio": {"args": [options]}},
    )


def composed(webui, **options):
    scripts = {"LoRAtorio": {"args": [{"enabled": True, **options}]}}
    return webui.txt2img(prompt=TWO, steps=STEPS, alwayson_scripts=scripts).images[0]


def test_the_methods_side_by_side(webui):
    grid = plot(webui, {"[LoRAtorio] Method": "Merge, Switch, Composite, LoRAtorio"})
    cells = [composed(webui, method=method) for method in ("merge", "switch", "composite", "loratorio")]
    assert largest(grid.images[1:5], cells) == 0
    assert len({cell.tobytes() for cell in cells}) == 4
    assert all(
        f"LoRAtorio method: {name}" in text for name, text in zip(["merge", "switch"], grid.info["infotexts"][1:])
    )


def test_values_from_the_menus(webui):
    grid = plot(webui, {"[LoRAtorio] Method": ["Switch", "LoRAtorio"], "[LoRAtorio] on/off": ["off", "on"]})
    off = webui.txt2img(prompt=TWO, steps=STEPS).images[0]
    cells = [off, off, composed(webui, method="switch"), composed(webui)]
    assert largest(grid.images[-4:], cells) == 0


def test_on_and_off_and_two_axes(webui):
    axes = {"[LoRAtorio] on/off": "off, on", "[LoRAtorio] Patch size": "1-5 (+4)"}
    grid = plot(webui, axes)
    off = webui.txt2img(prompt=TWO, steps=STEPS).images[0]
    cells = [off, composed(webui, patch_size=1), off, composed(webui, patch_size=5)]
    assert largest(grid.images[-4:], cells) == 0


def test_presets(webui):
    grid = plot(webui, {"[LoRAtorio] Preset": ", ".join(PRESETS)})
    assert largest(grid.images[1:5], [composed(webui, preset=name) for name in PRESETS]) == 0


def test_lists_and_claims_stand_in_quotes(webui):
    axes = {"[LoRAtorio] Pool": "rank_1; unet_only:0.5, rank_1"}
    grid = plot(webui, axes)
    cells = [composed(webui, pool=["rank_1", "unet_only:0.5"]), composed(webui, pool=["rank_1"])]
    assert largest(grid.images[1:3], cells) == 0
    value = '"{""lora"": {""at"": ""left""}}", "{}"'
    grid = plot(webui, {"[LoRAtorio] Where, when, how much": value})
    assert largest(grid.images[1:3], [composed(webui, loras={"lora": {"at": "left"}}), composed(webui)]) == 0


def test_a_value_that_is_not_allowed_stops_the_plot(webui):
    with pytest.raises(RequestError) as caught:
        plot(webui, {"[LoRAtorio] Patch size": "4, 99"})
    assert "patch_size must be a whole number from 1 to 64, got 99" in caught.value.body


def test_who_painted_what_stays_out_of_the_grid(webui):
    shown = plot(webui, {"[LoRAtorio] Patch size": "2, 4"}, options={"enabled": True, "show_maps": True})
    without = plot(webui, {"[LoRAtorio] Patch size": "2, 4"})
    assert np.array_equal(shown.images[0], without.images[0])
