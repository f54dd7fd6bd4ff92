"""Says what is to be seen in a picture of the tiny world, whether it is clean, and how close it is to a true render.

python classifier.py     # trains it, and prints what it gets right on held-out scenes

from classifier import Classifier
judge = Classifier.load()
judge.read(images)                  # {"left": ["robot", ...], "left colour": [...], ..., "style": [...]}
judge.follows(images, scene)        # {"left": [True, ...], "background": [...], ...}: what the scene asks for
judge.clean(images)                 # [True, ...]: no noise, no borders, no broken or blended surfaces
judge.distance(images, scene)       # 1: as close to a true render as another true render is

It sees what the base model sees: the means of 8 x 8 pixels in red, green and blue, and the diagonal difference within.
"""

import argparse
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import render
import shape
from judging import IGNORED, SEED, Reader, blend, labels_of

SCENES, HELD_OUT, STEPS, BATCH, RATE = 16000, 1500, 3000, 64, 3e-3
WORN, STYLED = 0.6, 0.5  # of things, of scenes: what is rare is mistaken, such as a crown in the neon style
TINTED = 0.35  # how far a picture's colours may be on the way to another style and count as in its own
FILE = shape.WEIGHTS / "classifier.safetensors"
SLOTS = tuple(render.PLACES)
HEADS = {
    **{slot: ["", *render.KINDS, *render.CONCEPT_KINDS] for slot in SLOTS},
    **{f"{slot} colour": ["", *render.COLOURS] for slot in SLOTS},
    **{f"{slot} wears": ["", *render.WEARS, "crown"] for slot in SLOTS},
    "background": list(render.SETTINGS),
    "sky": ["", *render.SKIES],
    "style": ["", *render.STYLES, "neon"],
}
"""What is asked of a scene, and the answers; "" is nothing."""
KINDS = [list(HEADS).index(slot) for slot in SLOTS]
FIDELITY = ["broken", "clean"]
FAINT = 0.08  # a change of the picture's cells (of 2, root of the mean square) that still counts as clean
PLAIN = 0.16  # one that does not
BROKEN = 0.5  # of `brokenness`, from where on a picture counts as broken: fewer than one true render in 200 does


def answers(scene: render.Scene) -> dict[str, str]:
    """What a perfect reader would say of a scene, head by head. Colours cannot be told in a style: left out."""
    out = {"background": scene.background, "sky": scene.sky, "style": scene.style}
    for slot in SLOTS:
        thing = scene.at(slot)
        out[slot], out[f"{slot} wears"] = (thing.kind, thing.wears) if thing else ("", "")
        if not scene.style:
            out[f"{slot} colour"] = thing.colour if thing else ""
    return out


def labels(scene: render.Scene) -> list[int]:
    """The answers as class numbers."""
    return labels_of(answers(scene), HEADS)


def cells(images) -> torch.Tensor:
    """What the judge sees of PIL images, `[B, 4, 32, 32]`: means in -1..1 of 8 x 8 pixels, and half of the difference
    between their upper left and lower right quarter."""
    x = torch.from_numpy(np.stack([np.asarray(i.convert("RGB")) for i in images])).permute(0, 3, 1, 2).float()
    small = F.avg_pool2d(x / 127.5 - 1, 4)
    grey = small.mean(1, keepdim=True)
    return torch.cat([F.avg_pool2d(small, 2), (grey[..., ::2, ::2] - grey[..., 1::2, 1::2]) / 2], dim=1)


class Classifier(Reader):
    """Five convolutions, one hidden layer, a softmax a question."""

    heads, file, answers, see = HEADS, FILE, staticmethod(answers), staticmethod(cells)

    def __init__(self) -> None:
        """Untrained."""
        super().__init__()
        layers = []
        for before, after, stride in ((4, 48, 1), (48, 64, 2), (64, 96, 1), (96, 128, 2)):
            layers += [nn.Conv2d(before, after, 3, stride, 1), nn.BatchNorm2d(after), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.Conv2d(128, 32, 1), nn.ReLU(), nn.Flatten(), nn.Linear(2048, 160))
        self.head = nn.Linear(160, sum(map(len, HEADS.values())))
        fine = []
        for before, after, stride in ((4, 32, 1), (32, 32, 1), (32, 48, 2), (48, 48, 1)):
            fine += [nn.Conv2d(before, after, 3, stride, 1), nn.BatchNorm2d(after), nn.ReLU()]
        self.fine = nn.Sequential(*fine, nn.Conv2d(48, len(FIDELITY), 1))

    def brokenness(self, x: torch.Tensor) -> torch.Tensor:
        """How sure it is of the worst spot of each picture that it is broken, `[B]`, a logit."""
        clean, broken = self.fine(x)[:, 1], self.fine(x)[:, 0]
        return (broken - clean).flatten(1).topk(4).values.mean(1)

    @torch.no_grad()
    def clean(self, images) -> list[bool]:
        """Whether each picture is free of noise, borders, broken and blended surfaces."""
        return (self.brokenness(cells(images)) < BROKEN).tolist()

    def marks(self, images) -> dict[str, list[bool]]:
        """Whether each is clean."""
        return {"clean": self.clean(images)}


def spots(rng: np.random.Generator, size: int) -> torch.Tensor:
    """Where a picture is to be harmed, `[32, 32]` in {0, 1}: some squares of a grid within a random window, or all."""
    n = shape.LATENT // size
    y, x = rng.integers(0, n, 2)
    h, w = rng.integers(max(1, n // 8), n + 1, 2)
    grid = np.zeros((n, n), dtype=np.float32)
    grid[y : y + h, x : x + w] = rng.random(grid[y : y + h, x : x + w].shape) < rng.choice([0.3, 0.6, 1.0])
    return torch.from_numpy(grid).repeat_interleave(size, 0).repeat_interleave(size, 1)


def harmed(x: torch.Tensor, other: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """A picture's cells `[4, 32, 32]` as compositions go wrong: noise, blotches, another scene's patches or its ghost,
    or blur."""
    where, kind = spots(rng, int(rng.choice([1, 2, 4]))), rng.integers(5)
    strength = rng.uniform(0.1, 0.9)
    if kind == 0:
        changed = x + strength * torch.randn_like(x)
    elif kind == 1:
        rough = F.interpolate(torch.randn(1, 4, 8, 8), size=x.shape[-1], mode="bilinear")[0]
        changed = x + strength * rough
    elif kind == 2:
        changed = other
    elif kind == 3:
        changed = x.lerp(other, float(rng.uniform(0.2, 0.8)))
    else:
        size = int(rng.choice([3, 5]))
        changed = F.avg_pool2d(x[None], size, 1, size // 2, count_include_pad=False)[0]
    return torch.where(where > 0, changed, x).clamp(-1.1, 1.1)


def surfaces(x: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """Which spots of `x [B, 4, 32, 32]` are clean beside the true picture, `[B, 16, 16]`: 1 clean, 0 broken, by how
    much they differ; between the two nobody is asked."""
    change = F.avg_pool2d((x - true).square().mean(1, keepdim=True), 2)[:, 0].sqrt()
    clean = torch.full(change.shape, IGNORED).masked_fill(change < FAINT, 1)
    return clean.masked_fill(change > PLAIN, 0)


def scenes(count: int, rng: np.random.Generator) -> list[render.Scene]:
    """Scenes of the whole world."""
    return [
        render.any_scene(rng, WORN, STYLED) if rng.random() < 0.75 else render.base_scene(rng) for _ in range(count)
    ]


def restyled(scene: render.Scene, rng: np.random.Generator) -> render.Scene:
    """The scene in another style, or in none."""
    return replace(scene, style=str(rng.choice([style for style in HEADS["style"] if style != scene.style])))


def pictures(shown: list[render.Scene], seeds: np.ndarray) -> torch.Tensor:
    """Renders of scenes as cells; equal seeds put things at equal places."""
    pairs = list(zip(shown, seeds, strict=True))
    drawn = (
        [render.render(s, np.random.default_rng(k)) for s, k in pairs[i : i + 64]] for i in range(0, len(pairs), 64)
    )
    return torch.cat([cells(images) for images in drawn])


def dataset(count: int, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scenes of the whole world as cells, the same in another style, and what a reader would say of them."""
    shown, seeds = scenes(count, rng), rng.integers(1 << 32, size=count)
    return (
        pictures(shown, seeds),
        pictures([restyled(s, rng) for s in shown], seeds),
        torch.tensor([labels(s) for s in shown]),
    )


def train() -> None:
    """Trains and measures."""
    rng = np.random.default_rng(SEED)
    (x, other, y), (test_x, test_other, test_y) = dataset(SCENES, rng), dataset(HELD_OUT, rng)
    judge = Classifier()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS)
    for step in range(STEPS):
        chosen = torch.from_numpy(rng.integers(0, len(x), BATCH))
        tint = TINTED * torch.rand(BATCH, 1, 1, 1) * (torch.rand(BATCH, 1, 1, 1) < 0.5)
        a, b = blend(x[chosen].lerp(other[chosen], tint), y[chosen], KINDS)
        a = a * (0.9 + 0.2 * torch.rand(len(a), 1, 1, 1)) + 0.08 * torch.rand(len(a), 1, 1, 1) * torch.randn_like(a)
        loss = sum(F.cross_entropy(out, b[:, i], ignore_index=IGNORED) for i, out in enumerate(judge(a)))
        true, others = x[chosen[:32]], x[chosen[32:]]
        bad = torch.stack([harmed(t, o, rng) for t, o in zip(true, others, strict=True)])
        bad = bad + 0.05 * torch.rand(len(bad), 1, 1, 1) * torch.randn_like(bad)
        wanted = surfaces(bad, true)
        loss = loss + 2 * F.cross_entropy(judge.fine(bad), wanted, ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            print(step + 1, f"{loss.item():.3f}", flush=True)
    judge.eval()
    judge.save()
    with torch.no_grad():
        judge.report(test_x, test_y)
        print("on the way to another style:")
        judge.report(test_x.lerp(test_other, TINTED), test_y)
        print(f"true renders called clean: {(judge.brokenness(test_x) < BROKEN).float().mean():.4f}")
        bad = torch.stack([harmed(t, o, rng) for t, o in zip(test_x, test_x.roll(1, 0), strict=True)])
        spoilt = (surfaces(bad, test_x) == 0).flatten(1).sum(1)
        for low, high in ((1, 4), (4, 16), (16, 257)):
            some = (spoilt >= low) & (spoilt < high)
            share = (judge.brokenness(bad[some]) >= BROKEN).float().mean()
            print(f"pictures with {low} to {high - 1} broken spots called broken: {share:.4f} of {some.sum()}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    train()
