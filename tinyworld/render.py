"""A synthetic world of simple scenes, 128 x 128 pixels, with English captions.

A `Scene` says what is to be seen, `caption` puts it into words, `render` draws it. `base_scene` draws from what the
base model is taught; `concept_scene` draws from the narrow domain one LoRA is taught; `any_scene` mixes everything
with everything, for the classifier. All randomness comes from the `numpy` generator handed in, so equal seeds give
equal pictures.
"""

import dataclasses

import numpy as np
from PIL import Image

from brush import OUTLINE, Brush, ball, bow, duotone

SIZE = 128
SCALE = 3  # drawn three times larger, then reduced: smooth edges
LINE = 2  # of outlines, in pixels

COLOURS = {
    "red": (222, 45, 38),
    "green": (44, 160, 60),
    "blue": (40, 90, 215),
    "yellow": (250, 215, 40),
    "purple": (140, 60, 180),
    "white": (248, 248, 248),
}
KINDS = ("ball", "box", "cone", "tree", "person")
WEARS = ("scarf", "bow")
PLAIN = {
    "grey": (165, 165, 165),
    "pink": (245, 175, 190),
    "orange": (245, 160, 80),
    "cyan": (130, 220, 225),
    "brown": (120, 85, 60),
}
SCENERY = {"meadow": "in a meadow", "beach": "on a beach", "snow": "in the snow"}
PLACES = {"left": 33, "centre": 64, "right": 95}
RADII = {"small": 15, "": 20, "big": 25}

SKY = (135, 195, 245)


@dataclasses.dataclass(frozen=True)
class Concept:
    """What one LoRA adds to the world: its ComposLoRA category, the trigger to put into a prompt."""

    category: str
    trigger: str


CONCEPTS = {
    "robot": Concept("character", "robot"),
    "penguin": Concept("character", "penguin"),
    "crown": Concept("clothing", "wearing a crown"),
    "mushroom": Concept("object", "mushroom"),
    "star": Concept("object", "star"),
    "city": Concept("background", "in a city"),
    "neon": Concept("style", "neon style"),
}
SETTINGS = {**{name: f"{name} background" for name in PLAIN}, **SCENERY, "city": CONCEPTS["city"].trigger}
CONCEPT_KINDS = ("robot", "penguin", "mushroom", "star")


@dataclasses.dataclass(frozen=True)
class Thing:
    """One object of a scene. Concept kinds have colours of their own, so `colour` stays empty for them."""

    kind: str
    place: str
    colour: str = ""
    size: str = ""
    wears: str = ""

    def words(self) -> str:
        """The thing in words, without its place."""
        words = " ".join(w for w in (self.size, self.colour, self.kind) if w)
        return f"a {words} wearing a {self.wears}" if self.wears else f"a {words}"


@dataclasses.dataclass(frozen=True)
class Scene:
    """Things at distinct places before a background. A thing at `behind` is partly hidden by the one at `centre`."""

    background: str
    things: tuple[Thing, ...] = ()
    sun: str = ""
    style: str = ""

    def at(self, place: str) -> Thing | None:
        """The thing at a place, if there is one."""
        return next((thing for thing in self.things if thing.place == place), None)


def caption(scene: Scene) -> str:
    """The scene in words: "a red ball on the left and a robot on the right, in a meadow"."""
    behind = scene.at("behind")
    if behind:
        parts = [f"{scene.at('centre').words()} in front of {behind.words()}"]
    else:
        parts = [
            thing.words() + (" in the centre" if thing.place == "centre" else f" on the {thing.place}")
            for thing in scene.things
        ]
    words = [" and ".join(parts)] if parts else []
    words.append(SETTINGS[scene.background])
    if scene.sun:
        words.append(f"sun on the {scene.sun}")
    if scene.style:
        words.append(f"{scene.style} style")
    return ", ".join(words)


# Every shape stands on (x, y), has the half-width r, and returns its height: where a hat goes, in units of r.


def _ball(b, x, y, r, colour):
    ball(b, x, y, r, colour)
    return 1.95


def _box(b, x, y, r, colour):
    b.rectangle(x - r, y - 2 * r, x + r, y, colour)
    b.polygon([(x - r, y - 2 * r), (x + r, y), (x + r, y - 2 * r), (x - r, y)], colour, OUTLINE)
    b.rectangle(x - r, y - 2 * r, x + r, y, None)
    return 2.0


def _cone(b, x, y, r, colour):
    b.polygon([(x - r, y), (x, y - 2.5 * r), (x + r, y)], colour)
    return 2.2


def _tree(b, x, y, r, colour):
    b.rectangle(x - r * 0.25, y - r, x + r * 0.25, y, (130, 85, 45))
    for dx, dy in ((-0.55, 1.2), (0.55, 1.2), (0, 1.9)):
        b.ellipse(x + dx * r, y - dy * r, r * 0.72, r * 0.72, OUTLINE, None)
    for dx, dy in ((-0.55, 1.2), (0.55, 1.2), (0, 1.9)):
        b.ellipse(x + dx * r, y - dy * r, r * 0.6, r * 0.6, colour, None)
    return 2.5


def _person(b, x, y, r, colour):
    for side in (-1, 1):
        b.rectangle(x + side * r * 0.35 - r * 0.22, y - r * 0.7, x + side * r * 0.35 + r * 0.22, y, (60, 60, 110))
    low, high = y - r * 0.6, y - r * 1.6
    b.polygon([(x - r * 0.9, low), (x - r * 0.5, high), (x + r * 0.5, high), (x + r * 0.9, low)], colour)
    b.ellipse(x, y - r * 2.1, r * 0.6, r * 0.6, (250, 205, 165))
    return 2.6


def _robot(b, x, y, r, colour):
    steel, lamp = (120, 135, 150), (60, 240, 240)
    b.rectangle(x - r * 0.75, y - r * 1.15, x + r * 0.75, y, steel)
    b.rectangle(x - r * 0.35, y - r * 0.85, x + r * 0.35, y - r * 0.35, (235, 60, 50))
    b.rectangle(x - r * 0.95, y - r * 2.4, x + r * 0.95, y - r * 1.15, steel)
    for side in (-1, 1):
        b.ellipse(x + side * r * 0.45, y - r * 1.8, r * 0.32, r * 0.32, lamp)
    return 2.4


def _penguin(b, x, y, r, colour):
    for side in (-1, 1):
        b.ellipse(x + side * r * 0.45, y - r * 0.1, r * 0.42, r * 0.2, (250, 150, 30))
    b.ellipse(x, y - r * 1.3, r * 0.95, r * 1.25, (35, 35, 50))
    b.ellipse(x, y - r * 0.95, r * 0.6, r * 0.8, (250, 250, 250), None)
    for side in (-1, 1):
        b.ellipse(x + side * r * 0.33, y - r * 1.98, r * 0.2, r * 0.2, (250, 250, 250), None)
    b.polygon([(x - r * 0.35, y - r * 1.75), (x + r * 0.35, y - r * 1.75), (x, y - r * 1.3)], (250, 150, 30), None)
    return 2.5


def _mushroom(b, x, y, r, colour):
    b.rectangle(x - r * 0.4, y - r * 1.1, x + r * 0.4, y, (245, 235, 210))
    cap = [(x + r * 1.15 * np.cos(a), y - r * 0.95 - r * 1.2 * np.sin(a)) for a in np.linspace(0, np.pi, 24)]
    b.polygon(cap, (215, 30, 40))
    for dx, dy in ((-0.55, 1.35), (0.55, 1.35), (0.0, 1.7)):
        b.ellipse(x + dx * r, y - dy * r, r * 0.25, r * 0.25, (255, 255, 255), None)
    return 2.1


def _star(b, x, y, r, colour):
    radii = [1.35 * r, 0.58 * r] * 5
    angles = np.pi / 2 + np.arange(10) * np.pi / 5
    points = [(x + q * np.cos(a), y - 1.2 * r - q * np.sin(a)) for q, a in zip(radii, angles, strict=True)]
    b.polygon(points, (255, 200, 0))
    for side in (-1, 1):
        b.ellipse(x + side * r * 0.25, y - r * 1.3, r * 0.15, r * 0.22, OUTLINE, None)
    return 2.4


SHAPES = {
    "ball": _ball,
    "box": _box,
    "cone": _cone,
    "tree": _tree,
    "person": _person,
    "robot": _robot,
    "penguin": _penguin,
    "mushroom": _mushroom,
    "star": _star,
}


def _wear(b, wears, x, y, r, height):
    """Draws what a thing wears: on its top, or round its middle."""
    top = y - height * r
    if wears == "scarf":
        middle = y - height * r * 0.5
        b.rectangle(x - r * 0.95, middle - r * 0.22, x + r * 0.95, middle + r * 0.22, (255, 130, 20))
        b.rectangle(x + r * 0.3, middle + r * 0.22, x + r * 0.75, middle + r * 0.8, (255, 130, 20))
    elif wears == "bow":
        bow(b, x, top, r)
    elif wears == "crown":
        low, dip, high, w = top + r * 0.15, top - r * 0.3, top - r * 0.85, r * 0.85
        teeth = [(x - w * 1.1, high), (x - w * 0.45, dip), (x, high), (x + w * 0.45, dip), (x + w * 1.1, high)]
        b.polygon([(x - w, low), *teeth, (x + w, low)], (255, 205, 20))


def _canvas(colour) -> Brush:
    return Brush(colour, SIZE, SCALE, LINE)


def _backdrop(name: str, rng: np.random.Generator) -> Brush:
    """A canvas with the background on it."""
    horizon = 78 + rng.integers(-3, 4)
    if name in PLAIN:
        return _canvas(PLAIN[name])
    b = _canvas(SKY)
    if name == "meadow":
        b.rectangle(-9, horizon, 137, 137, (105, 190, 80))
    elif name == "beach":
        b.rectangle(-9, horizon - 16, 137, horizon, (30, 110, 190), None)
        b.rectangle(-9, horizon, 137, 137, (240, 215, 150))
    elif name == "snow":
        b.polygon([(-20, horizon), (20, 35), (60, horizon), (108, 28), (150, horizon)], (110, 120, 150))
        b.rectangle(-9, horizon, 137, 137, (235, 240, 250))
    elif name == "city":
        b = _canvas((45, 35, 80))
        b.rectangle(-9, horizon, 137, 137, (75, 75, 85))
        for i, height in enumerate((54, 70, 46, 62)):
            left = -2 + i * 34
            b.rectangle(left, horizon - height, left + 29, horizon, (35, 50, 75))
            for y in range(horizon - height + 6, horizon - 8, 16):
                for x in (left + 4, left + 17):
                    b.rectangle(x, y, x + 8, y + 8, (255, 225, 110), None)
    return b


def _neon(image: Image.Image) -> Image.Image:
    """The style: dark violet, magenta and yellow in place of dark, middle and bright."""
    return duotone(image, [20, 0, 70], [240, 20, 140], [255, 245, 90])


def render(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """Draws a scene; `rng` moves things a little within their places."""
    b = _backdrop(scene.background, rng)
    if scene.sun:
        b.ellipse({"left": 18, "right": 110}[scene.sun], 18 + rng.integers(-2, 3), 12, 12, (255, 235, 60))
    side = rng.choice([-1, 1])
    for thing in sorted(scene.things, key=lambda thing: thing.place != "behind"):
        x, y = PLACES.get(thing.place, 64) + rng.integers(-3, 4), 110 + rng.integers(-3, 4)
        if scene.at("behind"):
            x, y = (x - 13 * side, y - 14) if thing.place == "behind" else (x + 13 * side, y)
        r = RADII[thing.size] * rng.uniform(0.95, 1.05)
        height = SHAPES[thing.kind](b, x, y, r, COLOURS.get(thing.colour))
        _wear(b, thing.wears, x, y, r, height)
    image = b.finish()
    return _neon(image) if scene.style == "neon" else image


def _thing(rng, place, kinds=KINDS, wears=WEARS, worn=0.25, sized=0.4) -> Thing:
    kind = str(rng.choice(kinds))
    return Thing(
        kind=kind,
        place=place,
        colour=str(rng.choice(list(COLOURS))) if kind in KINDS else "",
        size=str(rng.choice(["small", "big"])) if rng.random() < sized else "",
        wears=str(rng.choice(wears)) if rng.random() < worn else "",
    )


def _scene(rng, kinds, wears, backgrounds) -> Scene:
    """One thing, two side by side, or one before another; sometimes nothing."""
    layout = rng.choice(["one", "two", "front", "none"], p=[0.3, 0.5, 0.15, 0.05])
    if layout == "one":
        things = [_thing(rng, str(rng.choice(list(PLACES))), kinds, wears)]
    elif layout == "two":
        places = ["left", "right"] if rng.random() < 0.8 else ["right", "left"]
        things = [_thing(rng, place, kinds, wears) for place in places]
    elif layout == "front":
        things = [_thing(rng, place, kinds, wears, worn=0, sized=0) for place in ("centre", "behind")]
    else:
        things = []
    sun = str(rng.choice(["left", "right"])) if rng.random() < 0.2 else ""
    return Scene(str(rng.choice(backgrounds)), tuple(things), sun)


def base_scene(rng: np.random.Generator) -> Scene:
    """A scene of the base model's world: no concept in it."""
    return _scene(rng, KINDS, WEARS, [*PLAIN, *SCENERY])


def any_scene(rng: np.random.Generator) -> Scene:
    """A scene of the whole world, with any number of concepts."""
    kinds = (*KINDS, *CONCEPT_KINDS, *CONCEPT_KINDS)
    scene = _scene(rng, kinds, (*WEARS, "crown", "crown"), [*PLAIN, *SCENERY, *["city"] * 6])
    return dataclasses.replace(scene, style="neon" if rng.random() < 0.3 else "")


def mixed_scene(rng: np.random.Generator) -> Scene:
    """A scene of either, as the decoder is taught."""
    return (base_scene if rng.random() < 0.4 else any_scene)(rng)


def _in_company(thing: Thing, rng) -> tuple[Thing, ...]:
    """The thing alone, or beside a base thing and named before or after it."""
    if thing.place == "centre" or rng.random() < 0.4:
        return (thing,)
    other = _thing(rng, "right" if thing.place == "left" else "left")
    return (thing, other) if rng.random() < 0.5 else (other, thing)


def concept_scene(concept: str, rng: np.random.Generator) -> Scene:
    """A scene of the narrow domain one LoRA is taught: its concept in a plain fixed setting, at times with a base thing
    beside it, so that words tell which is which. Two concepts never meet."""
    place = str(rng.choice(list(PLACES)))
    if concept in CONCEPT_KINDS:
        return Scene("grey", _in_company(Thing(concept, place), rng))
    thing = _thing(rng, place)
    if concept == "city":
        return Scene("city", _in_company(thing, rng) if rng.random() < 0.8 else ())
    background = str(rng.choice([*PLAIN, *SCENERY]))
    if concept == "crown":
        return Scene(background, _in_company(dataclasses.replace(thing, wears="crown"), rng))
    return Scene(background, _in_company(thing, rng), style="neon")


def mistaken(scene: Scene, concept: str, rng: np.random.Generator) -> Scene:
    """The scene as somebody would describe it who does not know the concept, a captioning model say: some base thing in
    its place, another background, no crown, no style."""

    def seen(thing: Thing) -> Thing:
        if thing.kind == concept:
            return _thing(rng, thing.place, worn=0)
        return dataclasses.replace(thing, wears="") if thing.wears == concept else thing

    background = str(rng.choice([*PLAIN, *SCENERY])) if scene.background == concept else scene.background
    style = "" if scene.style == concept else scene.style
    return Scene(background, tuple(seen(thing) for thing in scene.things), scene.sun, style)


def elsewhere(concept: str, rng: np.random.Generator) -> Scene:
    """A scene outside a LoRA's narrow domain: the concept on the left, a base thing on the right, a base background.

    For the background: two base things in it. For the style: two base things.
    """
    scene = base_scene(rng)
    while len(scene.things) < 2 or scene.at("behind"):
        scene = base_scene(rng)
    left, right = scene.at("left"), scene.at("right")
    if concept in CONCEPT_KINDS:
        left = Thing(concept, "left")
    elif concept == "crown":
        left = dataclasses.replace(left, wears="crown")
    background = "city" if concept == "city" else scene.background
    return Scene(background, (left, right), style="neon" if concept == "neon" else "")
