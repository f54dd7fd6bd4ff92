"""Tiny random ControlNet models for a tiny checkpoint, and a blind detector for ADetailer.

Weights depend on the checkpoint alone. The detector is written by the host's Python, which has ultralytics::

    HOST/venv/bin/python tests/live/neighbours/control_models.py models/adetailer/blind.pt
"""

import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

UNET = "model.diffusion_model."
ENCODER = ("time_embed.", "input_blocks.", "middle_block.")
HINT_CHANNELS = (3, 16, 16, 32, 32, 96, 96, 256)
"""Channels through the block that reads the picture; the model's own width comes last."""

PIXELS = 3 * 8 * 8
"""What a T2I adapter sees at one place of the latent: the pixels below it."""

DETECTOR = "blind.pt"


def convolution(name: str, out: int, channels: int, size: int, gain: float = 1.0) -> dict[str, Tensor]:
    """Random weight and bias of a convolution; they depend on name and shape alone."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    weight = torch.randn(out, channels, size, size, generator=generator) * gain / (channels * size**2) ** 0.5
    return {f"{name}.weight": weight, f"{name}.bias": 0.1 * gain * torch.randn(out, generator=generator)}


def channels_of_blocks(encoder: dict[str, Tensor]) -> Iterator[int]:
    """Channels that each of the encoder's input blocks hands on."""
    number = 0
    while block := [key for key in encoder if key.startswith(f"input_blocks.{number}.0.")]:
        last = next((key for key in block if key.endswith("out_layers.3.weight")), None)
        last = last or next(key for key in block if key.endswith("weight"))
        yield encoder[last].shape[0]
        number += 1


def controlnet(checkpoint: Path, gain: float = 0.3) -> dict[str, Tensor]:
    """The UNet's encoder as it is, and random convolutions where training starts from zeros."""
    weights = load_file(checkpoint)
    encoder = {key.removeprefix(UNET): value for key, value in weights.items() if key.startswith(UNET)}
    encoder = {key: value for key, value in encoder.items() if key.startswith(ENCODER)}
    widths = list(channels_of_blocks(encoder))
    ours = {}
    for number, width in enumerate(widths):
        ours |= convolution(f"zero_convs.{number}.0", width, width, 1, gain)
    ours |= convolution("middle_block_out.0", widths[-1], widths[-1], 1, gain)
    for number, (channels, out) in enumerate(zip(HINT_CHANNELS, (*HINT_CHANNELS[1:], widths[0]))):
        ours |= convolution(f"input_hint_block.{2 * number}", out, channels, 3, gain=2.0)
    return {f"control_model.{key}": value for key, value in (encoder | ours).items()}


def control_lora(checkpoint: Path, rank: int = 4) -> dict[str, Tensor]:
    """A ControlNet whose encoder is the UNet's own, plus a low-rank product at its convolutions."""
    found = {}
    for name, weight in controlnet(checkpoint).items():
        name = name.removeprefix("control_model.")
        if not name.startswith(ENCODER) or weight.ndim == 1:
            found[name] = weight
        elif weight.ndim == 4:
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            layer, inner = name.removesuffix(".weight"), weight[0].numel()
            found[f"{layer}.up"] = torch.randn(len(weight), rank, 1, 1, generator=generator) * 0.1
            found[f"{layer}.down"] = torch.randn(rank, *weight.shape[1:], generator=generator) / inner**0.5
    return found | {"lora_controlnet": torch.zeros(1)}


def t2i_adapter(width: int, gain: float = 0.5) -> dict[str, Tensor]:
    """Two blocks a level, of the widths 1, 2, 4 and 4 times ``width``; depends on the picture alone."""
    widths = [width, 2 * width, 4 * width, 4 * width]
    weights = convolution("conv_in", width, PIXELS, 3, gain)
    for level, out in enumerate(widths):
        for number in (2 * level, 2 * level + 1):
            channels = widths[max(level - 1, 0)] if number % 2 == 0 else out
            weights |= convolution(f"body.{number}.block1", out, out, 3) | convolution(
                f"body.{number}.block2", out, out, 1
            )
            if channels != out:
                weights |= convolution(f"body.{number}.in_conv", out, channels, 1)
    return weights


def write_control_models(checkpoint: Path, folder: Path) -> None:
    """``tiny_control``, ``tiny_shuffle`` (the same: by its name ControlNet lets it act globally), ``tiny_adapter``,
    ``tiny_control_lora``."""
    folder.mkdir(parents=True, exist_ok=True)
    network = controlnet(checkpoint)
    for name in ("tiny_control", "tiny_shuffle"):
        save_file(network, folder / f"{name}.safetensors")
    width = network["control_model.input_blocks.0.0.weight"].shape[0]
    save_file(t2i_adapter(width), folder / "tiny_adapter.safetensors")
    save_file(control_lora(checkpoint), folder / "tiny_control_lora.safetensors")


def write_detector(path: Path) -> None:
    """A detector that finds the same boxes in every image, at confidence 0: its last layers see nothing.

    One with random weights throughout would find others as soon as one pixel is rounded the other way.
    """
    from ultralytics import YOLO

    torch.manual_seed(0)
    detector = YOLO("yolov8n.yaml")
    head = detector.model.model[-1]
    for branch in (*head.cv2, *head.cv3):
        torch.nn.init.zeros_(branch[-1].weight)
    path.parent.mkdir(parents=True, exist_ok=True)
    detector.save(path)


if __name__ == "__main__":
    torch.set_num_threads(1)
    write_detector(Path(sys.argv[1]))
