"""Pictures of who painted what: the weights on the finished image, a map a LoRA, and shares over the steps.

One colour a LoRA, the same in all three. They are as large as the image, or a whole multiple of it where that is too
small for words. numpy and Pillow only.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from loratorio_ext.record import Record

Colour = tuple[int, int, int]
Font = ImageFont.ImageFont | ImageFont.FreeTypeFont

COLOURS: tuple[Colour, ...] = (
    (230, 97, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (204, 121, 167), (26, 102, 204),
)  # fmt: skip
"""Told apart with every kind of colour vision (after Okabe and Ito)."""
OTHERS: Colour = (240, 240, 240)
BASE: Colour = (140, 140, 140)
BASE_NAME = "base model"

BACKGROUND, INK, FAINT = (24, 26, 32), (240, 240, 240), (120, 124, 134)
LEAST = 256
"""Pixels of the shorter side that legends need."""

TINT = 0.65
"""How far the colours cover the image in the overlay."""


@dataclass(frozen=True)
class Part:
    """What one LoRA, several small ones, or the base model had of an image: ``map [H, W]`` as the mean over the steps,
    ``shares [S]``."""

    name: str
    colour: Colour
    map: np.ndarray
    shares: np.ndarray

    @property
    def share(self) -> float:
        return float(self.shares.mean())

    @property
    def label(self) -> str:
        return f"{self.share:.0%} {self.name}"


def parts_of(record: Record, image: int, size: tuple[int, int], smooth: bool = False) -> list[Part]:
    """Every LoRA that had a share of an image, in the order of the prompt, and the base model with those in every pass,
    if it had one; maps for a picture of ``size``, width and height."""
    table, maps = record.share_table(image), record.mean_maps(image, size, smooth)
    loras = [index for index in range(len(record.loras)) if table[:, index].max() > 0]
    if len(loras) > len(COLOURS):  # the colours go to those with most
        ranked = sorted(loras, key=lambda index: -table[:, index].mean())
        colours = {index: COLOURS[rank % len(COLOURS)] for rank, index in enumerate(ranked)}
    else:
        colours = dict(zip(loras, COLOURS))
    found = [Part(record.loras[index], colours[index], maps[index], table[:, index]) for index in loras]
    rest = 1 - table.sum(axis=1)
    if rest.mean() >= 0.0005:
        name = " + ".join([BASE_NAME, *record.everywhere])
        found.append(Part(name, BASE, (1 - maps.sum(axis=0)).clip(0, 1), rest.clip(0, 1)))
    return found


def fewer(parts: Sequence[Part]) -> list[Part]:
    """The parts with a colour of their own, of many LoRAs those with most; the other LoRAs' become one."""
    loras = [part for part in parts if part.colour != BASE]
    if len(loras) <= len(COLOURS):
        return list(parts)
    first = sorted(loras, key=lambda part: -part.share)[: len(COLOURS)]
    rest = [part for part in loras if all(part is not each for each in first)]
    maps, shares = (np.sum([getattr(part, name) for part in rest], axis=0) for name in ("map", "shares"))
    return [*first, Part(f"{len(rest)} others", OTHERS, maps, shares), *(p for p in parts if p.colour == BASE)]


# --- words ------------------------------------------------------------------------------------------------------------


def plain_font(size: int) -> Font:
    """Pillow's own font; before Pillow 10.1 it has one size only."""
    try:
        return ImageFont.load_default(size)
    except TypeError:
        return ImageFont.load_default()


def shortened(text: str, width: int, font: Font) -> str:
    """The text, cut to a width in pixels; what the font has no signs for becomes a question mark."""
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    try:
        font.getlength(text)
    except UnicodeEncodeError:  # Pillow's smallest font knows Latin only
        text = text.encode("latin-1", "replace").decode("latin-1")
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def legend(picture: Image.Image, parts: Sequence[Part], font: Callable[[int], Font], share: float = 0.5) -> None:
    """Draw a box with every part's colour, share and name at the picture's lower left, at most ``share`` of its
    height."""
    row = max(12, min(picture.height // 16, int(share * picture.height / max(1, len(parts)))))
    letters, margin = font(round(row * 0.8)), row // 4
    ordered = sorted(parts, key=lambda part: (part.colour in (BASE, OTHERS), -part.share))
    texts = [shortened(part.label, picture.width - 4 * margin - row, letters) for part in ordered]
    width = round(max(letters.getlength(text) for text in texts)) + row + 3 * margin
    top = picture.height - row * len(texts) - 2 * margin
    box = (0, top, width, picture.height)
    dark = Image.blend(picture.crop(box), Image.new("RGB", (width, picture.height - top), BACKGROUND), 0.8)
    picture.paste(dark, box[:2])
    draw = ImageDraw.Draw(picture)
    for number, (part, text) in enumerate(zip(ordered, texts)):
        y = top + margin + number * row
        draw.rectangle((margin, y + 1, margin + row - 3, y + row - 3), part.colour)
        draw.text((row + 2 * margin, y), text, INK, font=letters)


# --- pictures ---------------------------------------------------------------------------------------------------------


def grey(image: Image.Image) -> np.ndarray:
    """Lightness in 0 to 1, ``[H, W, 1]``."""
    return np.asarray(image.convert("L"), np.float32)[..., None] / 255


def as_picture(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray((255 * pixels).clip(0, 255).round().astype(np.uint8))


def painted(image: Image.Image, parts: Sequence[Part], font: Callable[[int], Font] = plain_font) -> Image.Image:
    """The weights on the image: each pixel has the colours of those who made it, mixed by their weights; what nobody
    but the base model made stays grey."""
    parts = fewer(parts)
    light = grey(image)
    mixed = sum((part.map[..., None] * np.float32(part.colour) / 255 for part in parts if part.colour != BASE), 0)
    covered = TINT * np.sum([part.map for part in parts if part.colour != BASE], axis=0)[..., None]
    # Dark and light places of the image stay so within a colour.
    picture = as_picture(light * (1 - covered) + TINT * mixed * (0.6 + 0.4 * light))
    legend(picture, parts, font)
    return picture


def maps(image: Image.Image, parts: Sequence[Part], font: Callable[[int], Font] = plain_font) -> Image.Image:
    """A small picture for each part, however many: its colour where it acts, dark where it does not; full colour is the
    largest weight that anybody has."""
    largest = max(part.map.max() for part in parts) or 1
    columns = int(np.ceil(np.sqrt(len(parts))))
    rows = -(-len(parts) // columns)
    width, height = image.width // columns, max(1, round(image.height / columns))
    picture = Image.new("RGB", (image.width, height * rows), BACKGROUND)
    light = grey(image.resize((width, height), Image.LANCZOS))
    row = max(11, min(height // 8, image.height // 18))
    letters = font(round(row * 0.8))
    for number, part in enumerate(sorted(parts, key=lambda part: (part.colour == BASE, -part.share))):
        scaled = Image.fromarray((part.map / largest).astype(np.float32))
        weight = np.asarray(scaled.resize((width, height), Image.BOX))[..., None]
        bright = np.float32(part.colour) / 255 * (0.35 + 0.65 * light)
        small = as_picture(0.2 * light * (1 - weight) + bright * weight)
        text = shortened(part.label, width - 2 * row // 3, letters)
        band = (0, 0, min(width, round(letters.getlength(text)) + 2 * row // 3), min(height, row + row // 4))
        small.paste(Image.blend(small.crop(band), Image.new("RGB", band[2:], BACKGROUND), 0.8), band[:2])
        ImageDraw.Draw(small).text((row // 3, 0), text, INK, font=letters)
        picture.paste(small.crop((0, 0, width - 1, height - 1)), (number % columns * width, number // columns * height))
    return picture


def shares(size: tuple[int, int], parts: Sequence[Part], font: Callable[[int], Font] = plain_font) -> Image.Image:
    """Everybody's share of the image over the steps, stacked: a picture of ``size``, width and height."""
    parts = fewer(parts)
    width, height = size
    picture = Image.new("RGB", size, BACKGROUND)
    draw, row = ImageDraw.Draw(picture), max(11, height // 22)
    letters = font(round(row * 0.8))
    steps = len(parts[0].shares)
    left, right = round(letters.getlength("100%")) + row // 2, width - row // 2
    room = max(12, min(height // 16, height // 2 // len(parts)))
    top, bottom = row // 2, height - room * len(parts) - 2 * row
    for step in range(steps):
        from_, to = (left + (right - left) * edge // steps for edge in (step, step + 1))
        base = 1.0
        for part in parts:
            upper, lower = (
                round(top + (bottom - top) * (1 - level)) for level in (1 - base + part.shares[step], 1 - base)
            )
            if lower > upper:
                draw.rectangle((from_, max(top, upper), to - (steps < (right - left) // 4), lower - 1), part.colour)
            base -= part.shares[step]
    for text, level in (("100%", 1.0), ("50%", 0.5), ("0%", 0.0)):
        y = round(top + (bottom - top) * (1 - level))
        draw.text((left - letters.getlength(text) - row // 4, y - row // 2), text, INK, font=letters)
        draw.line((left, y, right, y), FAINT)
    draw.text((left, bottom + row // 4), "step 1", INK, font=letters)
    if steps > 1:
        draw.text((right - letters.getlength(str(steps)), bottom + row // 4), str(steps), INK, font=letters)
    legend(picture, parts, font)
    return picture


def pictures(
    record: Record,
    image: int,
    finished: Image.Image,
    smooth: bool = False,
    region: tuple[int, int, int, int] | None = None,
    font: Callable[[int], Font] = plain_font,
) -> dict[str, Image.Image]:
    """The pictures of one image of a batch by their names; none where nobody had a share.

    ``finished``: the image. ``smooth``: patches blend into each other (`upsampling`). ``region``: the part of it that
    was painted, as left, top, width, height in pixels; None: all.
    """
    if not record.steps or not record.share_table(image).any():
        return {}
    times = -(-LEAST // min(finished.size))
    canvas = finished.convert("RGB").resize((finished.width * times, finished.height * times), Image.NEAREST)
    if region is None:
        found = parts_of(record, image, canvas.size, smooth)
    else:
        left, top, width, height = (times * edge for edge in region)
        found = []
        for part in parts_of(record, image, (width, height), smooth):
            whole = np.zeros((canvas.height, canvas.width), np.float32)
            shown = whole[top : top + height, left : left + width]
            shown[:] = part.map[: shown.shape[0], : shown.shape[1]]
            found.append(Part(part.name, part.colour, whole, part.shares))
    return {
        "painted": painted(canvas, found, font),
        "maps": maps(canvas, found, font),
        "shares": shares(canvas.size, found, font),
    }
