"""What was picked: every LoRA's share of an image, step by step, and as text in its infotext."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from loratorio_ext.settings import INFOTEXT_PREFIX

PICKED_KEY = f"{INFOTEXT_PREFIX} picked"
STEPS_KEY = f"{INFOTEXT_PREFIX} steps"


def reach(patches: Sequence[int], patch_size: int, latent: Sequence[int]) -> tuple[float, float]:
    """How far patches ``[h, w]`` reach over a latent of ``[H, W]`` pixels, as factors of its sides: 1 where the last
    ones are whole. Patches of another latent (a model with another scale) are taken to end with it."""
    factors = [count * patch_size / side for count, side in zip(patches, latent)]
    ends = all((count - 1) * patch_size < side for count, side in zip(patches, latent))
    return tuple(factors) if ends and min(factors) >= 1 else (1.0, 1.0)


def as_shares(weights: np.ndarray) -> np.ndarray:
    """What of a patch is whose, ``[N, ...]``, from weights: where gates add up to more than 1, their proportions. What
    is left of 1 is the base model's."""
    total = weights.sum(axis=0)
    # Not for what rounding makes of 1.
    return weights / np.where(total > 1 + 1e-5, total, 1)


@dataclass(frozen=True)
class StepWeights:
    """One model call: shares ``[N, B, h, w]`` of N LoRAs in B images, an image's as the mean of its rows'.
    ``reach``: how far the patches reach over the image, as factors of its height and width (see `reach`)."""

    loras: tuple[str, ...]
    weights: np.ndarray
    reach: tuple[float, float] = (1.0, 1.0)


class Record:
    """The steps of one batch of images; a second pass (hires fix) follows the first.

    ``images``: how many there are, though nothing be composed of them (the user may skip a batch). ``everywhere``: the
    LoRAs that were in every pass, the base model's too, in order.
    """

    def __init__(self, images: int = 0):
        self.steps: list[StepWeights] = []
        self._images = images
        self.everywhere: dict[str, None] = {}

    def add(
        self,
        loras: Sequence[str],
        weights: np.ndarray,
        image_of_row: Sequence[int],
        reach: tuple[float, float] = (1.0, 1.0),
        everywhere: Iterable[str] = (),
    ) -> None:
        """One step's patch weights ``[N, R, h, w]``, a row of which belongs to an image; kept `as_shares`."""
        self.everywhere.update(dict.fromkeys(everywhere))
        rows, weights = np.asarray(image_of_row), as_shares(weights)
        of_images = np.stack([weights[:, rows == image].mean(axis=1) for image in range(rows.max() + 1)], axis=1)
        self.steps.append(StepWeights(tuple(loras), of_images.astype(np.float32), reach))

    @property
    def loras(self) -> list[str]:
        """Every LoRA of any step, in order."""
        return list(dict.fromkeys(name for step in self.steps for name in step.loras))

    @property
    def images(self) -> int:
        return self.steps[0].weights.shape[1] if self.steps else self._images

    def share_table(self, image: int) -> np.ndarray:
        """``[S, N]``: the share of each of `loras` in each step, 0 where it took no part."""
        place = {name: index for index, name in enumerate(self.loras)}
        table = np.zeros((len(self.steps), len(place)), np.float32)
        for row, step in zip(table, self.steps):
            for name, share in zip(step.loras, step.weights[:, image].mean(axis=(1, 2))):
                row[place[name]] = share
        return table

    def mean_maps(self, image: int, size: tuple[int, int] | None = None, smooth: bool = False) -> np.ndarray:
        """``[N, H, W]``: the weights of each of `loras` over an image of ``size``, width and height, as the mean over
        the steps; without a size, in as many patches as the last step has."""
        width, height = size or self.steps[-1].weights.shape[:1:-1]
        place = {name: index for index, name in enumerate(self.loras)}
        summed = np.zeros((len(place), height, width), np.float32)
        # Patches of one kind of step are added up before they are spread over the pixels.
        kinds: dict[tuple, list[StepWeights]] = {}
        for step in self.steps:
            kinds.setdefault((step.loras, step.weights.shape, step.reach), []).append(step)
        for (loras, shape, reach), steps in kinds.items():
            total = np.sum([step.weights[:, image] for step in steps], axis=0)
            box = (0, 0, shape[3] / (1 if size is None else reach[1]), shape[2] / (1 if size is None else reach[0]))
            how = Image.BILINEAR if smooth else Image.NEAREST if size else Image.BOX
            for name, patches in zip(loras, total):
                summed[place[name]] += np.asarray(Image.fromarray(patches).resize((width, height), how, box))
        return summed / len(self.steps)

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


class TextOfEach(list):
    """A text an image. Hosts look them up by an image's place; images that others have added to the batch have none."""

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, int) and place >= len(self):
            return None
        return super().__getitem__(place)


class StepData(dict):
    """Data of the host's answer, and no text: ``{"loras": [name, ...], "shares": [image][step][lora]}``; with maps,
    also ``"base": [image][step]``, the base model's shares, and ``"maps": [image][lora][row][column]``, weights by
    patch as the mean over the steps. Of an image that was skipped before its first step, every list is empty.

    Hosts write their parameters into infotexts, where what can be called stands for what it returns, and None for
    nothing.
    """

    def __call__(self, **_: Any) -> None:
        return None

    @classmethod
    def of(cls, records: Sequence[Record], maps: bool = False) -> "StepData":
        loras = list(dict.fromkeys(name for record in records for name in record.loras))
        found = cls(loras=loras, shares=[], **({"base": [], "maps": []} if maps else {}))
        for record in records:
            columns = [record.loras.index(name) if name in record.loras else None for name in loras]
            for image in range(record.images):
                table = record.share_table(image)
                rows = [[0.0 if at is None else round(float(row[at]), 4) for at in columns] for row in table]
                found["shares"].append(rows)
                if maps:
                    found["base"].append([round(max(0.0, 1 - float(row.sum())), 4) for row in table])
                if maps and not record.steps:
                    found["maps"].append([])
                elif maps:
                    of_loras = record.mean_maps(image)
                    nothing = np.zeros_like(of_loras[0])
                    by_lora = [nothing if at is None else of_loras[at] for at in columns]
                    found["maps"].append([[[round(float(v), 3) for v in row] for row in each] for each in by_lora])
        return found
