"""What the host's settings page says of a pool's size: set once, for every image and every API request."""

from typing import Any

import gradio as gr
from modules import shared

SECTION = ("loratorio", "LoRAtorio")
MOST_FILES = "loratorio_pool_files"
MOST_GIB = "loratorio_pool_gib"

DEFAULTS: dict[str, Any] = {MOST_FILES: 64, MOST_GIB: 8.0}
LABELS = {
    MOST_FILES: "Most LoRAs in a pool (0: any number)",
    MOST_GIB: "Most GiB of LoRA files in a pool, all of which are in main memory at once (0: any size)",
}


def add_settings() -> None:
    """``on_ui_settings``: put them on the host's settings page."""
    for name, default in DEFAULTS.items():
        number = {"minimum": 0, "precision": 0 if isinstance(default, int) else 1}
        shared.opts.add_option(name, shared.OptionInfo(default, LABELS[name], gr.Number, number, section=SECTION))


def setting(name: str) -> Any:
    """What is set, or the default: a host without a UI does not ask extensions for their settings."""
    return shared.opts.data.get(name, DEFAULTS[name])


def most_files() -> int:
    return int(setting(MOST_FILES))


def most_bytes() -> int:
    return int(setting(MOST_GIB) * 2**30)
