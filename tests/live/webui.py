"""An installed Stable Diffusion WebUI as a context manager, driven over its HTTP API.

    with WebUI(host, data, checkpoint) as webui:
        generation = webui.txt2img(prompt="a cat <lora:tiny:0.8>", seed=3)
        generation.images[0]  # uint8 array (height, width, 3)

Standard library, numpy and Pillow only. The server listens on a free loopback port, keeps everything in its data
folder, works on one CPU thread and ends with the ``with`` block.
"""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
from PIL import Image

CPU_FLAGS = (
    "--api",
    "--server-name",
    "127.0.0.1",
    "--skip-prepare-environment",
    "--skip-torch-cuda-test",
    "--skip-python-version-check",
    "--skip-version-check",
    "--skip-install",
    "--use-cpu",
    "all",
    "--no-half",
    "--no-half-vae",
    "--precision",
    "full",
    "--no-download-sd-model",
    "--do-not-download-clip",
    "--disable-console-progressbars",
)

LOADING_FAILED = "Stable diffusion model failed to load"

OPTIONS = {
    "live_previews_enable": False,  # the previews' decoder would be downloaded for SDXL
    "samples_save": False,
    "grid_save": False,
}

STYLE = ("mine", "<lora:rank_1:0.7>")
"""Name and prompt of the one style that a user of the data folder has."""

PAYLOAD = {
    "prompt": "",
    "negative_prompt": "",
    "seed": 1,
    "steps": 8,
    "width": 64,
    "height": 64,
    "cfg_scale": 7.0,
    "sampler_name": "Euler",
    "scheduler": "Automatic",
}


class WebUIError(RuntimeError):
    """The server did not start, or ended; the message carries the tail of its log."""


class RequestError(RuntimeError):
    """An answer other than 200: ``status`` is its code, ``body`` its text."""

    def __init__(self, path: str, status: int, body: str):
        super().__init__(f"{path}: {status}: {body}")
        self.status = status
        self.body = body


@dataclass(frozen=True)
class Generation:
    """Answer to one request for images."""

    images: list[np.ndarray]
    """uint8, each (height, width, 3)"""

    info: dict
    """what the server says of the generation: ``infotexts``, ``all_seeds``, ``all_prompts``, ..."""

    @property
    def made(self) -> list[np.ndarray]:
        """The images without the grid before them, and without what extensions have put behind them."""
        first = self.info["index_of_first_image"]
        return self.images[first : first + len(self.info["all_seeds"])]

    @property
    def infotext(self) -> str:
        """Generation parameters of the first image."""
        return self.info["infotexts"][0]


def encode_image(image: np.ndarray) -> str:
    """uint8 (height, width, 3) to the base64 PNG that ``init_images`` takes."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def decode_image(encoded: str) -> np.ndarray:
    """Base64 image to uint8 (height, width, 3)."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB"))


def prepare_data_dir(folder: Path, extensions: Iterable[Path] = ()) -> Path:
    """Lay out a data folder: ``models/Stable-diffusion``, ``models/Lora``, options, a style, and ``extensions`` linked
    in."""
    for name in ("models/Stable-diffusion", "models/Lora", "extensions"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(OPTIONS), encoding="utf-8")
    (folder / "styles.csv").write_text("name,prompt,negative_prompt\n" + ",".join(STYLE) + ",\n", encoding="utf-8")
    for extension in extensions:
        link = folder / "extensions" / extension.name
        if not link.exists():
            link.symlink_to(extension.resolve(), target_is_directory=True)
    return folder


def host_python(host: Path, name: str = "A1111") -> str:
    """Python interpreter of an installed WebUI; the variable ``LORATORIO_{name}_PYTHON`` goes first."""
    return os.environ.get(f"LORATORIO_{name}_PYTHON") or str(host / "venv" / "bin" / "python")


def free_port() -> int:
    """A loopback TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class WebUI:
    """A WebUI server process.

    ``host``: folder of the installed WebUI, run by ``host_python``. ``data``: its data folder (``prepare_data_dir``).
    ``checkpoint``: the model file. ``flags``: more command line flags. ``ui``: also serve the browser's interface, at
    ``url``. ``debug``: log at level DEBUG, where the host tells of network keys that match no layer and of layers
    that a network does not fit. ``timeout``: seconds to wait for the start. ``variables``: more of them in the server's
    environment.
    """

    name = "A1111"
    cpu_flags = CPU_FLAGS
    loaded = "Model loaded in"
    """what the log says once the checkpoint is loaded"""

    def __init__(
        self,
        host: Path,
        data: Path,
        checkpoint: Path,
        *,
        flags: Sequence[str] = (),
        ui: bool = False,
        debug: bool = False,
        timeout: float = 600.0,
        variables: Mapping[str, str] = MappingProxyType({}),
    ):
        self.host = Path(host)
        self.data = Path(data).resolve()
        self.timeout = timeout
        self.variables = dict(variables)
        # A request that comes while the browser's interface is put up ends the host.
        self.marks = (self.loaded, "Startup time") if ui else (self.loaded,)
        self.log_path = self.data / "webui.log"
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.command = [
            host_python(self.host, self.name),
            "launch.py",
            *self.cpu_flags,
            *([] if ui else ["--nowebui"]),
            *(["--loglevel", "DEBUG"] if debug else []),
            *("--port", str(port), "--data-dir", str(self.data), "--ckpt", str(Path(checkpoint).resolve())),
            *flags,
        ]
        self._process: subprocess.Popen | None = None
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def __enter__(self) -> WebUI:
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        environment |= self.variables
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                self.command,
                cwd=self.host,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exception) -> None:
        self.stop()

    def stop(self, grace: float = 10.0) -> None:
        """End the server's whole process group: politely, and after ``grace`` seconds by force."""
        process, self._process = self._process, None
        if process is None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, number)
            except ProcessLookupError:
                break
            try:
                process.wait(grace)
            except subprocess.TimeoutExpired:
                continue
        process.wait()

    def log(self) -> str:
        """All that the server has printed so far."""
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def get(self, path: str, timeout: float = 60.0):
        """Decoded JSON answer to a GET request."""
        return self._request(urllib.request.Request(self.url + path), path, timeout)

    def post(self, path: str, payload: dict | None = None, timeout: float = 600.0):
        """Decoded JSON answer to a POST request with a JSON body."""
        body = json.dumps(payload or {}).encode()
        request = urllib.request.Request(self.url + path, data=body, headers={"Content-Type": "application/json"})
        return self._request(request, path, timeout)

    def txt2img(self, **payload) -> Generation:
        """Images for a prompt: 64x64, 8 Euler steps, CFG 7 and seed 1 unless told otherwise."""
        return self._generate("/sdapi/v1/txt2img", payload)

    def img2img(self, image: np.ndarray, **payload) -> Generation:
        """Images from ``image`` (uint8, (height, width, 3)) and a prompt; defaults as in ``txt2img``."""
        return self._generate("/sdapi/v1/img2img", {"init_images": [encode_image(image)], **payload})

    def _generate(self, path: str, payload: dict) -> Generation:
        answer = self.post(path, PAYLOAD | payload)
        return Generation([decode_image(image) for image in answer["images"]], json.loads(answer["info"]))

    def _request(self, request: urllib.request.Request, path: str, timeout: float):
        try:
            with self._opener.open(request, timeout=timeout) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise RequestError(path, error.code, error.read().decode(errors="replace")) from None
        except OSError as error:
            if self._process is None or self._process.poll() is not None:
                raise WebUIError(f"{path}: the server has ended:\n{self._log_tail()}") from error
            raise

    def _wait_until_ready(self) -> None:
        """Return once the API answers and the checkpoint is loaded."""
        deadline = time.monotonic() + self.timeout
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise WebUIError(f"the server ended with status {self._process.returncode}:\n{self._log_tail()}")
            if LOADING_FAILED in self.log():
                raise WebUIError(f"the checkpoint was not loaded:\n{self._log_tail()}")
            if all(mark in self.log() for mark in self.marks) and self._answers():
                return
            time.sleep(0.25)
        raise WebUIError(f"no answer within {self.timeout:.0f} s:\n{self._log_tail()}")

    def _answers(self) -> bool:
        try:
            self.get("/sdapi/v1/samplers", timeout=5.0)
        except (OSError, RequestError):
            return False
        return True

    def _log_tail(self, lines: int = 60) -> str:
        return "\n".join(self.log().splitlines()[-lines:])
