"""What was picked: every LoRA's share of an image, step by step, and as text in its infotext."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loratorio_ext.settings import INFOTEXT_PREFIX

PICKED_KEY = f"{INFOTEXT_PREFIX} picked"
STEPS_KEY = f"{INFOTEXT_PREFIX} steps"


@dataclass(frozen=True)
class StepWeights:
    """One model call: patch weights ``[N, B, h, w]`` of N LoRAs in B images, an image's as the mean of its rows'."""

    loras: tuple[str, ...]
    weights: np.ndarray


class Record:
    """The steps of one batch of images; a second pass (hires fix) follows the first."""

    def __init__(self):
        self.steps: list[StepWeights] = []

    def add(self, loras: Sequence[str], weights: np.ndarray, image_of_row: Sequence[int]) -> None:
        """One step's patch weights ``[N, R, h, w]``, a row of which belongs to an image."""
        rows = np.asarray(image_of_row)
        of_images = np.stack([weights[:, rows == image].mean(axis=1) for image in range(rows.max() + 1)], axis=1)
        self.steps.append(StepWeights(tuple(loras), of_images.astype(np.float32)))

    @property
    def loras(self) -> list[str]:
        """Every LoRA of any step, in order."""
        return list(dict.fromkeys(name for step in self.steps for name in step.loras))

    @property
    def images(self) -> int:
        return self.steps[0].weights.shape[1] if self.steps else 0

    def share_table(self, image: int) -> np.ndarray:
        """``[S, N]``: the share of each of `loras` in each step, 0 where it took no part."""
        place = {name: index for index, name in enumerate(self.loras)}
        table = np.zeros((len(self.steps), len(place)), np.float32)
        for row, step in zip(table, self.steps):
            for name, share in zip(step.loras, step.weights[:, image].mean(axis=(1, 2))):
                row[place[name]] = share
        return table

    def shares(self) -> list[dict[str, float]]:
        """For each image, each LoRA's mean share over the steps."""
        return [dict(zip(self.loras, map(float, self.share_table(image).mean(axis=0)))) for image in range(self.images)]


def written_shares(shares: Mapping[str, float]) -> str:
    """``name share; name share``, the largest first, without those that round to nothing; see `read_shares`.

    A semicolon or backslash in a name, and white space at its beginning, follows a backslash.
    """
    ordered = sorted(shares.items(), key=lambda item: -item[1])
    return "; ".join(f"{escaped(name)} {share:.3f}" for name, share in ordered if share >= 0.0005)


def escaped(name: str) -> str:
    return re.sub(r"^\s|[\\;]", lambda match: "\\" + match[0], name)


def read_shares(text: str) -> dict[str, float]:
    """The names and shares that `written_shares` has written; raises ValueError for other text."""
    found = {}
    for part in re.findall(r"\s*((?:\\.|[^\\;])+)", text, re.DOTALL):
        name, _, share = part.rpartition(" ")
        found[re.sub(r"\\(.)", r"\1", name, flags=re.DOTALL)] = float(share)
    return found


class StepData(dict):
    """``{"loras": [name, ...], "shares": [image][step][lora]}``: data of the host's answer, and no text.

    Hosts write their parameters into infotexts, where what can be called stands for what it returns, and None for
    nothing.
    """

    def __call__(self, **_: Any) -> None:
        return None

    @classmethod
    def of(cls, records: Sequence[Record]) -> "StepData":
        loras = list(dict.fromkeys(name for record in records for name in record.loras))
        images = []
        for record in records:
            columns = [record.loras.index(name) if name in record.loras else None for name in loras]
            for image in range(record.images):
                table = record.share_table(image)
                images.append([[0.0 if at is None else round(float(row[at]), 4) for at in columns] for row in table])
        return cls(loras=loras, shares=images)
