"""UNets of real sizes with random weights, and random LoRAs for them: speed does not care what they paint."""

import re
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from diffusers.utils import logging
from torch import Tensor, nn

from loratorio_ext.isolation import LowRank

ATTENTION = r"attn[12]\.(to_[qkv]|to_out\.0)$|ff\.net\.(0\.proj|2)$|proj_(in|out)$"
"""The layers that trainers touch by default: attention, feed-forward, and the projections around them."""

CONFIGS = {
    "sd15": {
        "sample_size": 64,
        "cross_attention_dim": 768,
        "block_out_channels": (320, 640, 1280, 1280),
        "attention_head_dim": 8,
    },
    "sdxl": {
        "sample_size": 128,
        "cross_attention_dim": 2048,
        "block_out_channels": (320, 640, 1280),
        "attention_head_dim": (5, 10, 20),
        "transformer_layers_per_block": (1, 2, 10),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    },
    "tiny": {
        "sample_size": 16,
        "cross_attention_dim": 64,
        "block_out_channels": (32, 64),
        "attention_head_dim": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    },
}


@dataclass(frozen=True)
class Inputs:
    """What one row of a model call gets, but for the number of rows."""

    unet: UNet2DConditionModel
    latent: int
    """side of the square latent"""

    def call(self, rows: int) -> dict:
        """Keyword arguments of the UNet for a batch of so many rows."""
        config, like = self.unet.config, {"device": self.unet.device, "dtype": self.unet.dtype}
        arguments = {
            "sample": torch.randn(rows, 4, self.latent, self.latent, **like),
            "timestep": torch.full((rows,), 500, device=self.unet.device),
            "encoder_hidden_states": torch.randn(rows, 77, config.cross_attention_dim, **like),
        }
        if config.addition_embed_type == "text_time":
            added = {"text_embeds": torch.randn(rows, 1280, **like), "time_ids": torch.ones(rows, 6, **like)}
            arguments["added_cond_kwargs"] = added
        return arguments


def random_unet(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
    """A UNet of this architecture; on the device "meta" it holds no numbers and costs nothing."""
    logging.set_verbosity_error()  # of a list of modules to keep in float32, which is empty
    with torch.device(device):
        return UNet2DConditionModel(**CONFIGS[name]).to(dtype).eval().requires_grad_(False)


def touched_layers(unet: nn.Module) -> dict[str, nn.Module]:
    """The layers that a LoRA with trainers' defaults touches, by name."""
    return {name: layer for name, layer in unet.named_modules() if re.search(ATTENTION, name)}


def random_lora(layers: dict[str, nn.Module], rank: int) -> dict[str, LowRank]:
    """A LoRA of this rank on these layers; ``down [rank, in, ...]``, ``up [out, rank]``."""

    def matrices(weight: Tensor) -> LowRank:
        like = {"device": weight.device, "dtype": weight.dtype}
        down = torch.randn(rank, *weight.shape[1:], **like) / weight[0].numel() ** 0.5
        return LowRank(down, 0.1 * torch.randn(weight.shape[0], rank, **like), 1.0)

    return {name: matrices(layer.weight) for name, layer in layers.items()}
