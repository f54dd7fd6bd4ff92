"""Tables and a plot from the rows of a results file."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import pyplot

from benchmarks.statistics import (
    grouped,
    loudest_are_named,
    mean_interval,
    median,
    painted_in_every_way,
    paired_difference,
    share_clean,
    share_complete,
    share_intruded,
    share_of_named,
    share_present,
    share_shown,
)
from benchmarks.variants import MERGE, PAPER, variant_name

matplotlib.use("Agg")

Rows = Sequence[Mapping[str, Any]]

MERGE_NAME, PAPER_NAME, SHIPPED_NAME = variant_name(MERGE), variant_name(PAPER), variant_name({})


def markdown(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def titled(variant: str) -> str:
    """A variant's name, with what it is known as."""
    known = {PAPER_NAME: "the paper's form", SHIPPED_NAME: "the defaults"}
    return f"**{variant}** ({known[variant]})" if variant in known else variant


def number(value: float, form: str = ".2f") -> str:
    return "" if math.isnan(value) else format(value, form)


def group_title(group: str) -> str:
    named, _, unnamed = group.partition("+")
    return f"N = {named}" + (f", {unnamed} more unnamed" if unnamed else "")


def completeness_table(rows: Rows) -> str:
    """For one kind of LoRA: the share of images with every concept, by the number of LoRAs; by variant."""
    groups = sorted({row["group"] for row in rows}, key=lambda group: (len(group), group))
    alone = [row for row in rows if "+" not in row["group"]]
    body = []
    for (variant,), mine in grouped(rows, "variant").items():
        by_group = grouped(mine, "group")
        cells = [str(share_complete(by_group[group,])) if (group,) in by_group else "" for group in groups]
        many = [row for row in mine if row["group"] in ("3", "4", "5")]
        body.append(
            [
                titled(variant),
                *cells,
                str(share_complete(many)) if many else "",
                str(share_present([row for row in mine if row in alone])) if alone else "",
                str(share_clean(mine)) if any("clean" in row for row in mine) else "",
                str(share_intruded(mine)) if any(row["intruders"] for row in mine) else "",
                number(median(mine, "distance")),
                number(median(mine, "cost")),
                number(median(mine, "psnr"), ".1f"),
            ]
        )
    header = ["", *map(group_title, groups), "N ≥ 3", "per concept", "clean", "intruder", "distance", "cost", "PSNR"]
    return markdown(header, body)


def overview_table(rows: Rows) -> str:
    """Complete images in percent by kind of LoRA and their number, and what else is to be known of each variant."""
    cells = sorted(
        {(row["kind"], row["group"]) for row in rows}, key=lambda cell: (cell[0] != "quiet", len(cell[1]), cell)
    )
    intruded, body = any(row["intruders"] for row in rows), []
    for (variant,), mine in grouped(rows, "variant").items():
        by_cell = grouped(mine, "kind", "group")
        body.append(
            [
                titled(variant),
                *(f"{100 * share_complete(by_cell[cell]).value:.0f}" if cell in by_cell else "" for cell in cells),
                str(share_complete(mine)),
                *(f"{100 * share(mine).value:.0f} %" for share in (share_shown, share_clean)),
                *([f"{100 * share_intruded(mine).value:.0f} %"] if intruded else []),
                number(median(mine, "distance"), ".1f"),
                number(median(mine, "cost"), ".1f"),
            ]
        )
    header = ["", *(f"{kind}, {group_title(group)}" for kind, group in cells)]
    unnamed = ["an unnamed one shows"] if intruded else []
    return markdown([*header, "all: complete", "shown", "clean", *unnamed, "distance", "cost"], body)


def difference_table(rows: Rows, reference: str) -> str:
    """Each variant against one, over the combinations that both have seen, in percentage points."""
    body = []
    for (variant,) in grouped(rows, "variant"):
        if variant != reference:
            mean, low, high = (100 * value for value in paired_difference(rows, variant, reference))
            body.append([titled(variant), f"{mean:+.0f} ({low:+.0f} to {high:+.0f})"])
    return markdown(["", f"percentage points more than {titled(reference)}"], body)


def similarity_table(rows: Rows, points: int = 6) -> str:
    """Similarity to the base model and its spread over the LoRAs, at some steps, by the number of LoRAs."""
    seen = [row for row in rows if "similarity" in row]
    if not seen:
        return ""
    steps = np.linspace(0, len(seen[0]["similarity"]) - 1, points).round().astype(int)
    body = []
    for (kind, group), mine in grouped(sorted(seen, key=lambda row: row["group"]), "kind", "group").items():
        mean, spread = (np.mean([row[name] for row in mine], axis=0) for name in ("similarity", "spread"))
        body.append([f"{kind}, {group_title(group)}", *(f"{mean[i]:.4f} ± {spread[i]:.4f}" for i in steps)])
    return markdown(["mean ± spread over LoRAs", *(f"step {i + 1}" for i in steps)], body)


def selection_table(rows: Rows) -> str:
    """Where LoRAs are loaded that nobody named: whether the named ones get the weights; by variant."""
    seen = [row for row in rows if row["intruders"] and "weights" in row]
    if not seen:
        return ""
    groups = sorted({row["group"] for row in seen})
    body = []
    for (variant,), mine in grouped(seen, "variant").items():
        cells = []
        for group in groups:
            those = [row for row in mine if row["group"] == group]
            share, hits = (np.mean([f(row) for row in those]) for f in (share_of_named, loudest_are_named))
            cells.append(f"{100 * share:.0f} %, {100 * hits:.0f} %" if those else "")
        body.append([titled(variant), *cells])
    return markdown(["weight of the named, named among the loudest", *map(group_title, groups)], body)


def concept_table(rows: Rows) -> str:
    """Which concepts are found, by variant."""
    concepts = list(dict.fromkeys(concept for row in rows for concept in row["present"]))
    body = []
    for (variant,), mine in grouped(rows, "variant").items():
        shares = [share_present(mine, concept) for concept in concepts]
        body.append([titled(variant), *(f"{100 * share.value:.0f} %" if share.total else "" for share in shares)])
    return markdown(["", *concepts], body)


def clip_table(rows: Rows) -> str:
    """The mean CLIPScore by the number of LoRAs; by variant."""
    groups = sorted({row["group"] for row in rows})
    body = []
    for (variant,), mine in grouped(rows, "variant").items():
        scores = [[s for row in mine if row["group"] in those for s in row["clipscore"]] for those in (*groups, groups)]
        cells = ["{:.2f} ± {:.2f}".format(*mean_interval(each)) if each else "" for each in scores]
        body.append([titled(variant), *cells, number(median(mine, "cost"))])
    return markdown(["CLIPScore", *map(group_title, groups), "all", "cost"], body)


def plot(rows: Rows, path: Path) -> None:
    """The share of complete images over the number of LoRAs, a panel for each kind, a line for each variant."""
    by_kind = grouped([row for row in rows if "+" not in row["group"]], "kind")
    figure, axes = pyplot.subplots(1, len(by_kind), figsize=(5.2 * len(by_kind), 4), sharey=True, squeeze=False)
    for axis, ((kind,), mine) in zip(axes[0], by_kind.items()):
        variants = grouped(mine, "variant")
        for shift, ((variant,), those) in zip(np.linspace(-0.15, 0.15, len(variants)), variants.items()):
            points = sorted((int(group), share_complete(found)) for (group,), found in grouped(those, "group").items())
            low, high = np.array([share.interval for _, share in points]).T
            values = np.array([share.value for _, share in points])
            known = {PAPER_NAME: "LoRAtorio, the paper's form", SHIPPED_NAME: "LoRAtorio, the defaults"}
            axis.errorbar(
                [n + shift for n, _ in points],
                100 * values,
                100 * np.array([values - low, high - values]).clip(min=0),
                label=known.get(variant, variant),
                marker="o",
                capsize=2,
                linewidth=2.5 if variant == SHIPPED_NAME else 1.2,
            )
        axis.set(title=f"{kind} LoRAs", xlabel="LoRAs composed", xticks=sorted({int(row["group"]) for row in mine}))
        axis.grid(alpha=0.3)
    axes[0][0].set(ylabel="images with every concept, %", ylim=(-3, 103))
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    figure.tight_layout(rect=(0, 0.14, 1, 1))
    figure.savefig(path, dpi=110)


def price_table(rows: Rows, exact: str) -> str:
    """What is cheaper than the exact default, and what it loses: complete images and concepts in percentage points."""

    def per_concept(row: Mapping[str, Any]) -> list[float]:
        return [float(np.mean(found)) for found in zip(*row["present"].values())]

    body = []
    for (variant,), mine in grouped(rows, "variant").items():
        if any("psnr" in row for row in mine):
            losses = [paired_difference(rows, variant, exact), paired_difference(rows, variant, exact, per_concept)]
            cells = [f"{100 * mean:+.0f} ({100 * low:+.0f} to {100 * high:+.0f})" for mean, low, high in losses]
            cost = np.mean([row["cost"] for row in mine])
            body.append([titled(variant), f"{cost:.2f}", *cells, number(median(mine, "psnr"), ".1f")])
    return markdown(["", "cost", "complete", "per concept", "PSNR, dB"], body) if body else ""


def plot_price(rows: Rows, path: Path) -> None:
    """The share of complete images against the cost, a panel for each kind, a point for each variant."""
    by_kind = grouped(rows, "kind")
    figure, axes = pyplot.subplots(1, len(by_kind), figsize=(5.6 * len(by_kind), 4), sharey=True, squeeze=False)
    for axis, ((kind,), mine) in zip(axes[0], by_kind.items()):
        for (variant,), those in grouped(mine, "variant").items():
            share, cost = share_complete(those), np.mean([row["cost"] for row in those])
            low, high = share.interval
            reach = [[max(0, share.value - low)], [max(0, high - share.value)]]
            axis.errorbar([cost], [100 * share.value], 100 * np.array(reach), marker="o", capsize=2, label=variant)
        axis.set(title=f"{kind} LoRAs", xlabel="rows evaluated, in those of merged LoRAs")
        axis.grid(alpha=0.3)
    axes[0][0].set(ylabel="images with every concept, %")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=7)
    figure.tight_layout(rect=(0, 0.22, 1, 1))
    figure.savefig(path, dpi=100)


def text_report(rows: Rows) -> str:
    """Everything in the file, in Markdown."""
    if "clipscore" in rows[0]:
        return f"{clip_table(rows)}\n\n{similarity_table(rows)}\n"
    variants = [variant for (variant,) in grouped(rows, "variant")]
    reference = next((name for name in (SHIPPED_NAME, *variants) if name in variants), None)
    parts = ["### Complete images in percent", overview_table(painted_in_every_way(rows))]
    for (kind,), mine in grouped(rows, "kind").items():
        parts += [f"### {kind.capitalize()} LoRAs", completeness_table(mine), concept_table(mine)]
        parts += [table for table in [selection_table(mine)] if table]
        parts += [table for table in [price_table(mine, reference)] if table]
    parts += ["### Against one, all combinations", difference_table(rows, reference)]
    parts += ["### Similarity to the base model", similarity_table(rows)]
    return "\n\n".join(parts) + "\n"


def write_report(rows: Rows, path: Path) -> str:
    """The report, also written beside the results file, with its plot."""
    if not rows:
        return "no results yet"
    text = text_report(rows)
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    if "present" in rows[0]:
        plot(rows, path.with_suffix(".png"))
        if any("psnr" in row for row in rows):
            plot_price(rows, path.with_name(f"{path.stem}-price.png"))
    return text
