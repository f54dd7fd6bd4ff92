"""Side branches in the layers of Forge and Forge Neo, where no checkpoint is small enough for a server: Flux on Forge,
quantised weights on both."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.live.webui import host_python

pytestmark = pytest.mark.live

NEOS_FORMATS = {"scaled_float8", "mxfp8", "nvfp4", "int8", "rotated_int8"}
CASES = {
    "FORGE": ("forge_layers.py", {"flux", "gguf", "float8", "scaled_float8", "patched_in_passing"}),
    "NEO": ("neo_layers.py", {"plain", "patched_in_passing", "float8", "gguf"} | NEOS_FORMATS),
}


@pytest.mark.parametrize("host", CASES)
def test_rows_are_what_merging_gives(host):
    script, cases = CASES[host]
    folder = os.environ.get(f"LORATORIO_{host}_DIR")
    if not folder:
        pytest.skip(f"LORATORIO_{host}_DIR does not name an installed WebUI")
    command = [host_python(Path(folder), host), Path(__file__).with_name(script).resolve()]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    differences = json.loads(done.stdout.splitlines()[-1])
    assert differences.keys() == cases
    assert all(difference < 1e-3 for difference in differences.values()), differences
