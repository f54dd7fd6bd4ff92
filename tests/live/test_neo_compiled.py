"""Forge Neo's own torch.compile: where a LoRA acts its model runs as it is written, and is as compiled afterwards."""

from collections.abc import Iterator

import numpy as np
import pytest

from tests.contract.rows import TOLERANCE, Contract, largest, mean
from tests.live.test_neo_families import ONE, PLAIN, TWO, family_webui, payload

pytestmark = pytest.mark.live

COMPILED = "Model Compiled"
"""What the host says in its log."""


@pytest.fixture(scope="module")
def contract(tmp_path_factory) -> Iterator[Contract]:
    with family_webui("flux", tmp_path_factory.mktemp("flux")) as webui:
        yield Contract(webui, "flux")


def generate(contract, preset: str, options: dict | None = None, **row):
    """``preset``: of the host's compilation, whose title differs between distributions."""
    titles = [title for title in contract.webui.get("/sdapi/v1/scripts")["txt2img"] if title.startswith("torch")]
    if not titles:
        pytest.skip("the host has no compilation: is triton installed?")
    scripts = {titles[0]: {"args": [preset]}}
    if options is not None:
        scripts["LoRAtorio"] = {"args": [{"enabled": True, **options}]}
    return contract.generate(payload(row), scripts)


def test_compiled_models(contract):
    rows = {"prompt": PLAIN}, {"prompt": ONE}, {"prompt": TWO}
    plain, one, two = [generate(contract, "Disable", **row) for row in rows]
    truth = contract.brute_force(**payload(rows[2]))
    compiled = [generate(contract, "dynamic", **row) for row in rows]
    assert COMPILED in contract.webui.log()
    for before, after in zip((plain, one, two), compiled):
        assert largest(before.images, after.images) <= TOLERANCE
    exact = generate(contract, "dynamic", {"base_share": 0.0}, **rows[1])
    assert largest(exact.images, one.images) <= TOLERANCE
    composed = generate(contract, "dynamic", {}, **rows[2])
    assert largest(composed.images, truth.images) <= TOLERANCE
    assert mean(composed.images, two.images) > 0.5
    for row, before in zip(rows, compiled):
        assert np.array_equal(before.images[0], generate(contract, "dynamic", **row).images[0])
