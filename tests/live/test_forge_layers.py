"""Side branches in Forge's own layers, where no checkpoint is small enough for a server: Flux, quantised weights."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.live.webui import host_python

pytestmark = pytest.mark.live


def test_rows_are_what_merging_gives():
    host = os.environ.get("LORATORIO_FORGE_DIR")
    if not host:
        pytest.skip("LORATORIO_FORGE_DIR does not name an installed Forge")
    command = [host_python(Path(host), "FORGE"), Path(__file__).with_name("forge_layers.py").resolve()]
    done = subprocess.run(command, cwd=host, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    differences = json.loads(done.stdout.splitlines()[-1])
    assert differences.keys() == {"flux", "gguf", "float8"}
    assert all(difference < 1e-3 for difference in differences.values()), differences
