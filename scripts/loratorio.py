"""The WebUI's script: values from the UI or the API go to the host's adapter. Nothing else happens here."""

from modules import scripts

from loratorio_ext import hosts
from loratorio_ext.generation import Generation
from loratorio_ext.ui import build_ui


class LoRAtorioScript(scripts.Script):
    def title(self):
        return "LoRAtorio"

    def show(self, is_img2img):
        return scripts.AlwaysVisible

    def ui(self, is_img2img):
        components, self.infotext_fields = build_ui("img2img" if is_img2img else "txt2img")
        return components

    def process(self, p, *args):
        hosts.begin(p, args)

    def process_before_every_sampling(self, p, *args, **kwargs):
        generation = Generation.of(p)
        if generation is not None:
            generation.start_sampling()

    def postprocess(self, p, processed, *args):
        Generation.end(p)
