"""Buttons that the host's interface has in many places."""

from collections.abc import Callable
from typing import Any

import gradio as gr


def create_refresh_button(component: gr.Component, refresh: Callable, refreshed: Callable, elem_id: str) -> Any:
    """A button that calls ``refresh`` and gives the component the properties that ``refreshed`` returns."""

    def click() -> dict[str, Any]:
        refresh()
        component.properties.update(refreshed())
        return gr.update(**refreshed())

    button = gr.Component(elem_id=elem_id)
    button.listeners["click"] = click
    return button
