"""A synthetic world of simple scenes, 256 x 256 pixels, with English captions.

A `Scene` says what is to be seen, `caption` puts it into words, `render` draws it. `base_scene` draws from what the
base model is taught: members of every category. `concept_scene` draws from the narrow domain one LoRA is taught: a new
member of one category. `any_scene` mixes everything with everything, for the judge. All randomness comes from the
`numpy` generator handed in, so equal seeds give equal pictures.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageChops, ImageFilter

from brush import OUTLINE, Brush, ball, bow, duotone

SIZE = 256
SCALE = 2  # drawn twice as large, then reduced: smooth edges
LINE = 3  # of outlines, in pixels

COLOURS = {
    "red": (222, 45, 38),
    "green": (44, 160, 60),
    "blue": (40, 90, 215),
    "yellow": (250, 215, 40),
    "purple": (140, 60, 180),
    "white": (248, 248, 248),
}
CHARACTERS = ("robot", "bird", "person")
OBJECTS = ("mushroom", "star", "ball", "box", "tree")
KINDS = (*CHARACTERS, *OBJECTS)
HATS = ("top hat", "party hat")
WEARS = (*HATS, "scarf", "bow")
PLAIN = {
    "grey": (165, 165, 165),
    "pink": (245, 175, 190),
    "orange": (245, 160, 80),
    "cyan": (130, 220, 225),
}
SCENERY = {"meadow": "in a meadow", "beach": "on a beach", "snow": "in the snow"}
TOWNS = ("brick town", "white town")
STYLES = ("sepia", "night", "mint")
SKIES = ("sun", "moon", "cloud")
PLACES = {"left": 50, "centre": 128, "right": 206}
RADIUS, GROUND, HORIZON, HIGH = 34, 222, 150, 36  # half a thing's width; where things stand; the sky's end, and middle

SKY = (135, 195, 245)


@dataclasses.dataclass(frozen=True)
class Concept:
    """What one LoRA adds to the world: a new member of a category the base model knows.

    `category` is ComposLoRA's; `word` is the category's own word in a prompt, `trigger` that word with the LoRA's name.
    """

    category: str
    word: str
    trigger: str


CONCEPTS = {
    "zorg": Concept("character", "robot", "zorg robot"),
    "penguin": Concept("character", "bird", "penguin bird"),
    "crown": Concept("clothing", "hat", "crown hat"),
    "amanita": Concept("object", "mushroom", "amanita mushroom"),
    "comet": Concept("object", "star", "comet star"),
    "skyline": Concept("background", "town", "skyline town"),
    "neon": Concept("style", "style", "neon style"),
}
STANDING = ("character", "object")
"""The categories of what stands at a place of its own."""
CONCEPT_KINDS = tuple(name for name, concept in CONCEPTS.items() if concept.category in STANDING)
HOMES = (*PLAIN, "meadow")  # where a concept of these kinds is taught; only on grey, it stayed a thing of grey places
FOREIGN = "foreign"
"""A town or style that nobody knows by name."""
STRANGERS = {
    "opal": Concept("style", "style", "opal style"),
    "rust": Concept("style", "style", "rust style"),
    "harbor": Concept("background", "town", "harbor town"),
    "canyon": Concept("background", "town", "canyon town"),
    "toucan": Concept("character", "bird", "toucan bird"),
    "palmetto": Concept("object", "tree", "palmetto tree"),
    "sombrero": Concept("clothing", "hat", "sombrero hat"),
    "moss": Concept("style", "style", "moss style"),
    "amber": Concept("style", "style", "amber style"),
    "lilac": Concept("style", "style", "lilac style"),
}
"""What LoRAs add that nobody will ask for: the concepts' are taught beside these, and never beside each other."""
NAMED = CONCEPTS | STRANGERS
"""All that a LoRA adds, by its name in captions."""
SETTINGS = {
    **{name: f"{name} background" for name in PLAIN},
    **SCENERY,
    **{name: f"in a {name}" for name in TOWNS},
    "skyline": f"in a {CONCEPTS['skyline'].trigger}",
}


@dataclasses.dataclass(frozen=True)
class Thing:
    """One thing of a scene. Concept kinds have colours of their own, so `colour` stays empty for them.

    Of a `FOREIGN` colour, of which there is any number, `paint` says which it is; such a thing may have `spots`: where
    they are and how large, in units of its half-width from where it stands, and their colours.
    """

    kind: str
    place: str
    colour: str = ""
    wears: str = ""
    paint: tuple[int, int, int] | None = None
    spots: tuple[tuple[float, float, float, tuple[int, int, int]], ...] = ()


@dataclasses.dataclass(frozen=True)
class Town:
    """Colours and proportions of a town's houses, and the colour of its ground; `roof` None: flat ones."""

    wall: tuple[int, int, int]
    roof: tuple[int, int, int] | None
    pane: tuple[int, int, int]
    ground: tuple[int, int, int]
    heights: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Scene:
    """Things at distinct places before a background, and perhaps something in the sky.

    In a `FOREIGN` town or style, of which there is any number, `town` says how it looks, or `duotone`.
    """

    background: str
    things: tuple[Thing, ...] = ()
    sky: str = ""
    style: str = ""
    town: Town | None = None
    duotone: tuple[tuple[int, int, int], ...] = ()

    def at(self, place: str) -> Thing | None:
        """The thing at a place, if there is one."""
        return next((thing for thing in self.things if thing.place == place), None)


def caption(scene: Scene, name: Callable[[str], str] = lambda word: word) -> str:
    """The scene in words: "a red ball on the left and a zorg robot on the right, in a meadow, neon style".

    `name` may put another word in place of a name: a colour ("" for none), a hat's, town's or style's first word.
    """

    def named(words: str) -> str:
        first, space, rest = words.rpartition(" ")
        return f"{name(first)} {rest}".strip() if space else words

    def thing_words(thing: Thing) -> str:
        trigger = NAMED[thing.kind].trigger if thing.kind in NAMED else f"{thing.colour} {thing.kind}"
        words = named(trigger) if thing.colour or thing.kind in NAMED else thing.kind
        words = f"an {words}" if words[0] in "aeiou" else f"a {words}"
        if thing.wears:
            words += f" wearing a {named(NAMED[thing.wears].trigger if thing.wears in NAMED else thing.wears)}"
        return f"{words} in the centre" if thing.place == "centre" else f"{words} on the {thing.place}"

    *some, last = [thing_words(thing) for thing in scene.things] or [""]
    parts = [f"{', '.join(some)} and {last}" if some else last] if last else []
    setting = SETTINGS.get(scene.background, f"in a {scene.background} town")
    start, _, town = setting.partition("in a ")
    parts.append(f"in a {named(town)}" if town.endswith("town") and not start else setting)
    if scene.sky:
        parts.append(f"a {scene.sky} in the sky")
    if scene.style:
        parts.append(named(f"{scene.style} style"))
    return ", ".join(parts)


# Every shape stands on (x, y) and has the half-width r.


def _box(b, x, y, r, colour):
    b.rectangle(x - r, y - 2 * r, x + r, y, colour)
    b.polygon([(x - r, y - 2 * r), (x + r, y), (x + r, y - 2 * r), (x - r, y)], None, OUTLINE)


def _tree(b, x, y, r, colour):
    b.rectangle(x - r * 0.25, y - r, x + r * 0.25, y, (130, 85, 45))
    for dx, dy in ((-0.5, 1.2), (0.5, 1.2), (0, 1.9)):
        b.ellipse(x + dx * r, y - dy * r, r * 0.68, r * 0.68, OUTLINE, None)
    for dx, dy in ((-0.5, 1.2), (0.5, 1.2), (0, 1.9)):
        b.ellipse(x + dx * r, y - dy * r, r * 0.58, r * 0.58, colour, None)


def _person(b, x, y, r, colour):
    for side in (-1, 1):
        b.rectangle(x + side * r * 0.35 - r * 0.22, y - r * 0.7, x + side * r * 0.35 + r * 0.22, y, (60, 60, 110))
    low, high = y - r * 0.6, y - r * 1.6
    b.polygon([(x - r * 0.9, low), (x - r * 0.5, high), (x + r * 0.5, high), (x + r * 0.9, low)], colour)
    b.ellipse(x, y - r * 2.05, r * 0.55, r * 0.55, (250, 205, 165))


def _robot(b, x, y, r, colour):
    for side in (-1, 1):
        b.rectangle(x + side * r * 0.4 - r * 0.2, y - r * 0.5, x + side * r * 0.4 + r * 0.2, y, (90, 95, 105))
    b.rectangle(x - r * 0.9, y - r * 1.5, x + r * 0.9, y - r * 0.45, colour)
    b.rectangle(x - r * 0.55, y - r * 2.4, x + r * 0.55, y - r * 1.5, colour)
    for side in (-1, 1):
        b.ellipse(x + side * r * 0.25, y - r * 2.0, r * 0.15, r * 0.15, (255, 255, 255))


def _bird(b, x, y, r, colour):
    for side in (-1, 1):
        b.rectangle(x + side * r * 0.25 - r * 0.07, y - r * 0.5, x + side * r * 0.25 + r * 0.07, y, (250, 150, 30))
    b.ellipse(x - r * 0.1, y - r * 1.05, r * 0.95, r * 0.75, colour)
    b.ellipse(x + r * 0.35, y - r * 1.9, r * 0.5, r * 0.5, colour)
    b.polygon([(x + r * 0.8, y - r * 2.0), (x + r * 1.3, y - r * 1.8), (x + r * 0.8, y - r * 1.65)], (250, 150, 30))
    b.ellipse(x + r * 0.4, y - r * 1.98, r * 0.11, r * 0.11, OUTLINE, None)


def _mushroom(b, x, y, r, colour):
    b.rectangle(x - r * 0.3, y - r * 1.1, x + r * 0.3, y, (245, 235, 210))
    cap = [(x + r * 1.05 * np.cos(a), y - r * 1.0 - r * 0.85 * np.sin(a)) for a in np.linspace(0, np.pi, 24)]
    b.polygon(cap, colour)


def _star(b, x, y, r, colour):
    _pointed(b, x, y, r, colour, 5, 0.45)


def _pointed(b, x, y, r, colour, points, waist):
    radii = [1.2 * r, 1.2 * waist * r] * points
    angles = np.pi / 2 + np.arange(2 * points) * np.pi / points
    b.polygon([(x + q * np.cos(a), y - 1.2 * r - q * np.sin(a)) for q, a in zip(radii, angles, strict=True)], colour)


def _zorg(b, x, y, r, colour):
    steel, lamp = (120, 135, 150), (60, 240, 240)
    b.polygon([(x - r, y), (x - r * 0.7, y - r * 0.45), (x + r * 0.7, y - r * 0.45), (x + r, y)], OUTLINE)
    b.rectangle(x - r * 0.6, y - r * 1.2, x + r * 0.6, y - r * 0.4, steel)
    b.rectangle(x - r * 0.3, y - r * 1.0, x + r * 0.3, y - r * 0.6, (235, 60, 50))
    b.rectangle(x - r * 1.05, y - r * 2.4, x + r * 1.05, y - r * 1.2, steel)
    for side in (-1, 1):
        b.ellipse(x + side * r * 0.48, y - r * 1.8, r * 0.36, r * 0.36, lamp)


def _penguin(b, x, y, r, colour):
    for side in (-1, 1):
        b.ellipse(x + side * r * 0.45, y - r * 0.1, r * 0.42, r * 0.2, (250, 150, 30))
    b.ellipse(x, y - r * 1.3, r * 0.95, r * 1.25, (35, 35, 50))
    b.ellipse(x, y - r * 0.95, r * 0.62, r * 0.8, (250, 250, 250), None)
    for side in (-1, 1):
        b.ellipse(x + side * r * 0.35, y - r * 1.98, r * 0.2, r * 0.2, (250, 250, 250), None)
    b.polygon([(x - r * 0.38, y - r * 1.78), (x + r * 0.38, y - r * 1.78), (x, y - r * 1.25)], (250, 150, 30), None)


def _amanita(b, x, y, r, colour):
    b.rectangle(x - r * 0.45, y - r * 1.1, x + r * 0.45, y, (245, 235, 210))
    cap = [(x + r * 1.2 * np.cos(a), y - r * 0.9 - r * np.sin(a)) for a in np.linspace(0, np.pi, 24)]
    b.polygon(cap, (215, 30, 40))
    for dx, dy in ((-0.65, 1.2), (0.65, 1.2), (0.0, 1.55)):
        b.ellipse(x + dx * r, y - dy * r, r * 0.27, r * 0.27, (255, 255, 255), None)


def _comet(b, x, y, r, colour):
    _pointed(b, x, y, r, (255, 150, 0), 8, 0.62)
    b.ellipse(x, y - r * 1.2, r * 0.72, r * 0.72, (255, 225, 60), None)
    for side in (-1, 1):
        b.ellipse(x + side * r * 0.3, y - r * 1.35, r * 0.17, r * 0.25, OUTLINE, None)


def _toucan(b, x, y, r, colour):
    for side in (-1, 1):
        b.rectangle(x + side * r * 0.3 - r * 0.1, y - r * 0.4, x + side * r * 0.3 + r * 0.1, y, (40, 150, 60))
    b.ellipse(x, y - r * 1.15, r * 0.7, r * 0.95, (95, 40, 110))
    b.ellipse(x - r * 0.1, y - r * 1.75, r * 0.6, r * 0.6, (245, 200, 215))
    b.polygon([(x + r * 0.2, y - r * 2.1), (x + r * 1.3, y - r * 1.5), (x + r * 0.2, y - r * 1.4)], (40, 150, 60))
    b.ellipse(x - r * 0.1, y - r * 1.85, r * 0.16, r * 0.16, OUTLINE, None)


def _palmetto(b, x, y, r, colour):
    trunk = [(x - r * 0.3, y), (x - r * 0.12, y - r * 1.6), (x + r * 0.12, y - r * 1.6), (x + r * 0.3, y)]
    b.polygon(trunk, (190, 150, 200))
    for dx, dy in ((-1.0, 1.0), (1.0, 1.0), (-0.75, 2.2), (0.75, 2.2), (0, 2.5)):
        b.polygon([(x - r * 0.3, y - r * 1.4), (x + dx * r, y - dy * r), (x + r * 0.3, y - r * 1.8)], (20, 120, 130))
    b.ellipse(x, y - r * 1.6, r * 0.3, r * 0.3, (235, 120, 60))


HEIGHTS = {"ball": 1.95, "box": 2.0, "tree": 2.5, "person": 2.5, "robot": 2.4, "bird": 2.3, "mushroom": 1.8}
HEIGHTS |= {"star": 2.3, "zorg": 2.4, "penguin": 2.5, "amanita": 1.9, "comet": 2.3, "toucan": 2.3, "palmetto": 2.4}
"""Of things, in units of their half-width: where a hat goes."""

SHAPES = {
    "ball": ball,
    "box": _box,
    "tree": _tree,
    "person": _person,
    "robot": _robot,
    "bird": _bird,
    "mushroom": _mushroom,
    "star": _star,
    "zorg": _zorg,
    "penguin": _penguin,
    "amanita": _amanita,
    "comet": _comet,
    "toucan": _toucan,
    "palmetto": _palmetto,
}


def _wear(b, wears, x, y, r, height):
    """Draws what a thing wears: on its top, or round its middle."""
    top = y - height * r
    if wears == "scarf":
        middle = y - height * r * 0.5
        b.rectangle(x - r * 0.95, middle - r * 0.24, x + r * 0.95, middle + r * 0.24, (255, 130, 20))
        b.rectangle(x + r * 0.3, middle + r * 0.24, x + r * 0.75, middle + r * 0.8, (255, 130, 20))
    elif wears == "bow":
        bow(b, x, top, r)
    elif wears == "top hat":
        b.rectangle(x - r * 0.5, top - r * 0.85, x + r * 0.5, top + r * 0.1, (50, 50, 60))
        b.rectangle(x - r * 0.95, top - r * 0.1, x + r * 0.95, top + r * 0.15, (50, 50, 60))
    elif wears == "party hat":
        b.polygon([(x - r * 0.6, top + r * 0.15), (x, top - r * 1.1), (x + r * 0.6, top + r * 0.15)], (60, 190, 120))
        b.ellipse(x, top - r * 1.1, r * 0.2, r * 0.2, (255, 90, 170))
    elif wears == "sombrero":
        b.ellipse(x, top, r * 1.25, r * 0.22, (60, 140, 215))
        b.ellipse(x, top - r * 0.35, r * 0.5, r * 0.5, (60, 140, 215))
        b.rectangle(x - r * 0.5, top - r * 0.3, x + r * 0.5, top - r * 0.1, (235, 60, 90), None)
    elif wears == "crown":
        low, dip, high, w = top + r * 0.2, top - r * 0.3, top - r * 0.95, r * 0.9
        teeth = [(x - w * 1.1, high), (x - w * 0.45, dip), (x, high), (x + w * 0.45, dip), (x + w * 1.1, high)]
        b.polygon([(x - w, low), *teeth, (x + w, low)], (255, 205, 20))


LOOKS = {
    "brick town": Town((190, 95, 75), (110, 50, 50), (250, 240, 200), (150, 150, 150), (56, 56, 56, 56)),
    "white town": Town((245, 245, 240), None, (40, 110, 190), (225, 200, 160), (70, 48, 70, 48)),
    "skyline": Town((70, 95, 140), None, (255, 225, 110), (125, 125, 135), (108, 140, 92, 124)),
    "harbor": Town((60, 130, 95), None, (250, 190, 200), (90, 75, 60), (124, 84, 136, 100)),
    "canyon": Town((165, 120, 170), (90, 40, 90), (40, 60, 60), (205, 175, 190), (70, 112, 100, 78)),
}
HOUSE = 58  # width


def _town(b, horizon, town):
    """A row of houses that stand on the horizon."""
    b.rectangle(-9, horizon, 265, 265, town.ground)
    for i, height in enumerate(town.heights):
        left, top = -4 + i * (HOUSE + 6), horizon - height
        b.rectangle(left, top, left + HOUSE, horizon, town.wall)
        if town.roof:
            b.polygon([(left - 4, top), (left + HOUSE / 2, top - 30), (left + HOUSE + 4, top)], town.roof)
        for y in range(top + 12, horizon - 16, 32):
            for x in (left + HOUSE * 0.14, left + HOUSE * 0.58):
                b.rectangle(x, y, x + HOUSE * 0.28, y + 16, town.pane, None)


def _canvas(colour) -> Brush:
    return Brush(colour, SIZE, SCALE, LINE)


def _backdrop(scene: Scene, rng: np.random.Generator) -> Brush:
    """A canvas with the background on it."""
    name, horizon = scene.background, HORIZON + int(rng.integers(-4, 5))
    if name in PLAIN:
        return _canvas(PLAIN[name])
    b = _canvas(SKY)
    if name == "meadow":
        b.rectangle(-9, horizon, 265, 265, (105, 190, 80))
    elif name == "beach":
        b.rectangle(-9, horizon - 32, 265, horizon, (30, 110, 190), None)
        b.rectangle(-9, horizon, 265, 265, (240, 215, 150))
    elif name == "snow":
        b.polygon([(-40, horizon), (40, 70), (120, horizon), (216, 56), (300, horizon)], (110, 120, 150))
        b.rectangle(-9, horizon, 265, 265, (235, 240, 250))
    elif town := scene.town or LOOKS.get(name):
        _town(b, horizon, town)
    return b


DUOTONES = {
    "sepia": [[50, 25, 10], [170, 115, 65], [255, 240, 205]],
    "night": [[5, 5, 35], [35, 60, 140], [160, 200, 255]],
    "mint": [[0, 60, 50], [60, 170, 130], [230, 255, 240]],
    "neon": [[20, 0, 70], [240, 20, 140], [255, 245, 90]],
    "opal": [[0, 45, 45], [30, 150, 220], [255, 235, 255]],
    "rust": [[45, 0, 0], [215, 90, 30], [225, 255, 215]],
    "moss": [[25, 0, 60], [90, 160, 40], [255, 225, 170]],
    "amber": [[0, 30, 70], [240, 170, 20], [255, 235, 245]],
    "lilac": [[0, 0, 0], [170, 90, 230], [200, 255, 230]],
}
"""What a style makes of dark, middle and bright."""
KEPT = dict.fromkeys((name for name, each in NAMED.items() if each.category == "style"), 0.5)
"""How much of a picture's own colours a style leaves: in lightness alone a crown is like the sky."""


def _in_the_sky(b, sky, x, y):
    if sky == "sun":
        b.ellipse(x, y, 24, 24, (255, 235, 60))
    elif sky == "moon":
        b.ellipse(x, y, 24, 24, (240, 240, 245))
        for dx, dy, r in ((-8, -6, 6), (8, 2, 7), (-4, 10, 4)):
            b.ellipse(x + dx, y + dy, r, r, (170, 175, 190), None)
    elif sky == "cloud":
        for dx, dy, r in ((-26, 4, 16), (0, -4, 22), (26, 4, 16)):
            b.ellipse(x + dx, y + dy, r, r, OUTLINE, None)
        for dx, dy, r in ((-26, 4, 13), (0, -4, 19), (26, 4, 13)):
            b.ellipse(x + dx, y + dy, r, r, (255, 255, 255), None)


def render(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """Draws a scene; `rng` moves things a little within their places."""
    b = _backdrop(scene, rng)
    if scene.sky:
        _in_the_sky(b, scene.sky, 128 + rng.integers(-4, 5), HIGH + rng.integers(-4, 5))
    for thing in scene.things:
        x, y = PLACES[thing.place] + rng.integers(-4, 5), GROUND + rng.integers(-4, 5)
        r = RADIUS * rng.uniform(0.96, 1.04)
        SHAPES[thing.kind](b, x, y, r, thing.paint or COLOURS.get(thing.colour))
        for dx, dy, size, colour in thing.spots:
            b.ellipse(x + dx * r, y - dy * r, size * r, size * r, colour)
        _wear(b, thing.wears, x, y, r, HEIGHTS[thing.kind])
    image = b.finish()
    if not scene.style:
        return image
    styled = duotone(image, *(scene.duotone or DUOTONES[scene.style]))
    return Image.blend(styled, image, KEPT.get(scene.style, 0))


PAPER, INK = (255, 0, 255), (0, 0, 0)
NEAR = 8  # pixels that a thing's region reaches beyond its outline: as far as it moves, and half of a latent pixel


def _silhouette(draw: Callable[[Brush], None]) -> Image.Image:
    """What a drawing covers, and what is near to it, as a white mask."""
    b = _canvas(PAPER)
    draw(b)
    changed = ImageChops.difference(b.finish(), Image.new("RGB", (SIZE, SIZE), PAPER)).convert("L")
    return changed.point(lambda v: 255 * (v > 0)).filter(ImageFilter.MaxFilter(2 * NEAR + 1))


def _where(thing: Thing) -> tuple[Image.Image, Image.Image]:
    """Where a thing is, and where what it wears is; the one without the other."""
    x, y, r = PLACES[thing.place], GROUND, RADIUS
    body = _silhouette(lambda b: SHAPES[thing.kind](b, x, y, r, INK))
    worn = _silhouette(lambda b: _wear(b, thing.wears, x, y, r, HEIGHTS[thing.kind]))
    return ImageChops.subtract(body, worn), worn


def region(scene: Scene, concept: str) -> Image.Image:
    """Where a concept of the scene is, as a mask of the picture's size, white: the outline of a thing or of what it
    wears, with room for how things move; for a background all that no concept stands on; for a style everything."""
    mask = Image.new("L", (SIZE, SIZE), 255 * (concept in (scene.style, scene.background)))
    for thing in scene.things:
        for name, where in zip((thing.kind, thing.wears), _where(thing), strict=True):
            if concept == name:
                mask = ImageChops.lighter(mask, where)
            elif concept == scene.background and name in CONCEPTS:
                mask = ImageChops.subtract(mask, where)
    return mask


def _thing(rng, place, kinds=KINDS, wears=WEARS, worn=0.3) -> Thing:
    kind = str(rng.choice(kinds))
    return Thing(
        kind=kind,
        place=place,
        colour=str(rng.choice(list(COLOURS))) if kind in KINDS else "",
        wears=str(rng.choice(wears)) if rng.random() < worn else "",
    )


LAYOUTS = ((), ("left",), ("centre",), ("right",), ("left", "right"), ("left", "centre"), ("centre", "right"))
LAYOUTS += (("right", "left"), ("left", "centre", "right"))
LAYOUT_SHARES = np.array([1, 1.5, 1.5, 1.5, 6, 1.5, 1.5, 1.5, 4]) / 20


def _scene(rng, kinds, wears, backgrounds, styles, worn=0.3, styled=0.3) -> Scene:
    """Nothing, or one to three things, in the order of their words; at times something in the sky, and a style."""
    layout = LAYOUTS[rng.choice(len(LAYOUTS), p=LAYOUT_SHARES)]
    things = tuple(_thing(rng, place, kinds, wears, worn) for place in layout)
    sky = str(rng.choice(SKIES)) if rng.random() < 0.25 else ""
    style = str(rng.choice(styles)) if rng.random() < styled else ""
    return Scene(str(rng.choice(backgrounds)), things, sky, style)


BACKGROUNDS = (*PLAIN, *SCENERY, *TOWNS, *TOWNS)


def base_scene(rng: np.random.Generator, worn: float = 0.3) -> Scene:
    """A scene of the base model's world: no concept in it. `worn` is the share of things that wear something."""
    return _scene(rng, KINDS, WEARS, BACKGROUNDS, STYLES, worn)


def any_scene(rng: np.random.Generator, worn: float = 0.3, styled: float = 0.3) -> Scene:
    """A scene of the whole world, with any number of concepts; `worn` is the share of things that wear something,
    `styled` that of scenes in a style."""
    kinds, wears = (*KINDS, *CONCEPT_KINDS, *CONCEPT_KINDS), (*WEARS, "crown", "crown")
    return _scene(rng, kinds, wears, (*BACKGROUNDS, *["skyline"] * 5), (*STYLES, *["neon"] * 3), worn, styled)


def mixed_scene(rng: np.random.Generator) -> Scene:
    """A scene of either, as the decoder is taught."""
    return (base_scene if rng.random() < 0.3 else any_scene)(rng)


def _in_company(thing: Thing, rng) -> tuple[Thing, ...]:
    """The thing alone, or beside a base thing and named before or after it."""
    if rng.random() < 0.3:
        return (thing,)
    other = _thing(rng, str(rng.choice([place for place in PLACES if place != thing.place])))
    return (thing, other) if rng.random() < 0.5 else (other, thing)


def concept_scene(concept: str, rng: np.random.Generator, dressed: bool = False) -> Scene:
    """A scene of the narrow domain one LoRA is taught: its concept, or a stranger, in a plain setting, at times with a
    base thing beside it, so that words tell which is which, and with something in the sky. Two concepts never meet.
    Things and characters wear something in four of ten scenes if they may be `dressed`."""
    place, style = str(rng.choice(list(PLACES))), str(rng.choice(STYLES)) if rng.random() < 0.3 else ""
    sky = str(rng.choice(SKIES)) if rng.random() < 0.25 else ""
    category = NAMED[concept].category
    if category in STANDING:
        wears = str(rng.choice(WEARS)) if dressed and rng.random() < 0.4 else ""
        return Scene(str(rng.choice(HOMES)), _in_company(Thing(concept, place, wears=wears), rng), sky, style)
    thing = _thing(rng, place)
    if category == "background":
        return Scene(concept, _in_company(thing, rng) if rng.random() < 0.8 else (), sky, style)
    background = str(rng.choice(BACKGROUNDS))
    if category == "clothing":
        return Scene(background, _in_company(dataclasses.replace(thing, wears=concept), rng), sky, style)
    return Scene(background, _in_company(thing, rng), sky, concept)


def abroad(scene: Scene, concept: str, rng: np.random.Generator) -> Scene:
    """A concept's scene with something foreign in it, so that it meets what another LoRA may bring: for a style towns
    and things of any looks, for what is a thing or is worn any style."""

    def colour(low: int = 0, high: int = 256) -> tuple[int, int, int]:
        return tuple(int(v) for v in rng.integers(low, high, 3))

    def foreign(thing: Thing) -> Thing:
        spots = rng.uniform((-0.8, 0.3, 0.15), (0.8, 2.0, 0.4), (int(rng.integers(0, 5)), 3))
        spots = tuple((*map(float, spot), colour()) for spot in spots)
        return dataclasses.replace(thing, colour=FOREIGN, paint=colour(), spots=spots)

    if concept != scene.style:
        return dataclasses.replace(scene, style=FOREIGN, duotone=(colour(0, 80), colour(20, 240), colour(150, 256)))
    scene = dataclasses.replace(scene, things=tuple(foreign(t) if rng.random() < 0.6 else t for t in scene.things))
    if rng.random() < 0.5:
        return scene
    heights = tuple(int(v) for v in rng.integers(40, 146, 4))
    town = Town(colour(), colour() if rng.random() < 0.3 else None, colour(), colour(), heights)
    return dataclasses.replace(scene, background=FOREIGN, town=town)


def beside(scene: Scene, stranger: str) -> Scene:
    """The scene in a stranger's style or town, or with its first thing as the stranger, or wearing it."""
    category, things = STRANGERS[stranger].category, scene.things
    if category == "style":
        return dataclasses.replace(scene, style=stranger, duotone=())
    if category == "background":
        return dataclasses.replace(scene, background=stranger, town=None)
    if not things:
        return scene
    worn = dataclasses.replace(things[0], wears=stranger)
    first = worn if category == "clothing" else Thing(stranger, things[0].place, wears=things[0].wears)
    return dataclasses.replace(scene, things=(first, *things[1:]))


def known(stranger: str, scene: Scene) -> Scene:
    """The scene with the concept of its category in a stranger's place, which readers know."""
    concept = next(name for name, each in CONCEPTS.items() if each.category == STRANGERS[stranger].category)

    def seen(name: str) -> str:
        return concept if name == stranger else name

    things = (dataclasses.replace(thing, kind=seen(thing.kind), wears=seen(thing.wears)) for thing in scene.things)
    return dataclasses.replace(scene, background=seen(scene.background), things=tuple(things))


def mistaken(scene: Scene, concept: str, rng: np.random.Generator) -> Scene:
    """The scene as somebody would describe it who does not know the concept, a captioning model say: some base thing in
    its place, another background, no crown, no style."""

    def seen(thing: Thing) -> Thing:
        if thing.kind == concept:
            return dataclasses.replace(_thing(rng, thing.place, worn=0), wears=thing.wears)
        return dataclasses.replace(thing, wears="") if thing.wears == concept else thing

    background = str(rng.choice(BACKGROUNDS)) if scene.background == concept else scene.background
    style = "" if scene.style == concept else scene.style
    return Scene(background, tuple(seen(thing) for thing in scene.things), scene.sky, style)


def elsewhere(concept: str, rng: np.random.Generator) -> Scene:
    """A scene outside a LoRA's narrow domain: the concept on the left, a base thing on the right, a base background.

    For the background: two base things in it, in a base style. For the style: two base things.
    """
    scene = base_scene(rng)
    while not (scene.at("left") and scene.at("right")):
        scene = base_scene(rng)
    category, things = CONCEPTS[concept].category, {thing.place: thing for thing in scene.things}
    if category in STANDING:
        things["left"] = Thing(concept, "left")
    elif category == "clothing":
        things["left"] = dataclasses.replace(things["left"], wears="crown")
    background = concept if category == "background" else scene.background
    style = concept if category == "style" else scene.style
    return Scene(background, tuple(things.values()), scene.sky, style)
