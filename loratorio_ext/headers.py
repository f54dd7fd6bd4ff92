"""What safetensors files say of themselves, before any of their numbers are read. Imports no torch; needs no host."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from loratorio_ext.errors import FileFormatError, MissingFileError


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of its tensors: shapes and types by name, and ``metadata``, text by text."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    types: Mapping[str, str]
    metadata: Mapping[str, str]

    def refused(self, why: str) -> FileFormatError:
        return FileFormatError(f"LoRAtorio: {self.path} {why}", value=str(self.path))


def existing(path: str | Path) -> Path:
    """The path, or `MissingFileError`."""
    path = Path(path)
    try:
        there = path.exists()
    except (OSError, ValueError):  # a name too long, or with a zero byte, or in a folder that may not be looked into
        there = False
    if not there:
        raise MissingFileError(f"LoRAtorio: {path} does not exist", value=str(path))
    return path


def read_header(path: str | Path) -> Header:
    """The header of a safetensors file; `FileFormatError` for what is none."""
    path = existing(path)
    if path.is_dir():
        raise FileFormatError(f"LoRAtorio: {path} is a folder, not a safetensors file", value=str(path))
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            shapes = {name: tuple(each.get_shape()) for name, each in slices.items()}
            types = {name: each.get_dtype() for name, each in slices.items()}
            return Header(path, shapes, types, file.metadata() or {})
    except (SafetensorError, OSError, UnicodeError, ValueError, TypeError) as error:
        why = f"LoRAtorio: {path} is not a safetensors file that can be read: {error}"
        raise FileFormatError(why, value=str(path)) from error
