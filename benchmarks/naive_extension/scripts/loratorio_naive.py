"""A WebUI script for `benchmarks.webui`: what a port of the method does that lets the host load each LoRA in turn.

In every step the host's own ``load_networks`` is called for the bare model and for each LoRA, and the UNet is called
once for each, with all rows in a batch. Its one argument switches it on. The predictions are averaged: what is timed is
how they come about.
"""

import sys
from unittest import mock

import torch
from modules import devices, extra_networks, script_callbacks, scripts


class Run:
    """One generation's LoRAs, and the inputs of the step under way."""

    loras = ()
    params = None


run = Run()


def load(loras):
    networks = sys.modules[type(extra_networks.extra_network_registry["lora"]).__module__].networks
    names, te, unet, dyn = zip(*loras) if loras else ((), (), (), ())
    with mock.patch.object(devices, "torch_gc"):  # the host collects garbage there, which would count against it
        networks.load_networks(list(names), list(te), list(unet), list(dyn))


def before_unet(params):
    run.params = params
    if run.loras:
        load([])


def after_unet(result):
    if not run.loras:
        return
    params = run.params
    text = torch.cat([params.text_cond, params.text_uncond])
    condition = {"c_crossattn": [text], "c_concat": [params.image_cond]}
    rows = []
    for lora in run.loras:
        load([lora])
        rows.append(result.inner_model(params.x, params.sigma, cond=condition))
    result.x.copy_(torch.stack(rows).mean(dim=0))


class NaiveScript(scripts.Script):
    def title(self):
        return "LoRAtorio naive"

    def show(self, is_img2img):
        return scripts.AlwaysVisible

    def ui(self, is_img2img):
        import gradio

        return [gradio.Checkbox(value=False, visible=False)]

    def process_before_every_sampling(self, p, on, **kwargs):
        networks = sys.modules[type(extra_networks.extra_network_registry["lora"]).__module__].networks
        loaded = networks.loaded_networks if on else []
        run.loras = [(each.name, each.te_multiplier, each.unet_multiplier, each.dyn_dim) for each in loaded]

    def postprocess(self, p, processed, on):
        if run.loras:
            load(run.loras)
        run.loras = ()


script_callbacks.on_cfg_denoiser(before_unet)
script_callbacks.on_cfg_denoised(after_unet)
