"""Which LoRAs are styles or backgrounds, by the names of their files and folders, or by the words that call them up.

A style is at home nowhere: it competes with everybody for every patch, and a patch that it wins is in its colours
while the next one is not. So it belongs into every pass. A background is what all others stand in front of: in every
pass they are painted into it, and not into surroundings of their own. A guess: what is not told is not taken for one.
"""

from collections.abc import Callable, Iterable, Sequence

from loratorio_ext.sampling_loras import words

WORN = {"hair", "hairs", "clothing", "fashion", "dress"}
"""Whose style is a thing at a place."""


def says_style(found: Sequence[str]) -> bool:
    """Whether words, in their order, speak of a style of pictures."""
    at = [index for index, word in enumerate(found) if word in ("style", "styles")]
    return any(not index or found[index - 1] not in WORN for index in at)


def each_says(phrases: Iterable[str], says: Callable[[Sequence[str]], bool]) -> bool:
    """Whether there are phrases, and the words of every one say so."""
    found = [words(phrase) for phrase in phrases]
    return bool(found) and all(map(says, found))


def is_style(path: str, phrases: Iterable[str]) -> bool:
    """Whether a LoRA's path below the LoRA folder says so, or each of its trigger words, by phrases, if it has any."""
    return says_style(words(path)) or each_says(phrases, says_style)


BACKDROPS = {"background", "backgrounds", "scenery", "landscape", "landscapes", "cityscape", "environment"}
"""Words that speak of a background wherever they stand."""
SURROUNDINGS = BACKDROPS | {
    *("town", "city", "village", "street", "alley", "market", "harbor", "harbour", "ruins", "skyline", "rooftop"),
    *("downtown", "slums", "road", "plaza", "courtyard", "backyard", "station", "battlefield", "wasteland"),
    *("forest", "woods", "jungle", "meadow", "field", "fields", "garden", "park", "desert", "mountains", "valley"),
    *("canyon", "hills", "plains", "savanna", "tundra", "snowfield", "cave", "sky", "aurora"),
    *("beach", "coast", "shore", "sea", "ocean", "lake", "river", "lagoon", "swamp", "marsh", "reef"),
    *("room", "bedroom", "bathroom", "kitchen", "classroom", "library", "office", "laboratory", "restaurant"),
    *("cafe", "corridor", "hallway", "hall", "dungeon", "interior"),
}
"""Nouns of places: whoever is called up by words that end in one is a background."""


def is_background(path: str, phrases: Iterable[str]) -> bool:
    """Whether a LoRA's path below the LoRA folder says so, or each of its trigger words, by phrases, if it has any."""
    by_path = not BACKDROPS.isdisjoint(words(path))
    return by_path or each_says(phrases, lambda found: not SURROUNDINGS.isdisjoint(found[-1:]))
