"""Which LoRAs are styles, by the names of their files and folders, or by the words that call them up.

A style is at home nowhere: it competes with everybody for every patch, and a patch that it wins is in its colours
while the next one is not. So it belongs into every pass. A guess: what is not told is not taken for one.
"""

from collections.abc import Iterable, Sequence

from loratorio_ext.sampling_loras import words

WORN = {"hair", "hairs", "clothing", "fashion", "dress"}
"""Whose style is a thing at a place."""


def says_style(found: Sequence[str]) -> bool:
    """Whether words, in their order, speak of a style of pictures."""
    at = [index for index, word in enumerate(found) if word in ("style", "styles")]
    return any(not index or found[index - 1] not in WORN for index in at)


def is_style(path: str, phrases: Iterable[str]) -> bool:
    """Whether a LoRA's path below the LoRA folder says so, or each of its trigger words, by phrases, if it has any."""
    phrases = tuple(phrases)
    by_words = bool(phrases) and all(says_style(words(phrase)) for phrase in phrases)
    return says_style(words(path)) or by_words
