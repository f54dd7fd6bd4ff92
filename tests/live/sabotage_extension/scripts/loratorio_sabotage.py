"""A WebUI script that watches model calls and makes them fail, for the tests.

Its one argument is a dict, or None to do nothing: ``error`` ("runtime", "memory"; "interrupt" and "skip" are the user's
buttons; None: only watch), ``image`` the batch and ``step`` the model call of the sampler at which it happens (None: at
all), ``call`` the UNet call of that step from which on they fail, or in the middle of which a button is pressed (1: the
first; a button is pressed before it when there is none), and ``rows`` the largest number of rows that still goes
through. ``encoding``: the encoding of the prompts in the middle of which a button is pressed (1: the first).

What was seen is in the answer's ``extra_generation_params``: how often the prompts were encoded, and for each UNet call
the image, the step, the rows, and what the host tells of its steps, first to the sampling thread, then to any other, as
to requests that come in meanwhile.
"""

from concurrent.futures import ThreadPoolExecutor

import torch
from modules import prompt_parser, script_callbacks, scripts, shared

ERRORS = {
    "runtime": lambda: RuntimeError("sabotaged"),
    "memory": lambda: torch.cuda.OutOfMemoryError("out of memory: sabotaged"),
}
BUTTONS = {"interrupt": shared.state.interrupt, "skip": shared.state.skip}


class Seen(dict):
    """Data of the answer, and no text: in infotexts, what can be called stands for what it returns."""

    def __call__(self, **_):
        return None


class Sabotage:
    """The plan, what has been seen so far, and what is hooked in."""

    plan = None
    seen = None
    hook = None
    encode = None
    calls = 0


sabotage = Sabotage()


def unhook():
    if sabotage.hook is not None:
        sabotage.hook.remove()
        sabotage.hook = None


def stop_watching_encodings():
    if sabotage.encode is not None:
        prompt_parser.get_multicond_learned_conditioning = sabotage.encode
        sabotage.encode = None


def unet_of(denoiser):
    forge_objects = getattr(denoiser.inner_model.inner_model, "forge_objects", None)
    return shared.sd_model.model if forge_objects is None else forge_objects.unet.model.diffusion_model


def watch_encodings(plan):
    sabotage.encode = encode = prompt_parser.get_multicond_learned_conditioning

    def watched(*args, **kwargs):
        sabotage.seen["encodings"] += 1
        if sabotage.seen["encodings"] == plan.get("encoding"):
            BUTTONS[plan["error"]]()
        return encode(*args, **kwargs)

    prompt_parser.get_multicond_learned_conditioning = watched


def steps_told():
    return [shared.state.sampling_step, shared.state.sampling_steps]


def before_unet(params):
    unhook()
    plan, denoiser = sabotage.plan, params.denoiser
    if plan is None:
        return
    here = plan.get("step") in (None, denoiser.step) and plan.get("image") in (None, denoiser.p.iteration)
    here = here and "encoding" not in plan
    error = plan.get("error") if here else None
    if error in BUTTONS and "call" not in plan:
        BUTTONS[error]()
    sabotage.calls = 0

    def watch(module, args):
        rows = len(args[0])
        sabotage.calls += 1
        with ThreadPoolExecutor(1) as other:
            told = {"here": steps_told(), "elsewhere": other.submit(steps_told).result()}
        sabotage.seen["calls"].append(
            {"image": denoiser.p.iteration, "step": denoiser.step, "rows": rows, "told": told}
        )
        if error in BUTTONS and sabotage.calls == plan.get("call"):
            BUTTONS[error]()
        if error in ERRORS and sabotage.calls >= plan.get("call", 1) and rows > plan.get("rows", 0):
            raise ERRORS[error]()

    sabotage.hook = unet_of(denoiser).register_forward_pre_hook(watch)


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
        stop_watching_encodings()
        sabotage.plan = plan
        if plan is not None:
            p.extra_generation_params["LoRAtorio sabotage"] = sabotage.seen = Seen(calls=[], encodings=0)
            watch_encodings(plan)


script_callbacks.on_cfg_denoiser(before_unet)
