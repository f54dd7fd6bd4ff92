"""Where the time of a step goes: PyTorch's own operators, in the plain model, in LoRAtorio and in re-patching.

    python -m benchmarks.profiling --model sd15 --latent 16 --count 3

Times are each operator's own (without what it calls), in percent of the plain model's time for as many rows.
"""

import argparse
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.models import CONFIGS, Inputs, random_lora, random_unet, touched_layers
from benchmarks.speed import loratorio, only_rows, repatching

SHOWN = 14


def own_times(step: Callable[[], object], device: str) -> dict[str, float]:
    """Microseconds that each operator takes by itself in one step, after one that does not count."""
    step()
    cuda = device == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        step()
    return {
        event.key: event.self_device_time_total if cuda else event.self_cpu_time_total
        for event in profiler.key_averages()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=CONFIGS, default="sd15")
    parser.add_argument("--latent", type=int, default=16, help="side of the latent; 64 is 512 pixels")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--count", type=int, default=3, help="number of LoRAs")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    where = {"device": options.device, "dtype": torch.float16 if options.device == "cuda" else torch.float32}
    unet = random_unet(options.model, **where)
    arguments = Inputs(unet, options.latent).call(2)
    loras = [random_lora(touched_layers(unet), options.rank) for _ in range(options.count)]
    batch = only_rows(arguments, [0, 1] * (options.count + 1))
    ways = {
        "plain, as many rows": lambda: unet(**batch),
        "LoRAtorio": loratorio(unet, arguments, loras),
        "re-patching": repatching(unet, arguments, loras),
    }
    with torch.inference_mode():
        times = {name: own_times(way, options.device) for name, way in ways.items()}
    whole = sum(times["plain, as many rows"].values())
    print("| % of the plain model's time |" + "".join(f" {name} |" for name in ways))
    print("| --- |" + " --- |" * len(ways))
    print("| everything |" + "".join(f" {100 * sum(each.values()) / whole:.1f} |" for each in times.values()))
    names = {name for each in times.values() for name in each}
    by_cost = sorted(names, key=lambda name: -max(each.get(name, 0) for each in times.values()))
    for name in by_cost[:SHOWN]:
        print(f"| `{name}` |" + "".join(f" {100 * each.get(name, 0) / whole:.1f} |" for each in times.values()))


if __name__ == "__main__":
    main()
