"""A generation in one line, for the log."""

from collections.abc import Iterable, Sequence
from typing import Any


def counted(sizes: Sequence[int]) -> str:
    """``8 model calls of 6 rows``; of calls that differ, the smallest and the largest."""
    rows = f"{min(sizes)}" if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}"
    calls, noun = (
        ("1 model call" if len(sizes) == 1 else f"{len(sizes)} model calls"),
        ("row" if rows == "1" else "rows"),
    )
    return f"{calls} of {rows} {noun}"


def summary(method: str, loras: Iterable[str], tallies: Sequence[Any], seconds: float) -> str:
    """What was composed, what it took, and about which share of ``seconds`` of sampling went to rows of one LoRA alone.

    ``tallies``: see `isolation.Tally`. Rows of a call are taken to cost the same.
    """
    sizes = [size for tally in tallies for size in tally.sizes]
    text = " of ".join(filter(None, (f"LoRAtorio: {method}", ", ".join(loras))))
    if not sizes:
        return f"{text}; {seconds:.1f} s of sampling"
    alone, rows = sum(tally.alone for tally in tallies), sum(sizes)
    took = sum(tally.seconds * tally.alone / sum(tally.sizes) for tally in tallies if tally.sizes)
    share = min(1.0, took / seconds) if seconds else 0.0
    return (
        f"{text}; {counted(sizes)}, {alone / rows:.0%} of which are a LoRA's alone; these took about {share:.0%} of "
        f"{seconds:.1f} s of sampling"
    )


def step_line(number: int, loras: Sequence[str], shares: Sequence[Sequence[float]]) -> str:
    """One model call's shares: ``shares [images][loras]``."""
    images = (", ".join(f"{name} {share:.3f}" for name, share in zip(loras, image)) for image in shares)
    return f"LoRAtorio: step {number}: {' | '.join(images)}"
