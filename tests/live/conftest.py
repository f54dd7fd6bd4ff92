"""Fixtures of the live tests: the installed WebUI, tiny checkpoints and LoRA files."""

import os
import subprocess
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.live.lora_files import write_catalogue
from tests.live.webui import WebUI, host_python, prepare_data_dir

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
REFERENCE = HERE / "reference_extension"
SABOTAGE = HERE / "sabotage_extension"


def installed_host() -> Path:
    """Folder of the installed AUTOMATIC1111 WebUI; skips the test where there is none."""
    folder = os.environ.get("LORATORIO_A1111_DIR")
    if not folder:
        pytest.skip("LORATORIO_A1111_DIR does not name an installed AUTOMATIC1111 WebUI")
    return Path(folder)


def lay_out_data(host: Path, folder: Path, family: str, extensions: Iterable[Path] = ()) -> tuple[Path, Path]:
    """A data folder with a tiny checkpoint of this family and every LoRA file for it; also the checkpoint's path."""
    data = prepare_data_dir(folder, extensions)
    models = data / "models" / "Stable-diffusion"
    command = [host_python(host), HERE / "tiny_checkpoints.py", "--host", host, "--out", models, family]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    checkpoint = models / f"tiny-{family}.safetensors"
    write_catalogue(checkpoint, data / "models" / "Lora")
    return data, checkpoint


@contextmanager
def tiny_webui(family: str, tmp_path_factory, neighbours: Iterable[Path] = (), **options) -> Iterator[WebUI]:
    """The installed WebUI with the extension, the tests' own scripts, other extensions, and a tiny checkpoint."""
    host = installed_host()
    extensions = (ROOT, REFERENCE, SABOTAGE, *neighbours)
    data, checkpoint = lay_out_data(host, tmp_path_factory.mktemp(family), family, extensions)
    with WebUI(host, data, checkpoint, **options) as webui:
        yield webui


@pytest.fixture(scope="session")
def host() -> Path:
    """Folder of the installed AUTOMATIC1111 WebUI."""
    return installed_host()


@pytest.fixture(scope="session")
def tiny_data(host, tmp_path_factory) -> Callable[[str], tuple[Path, Path]]:
    """Function of a checkpoint family to a new data folder, with every LoRA file in it, and the checkpoint's path."""
    return lambda family: lay_out_data(host, tmp_path_factory.mktemp(family), family)


@pytest.fixture(scope="module")
def browser():
    """A browser; skips the tests where there is none."""
    from tests.live.browsing import launched

    with launched() as browser:
        yield browser
