"""Samplers: the model's wrappers for noise levels and for timesteps, and the loops over the steps."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modules import shared
from modules.sd_samplers_cfg_denoiser import CFGDenoiser
from modules.sd_samplers_common import InterruptedException


def over_pixels(values: Tensor) -> Tensor:
    return values[:, None, None, None]


# --- wrappers of the model --------------------------------------------------------------------------------------------


class CompVisDenoiser(nn.Module):
    """Latents with noise of level sigma added, to denoised ones, by a model that predicts noise."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.inner_model = model
        alphas = self.alphas(model)
        self.sigmas = ((1 - alphas) / alphas).sqrt()
        self.log_sigmas = self.sigmas.log()

    def alphas(self, model: nn.Module) -> Tensor:
        return model.alphas_cumprod

    def sigma_to_t(self, sigma: Tensor) -> Tensor:
        """Between two timesteps in proportion to log sigma."""
        log_sigma = sigma.log().clamp(self.log_sigmas[0], self.log_sigmas[-1])
        low = (torch.searchsorted(self.log_sigmas, log_sigma, right=True) - 1).clamp(0, len(self.sigmas) - 2)
        below, above = self.log_sigmas[low], self.log_sigmas[low + 1]
        return low + (log_sigma - below) / (above - below)

    def t_to_sigma(self, t: Tensor) -> Tensor:
        low, high = t.floor().long(), t.ceil().long()
        return torch.lerp(self.log_sigmas[low], self.log_sigmas[high], t.frac()).exp()

    def get_sigmas(self, steps: int) -> Tensor:
        return torch.cat([self.t_to_sigma(torch.linspace(len(self.sigmas) - 1, 0, steps)), torch.zeros(1)])

    def model_output(self, x: Tensor, sigma: Tensor, cond: dict) -> Tensor:
        return self.inner_model.apply_model(x / over_pixels(sigma**2 + 1).sqrt(), self.sigma_to_t(sigma), cond)

    def forward(self, x: Tensor, sigma: Tensor, cond: dict) -> Tensor:
        return x - over_pixels(sigma) * self.model_output(x, sigma, cond)


class CompVisVDenoiser(CompVisDenoiser):
    """The same by a model that predicts velocity."""

    def forward(self, x: Tensor, sigma: Tensor, cond: dict) -> Tensor:
        kept = over_pixels(1 / (sigma**2 + 1))
        return kept * x - over_pixels(sigma) * kept.sqrt() * self.model_output(x, sigma, cond)


class LCMCompVisDenoiser(CompVisDenoiser):
    """Fifty of the thousand timesteps, and an output that is a blend of the denoised latents and the noisy ones."""

    SKIP = 20

    def alphas(self, model: nn.Module) -> Tensor:
        return model.alphas_cumprod[self.SKIP - 1 :: self.SKIP]

    def sigma_to_t(self, sigma: Tensor) -> Tensor:
        nearest = (sigma.log() - self.log_sigmas[:, None]).abs().argmin(dim=0)
        return nearest * self.SKIP + self.SKIP - 1

    def get_scaled_out(self, sigma: Tensor, output: Tensor, input: Tensor) -> Tensor:
        t = over_pixels(self.sigma_to_t(sigma)) * 10.0
        return t / (t**2 + 0.25).sqrt() * output + 0.25 / (t**2 + 0.25) * input

    def forward(self, x: Tensor, sigma: Tensor, cond: dict) -> Tensor:
        return self.get_scaled_out(sigma, super().forward(x, sigma, cond), x)


class CompVisTimestepsDenoiser(nn.Module):
    """Latents at a timestep to their noise."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.inner_model = model

    def forward(self, x: Tensor, timesteps: Tensor, cond: dict) -> Tensor:
        return self.inner_model.apply_model(x, timesteps, cond)


class CompVisTimestepsVDenoiser(CompVisTimestepsDenoiser):
    def forward(self, x: Tensor, timesteps: Tensor, cond: dict) -> Tensor:
        alphas = over_pixels(self.inner_model.alphas_cumprod[timesteps.int()])
        return alphas.sqrt() * super().forward(x, timesteps, cond) + (1 - alphas).sqrt() * x


# --- loops ------------------------------------------------------------------------------------------------------------

Model = Callable[[Tensor, Tensor], Tensor]
"""Latents and one noise level (or timestep) to the guided prediction."""


def euler(model: Model, x: Tensor, sigmas: Tensor, noise: Callable[[], Tensor], done: Callable[[int], None]) -> Tensor:
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i])
        done(i)
        x = denoised + sigmas[i + 1] / sigmas[i] * (x - denoised)
    return x


def euler_ancestral(model: Model, x: Tensor, sigmas: Tensor, noise, done) -> Tensor:
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i])
        done(i)
        variance = (sigmas[i + 1] ** 2 * (1 - (sigmas[i + 1] / sigmas[i]) ** 2)).clamp(min=0)
        down = (sigmas[i + 1] ** 2 - variance).clamp(min=0).sqrt()
        x = denoised + down / sigmas[i] * (x - denoised)
        if sigmas[i + 1] > 0:
            x = x + noise() * variance.sqrt()
    return x


def heun(model: Model, x: Tensor, sigmas: Tensor, noise, done) -> Tensor:
    for i in range(len(sigmas) - 1):
        slope = (x - model(x, sigmas[i])) / sigmas[i]
        done(i)
        step = sigmas[i + 1] - sigmas[i]
        ahead = x + slope * step
        if sigmas[i + 1] > 0:
            slope = (slope + (ahead - model(ahead, sigmas[i + 1])) / sigmas[i + 1]) / 2
        x = x + slope * step
    return x


def dpmpp_2m(model: Model, x: Tensor, sigmas: Tensor, noise, done) -> Tensor:
    before = None
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i])
        done(i)
        target = denoised
        if before is not None and sigmas[i + 1] > 0:
            ratio = (sigmas[i - 1] / sigmas[i]).log() / (sigmas[i] / sigmas[i + 1]).log()
            target = denoised + (denoised - before) / (2 * ratio)
        x = target + sigmas[i + 1] / sigmas[i] * (x - target)
        before = denoised
    return x


def lcm(model: Model, x: Tensor, sigmas: Tensor, noise, done) -> Tensor:
    for i in range(len(sigmas) - 1):
        x = model(x, sigmas[i])
        done(i)
        if sigmas[i + 1] > 0:
            x = x + sigmas[i + 1] * noise()
    return x


def ddim(model: Model, x: Tensor, timesteps: Tensor, noise, done) -> Tensor:
    """Down from the last timestep; the first one is not evaluated."""
    alphas = shared.sd_model.alphas_cumprod
    for i, index in enumerate(range(len(timesteps) - 1, 0, -1)):
        here, there = alphas[timesteps[index]], alphas[timesteps[index - 1]]
        eps = model(x, timesteps[index])
        done(i)
        denoised = (x - (1 - here).sqrt() * eps) / here.sqrt()
        x = there.sqrt() * denoised + (1 - there).sqrt() * eps
    return x


def ddim_cfgpp(model: Model, x: Tensor, timesteps: Tensor, noise, done) -> Tensor:
    """The same, but noise is added back along the unconditional prediction."""
    alphas, denoiser = shared.sd_model.alphas_cumprod, model.__self__.denoiser
    denoiser.cond_scale_miltiplier = 1 / 12.5
    for i, index in enumerate(range(len(timesteps) - 1, 0, -1)):
        here, there = alphas[timesteps[index]], alphas[timesteps[index - 1]]
        eps = model(x, timesteps[index])
        done(i)
        denoised = (x - (1 - here).sqrt() * eps) / here.sqrt()
        x = there.sqrt() * denoised + (1 - there).sqrt() * denoiser.last_noise_uncond
    return x


# --- samplers ---------------------------------------------------------------------------------------------------------


class Sampler:
    """One sampling pass. ``sampler_extra_args`` are what the denoiser gets beside latents and noise level."""

    def __init__(self, config: "SamplerData"):
        self.config = config
        self.denoiser = self.model_wrap_cfg = self.wrap()
        self.last_latent = None
        self.sampler_extra_args: dict[str, Any] = {}

    def wrap(self) -> CFGDenoiser:
        velocity = shared.sd_model.parameterization == "v"
        return CFGDenoiser(self, (CompVisVDenoiser if velocity else CompVisDenoiser)(shared.sd_model))

    def sigmas(self, p: Any, steps: int) -> Tensor:
        scheduler = (p.hr_scheduler if p.is_hr_pass else p.scheduler) or "Automatic"
        if (self.config.scheduler if scheduler == "Automatic" else scheduler) != "Karras":
            return self.denoiser.inner_model.get_sigmas(steps)
        known = self.denoiser.inner_model.sigmas
        ramp = torch.linspace(known[-1] ** (1 / 7), known[0] ** (1 / 7), steps)
        return torch.cat([ramp**7, torch.zeros(1)])

    def sample(self, p, x, conditioning, unconditional_conditioning, image_conditioning) -> Tensor:
        sigmas = self.sigmas(p, p.steps)
        return self.run(p, x * sigmas[0], sigmas, p.steps, conditioning, unconditional_conditioning, image_conditioning)

    def sample_img2img(
        self, p, x, noise, conditioning, unconditional_conditioning, steps=None, image_conditioning=None
    ) -> Tensor:
        self.denoiser.init_latent = x
        steps, evaluated = img2img_steps(p, steps)
        noisy, schedule = self.start_from(p, x, noise, steps, evaluated)
        return self.run(p, noisy, schedule, evaluated + 1, conditioning, unconditional_conditioning, image_conditioning)

    def start_from(self, p: Any, x: Tensor, noise: Tensor, steps: int, evaluated: int) -> tuple[Tensor, Tensor]:
        sigmas = self.sigmas(p, steps)[steps - evaluated - 1 :]
        return x + noise * sigmas[0], sigmas

    def model(self, x: Tensor, level: Tensor) -> Tensor:
        return self.denoiser(x, level * x.new_ones(len(x)), **self.sampler_extra_args)

    def run(self, p, x, schedule, steps, cond, uncond, image_cond) -> Tensor:
        denoiser, state = self.denoiser, shared.state
        denoiser.p, denoiser.step, denoiser.total_steps = p, 0, self.config.total_steps(steps)
        denoiser.mask, denoiser.nmask = getattr(p, "mask", None), getattr(p, "nmask", None)
        state.sampling_steps, state.sampling_step = steps, 0
        self.last_latent = x
        self.sampler_extra_args = {
            "cond": cond,
            "image_cond": image_cond,
            "uncond": uncond,
            "cond_scale": p.cfg_scale,
            "s_min_uncond": p.s_min_uncond,
        }

        def done(step: int) -> None:
            state.sampling_step = step

        try:
            x = self.config.function(self.model, x, schedule, p.rng.next, done)
        except InterruptedException:
            x = self.last_latent
        if denoiser.padded_cond_uncond:
            p.extra_generation_params["Pad conds"] = True
        if denoiser.padded_cond_uncond_v0:
            p.extra_generation_params["Pad conds v0"] = True
        return x


class LCMSampler(Sampler):
    def wrap(self) -> CFGDenoiser:
        return CFGDenoiser(self, LCMCompVisDenoiser(shared.sd_model))


class TimestepsDenoiser(CFGDenoiser):
    mask_before_denoising = True

    def predicted_x0(self, x: Tensor, output: Tensor, sigma: Tensor) -> Tensor:
        alphas = over_pixels(shared.sd_model.alphas_cumprod[sigma.long()])
        return (x - (1 - alphas).sqrt() * output) / alphas.sqrt()


class TimestepsSampler(Sampler):
    """Schedules are of timesteps, latents keep their variance, and the model's output is noise."""

    def wrap(self) -> CFGDenoiser:
        velocity = shared.sd_model.parameterization == "v"
        wrapper = CompVisTimestepsVDenoiser if velocity else CompVisTimestepsDenoiser
        return TimestepsDenoiser(self, wrapper(shared.sd_model))

    def timesteps(self, steps: int) -> Tensor:
        return (torch.arange(0, 1000, 1000 // steps) + 1).clamp(max=999)

    def sample(self, p, x, conditioning, unconditional_conditioning, image_conditioning) -> Tensor:
        schedule = self.timesteps(p.steps)
        return self.run(p, x, schedule, p.steps, conditioning, unconditional_conditioning, image_conditioning)

    def start_from(self, p: Any, x: Tensor, noise: Tensor, steps: int, evaluated: int) -> tuple[Tensor, Tensor]:
        timesteps = self.timesteps(steps)
        alpha = shared.sd_model.alphas_cumprod[timesteps[evaluated]]
        return alpha.sqrt() * x + (1 - alpha).sqrt() * noise, timesteps[:evaluated]


def img2img_steps(p: Any, steps: int | None) -> tuple[int, int]:
    """The length of the whole schedule, and how many of its steps, less one, are taken."""
    if steps is not None or shared.opts.img2img_fix_steps:
        taken = steps or p.steps
        return int(taken / min(p.denoising_strength, 0.999)) if p.denoising_strength > 0 else 0, taken - 1
    return p.steps, int(min(p.denoising_strength, 0.999) * p.steps)


@dataclass(frozen=True)
class SamplerData:
    name: str
    constructor: type[Sampler]
    function: Callable
    second_order: bool = False
    scheduler: str = "Automatic"

    def total_steps(self, steps: int) -> int:
        return 2 * steps if self.second_order else steps


all_samplers = [
    SamplerData("DPM++ 2M", Sampler, dpmpp_2m, scheduler="Karras"),
    SamplerData("Euler a", Sampler, euler_ancestral),
    SamplerData("Euler", Sampler, euler),
    SamplerData("Heun", Sampler, heun, second_order=True),
    SamplerData("DDIM", TimestepsSampler, ddim),
    SamplerData("DDIM CFG++", TimestepsSampler, ddim_cfgpp),
    SamplerData("LCM", LCMSampler, lcm),
]


def find_sampler_config(name: str | None) -> SamplerData | None:
    return next((config for config in all_samplers if name in (None, config.name)), None)


def create_sampler(name: str) -> Sampler:
    config = find_sampler_config(name)
    assert config is not None, f"bad sampler name: {name}"
    return config.constructor(config)
