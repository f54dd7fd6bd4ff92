"""Peak memory of one denoising step: the plain host, and LoRAtorio with all rows in one batch or in smaller ones.

    python -m benchmarks.memory --model sd15 --latent 64 --count 3

Every way runs in a process of its own, whose largest resident set is read at the end; on a GPU (``--device cuda``)
PyTorch's own count of allocated bytes. Random weights; LoRAs of rank 16.
"""

import argparse
import json
import resource
import subprocess
import sys

import torch

from benchmarks.models import CONFIGS, Inputs, random_lora, random_unet, touched_layers
from benchmarks.speed import loratorio

WAYS: dict[str, int | None] = {
    "plain step": 0,
    "LoRAtorio, all rows in one batch": None,
    "LoRAtorio, 2 rows a batch": 2,
    "LoRAtorio, 1 row a batch": 1,
}
"""The largest batch of rows; 0: no LoRA at all."""

MEGA = 1e6


def lora_bytes(loras: list) -> int:
    """What the matrices of all LoRAs take."""
    return sum(part.numel() * part.element_size() for lora in loras for b in lora.values() for part in (b.down, b.up))


def peak(way: str, model: str, latent: int, count: int, device: str) -> dict[str, float]:
    """Megabytes at the peak of one step, above those of the model and its LoRAs alone, and of the LoRAs' matrices."""
    where = {"device": device, "dtype": torch.float16 if device == "cuda" else torch.float32}
    unet = random_unet(model, **where)
    arguments = Inputs(unet, latent).call(2)
    limit = WAYS[way]
    loras = [random_lora(touched_layers(unet), 16) for _ in range(count)]

    def used() -> float:
        if device == "cuda":
            return torch.cuda.max_memory_allocated() / MEGA
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MEGA

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = used()
    with torch.inference_mode():
        if limit == 0:
            unet(**arguments)
        else:
            loratorio(unet, arguments, loras, limit=limit)()
    return {"step": used() - before, "matrices": lora_bytes(loras) / MEGA}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=CONFIGS, default="sd15")
    parser.add_argument("--latent", type=int, default=32, help="side of the latent; 64 is 512 pixels")
    parser.add_argument("--count", type=int, default=3, help="number of LoRAs")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    given = (options.model, options.latent, options.count, options.device)
    if options.way:
        print(json.dumps(peak(options.way, *given)))
        return
    print(f"| MB, {options.count} LoRAs | step | LoRA matrices |\n| --- | --- | --- |")
    for way in WAYS:
        command = [sys.executable, "-m", "benchmarks.memory", *sys.argv[1:], "--way", way]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        print(f"| {way} | {found['step']:.0f} | {found['matrices']:.0f} |", flush=True)


if __name__ == "__main__":
    main()
