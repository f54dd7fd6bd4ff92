"""One file a host: which LoRAs are active, their conditionings, how to call the model, where the result goes."""

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType


def webui_adapter() -> ModuleType:
    """The adapter for the WebUI that runs here; it is a `loratorio_ext.generation.Host`."""
    name = "forge" if find_spec("modules_forge") is not None else "a1111"
    return import_module(f"loratorio_ext.hosts.{name}")
