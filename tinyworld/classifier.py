"""Says what is to be seen in a picture of the tiny world, and how close the picture is to a true render.

python classifier.py --work out/tinyworld     # trains it, and prints its accuracy on held-out scenes

from classifier import Classifier
judge = Classifier.load()
judge.read(images)                  # {"left": ["robot", ...], "left colour": [...], ..., "style": [...]}
judge.follows(images, scene)        # {"left": [True, ...], "background": [...], ...}: what the scene asks for
judge.distance(images, scene)       # 1: as close to a true render as another true render is
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import nn

import model
import render
import shape
from judging import IGNORED, SEED, Reader, blend, labels_of

SCENES, HELD_OUT, STEPS, BATCH, RATE = 4000, 1000, 900, 64, 2e-3
FILE = shape.WEIGHTS / "classifier.safetensors"
SLOTS = (*render.PLACES, "behind")
HEADS = {
    **{slot: ["", *render.KINDS, *render.CONCEPT_KINDS] for slot in SLOTS},
    **{f"{slot} colour": ["", *render.COLOURS] for slot in SLOTS},
    **{f"{slot} wears": ["", *render.WEARS, "crown"] for slot in SLOTS},
    "background": list(render.SETTINGS),
    "sun": ["", "left", "right"],
    "style": ["", "neon"],
}
KINDS = [list(HEADS).index(slot) for slot in SLOTS]


def answers(scene: render.Scene) -> dict[str, str]:
    """What a perfect reader would say of a scene, head by head. Colours cannot be told in neon style: left out."""
    out = {"background": scene.background, "sun": scene.sun, "style": scene.style}
    for slot in SLOTS:
        thing = scene.at(slot)
        out[slot], out[f"{slot} wears"] = (thing.kind, thing.wears) if thing else ("", "")
        if not scene.style:
            out[f"{slot} colour"] = thing.colour if thing else ""
    return out


def labels(scene: render.Scene) -> list[int]:
    """The answers as class numbers."""
    return labels_of(answers(scene), HEADS)


def tensor(images) -> torch.Tensor:
    """PIL images as one batch in -1..1, 64 x 64."""
    x = torch.from_numpy(np.stack([np.asarray(i.convert("RGB")) for i in images])).permute(0, 3, 1, 2).float()
    return F.avg_pool2d(x / 127.5 - 1, 2)


class Classifier(Reader):
    """Four convolutions, one hidden layer, a softmax a question."""

    heads, file, answers, see = HEADS, FILE, staticmethod(answers), staticmethod(tensor)

    def __init__(self) -> None:
        """Untrained."""
        super().__init__()
        widths = (3, 32, 64, 96, 96)
        layers = []
        for i, (before, after) in enumerate(zip(widths, widths[1:], strict=False)):
            layers += [
                nn.Conv2d(before, after, 3, stride=2 if i < 3 else 1, padding=1),
                nn.BatchNorm2d(after),
                nn.ReLU(),
            ]
        self.body = nn.Sequential(*layers, nn.Conv2d(96, 32, 1), nn.ReLU(), nn.Flatten(), nn.Linear(2048, 128))
        self.head = nn.Linear(128, sum(map(len, HEADS.values())))


@torch.no_grad()
def dataset(vae, count: int, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Scenes of the whole world, drawn and read back through the VAE with a little noise on the latents."""
    scenes = [(render.any_scene if rng.random() < 0.7 else render.base_scene)(rng) for _ in range(count)]
    pictures = []
    for i in range(0, count, 16):
        chunk = [render.render(s, rng) for s in scenes[i : i + 16]]
        x = torch.from_numpy(np.stack(chunk)).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.autocast("cpu", torch.bfloat16):
            z = model.encode(vae, x)
            z = z + torch.randn_like(z) * torch.rand(len(z), 1, 1, 1) * 0.25
            y = vae.decode(z / model.SCALING).sample.float().clamp(-1, 1)
        pictures.append(F.avg_pool2d(torch.where(torch.rand(len(x), 1, 1, 1) < 0.3, x, y), 2))
    return torch.cat(pictures), torch.tensor([labels(s) for s in scenes])


def train(work: Path) -> None:
    """Trains and measures."""
    rng = np.random.default_rng(SEED)
    vae = AutoencoderKL.from_pretrained(work / "vae")
    (x, y), (test_x, test_y) = dataset(vae, SCENES, rng), dataset(vae, HELD_OUT, rng)
    judge = Classifier()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS)
    for step in range(STEPS):
        chosen = torch.from_numpy(rng.integers(0, len(x), BATCH))
        dy, dx = rng.integers(-2, 3, 2)
        a, b = blend(x[chosen].roll((dy, dx), (2, 3)), y[chosen], KINDS)
        a = a * (0.85 + 0.3 * torch.rand(len(a), 1, 1, 1)) + 0.05 * torch.randn_like(a)
        loss = sum(F.cross_entropy(out, b[:, i], ignore_index=IGNORED) for i, out in enumerate(judge(a)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            print(step + 1, f"{loss.item():.3f}", flush=True)
    judge.eval()
    with torch.no_grad():
        judge.report(test_x, test_y)
    judge.save()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("out/tinyworld"))
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    train(parser.parse_args().work)
