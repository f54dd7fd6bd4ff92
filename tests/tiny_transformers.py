"""Tiny random pipelines around transformers, a family each, and LoRA files for them.

What a family's pipeline does with its denoiser is written down here anew, for the tests to hold the package against.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from tests.tiny_pipelines import draw, text_encoder, tokenizer

SIZE = (6, 10)  # latent pixels
STEPS = 3
PROMPTS, NEGATIVES = ["a red cat", "two dogs"], ["blurry", "dark"]
WIDTH, LENGTH = 16, 5  # of texts given as embeddings


def t5():
    return T5EncoderModel(
        T5Config(vocab_size=514, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu")
    )


def clip_and_t5():
    """Flux's text encoders."""
    return {
        "text_encoder": draw(text_encoder(CLIPTextModel, "sd1"), 2),
        "tokenizer": tokenizer(),
        "text_encoder_2": draw(t5(), 4),
        "tokenizer_2": tokenizer(),
    }


def two_clips_and_t5():
    """Stable Diffusion 3's."""
    return {
        "text_encoder": draw(text_encoder(CLIPTextModelWithProjection, "sd1"), 2),
        "tokenizer": tokenizer(),
        "text_encoder_2": draw(text_encoder(CLIPTextModelWithProjection, "sd1"), 4),
        "tokenizer_2": tokenizer(),
        "text_encoder_3": draw(t5(), 5),
        "tokenizer_3": tokenizer(),
    }


def no_text_encoder():
    return {"text_encoder": None, "tokenizer": None}


def klein_parts():
    """A VAE, too: Flux 2's pipeline asks it for its statistics even where nothing is decoded."""
    small = {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "layers_per_block": 1, "latent_channels": 4}
    return {**no_text_encoder(), "vae": draw(diffusers.AutoencoderKLFlux2(**small), 1)}


def embeddings(seed, width=WIDTH, length=LENGTH):
    return torch.randn(len(PROMPTS), length, width, generator=torch.Generator().manual_seed(seed))


def as_tensors(masks=None, negative=True, width=WIDTH, longer=0):
    """Arguments of a pipeline that give its texts as ``[B, L, D]``, with masks of these names (for both)."""

    def given(guided):
        texts = {"prompt_embeds": embeddings(1, width)}
        if guided and negative:
            texts["negative_prompt_embeds"] = embeddings(2, width, LENGTH + longer)
        if masks:
            names = {"prompt_embeds": masks, "negative_prompt_embeds": f"negative_{masks}"}
            texts |= {names[name]: torch.ones(value.shape[:2], dtype=torch.bool) for name, value in texts.items()}
            for name in names.values():
                if name in texts:
                    texts[name][0, -1] = False
        return texts

    return given


def as_lists(guided):
    """Texts as lists of ``[L, D]``, of differing lengths."""
    texts = {"prompt_embeds": [embeddings(1)[0], embeddings(2)[1, :3]]}
    return texts | ({"negative_prompt_embeds": [embeddings(3)[0, :2], embeddings(4)[1]]} if guided else {})


def as_prompts(guided):
    return {"prompt": PROMPTS, **({"negative_prompt": NEGATIVES} if guided else {})}


@dataclass(frozen=True)
class Family:
    """A pipeline and how it calls its transformer.

    ``guidance``: how unconditional rows come: as the "first" or "last" half of a call's rows, or in a "second" call.
    ``packed``: latents are tokens of 2 x 2 pixels. ``pixels``: of the image, along a side of a latent one.
    """

    pipeline: str
    transformer: Callable[[], nn.Module]
    guidance: str
    texts: Callable[[bool], dict[str, Any]]
    encoders: Callable[[], dict[str, Any]] = no_text_encoder
    packed: bool = False
    scale: str = "guidance_scale"
    unguided: float = 1.0
    pixels: int = 8
    scheduler: Callable[[], Any] = FlowMatchEulerDiscreteScheduler
    options: dict[str, Any] = field(default_factory=dict)


def flux(guidance_embeds):
    return lambda: diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=guidance_embeds,
    )


def sd3():
    return diffusers.SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        pos_embed_max_size=32,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )


def qwen():
    return diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
    )


def z_image():
    return diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[4, 4, 8],
        axes_lens=[128, 32, 32],
    )


def lumina2():
    return diffusers.Lumina2Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        hidden_size=24,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(64, 32, 32),
        cap_feat_dim=WIDTH,
    )


def chroma():
    return diffusers.ChromaTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )


def flux2():
    return diffusers.Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )


def sana():
    return diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=WIDTH,
        sample_size=16,
        patch_size=1,
    )


def pixart():
    return diffusers.PixArtTransformer2DModel(
        sample_size=16,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=16,
        caption_channels=WIDTH,
        norm_type="ada_norm_single",
        use_additional_conditions=False,
    )


def aura():
    return diffusers.AuraFlowTransformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=16,
        pos_embed_max_size=256,
    )


def cogview4():
    return diffusers.CogView4Transformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=WIDTH,
        time_embed_dim=16,
        condition_dim=8,
        pos_embed_max_size=32,
        sample_size=16,
    )


FAMILIES = {
    "flux-dev": Family(
        "FluxPipeline",
        flux(True),
        "second",
        as_prompts,
        clip_and_t5,
        packed=True,
        scale="true_cfg_scale",
        options={"guidance_scale": 3.5, "max_sequence_length": 16},
    ),
    "flux-schnell": Family(
        "FluxPipeline",
        flux(False),
        "second",
        as_prompts,
        clip_and_t5,
        packed=True,
        scale="true_cfg_scale",
        options={"max_sequence_length": 16},
    ),
    "sd3": Family(
        "StableDiffusion3Pipeline",
        sd3,
        "first",
        as_prompts,
        two_clips_and_t5,
        options={"max_sequence_length": 16},
    ),
    "qwen-image": Family(
        "QwenImagePipeline",
        qwen,
        "second",
        as_tensors("prompt_embeds_mask", longer=2),
        packed=True,
        scale="true_cfg_scale",
    ),
    "z-image": Family("ZImagePipeline", z_image, "last", as_lists, unguided=0.0),
    "lumina2": Family("Lumina2Pipeline", lumina2, "second", as_tensors("prompt_attention_mask")),
    "chroma": Family("ChromaPipeline", chroma, "second", as_tensors("prompt_attention_mask"), packed=True),
    "flux2-klein": Family("Flux2KleinPipeline", flux2, "second", as_tensors(), klein_parts, packed=True),
    "sana": Family(
        "SanaPipeline",
        sana,
        "first",
        as_tensors("prompt_attention_mask"),
        scheduler=lambda: DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
        pixels=32,
        options={"use_resolution_binning": False},
    ),
    "pixart-sigma": Family(
        "PixArtSigmaPipeline",
        pixart,
        "first",
        as_tensors("prompt_attention_mask"),
        scheduler=DPMSolverMultistepScheduler,
        options={"use_resolution_binning": False},
    ),
    "auraflow": Family("AuraFlowPipeline", aura, "first", as_tensors("prompt_attention_mask")),
    "cogview4": Family("CogView4Pipeline", cogview4, "second", as_tensors()),
}


def make_pipeline(name, dtype=torch.float32, kind=None, **parts):
    """A family's pipeline, or another ``kind`` of pipeline around its models."""
    family = FAMILIES[name]
    kind = getattr(diffusers, kind or family.pipeline)
    given = {"scheduler": family.scheduler(), "vae": None, "transformer": draw(family.transformer(), 3)}
    pipe = kind(**{**given, **family.encoders(), **parts})
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(dtype)


def pack(latents):
    """``[B, C, H, W]`` as tokens of 2 x 2 pixels, ``[B, H/2 * W/2, C * 4]``."""
    b, c, h, w = latents.shape
    tokens = torch.empty(b, h // 2 * (w // 2), c * 4, dtype=latents.dtype)
    for y in range(h):
        for x in range(w):
            tokens[:, y // 2 * (w // 2) + x // 2, y % 2 * 2 + x % 2 :: 4] = latents[:, :, y, x]
    return tokens


def unpack(tokens, size=SIZE):
    b, _, c = tokens.shape
    h, w = size
    latents = torch.empty(b, c // 4, h, w, dtype=tokens.dtype)
    for y in range(h):
        for x in range(w):
            latents[:, :, y, x] = tokens[:, y // 2 * (w // 2) + x // 2, y % 2 * 2 + x % 2 :: 4]
    return latents


def arguments(name, guided=True, dtype=torch.float32, **others):
    """Of a call of a family's pipeline."""
    family = FAMILIES[name]

    def to(value):
        if isinstance(value, list):
            return [to(each) for each in value]
        return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    latents = torch.randn(2, 4, *SIZE, generator=torch.Generator().manual_seed(0))
    if family.packed:
        tokens = pack(latents)
        latents = tokens if name != "flux2-klein" else tokens.mT.reshape(2, 16, SIZE[0] // 2, SIZE[1] // 2)
    call = {
        family.scale: 3.0 if guided else family.unguided,
        "num_inference_steps": STEPS,
        "height": family.pixels * SIZE[0],
        "width": family.pixels * SIZE[1],
        "latents": latents if name == "z-image" else latents.to(dtype),
        "output_type": "latent",
        **family.options,
        **{key: to(value) for key, value in family.texts(guided).items()},
    }
    if "prompt" not in call and name in ("sana", "pixart-sigma", "auraflow"):
        call["negative_prompt"] = None
    return {**call, **others}


# --- LoRA files -------------------------------------------------------------------------------------------------------

CLIP = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


def touched_layers(pipe, kind):
    """(component, name, layer) of every layer that a LoRA of this kind changes."""
    encoders = [name for name, model in pipe.components.items() if type(model).__name__.startswith("CLIPTextModel")]
    for component in ("transformer", *encoders):
        for name, layer in getattr(pipe, component).named_modules():
            if not isinstance(layer, (nn.Linear, nn.Conv2d)) or getattr(layer, "groups", 1) != 1:
                continue
            in_attention = any(part in name for part in ("attn", "attention"))
            wanted = {
                "everything": component == "transformer",
                "attention": component == "transformer" and in_attention,
                "rest": (component == "transformer" and not in_attention) or name.endswith(CLIP),
            }
            if wanted[kind]:
                yield component, name, layer


def write_lora(path, pipe, kind, seed, rank=2, strength=0.3):
    """A LoRA file in PEFT's layout; returns its path."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for component, name, layer in touched_layers(pipe, kind):
        out, fan_in, *kernel = layer.weight.shape
        down = torch.randn(rank, fan_in, *kernel, generator=generator) * layer.weight[0].numel() ** -0.5
        up = torch.randn(out, rank, *[1] * len(kernel), generator=generator) * strength * rank**-0.5
        if component != "transformer" and not hasattr(getattr(pipe, component), "text_model"):
            name = f"text_model.{name}"  # as files know it, whatever the installed transformers calls it
        state |= {f"{component}.{name}.lora_A.weight": down, f"{component}.{name}.lora_B.weight": up}
    save_file({name: value.contiguous() for name, value in state.items()}, path, metadata={"format": "pt"})
    return path


# --- pipelines that start from images, or are led by them -------------------------------------------------------------


def image_vae(channels=4):
    return draw(
        diffusers.AutoencoderKL(
            block_out_channels=(8, 8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=channels,
            shift_factor=0.1,
        ),
        1,
    )


def qwen_vae():
    small = {"base_dim": 8, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, "temperal_downsample": [False, True, True]}
    means = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    return draw(diffusers.AutoencoderKLQwenImage(z_dim=4, attn_scales=[], **small, **means), 1)


def controlnet(kind, **config):
    """A ControlNet around a transformer's own configuration."""

    def make(transformer):
        names = inspect.signature(getattr(diffusers, kind).__init__).parameters
        shared = {name: value for name, value in transformer.config.items() if name in names}
        return draw(getattr(diffusers, kind)(**{**shared, **config}), 6)

    return make


def to_pil(image):
    return Image.fromarray((255 * image).byte().permute(1, 2, 0).numpy()).resize((80, 64))


@dataclass(frozen=True)
class Variant:
    """Another pipeline around a family's models: with a VAE, perhaps other ``channels`` of the transformer's input and
    a ``controlnet``; its call takes ``images`` (as ``pil``), and no latents where ``noise`` is its own."""

    family: str
    pipeline: str
    images: tuple[str, ...]
    channels: int | None = None
    out_channels: int | None = None
    controlnet: Callable[[nn.Module], nn.Module] | None = None
    vae: Callable[[], nn.Module] = image_vae
    noise: bool = True
    pil: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def make(self):
        transformer = FAMILIES[self.family].transformer()
        if self.channels is not None:
            config = {name: value for name, value in transformer.config.items() if not name.startswith("_")}
            out = self.out_channels or transformer.config.in_channels
            transformer = type(transformer)(**{**config, "in_channels": self.channels, "out_channels": out})
        parts = {"vae": self.vae(), "transformer": draw(transformer, 3)}
        if self.controlnet is not None:
            parts["controlnet"] = self.controlnet(transformer)
        return make_pipeline(self.family, kind=self.pipeline, **parts)

    def arguments(self, pipe):
        takes = inspect.signature(type(pipe).__call__).parameters
        call = {name: value for name, value in arguments(self.family).items() if name in takes}
        size = call["height"], call["width"]
        generator = torch.Generator().manual_seed(5)
        for name in self.images:
            mask = "mask" in name
            image = torch.rand(2, 1 if mask else 3, *size, generator=generator)
            call[name] = (image > 0.5).float() if mask else image
            if self.pil:
                call[name] = to_pil(image[0])
        if self.noise:
            call.pop("latents")
            call["generator"] = [torch.Generator().manual_seed(each) for each in (7, 8)]
        return {**call, **self.options}


CONTROL = {"controlnet_conditioning_scale": 0.7}
VARIANTS = [
    Variant("flux-dev", "FluxImg2ImgPipeline", ("image",)),
    Variant("flux-dev", "FluxInpaintPipeline", ("image", "mask_image")),
    Variant("flux-dev", "FluxFillPipeline", ("image", "mask_image"), channels=16 + 16 + 256),
    Variant("flux-dev", "FluxControlPipeline", ("control_image",), channels=32),
    Variant("flux-dev", "FluxKontextPipeline", ("image",), options={"_auto_resize": False, "max_area": 48 * 80}),
    Variant(
        "flux-dev",
        "FluxControlNetPipeline",
        ("control_image",),
        controlnet=controlnet("FluxControlNetModel"),
        options=CONTROL,
    ),
    Variant("sd3", "StableDiffusion3Img2ImgPipeline", ("image",)),
    Variant("sd3", "StableDiffusion3InpaintPipeline", ("image", "mask_image"), 16, 16, vae=lambda: image_vae(16)),
    Variant(
        "sd3",
        "StableDiffusion3ControlNetPipeline",
        ("control_image",),
        controlnet=controlnet("SD3ControlNetModel", dual_attention_layers=()),
        options=CONTROL,
    ),
    Variant("qwen-image", "QwenImageImg2ImgPipeline", ("image",), vae=qwen_vae),
    Variant("qwen-image", "QwenImageInpaintPipeline", ("image", "mask_image"), vae=qwen_vae),
    Variant(
        "qwen-image",
        "QwenImageControlNetPipeline",
        ("control_image",),
        controlnet=controlnet("QwenImageControlNetModel"),
        vae=qwen_vae,
        options=CONTROL,
    ),
    Variant("z-image", "ZImageImg2ImgPipeline", ("image",)),
    Variant("z-image", "ZImageInpaintPipeline", ("image", "mask_image")),
    Variant("chroma", "ChromaImg2ImgPipeline", ("image",)),
    Variant("flux2-klein", "Flux2KleinPipeline", ("image",), vae=lambda: klein_parts()["vae"], noise=False, pil=True),
]
