"""Where the host itself lies."""

from pathlib import Path

script_path = str(Path(__file__).parents[1])
