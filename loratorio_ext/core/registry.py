"""From settings to a method."""

from dataclasses import fields
from typing import Any

from loratorio_ext.core.methods import Composite, LoRAtorio, Merge, Method, Switch
from loratorio_ext.core.momentum import Momentum
from loratorio_ext.core.reselection import Reselection
from loratorio_ext.core.reuse import InTurn

METHODS: dict[str, type] = {"loratorio": LoRAtorio, "composite": Composite, "switch": Switch, "merge": Merge}
"""The names by which settings choose a method, in the order they are offered."""


def method_from(settings: Any) -> Method:
    """The method that ``settings.method`` names, for one sampling pass; its fields are options of the same names."""
    kind = METHODS[settings.method]
    method = kind(**{field.name: getattr(settings, field.name) for field in fields(kind)})
    if kind is LoRAtorio and settings.momentum:
        method = Momentum(method, settings.momentum)
    if kind is LoRAtorio and settings.refresh:
        return InTurn(method, settings.refresh, settings.warmup)
    if kind is LoRAtorio and settings.reselect_every > 1:
        return Reselection(method, settings.reselect_every)
    return method
