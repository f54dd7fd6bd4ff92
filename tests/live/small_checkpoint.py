"""A random Stable Diffusion 1.5 checkpoint as small as hosts accept that tell a model by its tensors' shapes.

    python tests/live/small_checkpoint.py --out models/Stable-diffusion

Forge and its relatives take a UNet for SD 1.5 when its first convolution makes 320 channels and its cross-attention
reads 768 features; how deep it is they read from the file: here two levels with one res block each. Text encoder and
VAE must have their usual size. 0.5 GB in half precision; weights depend on the seed alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

CHANNELS, CONTEXT, TIME, VOCABULARY = 320, 768, 1280, 49408
LEVELS = 2
UNET = "model.diffusion_model."
TEXT = "cond_stage_model.transformer.text_model."
VAE = "first_stage_model."

Shapes = dict[str, tuple[int, ...]]


def conv(name: str, out: int, channels: int, kernel: int = 3) -> Shapes:
    return {f"{name}.weight": (out, channels, kernel, kernel), f"{name}.bias": (out,)}


def linear(name: str, out: int, features: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (out, features)} | ({f"{name}.bias": (out,)} if bias else {})


def norm(name: str, channels: int) -> Shapes:
    return {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}


def resnet(name: str, channels: int, out: int) -> Shapes:
    shapes = norm(f"{name}.in_layers.0", channels) | conv(f"{name}.in_layers.2", out, channels)
    shapes |= linear(f"{name}.emb_layers.1", out, TIME)
    shapes |= norm(f"{name}.out_layers.0", out) | conv(f"{name}.out_layers.3", out, out)
    return shapes if channels == out else shapes | conv(f"{name}.skip_connection", out, channels, 1)


def transformer(name: str) -> Shapes:
    n, block = CHANNELS, f"{name}.transformer_blocks.0"
    shapes = norm(f"{name}.norm", n) | conv(f"{name}.proj_in", n, n, 1) | conv(f"{name}.proj_out", n, n, 1)
    for attention, width in (("attn1", n), ("attn2", CONTEXT)):
        shapes |= linear(f"{block}.{attention}.to_q", n, n, False) | linear(f"{block}.{attention}.to_out.0", n, n)
        shapes |= linear(f"{block}.{attention}.to_k", n, width, False)
        shapes |= linear(f"{block}.{attention}.to_v", n, width, False)
    shapes |= linear(f"{block}.ff.net.0.proj", 8 * n, n) | linear(f"{block}.ff.net.2", n, 4 * n)
    for number in (1, 2, 3):
        shapes |= norm(f"{block}.norm{number}", n)
    return shapes


def unet() -> Shapes:
    """Equally wide levels, an attention after every res block."""
    n = CHANNELS
    shapes = linear("time_embed.0", TIME, n) | linear("time_embed.2", TIME, TIME) | conv("input_blocks.0.0", n, 4)
    for level in range(LEVELS):
        block = f"input_blocks.{1 + 2 * level}"
        shapes |= resnet(f"{block}.0", n, n) | transformer(f"{block}.1")
        if level < LEVELS - 1:
            shapes |= conv(f"input_blocks.{2 + 2 * level}.0.op", n, n)
    shapes |= resnet("middle_block.0", n, n) | transformer("middle_block.1") | resnet("middle_block.2", n, n)
    for number in range(2 * LEVELS):
        block = f"output_blocks.{number}"
        shapes |= resnet(f"{block}.0", 2 * n, n) | transformer(f"{block}.1")
        if number % 2 and number < 2 * LEVELS - 1:
            shapes |= conv(f"{block}.2.conv", n, n)
    return shapes | norm("out.0", n) | conv("out.2", 4, n)


def text_encoder() -> Shapes:
    n = CONTEXT
    shapes = {"embeddings.token_embedding.weight": (VOCABULARY, n), "embeddings.position_embedding.weight": (77, n)}
    for number in range(12):
        layer = f"encoder.layers.{number}"
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= linear(f"{layer}.self_attn.{projection}", n, n)
        shapes |= linear(f"{layer}.mlp.fc1", 4 * n, n) | linear(f"{layer}.mlp.fc2", n, 4 * n)
        shapes |= norm(f"{layer}.layer_norm1", n) | norm(f"{layer}.layer_norm2", n)
    return shapes | norm("final_layer_norm", n)


def vae_resnet(name: str, channels: int, out: int) -> Shapes:
    shapes = norm(f"{name}.norm1", channels) | conv(f"{name}.conv1", out, channels)
    shapes |= norm(f"{name}.norm2", out) | conv(f"{name}.conv2", out, out)
    return shapes if channels == out else shapes | conv(f"{name}.nin_shortcut", out, channels, 1)


def vae_middle(name: str, n: int) -> Shapes:
    shapes = vae_resnet(f"{name}.mid.block_1", n, n) | vae_resnet(f"{name}.mid.block_2", n, n)
    shapes |= norm(f"{name}.mid.attn_1.norm", n)
    for part in ("q", "k", "v", "proj_out"):
        shapes |= conv(f"{name}.mid.attn_1.{part}", n, n, 1)
    return shapes


def vae() -> Shapes:
    widths = (128, 256, 512, 512)
    shapes = conv("quant_conv", 8, 8, 1) | conv("post_quant_conv", 4, 4, 1)
    shapes |= conv("encoder.conv_in", widths[0], 3) | vae_middle("encoder", widths[-1])
    shapes |= norm("encoder.norm_out", widths[-1]) | conv("encoder.conv_out", 8, widths[-1])
    channels = widths[0]
    for level, width in enumerate(widths):
        for block in range(2):
            shapes |= vae_resnet(f"encoder.down.{level}.block.{block}", channels, width)
            channels = width
        if level < len(widths) - 1:
            shapes |= conv(f"encoder.down.{level}.downsample.conv", width, width)
    shapes |= conv("decoder.conv_in", widths[-1], 4) | vae_middle("decoder", widths[-1])
    for level, width in reversed(list(enumerate(widths))):
        for block in range(3):
            shapes |= vae_resnet(f"decoder.up.{level}.block.{block}", channels, width)
            channels = width
        if level:
            shapes |= conv(f"decoder.up.{level}.upsample.conv", width, width)
    return shapes | norm("decoder.norm_out", widths[0]) | conv("decoder.conv_out", 3, widths[0])


def draw(shapes: Shapes, generator: torch.Generator, gains: Mapping[str, float]) -> dict[str, Tensor]:
    """Weights of gain 0.7, or that of ``gains`` whose key is in the name; norms near one, small biases."""
    tensors = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            tensors[name] = 0.1 * noise + (1.0 if name.endswith("weight") else 0.0)
        else:
            gain = next((gain for part, gain in gains.items() if part in name), 0.7)
            tensors[name] = noise * gain / prod(shape[1:]) ** 0.5
    return tensors


def let_noise_through(tensors: dict[str, Tensor]) -> None:
    """A straight path, so that the predicted noise holds the noise.

    The first convolution puts the input on four channels and its negative on four more, the last block's shortcut
    hands them on, and the last layer takes ``silu(z) - silu(-z) = z``.
    """
    eye = torch.eye(4)
    first, last = tensors["input_blocks.0.0.weight"], tensors["out.2.weight"]
    shortcut = f"output_blocks.{2 * LEVELS - 1}.0.skip_connection"
    first[:8], tensors["input_blocks.0.0.bias"][:8] = 0, 0
    first[:4, :, 1, 1], first[4:8, :, 1, 1] = eye, -eye
    tensors[f"{shortcut}.weight"][:8], tensors[f"{shortcut}.bias"][:8] = 0, 0
    tensors[f"{shortcut}.weight"][:8, CHANNELS : CHANNELS + 8, 0, 0] = 3 * torch.eye(8)
    last[:, :8] = 0
    last[:, :4, 1, 1], last[:, 4:8, 1, 1] = 0.8 * eye, -0.8 * eye


def write_small_checkpoint(path: Path, seed: int = 0) -> Path:
    """Write the checkpoint."""
    generator = torch.Generator().manual_seed(seed)
    diffusion = draw(unet(), generator, {"attn2.to_out": 2.0, "attn2.to_q": 2.0})
    let_noise_through(diffusion)
    text = draw(text_encoder(), generator, {"token_embedding": 0.7 * CONTEXT**0.5})
    text["final_layer_norm.bias"] += 0.3
    gains = {"decoder.conv_out": 0.6, "post_quant": 1.0, "encoder.conv_out": 0.5}
    parts = {UNET: diffusion, TEXT: text, VAE: draw(vae(), generator, gains)}
    save_file({prefix + name: each.half() for prefix, part in parts.items() for name, each in part.items()}, path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(write_small_checkpoint(arguments.out / "small-sd15.safetensors", arguments.seed))


if __name__ == "__main__":
    main()
