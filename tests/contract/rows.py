"""What the contract suite asks of a host: images from the extension, and from the brute-force reference."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest

from loratorio_ext.settings import Settings

TOLERANCE = 2
"""Grey levels of 255: the difference that rounding alone may make, over all the steps."""

HOST_OPTIONS = {
    "batch_cond_uncond": True,
    "pad_cond_uncond": False,
    "pad_cond_uncond_v0": False,
    "skip_early_cond": 0.0,
    "s_min_uncond_all": False,
    "hires_fix_use_firstpass_conds": False,
    "lora_functional": False,
    "lora_in_memory_limit": 100,
    "CLIP_stop_at_last_layers": 1,
    "use_old_scheduling": False,
    "samples_save": False,
}
"""Every option that a row may change, at its usual value: a host keeps overridden options it never knew before."""

HIRES = {"enable_hr": True, "hr_scale": 1.5, "hr_upscaler": "Latent", "denoising_strength": 0.7}
TWO = "a cat on a hill <lora:lora:1> <lora:locon:0.8>"
THREE = f"{TWO} <lora:unet_only:0.9>"


def largest(first: list[np.ndarray], second: list[np.ndarray]) -> int:
    """Largest difference of two lists of uint8 images, in grey levels."""
    assert [image.shape for image in first] == [image.shape for image in second]
    return max(int(np.abs(a.astype(int) - b.astype(int)).max()) for a, b in zip(first, second))


def mean(first: list[np.ndarray], second: list[np.ndarray]) -> float:
    """Mean difference of two lists of uint8 images, in grey levels."""
    return float(np.mean([np.abs(a.astype(int) - b.astype(int)) for a, b in zip(first, second)]))


class Contract:
    """A host, and the images it makes in four ways: plain, composed, by brute force, and merged (box off)."""

    def __init__(self, webui: Any, host: str):
        self.webui, self.host = webui, host
        self.largest_difference: int | None = None

    def generate(self, payload: dict, scripts: dict | None = None):
        payload = dict(payload)
        options = self.known(HOST_OPTIONS | payload.pop("host_options", {}))
        image = payload.pop("image", None)
        arguments = payload | {"override_settings": options, "alwayson_scripts": scripts or {}}
        if image is None:
            return self.webui.txt2img(**arguments)
        # The host encodes an image with noise drawn from where the generation before it left its generator.
        self.webui.txt2img(prompt="", seed=1, steps=1)
        return self.webui.img2img(image, **arguments)

    def known(self, options: dict) -> dict:
        """The options that the host has; skips a row that is about another one."""
        names = getattr(self.webui, "option_names", options)
        for name, value in options.items():
            if name not in names and value != HOST_OPTIONS[name]:
                pytest.skip(f"{self.host} has no option {name}")
        return {name: value for name, value in options.items() if name in names}

    def plain(self, **payload):
        """The host's own image, the extension switched off."""
        return self.generate(payload)

    def composed(self, options: dict | None = None, **payload):
        """The extension's image, with its options by name."""
        return self.generate(payload, {"LoRAtorio": {"args": [{"enabled": True, **(options or {})}]}})

    def brute_force(
        self,
        options: dict | None = None,
        in_every_pass: Sequence[str] = (),
        keeping: Sequence[str] = (),
        **payload,
    ):
        """The reference's image for the same options. Some LoRAs are in every pass, and the rest is theirs; or it is
        that of some which are ``keeping`` it."""
        settings = asdict(Settings.from_mapping({"enabled": True, **(options or {})}))
        settings |= {"in_every_pass": list(in_every_pass), "keeping": list(keeping)}
        return self.generate(payload, {"LoRAtorio reference": {"args": [settings]}})

    def assert_composes(
        self, options: dict | None = None, unlike_merged: float = 1.0, in_every_pass: Sequence[str] = (), **payload
    ):
        """The extension's images are the reference's, and visibly not those that the host makes by itself."""
        self.require(payload)
        composed = self.composed(options, **payload)
        reference = self.brute_force(options, in_every_pass, **payload)
        self.largest_difference = largest(composed.images, reference.images)
        assert self.largest_difference <= TOLERANCE
        assert mean(composed.images, self.plain(**payload).images) >= unlike_merged
        return composed

    def require(self, payload: dict) -> None:
        """Skip what this host has not."""
        names = getattr(self.webui, "sampler_names", None)
        wanted = payload.get("sampler_name", "Euler")
        if names is not None and wanted not in names:
            pytest.skip(f"{self.host} has no sampler {wanted}")
        loras = getattr(self.webui, "lora_names", None)
        for name in [part.split(":")[1] for part in payload.get("prompt", "").split("<")[1:]]:
            if loras is not None and name not in loras:
                pytest.skip(f"{self.host} reads no LoRA {name}")
