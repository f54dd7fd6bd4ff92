"""A script for Forge and its relatives that composes by brute force, for the tests: every row of the batch is a model
call of its own, made with each LoRA's weights in turn, which the host's own arithmetic has merged into the model; the
mathematics is the oracle's.

Its one argument is a dict of all of LoRAtorio's options, or None to do nothing. Beside them, ``in_every_pass`` may name
LoRAs of the prompt that are loaded in every pass, and to which what nobody is clearly at home in is left; but if some
of the others are named in ``keeping``, to these.
"""

import ast
import fnmatch
import importlib
import importlib.util
import sys
import uuid
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from modules import extra_networks, prompt_parser, scripts, sd_samplers, shared

TESTS = Path(__file__).resolve().parents[3]
spec = importlib.util.spec_from_file_location("loratorio_oracle", TESTS / "oracle.py")
oracle = importlib.util.module_from_spec(spec)
spec.loader.exec_module(oracle)

BACKEND = importlib.util.find_spec("backend") is not None
"""Forge and Neo have it; reForge has ldm_patched."""
FORGE = BACKEND and hasattr(importlib.import_module("backend.patcher.base").ModelPatcher, "refresh_loras")
"""Forge keeps patches by file; reForge and Neo keep them by parameter."""


def host_networks():
    return sys.modules[type(extra_networks.extra_network_registry["lora"]).__module__].networks


def pool(options, active):
    """The pool's LoRAs that are not active, as `active_loras` has them. Entries are ``pattern``, ``pattern:weight``."""
    found = {}
    available = host_networks().available_networks
    for entry in options["pool"]:
        pattern, _, weight = entry.partition(":")
        for name in sorted(available):
            file = available[name].filename
            if fnmatch.fnmatchcase(name, pattern) and file not in active:
                text, *unet = [float(each) for each in weight.split(":")] if weight else [options["pool_weight"]]
                found[file] = [(unet[0] if unet else text, text)]
    return found


def active_loras(model):
    """{file: [(strength of the UNet's patches, of the text encoders'), ...]} of the prompt, as often as it is named."""
    found = {}
    for file, *numbers in ast.literal_eval(model.current_lora_hash):
        found.setdefault(file, []).append(tuple(numbers[:2]))
    return found


def load(model, loras):
    """Patchers of the UNet and the text encoders that hold these LoRAs (see `active_loras`), and nothing else."""
    networks = host_networks()
    unet, clip = model.forge_objects_original.unet, model.forge_objects_original.clip
    for file, strengths in loras.items():
        for each in strengths:
            unet, clip = networks.load_lora_for_models(
                unet, clip, networks.load_lora_state_dict(file), *each, filename=file
            )
    return unet, clip


def patches_of(patcher):
    """{parameter: [patch, ...]}"""
    if not FORGE:
        return dict(patcher.patches)
    found = {}
    for by_name in patcher.lora_patches.values():
        for name, patches in by_name.items():
            found[name] = found.get(name, []) + patches
    return found


def without_loras(patcher):
    patcher = patcher.clone()
    if FORGE:
        patcher.lora_patches = {}
    else:
        patcher.patches, patcher.patches_uuid = {}, uuid.uuid4()
    return patcher


def merged(patches, weight, name):
    if BACKEND:
        from backend.patcher.lora import merge_lora_to_weight

        return merge_lora_to_weight(patches, weight.to(torch.float32, copy=True), name, torch.float32)
    from ldm_patched.modules.lora import calculate_weight

    return calculate_weight(patches, weight.to(torch.float32, copy=True), name).to(weight.dtype)


def numbers_of(module, leaf):
    """A parameter's numbers, by the host's own means where it holds them in fewer bits."""
    stored = module._parameters[leaf]
    convert = getattr(module, f"convert_{leaf}", None)
    if convert is not None:
        stored = convert(stored)
    if BACKEND:
        from backend.operations_gguf import dequantize_tensor

        stored = dequantize_tensor(stored)
    return stored


@contextmanager
def weights(model, patches):
    """While entered, the model's own parameters are the merged ones: where it holds them in fewer bits, the sums are
    not rounded to these once more."""
    before = []
    try:
        for name, of_parameter in patches.items():
            path, _, leaf = name.rpartition(".")
            module = model.get_submodule(path)
            before.append((module, leaf, module._parameters[leaf]))
            whole = merged(of_parameter, numbers_of(module, leaf), name)
            module._parameters[leaf] = torch.nn.Parameter(whole, requires_grad=False)
        yield
    finally:
        for module, leaf, own in before:
            module._parameters[leaf] = own


def encode(p, clip):
    """Schedules of the prompts and the negative prompts (None where the host has none)."""
    model, hires = p.sd_model, getattr(p, "is_hr_pass", False)
    prompts, negatives = (p.hr_prompts, p.hr_negative_prompts) if hires else (p.prompts, p.negative_prompts)
    width, height = (p.hr_upscale_to_x, p.hr_upscale_to_y) if hires else (p.width, p.height)
    more = {"distilled_cfg_scale": p.distilled_cfg_scale} if BACKEND else {}
    hires_steps = None
    if hires:
        config = sd_samplers.find_sampler_config(p.hr_sampler_name or p.sampler_name)
        hires_steps = config.total_steps(p.hr_second_pass_steps or p.steps)
    steps = [p.firstpass_steps, hires_steps]
    if hasattr(shared.opts, "use_old_scheduling"):  # Neo knows the new one alone
        steps.append(shared.opts.use_old_scheduling)
    positive = prompt_parser.SdConditioning(prompts, width=width, height=height, **more)
    negative = prompt_parser.SdConditioning(negatives, width=width, height=height, is_negative_prompt=True, **more)
    before, model.forge_objects.clip = model.forge_objects.clip, clip
    try:
        if BACKEND:
            model.set_clip_skip(int(shared.opts.CLIP_stop_at_last_layers))
        cond = prompt_parser.get_multicond_learned_conditioning(model, positive, *steps)
        if (p.hr_uc if hires else p.uc) is None:
            return cond, None
        return cond, prompt_parser.get_learned_conditioning(model, negative, *steps)
    finally:
        model.forge_objects.clip = before


def row_of(text, row):
    if isinstance(text, dict):
        return {key: value[row : row + 1] for key, value in text.items()}
    return text[row : row + 1]


def as_image(latent):
    """``[rows, C, H, W]``, of a video's single frame, too."""
    return latent.reshape(*latent.shape[:2], *latent.shape[-2:])


class Run:
    """One sampling pass."""

    def __init__(self, p, options, conds):
        self.p, self.options, self.conds = p, options, conds
        self.reuse = oracle.Reuse(options["refresh"], options["warmup"])
        self.selection = oracle.Selection(options["reselect_every"])
        self.momentum = oracle.Momentum(options["momentum"])
        model = p.sd_model
        active = active_loras(model)
        active |= pool(options, active)
        named, keeping = options.get("in_every_pass", []), options.get("keeping", [])
        self.around = {file: each for file, each in active.items() if Path(file).stem in named}
        others = [file for file in active if file not in self.around]
        self.keeps = [Path(file).stem in keeping for file in others]
        base, *loaded = [load(model, self.around | lora) for lora in ({}, *({file: active[file]} for file in others))]
        self.base_patches, self.base_text = patches_of(base[0]), encode(p, base[1])
        self.patches = [patches_of(unet) for unet, _ in loaded]
        self.texts = [encode(p, clip) for _, clip in loaded]
        self.all_patches = patches_of(model.forge_objects_after_applying_lora.unet)

    def predict(self, model, patches, text, cond, uncond, x, sigma):
        """Every row alone: (layout, cond [R,C,H,W], uncond [B,C,H,W] or None) as float64; rows image by image."""
        step = self.p.sampler.model_wrap_cfg.step
        layout, cond_text = prompt_parser.reconstruct_multicond_batch(text[0], step)

        def call(image, row, entry):
            conditions = {key: each.cond[image : image + 1] for key, each in entry["model_conds"].items()}
            conditions["c_crossattn"] = row["crossattn"] if isinstance(row, dict) else row
            if isinstance(row, dict):
                conditions["y"] = row["vector"]
            output = model.apply_model(
                x[image : image + 1], sigma[image : image + 1], transformer_options={}, **conditions
            )
            return as_image(output.double().numpy())[0]

        with weights(model, patches):
            conds = [
                call(image, row_of(cond_text, index), cond[0])
                for image, parts in enumerate(layout)
                for index, _ in parts
            ]
            unconds = None
            if uncond is not None:
                uncond_text = prompt_parser.reconstruct_cond_batch(text[1], step)
                unconds = np.stack([call(image, row_of(uncond_text, image), uncond[0]) for image in range(len(x))])
        return layout, np.stack(conds), unconds

    def evaluate(self, model, cond, uncond, x, sigma):
        """The step's cond and uncond, as tensors like x."""
        denoiser, options = self.p.sampler.model_wrap_cfg, self.options
        progress = denoiser.step / denoiser.total_steps
        where = (cond, uncond, x, sigma)
        if progress < options["start"] or (progress >= options["end"] and options["end"] < 1):
            layout, conds, unconds = self.predict(model, self.all_patches, self.conds, *where)
        else:
            layout, conds, unconds = self.composed(model, *where)
        total, image_of_row = np.zeros(as_image(x).shape), [image for image, parts in enumerate(layout) for _ in parts]
        strengths = [strength for parts in layout for _, strength in parts]
        for row, image in enumerate(image_of_row):
            share = strengths[row] / sum(s for s, i in zip(strengths, image_of_row) if i == image)
            total[image] += share * conds[row]
        return [None if rows is None else torch.from_numpy(rows).to(x).view_as(x) for rows in (total, unconds)]

    def composed(self, model, *where):
        x, sigma = as_image(where[2].double().numpy()), where[3].double().numpy()
        layout, base_cond, base_uncond = self.predict(model, self.base_patches, self.base_text, *where)
        loras = [self.predict(model, patches, text, *where)[1:] for patches, text in zip(self.patches, self.texts)]
        conds = np.stack([each[0] for each in loras])
        unconds = None if base_uncond is None else np.stack([each[1] for each in loras])
        if self.options["method"] == "composite":
            return layout, oracle.composite(conds), None if unconds is None else oracle.composite(unconds)
        if self.options["method"] == "switch":
            turn = oracle.switch(self.p.sampler.model_wrap_cfg.step, self.options["switch_every"], len(loras))
            return layout, conds[turn], None if unconds is None else unconds[turn]
        image_of_row = [image for image, parts in enumerate(layout) for _ in parts]

        def noise(rows):
            return (x[image_of_row] - rows) / sigma[image_of_row].reshape(-1, 1, 1, 1)

        eps, eps_base = np.stack([noise(each) for each in conds]), noise(base_cond)
        if self.options["refresh"]:
            eps, unconds = self.reuse(eps, eps_base, unconds, base_uncond, -sigma[0])
            conds = base_cond - sigma[0] * (eps - eps_base)
        mask = None if self.options["refresh"] else self.selection(eps, eps_base, self.options)
        left = None if self.selection.anew else mask
        relative = self.momentum(eps, eps_base, self.options, mask=left)
        step = (eps, eps_base, conds, unconds, base_uncond)
        kept = [[keeps] * len(image_of_row) for keeps in self.keeps] if any(self.keeps) else None
        rest = bool(self.around) and kept is None
        more = {"base_cond": base_cond, "relative": relative, "rest": rest, "kept": kept}
        cond, uncond, _ = oracle.loratorio(*step, image_of_row, self.options, mask, **more)
        return layout, cond, uncond


def hook(unet, run):
    """Let the run's evaluation stand for the host's."""
    if not BACKEND:
        unet.set_model_sampler_calc_cond_batch_function(
            lambda args: [
                torch.zeros_like(args["input"]) if rows is None else rows
                for rows in run.evaluate(args["model"], *args["conds"], args["input"], args["sigma"])
            ]
        )
        return

    def before_cfg(model, cond, uncond, x, sigma, options):
        found = run.evaluate(model, cond, uncond, x, sigma)

        def hand_over(apply_model, args):
            return torch.cat([found[kind] for kind in args["cond_or_uncond"]])

        return model, [cond[0] | {"strength": 1.0}], uncond, x, sigma, options | {"model_function_wrapper": hand_over}

    unet.add_sampler_pre_cfg_function(before_cfg)


class ReferenceScript(scripts.Script):
    def title(self):
        return "LoRAtorio reference"

    def show(self, is_img2img):
        return scripts.AlwaysVisible

    def ui(self, is_img2img):
        import gradio

        return [gradio.JSON(value=None, visible=False)]

    def process_before_every_sampling(self, p, options, **kwargs):
        model = p.sd_model
        if options is None or options["method"] == "merge":
            return
        if not ast.literal_eval(model.current_lora_hash) and not options["pool"]:
            return
        run = Run(p, options, (kwargs["c"], kwargs["uc"]))
        unet = without_loras(model.forge_objects.unet)
        hook(unet, run)
        model.forge_objects.unet = unet
