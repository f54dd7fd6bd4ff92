"""An installed WebUI with some of the neighbours in it, and the images it makes: by itself, and composed."""

import json
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loratorio_ext.settings import Settings
from tests.contract.rows import largest, mean
from tests.live.webui import Generation, RequestError, WebUI

STEPS = 6

LARGEST = 1
"""Grey levels of 255 that rounding may make, at one pixel of an image that must be the same."""

MEAN = 0.1
"""The same in the mean over all pixels."""


@dataclass(frozen=True)
class Difference:
    """How far two generations' images are apart, in grey levels."""

    largest: int
    mean: float
    """of the worst image"""

    @classmethod
    def of(cls, first: list[np.ndarray], second: list[np.ndarray]) -> "Difference":
        if [image.shape for image in first] != [image.shape for image in second]:
            return cls(255, 255.0)
        return cls(largest(first, second), max(mean([a], [b]) for a, b in zip(first, second)))

    @property
    def rounding(self) -> bool:
        """Whether rounding alone explains it."""
        return self.largest <= LARGEST and self.mean <= MEAN

    @property
    def none(self) -> bool:
        return self.largest == 0

    def __str__(self) -> str:
        return f"{self.largest} at most, {self.mean:.3f} in the mean"


class Company:
    """A server, started when first asked and anew after it was spoilt. ``names``: the neighbours in it."""

    def __init__(self, host: Path, data: Path, checkpoint: Path, names: tuple[str, ...]):
        self.names = names
        self._server = lambda: WebUI(host, data, checkpoint)
        self._webui: WebUI | None = None
        self._known: dict[str, Generation] = {}
        self._costs: dict[str, Measured] = {}

    @property
    def webui(self) -> WebUI:
        if self._webui is None:
            self._webui = self._server().__enter__()
            # Some neighbours read how many steps the generation before had.
            self._webui.txt2img(steps=STEPS)
        return self._webui

    def close(self) -> None:
        """End the server; the next request starts another."""
        webui, self._webui = self._webui, None
        if webui is not None:
            webui.stop()

    def log(self) -> str:
        return "" if self._webui is None else self._webui.log()

    def generate(self, scripts: Mapping[str, Any], payload: Mapping[str, Any]) -> Generation:
        """Images for a request; ``image`` in it makes it img2img."""
        arguments = {"steps": STEPS, **payload, "alwayson_scripts": dict(scripts)}
        image = arguments.pop("image", None)
        if image is None:
            return self.webui.txt2img(**arguments)
        # The host encodes an image with noise drawn from where the generation before it left its generator.
        self.webui.txt2img(prompt="", seed=1, steps=1)
        return self.webui.img2img(image, **arguments)

    def by_itself(self, scripts: Mapping[str, Any], payload: Mapping[str, Any]) -> Generation:
        """The host's images with the box off; made once for equal requests."""
        key = key_of(scripts, payload)
        if key not in self._known:
            if "image" in payload:
                # A neighbour that loads a model draws from the generator that encoding the image draws from.
                self.generate(scripts, payload)
            self._known[key] = self.generate(scripts, payload)
        return self._known[key]

    def after_itself(self, request: tuple[dict, dict], plain: tuple[dict, dict]) -> Generation:
        """The images of ``plain`` after ``request``, both with the box off; made once for equal requests."""
        key = key_of("after", request, plain)
        if key not in self._known:
            self.generate(*request)
            self._known[key] = self.generate(*plain)
        return self._known[key]

    def composed(self, scripts: Mapping[str, Any], payload: Mapping[str, Any], **options) -> Generation:
        """The extension's images, with its options by name."""
        return self.generate({"LoRAtorio": {"args": [{"enabled": True, **options}]}, **scripts}, payload)

    def brute_force(
        self, scripts: Mapping[str, Any], payload: Mapping[str, Any], in_every_pass: tuple[str, ...] = (), **options
    ) -> Generation:
        """The reference's images for the same options, and with these of the prompt's LoRAs in every pass."""
        settings = asdict(Settings.from_mapping({"enabled": True, **options})) | {"in_every_pass": in_every_pass}
        return self.generate({"LoRAtorio reference": {"args": [settings]}, **scripts}, payload)

    def measured(self, scripts: Mapping[str, Any], payload: Mapping[str, Any], **options) -> "Measured":
        """A composed generation, with its seconds and model calls."""
        started = time.perf_counter()
        generation = self.composed({"LoRAtorio kit": {"args": [True]}, **scripts}, payload, **options)
        seconds = time.perf_counter() - started
        calls = re.search(r"Model calls: (\d+) of (\d+) rows", generation.infotext)
        return Measured(generation, seconds, int(calls[1]), int(calls[2]))

    def cost(self, scripts: Mapping[str, Any], payload: Mapping[str, Any], **options) -> "Measured":
        """The same, made once for equal requests."""
        key = key_of(scripts, payload, options)
        if key not in self._costs:
            self._costs[key] = self.measured(scripts, payload, **options)
        return self._costs[key]


def key_of(*request) -> str:
    """What tells a request from another."""
    return json.dumps(request, default=lambda image: image.tolist())


@dataclass(frozen=True)
class Measured:
    """A generation and what it took: seconds, calls of the UNet, and rows in all of them."""

    generation: Generation
    seconds: float
    calls: int
    rows: int


def refusal(error: RequestError, names: tuple[str, ...]) -> bool:
    """Whether an answer is a refusal that names one of these neighbours."""
    text = error.body.casefold().replace("-", " ")
    return error.status == 422 and any(name.casefold().replace("-", " ") in text for name in names)
