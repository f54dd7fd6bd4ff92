"""One picture that shows what LoRAtorio does: tiny-world LoRAs composed by every method, on the same seeds.

::

    ./dev demo                                          # writes demo.png
    ./dev demo --loras zorg comet --seeds 3             # other LoRAs of the tiny world

Rows are methods, columns are seeds. Below LoRAtorio's row: who painted what, a colour a LoRA. The last row is what
perfect information reaches: the scene's own geometry says where each LoRA acts.
"""

import argparse
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from benchmarks.painting import Painting, paint
from benchmarks.variants import COMPOSITE, MERGE, REACHED, SWITCH, Options
from benchmarks.world import KINDS, OBJECTS, SIZE, Combination, World, compatible, render, scene_of
from loratorio_ext.heatmaps import painted, parts_of
from loratorio_ext.record import Record

LORATORIO = "LoRAtorio"
METHODS: dict[str, Options] = {
    "Merge:\nwhat a WebUI\ndoes by itself": MERGE,
    "Switch": SWITCH,
    "Composite": COMPOSITE,
    LORATORIO: {},
    "Perfect masks:\nthe most that\nplaces can do": REACHED,
}
PAINTED = "LoRAtorio:\nwho painted\nwhat"
LORAS = ("penguin", "crown", "amanita", "skyline")
MARGIN, GAP, LINE = 150, 6, 24
INK, PAPER_WHITE = (20, 20, 25), (255, 255, 255)


def font(size: int = 18) -> Any:
    return ImageFont.load_default(size)


def overlays(painting: Painting) -> list[Image.Image]:
    """Each image with the weights on it, as means over the steps."""
    record = Record()
    for step in painting.steps:
        record.add(step.members, step.weights.float().numpy(), range(len(painting.images)), everywhere=step.everywhere)
    return [painted(image, parts_of(record, i, image.size)) for i, image in enumerate(painting.images)]


def sheet(heading: str, titles: Sequence[str], rows: dict[str, list[Image.Image]]) -> Image.Image:
    """Labelled rows of pictures under a heading, and the titles of their columns."""
    words = textwrap.wrap(heading, 24 * len(titles) + 8)
    top = GAP + (len(words) + 1) * LINE
    size = (MARGIN + len(titles) * (SIZE + GAP), top + len(rows) * (SIZE + GAP))
    page = Image.new("RGB", size, PAPER_WHITE)
    draw = ImageDraw.Draw(page)
    draw.multiline_text((GAP, GAP), "\n".join(words), INK, font(20))
    for column, title in enumerate(titles):
        draw.text((MARGIN + column * (SIZE + GAP), top - LINE), title, INK, font(15))
    for row, (name, pictures) in enumerate(rows.items()):
        y = top + row * (SIZE + GAP)
        draw.multiline_text((GAP, y + SIZE // 2), name, INK, font(18), anchor="lm")
        for column, picture in enumerate(pictures):
            page.paste(picture, (MARGIN + column * (SIZE + GAP), y))
    return page


def demonstrate(world: Any, combination: Combination, kind: str, seeds: Sequence[int]) -> Image.Image:
    """The whole page."""
    rows = {}
    for name, options in METHODS.items():
        made = paint(world, combination, kind, options, seeds)
        print(f"{' '.join(name.split())}: {made.seconds:.0f} s", flush=True)
        rows[name] = made.images
        if name == LORATORIO:
            rows[PAINTED] = overlays(made)
    heading = f"{len(combination.loras)} LoRAs: “{combination.prompt}”"
    return sheet(heading, [f"seed {seed}" for seed in seeds], rows)


def save(page: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    page.quantize(256).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loras", nargs="+", default=LORAS, choices=list(render.CONCEPTS))
    parser.add_argument("--kind", choices=KINDS, default="quiet")
    parser.add_argument("--seeds", type=int, default=4, metavar="COUNT")
    parser.add_argument("--out", type=Path, default=Path("demo.png"))
    args = parser.parse_args()
    loras = tuple(concept for concept in render.CONCEPTS if concept in args.loras)
    if loras not in compatible(len(loras)):
        parser.error(f"at most two of {', '.join(OBJECTS)} fit into one scene")
    started = time.perf_counter()
    page = demonstrate(World(), Combination(loras, scene_of(loras)), args.kind, range(1, args.seeds + 1))
    save(page, args.out)
    print(f"{args.out} ({time.perf_counter() - started:.0f} s)")


if __name__ == "__main__":
    main()
