"""One picture that shows what LoRAtorio does: tiny-world LoRAs composed by every method, on the same seeds.

::

    ./dev demo                                          # writes demo.png
    ./dev demo --loras robot star --seeds 3             # other LoRAs of the tiny world

Rows are methods, columns are seeds. Below, for the first seed, where each LoRA's weight (Omega) lay over the steps.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from benchmarks.painting import Painting, paint
from benchmarks.variants import COMPOSITE, MERGE, PAPER, SWITCH, Options
from benchmarks.world import KINDS, SIZE, Combination, World, compatible, render, scene_of

METHODS: dict[str, Options] = {
    "Merge\n(what a WebUI\ndoes by itself)": MERGE,
    "Switch": SWITCH,
    "Composite": COMPOSITE,
    "LoRAtorio,\nthe paper's form": PAPER,
    "LoRAtorio": {},
}
MARGIN, GAP, LINE = 130, 6, 18
INK, PAPER_WHITE = (20, 20, 25), (255, 255, 255)
COLD, WARM = (24, 20, 70), (255, 225, 90)


def font(size: int = 14) -> Any:
    return ImageFont.load_default(size)


def heat_map(weights: Any, size: int) -> Image.Image:
    """A LoRA's weights ``[h, w]``, dark for 0 and bright for 1."""
    share = Image.fromarray((255 * weights.clamp(0, 1)).byte().numpy(), mode="L").resize((size, size), Image.NEAREST)
    return Image.composite(Image.new("RGB", share.size, WARM), Image.new("RGB", share.size, COLD), share)


def chosen_steps(count: int, columns: int) -> list[int]:
    """Step numbers spread evenly from the first to the last."""
    columns = min(columns, count)
    return [round(i * (count - 1) / max(1, columns - 1)) for i in range(columns)]


@dataclass(frozen=True)
class Block:
    """Labelled rows of pictures under a heading, and the titles of their columns."""

    heading: str
    titles: list[str]
    rows: dict[str, list[Image.Image]]

    @property
    def height(self) -> int:
        return 2 * LINE + len(self.rows) * (SIZE + GAP) + GAP


def weight_block(heading: str, painting: Painting, names: Sequence[str], columns: int) -> Block:
    """Each LoRA's weights in the first image, at some of the steps; all of them take part in all."""
    steps = [painting.steps[i] for i in chosen_steps(len(painting.steps), columns)]
    rows = {
        name: [heat_map(step.weights[step.plan.members.index(i), 0], SIZE) for step in steps]
        for i, name in enumerate(names)
    }
    return Block(heading, [f"step {step.index + 1}" for step in steps], rows)


def sheet(blocks: Sequence[Block]) -> Image.Image:
    """Blocks below each other on one page."""
    columns = max(len(block.titles) for block in blocks)
    size = (MARGIN + columns * (SIZE + GAP), sum(block.height for block in blocks) + GAP)
    page = Image.new("RGB", size, PAPER_WHITE)
    draw = ImageDraw.Draw(page)
    top = GAP
    for block in blocks:
        draw.text((GAP, top), block.heading, INK, font(15))
        for column, words in enumerate(block.titles):
            draw.text((MARGIN + column * (SIZE + GAP), top + LINE + 2), words, INK, font(12))
        for row, (name, pictures) in enumerate(block.rows.items()):
            y = top + 2 * LINE + row * (SIZE + GAP)
            draw.multiline_text((GAP, y + SIZE // 2), name, INK, font(13), anchor="lm")
            for column, picture in enumerate(pictures):
                page.paste(picture, (MARGIN + column * (SIZE + GAP), y))
        top += block.height
    return page


def demonstrate(world: Any, combination: Combination, kind: str, seeds: Sequence[int]) -> Image.Image:
    """The whole page."""
    paintings = {}
    for name, options in METHODS.items():
        paintings[name] = paint(world, combination, kind, options, seeds)
        print(f"{' '.join(name.split())}: {paintings[name].seconds:.0f} s", flush=True)
    loras = combination.loras
    images = Block(
        f"{len(loras)} LoRAs: “{combination.prompt}”",
        [f"seed {seed}" for seed in seeds],
        {name: made.images for name, made in paintings.items()},
    )
    heading = f"Whose region is it? LoRAtorio's weights at seed {seeds[0]} (dark: 0, bright: 1)"
    maps = weight_block(heading, paintings["LoRAtorio"], [f"“{name}” LoRA" for name in loras], len(seeds))
    return sheet([images, maps])


def save(page: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    page.quantize(256).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loras", nargs="+", default=["penguin", "mushroom", "city"], choices=list(render.CONCEPTS))
    parser.add_argument("--kind", choices=KINDS, default="quiet")
    parser.add_argument("--seeds", type=int, default=5, metavar="COUNT")
    parser.add_argument("--out", type=Path, default=Path("demo.png"))
    args = parser.parse_args()
    loras = tuple(concept for concept in render.CONCEPTS if concept in args.loras)
    if loras not in compatible(len(loras)):
        parser.error("at most two of robot, penguin, mushroom and star fit into one scene")
    started = time.perf_counter()
    page = demonstrate(World(), Combination(loras, scene_of(loras)), args.kind, range(1, args.seeds + 1))
    save(page, args.out)
    print(f"{args.out} ({time.perf_counter() - started:.0f} s)")


if __name__ == "__main__":
    main()
