"""Draws outlined shapes, in the coordinates of a scene, with smooth edges."""

import numpy as np
from PIL import Image, ImageDraw

OUTLINE = (25, 25, 30)


class Brush:
    """Draws on a canvas `scale` times as large as the picture of `size` pixels, with outlines of `line` pixels."""

    def __init__(self, colour: tuple[int, int, int], size: int, scale: int, line: int) -> None:
        """A canvas of one colour."""
        self.size, self.scale, self.line = size, scale, line * scale
        self.image = Image.new("RGB", (size * scale, size * scale), colour)
        self.draw = ImageDraw.Draw(self.image)

    def polygon(self, points, colour, outline=OUTLINE) -> None:
        """A filled polygon with a bold outline with round corners."""
        points = [(x * self.scale, y * self.scale) for x, y in points]
        self.draw.polygon(points, fill=colour)
        if outline:
            self.draw.line([*points, *points[:2]], fill=outline, width=self.line, joint="curve")

    def rectangle(self, x0, y0, x1, y1, colour, outline=OUTLINE) -> None:
        """An upright rectangle."""
        self.polygon([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], colour, outline)

    def ellipse(self, x, y, rx, ry, colour, outline=OUTLINE) -> None:
        """An ellipse by its centre and radii."""
        box = [edge * self.scale for edge in (x - rx, y - ry, x + rx, y + ry)]
        self.draw.ellipse(box, fill=colour, outline=outline, width=self.line)

    def finish(self) -> Image.Image:
        """The picture at its final size."""
        return self.image.resize((self.size, self.size), Image.Resampling.BOX)


def ball(b: Brush, x, y, r, colour) -> None:
    """Stands on (x, y) and has the radius r."""
    b.ellipse(x, y - r, r, r, colour)
    b.ellipse(x - r * 0.35, y - r * 1.4, r * 0.2, r * 0.2, (255, 255, 255), None)


def bow(b: Brush, x, top, r) -> None:
    """On the top of a thing of half-width r."""
    for w in (-0.8 * r, 0.8 * r):
        b.polygon([(x, top), (x + w, top - r * 0.5), (x + w, top + r * 0.3)], (255, 90, 170))
    b.ellipse(x, top - r * 0.05, r * 0.22, r * 0.22, (255, 90, 170))


def duotone(image: Image.Image, dark, middle, bright) -> Image.Image:
    """The picture with three colours in place of its lightness."""
    grey = np.asarray(image.convert("L"), dtype=np.float32)
    stops = np.array([dark, middle, bright], dtype=np.float32)
    channels = [np.interp(grey, [20, 135, 250], stops[:, c]) for c in range(3)]
    return Image.fromarray(np.stack(channels, axis=-1).round().astype(np.uint8))
