"""Pictures on disk: whether they can be written, known before they are made, and written whole or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loratorio_ext.errors import SettingsError, WriteError
from loratorio_ext.infotext import PNG_KEY

ALLOWED = "a file's name that ends in .png, in a place that can be written to"


def check_out(path: Path) -> None:
    """Raises `SettingsError` for what is no PNG's name, and `WriteError` where none can be written.

    Tried out, since permissions and read-only media do not tell otherwise; makes the folder where there is none.
    """
    refused = {"field": "out", "value": str(path), "allowed": ALLOWED}
    if path.suffix.lower() != ".png":
        raise SettingsError(f"LoRAtorio: out must end in .png, since that is what is written, got {path}", **refused)
    try:
        if path.is_dir():
            raise SettingsError(f"LoRAtorio: out must be a file, and {path} is a folder", **refused)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.stem[:40]}-", suffix=".png"):
            pass
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(f"{path} may not be overwritten")
    except SettingsError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise WriteError(f"LoRAtorio: out cannot be written: {error}", **refused) from error


def numbered(path: Path, count: int) -> list[Path]:
    """A file for each of ``count`` images: the path itself for a single one."""
    if count == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{index}{path.suffix}") for index in range(count)]


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to write to, which takes its place when all is written; until then nothing is changed."""
    path = path.resolve()  # through a link, as writing in place would
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem[:40]}-", suffix=path.suffix)
    os.close(handle)
    try:
        yield Path(temporary)
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.chmod(temporary, path.stat().st_mode if path.exists() else 0o666 & ~umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def umask() -> int:
    """The process's mask for new files, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_png(image: Any, path: Path, text: str | None) -> None:
    """The image as PNG, with its infotext, where there is one, where WebUIs look for it."""
    from PIL.PngImagePlugin import PngInfo

    information = PngInfo()
    if text is not None:
        information.add_text(PNG_KEY, text)
    with whole(path) as file:
        image.save(file, format="PNG", pnginfo=information)


def save(pictures: list[tuple[Any, Path, str | None]]) -> None:
    """Write images, each at its path with its infotext. Where that fails now, images that took long are not lost: they
    go into a new folder for temporary files, which the `WriteError` names."""
    kept: list[tuple[Path, Path]] = []
    refuge, cause = None, None
    for image, path, text in pictures:
        try:
            write_png(image, path, text)
        except OSError as error:
            cause = cause or error
            try:
                refuge = refuge or Path(tempfile.mkdtemp(prefix="loratorio-"))
                write_png(image, refuge / path.name, text)
            except OSError:
                raise WriteError(
                    f"LoRAtorio: {path} cannot be written, nor can anything in {tempfile.gettempdir()}: {error}",
                    field="out",
                    value=str(path),
                    allowed=ALLOWED,
                ) from error
            kept.append((path, refuge / path.name))
    if kept:
        where = "; ".join(f"{path} is in {place} instead" for path, place in kept)
        message = f"LoRAtorio: out cannot be written: {cause}. {where}"
        raise WriteError(message, field="out", value=str(kept[0][0]), allowed=ALLOWED) from cause
