"""A WebUI script for the neighbours' tests: counts model calls, and makes ControlNet build networks of the tiny size.

Its one argument is true to write ``Model calls`` into the infotext: how often the UNet was called, and with how many
rows in all.
"""

import sys

from modules import script_callbacks, scripts, shared


def narrow_controlnet(model):
    """ControlNet builds every network of SD 1.x in one size, its default configuration's: that of the model, here."""
    guess = sys.modules.get("scripts.controlnet_model_guess")
    unet = getattr(getattr(model, "model", None), "diffusion_model", None)
    if guess is None or unet is None:
        return
    size = {name: getattr(unet, name) for name in ("model_channels", "channel_mult", "num_heads")}
    guess.controlnet_default_config.update(size)


class Counter:
    """What of the counting is hooked in."""

    hook = None
    calls = rows = 0


counter = Counter()


def count(module, args):
    counter.calls += 1
    counter.rows += len(args[0])


def stop_counting():
    if counter.hook is not None:
        counter.hook.remove()
        counter.hook = None


class KitScript(scripts.Script):
    def title(self):
        return "LoRAtorio kit"

    def show(self, is_img2img):
        return scripts.AlwaysVisible

    def ui(self, is_img2img):
        import gradio

        return [gradio.JSON(value=None, visible=False)]

    def process(self, p, counting):
        stop_counting()
        if counting:
            counter.calls = counter.rows = 0
            counter.hook = shared.sd_model.model.register_forward_pre_hook(count)

    def postprocess_batch(self, p, counting, **kwargs):
        if counting:
            p.extra_generation_params["Model calls"] = f"{counter.calls} of {counter.rows} rows"

    def postprocess(self, p, processed, counting):
        stop_counting()


script_callbacks.on_model_loaded(narrow_controlnet)
