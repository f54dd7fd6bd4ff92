"""Fixtures of the live tests: the installed WebUI, tiny checkpoints and LoRA files."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.live.lora_files import write_catalogue
from tests.live.webui import host_python, prepare_data_dir

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def host() -> Path:
    """Folder of the installed AUTOMATIC1111 WebUI."""
    folder = os.environ.get("LORATORIO_A1111_DIR")
    if not folder:
        pytest.skip("LORATORIO_A1111_DIR does not name an installed AUTOMATIC1111 WebUI")
    return Path(folder)


@pytest.fixture(scope="session")
def tiny_data(host, tmp_path_factory) -> Callable[[str], tuple[Path, Path]]:
    """Function of a checkpoint family to a new data folder, with every LoRA file in it, and the checkpoint's path."""

    def make(family: str) -> tuple[Path, Path]:
        data = prepare_data_dir(tmp_path_factory.mktemp(family))
        models = data / "models" / "Stable-diffusion"
        command = [host_python(host), HERE / "tiny_checkpoints.py", "--host", host, "--out", models, family]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
        checkpoint = models / f"tiny-{family}.safetensors"
        write_catalogue(checkpoint, data / "models" / "Lora")
        return data, checkpoint

    return make
