"""Where the neighbours are: other people's extensions, in a folder named by ``LORATORIO_NEIGHBOURS_DIR``."""

import hashlib
import os
import re
import subprocess
from pathlib import Path

import pytest

VARIABLE = "LORATORIO_NEIGHBOURS_DIR"

NEIGHBOURS = (
    "controlnet",
    "regional-prompter",
    "lora-block-weight",
    "loractl",
    "multidiffusion",
    "adetailer",
    "dynamic-thresholding",
)
"""Their subfolders' names there."""

OWN_VERSION = {
    "controlnet": ("scripts/controlnet_version.py", r"version_flag = '(.*)'"),
    "adetailer": ("adetailer/__version__.py", r'__version__ = "(.*)"'),
}
"""File and line in which an extension says its version, where it does."""


def present() -> dict[str, Path]:
    """The neighbours that are there, by name."""
    folder = os.environ.get(VARIABLE)
    found = {name: Path(folder).resolve() / name for name in NEIGHBOURS} if folder else {}
    return {name: path for name, path in found.items() if path.is_dir()}


def require(*names: str) -> None:
    """Skip the test where one of these neighbours is not there."""
    if not os.environ.get(VARIABLE):
        pytest.skip(f"{VARIABLE} does not name a folder with other extensions")
    for name in names:
        if name in NEIGHBOURS and name not in present():
            pytest.skip(f"{VARIABLE} has no folder {name}")


def version(name: str) -> str:
    """An extension's version: git's word for it, its own, or else what its Python files hash to."""
    path = present()[name]
    if (path / ".git").exists():
        command = ["git", "-C", path, "describe", "--tags", "--always"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    if name in OWN_VERSION:
        file, pattern = OWN_VERSION[name]
        if match := re.search(pattern, (path / file).read_text(encoding="utf-8")):
            return match[1]
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*.py")):
        digest.update(str(file.relative_to(path)).encode() + file.read_bytes())
    return f"sha256 {digest.hexdigest()[:10]}"
