"""One request for images, from prompts to pixels, in the host's order of events."""

import json
import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torch.nn import functional as F

from modules import errors, extra_networks, images, prompt_parser, sd_samplers, shared
from modules.infotext_utils import quote
from modules.sd_hijack import model_hijack

LATENT_UPSCALERS = {
    None: "bilinear",
    "Latent": "bilinear",
    "Latent (bicubic)": "bicubic",
    "Latent (nearest)": "nearest",
}


class ImageRNG:
    """Noise for the images of a batch, from generators of their own; the first is turned towards that of a subseed."""

    def __init__(self, shape: tuple[int, ...], seeds: list[int], subseeds: list[int] = (), strength: float = 0.0):
        self.shape = shape
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.subseeds, self.strength = subseeds, strength

    def next(self) -> Tensor:
        noise = [torch.randn(self.shape, generator=each) for each in self.generators]
        strength, self.strength = self.strength, 0.0
        if strength:
            others = [torch.randn(self.shape, generator=torch.Generator().manual_seed(seed)) for seed in self.subseeds]
            noise = [slerp(strength, one, other) for one, other in zip(noise, others)]
        return torch.stack(noise)


def slerp(share: float, one: Tensor, other: Tensor) -> Tensor:
    """Between two tensors along the great circle."""
    angle = F.cosine_similarity(one.flatten(), other.flatten(), dim=0).acos()
    return (((1 - share) * angle).sin() * one + (share * angle).sin() * other) / angle.sin()


@dataclass(eq=False)
class StableDiffusionProcessing:
    """A request for images, and what became of it so far."""

    prompt: str = ""
    negative_prompt: str = ""
    seed: int = -1
    subseed: int = -1
    subseed_strength: float = 0.0
    tiling: bool = False
    sampler_name: str = "Euler"
    scheduler: str | None = None
    batch_size: int = 1
    n_iter: int = 1
    steps: int = 50
    cfg_scale: float = 7.0
    width: int = 512
    height: int = 512
    s_min_uncond: float | None = None
    override_settings: dict[str, Any] = field(default_factory=dict)
    override_settings_restore_afterwards: bool = True
    scripts: Any = None
    script_args: tuple = ()
    do_not_save_samples: bool = False
    outpath_samples: str = ""

    cached_c = [None, None]
    cached_uc = [None, None]

    is_hr_pass = enable_hr = False
    is_api = True
    hr_scheduler = None

    def __post_init__(self):
        self.extra_generation_params: dict[str, Any] = {}
        self.comments: dict[str, int] = {}
        self.sampler = self.c = self.uc = self.rng = None
        self.all_prompts = self.all_negative_prompts = self.all_seeds = self.all_subseeds = None
        self.iteration = 0
        self.cached_c = StableDiffusionProcessing.cached_c
        self.cached_uc = StableDiffusionProcessing.cached_uc

    @property
    def sd_model(self) -> Any:
        return shared.sd_model

    def comment(self, text: str) -> None:
        self.comments[text] = 1

    def init(self) -> None:
        """Before the first batch."""

    def sample(self, conditioning, unconditional_conditioning, seeds, subseeds, subseed_strength, prompts) -> Tensor:
        raise NotImplementedError

    def get_conds_with_caching(self, function, prompts, steps, caches, extra_network_data, hires_steps=None) -> Any:
        """What was computed last, if it was for the same prompts, tags, steps and size; else it is computed anew."""
        opts = shared.opts
        key = (
            prompts,
            steps,
            hires_steps,
            opts.use_old_scheduling,
            opts.CLIP_stop_at_last_layers,
            shared.sd_model.sd_checkpoint_info,
            extra_network_data,
            self.width,
            self.height,
        )
        for cache in caches:
            if cache[0] is not None and cache[0] == key:
                return cache[1]
        caches[0][1] = function(shared.sd_model, prompts, steps, hires_steps, opts.use_old_scheduling)
        caches[0][0] = key
        return caches[0][1]

    def setup_conds(self) -> None:
        self.firstpass_steps = steps = sd_samplers.find_sampler_config(self.sampler_name).total_steps(self.steps)
        prompts = prompt_parser.SdConditioning(self.prompts, width=self.width, height=self.height)
        negative = prompt_parser.SdConditioning(self.negative_prompts, True, self.width, self.height)
        encode, encode_multi = prompt_parser.get_learned_conditioning, prompt_parser.get_multicond_learned_conditioning
        data = self.extra_network_data
        self.uc = self.get_conds_with_caching(encode, negative, steps, [self.cached_uc], data)
        self.c = self.get_conds_with_caching(encode_multi, prompts, steps, [self.cached_c], data)

    def get_conds(self) -> tuple[Any, Any]:
        return self.c, self.uc

    def get_token_merging_ratio(self, for_hr: bool = False) -> float:
        return 0.0

    def setup_prompts(self) -> None:
        self.all_prompts = [self.prompt] * (self.batch_size * self.n_iter)
        self.all_negative_prompts = [self.negative_prompt] * len(self.all_prompts)

    def parse_extra_network_prompts(self) -> None:
        self.prompts, self.extra_network_data = extra_networks.parse_prompts(self.prompts)

    def batch_of(self, values: list) -> list:
        return values[self.iteration * self.batch_size : (self.iteration + 1) * self.batch_size]

    def image_conditioning(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(x), 5, 1, 1)

    def before_sampling(self, x: Tensor, noise: Tensor, c: Any, uc: Any) -> None:
        self.scripts.call("process_before_every_sampling", self, x=x, noise=noise, c=c, uc=uc)

    def new_rng(self, width: int, height: int) -> ImageRNG:
        return ImageRNG((4, height // 8, width // 8), self.seeds, self.subseeds, self.subseed_strength)

    def close(self) -> None:
        self.sampler = self.c = self.uc = None
        if not shared.opts.persistent_cond_cache:
            StableDiffusionProcessing.cached_c = [None, None]
            StableDiffusionProcessing.cached_uc = [None, None]


@dataclass(eq=False)
class StableDiffusionProcessingTxt2Img(StableDiffusionProcessing):
    enable_hr: bool = False
    denoising_strength: float = 0.75
    hr_scale: float = 2.0
    hr_upscaler: str | None = None
    hr_second_pass_steps: int = 0
    hr_sampler_name: str | None = None
    hr_scheduler: str | None = None
    hr_prompt: str = ""
    hr_negative_prompt: str = ""

    cached_hr_c = [None, None]
    cached_hr_uc = [None, None]

    def __post_init__(self):
        super().__post_init__()
        self.hr_c = self.hr_uc = self.all_hr_prompts = self.all_hr_negative_prompts = None
        self.cached_hr_c = StableDiffusionProcessingTxt2Img.cached_hr_c
        self.cached_hr_uc = StableDiffusionProcessingTxt2Img.cached_hr_uc

    def init(self) -> None:
        if not self.enable_hr:
            return

        def hires_prompt(p: Any, index: int, prompt_text: str, **rest: Any) -> str | None:
            return p.all_hr_prompts[index] if p.all_hr_prompts[index] != prompt_text else None

        if self.hr_upscaler not in LATENT_UPSCALERS:
            raise Exception(f"could not find upscaler named {self.hr_upscaler}")
        self.hr_scheduler = self.hr_scheduler or self.scheduler
        self.hr_upscale_to_x = int(self.width * self.hr_scale)
        self.hr_upscale_to_y = int(self.height * self.hr_scale)
        self.extra_generation_params |= {
            "Denoising strength": self.denoising_strength,
            "Hires prompt": hires_prompt,
            "Hires upscale": self.hr_scale,
            "Hires steps": self.hr_second_pass_steps or None,
            "Hires upscaler": self.hr_upscaler,
        }

    def sample(self, conditioning, unconditional_conditioning, seeds, subseeds, subseed_strength, prompts) -> Tensor:
        self.sampler = sd_samplers.create_sampler(self.sampler_name)
        x = self.rng.next()
        self.before_sampling(x, x, conditioning, unconditional_conditioning)
        samples = self.sampler.sample(
            self, x, conditioning, unconditional_conditioning, image_conditioning=self.image_conditioning(x)
        )
        return self.sample_hr_pass(samples) if self.enable_hr and not shared.state.interrupted else samples

    def sample_hr_pass(self, samples: Tensor) -> Tensor:
        self.is_hr_pass = True
        self.sampler = sd_samplers.create_sampler(self.hr_sampler_name or self.sampler_name)
        size = (self.hr_upscale_to_y // 8, self.hr_upscale_to_x // 8)
        samples = F.interpolate(samples, size=size, mode=LATENT_UPSCALERS[self.hr_upscaler])
        self.rng = self.new_rng(self.hr_upscale_to_x, self.hr_upscale_to_y)
        noise = self.rng.next()
        extra_networks.activate(self, self.hr_extra_network_data)
        self.calculate_hr_conds()
        self.scripts.call("before_hr", self)
        self.before_sampling(samples, noise, self.hr_c, self.hr_uc)
        samples = self.sampler.sample_img2img(
            self,
            samples,
            noise,
            self.hr_c,
            self.hr_uc,
            steps=self.hr_second_pass_steps or self.steps,
            image_conditioning=self.image_conditioning(samples),
        )
        self.is_hr_pass = False
        return samples

    def setup_prompts(self) -> None:
        super().setup_prompts()
        if not self.enable_hr:
            return
        count = len(self.all_prompts)
        self.all_hr_prompts = [self.hr_prompt or self.prompt] * count
        self.all_hr_negative_prompts = [self.hr_negative_prompt or self.negative_prompt] * count

    def parse_extra_network_prompts(self) -> None:
        super().parse_extra_network_prompts()
        if self.enable_hr:
            self.hr_negative_prompts = self.batch_of(self.all_hr_negative_prompts)
            prompts = self.batch_of(self.all_hr_prompts)
            self.hr_prompts, self.hr_extra_network_data = extra_networks.parse_prompts(prompts)

    def calculate_hr_conds(self) -> None:
        if self.hr_c is not None:
            return
        width, height = self.hr_upscale_to_x, self.hr_upscale_to_y
        prompts = prompt_parser.SdConditioning(self.hr_prompts, width=width, height=height)
        negative = prompt_parser.SdConditioning(self.hr_negative_prompts, True, width, height)
        config = sd_samplers.find_sampler_config(self.hr_sampler_name or self.sampler_name)
        hires_steps = config.total_steps(self.hr_second_pass_steps or self.steps)
        encode, encode_multi = prompt_parser.get_learned_conditioning, prompt_parser.get_multicond_learned_conditioning
        steps, data = self.firstpass_steps, self.hr_extra_network_data
        caches, negative_caches = [self.cached_hr_c, self.cached_c], [self.cached_hr_uc, self.cached_uc]
        self.hr_uc = self.get_conds_with_caching(encode, negative, steps, negative_caches, data, hires_steps)
        self.hr_c = self.get_conds_with_caching(encode_multi, prompts, steps, caches, data, hires_steps)

    def setup_conds(self) -> None:
        if self.is_hr_pass:
            self.hr_c = None
            self.calculate_hr_conds()
            return
        super().setup_conds()
        self.hr_c = self.hr_uc = None
        if self.enable_hr and shared.opts.hires_fix_use_firstpass_conds:
            self.calculate_hr_conds()

    def get_conds(self) -> tuple[Any, Any]:
        return (self.hr_c, self.hr_uc) if self.is_hr_pass else super().get_conds()

    def close(self) -> None:
        super().close()
        self.hr_c = self.hr_uc = None
        if not shared.opts.persistent_cond_cache:
            StableDiffusionProcessingTxt2Img.cached_hr_c = [None, None]
            StableDiffusionProcessingTxt2Img.cached_hr_uc = [None, None]


@dataclass(eq=False)
class StableDiffusionProcessingImg2Img(StableDiffusionProcessing):
    init_images: list[Image.Image] = field(default_factory=list)
    denoising_strength: float = 0.75
    image_mask: Image.Image | None = None
    mask_blur: int = 4
    inpainting_fill: int = 0
    inpainting_mask_invert: int = 0
    inpaint_full_res: bool = True
    inpaint_full_res_padding: int = 0

    def init(self) -> None:
        self.extra_generation_params["Denoising strength"] = self.denoising_strength
        self.sampler = sd_samplers.create_sampler(self.sampler_name)
        self.mask = self.nmask = self.overlay = self.paste_to = None
        size = (self.width, self.height)
        image = self.init_images[0].convert("RGB")
        mask = self.painted(image.size)
        if mask is not None and self.inpaint_full_res:
            self.overlay = overlay_of(image, mask)
            box = grown(mask.getbbox(), self.inpaint_full_res_padding, self.width / self.height, image.size)
            self.paste_to = (*box[:2], box[2] - box[0], box[3] - box[1])
            image, mask = image.crop(box).resize(size), mask.crop(box).resize(size)
        elif mask is not None:
            image, mask = image.resize(size), mask.resize(size).point(lambda value: min(2 * value, 255))
            self.overlay = overlay_of(image, mask)
        pixels = torch.from_numpy(shares(image.resize(size))).movedim(2, 0)[None]
        if mask is not None:
            latent = shares(mask.resize((self.width // 8, self.height // 8)))[:, :, 0]
            self.nmask = torch.from_numpy(latent.round()).repeat(4, 1, 1)
            self.mask = 1 - self.nmask
            if self.inpainting_fill != 1:
                painted = torch.from_numpy(shares(mask)).movedim(2, 0)[None]
                kept = (pixels * (1 - painted)).sum((2, 3), keepdim=True) / (1 - painted).sum().clamp(min=1)
                pixels = pixels * (1 - painted) + kept * painted
        self.init_latent = shared.sd_model.encode_first_stage(pixels * 2 - 1).repeat(self.batch_size, 1, 1, 1)
        if mask is not None and self.inpainting_fill > 1:
            noise = ImageRNG(self.init_latent.shape[1:], self.all_seeds[: self.batch_size]).next()
            filling = noise if self.inpainting_fill == 2 else torch.zeros_like(noise)
            self.init_latent = self.init_latent * self.mask + filling * self.nmask

    def painted(self, size: tuple[int, int]) -> Image.Image | None:
        """The mask, white where to paint, for an image of this size; None if there is none, or an empty one."""
        if self.image_mask is None:
            return None
        mask = self.image_mask.convert("L").resize(size)
        if self.inpainting_mask_invert:
            mask = ImageOps.invert(mask)
        if self.mask_blur:
            mask = mask.filter(ImageFilter.GaussianBlur(self.mask_blur))
            self.extra_generation_params["Mask blur"] = self.mask_blur
        return mask if mask.getbbox() else None

    def sample(self, conditioning, unconditional_conditioning, seeds, subseeds, subseed_strength, prompts) -> Tensor:
        noise = self.rng.next()
        self.before_sampling(self.init_latent, noise, conditioning, unconditional_conditioning)
        samples = self.sampler.sample_img2img(
            self,
            self.init_latent,
            noise,
            conditioning,
            unconditional_conditioning,
            image_conditioning=self.image_conditioning(self.init_latent),
        )
        return samples if self.mask is None else samples * self.nmask + self.init_latent * self.mask


def shares(image: Image.Image) -> np.ndarray:
    """Pixels in 0 to 1, ``[height, width, channels]``."""
    return np.asarray(image, dtype=np.float32).reshape(image.height, image.width, -1) / 255


def overlay_of(image: Image.Image, mask: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """What goes over the result: how opaque, and which pixels."""
    return 1 - shares(mask), shares(image)


def grown(box: tuple, padding: int, ratio: float, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """A box with padding around it, brought to a ratio of width to height as far as the image allows."""
    left, top, right, bottom = box
    lengths = [right - left + 2 * padding, bottom - top + 2 * padding]
    lengths = [max(lengths[0], round(lengths[1] * ratio)), max(lengths[1], round(lengths[0] / ratio))]
    lengths = [min(length, limit) for length, limit in zip(lengths, size)]
    starts = [(left + right - lengths[0]) // 2, (top + bottom - lengths[1]) // 2]
    left, top = (max(0, min(start, limit - length)) for start, limit, length in zip(starts, size, lengths))
    return left, top, left + lengths[0], top + lengths[1]


class Processed:
    """The images of a request, and what the host says of them."""

    def __init__(self, p: StableDiffusionProcessing, images: list[Image.Image], infotexts: list[str] = ()):
        self.images, self.infotexts = images, list(infotexts)
        self.index_of_first_image = 0
        self.comments = "".join(f"{comment}\n" for comment in p.comments)
        self.all_prompts = p.all_prompts or [p.prompt]
        self.all_negative_prompts = p.all_negative_prompts or [p.negative_prompt]
        self.all_seeds = p.all_seeds or [p.seed]
        self.all_subseeds = p.all_subseeds or [p.subseed]
        self.said = {
            "prompt": p.prompt,
            "negative_prompt": p.negative_prompt,
            "seed": self.all_seeds[0],
            "width": p.width,
            "height": p.height,
            "sampler_name": p.sampler_name,
            "cfg_scale": p.cfg_scale,
            "steps": p.steps,
            "batch_size": p.batch_size,
            "extra_generation_params": p.extra_generation_params,
        }

    def js(self) -> str:
        lists = ("all_prompts", "all_negative_prompts", "all_seeds", "all_subseeds", "infotexts")
        lists += ("index_of_first_image",)
        return json.dumps(self.said | {name: getattr(self, name) for name in lists}, default=lambda value: None)


def create_infotext(p: StableDiffusionProcessing, index: int) -> str:
    """The generation parameters of one image of the batch under way, as text."""
    parameters = {
        "Steps": p.steps,
        "Sampler": p.sampler_name,
        "Schedule type": p.scheduler,
        "CFG scale": p.cfg_scale,
        "Seed": p.seeds[index],
        "Size": f"{p.width}x{p.height}",
        "Model": "tiny",
        **p.extra_generation_params,
    }
    prompt_text, negative_prompt = p.batch_prompts[index], p.negative_prompts[index]
    words = []
    for key, value in parameters.items():
        try:
            if isinstance(value, list):
                value = value[index]
            elif callable(value):
                value = value(p=p, index=index, prompt_text=prompt_text, negative_prompt=negative_prompt)
        except Exception:
            errors.report(f'Error creating infotext for key "{key}"', exc_info=True)
            value = None
        if value is not None:
            words.append(f"{key}: {quote(value)}")
    negative = f"\nNegative prompt: {negative_prompt}" if negative_prompt else ""
    return f"{prompt_text}{negative}\n{', '.join(words)}".strip()


def process_images(p: StableDiffusionProcessing) -> Processed:
    """All images of a request. Options set for it alone are put back, but only those that had been set before."""
    p.scripts.before_process(p)
    opts = shared.opts
    before = {name: opts.data[name] for name in p.override_settings if name in opts.data}
    try:
        for name, value in p.override_settings.items():
            opts.set(name, value)
        return process_images_inner(p)
    finally:
        if p.override_settings_restore_afterwards:
            opts.data.update(before)


@dataclass
class PostprocessImageArgs:
    image: Image.Image


def process_images_inner(p: StableDiffusionProcessing) -> Processed:
    state, scripts = shared.state, p.scripts
    model_hijack.comments.clear()
    if p.s_min_uncond is None:
        p.s_min_uncond = shared.opts.s_min_uncond
    p.setup_prompts()
    seed, subseed = (random.randrange(4294967294) if each == -1 else each for each in (p.seed, p.subseed))
    p.all_seeds = [seed + (i if p.subseed_strength == 0 else 0) for i in range(len(p.all_prompts))]
    p.all_subseeds = [subseed + i for i in range(len(p.all_prompts))]
    shared.sd_model.tile(p.tiling)
    scripts.process(p)
    found, infotexts = [], []
    with torch.no_grad():
        p.init()
        for number in range(p.n_iter):
            p.iteration = number
            state.skipped = False
            if state.interrupted or state.stopping_generation:
                break
            for index, image in enumerate(process_batch(p)):
                p.batch_index = index
                post = PostprocessImageArgs(image)
                scripts.call("postprocess_image_after_composite", p, post)
                infotexts.append(create_infotext(p, index))
                if shared.opts.samples_save and not p.do_not_save_samples:
                    images.save_image(post.image, p.outpath_samples, "", p.seeds[index], info=infotexts[-1], p=p)
                found.append(post.image)
    extra_networks.deactivate(p)
    processed = Processed(p, found, infotexts or [""])
    scripts.postprocess(p, processed)
    return processed


def process_batch(p: StableDiffusionProcessing) -> list[Image.Image]:
    scripts = p.scripts
    p.prompts = p.batch_prompts = p.batch_of(p.all_prompts)
    p.negative_prompts = p.batch_of(p.all_negative_prompts)
    p.seeds, p.subseeds = p.batch_of(p.all_seeds), p.batch_of(p.all_subseeds)
    p.rng = p.new_rng(p.width, p.height)
    about = {"batch_number": p.iteration, "prompts": p.prompts, "seeds": p.seeds, "subseeds": p.subseeds}
    scripts.call("before_process_batch", p, **about)
    p.parse_extra_network_prompts()
    extra_networks.activate(p, p.extra_network_data)
    about["prompts"] = p.prompts
    scripts.call("process_batch", p, **about)
    p.setup_conds()
    for comment in model_hijack.comments:
        p.comment(comment)
    samples = p.sample(
        conditioning=p.c,
        unconditional_conditioning=p.uc,
        seeds=p.seeds,
        subseeds=p.subseeds,
        subseed_strength=p.subseed_strength,
        prompts=p.prompts,
    )
    if not samples.isfinite().all():
        raise RuntimeError("A tensor with NaNs was produced in Unet.")
    pixels = torch.cat([shared.sd_model.decode_first_stage(sample[None]) for sample in samples])
    pixels = ((pixels + 1) / 2).clamp(0, 1)
    scripts.call("postprocess_batch", p, pixels, batch_number=p.iteration)
    return [as_image(each.movedim(0, 2).numpy(), p) for each in pixels]


def as_image(pixels: np.ndarray, p: StableDiffusionProcessing) -> Image.Image:
    """An image of pixels in 0 to 1, put into the place it is for, below what is to be kept of the original."""
    image, overlay = (255 * pixels).astype(np.uint8), getattr(p, "overlay", None)
    if overlay is None:
        return Image.fromarray(image)
    opacity, original = overlay
    if p.paste_to is not None:
        left, top, width, height = p.paste_to
        whole = np.zeros(original.shape, np.uint8)
        whole[top : top + height, left : left + width] = Image.fromarray(image).resize((width, height))
        image = whole
    return Image.fromarray((image * (1 - opacity) + 255 * original * opacity).round().astype(np.uint8))
