"""Texts that a user keeps under a name, and chooses to go into a prompt."""

from collections.abc import Sequence
from typing import NamedTuple


class PromptStyle(NamedTuple):
    name: str
    prompt: str
    negative_prompt: str = ""


class StyleDatabase:
    def __init__(self):
        self.styles: dict[str, PromptStyle] = {}

    def apply_styles_to_prompt(self, prompt: str, names: Sequence[str]) -> str:
        """The prompt where ``{prompt}`` stands in a style, or before it."""
        for name in names:
            text = self.styles[name].prompt if name in self.styles else ""
            prompt = text.replace("{prompt}", prompt) if "{prompt}" in text else ", ".join(filter(None, (prompt, text)))
        return prompt
