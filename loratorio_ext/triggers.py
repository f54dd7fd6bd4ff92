"""The words that call a LoRA up, by its file and the host's notes beside it; and whether a prompt has them."""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

LIMIT = 6
"""So many of the most frequent training tags are shown."""


def training_tags(metadata: Mapping[str, Any]) -> list[str]:
    """The most frequent tags of the training set, from kohya's ``ss_tag_frequency``: a dict (or its JSON) of counts
    by folder and tag."""
    frequency = metadata.get("ss_tag_frequency")
    if isinstance(frequency, str):
        try:
            frequency = json.loads(frequency)
        except ValueError:
            return []
    counts: Counter[str] = Counter()
    for folder in frequency.values() if isinstance(frequency, Mapping) else ():
        for tag, count in folder.items() if isinstance(folder, Mapping) else ():
            if isinstance(count, int) and str(tag).strip():
                counts[str(tag).strip()] += count
    return [tag for tag, _ in counts.most_common(LIMIT)]


def user_notes(file: str) -> Mapping[str, Any]:
    """What the user has written in the host's metadata editor: a JSON file beside the LoRA; empty where there is none
    that can be read."""
    try:
        with open(os.path.splitext(file)[0] + ".json", encoding="utf-8") as notes:
            found = json.load(notes)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, Mapping) else {}


def trigger_words(file: str, metadata: Mapping[str, Any]) -> str:
    """The user's own activation text, else the most frequent training tags, else nothing."""
    text = user_notes(file).get("activation text")
    return text.strip() if isinstance(text, str) and text.strip() else ", ".join(training_tags(metadata))


def phrases(text: str) -> tuple[str, ...]:
    """What is between a text's commas and line breaks: each is one way to call a LoRA up."""
    return tuple(dict.fromkeys(filter(None, map(str.strip, re.split(r"[,\n]", text)))))


def stems(text: str) -> set[str]:
    """A text's words without case and plural; weights, brackets, underscores and hyphens only part them."""
    return {word.removesuffix("s") for word in re.findall(r"[^\W_]+", text.casefold())}


def has_phrase(prompt: str, phrase: str) -> bool:
    """Whether a prompt may mean a phrase: all of its words are there, wherever. So weights, prompt editing and words in
    between hide none. Of scripts that write words in one line, the phrase as it stands."""
    wanted = stems(phrase)
    in_one_line = not phrase.isascii() and phrase.casefold() in prompt.casefold()
    return in_one_line or (bool(wanted) and wanted <= stems(prompt))


def is_named(prompt: str, words: Iterable[str]) -> bool:
    """Whether a prompt has any of the phrases ``words``; true where none is known."""
    words = tuple(words)
    return not words or any(has_phrase(prompt, phrase) for phrase in words)
