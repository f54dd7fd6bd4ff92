"""Forge Neo's own torch.compile: where a LoRA acts its model runs as it is written, and is as compiled afterwards."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.contract.rows import TOLERANCE, Contract, largest, mean
from tests.live.test_neo_families import ONE, PLAIN, TWO, family_webui, payload
from tests.live.webui import RequestError

pytestmark = pytest.mark.live

COMPILED = "Model Compiled"
"""What the host says in its log."""


@pytest.fixture(scope="module")
def contract(tmp_path_factory) -> Iterator[Contract]:
    neighbour = tmp_path_factory.mktemp("neighbours") / "asks-the-model"
    shutil.copytree(Path(__file__).parent / "neo_company_extension", neighbour)
    with family_webui("flux", tmp_path_factory.mktemp("flux"), extensions=(neighbour,)) as webui:
        yield Contract(webui, "flux")


def generate(contract, preset: str, options: dict | None = None, others: dict | None = None, **row):
    """``preset``: of the host's compilation, whose title differs between distributions."""
    titles = [title for title in contract.webui.get("/sdapi/v1/scripts")["txt2img"] if title.startswith("torch")]
    if not titles:
        pytest.skip("the host has no compilation: is triton installed?")
    scripts = {titles[0]: {"args": [preset]}, **(others or {})}
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


def test_who_evaluates_a_compiled_model_by_itself_is_refused(contract):
    """Though the code that was compiled for the plain image looks for no hook."""
    asking = {"Asks the model": {"args": [True]}}
    plain, beside = [generate(contract, "dynamic", others=others, prompt=TWO) for others in (None, asking)]
    assert mean(plain.images, beside.images) > 0.1
    with pytest.raises(RequestError) as caught:
        generate(contract, "dynamic", {}, asking, prompt=TWO)
    assert caught.value.status == 422
    assert "asks-the-model evaluates the model by itself" in caught.value.body
    for before, others in ((plain, None), (beside, asking)):
        assert np.array_equal(before.images[0], generate(contract, "dynamic", others=others, prompt=TWO).images[0])
