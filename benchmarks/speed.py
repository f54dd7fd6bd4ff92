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
from benchmarks.speed_report import ARITHMETIC, STACKING, plot, table
from loratorio_ext.core import InTurn, Method, Plan, Predictions, method_from
from loratorio_ext.isolation import IsolatedCalls, Isolation, LowRank, Row
from loratorio_ext.isolation.branches import stack
from loratorio_ext.settings import Settings

METHOD = method_from(Settings())
BASE_GUIDES = method_from(Settings(base_share=1.0))
Way = Callable[[], None]


def only_rows(arguments: dict, rows: list[int]) -> dict:
    """These rows of a UNet call."""
    return {n: only_rows(v, rows) if isinstance(v, dict) else v[rows] for n, v in arguments.items()}


def combine(base: Tensor, isolated: Tensor, method: Method = METHOD) -> Tensor:
    """The composition arithmetic of one step: ``base [2, C, H, W]``, ``isolated [N, 1 or 2, C, H, W]``, the conditional
    row first."""
    uncond = isolated[:, 1:] if isolated.shape[1] > 1 else None
    cond = isolated[:, :1]
    return method.combine(
        Predictions(base[:1], base[1:], cond, uncond, base[:1], cond, image_of_row=(0,), gain=1.0)
    ).cond


def evaluation(
    unet: nn.Module,
    arguments: dict,
    loras: Sequence[dict[str, LowRank]],
    limit: int | None = None,
    budget: int | None = None,
) -> Callable[[Sequence[Row]], Tensor]:
    """A UNet's predictions of rows, ``[rows, C, H, W]``, each under its LoRA or none (`Plan.BASE`), in batches of at
    most ``limit`` rows and with at most ``budget`` bytes of stacked matrices."""
    calls = IsolatedCalls(Isolation(dict(unet.named_modules()), [*loras, {}], budget), limit)
    return lambda rows: calls(rows, lambda batch: unet(**only_rows(arguments, [row for _, row in batch])).sample)


def loratorio(
    unet: nn.Module,
    arguments: dict,
    loras: Sequence[dict[str, LowRank]],
    method: Callable[[], Method] = lambda: METHOD,
    limit: int | None = None,
) -> Way:
    """The base model's rows and all isolated ones in one batch, or in batches of at most ``limit``, as in the hosts.
    ``method()`` gives each step its method."""
    evaluate = evaluation(unet, arguments, loras, limit)

    def step() -> None:
        this = method()
        plan = this.plan(0, len(loras))
        alone = 2 if plan.uncond else 1
        rows = [(lora, row) for lora in plan.isolated for row in range(alone)]
        output = evaluate([(Plan.BASE, 0), (Plan.BASE, 1), *rows])
        combine(output[:2], output[2:].unflatten(0, (len(plan.isolated), alone)), this)

    return step


def stacking(unet: nn.Module, loras: Sequence[dict[str, LowRank]], like: Tensor) -> Way:
    """Making the stacked matrices of all LoRAs for every layer, as the first step of a generation does."""
    layers = touched_layers(unet)
    return lambda: [stack(layer, [lora.get(name) for lora in loras], like) for name, layer in layers.items()]


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
    batch = only_rows(arguments, [0, 1] * (n + 1))
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
        "base_share 1": loratorio(unet, arguments, loras, lambda: BASE_GUIDES),
        "refresh 1": loratorio(unet, arguments, loras, lambda: InTurn(METHOD, refresh=1, warmup=0)),
        "refresh 1 and base_share 1": loratorio(
            unet, arguments, loras, lambda: InTurn(BASE_GUIDES, refresh=1, warmup=0)
        ),
        "re-patching": repatching(unet, arguments, loras),
        **peft_ways(name, latent, rank, n, arguments, **where),
    }
    base, isolated = torch.randn(2, 4, latent, latent, **where), torch.randn(n, 2, 4, latent, latent, **where)
    ways[ARITHMETIC] = lambda: combine(base, isolated)
    ways[STACKING] = stacking(unet, loras, base)
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
    floors = {
        "LoRAtorio": floor(row, branches, n),
        "base_share 1": floor(row, branches, n, base_only_guidance=True),
        "refresh 1": floor(row, branches, 1),
        "refresh 1 and base_share 1": floor(row, branches, 1, base_only_guidance=True),
    }
    return {"model": name, "latent": latent, "rank": rank, "n": n, "rounds": rounds, "ways": figures, "floor": floors}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=CONFIGS, default="sd15")
    parser.add_argument("--latent", type=int, default=16, help="side of the latent; 64 is 512 pixels")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 3, 5], help="numbers of LoRAs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--full", action="store_true", help="sizes for a GPU, in half precision")
    parser.add_argument("--out", type=Path, help="results as JSON, and beside them a plot")
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
        plot(results, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
