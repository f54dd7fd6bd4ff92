"""A WebUI script that composes by brute force, for the tests: no row is evaluated together with another, every LoRA is
loaded by the host's own ``load_networks`` in every step, and the mathematics is the oracle's.

Its one argument is a dict of all of LoRAtorio's options, or None to do nothing. Beside them, ``in_every_pass`` may name
LoRAs of the prompt that are loaded in every pass, and to which what nobody is clearly at home in is left; but if some
of the others are named in ``keeping``, to these.
"""

import fnmatch
import importlib.util
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from modules import devices, extra_networks, prompt_parser, script_callbacks, scripts, sd_samplers, shared

TESTS = Path(__file__).resolve().parents[3]
spec = importlib.util.spec_from_file_location("loratorio_oracle", TESTS / "oracle.py")
oracle = importlib.util.module_from_spec(spec)
spec.loader.exec_module(oracle)


class Run:
    """What one sampling pass needs to know."""

    options = None
    active = []
    around = []
    keeping = []
    loras = []
    texts = {}
    reuse = None
    selection = None
    momentum = None
    params = None


run = Run()


def networks():
    return sys.modules[type(extra_networks.extra_network_registry["lora"]).__module__].networks


def load(loras):
    names, te, unet, dyn = zip(*loras) if loras else ((), (), (), ())
    with mock.patch.object(devices, "torch_gc"):  # a garbage collection in every step is most of the time
        networks().load_networks(list(names), list(te), list(unet), list(dyn))


def pool(options, active):
    """The pool's LoRAs that are not active, as `load` takes them. Entries are ``pattern`` and ``pattern:weight``."""
    found = {}
    for entry in options["pool"]:
        pattern, _, weight = entry.partition(":")
        for name in sorted(networks().available_networks):
            if fnmatch.fnmatchcase(name, pattern) and name not in [each[0] for each in active]:
                weights = [float(each) for each in weight.split(":")] if weight else [options["pool_weight"]]
                found[name] = (name, weights[0], weights[-1], None)
    return list(found.values())


def encode(p):
    """Schedules of the prompts and the negative prompts with the LoRAs that are loaded now."""
    hires = getattr(p, "is_hr_pass", False)
    prompts, negatives = (p.hr_prompts, p.hr_negative_prompts) if hires else (p.prompts, p.negative_prompts)
    width, height = (p.hr_upscale_to_x, p.hr_upscale_to_y) if hires else (p.width, p.height)
    hires_steps = None
    if hires:
        config = sd_samplers.find_sampler_config(p.hr_sampler_name or p.sampler_name)
        hires_steps = config.total_steps(p.hr_second_pass_steps or p.steps)
    more = (p.firstpass_steps, hires_steps, shared.opts.use_old_scheduling)
    positive = prompt_parser.SdConditioning(prompts, width=width, height=height)
    negative = prompt_parser.SdConditioning(negatives, width=width, height=height, is_negative_prompt=True)
    return (
        prompt_parser.get_multicond_learned_conditioning(shared.sd_model, positive, *more),
        prompt_parser.get_learned_conditioning(shared.sd_model, negative, *more),
    )


def row_of(text, row):
    if isinstance(text, dict):
        return {key: value[row : row + 1] for key, value in text.items()}
    return text[row : row + 1]


def noise_scaling(inner_model, x, sigma):
    """Of a denoiser's output for x: (what of it is x's, how it moves with the noise), each [R,...] in float64."""
    kind = type(inner_model).__name__
    gain = -sigma.double().numpy().reshape(-1, 1, 1, 1)
    if "Timesteps" in kind:
        return np.zeros_like(x), np.ones_like(gain)
    if kind.startswith("LCM"):
        t = inner_model.sigma_to_t(sigma).double().numpy().reshape(-1, 1, 1, 1) * 10
        share = t / np.sqrt(t**2 + 0.25)
        return 0.25 / (t**2 + 0.25) * x + share * x, share * gain
    return x, gain


def skips_uncond(denoiser, sigma):
    opts, step = shared.opts, denoiser.step
    s_min_uncond = denoiser.sampler.sampler_extra_args["s_min_uncond"]
    early = opts.skip_early_cond != 0 and step / denoiser.total_steps <= opts.skip_early_cond
    late = (step % 2 or opts.s_min_uncond_all) and s_min_uncond > 0 and sigma[0] < s_min_uncond
    return early or late


def before_unet(params):
    run.params = params


def after_unet(result):
    if run.options is None or not run.loras or run.options["method"] == "merge":
        return
    params, options, denoiser = run.params, run.options, run.params.denoiser
    step, inner_model = denoiser.step, result.inner_model
    progress = step / denoiser.total_steps
    if progress < options["start"] or (progress >= options["end"] and options["end"] < 1):
        return
    skip = skips_uncond(denoiser, params.sigma)

    def predict(lora):
        """Every row alone: (cond [R,C,H,W], uncond [B,C,H,W]) as float64."""
        load(run.around if lora is None else [*run.around, lora])
        conds_list, cond = prompt_parser.reconstruct_multicond_batch(run.texts[lora][0], step)
        uncond = prompt_parser.reconstruct_cond_batch(run.texts[lora][1], step)
        if cond.shape[1] != uncond.shape[1] and shared.opts.pad_cond_uncond_v0:
            cond, uncond = denoiser.pad_cond_uncond_v0(cond, uncond)
        elif cond.shape[1] != uncond.shape[1] and shared.opts.pad_cond_uncond:
            cond, uncond = denoiser.pad_cond_uncond(cond, uncond)
        conds = cond.shape[0]
        rows = [row_of(cond, row) for row in range(conds)]
        rows += [] if skip else [row_of(uncond, row) for row in range(len(conds_list))]
        outputs = []
        for i, text in enumerate(rows):
            more = {"c_concat": [params.image_cond[i : i + 1]]}
            condition = {**text, **more} if isinstance(text, dict) else {"c_crossattn": [text], **more}
            output = inner_model(params.x[i : i + 1], params.sigma[i : i + 1], cond=condition)
            outputs.append(output.double().numpy()[0])
        outputs = np.stack(outputs)
        return conds_list, outputs[:conds], outputs[conds:]

    base = predict(None)
    loras = [predict(lora) for lora in run.loras]
    load(run.active)
    members = list(range(len(loras)))
    if options["method"] == "loratorio" and not options["refresh"]:
        # Whose weight is zero in this step, by a schedule of somebody else's, takes no part in it.
        members = [i for i in members if not all(map(np.array_equal, loras[i][1:], base[1:]))]
        loras = [loras[i] for i in members]
    if not loras:
        return

    conds_list, base_cond, base_uncond = base
    conds = len(base_cond)
    image_of_row = [image for image, rows in enumerate(conds_list) for _ in rows]
    conds_of = np.stack([cond for _, cond, _ in loras])
    unconds_of = np.stack([uncond for _, _, uncond in loras])
    if options["method"] == "composite":
        cond, uncond = oracle.composite(conds_of), oracle.composite(unconds_of)
    elif options["method"] == "switch":
        turn = oracle.switch(step, options["switch_every"], len(loras))
        cond, uncond = conds_of[turn], unconds_of[turn]
    else:
        x, sigma = params.x[:conds].double().numpy(), params.sigma[:conds]
        kept, gain = noise_scaling(inner_model, x, sigma)
        eps_base, eps = (base_cond - kept) / gain, (conds_of - kept) / gain
        base_uncond = None if skip else base_uncond
        if options["refresh"]:
            eps, unconds_of = run.reuse(eps, eps_base, unconds_of, base_uncond, gain[0])
            conds_of = base_cond + gain * (eps - eps_base)
        mask = None if options["refresh"] else run.selection(eps, eps_base, options)
        left = None if run.selection.anew else mask
        relative = run.momentum(eps, eps_base, options, members, mask=left)
        step = (eps, eps_base, conds_of, unconds_of, base_uncond)
        kept = [[run.loras[i][0] in run.keeping] * conds for i in members] if run.keeping else None
        rest = bool(run.around) and kept is None
        more = {"base_cond": base_cond, "relative": relative, "rest": rest, "kept": kept}
        cond, uncond, _ = oracle.loratorio(*step, image_of_row, options, mask, **more)
    result.x[:conds] = torch.from_numpy(cond).to(result.x)
    if skip:
        uncond = np.stack([cond[rows[0][0]] for rows in conds_list])
    result.x[conds:] = torch.from_numpy(uncond).to(result.x)


class ReferenceScript(scripts.Script):
    def title(self):
        return "LoRAtorio reference"

    def show(self, is_img2img):
        return scripts.AlwaysVisible

    def ui(self, is_img2img):
        import gradio

        return [gradio.JSON(value=None, visible=False)]

    def process(self, p, options):
        run.options = options

    def process_before_every_sampling(self, p, options, **kwargs):
        if run.options is None:
            return
        active = {each.name: each for each in networks().loaded_networks}.values()
        run.active = [(each.name, each.te_multiplier, each.unet_multiplier, each.dyn_dim) for each in active]
        around, run.keeping = options.get("in_every_pass", []), options.get("keeping", [])
        run.around = [each for each in run.active if each[0] in around]
        run.loras = [each for each in run.active if each[0] not in around] + pool(options, run.active)
        if not run.loras:
            return
        run.reuse = oracle.Reuse(options["refresh"], options["warmup"])
        run.selection = oracle.Selection(options["reselect_every"])
        run.momentum = oracle.Momentum(options["momentum"])
        run.texts = {}
        for lora in [None, *run.loras]:
            load(run.around if lora is None else [*run.around, lora])
            run.texts[lora] = encode(p)
        load(run.active)

    def postprocess(self, p, processed, options):
        run.options = run.params = None


script_callbacks.on_cfg_denoiser(before_unet)
script_callbacks.on_cfg_denoised(after_unet)
