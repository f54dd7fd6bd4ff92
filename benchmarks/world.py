"""The tiny world as the benchmarks use it: scenes that ask for several of its LoRAs at once, and who judges them."""

import hashlib
import itertools
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.statistics import figures
from loratorio_ext.hosts.diffusers import load_lora

TINYWORLD = Path(__file__).resolve().parent.parent / "tinyworld"
LORAS = TINYWORLD / "weights" / "lora"
sys.path.append(str(TINYWORLD))  # its modules know each other by their bare names

render = import_module("render")

KINDS = ("quiet", "leaky")
"""Of LoRAs: those that show their concept when it is named, and those that show it whatever the prompt says."""

OBJECTS = render.CONCEPT_KINDS
PLACES = ("left", "right")
SIZE = render.SIZE
SETTINGS = (*render.PLAIN, *render.SCENERY, *render.TOWNS)
BACKGROUNDS = tuple(name for name in SETTINGS if name not in render.HOMES)


@dataclass(frozen=True)
class Combination:
    """LoRAs loaded together, and a scene that asks for all of them but the last ``unnamed`` ones."""

    loras: tuple[str, ...]
    scene: Any
    unnamed: int = 0

    @property
    def named(self) -> tuple[str, ...]:
        return self.loras[: len(self.loras) - self.unnamed]

    @property
    def group(self) -> str:
        """What it counts among: the number of LoRAs named, and of those only loaded ("3", "2+1")."""
        return f"{len(self.named)}+{self.unnamed}" if self.unnamed else str(len(self.loras))

    @property
    def name(self) -> str:
        """The LoRAs, the unnamed ones in brackets: "zorg+skyline(+neon)"."""
        unnamed = "".join(f"(+{lora})" for lora in self.loras[len(self.named) :])
        return "+".join(self.named) + unnamed

    @property
    def seed(self) -> int:
        return zlib.crc32(self.name.encode()) % 1_000_000

    @property
    def prompt(self) -> str:
        return render.caption(self.scene)


def compatible(n: int) -> Iterator[tuple[str, ...]]:
    """Every choice of ``n`` concepts that fit into one scene: at most two of them are objects."""
    for concepts in itertools.combinations(render.CONCEPTS, n):
        if sum(concept in OBJECTS for concept in concepts) <= len(PLACES):
            yield concepts


def scene_of(concepts: Sequence[str]) -> Any:
    """A scene with these concepts. Places that they leave free hold the base model's things, one of which wears the
    crown if it can. Depends on the concepts alone."""
    rng = np.random.default_rng(zlib.crc32("+".join(concepts).encode()))
    objects = [concept for concept in concepts if concept in OBJECTS]
    kinds = rng.permutation([*objects, *rng.choice(render.KINDS, len(PLACES) - len(objects), replace=False)])
    things = [
        render.Thing(str(kind), place, colour="" if kind in OBJECTS else str(rng.choice(list(render.COLOURS))))
        for kind, place in zip(kinds, PLACES)
    ]
    if worn := of_category("clothing", concepts):
        head = next((i for i, thing in enumerate(things) if thing.colour), int(rng.integers(len(things))))
        things[head] = replace(things[head], wears=worn)
    background = of_category("background", concepts) or str(rng.choice(BACKGROUNDS))
    return render.Scene(background, tuple(things), style=of_category("style", concepts))


def of_category(category: str, concepts: Sequence[str]) -> str:
    """The first of the concepts that is of a category; "": none is."""
    return next((concept for concept in concepts if render.CONCEPTS[concept].category == category), "")


def shuffled(values: Sequence[Any], name: str) -> list[Any]:
    return [values[i] for i in np.random.default_rng(zlib.crc32(name.encode())).permutation(len(values))]


def combinations(group: str) -> list[Combination]:
    """Every combination of a group, in an order of no meaning; with unnamed LoRAs one choice of them for each."""
    named, _, unnamed = group.partition("+")
    found = []
    for concepts in compatible(int(named)):
        rest = [concept for concept in render.CONCEPTS if concept not in concepts]
        extra = shuffled(rest, "+".join(concepts))[: int(unnamed or 0)]
        found.append(Combination((*concepts, *extra), scene_of(concepts), len(extra)))
    return shuffled(found, group)


def split(found: Sequence[Combination], half: str) -> list[Combination]:
    """The half of a group's combinations in which settings are chosen, or the other, which confirms them."""
    return list(found[{"choose": 0, "confirm": 1}[half] :: 2])


def interleaved(groups: Sequence[str], half: str) -> list[Combination]:
    """The combinations of several groups by turns, so that each beginning of the list holds all groups alike."""
    rounds = itertools.zip_longest(*(split(combinations(group), half) for group in groups))
    return [combination for turn in rounds for combination in turn if combination is not None]


def questions(scene: Any) -> dict[str, str]:
    """For each concept of a scene, which of the judge's questions it answers: places, "left wears", "background"."""
    answers = {thing.kind: thing.place for thing in scene.things}
    answers |= {thing.wears: f"{thing.place} wears" for thing in scene.things}
    answers |= {scene.background: "background", scene.style: "style"}
    return {concept: asked for concept, asked in answers.items() if concept in render.CONCEPTS}


def shown(seen: dict[str, list[str]], concept: str) -> list[bool]:
    """Whether each picture shows the concept anywhere, by what the judge has seen."""
    heads = {"clothing": [f"{place} wears" for place in render.PLACES], "background": ["background"]}
    heads |= {"style": ["style"]}
    answers = zip(*(seen[head] for head in heads.get(render.CONCEPTS[concept].category, render.PLACES)))
    return [concept in of_image for of_image in answers]


def judged(judge: Any, combination: Combination, images: Sequence[Any]) -> dict[str, Any]:
    """What the judge says of images: each concept at its place, intruders, and how close they are to true renders."""
    seen, follows = judge.read(images), judge.follows(images, combination.scene)
    asked = questions(combination.scene)
    unnamed = combination.loras[len(combination.named) :]
    return {
        "present": {concept: list(map(int, follows[asked[concept]])) for concept in combination.named},
        "intruders": {concept: list(map(int, shown(seen, concept))) for concept in unnamed},
        "follows": figures(np.mean(list(follows.values()), axis=0)),
        **{mark: list(map(int, told)) for mark, told in judge.marks(images).items()},
        "distance": figures(judge.distance(images, combination.scene)),
    }


def state(folder: Path) -> str:
    """A word for what the weights in a folder are: another where one of them has changed."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        found.update(hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()[:16]


class World:
    """The pipeline, its LoRAs as they are asked for, and the judge. ``call``: the pipeline's arguments; ``half``: it
    multiplies in bfloat16, as people's machines do; ``state``: a word for what all the weights are."""

    call: Mapping[str, Any] = {"num_inference_steps": 16, "guidance_scale": 3.0, "width": SIZE, "height": SIZE}

    def __init__(self, device: Any = "cpu", half: bool = False):
        if not any(LORAS.glob("*.safetensors")):
            raise SystemExit(f"The tiny world is not trained: {LORAS} has no LoRA (see tinyworld/MODEL_CARD.md)")
        self.pipe = import_module("load").pipeline().to(device)
        self.judge = import_module("classifier").Classifier.load()
        self.loaded: dict[Path, Any] = {}
        self.half, self.state = half, state(TINYWORLD / "weights")

    def lora(self, concept: str, kind: str) -> Any:
        path = LORAS / f"{concept}_{kind}.safetensors"
        if path not in self.loaded:
            self.loaded[path] = load_lora(self.pipe, path)
        return self.loaded[path]

    def judged(self, combination: Combination, images: Sequence[Any]) -> dict[str, Any]:
        return judged(self.judge, combination, images)
