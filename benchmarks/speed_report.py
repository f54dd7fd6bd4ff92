"""Table and plot of what `benchmarks.speed` has measured."""

from collections.abc import Sequence
from pathlib import Path

FLOOR = "the floor: rows and low-rank products"
ARITHMETIC = "similarity, weights and sums alone"
STACKING = "stacking the matrices, once a generation"


def table(results: Sequence[dict]) -> str:
    """Markdown: a row a way, a column a number of LoRAs, in plain steps, the floor in brackets."""
    counts = [result["n"] for result in results]
    lines = ["| in plain steps (floor) |" + "".join(f" N = {n} |" for n in counts), "| --- |" + " --- |" * len(counts)]
    for way in results[0]["ways"]:
        cells = []
        for result in results:
            floors = f" ({result['floor'][way]:.2f})" if way in result["floor"] else ""
            cells.append(f" {result['ways'][way]['plain steps']:.3g}{floors} |")
        lines.append(f"| {way} |{''.join(cells)}")
    return "\n".join(lines)


def plot(results: Sequence[dict], path: Path) -> None:
    """A step's time against the number of LoRAs, a line a way with its spread over rounds, and LoRAtorio's floor."""
    from matplotlib import pyplot

    counts = [result["n"] for result in results]
    figure, axis = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
    for way in results[0]["ways"]:
        if way in (ARITHMETIC, STACKING):
            continue
        figures = [result["ways"][way] for result in results]
        middle = [each["plain steps"] for each in figures]
        below = [each["plain steps"] * (1 - each["least"] / each["median"]) for each in figures]
        above = [each["plain steps"] * (each["most"] / each["median"] - 1) for each in figures]
        axis.errorbar(counts, middle, [below, above], marker="o", markersize=3, capsize=2, label=way)
    axis.plot(counts, [result["floor"]["LoRAtorio"] for result in results], "k:", label=FLOOR)
    axis.set(xlabel="LoRAs", ylabel="time of a step, in plain steps", xticks=counts, ylim=(0, None))
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=100)
