"""The floor under every timing: what N LoRAs must cost by arithmetic, in operations and in bytes of weights.

    python -m benchmarks.floor

Counted on models without numbers (PyTorch's "meta" device), so that it runs anywhere in a minute.
"""

from collections.abc import Iterable
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.models import Inputs, random_lora, random_unet, touched_layers
from loratorio_ext.isolation import Isolation, LowRank

LATENTS = {"sd15": 64, "sdxl": 128}
RANKS = (16, 128)
COUNTS = range(1, 9)


def flops_of_row(inputs: Inputs, lora: dict[str, LowRank] | None = None) -> int:
    """Floating-point operations of one row of a UNet call, with a LoRA's branches or without."""
    layers = dict(inputs.unet.named_modules())
    branches = Isolation(layers, [lora]).rows([0]) if lora else nullcontext()
    with branches, FlopCounterMode(display=False) as counter, torch.no_grad():
        inputs.unet(**inputs.call(1))
    return counter.get_total_flops()


def half_precision_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of these tensors at two bytes a number."""
    return 2 * sum(tensor.numel() for tensor in tensors)


def floor(row: int, branches: int, n: int, base_only_guidance: bool = False) -> float:
    """Operations of a LoRAtorio step in those of the host's plain step (two rows)."""
    isolated = n * (1 if base_only_guidance else 2)
    return (2 * row + isolated * (row + branches)) / (2 * row)


def main() -> None:
    print("| model | rank | row, TFLOP | branches, % of a row | UNet, MB | LoRA, MB |", *(f"N = {n} |" for n in COUNTS))
    print("| --- | --- | --- | --- | --- | --- |" + " --- |" * len(COUNTS))
    for name, latent in LATENTS.items():
        unet = random_unet(name, device="meta")
        inputs = Inputs(unet, latent)
        row = flops_of_row(inputs)
        for rank in RANKS:
            lora = random_lora(touched_layers(unet), rank)
            branches = flops_of_row(inputs, lora) - row
            matrices = half_precision_bytes(part for branch in lora.values() for part in (branch.down, branch.up))
            cells = [f"{row / 1e12:.2f}", f"{100 * branches / row:.1f}"]
            cells += [f"{half_precision_bytes(unet.parameters()) / 1e6:.0f}", f"{matrices / 1e6:.0f}"]
            cells += [f"{floor(row, branches, n):.2f} ({floor(row, branches, n, True):.2f})" for n in COUNTS]
            print(f"| {name} at {latent}x{latent} | {rank} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
