"""Seconds of a denoising step in a real AUTOMATIC1111 WebUI: plain, LoRAtorio, and loading each LoRA in turn.

    LORATORIO_A1111_DIR=… python -m benchmarks.webui --size 192 --counts 2 3 --rounds 2

A checkpoint of SD 1.5's size with random weights, LoRAs of rank 16 on attention and text encoder. What one step takes
is told by two generations of different length, so that everything done once (encoding prompts, preparing matrices,
decoding) is reported apart. Rounds are interleaved; medians.
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from tests.live.lora_files import Layer, Recipe, read_layers, write_lora
from tests.live.webui import WebUI, host_python, prepare_data_dir

ROOT = Path(__file__).resolve().parents[1]
EXTENSIONS = (ROOT, ROOT / "benchmarks" / "naive_extension")
FAMILY = "sd15"
SHORT = 1

Ways = dict[str, dict]

WAYS: Ways = {
    "merged by the host": {},
    "LoRAtorio": {"LoRAtorio": {"args": [{"enabled": True}]}},
    "LoRAtorio, base share 1": {"LoRAtorio": {"args": [{"enabled": True, "base_share": 1}]}},
    "LoRAtorio, refresh 1": {"LoRAtorio": {"args": [{"enabled": True, "refresh": 1, "warmup": 0}]}},
    "load_networks for each LoRA": {"LoRAtorio naive": {"args": [True]}},
}


def usual(layer: Layer) -> bool:
    """Whether trainers' defaults touch the layer: attention and feed-forward, and the text encoder."""
    return layer.part == "text" or "transformer_blocks" in layer.name


def lay_out(host: Path, folder: Path, count: int, rank: int) -> tuple[Path, Path]:
    """A data folder with the checkpoint and so many LoRAs for it; also the checkpoint's path."""
    data = prepare_data_dir(folder, EXTENSIONS)
    models = data / "models" / "Stable-diffusion"
    command = [host_python(host), ROOT / "tests" / "live" / "tiny_checkpoints.py", "--host", host, "--out", models]
    subprocess.run([*command, FAMILY], check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    checkpoint = models / f"{FAMILY}.safetensors"
    layers = [layer for layer in read_layers(checkpoint) if usual(layer) and layer.form != "norm"]
    for i in range(count):
        recipe = Recipe(f"lora{i}", "lora", rank=rank, seed=i, strength=0.05)
        write_lora(data / "models" / "Lora" / f"lora{i}.safetensors", layers, recipe)
    return data, checkpoint


def seconds(webui: WebUI, scripts: dict, prompt: str, steps: int, size: int) -> float:
    started = time.perf_counter()
    webui.txt2img(prompt=prompt, steps=steps, width=size, height=size, alwayson_scripts=scripts)
    return time.perf_counter() - started


def measure(webui: WebUI, n: int, rounds: int, steps: int, size: int) -> dict[str, dict[str, float]]:
    """For each way the medians of a step, and of what is done once beside the steps, in seconds."""
    prompt = "a cat on a hill " + "".join(f"<lora:lora{i}:1>" for i in range(n))
    times = {name: [] for name in WAYS}
    for _ in range(rounds):
        for name, scripts in WAYS.items():
            seconds(webui, scripts, prompt, SHORT, size)  # the host changes its weights to this way's, if it must
            short, long = (seconds(webui, scripts, prompt, count, size) for count in (SHORT, SHORT + steps))
            step = (long - short) / steps
            times[name].append((step, short - SHORT * step))
    return {
        name: dict(zip(("step", "once"), map(statistics.median, zip(*taken)), strict=True))
        for name, taken in times.items()
    }


def table(results: dict[int, dict[str, dict[str, float]]]) -> str:
    """Markdown: a row a way, a column a number of LoRAs, steps in merged steps and what is done once in seconds."""
    lines = ["| merged steps, and seconds once |" + "".join(f" N = {n} |" for n in results)]
    lines.append("| --- |" + " --- |" * len(results))
    for name in WAYS:
        cells = []
        for figures in results.values():
            plain = figures["merged by the host"]["step"]
            cells.append(f" {figures[name]['step'] / plain:.2f}, {figures[name]['once']:.1f} s |")
        lines.append(f"| {name} |{''.join(cells)}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=192, help="of the image, in pixels")
    parser.add_argument("--steps", type=int, default=2, help="by which the longer generation is longer")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--counts", type=int, nargs="+", default=[2, 3], help="numbers of LoRAs")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, help="results as JSON")
    options = parser.parse_args()
    host = os.environ.get("LORATORIO_A1111_DIR")
    if not host:
        parser.error("LORATORIO_A1111_DIR must name an installed AUTOMATIC1111 WebUI")
    with tempfile.TemporaryDirectory() as folder:
        data, checkpoint = lay_out(Path(host), Path(folder), max(options.counts), options.rank)
        with WebUI(Path(host), data, checkpoint, timeout=600) as webui:
            results = {n: measure(webui, n, options.rounds, options.steps, options.size) for n in options.counts}
    print(table(results))
    if options.out:
        options.out.write_text(json.dumps({"size": options.size, "rank": options.rank, "n": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
