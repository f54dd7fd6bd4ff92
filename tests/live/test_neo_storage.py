"""Forge Neo with its diffusion model in fewer bits, or with most of it elsewhere than where it computes: the images
against brute force, in which no weight is rounded, and, where the host adds LoRAs to numbers, against its own."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from tests.contract.rows import TOLERANCE, Contract, largest, mean
from tests.live.forge import Neo
from tests.live.test_neo_families import ONE, PLAIN, THREE, TWO, family_webui, payload

pytestmark = pytest.mark.live

MEMORY = Path(__file__).parent / "neo_memory_extension"
STORAGE_OPTION = "forge_unet_storage_dtype"


class InBfloat16(Neo):
    """With the diffusion model, and all that is computed with it, in bfloat16 as far as the host will have it."""

    cpu_flags = (*(flag for flag in Neo.cpu_flags if flag not in ("--force-fp32", "--fp32-unet")), "--bf16-unet")


@dataclass(frozen=True)
class Storage:
    """``in_numbers``: whether the host itself adds LoRAs to numbers, and does not round the sum to few bits."""

    in_numbers: bool
    start: dict = field(default_factory=dict)


def fitting(size: str) -> dict:
    """A start after which so many bytes of a model fit where it is computed."""
    return {"extensions": (MEMORY,), "variables": {"LORATORIO_FITTING_BYTES": size}}


STORAGES = {
    "float8": Storage(False, {"options": {STORAGE_OPTION: "float8-e4m3fn"}}),
    "float8, LoRAs on the fly": Storage(True, {"options": {STORAGE_OPTION: "float8-e4m3fn (fp16 LoRA)"}}),
    "scaled float8": Storage(False, {"storage": "float8"}),
    "GGUF": Storage(True, {"storage": "gguf"}),
    "bfloat16": Storage(False, {"kind": InBfloat16}),
    "most of it elsewhere": Storage(True, fitting("1500000")),
    "all of it elsewhere": Storage(True, fitting("1")),
}


@pytest.fixture(scope="module", params=STORAGES)
def storage(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def contract(storage, tmp_path_factory) -> Iterator[Contract]:
    with family_webui("flux", tmp_path_factory.mktemp("flux"), **STORAGES[storage].start) as webui:
        yield Contract(webui, "flux")


@pytest.mark.parametrize("prompt", [ONE, TWO, THREE])
def test_images_are_brute_forces(contract, prompt):
    row = payload({"prompt": prompt})
    composed = contract.composed(**row)
    assert largest(composed.images, contract.brute_force(**row).images) <= TOLERANCE
    assert mean(composed.images, contract.plain(**row).images) > 0.5


def test_one_lora_is_the_hosts_own_image(contract, storage):
    row = payload({"prompt": ONE})
    composed, own = contract.composed({"base_share": 0.0}, **row), contract.plain(**row)
    effect = mean(own.images, contract.plain(**row | {"prompt": PLAIN}).images)
    if STORAGES[storage].in_numbers:
        assert largest(composed.images, own.images) <= TOLERANCE
    assert mean(composed.images, own.images) < effect / 2


def test_a_lora_in_every_pass_is_the_hosts_own_sum(contract, storage):
    """The host loads that one into the model, in its own way for what the model is stored in."""
    row = payload({"prompt": TWO})
    composed = contract.composed({"base_share": 0.0}, **row | {"prompt": f"{PLAIN} <lora:a:0.8:base=1> <lora:b:1>"})
    own = contract.plain(**row)
    effect = mean(own.images, contract.plain(**row | {"prompt": PLAIN}).images)
    if STORAGES[storage].in_numbers:
        assert largest(composed.images, own.images) <= TOLERANCE
    assert mean(composed.images, own.images) < effect / 2


def test_the_host_comes_back_as_it_was(contract):
    rows = payload({"prompt": PLAIN}), payload({"prompt": TWO})
    before = [contract.plain(**row) for row in rows]
    contract.composed(**rows[1])
    contract.composed(prompt=f"{PLAIN} <lora:a:0.8:base=1> <lora:b:1>")
    for row, earlier in zip(rows, before):
        assert np.array_equal(earlier.images[0], contract.plain(**row).images[0])
