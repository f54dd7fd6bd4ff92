"""The contract suite's hosts: a double everywhere, and a real WebUI where one is installed."""

from collections import defaultdict
from itertools import chain

import pytest

from tests.contract.rows import Contract

LARGEST = "largest difference"
"""The property of a test's report, which comes from whatever process ran it, that holds the host and the difference."""

LIVE = [pytest.param(host, marks=pytest.mark.live) for host in ("a1111", "forge", "reforge", "neo")]


@pytest.fixture(scope="module", params=["double", *LIVE])
def webui(request, tmp_path_factory):
    """A host with the extension and the brute-force reference in it, and LoRA files of every kind.

    For one module of tests: while a double runs, the interpreter's modules of these names are the double's.
    """
    if request.param == "double":
        from tests.contract.double import Double

        with Double(tmp_path_factory.mktemp("double")) as double:
            yield double
    elif request.param == "a1111":
        from tests.live.conftest import tiny_webui

        with tiny_webui("sd1", tmp_path_factory) as real:
            yield real
    else:
        from tests.live.forge import Forge, Neo, ReForge, small_webui

        kinds = {"forge": Forge, "reforge": ReForge, "neo": Neo}
        with small_webui(kinds[request.param], tmp_path_factory) as real:
            yield real


@pytest.fixture
def contract(webui, request, record_property) -> Contract:
    """The host under test, with what the contract asks of it."""
    host = request.node.callspec.params["webui"]
    yield (contract := Contract(webui, host))
    if contract.largest_difference is not None:
        record_property(LARGEST, (host, request.node.name, contract.largest_difference))


def pytest_terminal_summary(terminalreporter):
    """For every host and row the largest pixel difference to the brute-force reference, in grey levels of 255."""
    found = defaultdict(dict)
    for report in chain.from_iterable(terminalreporter.stats.values()):
        for name, value in getattr(report, "user_properties", ()):
            if name == LARGEST:
                host, row, difference = value
                found[host][row] = difference
    for host, rows in found.items():
        terminalreporter.section(f"largest difference to brute force on {host}")
        for name, difference in rows.items():
            terminalreporter.line(f"{difference:4d}  {name}")
