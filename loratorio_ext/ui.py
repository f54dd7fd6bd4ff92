"""The accordion, made from the table of options."""

from typing import Any

import gradio as gr
from modules.ui_components import InputAccordion

from loratorio_ext.settings import OPTION, OPTIONS, PRESETS, Option, Settings


def component(option: Option, elem_id: str) -> gr.components.Component:
    """The input for one option."""
    common = {"label": option.label, "value": option.default, "info": option.help, "elem_id": elem_id}
    if option.choices:
        return gr.Radio(choices=list(option.choices), **common)
    if option.name == "temperature":  # six decades: no slider can be set to them
        return gr.Number(minimum=option.low, maximum=option.high, **common)
    return gr.Slider(minimum=option.low, maximum=option.high, step=option.step, **common)


def build_ui(tab: str) -> tuple[list, list]:
    """The components in the table's order, and the pairs of component and reader for the WebUI's infotext paste.

    The tick box sits on the accordion's header; options that the chosen method ignores are hidden.
    """
    prefix = f"loratorio_{tab}"
    enabled = OPTION["enabled"]
    by_name: dict[str, Any] = {}
    groups: dict[str, list[Option]] = {}
    for option in OPTIONS[1:]:
        groups.setdefault(option.group, []).append(option)

    with InputAccordion(enabled.default, label=enabled.label, elem_id=prefix) as by_name["enabled"]:
        gr.HTML(f"<p>{enabled.help}</p>", elem_id=f"{prefix}_hint", elem_classes=["loratorio-hint"])
        preset = gr.Dropdown(
            choices=list(PRESETS),
            value="default",
            label="Preset",
            info="Fills in the options below. paper: the method in its published form.",
            elem_id=f"{prefix}_preset",
        )
        for options in groups.values():
            with gr.Group():
                for option in options:
                    by_name[option.name] = component(option, f"{prefix}_{option.name}")

    method = by_name["method"]
    dependent = [option for option in OPTIONS if option.methods]

    def show_used(chosen: str) -> list:
        return [gr.update(visible=option.used_by(chosen)) for option in dependent]

    def fill_in(name: str) -> list:
        values = Settings.from_mapping({"preset": name})
        return [gr.update(value=getattr(values, option.name)) for option in OPTIONS[1:]]

    for option in dependent:
        by_name[option.name].visible = option.used_by(OPTION["method"].default)
    outputs = [by_name[option.name] for option in dependent]
    method.change(show_used, inputs=[method], outputs=outputs, show_progress=False)
    preset.input(
        fill_in, inputs=[preset], outputs=[by_name[option.name] for option in OPTIONS[1:]], show_progress=False
    )

    infotext_fields = [(by_name[option.name], option.read) for option in OPTIONS]
    return [by_name[option.name] for option in OPTIONS], infotext_fields
