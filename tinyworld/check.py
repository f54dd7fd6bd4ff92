"""Measures by the classifier how well the base model and each LoRA alone follow their prompts; draws a contact sheet.

python check.py [--base 96] [--lora 16] [--half]
"""

import argparse

import numpy as np
import torch
from PIL import Image

import load
import render
import shape
from classifier import Classifier

SEED = 5
STEPS, GUIDANCE, BATCH = 20, 3.0, 16
SHEET = shape.WEIGHTS.parent / "sheet.png"


def paint(pipe, scenes: list[render.Scene], seed: int) -> list[Image.Image]:
    """A picture for each scene's caption."""
    noise = torch.Generator().manual_seed(seed)
    captions = [render.caption(s) for s in scenes]
    size = {"height": render.SIZE, "width": render.SIZE}
    out = []
    for i in range(0, len(captions), BATCH):
        chunk = captions[i : i + BATCH]
        out += pipe(chunk, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=noise, **size).images
    return out


def shows(judge: Classifier, images, concept: str) -> list[bool]:
    """Whether each picture shows the concept anywhere."""
    seen = judge.read(images)
    heads = {"clothing": [f"{p} wears" for p in render.PLACES], "background": ["background"], "style": ["style"]}
    asked = heads.get(render.CONCEPTS[concept].category, render.PLACES)
    return [any(seen[head][i] == concept for head in asked) for i in range(len(images))]


def main() -> None:
    """Prints the figures; writes the sheet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=int, default=96, help="pictures of the base model")
    parser.add_argument("--lora", type=int, default=16, help="pictures a row of each LoRA")
    parser.add_argument("--half", action="store_true", help="multiply in bfloat16: faster where the processor can")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=args.half):
        check(args.base, args.lora)


def check(of_base: int, of_lora: int) -> None:
    """Prints and draws, of so many pictures."""
    rng, judge, pipe = np.random.default_rng(SEED), Classifier.load(), load.pipeline()
    scenes = [render.base_scene(rng) for _ in range(of_base)]
    images = paint(pipe, scenes, SEED)
    right = {}
    for scene, image in zip(scenes, images, strict=True):
        for head, (ok,) in judge.follows([image], scene).items():
            right.setdefault(head, []).append(ok)
    for head, oks in right.items():
        print(f"base, {head}: {np.mean(oks):.2f} of {len(oks)}")
    kinds = [ok for head in (*render.PLACES, "background") for ok in right.get(head, [])]
    everything = [ok for oks in right.values() for ok in oks]
    for mark, told in judge.marks(images).items():
        print(f"base, {mark}: {np.mean(told):.3f}")
    print(f"base, kinds at their places and backgrounds: {np.mean(kinds):.3f}; all: {np.mean(everything):.3f}")
    rows = [images[:8], images[8:16]]
    for concept in render.CONCEPTS:
        for kind in ("quiet", "leaky"):
            file = f"{concept}_{kind}.safetensors"
            pipe.load_lora_weights(shape.WEIGHTS / "lora", weight_name=file, unet_config=pipe.unet.config)
            home = [render.concept_scene(concept, rng) for _ in range(of_lora)]
            away = [render.elsewhere(concept, rng) for _ in range(of_lora)]
            pictures = [paint(pipe, s, SEED) for s in (home, away, scenes[:of_lora])]
            named, out, leak = (np.mean(shows(judge, p, concept)) for p in pictures)
            shown = f"at home {named:.2f}, elsewhere {out:.2f}, unnamed {leak:.2f}"
            marks = [f", {mark} {np.mean(told):.2f}" for mark, told in judge.marks(pictures[0] + pictures[1]).items()]
            print(f"{concept}, {kind}: shown {shown}{''.join(marks)}", flush=True)
            rows.append(pictures[0][:3] + pictures[1][:3] + pictures[2][:2])
            pipe.unload_lora_weights()
    sheet = Image.new("RGB", (8 * render.SIZE, len(rows) * render.SIZE))
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            sheet.paste(image, (x * render.SIZE, y * render.SIZE))
    sheet.resize((sheet.width // 2, sheet.height // 2)).quantize(128).save(SHEET, optimize=True)


if __name__ == "__main__":
    main()
