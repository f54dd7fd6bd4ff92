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
from safetensors.torch import load_file, save_file
from torch import nn

import model
import render

SEED = 77
SCENES, HELD_OUT, STEPS, BATCH, RATE = 4000, 1000, 900, 64, 2e-3
FILE = model.WEIGHTS / "classifier.safetensors"
SLOTS = (*render.PLACES, "behind")
HEADS = {
    **{slot: ["", *render.KINDS, *render.CONCEPT_KINDS] for slot in SLOTS},
    **{f"{slot} colour": ["", *render.COLOURS] for slot in SLOTS},
    **{f"{slot} wears": ["", *render.WEARS, "crown"] for slot in SLOTS},
    "background": list(render.SETTINGS),
    "sun": ["", "left", "right"],
    "style": ["", "neon"],
}
IGNORED = -100


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
    said = answers(scene)
    return [HEADS[head].index(said[head]) if head in said else IGNORED for head in HEADS]


def tensor(images) -> torch.Tensor:
    """PIL images as one batch in -1..1, 64 x 64."""
    x = torch.from_numpy(np.stack([np.asarray(i.convert("RGB")) for i in images])).permute(0, 3, 1, 2).float()
    return F.avg_pool2d(x / 127.5 - 1, 2)


class Classifier(nn.Module):
    """Four convolutions, one hidden layer, a softmax a question."""

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

    @classmethod
    def load(cls, file: Path = FILE) -> "Classifier":
        """The trained one."""
        new = cls()
        new.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load_file(file).items()})
        return new.eval()

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Logits, a tensor a head."""
        return list(self.head(self.body(x).relu()).split([len(c) for c in HEADS.values()], dim=1))

    @torch.no_grad()
    def read(self, images) -> dict[str, list[str]]:
        """What is to be seen, head by head; "" is nothing."""
        logits = self(tensor(images))
        return {
            head: [classes[i] for i in out.argmax(1)]
            for (head, classes), out in zip(HEADS.items(), logits, strict=True)
        }

    def follows(self, images, scene: render.Scene) -> dict[str, list[bool]]:
        """For everything the scene asks for, whether each picture shows it. What it does not mention is not judged."""
        seen = self.read(images)
        wanted = {head: answer for head, answer in answers(scene).items() if answer}
        return {head: [s == answer for s in seen[head]] for head, answer in wanted.items()}

    @torch.no_grad()
    def distance(self, images, scene: render.Scene, renders: int = 48) -> torch.Tensor:
        """How far each picture is from the nearest true render of the scene, in features, as a multiple of how far
        true renders are from their nearest other one. About 1: as good as true. Much more: a picture gone wrong."""
        rng = np.random.default_rng(SEED)
        true = self.body(tensor([render.render(scene, rng) for _ in range(renders)]))
        between = torch.cdist(true, true).fill_diagonal_(torch.inf).min(1).values.mean()
        return torch.cdist(self.body(tensor(images)), true).min(1).values / between


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


def blend(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Turns an eighth of a batch into half-and-half mixtures of two scenes, where only what both share is there."""
    n = len(x) // 8
    kinds = [list(HEADS).index(slot) for slot in SLOTS]
    mixed, shared = (x[:n] + x[n : 2 * n]) / 2, torch.where(y[:n] == y[n : 2 * n], y[:n], IGNORED)
    shared[:, kinds] = torch.where(y[:n] == y[n : 2 * n], y[:n], 0)[:, kinds]
    return torch.cat([mixed, x[n:]]), torch.cat([shared, y[n:]])


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
        a, b = blend(x[chosen].roll((dy, dx), (2, 3)), y[chosen])
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
        for (head, _), out, want in zip(HEADS.items(), judge(test_x), test_y.T, strict=True):
            print(f"{head}: {(out.argmax(1) == want)[want != IGNORED].float().mean():.3f}")
    save_file({k: v.half() if v.is_floating_point() else v for k, v in judge.state_dict().items()}, FILE)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("out/tinyworld"))
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    train(parser.parse_args().work)
