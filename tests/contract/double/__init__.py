"""A double of AUTOMATIC1111's WebUI: the part of it that the extension uses, over a tiny model, in this process.

    with Double(tmp_path) as webui:
        generation = webui.txt2img(prompt="a cat <lora:locon:0.8>", seed=3)
        generation.images[0]  # uint8 array (height, width, 3)

It is driven like ``tests.live.webui.WebUI``, so that one test serves both, and it has the same LoRA files. The folder
``host`` beside this file holds what the host puts on ``sys.path``: the package ``modules``, ``networks`` of its Lora
extension, and ``gradio``. They are imported anew for every double, and so is the extension; what had been imported
before is put back when the double is left.
"""

import importlib
import json
import logging
import sys
from collections.abc import Iterable
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from safetensors.torch import save_file

from tests.live.lora_files import CATALOGUE, diffusers_path, key_name, write_catalogue
from tests.live.webui import PAYLOAD, Generation, RequestError, encode_image

__all__ = ["Double", "Generation", "RequestError"]

HOST = Path(__file__).parent / "host"
ROOT = Path(__file__).parents[3]
LIVE = ROOT / "tests" / "live"
EXTENSIONS = (ROOT, LIVE / "reference_extension", LIVE / "sabotage_extension")


@contextmanager
def fresh_imports(*packages: str):
    """While entered, these packages are imported anew, and afterwards they are what they were before."""

    def take_out() -> dict[str, ModuleType]:
        return {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in packages}

    before, path = take_out(), list(sys.path)
    try:
        yield
    finally:
        take_out()
        sys.modules.update(before)
        sys.path[:] = path


class LogHandler(logging.Handler):
    """Log records among the host's own lines."""

    def __init__(self, lines: list[str]):
        super().__init__(logging.INFO)
        self.lines = lines
        self.setFormatter(logging.Formatter("%(levelname)s [%(name)s] %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.extend(self.format(record).splitlines())


@contextmanager
def logging_to(lines: list[str], level: int):
    """While entered, records from ``level`` on are among ``lines``."""
    root, handler = logging.getLogger(), LogHandler(lines)
    before = {logger: logger.level for logger in (root, logging.getLogger("loratorio"))}
    root.setLevel(level)
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        for logger, earlier in before.items():
            logger.setLevel(earlier)


class Double:
    """The host, while entered. ``data``: where its files go.

    ``family`` is the model's: sd1; sd2v, which predicts velocity; sdxl, whose conditionings are dicts. ``level`` is
    that of its log.
    """

    def __init__(
        self,
        data: Path,
        extensions: Iterable[Path] = EXTENSIONS,
        family: str = "sd1",
        level: int = logging.INFO,
    ):
        self.data = Path(data)
        self.level = level
        self.extensions = tuple(extensions)
        self.family = family
        self._stack = ExitStack()

    def __enter__(self) -> "Double":
        with ExitStack() as stack:
            stack.enter_context(fresh_imports("loratorio_ext", *(path.stem for path in HOST.iterdir())))
            sys.path.insert(0, str(HOST))
            self._lines = self.module("modules.errors").lines
            stack.enter_context(logging_to(self._lines, self.level))
            self._start()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception) -> None:
        self._stack.close()

    def module(self, name: str) -> ModuleType:
        """A module of the host, or of the extension as the host has loaded it; to look at, and to break."""
        return importlib.import_module(name)

    def log(self) -> str:
        """All that the host has printed so far."""
        return "\n".join(self._lines)

    def txt2img(self, **payload: Any) -> Generation:
        """Images for a prompt: 64x64, 8 Euler steps, CFG 7 and seed 1 unless told otherwise."""
        return self._request("txt2img", payload)

    def img2img(self, image: np.ndarray, **payload: Any) -> Generation:
        """Images from ``image`` (uint8, (height, width, 3)) and a prompt; defaults as in ``txt2img``."""
        return self._request("img2img", {"init_images": [encode_image(image)], **payload})

    def _request(self, tab: str, payload: dict[str, Any]) -> Generation:
        request = json.loads(json.dumps(PAYLOAD | payload))  # what comes through HTTP
        try:
            processed = getattr(self._api, tab)(request)
        except Exception as error:
            status, body = self.module("modules.api").error_answer(error)
            raise RequestError(f"/sdapi/v1/{tab}", status, json.dumps(body)) from None
        return Generation([np.array(image) for image in processed.images], json.loads(processed.js()))

    def _start(self) -> None:
        """Load the model, write the LoRA files, load the extensions and build their UI."""
        shared, models = self.module("modules.shared"), self.module("modules.sd_models")
        shared.sd_model = models.load_model(self.family)
        self._write_files(shared.sd_model)
        extra_networks = self.module("modules.extra_networks")
        extra_networks.extra_network_registry["lora"] = self.module("extra_networks_lora").ExtraNetworkLora()
        for extension in self.extensions:
            self.module("modules.scripts").load_scripts(extension)
        self._api = self.module("modules.api").Api(str(self.data / "outputs"))
        self.sampler_names = [config.name for config in self.module("modules.sd_samplers").all_samplers]
        self.lora_names = [recipe.name for recipe in CATALOGUE]

    def _write_files(self, model: Any) -> None:
        """The checkpoint, and the LoRA files that the live kit makes for it."""
        networks = self.module("networks")
        folder = self.data / "models" / "Lora"
        self.module("modules.shared").cmd_opts.lora_dir = str(folder)
        checkpoint = self.data / "models" / "Stable-diffusion" / f"tiny-{self.family}.safetensors"
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), checkpoint)
        write_catalogue(checkpoint, folder)
        networks.list_available_networks()

        own_names = (("diffusion_model", "lora_unet"), ("diffusion_model", "oft_unet"))
        own_names += (("0_transformer", "lora_te1"), ("transformer", "lora_te"))
        for name in model.network_layer_mapping:
            for own, in_files in own_names:
                networks.layer_of_key[name.replace(own, in_files, 1)] = name
        unet = model.model.diffusion_model
        for path in (name.removesuffix(".weight") for name, _ in unet.named_parameters() if name.endswith(".weight")):
            networks.layer_of_key[key_name("lora_unet", diffusers_path(path))] = key_name("diffusion_model", path)
