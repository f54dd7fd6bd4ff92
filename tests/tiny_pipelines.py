"""Tiny random diffusers pipelines of every family, and LoRA files for them in every layout."""

import json
import zlib
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

FAMILIES = ("sd1", "sd2v", "sdxl")
WIDTHS = {"sd1": 16, "sd2v": 24, "sdxl": 16}  # of a family's text encoders
BOS, EOS = 512, 513


@cache
def tokenizer():
    """Spells out words letter by letter: the 256 bytes, those that end a word, and the two special tokens."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    letters = [chr(code) for code in (*shown, *(256 + index for index in range(len(hidden))))]
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder = Path(mkdtemp())
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def text_encoder(kind, family):
    width = WIDTHS[family]
    return kind(
        CLIPTextConfig(
            vocab_size=514,
            hidden_size=width,
            intermediate_size=2 * width,
            projection_dim=width,
            num_hidden_layers=2,
            num_attention_heads=2,
            bos_token_id=BOS,
            eos_token_id=EOS,
            pad_token_id=EOS,
        )
    )


def unet(family):
    width = WIDTHS[family]
    xl = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + width,
        "transformer_layers_per_block": (1, 2),
    }
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=2 * width if family == "sdxl" else width,
        attention_head_dim=(2, 4) if family != "sd1" else 2,
        use_linear_projection=family != "sd1",
        **(xl if family == "sdxl" else {}),
    )


def vae():
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
    )


def draw(model, seed):
    """Every parameter anew, none of them zero; the result depends on names, shapes and the seed alone."""
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(seed * 2**32 + zlib.crc32(name.encode()))
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            value = 0.1 * noise + (1 if "norm" in name and name.endswith("weight") else 0)
        else:
            value = noise * (0.5 if "embedding" in name else parameter[0].numel() ** -0.5)
        parameter.data.copy_(value)
    return model.eval().requires_grad_(False)


def make_pipeline(family, dtype=torch.float32):
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction" if family == "sd2v" else "epsilon",
    )
    parts = {
        "vae": draw(vae(), 1),
        "text_encoder": draw(text_encoder(CLIPTextModel, family), 2),
        "tokenizer": tokenizer(),
        "unet": draw(unet(family), 3),
        "scheduler": scheduler,
    }
    if family == "sdxl":
        second = {
            "text_encoder_2": draw(text_encoder(CLIPTextModelWithProjection, family), 4),
            "tokenizer_2": tokenizer(),
        }
        pipe = StableDiffusionXLPipeline(**parts, **second, add_watermarker=False)
    else:
        pipe = StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(dtype)


def state(pipe):
    """Everything that composition might leave behind: weights, hooks and attributes."""
    models = [model for model in vars(pipe).values() if isinstance(model, torch.nn.Module)]
    weights = {(i, name): value.clone() for i, model in enumerate(models) for name, value in model.state_dict().items()}
    hooks = [
        (i, name, len(module._forward_hooks), len(module._forward_pre_hooks), sorted(vars(module)))
        for i, model in enumerate(models)
        for name, module in model.named_modules()
    ]
    return weights, hooks, sorted(vars(pipe)), dict(pipe.scheduler.config), type(pipe)


def assert_untouched(pipe, before):
    after = state(pipe)
    assert after[1:] == before[1:]
    assert all(torch.equal(value, after[0][name]) for name, value in before[0].items())


# --- LoRA files -------------------------------------------------------------------------------------------------------

KOHYA_PREFIXES = {
    False: {"unet": "lora_unet", "text_encoder": "lora_te"},
    True: {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"},
}

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
MLP = ("ff.net.0.proj", "ff.net.2")
CONVOLUTION = ("conv1", "conv2", "conv_shortcut", "proj_in", "proj_out", "downsamplers.0.conv", "conv_in", "conv_out")
TEXT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")

KINDS = {
    "attention": {"unet": ATTENTION},
    "everything": {"unet": (*ATTENTION, *MLP, *CONVOLUTION, "time_emb_proj"), "text": TEXT},
    "convolutions": {"unet": CONVOLUTION},
    "text": {"text": TEXT},
}
"""Which layers a LoRA changes, by the ends of their names."""


def touched_layers(pipe, kind):
    """(component, name, layer) of every layer that a LoRA of this kind changes."""
    for component in ("unet", "text_encoder", "text_encoder_2"):
        ends = KINDS[kind].get("unet" if component == "unet" else "text", ())
        model = getattr(pipe, component, None)
        for name, layer in model.named_modules() if model is not None else ():
            if isinstance(layer, (nn.Linear, nn.Conv2d)) and any(f".{name}".endswith(f".{end}") for end in ends):
                yield component, name, layer


def draw_lora(pipe, kind, seed, rank=3, strength=0.5):
    """{(component, name): (down, up)}, each changing its layer by ``strength`` of a random layer's size."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {}
    for component, name, layer in touched_layers(pipe, kind):
        out, fan_in, *kernel = layer.weight.shape
        down = torch.randn(rank, fan_in, *kernel, generator=generator) * layer.weight[0].numel() ** -0.5
        up = torch.randn(out, rank, *[1] * len(kernel), generator=generator) * strength * rank**-0.5
        drawn[component, name] = (down, up)
    return drawn


def text_name(pipe, component, name):
    """A text encoder's layer by the name that files know, whatever the installed transformers calls it."""
    flat = component != "unet" and not hasattr(getattr(pipe, component), "text_model")
    return f"text_model.{name}" if flat else name


def kohya(pipe, drawn, alpha=None):
    state = {}
    for (component, name), (down, up) in drawn.items():
        prefix = KOHYA_PREFIXES[hasattr(pipe, "text_encoder_2")][component]
        key = f"{prefix}_{text_name(pipe, component, name).replace('.', '_')}"
        state |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        if alpha is not None:
            state[f"{key}.alpha"] = torch.tensor(float(alpha))
    return state


def diffusers_layout(pipe, drawn, alpha=None):
    state = {}
    for (component, name), (down, up) in drawn.items():
        key = f"{component}.{text_name(pipe, component, name)}.{'lora' if component == 'unet' else 'lora_linear_layer'}"
        state |= {f"{key}.down.weight": down, f"{key}.up.weight": up}
    return state


def peft(pipe, drawn, alpha=None):
    state = {}
    for (component, name), (down, up) in drawn.items():
        key = f"{component}.{text_name(pipe, component, name)}"
        state |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
    return state


LAYOUTS = {"kohya": kohya, "diffusers": diffusers_layout, "peft": peft}


def write_lora(path, pipe, kind, seed, layout="kohya", alpha=None, **drawing):
    """A LoRA file; returns its path."""
    state = LAYOUTS[layout](pipe, draw_lora(pipe, kind, seed, **drawing), alpha)
    save_file({name: value.contiguous() for name, value in state.items()}, path, metadata={"format": "pt"})
    return path
