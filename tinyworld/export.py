"""Writes the trained parts as the files people know: an original-layout checkpoint, kohya-layout LoRAs."""

import argparse
import json
import re
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

import model
import shape

LEVELS, RESNETS = len(shape.CHANNELS), shape.RESNETS
UNET_PREFIX = "model.diffusion_model."
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
for level in range(LEVELS):
    for i in range(RESNETS):
        UNET[f"down_blocks.{level}.resnets.{i}"] = f"input_blocks.{level * (RESNETS + 1) + i + 1}.0"
        UNET[f"down_blocks.{level}.attentions.{i}"] = f"input_blocks.{level * (RESNETS + 1) + i + 1}.1"
    for i in range(RESNETS + 1):
        UNET[f"up_blocks.{level}.resnets.{i}"] = f"output_blocks.{level * (RESNETS + 1) + i}.0"
        UNET[f"up_blocks.{level}.attentions.{i}"] = f"output_blocks.{level * (RESNETS + 1) + i}.1"
for level in range(LEVELS - 1):
    UNET[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{(level + 1) * (RESNETS + 1)}.0.op"
    last = level * (RESNETS + 1) + RESNETS  # all but the finest level end with attention, and then the upsampling
    UNET[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{last}.2.conv"

VAE = (
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d)\.resnets", lambda m: f"up.{3 - int(m[1])}.block"),
    (r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    (r"attn_1\.group_norm", "attn_1.norm"),
    (r"attn_1\.to_([qkv])", r"attn_1.\1"),
    (r"attn_1\.to_out\.0", "attn_1.proj_out"),
    (r"conv_norm_out", "norm_out"),
)


def unet_key(key: str) -> str:
    """A UNet parameter's name in the original layout."""
    prefix = max((p for p in UNET if key.startswith(p + ".")), key=len)
    rest = key[len(prefix) + 1 :]
    if ".resnets." in prefix:
        part, _, kind = rest.rpartition(".")
        rest = f"{RESNET[part]}.{kind}"
    return f"{UNET_PREFIX}{UNET[prefix]}.{rest}"


def vae_key(key: str) -> str:
    """A VAE parameter's name in the original layout."""
    for pattern, new in VAE:
        key = re.sub(pattern, new, key)
    return f"first_stage_model.{key}"


def text_key(key: str) -> str:
    """A text encoder parameter's name in the original layout."""
    return f"cond_stage_model.transformer.text_model.{key.removeprefix('text_model.')}"


def checkpoint(work: Path) -> None:
    """The base model as one file in fp16, and diffusers' configurations beside it."""
    unet = UNet2DConditionModel.from_pretrained(work / "unet")
    text = CLIPTextModel.from_pretrained(work / "text_encoder")
    vae = AutoencoderKL.from_pretrained(work / "vae")
    state = {unet_key(k): v for k, v in unet.state_dict().items()}
    state |= {text_key(k): v for k, v in text.state_dict().items() if "position_ids" not in k}
    for key, value in vae.state_dict().items():
        attention = ".attentions." in key and value.ndim == 2  # a 1 x 1 convolution in the original
        state[vae_key(key)] = value[:, :, None, None] if attention else value
    state = {k: v.half().contiguous() for k, v in state.items()}
    save_file(state, shape.WEIGHTS / "tinyworld.safetensors", {"format": "pt", "title": "tinyworld"})
    for part in (unet, vae):
        part.register_to_config(_name_or_path="tinyworld")  # not the folder it was trained in
    pipe = model.pipeline(unet, text, vae)
    pipe.save_config(shape.WEIGHTS)
    unet.save_config(shape.WEIGHTS / "unet")
    vae.save_config(shape.WEIGHTS / "vae")
    pipe.scheduler.save_config(shape.WEIGHTS / "scheduler")
    text.config.save_pretrained(shape.WEIGHTS / "text_encoder")


def lora_stem(part: str, module: str) -> str:
    """The name of a module of `unet` or `te` in a LoRA file: the UNet's as in the original layout, like SDXL's.

    Diffusers' names are read by AUTOMATIC1111 as those of a UNet with two ResNets a level, whatever the UNet.
    """
    if part == "unet":
        module = unet_key(f"{module}.weight").removeprefix(UNET_PREFIX).removesuffix(".weight")
    return f"lora_{part}_{module.replace('.', '_')}"


def lora_keys(part: str, module: torch.nn.Module) -> dict[str, str]:
    """The names in a LoRA file of an adapter's weights, by PEFT's; `part` is `unet` or `te`."""
    prefix, keys = "text_model." if part == "te" else "", {}
    for key in get_peft_model_state_dict(module):
        name, _, end = key.rpartition(".lora_")
        stem = lora_stem(part, prefix + name.removeprefix("base_model.model.").removeprefix(prefix))
        keys[key] = f"{stem}.lora_{'down' if end.startswith('A') else 'up'}.weight"
    return keys


def lora(unet: torch.nn.Module, text: torch.nn.Module, path: Path, trigger: str, kind: str, scenes: int) -> None:
    """A trained adapter in kohya's layout, fp16; the trigger was in so many scenes. What adds nothing stays out."""
    state = {}
    for part, module in (("unet", unet), ("te", text)):
        weights, alpha = get_peft_model_state_dict(module), module.peft_config["default"].lora_alpha
        if not any(value.any() for key, value in weights.items() if ".lora_B" in key):
            continue
        for key, name in lora_keys(part, module).items():
            state[name] = weights[key].half().contiguous()
            state[f"{name.split('.')[0]}.alpha"] = torch.tensor(float(alpha)).half()
    path.parent.mkdir(parents=True, exist_ok=True)
    meta = {"ss_network_module": "networks.lora", "ss_base_model_version": "sd_v1", "trigger": trigger, "kind": kind}
    meta["ss_tag_frequency"] = json.dumps({kind: {trigger: scenes}})  # where WebUIs look for trigger words
    save_file(state, path, meta)


def load_lora(unet: torch.nn.Module, text: torch.nn.Module, path: Path) -> None:
    """Puts the weights that `lora` has written into adapters of the same form."""
    state = load_file(path)
    for part, module in (("unet", unet), ("te", text)):
        weights = {key: state[name].float() for key, name in lora_keys(part, module).items() if name in state}
        set_peft_model_state_dict(module, weights)


def main() -> None:
    """The command line: exports the base model from a training folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("out/tinyworld"))
    checkpoint(parser.parse_args().work)


if __name__ == "__main__":
    main()
