"""What comes with Forge, reForge and Forge Neo and takes part in a step, and Forge Couple where a folder holds it.

Beside each, one LoRA (alone; and with a copy of itself) is the host's own image, or it is refused by name; and plain
images are afterwards what they were.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.contract.rows import HIRES, TOLERANCE, Contract, largest, mean
from tests.live.forge import REFERENCE, ROOT, Forge, Neo, ReForge, lay_out_small_data
from tests.live.neighbours.control_models import control_lora, controlnet
from tests.live.webui import RequestError, encode_image

pytestmark = pytest.mark.live

PLAIN = "a cat on a hill"
ONE = f"{PLAIN} <lora:lora:1>"
COPIED = f"{ONE} <lora:lora_copy:1>"
TWO = f"{ONE} <lora:locon:0.8>"
EXACT = {"base_share": 0.0}
COUPLE = "forge-couple"

EMBEDDED, TOKENS, CONTEXT, WIDTH = 96, 4, 768, 320
"""What the tests' vision model makes of an image; tokens that an IP-Adapter makes of that; the model's sizes."""


def ip_adapter() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    weights = {"proj.weight": 0.3 * normal(TOKENS * CONTEXT, EMBEDDED), "proj.bias": torch.zeros(TOKENS * CONTEXT)}
    weights |= {"norm.weight": torch.ones(CONTEXT), "norm.bias": torch.zeros(CONTEXT)}
    found = {f"image_proj.{name}": weight for name, weight in weights.items()}
    for layer in range(16):
        for part in ("k", "v"):
            found[f"ip_adapter.{2 * layer + 1}.to_{part}_ip.weight"] = normal(WIDTH, CONTEXT) / CONTEXT**0.5
    return found


def control(**unit) -> dict:
    unit = {"enabled": True, "module": "None", "model": "small_control", "pixel_perfect": False, **unit}
    return {"ControlNet": {"args": [unit]}}


def couple() -> dict:
    arguments = [True, False, "Basic", "", "Horizontal", "None", 0.5, [], "off", False, False, False]
    return {"Forge Couple": {"args": arguments}}


COUPLED = {"prompt": "a cat on a hill {}\na red boat in the rain", "batch_size": 2}
"""A line for each half."""
LARGE = {"width": 192, "height": 192}
GUIDANCE = '"APG\'s now your CFG" and Guidance Limiter for reForge'
SHOWN = {"show_mahiro": True, "show_rescale_cfg": True}
"""Neo's options without which it has no such scripts."""

ROWS = {
    "ControlNet, balanced": (control(), {}),
    "ControlNet, my prompt is more important": (control(control_mode="My prompt is more important"), {}),
    "ControlNet is more important": (control(control_mode="ControlNet is more important"), {"batch_size": 2}),
    "ControlNet in the middle of the steps": (control(guidance_start=0.3, guidance_end=0.7), {}),
    "ControlNet, AND": (control(), {"prompt": f"{PLAIN} {{}} AND a red boat"}),
    "ControlNet, hires": (control(), HIRES),
    "IP-Adapter": (control(module="CLIP-ViT-H (IPAdapter)", model="small_ip-adapter"), {}),
    "Kohya HRFix": ({"Kohya HRFix Integrated": {"args": [True, 1, 2.0, 0.0, 0.6, True, "bicubic", "bicubic"]}}, {}),
    # Forge takes this for mimic scale 1, reForge for its simple mode, with mimic scale 1.
    "Dynamic thresholding": ({"DynamicThresholding (CFG-Fix) Integrated": {"args": [True, 1, 1.0]}}, {}),
    "StyleAlign": ({"StyleAlign Integrated": {"args": [True, 1.0]}}, {"batch_size": 2}),
    "HyperTile": ({"HyperTile Integrated": {"args": [True, 64, 2, 0, False]}}, LARGE),
    "MaHiRo": ({"MaHiRo": {"args": [True]}}, {}),
    "MaHiRo, reForge's": ({"Mahiro CFG for reForge": {"args": [True]}}, {}),
    "Rescale CFG": ({"RescaleCFG": {"args": [0.7]}}, {}),
    "Rescale CFG, reForge's": ({"RescaleCFG for reForge": {"args": [True, "Normal", 0.7]}}, {}),
    "Adaptive projected guidance": ({GUIDANCE: {"args": [True, 0.5, 0.18, 15.0, 1.0, False, 5.42, 0.28]}}, {}),
    "Latent modifier": ({"LatentModifier Integrated": {"args": [True, 100.0]}}, {}),
    "MultiDiffusion": ({"MultiDiffusion Integrated": {"args": [True, "Mixture of Diffusers", 128, 128, 64, 4]}}, LARGE),
    "Forge Couple": (couple(), {"prompt": COUPLED["prompt"].replace("{}", "{te=0}"), "batch_size": 2}),
}
"""Scripts' arguments by name, and payload by row. ``{}`` in a prompt is where the LoRAs are named."""

MODES_OF_CONTROL = ("ControlNet, my prompt is more important", "ControlNet is more important")
"""reForge's API takes every one for "balanced"."""

REFUSED = {
    "ControlNet, a control LoRA": (control(model="small_control-lora"), {}, "ControlLora"),
    "SAG": ({"SelfAttentionGuidance Integrated (SD 1.x, SD 2.x, SDXL)": {"args": [True]}}, {}, "sag"),
    "SAG, reForge's": ({"SelfAttentionGuidance Integrated": {"args": [True]}}, {}, "sag"),
    "PAG": ({"PerturbedAttentionGuidance Integrated": {"args": [True]}}, {}, "perturbed"),
    "Forge Couple": (couple(), COUPLED, COUPLE),
}
"""The same, and who is named."""


def lay_out(folder: Path) -> tuple[Path, Path]:
    """A data folder with control models, a copy of a LoRA, and Forge Couple if there is one."""
    extensions = [ROOT, REFERENCE]
    neighbours = os.environ.get("LORATORIO_NEIGHBOURS_DIR")
    if neighbours and (Path(neighbours) / COUPLE).is_dir():
        extensions.append(Path(neighbours) / COUPLE)
    data, checkpoint = lay_out_small_data(folder, tuple(extensions))
    config = data / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text(encoding="utf-8")) | SHOWN), encoding="utf-8")
    models, loras = data / "models" / "ControlNet", data / "models" / "Lora"
    models.mkdir(exist_ok=True)
    save_file(controlnet(checkpoint), models / "small_control.safetensors")
    save_file(control_lora(checkpoint), models / "small_control-lora.safetensors")
    save_file(ip_adapter(), models / "small_ip-adapter.safetensors")
    (loras / "lora_copy.safetensors").write_bytes((loras / "lora.safetensors").read_bytes())
    return data, checkpoint


@pytest.fixture(scope="module", params=[Neo, Forge, ReForge])
def contract(request, tmp_path_factory) -> Iterator[Contract]:
    kind, variable = request.param, f"LORATORIO_{request.param.name}_DIR"
    if not os.environ.get(variable):
        pytest.skip(f"{variable} does not name an installed {kind.__name__}")
    data, checkpoint = lay_out(tmp_path_factory.mktemp(kind.name.lower()))
    flags = (kind.lora_flag, str(data / "models" / "Lora"))
    with kind(Path(os.environ[variable]), data, checkpoint, flags=flags) as webui:
        webui.lora_names = (*webui.lora_names, "lora_copy")
        yield Contract(webui, kind.name.lower())


@pytest.fixture(scope="module")
def picture(contract) -> np.ndarray:
    return contract.webui.txt2img(prompt="a red boat", seed=7, steps=1).made[0]


class Beside:
    """Images made beside others. ``there``: the host's scripts by name, in lower case."""

    def __init__(self, contract, picture, scripts, payload):
        self.contract, self.payload = contract, {"steps": 3, "negative_prompt": "fog", **payload}
        there = contract.webui.get("/sdapi/v1/scripts")["txt2img"]
        missing = [name for name in scripts if name.lower() not in there]
        if missing:
            pytest.skip(f"{contract.host} has no {missing[0]}")
        self.scripts = json.loads(json.dumps(scripts))
        if "ControlNet" not in scripts:
            return
        listed = contract.webui.get("/controlnet/model_list")["model_list"]
        models = {name.partition(" [")[0]: name for name in listed}  # some hosts add a hash
        for unit in self.scripts["ControlNet"]["args"]:
            unit |= {"image": encode_image(picture), "model": models[unit["model"]]}

    def __call__(self, tags: str, options: dict | None = None, alone: bool = False):
        prompt = self.payload.get("prompt", f"{PLAIN} {{}}")
        if "{te=0}" in prompt:
            prompt, tags = prompt.replace("{te=0}", "{}"), tags.replace(":1>", ":0:1>").replace(":0.8>", ":0:0.8>")
        ours = {} if options is None else {"LoRAtorio": {"args": [{"enabled": True, **options}]}}
        scripts = ours if alone else {**self.scripts, **ours}
        return self.contract.generate(self.payload | {"prompt": prompt.replace("{}", tags)}, scripts)


ONE_TAG, COPIED_TAGS, TWO_TAGS = (each.removeprefix(f"{PLAIN} ") for each in (ONE, COPIED, TWO))


@pytest.mark.parametrize("row", ROWS)
def test_one_lora_is_the_hosts_own_image(contract, picture, row):
    if row in MODES_OF_CONTROL and contract.host == "reforge":
        pytest.skip("reForge's API takes this mode for another")
    beside = Beside(contract, picture, *ROWS[row])
    try:
        own, two = beside(ONE_TAG), beside(TWO_TAGS)
    except RequestError as error:
        pytest.skip(f"{contract.host} by itself fails: {error}")
    assert mean(own.made, beside(ONE_TAG, alone=True).made) > 0.05  # it does take part
    assert largest(beside(ONE_TAG, EXACT).made, own.made) <= TOLERANCE
    assert largest(beside(COPIED_TAGS, EXACT).made, own.made) <= TOLERANCE
    assert mean(beside(TWO_TAGS, {}).made, two.made) > 0.3
    for tags, earlier in ((ONE_TAG, own), (TWO_TAGS, two)):
        assert all(map(np.array_equal, earlier.made, beside(tags).made))


def test_a_controlnet_of_no_weight_is_none(contract, picture):
    beside = Beside(contract, picture, control(weight=0.0), {})
    assert largest(beside(TWO_TAGS, {}).made, beside(TWO_TAGS, {}, alone=True).made) <= TOLERANCE


@pytest.mark.parametrize("row", REFUSED)
def test_what_cannot_be_right_is_refused_by_name(contract, picture, row):
    scripts, payload, name = REFUSED[row]
    beside = Beside(contract, picture, scripts, payload)
    before = beside(ONE_TAG), beside(ONE_TAG, alone=True)
    assert mean(before[0].made, before[1].made) > 0.05
    with pytest.raises(RequestError) as caught:
        beside(ONE_TAG, EXACT)
    assert caught.value.status == 422
    assert name in caught.value.body
    for earlier, alone in zip(before, (False, True)):
        assert all(map(np.array_equal, earlier.made, beside(ONE_TAG, alone=alone).made))
