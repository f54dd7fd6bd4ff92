"""What README and docs/diffusers.md tell people to type does what they say, as written; so does what pip installs."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import tomllib

pytest.importorskip("diffusers")
pytest.importorskip("typer")

from PIL import Image
from typer.testing import CliRunner

from loratorio_ext.cli import app
from loratorio_ext.standalone import tinyworld

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/diffusers.md")

# What diffusers' schedulers warn of in themselves.
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("DeprecationWarning", "UserWarning")]


def blocks(language):
    """Every block of code in this language: the page, and its text."""
    for page in PAGES:
        for block in re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE):
            yield page, block


def commands():
    """Every command that begins with ``loratorio``, in blocks and in running text, and a page that has it."""
    found = []
    for page, block in blocks("bash"):
        lines = block.replace("\\\n", " ").splitlines()
        found += [(page, " ".join(line.split("#")[0].split())) for line in lines if line.startswith("loratorio ")]
    for page in PAGES:
        found += [(page, said) for said in re.findall(r"`(loratorio [^`\n]+)`", (ROOT / page).read_text())]
    return [(page, command) for command, page in {command: page for page, command in found}.items()]


COMMANDS = commands()
SNIPPETS = [(page, block) for page, block in blocks("python") if "loratorio_ext" in block]


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The folder in which people type: with the files that the pages name as their own."""
    weights = tinyworld.weights()
    for name, source in {
        "dreamshaper.safetensors": weights / "tinyworld.safetensors",
        "knight.safetensors": weights / "lora/zorg_quiet.safetensors",
        "watercolour.safetensors": weights / "lora/comet_quiet.safetensors",  # one that is no style by its words
    }.items():
        shutil.copy(source, tmp_path / name)
    ignored = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(weights, tmp_path / "stable-diffusion-v1-5", ignore=ignored)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_there_are_commands():
    assert len([command for _, command in COMMANDS if command.startswith("loratorio generate --model")]) >= 3
    assert any(command == "loratorio demo" for _, command in COMMANDS)
    assert all("loratorio demo" in (ROOT / page).read_text() for page in PAGES)
    assert len(SNIPPETS) == 2


@pytest.mark.parametrize("page, command", COMMANDS, ids=[command[:60] for _, command in COMMANDS])
def test_commands(files, page, command):
    before = set(files.rglob("*.png"))
    result = CliRunner().invoke(app, shlex.split(command)[1:], env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == 0, result.output
    if "--help" not in command:
        printed = [Path(line) for line in result.stdout.split("\n") if line]
        assert printed and {path.resolve() for path in printed} <= set(files.rglob("*.png")) - before
        for path in printed:
            assert "Steps: " in Image.open(path).info["parameters"]


@pytest.mark.parametrize("page, snippet", SNIPPETS, ids=[block[-60:] for _, block in SNIPPETS])
def test_python(files, page, snippet):
    names = {}
    exec(compile(snippet, page, "exec"), names)
    last = names["composition"].steps[-1]
    assert names["image"].size == (256, 256) and last.weights.shape == (len(last.members), 1, 32, 32)
    assert last.members == (["watercolour"] if 'steps="' in snippet else ["knight", "watercolour"])


@pytest.mark.parametrize("page", PAGES)
def test_what_pip_is_told_to_install(page):
    """The package is on no index: only this folder, or the repository's address."""
    for line in re.findall(r"pip install (.+)", (ROOT / page).read_text()):
        assert "." in shlex.split(line)[0][:1] or " @ git+" in line


def test_the_demo_says_the_command_that_it_is(files):
    result = CliRunner().invoke(app, ["demo", "--out", "demo.png"])
    assert result.exit_code == 0, result.output
    command = next(line for line in result.stderr.splitlines() if line.startswith("loratorio generate"))
    again = CliRunner().invoke(app, shlex.split(command.replace("demo.png", "again.png"))[1:])
    assert again.exit_code == 0, again.output
    assert Image.open("demo.png").tobytes() == Image.open("again.png").tobytes()


def test_every_folder_of_the_package_is_installed():
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "loratorio_ext").rglob("*.py")}
    assert set(packages) == folders | {"loratorio_ext.tinyworld_weights"}


def test_an_installed_package_paints_its_first_picture(tmp_path):
    """Built as pip builds it from a clone or an address, and run where there is nothing else, without a word."""
    pytest.importorskip("setuptools", minversion="70.1")  # builds wheels by itself
    source = tmp_path / "source"
    names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if names.returncode:
        pytest.skip("not a clone")
    for name in names.stdout.splitlines():
        if name.startswith(("loratorio_ext/", "tinyworld/weights/")) or "/" not in name:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    build = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", tmp_path, source]
    subprocess.run([sys.executable, "-m", "pip", *build], check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(tmp_path / "installed")
    command = [sys.executable, "-W", "default", "-m", "loratorio_ext.cli", "demo", "--json", "--quiet"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed"), "PYTHONWARNINGS": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["model"]["file"].startswith(str(tmp_path / "installed")) and len(report["loras"]) == 3
    assert done.stderr == ""
