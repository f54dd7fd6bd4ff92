"""Fixtures of the neighbours' tests: servers with other people's extensions in them, and what a run finds out."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.live.conftest import REFERENCE, ROOT, SABOTAGE, installed_host
from tests.live.lora_files import CATALOGUE, Recipe, write_catalogue
from tests.live.neighbours.company import Company, Difference
from tests.live.neighbours.control_models import DETECTOR, write_control_models
from tests.live.neighbours.folder import NEIGHBOURS, present, require
from tests.live.neighbours.report import table
from tests.live.neighbours.rows import EVERYBODY, Row
from tests.live.webui import RequestError, host_python, prepare_data_dir

HERE = Path(__file__).parent
FAMILY = "sd1deep"

SETS = {
    "controlnet": ("controlnet",),
    "regional-prompter": ("regional-prompter",),
    "lora-block-weight": ("lora-block-weight",),
    "loractl": ("loractl",),
    "multidiffusion": ("multidiffusion", "controlnet"),
    "adetailer": ("adetailer", "dynamic-thresholding"),
    "dynamic-thresholding": ("adetailer", "dynamic-thresholding"),
    "built in": ("adetailer", "dynamic-thresholding"),
    EVERYBODY: NEIGHBOURS,
}
"""Who shares a server with whom: those that change nothing of the host until they are asked to."""

LORAS = [recipe for recipe in CATALOGUE if recipe.name in ("lora", "locon", "unet_only", "dora")]
ATTENTION = Recipe("attention", "lora", 1, 0.15, layers="lora_te|attentions")
OUTPUT_BLOCKS = Recipe("output_blocks", "lora", 1, 0.15, layers="lora_te|up_blocks.*attentions")
"""The layers that LoRA Block Weight's presets speak of: all of them, and those that ``OUTALL`` keeps."""

STYLE = "lora_style"
"""The name of a copy of the first one, by which it is a style."""

results: dict[str, dict] = {}
"""What the run found out, by row."""


def write_loras_that_do_nothing(folder: Path) -> None:
    """Three ways to be in the prompt and nowhere else."""
    weights = load_file(folder / "lora.safetensors")
    zeros = {key: torch.zeros_like(value) if "lora_up" in key else value for key, value in weights.items()}
    flat = {key: torch.zeros_like(value) if key.endswith("alpha") else value for key, value in weights.items()}
    save_file(zeros, folder / "all_zero.safetensors")
    save_file(flat, folder / "alpha_zero.safetensors")
    save_file({}, folder / "empty.safetensors", metadata={"ss_output_name": "empty"})


@pytest.fixture(scope="session")
def stock(tmp_path_factory) -> tuple[Path, Path]:
    """A folder of models for every server: a tiny checkpoint, LoRAs, control models, a detector; the checkpoint."""
    require()
    host, models = installed_host(), tmp_path_factory.mktemp("stock") / "models"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "YOLO_OFFLINE": "true"}

    def by_host(*command) -> None:
        subprocess.run([host_python(host), *command], check=True, env=environment, stdout=subprocess.DEVNULL)

    by_host(HERE.parent / "tiny_checkpoints.py", "--host", host, "--out", models / "Stable-diffusion", FAMILY)
    checkpoint = models / "Stable-diffusion" / f"tiny-{FAMILY}.safetensors"
    write_catalogue(checkpoint, models / "Lora", [*LORAS, ATTENTION, OUTPUT_BLOCKS])
    for copy in ("twin", STYLE):
        shutil.copy(models / "Lora" / "lora.safetensors", models / "Lora" / f"{copy}.safetensors")
    write_loras_that_do_nothing(models / "Lora")
    if "controlnet" in present():
        write_control_models(checkpoint, models / "ControlNet")
    if "adetailer" in present():
        by_host(HERE / "control_models.py", models / "adetailer" / DETECTOR)
    return models, checkpoint


@pytest.fixture(scope="session")
def open_company(stock, tmp_path_factory):
    """Function of neighbours' names, and whether we are there, to a `Company`."""
    models, checkpoint = stock

    def opened(names: tuple[str, ...], with_us: bool = True) -> Company:
        folder = tmp_path_factory.mktemp("company")
        (folder / "models").symlink_to(models, target_is_directory=True)
        here = [path for name, path in present().items() if name in names]
        ours = [ROOT, REFERENCE, SABOTAGE] if with_us else []
        data = prepare_data_dir(folder, [*ours, HERE / "kit_extension", *here])
        return Company(installed_host(), data, checkpoint, names)

    return opened


@pytest.fixture(scope="session")
def companies(open_company):
    """Function of a set's name to its `Company`; one server runs at a time, and tests are in the order of the sets."""
    opened: dict[tuple[str, ...], Company] = {}

    def company_of(name: str) -> Company:
        names = SETS[name]
        for other, company in opened.items():
            if other != names:
                company.close()
        if names not in opened:
            opened[names] = open_company(names)
        return opened[names]

    yield company_of
    for company in opened.values():
        company.close()


@pytest.fixture
def company(companies, row) -> Company:
    """The server with the row's neighbour in it."""
    require(row.neighbour, *row.also)
    return companies(row.server)


@pytest.fixture
def clean(company, row):
    """After the test the host's own image of the same prompt, with everything off, is what it was before it.

    What the neighbour leaves behind by itself (the host's token merging stays on) is not ours to answer for.
    """
    plain = {}, {"prompt": row.one}
    before = company.after_itself(row.request(row.one), plain).images
    yield
    try:
        difference = Difference.of(before, company.generate(*plain).images)
    except RequestError as error:
        company.close()
        pytest.fail(f"left behind: a plain image fails: {error}")
    if not difference.none:
        company.close()
        pytest.fail(f"left behind: a plain image differs by {difference}")


def server_of(item: pytest.Item) -> int:
    """Where the server that a test needs stands among all."""
    row = getattr(item, "callspec", None) and item.callspec.params.get("row")
    return list(SETS.values()).index(SETS[row.server]) if row else len(SETS)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]):
    """Tests that need the same server follow each other."""
    ours = [item for item in items if HERE in item.path.parents]
    places = [place for place, item in enumerate(items) if HERE in item.path.parents]
    for place, item in zip(places, sorted(ours, key=server_of)):
        items[place] = item


def record(row: Row, result: dict) -> None:
    """Keep what was found out of a row, and write it to the file that ``LORATORIO_NEIGHBOURS_RESULTS`` names, beside
    what is there."""
    results[row.name] = result
    if path := os.environ.get("LORATORIO_NEIGHBOURS_RESULTS"):
        file = Path(path)
        before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        text = json.dumps(before | results, indent=1, ensure_ascii=False)
        file.write_text(text + "\n", encoding="utf-8")


def pytest_terminal_summary(terminalreporter):
    """The table of this run."""
    if results:
        terminalreporter.section("neighbours")
        terminalreporter.write_line(table(results))
