"""A script for Forge Neo that evaluates the model by itself after each step, and paints with what it says; for the
tests. Its one argument says whether. Installed from a copy elsewhere, it is none of the extension's own code."""

from modules import scripts


def paint(args):
    """Called after guidance: a little of what the model makes of the prompt for another image."""
    conditions = {name: each.cond for name, each in args["cond"][0]["model_conds"].items()}
    asked = args["model"].apply_model(args["input"].flip(-1), args["sigma"], transformer_options={}, **conditions)
    return 0.9 * args["denoised"] + 0.1 * asked


class AsksTheModel(scripts.Script):
    def title(self):
        return "Asks the model"

    def show(self, is_img2img):
        return scripts.AlwaysVisible

    def ui(self, is_img2img):
        import gradio

        return [gradio.JSON(value=None, visible=False)]

    def process_before_every_sampling(self, p, asks, **kwargs):
        if asks:
            unet = p.sd_model.forge_objects.unet.clone()
            unet.set_model_sampler_post_cfg_function(paint)
            p.sd_model.forge_objects.unet = unet
