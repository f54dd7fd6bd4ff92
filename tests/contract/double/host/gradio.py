"""Components that record what they were made with, and nothing else."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any


class Component:
    """An input with its label and its initial value; ``listeners`` are the functions bound to its events."""

    def __init__(self, value: Any = None, label: str | None = None, visible: bool = True, **properties):
        self.value, self.label, self.visible = value, label, visible
        self.properties = properties
        self.listeners: dict[str, Callable] = {}

    def change(self, fn: Callable, inputs=None, outputs=None, **options) -> None:
        self.listeners["change"] = fn

    def submit(self, fn: Callable, inputs=None, outputs=None, **options) -> None:
        self.listeners["submit"] = fn

    def input(self, fn: Callable, inputs=None, outputs=None, **options) -> None:
        self.listeners["input"] = fn


class Checkbox(Component): ...


class Dropdown(Component):
    """In gradio 3.41, one of several choices cannot be the user's own."""

    def __init__(self, *args, multiselect: bool = False, allow_custom_value: bool = False, **properties):
        if multiselect and allow_custom_value:
            raise ValueError("Custom values are not supported when `multiselect` is True.")
        super().__init__(*args, **properties)


class HTML(Component): ...


class JSON(Component): ...


class Number(Component): ...


class Radio(Component): ...


class Slider(Component): ...


class Textbox(Component): ...


class Button(Component):
    def click(self, fn: Callable, inputs=None, outputs=None, **options) -> None:
        self.listeners["click"] = fn


class Group:
    def __init__(self, label: str | None = None, **properties):
        self.label = label

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass


class Row(Group): ...


class Accordion(Group): ...


def update(**properties) -> dict[str, Any]:
    """What an event's function returns to change a component."""
    return {"__type__": "generic_update", **properties}


components = SimpleNamespace(Component=Component)
