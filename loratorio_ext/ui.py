"""The accordion, made from the table of options."""

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr
from modules.ui_common import create_refresh_button
from modules.ui_components import InputAccordion

from loratorio_ext.errors import LoRAtorioError
from loratorio_ext.hosts.webui import list_anew, listed_loras
from loratorio_ext.pool import folders, resolve
from loratorio_ext.sampling_loras import sampling_loras
from loratorio_ext.settings import OPTION, OPTIONS, PRESETS, UNTOUCHED_BY_PRESETS, Claims, Lines, Option, Settings
from loratorio_ext.triggers import trigger_words


def pool_choices() -> list[str]:
    """What the pool's menu offers: folders, then every LoRA by its path below the LoRA folder."""
    try:
        listed = listed_loras()
    except LoRAtorioError:  # the host's Lora extension is off: said when an image is asked for
        return []
    return [*folders(listed), *(lora.path for lora in listed)]


def words_of(pool: Sequence[str]) -> str:
    """The trigger words of the pool's LoRAs, or what is wrong with an entry, as HTML."""
    try:
        members = resolve(pool or (), listed_loras(), 1.0)
    except LoRAtorioError as error:
        return f"<p>{html.escape(error.detail)}</p>"
    words = ((member.lora.name, trigger_words(member.lora.file, member.lora.metadata)) for member in members)
    lines = [f"<b>{html.escape(name)}</b>: {html.escape(text)}" for name, text in words if text]
    return f"<p>Words that these LoRAs were trained on:<br>{'<br>'.join(lines)}</p>" if lines else ""


def proposals(chosen: Sequence[str] | None = None) -> list[str]:
    """The LoRAs that seem to belong into every pass and are not chosen for it, by their paths."""
    try:
        return [lora.path for lora in sampling_loras(listed_loras()) if lora.path not in (chosen or ())]
    except LoRAtorioError:  # as above
        return []


def everywhere_choices() -> list[str]:
    """What the menu of LoRAs in every pass offers: those that seem to belong there, then all as for the pool."""
    return list(dict.fromkeys([*proposals(), *pool_choices()]))


def proposed(chosen: Sequence[str] | None) -> str:
    """What might be chosen, too, as HTML."""
    found = ", ".join(f"<b>{html.escape(path)}</b>" for path in proposals(chosen))
    return f"<p>By name or metadata a way of sampling rather than a concept: {found}</p>" if found else ""


def several_of(choices: list[str], **common: Any) -> gr.components.Component:
    """A searchable menu of which several can be chosen, values that are not in it included."""
    try:
        return gr.Dropdown(choices=choices, multiselect=True, allow_custom_value=True, **common)
    except ValueError:  # gradio 3 refuses to say so, and takes such values all the same
        return gr.Dropdown(choices=choices, multiselect=True, **common)


def component(option: Option, elem_id: str) -> gr.components.Component:
    """The input for one option."""
    common = {"label": option.label, "value": option.default, "info": option.help, "elem_id": elem_id}
    if isinstance(option, Lines):
        return several_of(MENUS[option.name].choices(), **{**common, "value": list(option.default)})
    if isinstance(option, Claims):
        example = '{"knight": {"at": "left", "share": 2}, "city": {"steps": "0-0.5"}}'
        return gr.Textbox(lines=1, max_lines=8, placeholder=example, **{**common, "value": ""})
    if option.kind is bool:
        return gr.Checkbox(**common)
    if option.choices:
        return gr.Radio(choices=list(option.choices), **common)
    if option.name == "temperature":  # six decades: no slider can be set to them
        return gr.Number(minimum=option.low, maximum=option.high, **common)
    return gr.Slider(minimum=option.low, maximum=option.high, step=option.step, **common)


@dataclass(frozen=True)
class Menu:
    """What is particular to a list of LoRAs: what it offers, its line for other entries, and what is said below it of
    those that are chosen, as HTML."""

    choices: Callable[[], list[str]]
    add: str
    example: str
    words: Callable[[Sequence[str] | None], str]


MENUS = {
    "pool": Menu(pool_choices, "Add to the pool", "robot:0.8, or robot*, or styles/*:0.6; then Enter", words_of),
    "everywhere": Menu(everywhere_choices, "Add to every pass", "lcm-lora, or *lightning*; then Enter", proposed),
}


def menu_inputs(option: Option, elem_id: str) -> tuple[gr.components.Component, list[gr.components.Component]]:
    """A menu of LoRAs, and what goes with it: a button that lists the LoRAs anew, a line for entries that the menu does
    not have, and what is to be said of those that are chosen."""
    menu = MENUS[option.name]
    with gr.Row():
        loras = component(option, elem_id)
        button = create_refresh_button(loras, list_anew, lambda: {"choices": menu.choices()}, f"{elem_id}_refresh")
    line = gr.Textbox(label=menu.add, placeholder=menu.example, max_lines=1, elem_id=f"{elem_id}_add")
    words = gr.HTML(menu.words(option.default), elem_id=f"{elem_id}_words")

    def add(entry: str, chosen: list[str] | None) -> list:
        entries = list(dict.fromkeys([*(chosen or []), *([entry.strip()] if entry.strip() else [])]))
        return [gr.update(choices=list(dict.fromkeys([*menu.choices(), *entries])), value=entries), ""]

    line.submit(add, inputs=[line, loras], outputs=[loras, line], show_progress=False)
    loras.change(menu.words, inputs=[loras], outputs=[words], show_progress=False)
    return loras, [button, line, words]


def pasted(option: Option) -> Callable[[Mapping[str, str]], Any]:
    """The reader of an option's value from an image's generation parameters, in the form that its input holds."""
    if not isinstance(option, Claims):
        return option.read

    def text(params: Mapping[str, str]) -> str:
        value = option.read(params)
        return option.write(value) if value else ""

    return text


def build_ui(tab: str) -> tuple[list, list]:
    """The components in the table's order, and the pairs of component and reader for the WebUI's infotext paste.

    The tick box sits on the accordion's header; options that the chosen method ignores are hidden.
    """
    prefix = f"loratorio_{tab}"
    enabled = OPTION["enabled"]
    by_name: dict[str, Any] = {}
    beside: dict[str, list] = {}
    groups: dict[str, list[Option]] = {}
    for option in OPTIONS[1:]:
        groups.setdefault(option.group, []).append(option)

    with InputAccordion(enabled.default, label=enabled.label, elem_id=prefix) as by_name["enabled"]:
        gr.HTML(f"<p>{enabled.help}</p>", elem_id=f"{prefix}_hint", elem_classes=["loratorio-hint"])
        preset = gr.Dropdown(
            choices=list(PRESETS),
            value="default",
            label="Preset",
            info="Fills in the options below. paper: the method in its published form. balanced, fast: less time with "
            "several LoRAs, for some detail.",
            elem_id=f"{prefix}_preset",
        )
        for options in groups.values():
            with gr.Group():
                for option in options:
                    elem_id, beside[option.name] = f"{prefix}_{option.name}", []
                    if isinstance(option, Lines):
                        by_name[option.name], beside[option.name] = menu_inputs(option, elem_id)
                    else:
                        by_name[option.name] = component(option, elem_id)

    method = by_name["method"]
    dependent = [option for option in OPTIONS if option.methods]
    shown = [(option, each) for option in dependent for each in (by_name[option.name], *beside[option.name])]
    filled_in = [option for option in OPTIONS if option.name not in UNTOUCHED_BY_PRESETS]

    def show_used(chosen: str) -> list:
        return [gr.update(visible=option.used_by(chosen)) for option, _ in shown]

    def fill_in(name: str) -> list:
        values = Settings.from_mapping({"preset": name})
        return [gr.update(value=getattr(values, option.name)) for option in filled_in]

    for option in dependent:
        by_name[option.name].visible = option.used_by(OPTION["method"].default)
    outputs = [each for _, each in shown]
    method.change(show_used, inputs=[method], outputs=outputs, show_progress=False)
    preset.input(fill_in, inputs=[preset], outputs=[by_name[option.name] for option in filled_in], show_progress=False)

    infotext_fields = [(by_name[option.name], pasted(option)) for option in OPTIONS]
    return [by_name[option.name] for option in OPTIONS], infotext_fields
