"""Pictures of the weights: every LoRA's share over the steps, and where in the image it acts. numpy and Pillow only."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from loratorio_ext.record import Record, StepWeights

BACKGROUND, INK, FAINT = (24, 26, 32), (230, 230, 230), (90, 94, 104)
RAMP = np.array([(24, 26, 32), (62, 40, 110), (150, 50, 120), (230, 90, 70), (252, 180, 80), (255, 250, 200)], float)
"""From weight 0 to 1: rising in lightness, so that it reads in grey as well."""

NAMES, CELL, GAP, TITLE = 150, 72, 6, 34
"""Pixels: the column of names, a map's side, the space between maps, the line above."""

COLUMNS = 8
"""At most so many steps are shown as maps."""


def colours(weights: np.ndarray) -> np.ndarray:
    """Weights in 0 to 1 as colours: ``[..., ] -> [..., 3]`` uint8."""
    place = np.clip(weights, 0, 1) * (len(RAMP) - 1)
    low = np.minimum(place.astype(int), len(RAMP) - 2)
    share = (place - low)[..., None]
    return np.round(RAMP[low] * (1 - share) + RAMP[low + 1] * share).astype(np.uint8)


def shortened(text: str, width: int, draw: ImageDraw.ImageDraw, font: ImageFont.ImageFont) -> str:
    """The text, cut to a width in pixels; what the font has no signs for becomes a question mark."""
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    try:
        draw.textlength(text, font=font)
    except UnicodeEncodeError:  # Pillow's smallest font knows Latin only
        text = text.encode("latin-1", "replace").decode("latin-1")
    if draw.textlength(text, font=font) <= width:
        return text
    while text and draw.textlength(text + "...", font=font) > width:
        text = text[:-1]
    return text + "..."


def canvas(width: int, height: int, title: str) -> tuple[Image.Image, ImageDraw.ImageDraw, ImageFont.ImageFont]:
    picture = Image.new("RGB", (width, height), BACKGROUND)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default()
    draw.text((GAP, GAP), shortened(title, width - 2 * GAP, draw, font), INK, font=font)
    return picture, draw, font


def share_chart(loras: Sequence[str], table: np.ndarray) -> Image.Image:
    """Shares ``[S, N]`` as a chart: a row a LoRA with its mean, a column a step, brighter the more it has."""
    steps, count = table.shape
    cell, line = max(4, min(24, 480 // max(steps, 1))), 22
    width, height = NAMES + steps * cell + 60, TITLE + count * line + 24
    picture, draw, font = canvas(width, height, "LoRAtorio: share of the image over the steps")
    for row, name in enumerate(loras):
        top = TITLE + row * line
        draw.text((GAP, top + 4), shortened(name, NAMES - 2 * GAP, draw, font), INK, font=font)
        band = colours(table[:, row])[None].repeat(line - 2, axis=0).repeat(cell, axis=1)
        picture.paste(Image.fromarray(band), (NAMES, top))
        draw.text((NAMES + steps * cell + GAP, top + 4), f"{table[:, row].mean():.2f}", INK, font=font)
    draw.text((NAMES, TITLE + count * line + 4), "1", FAINT, font=font)
    if steps > 1:
        draw.text((NAMES + (steps - 1) * cell, TITLE + count * line + 4), str(steps), FAINT, font=font)
    return picture


def weight_maps(loras: Sequence[str], steps: Sequence[StepWeights], image: int) -> Image.Image:
    """The weight maps of one image: a row a LoRA, a column each of at most `COLUMNS` steps spread over all."""
    shown = [round(i) for i in np.linspace(0, len(steps) - 1, min(COLUMNS, len(steps)))]
    width, height = NAMES + len(shown) * (CELL + GAP) + GAP, TITLE + len(loras) * (CELL + GAP) + GAP
    picture, draw, font = canvas(width, height, "LoRAtorio: weights by place; steps from left to right")
    for column, number in enumerate(shown):
        left, step = NAMES + column * (CELL + GAP), steps[number]
        draw.text((left, TITLE - 14), str(number + 1), FAINT, font=font)
        for row, name in enumerate(loras):
            top = TITLE + row * (CELL + GAP)
            if column == 0:
                draw.text((GAP, top + CELL // 2 - 6), shortened(name, NAMES - 2 * GAP, draw, font), INK, font=font)
            if name not in step.loras:
                continue
            grid = Image.fromarray(colours(step.weights[step.loras.index(name), image]))
            scale = CELL / max(grid.size)
            size = (max(1, round(grid.width * scale)), max(1, round(grid.height * scale)))
            picture.paste(grid.resize(size, Image.NEAREST), (left, top))
    return picture


def pictures(record: Record, image: int) -> list[Image.Image]:
    """Both pictures of one image of a batch; LoRAs that never had a share are in neither."""
    if not record.steps:
        return []
    table = record.share_table(image)
    order = [index for index in np.argsort(-table.mean(axis=0), kind="stable") if table[:, index].max() > 0]
    loras = [record.loras[index] for index in order]
    return [share_chart(loras, table[:, order]), weight_maps(loras, record.steps, image)]
