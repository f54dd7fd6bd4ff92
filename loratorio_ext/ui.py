"""The accordion, made from the table of options: first what is composed and what it costs, the rest behind Advanced."""

import html
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import gradio as gr
from modules import sd_models, shared
from modules.ui_common import create_refresh_button
from modules.ui_components import InputAccordion

from loratorio_ext.errors import LoRAtorioError
from loratorio_ext.families import family_of_model, made_for
from loratorio_ext.hosts.webui import list_anew, listed_loras
from loratorio_ext.pool import Listed, folders, resolve
from loratorio_ext.preview import (
    BY_PRESETS,
    CUSTOM,
    Seen,
    cost_in_words,
    preset_in_words,
    preset_of,
    preset_values,
    seen,
)
from loratorio_ext.sampling_loras import sampling_loras
from loratorio_ext.settings import OPTION, OPTIONS, PRESETS, Claims, Lines, Option, Settings
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
    common = {"label": option.label, "value": option.default, "info": option.hint, "elem_id": elem_id}
    if isinstance(option, Lines):
        return several_of(MENUS[option.name].choices(), **{**common, "value": list(option.default)})
    if isinstance(option, Claims):
        example = '{"knight": {"at": "left", "share": 2}, "city": {"steps": "0-0.5"}}'
        return gr.Textbox(lines=1, max_lines=8, placeholder=example, **{**common, "value": ""})
    if option.kind is bool:
        return gr.Checkbox(**common, elem_classes=["loratorio-tick"])
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


# --- the first screen -------------------------------------------------------------------------------------------------

MOST_SHOWN = 12
"""So many LoRAs are shown by name."""
PICTURES = [middle + ending for ending in (".png", ".jpg", ".jpeg", ".webp", ".gif") for middle in ("", ".preview")]
"""How the host's pictures of a LoRA end."""
COVERS = "ssmd_cover_images"
"""A file's metadata that hold its pictures."""


def loaded_family() -> str | None:
    """The family of the model that is loaded now; nothing is loaded to find out."""
    return family_of_model(getattr(sd_models.model_data, "sd_model", None))


def thumbnail(lora: Listed) -> str:
    """The host's own picture of a LoRA, beside the file or in it, as HTML; nothing where it has none."""
    stem = os.path.splitext(lora.file)[0]
    found = next((stem + ending for ending in PICTURES if os.path.isfile(stem + ending)), None)
    if found is not None:
        address = f"thumb?filename={quote(found.replace(os.sep, '/'))}&mtime={os.path.getmtime(found)}"
    elif COVERS in lora.metadata:
        address = f"cover-images?page=lora&item={quote(lora.name)}"
    else:
        return ""
    return f'<img src="./sd_extra_networks/{html.escape(address)}" alt="">'


def remarks(lora: Seen, family: str | None) -> list[str]:
    """What is to be said of a LoRA beside its name and weight, as HTML."""
    said = []
    if lora.lora is None:
        said.append('<b class="loratorio-bad">not found</b>')
    elif (made := made_for(lora.lora.metadata, lora.lora.file)) and family and family not in made.families:
        said.append(f'<b class="loratorio-bad">made for {made.text}, not {family}</b>')
    claim = lora.claim
    said += ["from the pool"] if lora.pooled else []
    said += ["from a style"] if lora.styled else []
    said += ["in every pass"] if claim.base else []
    said += ["in its place"] if claim.placed else []
    said += [f"share {claim.share:g}"] if claim.share != 1 else []
    said += ["in some steps"] if claim.steps != (0.0, 1.0) else []
    return said


def loras_as_html(loras: Sequence[Seen], family: str | None) -> str:
    items = []
    for lora in loras[:MOST_SHOWN]:
        picture = thumbnail(lora.lora) if lora.lora else ""
        said = ", ".join([html.escape(lora.weights), *remarks(lora, family)])
        items.append(f"<li>{picture}<b>{html.escape(lora.name)}</b> {said}</li>")
    more = len(loras) - len(items)
    items += [f"<li>and {more} more</li>"] if more > 0 else []
    return f"<ul>{''.join(items)}</ul>" if items else ""


def look(typed: str, styles: Sequence[str] | None, preset: str, *args: Any) -> list:
    """The preset that the values make, what it sets, and what will be composed of the prompt with its styles at which
    cost or refused with which words, as HTML."""
    try:
        settings = Settings.from_args(args)
    except LoRAtorioError as error:
        return [gr.update(value=CUSTOM), "", f'<p class="loratorio-bad">{html.escape(error.detail)}</p>']
    preset = preset_of(settings, preset)
    try:
        prompt = shared.prompt_styles.apply_styles_to_prompt(typed, styles or [])
        loras = seen(prompt, settings, listed_loras(), typed)
        below = loras_as_html(loras, loaded_family()) + f"<p>{html.escape(cost_in_words(settings, loras))}</p>"
    except LoRAtorioError as error:
        below = f'<p class="loratorio-bad">{html.escape(error.detail)}</p>'
    return [gr.update(value=preset), f"<p>{html.escape(preset_in_words(settings))}</p>", below]


# --- all of it --------------------------------------------------------------------------------------------------------


def helps(prefix: str) -> str:
    """Every option's whole help by its input's id, for the browser to show on hover."""
    texts = {f"{prefix}_{option.name}": option.help for option in OPTIONS[1:]}
    return f'<div class="loratorio-helps" hidden data-helps="{html.escape(json.dumps(texts))}"></div>'


def rows_of(options: Sequence[Option]) -> list[list[Option]]:
    """Two options beside each other; a list of LoRAs or a text needs the width for itself."""

    def is_wide(option: Option) -> bool:
        return isinstance(option, (Lines, Claims)) or len(option.choices) > 2

    rows: list[list[Option]] = []
    for option in options:
        alone = is_wide(option) or not rows or len(rows[-1]) == 2 or is_wide(rows[-1][0])
        rows.append([option]) if alone else rows[-1].append(option)
    return rows


def build_ui(tab: str, prompt: Any = None, styles: Any = None) -> tuple[list, list]:
    """The components in the table's order, and the pairs of component and reader for the WebUI's infotext paste.

    The tick box sits on the accordion's header; options that the chosen method ignores are hidden. ``prompt``,
    ``styles``: the tab's own inputs, where there is a browser to see what is said of their LoRAs.
    """
    prefix = f"loratorio_{tab}"
    enabled = OPTION["enabled"]
    by_name: dict[str, Any] = {}
    beside: dict[str, list] = {}
    groups: dict[str, list[Option]] = {}
    for option in OPTIONS[1:]:
        groups.setdefault(option.group, []).append(option)

    with InputAccordion(enabled.default, label=enabled.label, elem_id=prefix) as by_name["enabled"]:
        with gr.Row():
            preset = gr.Dropdown(
                choices=[*PRESETS, CUSTOM],
                value="default",
                label="Preset",
                info="balanced and fast save time and lose some detail; paper is as published.",
                elem_id=f"{prefix}_preset",
            )
            for option in groups.pop(""):
                by_name[option.name], beside[option.name] = component(option, f"{prefix}_{option.name}"), []
        sets = gr.HTML("", elem_id=f"{prefix}_sets", elem_classes=["loratorio-says"])
        loras = gr.HTML("", elem_id=f"{prefix}_found", elem_classes=["loratorio-says", "loratorio-live"])
        again = gr.Button("Look again", elem_id=f"{prefix}_look", elem_classes=["loratorio-hidden"])
        with gr.Accordion("Advanced", open=False, elem_id=f"{prefix}_advanced"):
            gr.HTML(helps(prefix))
            for group, options in groups.items():
                with gr.Group(elem_classes=["loratorio-group"]):
                    if group != options[0].label:
                        gr.HTML(f"<h4>{html.escape(group)}</h4>", elem_classes=["loratorio-heading"])
                    for row in rows_of(options):
                        if isinstance(row[0], Lines):
                            (option,) = row
                            elem_id = f"{prefix}_{option.name}"
                            by_name[option.name], beside[option.name] = menu_inputs(option, elem_id)
                            continue
                        with gr.Row():
                            for option in row:
                                by_name[option.name] = component(option, f"{prefix}_{option.name}")
                                beside[option.name] = []

    method = by_name["method"]
    dependent = [option for option in OPTIONS if option.methods]
    shown = [(option, each) for option in dependent for each in (by_name[option.name], *beside[option.name])]

    def show_used(chosen: str) -> list:
        return [gr.update(visible=option.used_by(chosen)) for option, _ in shown]

    def fill_in(name: str) -> list:
        values = {} if name == CUSTOM else preset_values(name)
        return [gr.update(value=values[option.name]) if values else gr.update() for option in BY_PRESETS]

    for option in dependent:
        by_name[option.name].visible = option.used_by(OPTION["method"].default)
    outputs = [each for _, each in shown]
    method.change(show_used, inputs=[method], outputs=outputs, show_progress=False)
    preset.input(fill_in, inputs=[preset], outputs=[by_name[option.name] for option in BY_PRESETS], show_progress=False)
    components = [by_name[option.name] for option in OPTIONS]
    if prompt is not None and styles is not None:
        again.click(
            look,
            inputs=[prompt, styles, preset, *components],
            outputs=[preset, sets, loras],
            show_progress=False,
            queue=False,
        )

    infotext_fields = [(by_name[option.name], pasted(option)) for option in OPTIONS]
    return components, infotext_fields
