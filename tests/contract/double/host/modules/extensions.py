"""The extensions that are installed."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Extension:
    name: str
    path: str
    is_builtin: bool = False


extensions: list[Extension] = []
