"""What the host's settings page says of a pool's size and of the log: set once, for every image and API request."""

from typing import Any

import gradio as gr
from modules import shared

SECTION = ("loratorio", "LoRAtorio")
MOST_FILES = "loratorio_pool_files"
MOST_GIB = "loratorio_pool_gib"
LOG_STEPS = "loratorio_log_steps"

DEFAULTS: dict[str, Any] = {MOST_FILES: 64, MOST_GIB: 8.0, LOG_STEPS: False}
LABELS = {
    MOST_FILES: "Most LoRAs in a pool (0: any number)",
    MOST_GIB: "Most GiB of LoRA files in a pool, all of which are in main memory at once (0: any size)",
    LOG_STEPS: "Print every step's shares to the console (for debugging)",
}


def add_settings() -> None:
    """``on_ui_settings``: put them on the host's settings page."""
    for name, default in DEFAULTS.items():
        if isinstance(default, bool):
            shared.opts.add_option(name, shared.OptionInfo(default, LABELS[name], section=SECTION))
            continue
        number = {"minimum": 0, "precision": 0 if isinstance(default, int) else 1}
        shared.opts.add_option(name, shared.OptionInfo(default, LABELS[name], gr.Number, number, section=SECTION))


def setting(name: str) -> Any:
    """What is set, or the default: a host without a UI does not ask extensions for their settings."""
    return shared.opts.data.get(name, DEFAULTS[name])


def most_files() -> int:
    return int(setting(MOST_FILES))


def most_bytes() -> int:
    return int(setting(MOST_GIB) * 2**30)


def log_steps() -> bool:
    return bool(setting(LOG_STEPS))
