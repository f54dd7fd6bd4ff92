"""A reader of pictures that is asked questions, each a softmax over answers."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import render

SEED = 77
IGNORED = -100


class Reader(nn.Module):
    """A `body` that makes features of pictures and a `head` that answers; of a subclass are the class's own fields.

    `heads`: the questions, and the answers to each, the first of which is nothing. `file`: where its weights are.
    """

    heads: Mapping[str, Sequence[str]]
    file: Path

    @staticmethod
    def answers(scene: render.Scene) -> dict[str, str]:
        """What a perfect reader would say of a scene, head by head, as far as it can be told."""
        raise NotImplementedError

    @staticmethod
    def see(images) -> torch.Tensor:
        """PIL images as what the network is given."""
        raise NotImplementedError

    @classmethod
    def load(cls):
        """The trained one."""
        new = cls()
        state = load_file(cls.file)
        new.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
        return new.eval()

    def save(self) -> None:
        """Writes the weights, in fp16."""
        state = self.state_dict()
        save_file({k: v.half() if v.is_floating_point() else v for k, v in state.items()}, self.file)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Logits, a tensor a head."""
        return list(self.head(self.body(x).relu()).split([len(c) for c in self.heads.values()], dim=1))

    @torch.no_grad()
    def read(self, images) -> dict[str, list[str]]:
        """What is to be seen, head by head; "" is nothing."""
        logits = self(self.see(images))
        return {
            head: [classes[i] for i in out.argmax(1)]
            for (head, classes), out in zip(self.heads.items(), logits, strict=True)
        }

    def follows(self, images, scene: render.Scene) -> dict[str, list[bool]]:
        """For everything the scene asks for, whether each picture shows it. What it does not mention is not judged."""
        seen = self.read(images)
        wanted = {head: answer for head, answer in self.answers(scene).items() if answer}
        return {head: [s == answer for s in seen[head]] for head, answer in wanted.items()}

    @torch.no_grad()
    def distance(self, images, scene: render.Scene, renders: int = 48) -> torch.Tensor:
        """How far each picture is from the nearest true render of the scene, in features, as a multiple of how far
        true renders are from their nearest other one. About 1: as good as true. Much more: a picture gone wrong."""
        rng = np.random.default_rng(SEED)
        true = self.body(self.see([render.render(scene, rng) for _ in range(renders)]))
        between = torch.cdist(true, true).fill_diagonal_(torch.inf).min(1).values.mean()
        return torch.cdist(self.body(self.see(images)), true).min(1).values / between

    def report(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Prints what share of the answers to `x` is right."""
        for head, out, want in zip(self.heads, self(x), y.T, strict=True):
            print(f"{head}: {(out.argmax(1) == want)[want != IGNORED].float().mean():.4f}")


def labels_of(said: Mapping[str, str], heads: Mapping[str, Sequence[str]]) -> list[int]:
    """Answers as class numbers."""
    return [classes.index(said[head]) if head in said else IGNORED for head, classes in heads.items()]


def blend(x: torch.Tensor, y: torch.Tensor, kinds: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Turns an eighth of a batch into half-and-half mixtures of two scenes, where only what both share is there;
    `kinds` are the questions for things, of which there is none then."""
    n = len(x) // 8
    mixed, shared = (x[:n] + x[n : 2 * n]) / 2, torch.where(y[:n] == y[n : 2 * n], y[:n], IGNORED)
    shared[:, kinds] = torch.where(y[:n] == y[n : 2 * n], y[:n], 0)[:, kinds]
    return torch.cat([mixed, x[n:]]), torch.cat([shared, y[n:]])
