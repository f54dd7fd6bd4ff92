"""A WebUI script that makes model calls fail, for the tests.

Its one argument is a dict, or None to do nothing: ``error`` ("runtime", "memory", "interrupt"), ``step`` the model call
of the sampler at which it happens (None: at all), ``call`` the UNet call of that step from which on they fail (1: the
first), and ``rows`` the largest number of rows that still goes through.
"""

import torch
from modules import script_callbacks, scripts, shared

ERRORS = {
    "runtime": lambda: RuntimeError("sabotaged"),
    "memory": lambda: torch.cuda.OutOfMemoryError("out of memory: sabotaged"),
}


class Sabotage:
    """The plan, and what of it is hooked in."""

    plan = None
    hook = None
    calls = 0


sabotage = Sabotage()


def unhook():
    if sabotage.hook is not None:
        sabotage.hook.remove()
        sabotage.hook = None


def before_unet(params):
    unhook()
    plan = sabotage.plan
    if plan is None or plan.get("step") not in (None, params.denoiser.step):
        return
    if plan["error"] == "interrupt":
        shared.state.interrupt()
        return
    sabotage.calls = 0

    def fail(module, args):
        sabotage.calls += 1
        if sabotage.calls >= plan.get("call", 1) and len(args[0]) > plan.get("rows", 0):
            raise ERRORS[plan["error"]]()

    sabotage.hook = shared.sd_model.model.register_forward_pre_hook(fail)


class SabotageScript(scripts.Script):
    def title(self):
        return "LoRAtorio sabotage"

    def show(self, is_img2img):
        return scripts.AlwaysVisible

    def ui(self, is_img2img):
        import gradio

        return [gradio.JSON(value=None, visible=False)]

    def process(self, p, plan):
        unhook()
        sabotage.plan = plan


script_callbacks.on_cfg_denoiser(before_unet)
