"""Shares and differences with 95 % intervals, from the rows of a results file."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Z = 1.959964  # of the normal distribution, two-sided 95 %
RESAMPLES = 2000


def figures(values: Iterable[Any], digits: int = 4) -> list[float]:
    """Numbers with this many significant digits, as they are written to a results file."""
    return [float(f"{float(value):.{digits}g}") for value in values]


@dataclass(frozen=True)
class Share:
    """A share of images, and its Wilson interval."""

    hits: int
    total: int

    @property
    def value(self) -> float:
        return self.hits / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        n, p = self.total, self.value
        if not n:
            return 0.0, 1.0
        centre = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
        reach = Z / (1 + Z**2 / n) * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
        return max(0.0, centre - reach), min(1.0, centre + reach)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.value:.0f} % ({100 * low:.0f}–{100 * high:.0f})"


def shown(row: Mapping[str, Any]) -> list[bool]:
    """For each image of a row, whether it shows every concept named."""
    return [all(found) for found in zip(*row["present"].values())]


def complete(row: Mapping[str, Any]) -> list[bool]:
    """For each image of a row, whether it shows every concept named and, where that was judged, is clean."""
    return [all(found) for found in zip(shown(row), *([row["clean"]] if "clean" in row else []))]


def share_complete(rows: Iterable[Mapping[str, Any]]) -> Share:
    """The share of complete images."""
    found = [each for row in rows for each in complete(row)]
    return Share(sum(found), len(found))


def share_shown(rows: Iterable[Mapping[str, Any]]) -> Share:
    """The share of images that show every concept named, clean or not."""
    found = [each for row in rows for each in shown(row)]
    return Share(sum(found), len(found))


def share_clean(rows: Iterable[Mapping[str, Any]]) -> Share:
    """The share of images without noise, borders, broken or blended surfaces, among those that were judged so."""
    found = [each for row in rows for each in row.get("clean", ())]
    return Share(sum(found), len(found))


def share_present(rows: Iterable[Mapping[str, Any]], concept: str | None = None) -> Share:
    """The share of (image, concept) pairs in which the concept is there: of one concept, or of all that were named."""
    found = [hit for row in rows for name, hits in row["present"].items() if concept in (None, name) for hit in hits]
    return Share(sum(found), len(found))


def share_intruded(rows: Iterable[Mapping[str, Any]]) -> Share:
    """The share of images that show a concept that was loaded but not named, among those where one was."""
    found = [any(each) for row in rows for each in zip(*row["intruders"].values())]
    return Share(sum(found), len(found))


def share_of_named(row: Mapping[str, Any]) -> float:
    """The share of all weights that the named LoRAs have: N / all of them where nothing is told apart."""
    return float(sum(row["weights"][: len(row["present"])]) / sum(row["weights"]))


def loudest_are_named(row: Mapping[str, Any]) -> float:
    """The share of the named LoRAs that are among the as many with the largest weights."""
    named = len(row["present"])
    loudest = np.argsort(row["weights"])[::-1][:named]
    return float(np.mean(loudest < named))


def median(rows: Iterable[Mapping[str, Any]], measure: str) -> float:
    """The median over images (or the row's own number) of a measure; NaN where no row has it."""
    values = [value for row in rows if row.get(measure) is not None for value in np.atleast_1d(row[measure])]
    return float(np.median(values)) if values else math.nan


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its interval by the normal distribution."""
    values = np.asarray(values, dtype=float)
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), Z * error


def grouped(rows: Iterable[Mapping[str, Any]], *names: str) -> dict[tuple, list[Mapping[str, Any]]]:
    """Rows by the values of some of their fields, in the order in which these first occur."""
    groups: dict[tuple, list] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def painted_in_every_way(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows of those scenes and seeds that every variant of the rows has painted."""

    def painted(row: Mapping[str, Any]) -> tuple:
        return row["kind"], row["combination"], *row["seeds"]

    ways = [{painted(row) for row in mine} for mine in grouped(rows, "variant").values()]
    by_all = set.intersection(*ways) if ways else set()
    return [row for row in rows if painted(row) in by_all]


def paired_difference(
    rows: Sequence[Mapping[str, Any]],
    variant: str,
    reference: str,
    measure: Callable[[Mapping[str, Any]], Sequence[float]] = complete,
) -> tuple[float, float, float]:
    """Mean difference of two variants over the combinations that both have seen, with a bootstrap interval.

    Combinations are resampled, not images: images of one combination are alike.
    """
    by_variant = {name: {} for name in (variant, reference)}
    for row in rows:
        if row["variant"] in by_variant:
            by_variant[row["variant"]].setdefault((row["kind"], row["combination"]), []).extend(measure(row))
    shared = sorted(by_variant[variant].keys() & by_variant[reference].keys())
    if not shared:
        return math.nan, math.nan, math.nan
    differences = np.array([np.mean(by_variant[variant][c]) - np.mean(by_variant[reference][c]) for c in shared])
    chosen = np.random.default_rng(0).integers(len(differences), size=(RESAMPLES, len(differences)))
    low, high = np.quantile(differences[chosen].mean(axis=1), (0.025, 0.975))
    return float(differences.mean()), float(low), float(high)
