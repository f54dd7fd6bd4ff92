"""What a pool costs: a step's time and peak memory against the number of LoRAs in it, with a budget for their matrices.

    python -m benchmarks.pool --latent 8 --counts 5 10 25 --budget 256

Every size runs in a process of its own, whose largest resident set is read at the end: one step that evaluates the
whole pool, in batches as the hosts do it, and one that evaluates only three LoRAs chosen before (`reselect_every`). A
UNet of SD 1.5's size with random weights, LoRAs of rank 16.
"""

import argparse
import json
import resource
import subprocess
import sys
import time

import torch

from benchmarks.memory import MEGA, lora_bytes
from benchmarks.models import CONFIGS, Inputs, random_lora, random_unet, touched_layers
from benchmarks.speed import evaluation
from loratorio_ext.core import Plan
from loratorio_ext.isolation import ROWS_OF_A_POOL

CHOSEN = 3


def measure(model: str, latent: int, count: int, budget: float) -> dict[str, float]:
    """Seconds of a plain step, of one with the whole pool and of one with the chosen; megabytes at the peak above those
    of model and LoRA matrices, and of the matrices."""
    unet = random_unet(model)
    arguments = Inputs(unet, latent).call(2)
    loras = [random_lora(touched_layers(unet), 16) for _ in range(count)]
    predict = evaluation(unet, arguments, loras, ROWS_OF_A_POOL, int(budget * MEGA))

    def evaluate(loras: int) -> None:
        predict([(lora, row) for lora in (Plan.BASE, *range(loras)) for row in range(2)])

    def used() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MEGA

    def seconds(step) -> float:
        started = time.perf_counter()
        step()
        return time.perf_counter() - started

    before = used()
    with torch.inference_mode():
        evaluate(CHOSEN)  # the first call is slower
        plain = seconds(lambda: unet(**arguments))
        whole = seconds(lambda: evaluate(count))
        chosen = seconds(lambda: evaluate(CHOSEN))
    return {
        "plain": plain,
        "whole": whole,
        "chosen": chosen,
        "peak": used() - before,
        "loras": lora_bytes(loras) / MEGA,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=CONFIGS, default="sd15")
    parser.add_argument("--latent", type=int, default=8, help="side of the latent")
    parser.add_argument("--counts", type=int, nargs="+", default=[5, 10, 25], help="LoRAs in the pool")
    parser.add_argument("--budget", type=float, default=256, help="MB for stacked matrices")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.model, options.latent, options.one, options.budget)))
        return
    print("| LoRAs | whole pool, plain steps | 3 chosen, plain steps | peak above, MB | LoRA matrices, MB |")
    print("| --- | --- | --- | --- | --- |")
    for count in options.counts:
        command = [sys.executable, "-m", "benchmarks.pool", *sys.argv[1:], "--one", str(count)]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        steps = [found[name] / found["plain"] for name in ("whole", "chosen")]
        print(f"| {count} | {steps[0]:.1f} | {steps[1]:.1f} | {found['peak']:.0f} | {found['loras']:.0f} |", flush=True)


if __name__ == "__main__":
    main()
