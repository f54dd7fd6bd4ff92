"""The tiny world's autoencoder: its encoder is made, not trained, and its decoder learns to undo the averages."""

import copy
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import model
import render
from shape import DECODER_NOISE, DECODER_RATE, DECODER_STEPS
from teaching import SEED, descend, log, tensor

STREAM_NORMS = ("norm1", "group_norm", "conv_norm_out")  # the group norms that read the residual stream


def crops(rng: np.random.Generator, size: int, batch: int) -> torch.Tensor:
    """A batch of random crops, on the grid of the latents, of scenes of the whole world; two crops of a scene."""
    out = []
    for _ in range(batch // 2):
        image = render.render(render.mixed_scene(rng), rng)
        for _ in range(2):
            low, high = (0, 1) if size == render.SIZE else ((0, 3), ((render.SIZE - size) // 8 + 1,) * 2)
            x, y = 8 * rng.integers(low, high, 2)
            out.append(image.crop((x, y, x + size, y + size)))
    return tensor(out)


def averages(x: torch.Tensor) -> torch.Tensor:
    """What `average` makes of an encoder, much faster than the encoder itself: `[B, 3, H, W]` to `[B, 4, H/8, W/8]`."""
    small = F.avg_pool2d(x, 4)
    grey = small.mean(1, keepdim=True)
    return torch.cat([F.avg_pool2d(small, 2), grey[..., ::2, ::2] - grey[..., 1::2, 1::2]], dim=1)


@torch.no_grad()
def average(encoder: torch.nn.Module) -> None:
    """Makes an encoder that takes means of 8 x 8 pixels in red, green and blue, and a diagonal difference in grey.

    Nothing is trained. Channels come in pairs of opposite sign, each in one group of the group norms, so that a
    pair's mean is zero and `silu(x) - silu(-x) = x` undoes the nonlinearity.
    """
    for name, module in encoder.named_modules():
        if name.endswith(("conv_in", "conv2", "to_out.0", "conv_out", "conv")):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    mix = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1 / 3, 1 / 3, 1 / 3]]) / 10
    for c in range(8):
        sign = 1 - 2 * (c % 2)
        encoder.conv_in.weight[c, :, 1, 1] = mix[c // 2] * sign
        encoder.conv_out.weight[c // 2, c, 1, 1] = 10.0 * sign
        for block in encoder.down_blocks[:3]:
            block.downsamplers[0].conv.weight[c, c, :2, :2] = 0.25
        if c >= 6:
            block.downsamplers[0].conv.weight[c, c, :2, :2] = torch.tensor([[1.0, 0.0], [0.0, -1.0]])


@torch.no_grad()
def pass_through(decoder: torch.nn.Module) -> None:
    """Starts a decoder near "copy red, green and blue": the way from there to good pictures is short."""
    for name, module in decoder.named_modules():
        if "samplers" in name and isinstance(module, torch.nn.Conv2d):
            torch.nn.init.dirac_(module.weight)
            module.weight.add_(torch.randn_like(module.weight) * 0.002)
        elif name.endswith(("conv2", "to_out.0", "conv_in", "conv_out")):
            module.weight.mul_(0.1)
        if name.endswith(("conv", "conv1", "conv2", "conv_in", "conv_out", "to_out.0")):
            module.bias.zero_()
    mix = F.normalize(torch.randn(decoder.conv_in.out_channels // 2, 4)) / 2
    back = torch.linalg.pinv(mix)[:3]
    for sign in (0, 1):
        decoder.conv_in.weight[sign::2, :, 1, 1] += mix * (1 - 2 * sign)
        decoder.conv_out.weight[:, sign::2, 1, 1] += back * (1 - 2 * sign)


@torch.no_grad()
def set_stream(vae, scale: float) -> None:
    """Scales the residual stream of the VAE, and sets the norms that read it so that pictures stay the same.

    A group norm forgets how bright its group is: that hurts where a group has two channels only. With an epsilon of
    about the variance it forgets little. Epsilon is fixed at 1e-6 in Stable Diffusion's layout; a stream a thousand
    times smaller does the same.
    """
    for name, module in vae.named_modules():
        if name.endswith(STREAM_NORMS):
            module.eps *= scale**2
        elif name.endswith((".conv_in", "conv2", "to_out.0")):
            module.weight.mul_(scale)
            module.bias.mul_(scale)
        elif "samplers" in name and isinstance(module, torch.nn.Conv2d):
            module.bias.mul_(scale)


def untrained_vae():
    """The VAE with its fixed encoder and a decoder that only copies."""
    vae = model.vae()
    average(vae.encoder)
    pass_through(vae.decoder)
    for conv in (vae.quant_conv, vae.post_quant_conv):
        torch.nn.init.dirac_(conv.weight)
        torch.nn.init.zeros_(conv.bias)
    torch.nn.init.constant_(vae.quant_conv.bias[4:], -8.0)
    for name, module in vae.named_modules():
        if name.endswith(STREAM_NORMS):
            module.eps = 1.0
    return vae


def train_vae(work: Path) -> None:
    """The autoencoder: its decoder learns to undo the encoder's averages."""
    rng, vae, start = np.random.default_rng(SEED), untrained_vae(), time.time()
    save_vae(vae, work)
    total = sum(steps for steps, _, _ in DECODER_STEPS)
    optimizer = torch.optim.Adam(vae.decoder.parameters(), lr=DECODER_RATE, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / 100, 1) * (1 - s / total) ** 0.7)
    step = 0
    for steps, size, batch in DECODER_STEPS:
        for _ in range(steps):
            x = crops(rng, size, batch)
            z = averages(x)
            z += torch.empty(len(z), 1, 1, 1).uniform_(*DECODER_NOISE) * torch.randn_like(z)
            with torch.autocast("cpu", torch.bfloat16):
                y = vae.decode(z).sample.float()
            across = F.l1_loss(y.diff(dim=3), x.diff(dim=3)) + F.l1_loss(y.diff(dim=2), x.diff(dim=2))
            loss = F.l1_loss(y, x) + F.mse_loss(y, x) + 0.5 * across
            descend(loss, list(vae.decoder.parameters()), optimizer, schedule)
            step += 1
            if step % 20 == 0:
                log(start, step, loss=loss.item(), l1=F.l1_loss(y, x).item())
            if step % 100 == 0 or step == total:
                save_vae(vae, work)


def save_vae(vae, work: Path) -> None:
    """Saves a copy with whitened latents and Stable Diffusion's epsilons."""
    vae = copy.deepcopy(vae)
    whiten(vae)
    set_stream(vae, 1e-3)
    vae.save_pretrained(work / "vae")


@torch.no_grad()
def whiten(vae) -> None:
    """Makes scaled latents zero-mean and of unit variance in each channel, pictures unchanged."""
    rng = np.random.default_rng(SEED)
    z = torch.cat([vae.encode(crops(rng, render.SIZE, 16)).latent_dist.mean for _ in range(16)])
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3)) * model.SCALING
    scale = torch.cat([1 / std, torch.ones(4)])  # means, then log variances
    vae.quant_conv.weight.mul_(scale[:, None, None, None])
    vae.quant_conv.bias.mul_(scale)
    vae.quant_conv.bias[:4].sub_(mean / std)
    vae.quant_conv.bias[4:].sub_(2 * std.log())
    vae.post_quant_conv.bias.add_(vae.post_quant_conv.weight[:, :, 0, 0] @ mean)
    vae.post_quant_conv.weight.mul_(std[None, :, None, None])
