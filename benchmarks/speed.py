"""Seconds of one denoising step, side by side: the plain host, LoRAtorio, and other ways to get isolated predictions.

    python -m benchmarks.speed --model sd15 --latent 16 --counts 1 2 3 5 --rounds 5

Rounds are interleaved, so that a machine whose speed drifts slows all ways alike; medians and the spread over rounds
are reported, and every figure is also given in plain steps (one UNet call with a cond and an uncond row).
"""

import argparse
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import diffusers
import peft
import torch
from peft import LoraConfig
from torch import Tensor, nn

from benchmarks.floor import floor, flops_of_row
from benchmarks.models import ATTENTION, CONFIGS, Inputs, random_lora, random_unet, touched_layers
from loratorio_ext.core import InTurn, LoRAtorio, Predictions, method_from
from loratorio_ext.isolation import IsolatedCalls, Isolation, LowRank
from loratorio_ext.settings import Settings

METHOD = method_from(Settings())
Way = Callable[[], None]


def repeated(arguments: dict, times: int) -> dict:
    """The rows of a UNet call, so many times over."""

    def repeat(value):
        if isinstance(value, dict):
            return repeated(value, times)
        return value.repeat(times, *[1] * (value.ndim - 1))

    return {name: repeat(value) for name, value in arguments.items()}


def only_rows(arguments: dict, rows: slice) -> dict:
    """Some rows of a UNet call."""
    return {n: only_rows(v, rows) if isinstance(v, dict) else v[rows] for n, v in arguments.items()}


def combine(base: Tensor, isolated: Tensor, method=METHOD) -> Tensor:
    """The composition arithmetic of one step: ``base [2, C, H, W]``, ``isolated [N, 1 or 2, C, H, W]``."""
    uncond = isolated[:, 1:] if isolated.shape[1] > 1 else None
    cond = isolated[:, :1]
    return method.combine(
        Predictions(base[:1], base[1:], cond, uncond, base[:1], cond, image_of_row=(0,), gain=1.0)
    ).cond


def loratorio(
    unet: nn.Module, arguments: dict, loras: Sequence[dict[str, LowRank]], rows: int = 2, limit: int | None = None
) -> Way:
    """Base pass and one batch of all isolated rows, or batches of at most ``limit``; ``rows`` 1: base-only guidance, no
    unconditional ones."""
    method = METHOD if rows == 2 else LoRAtorio(**{**vars(METHOD), "base_share": 1.0})
    calls = IsolatedCalls(Isolation(dict(unet.named_modules()), loras), limit)

    def step() -> None:
        base = unet(**arguments).sample

        def call(positions: Sequence[int], part: slice) -> Tensor:
            return unet(**repeated(only_rows(arguments, part), len(positions))).sample

        combine(base, calls(range(len(loras)), rows, call), method)

    return step


def one_batch(unet: nn.Module, arguments: dict, loras: Sequence[dict[str, LowRank]]) -> Way:
    """Base rows and isolated rows in one batch, as in diffusers, where the base's pass is not the host's own."""
    calls = IsolatedCalls(Isolation(dict(unet.named_modules()), [{}, *loras]))

    def step() -> None:
        def call(positions: Sequence[int], part: slice) -> Tensor:
            return unet(**repeated(only_rows(arguments, part), len(positions))).sample

        base, *isolated = calls(range(len(loras) + 1), 2, call)
        combine(base, torch.stack(isolated))

    return step


def in_turn(unet: nn.Module, arguments: dict, loras: Sequence[dict[str, LowRank]]) -> Way:
    """The steady state of refreshing one LoRA a step."""
    method = InTurn(METHOD, refresh=1, warmup=0)
    calls = IsolatedCalls(Isolation(dict(unet.named_modules()), loras))
    steps = iter(range(10**9))

    def step() -> None:
        plan = method.plan(next(steps), len(loras))
        base = unet(**arguments).sample
        combine(base, calls(plan.isolated, 2, lambda positions, part: unet(**arguments).sample), method)

    return step


def repatching(unet: nn.Module, arguments: dict, loras: Sequence[dict[str, LowRank]]) -> Way:
    """What naive ports do: restore every touched weight and add the next LoRA's difference, for each LoRA and step."""
    layers = dict(unet.named_modules())
    backups = {name: layers[name].weight.clone() for lora in loras for name in lora}

    def patch(lora: dict[str, LowRank]) -> None:
        for name, backup in backups.items():
            layers[name].weight.copy_(backup)
        for name, branch in lora.items():
            weight = layers[name].weight
            weight += (branch.up @ branch.down.flatten(1)).view_as(weight)

    def step() -> None:
        base = unet(**arguments).sample
        isolated = []
        for lora in loras:
            patch(lora)
            isolated.append(unet(**arguments).sample)
        patch({})
        combine(base, torch.stack(isolated))

    return step


def peft_ways(name: str, latent: int, rank: int, n: int, arguments: dict, **where) -> dict[str, Way]:
    """PEFT's own two ways: ``set_adapters`` for one LoRA after the other, and mixed batches by ``adapter_names``."""
    unet = random_unet(name, **where)
    names = [f"lora{i}" for i in range(n)]
    for each in names:
        unet.add_adapter(LoraConfig(r=rank, target_modules=f".*({ATTENTION})", init_lora_weights=False), each)
    unet.eval().requires_grad_(False)

    def switching() -> None:
        unet.disable_adapters()
        base = unet(**arguments).sample
        unet.enable_adapters()
        isolated = []
        for each in names:
            unet.set_adapters([each])
            isolated.append(unet(**arguments).sample)
        combine(base, torch.stack(isolated))

    tuners = [module for module in unet.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    batch = repeated(arguments, n + 1)
    row_names = [each for each in ["__base__", *names] for _ in range(2)]

    def name_rows(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return args, {**kwargs, "adapter_names": row_names}

    def mixed() -> None:
        unet.set_adapters(names)
        hooks = [module.register_forward_pre_hook(name_rows, with_kwargs=True) for module in tuners]
        try:
            output = unet(**batch).sample.unflatten(0, (n + 1, 2))
        finally:
            for hook in hooks:
                hook.remove()
        combine(output[0], output[1:])

    return {"PEFT set_adapters": switching, "PEFT mixed batch": mixed}


def seconds(way: Way, synchronize: Callable[[], None]) -> float:
    start = time.perf_counter()
    way()
    synchronize()
    return time.perf_counter() - start


def measure(ways: dict[str, Way], rounds: int, synchronize: Callable[[], None]) -> dict[str, list[float]]:
    """Seconds of every way in every round, the ways taking turns, after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(rounds + 1):
        for name, way in ways.items():
            taken = seconds(way, synchronize)
            if round_:
                times[name].append(taken)
    return times


def machine(device: str) -> dict[str, str]:
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "peft": peft.__version__}
    return {"device": name, "threads": str(torch.get_num_threads()), "python": platform.python_version(), **versions}


def run(name: str, latent: int, rank: int, n: int, rounds: int, device: str, dtype: torch.dtype) -> dict:
    """All ways for one number of LoRAs: medians and extremes in seconds, and medians of ratios in plain steps."""
    where = {"device": device, "dtype": dtype}
    unet = random_unet(name, **where)
    arguments = Inputs(unet, latent).call(2)
    loras = [random_lora(touched_layers(unet), rank) for _ in range(n)]
    ways: dict[str, Way] = {
        "plain step": lambda: unet(**arguments),
        "LoRAtorio": loratorio(unet, arguments, loras),
        "LoRAtorio, base in the same batch": one_batch(unet, arguments, loras),
        "LoRAtorio, base share 1": loratorio(unet, arguments, loras, rows=1),
        "LoRAtorio, one refreshed a step": in_turn(unet, arguments, loras),
        "re-patching": repatching(unet, arguments, loras),
        **peft_ways(name, latent, rank, n, arguments, **where),
    }
    base, isolated = torch.randn(2, 4, latent, latent, **where), torch.randn(n, 2, 4, latent, latent, **where)
    ways["composition arithmetic"] = lambda: combine(base, isolated)
    with torch.inference_mode():
        times = measure(ways, rounds, torch.cuda.synchronize if device == "cuda" else lambda: None)
    meta = Inputs(random_unet(name, device="meta"), latent)
    row = flops_of_row(meta)
    branches = flops_of_row(meta, random_lora(touched_layers(meta.unet), rank)) - row
    plain = times["plain step"]
    figures = {
        way: {
            "median": statistics.median(taken),
            "least": min(taken),
            "most": max(taken),
            "plain steps": statistics.median(t / p for t, p in zip(taken, plain)),
        }
        for way, taken in times.items()
    }
    floors = {"LoRAtorio": floor(row, branches, n), "LoRAtorio, base share 1": floor(row, branches, n, True)}
    floors["LoRAtorio, base in the same batch"] = floors["LoRAtorio"]
    floors["LoRAtorio, one refreshed a step"] = floor(row, branches, 1)
    return {"model": name, "latent": latent, "rank": rank, "n": n, "rounds": rounds, "ways": figures, "floor": floors}


def table(results: Sequence[dict]) -> str:
    """Markdown: a row a way, a column a number of LoRAs, in plain steps, the floor in brackets."""
    counts = [result["n"] for result in results]
    lines = ["| in plain steps (floor) |" + "".join(f" N = {n} |" for n in counts), "| --- |" + " --- |" * len(counts)]
    for way in results[0]["ways"]:
        cells = []
        for result in results:
            floors = f" ({result['floor'][way]:.2f})" if way in result["floor"] else ""
            cells.append(f" {result['ways'][way]['plain steps']:.3g}{floors} |")
        lines.append(f"| {way} |{''.join(cells)}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=CONFIGS, default="sd15")
    parser.add_argument("--latent", type=int, default=16, help="side of the latent; 64 is 512 pixels")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 3, 5], help="numbers of LoRAs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--full", action="store_true", help="sizes for a GPU, in half precision")
    parser.add_argument("--out", type=Path, help="results as JSON")
    options = parser.parse_args()
    device = "cuda" if options.full else "cpu"
    dtype = torch.float16 if options.full else torch.float32
    latent = CONFIGS[options.model]["sample_size"] if options.full else options.latent
    results = []
    for n in options.counts:
        results.append(run(options.model, latent, options.rank, n, options.rounds, device, dtype))
        gc.collect()
    report = {"machine": machine(device), "results": results}
    print(json.dumps(report["machine"]))
    print(table(results))
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
