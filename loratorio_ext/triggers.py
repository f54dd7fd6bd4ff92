"""The words that call a LoRA up, from what its file and the host's notes beside it say."""

import json
import os
from collections import Counter
from collections.abc import Mapping
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
