"""The WebUI's script: values from the UI or the API go to the host's adapter. Nothing else happens here."""

from modules import script_callbacks, scripts

from loratorio_ext.generation import Generation
from loratorio_ext.hosts import webui_adapter
from loratorio_ext.hosts.limits import add_settings, log_steps
from loratorio_ext.hosts.pictures import show
from loratorio_ext.hosts.webui import show_warnings
from loratorio_ext.ui import build_ui
from loratorio_ext.xyz import add_axes

host = webui_adapter()  # now, not at the first image: a host reports a script that fails to load
show_warnings()


class LoRAtorioScript(scripts.Script):
    prompt = styles = None
    """The tab's inputs for them, where there is a UI."""

    @property
    def tab(self):
        return "img2img" if self.is_img2img else "txt2img"

    def title(self):
        return "LoRAtorio"

    def show(self, is_img2img):
        return scripts.AlwaysVisible

    def after_component(self, component, **kwargs):
        if kwargs.get("elem_id") == f"{self.tab}_prompt":
            self.prompt = component
        elif kwargs.get("elem_id") == f"{self.tab}_styles":
            self.styles = component

    def ui(self, is_img2img):
        components, self.infotext_fields = build_ui(self.tab, self.prompt, self.styles)
        return components

    def before_process(self, p, *args):
        Generation.begin(p, args, host, log_steps())

    def process_before_every_sampling(self, p, *args, **kwargs):
        generation = Generation.of(p)
        if generation is not None:
            generation.start_sampling()

    def postprocess_image_after_composite(self, p, pp, *args):
        generation = Generation.of(p)
        if generation is not None:
            generation.keep_image(pp.image)

    def postprocess(self, p, processed, *args):
        generation = Generation.finish(p)
        if generation is not None and processed.images:  # none after an error
            print(generation.summary)
            show(generation, processed)


script_callbacks.on_ui_settings(add_settings)
# The host's own scripts are loaded before those of extensions; were it otherwise, they would be here before the UI is.
add_axes(scripts.scripts_data)
script_callbacks.on_before_ui(lambda: add_axes(scripts.scripts_data))
