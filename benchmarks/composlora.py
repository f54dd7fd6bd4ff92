"""ComposLoRA (arXiv 2402.16843): 22 LoRAs for Stable Diffusion 1.5 in 480 combinations, scored by CLIPScore.

``root`` is a clone of its repository, with the LoRAs where it wants them: ``STYLE_lora_info.json`` and
``models/lora/STYLE/ID.safetensors``. The prompt is a style's general words and every LoRA's triggers; a score compares
the image with the triggers.
"""

import argparse
import itertools
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.statistics import figures
from loratorio_ext.hosts.diffusers import load_lora, load_pipeline, scheduler_for

SEED = 111
WEIGHT = 0.8
SUBJECT = "character"  # in every combination
WORDS = {
    "anime": ("masterpiece, best quality", "worst quality, low quality, blurry, text, watermark, extra fingers"),
    "reality": (
        "RAW photo, subject, 8k uhd, high quality, half-length portrait",
        "drawing, 3d, blurry, text, deformed",
    ),
}
"""Words of the prompt and of the negative prompt, by style."""
GUIDANCE = {"anime": 10.0, "reality": 7.0}


def add_arguments(group: Any) -> None:
    group.add_argument("--root", type=Path, help="the ComposLoRA folder")
    group.add_argument("--style", choices=WORDS, default="reality")
    group.add_argument("--model", type=Path, help="an SD 1.5 checkpoint or diffusers folder")
    group.add_argument("--config", type=Path, help="a diffusers folder with what a checkpoint lacks")
    group.add_argument("--steps", type=int, default=30)
    group.add_argument("--size", type=int, default=512)
    group.add_argument("--clip", default="openai/clip-vit-base-patch16", help="of CLIPScore: a name or folder")


@dataclass(frozen=True)
class Combination:
    """LoRAs of different categories, by their ids; what they add to the prompt."""

    loras: tuple[str, ...]
    triggers: str
    prompt: str

    @property
    def group(self) -> str:
        return str(len(self.loras))

    @property
    def name(self) -> str:
        return "+".join(self.loras)


def combinations(information: Mapping[str, Sequence[Mapping[str, Any]]], words: str) -> Iterator[Combination]:
    """Every choice of 2 to 5 LoRAs of different categories, a character always among them."""
    others = [category for category in information if category != SUBJECT]
    for count in range(1, len(others) + 1):
        for categories in itertools.combinations(others, count):
            for loras in itertools.product(*(information[category] for category in (SUBJECT, *categories))):
                triggers = ", ".join(trigger for lora in loras for trigger in lora["trigger"])
                yield Combination(tuple(lora["id"] for lora in loras), triggers, f"{words}, {triggers}")


class World:
    """A checkpoint, the LoRAs of one style, and CLIPScore as the judge."""

    def __init__(self, args: argparse.Namespace, device: Any = "cpu", half: bool = False):
        import torch

        self.root, self.style, self.clip, self.device, self.half = args.root, args.style, args.clip, device, half
        dtype = torch.float16 if torch.device(device).type == "cuda" else torch.float32
        self.pipe = load_pipeline(args.model, args.config, dtype).to(device)
        self.pipe.scheduler = scheduler_for(self.pipe, "DPM++ 2M")
        self.state = Path(args.model).name
        self.words, negative = WORDS[args.style]
        self.call = {
            "negative_prompt": negative,
            "num_inference_steps": args.steps,
            "guidance_scale": GUIDANCE[args.style],
            "width": args.size,
            "height": args.size,
        }

    def combinations(self) -> list[Combination]:
        """All of them, in an order of no meaning, the same everywhere."""
        information = json.loads((self.root / f"{self.style}_lora_info.json").read_text(encoding="utf-8"))
        found = combinations(information, self.words)
        return sorted(found, key=lambda combination: zlib.crc32(combination.name.encode()))

    def lora(self, name: str, style: str) -> Any:
        return load_lora(self.pipe, self.root / "models" / "lora" / style / f"{name}.safetensors", WEIGHT)

    @cached_property
    def score(self) -> Any:
        from torchmetrics.multimodal import CLIPScore

        return CLIPScore(self.clip).to(self.device)

    def judged(self, combination: Combination, images: Sequence[Any]) -> dict[str, Any]:
        import torch

        scores = []
        for image in images:
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).to(self.device)
            scores.append(self.score(pixels, combination.triggers))
            self.score.reset()
        return {"clipscore": figures(scores)}
