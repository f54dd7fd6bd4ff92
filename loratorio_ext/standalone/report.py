"""What a run was, in plain data for ``--json``: options, times, each step in numbers, or the error."""

import json
import math
import time
from collections.abc import Sequence
from typing import Any

from loratorio_ext import __version__
from loratorio_ext.errors import (
    FileFormatError,
    LoRAtorioError,
    MissingFileError,
    SettingsError,
    UnsupportedError,
    WriteError,
)
from loratorio_ext.record import as_shares

EXIT_CODES = {SettingsError: 2, MissingFileError: 3, FileFormatError: 4, UnsupportedError: 5, WriteError: 6}
UNFORESEEN, INTERRUPTED = 1, 130


def rounded(values: Any) -> list[float]:
    return [round(float(value), 6) for value in values]


def step_report(step: Any, seconds: float) -> dict[str, Any]:
    """One step in numbers: of the ``loras`` that took part the share of the image (``weights``), and of those that were
    evaluated the mean and lowest similarity to the base model.

    ``spread`` is what the adaptive temperature multiplies when nothing is relative: the standard deviation over the
    LoRAs, averaged over patches.
    """
    report = {"step": step.index, "timestep": step.timestep, "seconds": seconds}
    if step.weights is not None:
        shares = as_shares(step.weights.float().numpy())
        report |= {"loras": step.members, "weights": rounded(shares.mean(axis=(1, 2, 3)))}
    if step.weights is not None and step.evaluated:
        similarity = step.similarity.flatten(1)
        report["similarity"] = {
            "loras": step.evaluated,
            "mean": rounded(similarity.mean(1)),
            "lowest": rounded(similarity.amin(1)),
            "spread": round(float(similarity.std(0, correction=0).mean()), 6),
        }
    return report


class Clock:
    """Seconds since the last lap."""

    def __init__(self):
        self.last = time.perf_counter()

    def lap(self) -> float:
        last, self.last = self.last, time.perf_counter()
        return round(self.last - last, 4)


def exit_code(error: BaseException) -> int:
    return next((code for kind, code in EXIT_CODES.items() if isinstance(error, kind)), UNFORESEEN)


def error_report(
    message: str, kind: str, code: int, field: str | None = None, value: Any = None, allowed: str | None = None
) -> dict[str, Any]:
    """What went wrong: the input to blame and what it may be, where there is one, and the exit code."""
    plain = value if value is None or isinstance(value, (str, int, float, bool)) else str(value)
    error = {"kind": kind, "message": message, "field": field, "value": plain, "allowed": allowed, "exit_code": code}
    return {"error": error, "version": __version__}


def report_of(error: LoRAtorioError) -> dict[str, Any]:
    return error_report(str(error), type(error).__name__, exit_code(error), error.field, error.value, error.allowed)


def usage_report(error: Any, args: Sequence[str]) -> dict[str, Any]:
    """The report of what Typer finds wrong with the ``args`` themselves: the option's value as given, and its range."""
    param = getattr(error, "param", None)
    option = getattr(error, "option_name", None) or (param.opts[0] if param is not None else None)
    values = [after for before, after in zip(args, args[1:]) if before == option]
    values += [arg.partition("=")[2] for arg in args if arg.startswith(f"{option}=")]
    low, high = getattr(param, "min", None), getattr(param, "max", None)
    limits = [f"{word} {limit:g}" for word, limit in (("from", low), ("to", high)) if limit is not None]
    return error_report(
        error.format_message(),
        "SettingsError",
        error.exit_code,
        option.lstrip("-").replace("-", "_") if option else None,
        values[-1] if values else None,
        " ".join(limits) or None,
    )


def plain_numbers(value: Any) -> Any:
    """The same data without what JSON has no word for: NaN and infinity become null."""
    if isinstance(value, dict):
        return {name: plain_numbers(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_numbers(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def written(report: dict[str, Any]) -> str:
    """The report as JSON that every reader takes."""
    return json.dumps(plain_numbers(report), indent=2, allow_nan=False)
