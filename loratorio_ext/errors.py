"""Errors that reach the user. WebUIs build an API response from an exception's ``status_code`` and ``detail``."""

import difflib
import reprlib
from collections.abc import Iterable
from typing import Any


def shown(value: Any) -> str:
    """A value as an error message repeats it, shortened."""
    try:
        return reprlib.repr(value)
    except ValueError:  # Python writes out no integer of more than some thousand digits.
        return "a number too long to show"


def nearest_name(name: str, known: Iterable[str]) -> str:
    """A hint at the known name closest to a wrong one, or nothing."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


class LoRAtorioError(Exception):
    """A composition that cannot happen, and why, in words for the user. ``status_code`` is the HTTP status.

    Where one input is to blame, ``field`` names it, ``value`` is what it held, and ``allowed`` says, in words, what it
    may hold; None where there is no such thing.
    """

    status_code = 500

    def __init__(self, message: str, *, field: str | None = None, value: Any = None, allowed: str | None = None):
        super().__init__(message)
        self.field, self.value, self.allowed = field, value, allowed
        # Hosts look into the instance's own attributes only.
        self.status_code = type(self).status_code
        self.detail = message


class SettingsError(LoRAtorioError, ValueError):
    """A bad option value. The message names the field, the value, and what is allowed."""

    status_code = 422


class UnsupportedError(LoRAtorioError):
    """A model, a host feature or a LoRA that cannot be composed."""

    status_code = 422


class FileError(LoRAtorioError):
    """A file or folder that is missing, or is not what it should be."""

    status_code = 404


class MissingFileError(FileError):
    """There is no such file or folder."""


class FileFormatError(FileError):
    """The file or folder is there, and cannot be read as what it should be."""

    status_code = 422


class WriteError(FileError):
    """A file cannot be written where it should be."""

    status_code = 500
