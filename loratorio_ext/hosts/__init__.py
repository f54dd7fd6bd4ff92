"""One file a host: which LoRAs are active, their conditionings, how to call the model, where the result goes."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any


def begin(p: Any, args: Sequence[Any]) -> None:
    """Take up a generation of the WebUI that runs here (see `Generation.begin`)."""
    if find_spec("modules_forge") is not None:
        from loratorio_ext.hosts import forge as host
    else:
        from loratorio_ext.hosts import a1111 as host
    host.begin(p, args)
