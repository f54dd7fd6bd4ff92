"""What the neighbours' tests ask: a row a mode of a neighbour, with the request that turns it on.

Every row is a promise (``expected``): with this neighbour active the image is **right**, or generation **refuses**,
with status 422 and a text that names the neighbour. There is no third.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.contract.rows import HIRES
from tests.live.webui import encode_image

RIGHT, REFUSES = "right", "refuses"
EVERYBODY = "everybody"

ONE = "a cat on a hill <lora:lora:0.8>"
TWO = f"{ONE} <lora:locon:0.8>"
LARGE = {"width": 192, "height": 192, "steps": 4}
LARGER = {"width": 256, "height": 256, "steps": 3}


def picture(size: int = 64) -> np.ndarray:
    """A disc before a slope, uint8 ``(size, size, 3)``: something to draw control from."""
    y, x = np.mgrid[:size, :size] / size
    disc = np.hypot(y - 0.4, x - 0.55) < 0.25
    channels = np.where(disc, 0.9, 0.2 + 0.3 * x), np.where(disc, 0.3, 0.6 * y), np.where(disc, 0.2, 1 - y)
    return (255 * np.stack(channels, axis=2)).astype(np.uint8)


def half(size: int = 64) -> np.ndarray:
    """A mask of the left half, uint8 ``(size, size, 3)``."""
    mask = np.zeros((size, size, 3), np.uint8)
    mask[:, : size // 2] = 255
    return mask


PICTURE, LEFT_HALF = encode_image(picture()), encode_image(half())


def unit(**more) -> dict:
    """A ControlNet unit with the tiny model, unless told otherwise."""
    return {"enabled": True, "module": "none", "model": "tiny_control", "image": PICTURE, "weight": 1.0, **more}


def reference(module: str, **more) -> dict:
    """A ControlNet unit that needs no model: attention looks at another image, too."""
    return unit(module=module, model="None", threshold_a=0.5, processor_res=64, **more)


def controlnet(*units: dict) -> dict:
    return {"controlnet": {"args": list(units)}}


def regional_prompter(mode: str, **more) -> dict:
    """Two columns, a region each."""
    arguments = {
        "active": True,
        "debug": False,
        "tab": "Matrix",
        "split": "Columns",
        "mask_mode": "Mask",
        "prompt_mode": "Prompt",
        "ratios": "1,1",
        "base_ratios": "0.2",
        "use_base": False,
        "use_common": False,
        "use_negative_common": False,
        "mode": mode,
        "options": [False],
        "lora_negative_text": "0",
        "lora_negative_unet": "0",
        "threshold": "0.4",
        "mask": None,
        "lora_stop": "0",
        "lora_stop_hires": "0",
        "flip": False,
    }
    return {"regional prompter": {"args": list((arguments | more).values())}}


def region(x: float, width: float, prompt: str) -> list:
    """One region of Tiled Diffusion's, over the whole height."""
    return [True, x, 0.0, width, 1.0, prompt, "", "Background", 0.2, 3]


def tiled(method: str, batch: int = 4, regions: Sequence[list] = ()) -> dict:
    """Tiled Diffusion: tiles of 16 latent pixels that overlap by 8."""
    size = [False, True, 192, 192, 16, 16, 8, batch]
    unused = ["None", 2.0, False, 10, 1, 1, 64, False]
    control = [bool(regions), bool(regions), False]
    return {"tiled diffusion": {"args": [True, method, *size, *unused, *control, *sum(regions, [])]}}


def adetailer(**more) -> dict:
    """A detector that finds the same in every image, and one box of it painted anew."""
    detail = {"ad_model": "blind.pt", "ad_confidence": 0.0, "ad_mask_k": 1, "ad_denoising_strength": 0.6}
    size = {"ad_use_inpaint_width_height": True, "ad_inpaint_width": 64, "ad_inpaint_height": 64}
    return {"adetailer": {"args": [True, False, detail | size | more]}}


def dynamic_thresholding(mimic: float, percentile: float = 99.0) -> dict:
    return {"dynamic thresholding (cfg scale fix)": {"args": [True, mimic, percentile]}}


def host_options(**values) -> dict:
    return {"override_settings": values}


@dataclass(frozen=True)
class Row:
    """A neighbour in one of its modes."""

    neighbour: str
    """its folder's name, or ``built in`` for what comes with the host"""

    mode: str

    scripts: Mapping[str, Any] = field(default_factory=dict)
    """always-on scripts with their arguments"""

    payload: Mapping[str, Any] = field(default_factory=dict)
    """the request, beside the scripts"""

    expected: str = RIGHT

    two: str = TWO
    """the prompt with two LoRAs; empty: a prompt with two has no meaning in this mode"""

    always: bool = True
    """whether the first LoRA acts in every step: where it does not, it has no turn"""

    brute_force: bool = False
    """whether the brute-force reference itself is right in this company (a test asks it, too)"""

    unlike: Mapping[str, Any] | None = field(default_factory=dict)
    """changes to the request that turn the neighbour off: the host's image must be another. None: there is no such"""

    also: tuple[str, ...] = ()
    """other neighbours that must be there, too"""

    crowd: bool = False
    """whether it is tried where every neighbour is installed"""

    @property
    def server(self) -> str:
        """The set of neighbours that it is tried with."""
        return EVERYBODY if self.crowd else self.neighbour

    @property
    def name(self) -> str:
        return f"{self.neighbour}: {self.mode}"

    @property
    def one(self) -> str:
        """The prompt with one LoRA."""
        return self.payload.get("prompt", ONE)

    @property
    def twins(self) -> str:
        """The prompt with that LoRA and its copy: two that predict the same compose to what one of them does."""
        return re.sub("<lora:lora:[^>]*>", lambda tag: f"{tag[0]} {tag[0].replace(':lora:', ':twin:')}", self.one)

    @property
    def without(self) -> str:
        """The prompt without a LoRA."""
        return re.sub(" *<lora:[^>]*>", "", self.one)

    def request(self, prompt: str) -> tuple[dict, dict]:
        """Scripts and payload with the neighbour active."""
        return dict(self.scripts), {**self.payload, "prompt": prompt}

    def request_without_neighbour(self, prompt: str) -> tuple[dict, dict]:
        """The same with the neighbour off."""
        return {}, {**self.payload, "prompt": prompt, **(self.unlike or {})}


REGIONS = "a cat BREAK a hill <lora:lora:0.8>"
TWO_REGIONS = f"{REGIONS} <lora:locon:0.8>"
BESIDE = [region(0.0, 0.5, "a red boat"), region(0.5, 0.5, "a green tree")]

CONTROLNET = [
    Row("controlnet", "Balanced", controlnet(unit()), brute_force=True),
    Row("controlnet", "My prompt is more important", controlnet(unit(control_mode="My prompt is more important"))),
    Row("controlnet", "ControlNet is more important", controlnet(unit(control_mode="ControlNet is more important"))),
    Row(
        "controlnet",
        "guidance from 0.3 to 0.7",
        controlnet(unit(guidance_start=0.3, guidance_end=0.7)),
        brute_force=True,
    ),
    Row("controlnet", "region mask", controlnet(unit(effective_region_mask=LEFT_HALF)), brute_force=True),
    Row("controlnet", "two units", controlnet(unit(weight=0.6), unit(model="tiny_adapter", weight=0.7))),
    Row("controlnet", "T2I adapter", controlnet(unit(model="tiny_adapter")), brute_force=True),
    Row("controlnet", "acting globally (shuffle)", controlnet(unit(model="tiny_shuffle"))),
    Row("controlnet", "inpaint_only", controlnet(unit(module="inpaint_only", mask=LEFT_HALF))),
    Row("controlnet", "hires", controlnet(unit()), HIRES, brute_force=True),
    Row("controlnet", "DDIM", controlnet(unit()), {"sampler_name": "DDIM"}, brute_force=True),
    Row("controlnet", "UniPC", controlnet(unit()), {"sampler_name": "UniPC"}, brute_force=True),
    Row("controlnet", "AND", controlnet(unit()), {"prompt": f"{ONE} AND a dog :0.5"}, two=f"{TWO} AND a dog :0.5"),
    Row(
        "controlnet",
        "is more important, AND, batch of 2",
        controlnet(unit(control_mode="ControlNet is more important")),
        {"prompt": f"{ONE} AND a dog :0.5", "batch_size": 2},
        two=f"{TWO} AND a dog :0.5",
    ),
    Row("controlnet", "batch of 2", controlnet(unit()), {"batch_size": 2}, brute_force=True),
    Row("controlnet", "img2img", controlnet(unit()), {"image": picture(), "denoising_strength": 0.8}),
    # It reads the UNet's own weights, LoRAs included.
    Row("controlnet", "control LoRA", controlnet(unit(model="tiny_control_lora")), expected=REFUSES),
    # They draw noise in every call, and in the first also their latents: no call is like another.
    Row("controlnet", "reference_only", controlnet(reference("reference_only")), expected=REFUSES),
    Row(
        "controlnet",
        "reference_only, is more important",
        controlnet(reference("reference_only", control_mode="ControlNet is more important")),
        expected=REFUSES,
    ),
    Row(
        "controlnet",
        "reference_only, batch of 2",
        controlnet(reference("reference_only")),
        {"batch_size": 2},
        expected=REFUSES,
    ),
    Row("controlnet", "reference_adain", controlnet(reference("reference_adain")), expected=REFUSES),
    Row("controlnet", "reference_adain+attn", controlnet(reference("reference_adain+attn")), expected=REFUSES),
    Row("controlnet", "reference_only and a model", controlnet(reference("reference_only"), unit()), expected=REFUSES),
]

REGIONAL_PROMPTER = [
    Row("regional-prompter", "Attention", regional_prompter("Attention"), {"prompt": REGIONS}, two=TWO_REGIONS),
    Row(
        "regional-prompter",
        "Attention, batch of 2",
        regional_prompter("Attention"),
        {"prompt": REGIONS, "batch_size": 2},
        two=TWO_REGIONS,
    ),
    Row(
        "regional-prompter",
        "Attention, common prompt",
        regional_prompter("Attention", ratios="1,1", use_common=True),
        {"prompt": "masterpiece <lora:lora:0.8> BREAK a cat BREAK a hill"},
        two="masterpiece <lora:lora:0.8> <lora:locon:0.8> BREAK a cat BREAK a hill",
    ),
    Row(
        "regional-prompter",
        "Attention, hires",
        regional_prompter("Attention"),
        {"prompt": REGIONS, **HIRES},
        two=TWO_REGIONS,
    ),
    Row(
        "regional-prompter",
        "Attention, DDIM",
        regional_prompter("Attention"),
        {"prompt": REGIONS, "sampler_name": "DDIM"},
        two=TWO_REGIONS,
    ),
    Row(
        "regional-prompter",
        "Prompt",
        regional_prompter("Attention", tab="Prompt", use_base=True),
        {"prompt": "a cat on a hill <lora:lora:0.8> BREAK a red boat, cat"},
        two="a cat on a hill <lora:lora:0.8> <lora:locon:0.8> BREAK a red boat, cat",
        expected=REFUSES,  # it gathers attention over all calls
    ),
    Row(
        "regional-prompter",
        "Latent, the LoRA in one region",
        regional_prompter("Latent"),
        {"prompt": "a cat <lora:lora:0.8> BREAK a hill"},
        expected=REFUSES,  # the LoRAs act where it says, call by call
        two="",
    ),
    Row(
        "regional-prompter",
        "Latent, batch of 2",
        regional_prompter("Latent"),
        {"prompt": "a cat <lora:lora:0.8> BREAK a hill", "batch_size": 2},
        expected=REFUSES,  # the LoRAs act where it says, call by call
        two="",
    ),
]

TILED_DIFFUSION = [
    Row("multidiffusion", "MultiDiffusion, tile batch 1", tiled("MultiDiffusion", 1), LARGE, brute_force=True),
    Row("multidiffusion", "MultiDiffusion, tile batch 4", tiled("MultiDiffusion"), LARGE, brute_force=True),
    Row("multidiffusion", "Mixture of Diffusers, tile batch 1", tiled("Mixture of Diffusers", 1), LARGE),
    Row("multidiffusion", "Mixture of Diffusers, tile batch 4", tiled("Mixture of Diffusers"), LARGE),
    Row("multidiffusion", "batch of 2", tiled("MultiDiffusion"), LARGE | {"batch_size": 2}, brute_force=True),
    Row("multidiffusion", "DDIM", tiled("MultiDiffusion"), LARGE | {"sampler_name": "DDIM"}),
    *(
        Row(
            "multidiffusion",
            f"Region Prompt Control, {method}",
            tiled(method, 4, BESIDE),
            LARGE,
            expected=REFUSES,  # regions have texts and LoRAs of their own
            two="",
        )
        for method in ("MultiDiffusion", "Mixture of Diffusers")
    ),
    Row(
        "multidiffusion", "beside ControlNet", tiled("MultiDiffusion") | controlnet(unit()), LARGE, also=("controlnet",)
    ),
]

LORACTL = [
    Row(
        "loractl",
        "a weight for the first fifth",
        payload={"prompt": "a cat on a hill <lora:lora:1@0,0@0.2>"},
        two="a cat on a hill <lora:lora:1@0,0@0.2> <lora:locon:0.8>",
        brute_force=True,
        unlike={"prompt": "a cat on a hill <lora:lora:1>"},
    ),
    Row(
        "loractl",
        "a rising weight",
        payload={"prompt": "a cat on a hill <lora:lora:0.3@0,1@0.5>"},
        two="a cat on a hill <lora:lora:0.3@0,1@0.5> <lora:locon:1@0,0@1>",
        brute_force=True,
        unlike={"prompt": "a cat on a hill <lora:lora:1>"},
    ),
    Row(
        "loractl",
        "a weight that starts at zero",
        payload={"prompt": "a cat on a hill <lora:lora:0@0,2@0.5>"},
        two="a cat on a hill <lora:lora:0@0,2@0.5> <lora:locon:0.8>",
        always=False,
        brute_force=True,
        unlike={"prompt": "a cat on a hill <lora:lora:1>"},
    ),
    Row(
        "loractl",
        "hires with a weight of its own",
        payload={"prompt": "a cat on a hill <lora:lora:0.3:hr=0@0,1@1>", **HIRES},
        two="a cat on a hill <lora:lora:0.3:hr=0@0,1@1> <lora:locon:0.8>",
        unlike={"prompt": "a cat on a hill <lora:lora:0.3>"},
        expected=REFUSES,  # the host encodes the second pass's text before the weight changes
    ),
]


def block_weight(mode: str, part: str, **more) -> Row:
    """A row for a tag with a part of LoRA Block Weight's."""
    tag = f"a cat on a hill <lora:lora:1:{part}>"
    unlike = {"prompt": "a cat on a hill <lora:lora:1>"}
    return Row("lora-block-weight", mode, {}, {"prompt": tag}, two=f"{tag} <lora:locon:0.8>", unlike=unlike, **more)


BLOCK_WEIGHT = [
    block_weight("a preset's weights", "lbw=OUTALL"),
    block_weight("weights by number", "lbw=0.5,0,0,1,1,0,0.3,0.3,1,1,1,0,0,1,1,1,0.2"),
    block_weight("starts at step 4", "lbw=ALL:start=4"),
    block_weight("stops at step 4", "lbw=ALL:stop=4"),
    block_weight("acts in steps 2 to 4", "lbw=ALL:step=2-4"),
    block_weight("block weights that stop", "lbw=OUTALL:stop=4"),
]

ADETAILER = [
    # By default it runs few scripts when it paints anew, and not ours: two LoRAs are merged there.
    Row("adetailer", "one image", adetailer(), two=""),
    Row("adetailer", "a batch of 2", adetailer(), {"batch_size": 2}, two=""),
    Row("adetailer", "two batches", adetailer(), {"n_iter": 2}, two=""),
    Row("adetailer", "a prompt of its own", adetailer(ad_prompt="a dog <lora:locon:0.8>"), two=""),
    Row("adetailer", "with our script among those it runs", adetailer(), host_options(ad_script_names="loratorio")),
]

DYNAMIC_THRESHOLDING = [
    Row("dynamic-thresholding", "mimic scale 4", dynamic_thresholding(4.0), brute_force=True),
    Row(
        "dynamic-thresholding",
        "DPM++ 2M, batch of 2",
        dynamic_thresholding(4.0),
        {"sampler_name": "DPM++ 2M", "batch_size": 2},
        brute_force=True,
    ),
]

IMAGE = {"image": picture(), "denoising_strength": 0.8}
MASKED = IMAGE | {"mask": LEFT_HALF, "mask_blur": 4, "inpainting_fill": 1}


BUILT_IN = [
    Row(
        "built in",
        "soft inpainting",
        {"soft inpainting": {"args": [True, 1, 0.5, 4, 0, 0.5, 2]}},
        MASKED,
        brute_force=True,
    ),
    Row(
        "built in",
        "hypertile",
        payload=LARGER | host_options(hypertile_enable_unet=True, hypertile_max_tile_unet=128),
        unlike=host_options(hypertile_enable_unet=False),
    ),
    Row(
        "built in",
        "token merging",
        payload=LARGE | host_options(token_merging_ratio=0.5),
        unlike=host_options(token_merging_ratio=0.0),
    ),
    Row(
        "built in",
        "loopback",
        payload=IMAGE | {"script_name": "loopback", "script_args": [2, 0.5, "Linear", "None"]},
        unlike={"script_name": "", "script_args": []},
    ),
    Row(
        "built in",
        "SD upscale",
        payload=IMAGE | {"script_name": "sd upscale", "script_args": ["", 16, "None", 1.5]},
        unlike=None,
    ),
]

CROWD = [
    Row(
        "regional-prompter",
        "Attention, with ControlNet",
        regional_prompter("Attention") | controlnet(unit()),
        {"prompt": REGIONS},
        two=TWO_REGIONS,
        also=("controlnet",),
        crowd=True,
    ),
    Row(
        "lora-block-weight",
        "starts at step 3, with ControlNet",
        controlnet(unit()),
        {"prompt": "a cat on a hill <lora:lora:1:lbw=ALL:start=3>"},
        two="a cat on a hill <lora:lora:1:lbw=ALL:start=3> <lora:locon:0.8>",
        also=("controlnet",),
        crowd=True,
    ),
    Row(
        "dynamic-thresholding",
        "mimic scale 4, with ControlNet's reference_only",
        dynamic_thresholding(4.0) | controlnet(reference("reference_only")),
        also=("controlnet",),
        crowd=True,
        expected=REFUSES,
    ),
    Row("adetailer", "with ControlNet", adetailer() | controlnet(unit()), two="", also=("controlnet",), crowd=True),
]
"""Several at once, where all are installed."""

TABLE = [
    *CONTROLNET,
    *REGIONAL_PROMPTER,
    *TILED_DIFFUSION,
    *LORACTL,
    *BLOCK_WEIGHT,
    *ADETAILER,
    *DYNAMIC_THRESHOLDING,
    *CROWD,
    *BUILT_IN,
]
