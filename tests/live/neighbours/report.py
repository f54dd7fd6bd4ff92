"""``docs/neighbours.md`` from the results file of a run.

LORATORIO_NEIGHBOURS_RESULTS=tests/live/neighbours/results.json ./dev live tests/live/neighbours
python -m tests.live.neighbours.report
"""

import json
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
DOCUMENT = HERE.parents[2] / "docs" / "neighbours.md"

TITLES = {
    "controlnet": "ControlNet",
    "regional-prompter": "Regional Prompter",
    "lora-block-weight": "LoRA Block Weight",
    "loractl": "loractl (Dynamic Lora Weights)",
    "multidiffusion": "Tiled Diffusion",
    "adetailer": "ADetailer",
    "dynamic-thresholding": "Dynamic Thresholding",
    "built in": "What comes with the WebUI",
}

INTRODUCTION = """\
# Beside other extensions

What LoRAtorio does when another extension is active in the same generation, on AUTOMATIC1111 1.10. Made from the
latest result of each row ({file}) by `python -m tests.live.neighbours.report`; the runs drove a
real WebUI with the real extensions in it, on a CPU, with tiny random models.

- **right**: the image is the WebUI's own with the other extension active, but for rounding: with one LoRA, with it and
  its copy (both at `base_share` 0), and with the method that takes only the first LoRA's turn. *Difference*: the
  largest and the mean one of the worst of the three, in grey levels of 255.
- **refuses**: the generation stops with an error that names the other extension.
- **differs**, **fails**: a defect; bold are results other than promised.

*Time* is what the composed generation takes with the other extension, in generations composed without it; one
measurement each, so a hint and no more. *Calls* are calls of the UNet in those two generations, where more of them are
made in order to keep the WebUI's own rows and order.

Who takes part is told by what is replaced in the model, not by name, so this holds for extensions that are not listed,
too: then each LoRA is evaluated in the WebUI's own rows and order, which takes longer and is said in the infotext. What
cannot be right is refused: LoRAs or prompts of an extension's own for parts of the image, texts changed while the image
is made, answers that depend on how often somebody was asked, parts of the model left out in some steps.

ADetailer paints what it found in a generation of its own, for which it runs only the scripts that its setting *Script
names to apply to ADetailer* lists: add `loratorio` there, or the LoRAs act merged in that part.

A WebUI that shares its work out over others, with stable-diffusion-webui-distributed, two and four images over two
servers with who painted what: every image and picture is within 1 of one server's. The extension then adds texts to
the answer, and failed at it in this setup (an error on the console), with LoRAtorio off, too: the infotext of an image
from elsewhere may lack what was picked.
"""

Results = Mapping[str, Mapping[str, Any]]


def measured(result: Mapping[str, Any]) -> tuple[str, str, str]:
    """Difference, time and calls of one row, in words."""
    difference = f"{result['largest']} / {result['mean']:.3f}" if "largest" in result else ""
    if "calls" not in result:
        return difference, "", ""
    return difference, f"{result['time']:.1f}", f"{result['calls']} ({result['calls without']})"


def table(results: Results) -> str:
    """Markdown: a row a mode."""
    header = ["mode", "result", "difference", "time", "calls"]
    lines = [header, ["---"] * len(header)]
    for result in results.values():
        outcome = result["outcome"] if result["outcome"] == result["expected"] else f"**{result['outcome']}**"
        lines.append([result["mode"], outcome, *measured(result)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def document(results: Results, file: str) -> str:
    """The whole page; neighbours in the order of ``TITLES``."""
    parts = [INTRODUCTION.format(file=f"`{file}`")]
    by_neighbour = sorted(results.items(), key=lambda item: list(TITLES).index(item[1]["neighbour"]))
    for neighbour, group in groupby(by_neighbour, key=lambda item: item[1]["neighbour"]):
        rows = dict(group)
        version = next(iter(rows.values()))["version"]
        title = TITLES[neighbour]
        parts.append(f"## {title}{f', {version}' if version else ''}\n\n{table(rows)}\n")
    return "\n".join(parts)


def in_order(results: Results) -> Results:
    """The results in the order of the table of rows, with what that promises now; rows that are gone are dropped."""
    from tests.live.neighbours.rows import TABLE

    return {row.name: {**results[row.name], "expected": row.expected} for row in TABLE if row.name in results}


def main() -> None:
    results = in_order(json.loads(RESULTS.read_text(encoding="utf-8")))
    DOCUMENT.write_text(document(results, str(RESULTS.relative_to(HERE.parents[2]))), encoding="utf-8")


if __name__ == "__main__":
    main()
