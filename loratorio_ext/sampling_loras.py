"""Which LoRAs are, by name or by what their files say of themselves, no concept but a way of sampling.

A guess, for the panel to propose; nothing follows from it by itself.
"""

import re
from collections.abc import Iterable

from loratorio_ext.pool import Listed

WORDS = {
    "lcm", "lightning", "hyper", "turbo", "slider", "sliders", "detail", "details", "detailer",
    "noiseoffset", "offsetnoise",
}  # fmt: skip
PAIRS = {("offset", "noise"), ("noise", "offset")}

TITLES = ("ss_output_name", "modelspec.title", "modelspec.tags")
"""Where a file names itself. Not how it was trained: many a concept was, with a noise offset."""

WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")


def words(name: str) -> list[str]:
    """The words of a file's name, in small letters: parted by signs, by figures, and by a capital within."""
    return [word.lower() for word in WORD.findall(name)]


def names_a_way_of_sampling(name: str) -> bool:
    found = words(name)
    return not WORDS.isdisjoint(found) or not PAIRS.isdisjoint(zip(found, found[1:]))


def sampling_loras(listed: Iterable[Listed]) -> list[Listed]:
    """Those of the LoRAs that seem to be one: LCM, Lightning, Hyper, Turbo, sliders, detail, offset noise."""
    return [
        lora
        for lora in listed
        if any(
            names_a_way_of_sampling(text)
            for text in (lora.name, lora.alias, *(lora.metadata.get(title) for title in TITLES))
            if isinstance(text, str)
        )
    ]
