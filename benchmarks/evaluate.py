"""Does composition work? Composes tiny-world LoRAs by every method and lets the world's judge count.

::

    ./dev evaluate --suite quick                # every method, 10 to 15 minutes on two cores
    ./dev evaluate --suite sweep --budget 60    # LoRAtorio's options, on one half of the combinations
    ./dev evaluate --suite confirm              # methods and defaults, on the other half
    ./dev evaluate --report                     # table and plot of what is in the results file

Every row of the results file (JSON lines) is one combination of LoRAs, composed in one way, for a few seeds, which are
the same for every way. What the file holds is not computed again, so a run may be cut short and taken up. Several
processes share the work under ``accelerate launch --num_processes N -m benchmarks.evaluate …``.
"""

import argparse
import functools
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.world import Combination, interleaved, questions, shown
from loratorio_ext.settings import OPTIONS, Settings

RESULTS = Path(__file__).resolve().parent / "results"
SIZE, STEPS, GUIDANCE = 128, 16, 4.0
PERFECT = 99.0  # decibels, in place of infinity

# --- what is compared -------------------------------------------------------------------------------------------------

Options = Mapping[str, Any]

MERGE, COMPOSITE = {"method": "merge"}, {"method": "composite"}
SWITCH = {"method": "switch", "switch_every": 2}  # so that in a few steps each of five LoRAs has its turns
PAPER = {"preset": "paper"}
CENTRE = {
    "method": "loratorio",
    "patch_size": 2,
    "temperature_mode": "adaptive",
    "temperature": 0.3,
    "relativity": 0.5,
    "base_share": 0.5,
}
"""The point from which the sweep goes along each axis."""

SWEEP = (
    MERGE,
    SWITCH,
    COMPOSITE,
    *({**PAPER, "temperature": tau, "patch_size": p} for tau, p in ((1.0, 4), (0.1, 4), (0.01, 4), (0.01, 2))),
    *({**CENTRE, "patch_size": p, "relativity": gamma} for p in (2, 4) for gamma in (0.0, 0.5, 1.0)),
    *({**CENTRE, "patch_size": p} for p in (1, 8)),
    *({**CENTRE, "temperature": kappa} for kappa in (0.1, 1.0)),
    *({**CENTRE, "base_share": share} for share in (0.0, 1.0)),
    {**CENTRE, "upsampling": "bilinear"},
    {**CENTRE, "top_k": 2},
)
TURBO = tuple({"refresh": 1, "warmup": warmup} for warmup in (0, 1, 2))
METHODS = (MERGE, SWITCH, COMPOSITE, PAPER, {})


@dataclass(frozen=True)
class Suite:
    """What to compose in which ways: ``images`` of every combination of one half, alone and in company."""

    half: str
    variants: tuple[Options, ...]
    images: int
    groups: tuple[str, ...] = ("2", "3", "4", "5", "2+1")
    combinations: int | None = None


SUITES = {
    "quick": Suite("confirm", METHODS, images=2, combinations=10),
    "sweep": Suite("choose", SWEEP, images=2),
    "confirm": Suite("confirm", (*METHODS, *TURBO), images=4),
}


def resolved(options: Options) -> dict[str, Any]:
    """Every option that the method uses, by name, so that a result means the same when defaults change."""
    settings = Settings.from_mapping(options)
    return {
        option.name: getattr(settings, option.name)
        for option in OPTIONS
        if option.used_by(settings.method) and option.name != "enabled"
    }


def variant_name(options: Options) -> str:
    """Options in a few words, with the method's symbols: "adaptive κ 0.3, γ 0.5, p 2, λ 0.5"."""
    settings = Settings.from_mapping(options)
    if settings.method == "switch":
        return f"switch every {settings.switch_every}"
    if settings.method != "loratorio":
        return settings.method
    temperature = {"adaptive": "adaptive κ", "fixed": "fixed τ"}[settings.temperature_mode]
    words = [
        f"{temperature} {settings.temperature:g}",
        f"γ {settings.relativity:g}",
        f"p {settings.patch_size}",
        f"λ {settings.base_share:g}",
    ]
    if settings.upsampling != "nearest":
        words.append(settings.upsampling)
    if settings.top_k:
        words.append(f"top {settings.top_k} per {settings.selection_scope}")
    if settings.refresh:
        words.append(f"refresh {settings.refresh} after {settings.warmup}")
    return ", ".join(words)


# --- one combination, one way -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Painting:
    """The images of one call of the pipeline, and what was seen of its steps."""

    images: list[Any]
    steps: list[Any]
    seconds: float

    @property
    def cost(self) -> float:
        """Rows evaluated by the model, as a multiple of what merged LoRAs need."""
        rows = [2 + len(step.plan.isolated) * (1 + step.plan.uncond) for step in self.steps]
        return float(np.mean(rows)) / 2


def paint(world: Any, combination: Combination, kind: str, options: Options, seeds: Sequence[int]) -> Painting:
    """Images of the combination's scene, one a seed."""
    from loratorio_ext.hosts.diffusers import composed, generators

    started = time.perf_counter()
    loras = [world.lora(concept, kind) for concept in combination.loras]
    with composed(world.pipe, loras, **options) as composition:
        images = world.pipe(
            combination.prompt,
            num_images_per_prompt=len(seeds),
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            width=SIZE,
            height=SIZE,
            generator=generators(seeds),
        ).images
    return Painting(images, composition.steps, time.perf_counter() - started)


def psnr(images: Sequence[Any], exact: Sequence[Any]) -> list[float]:
    """Peak signal to noise ratio of each image against its exact counterpart, in decibels."""
    errors = [np.mean((np.float64(a) - np.float64(b)) ** 2) for a, b in zip(images, exact)]
    return [round(min(PERFECT, 10 * float(np.log10(255**2 / error))) if error else PERFECT, 2) for error in errors]


def figures(values: Any, digits: int = 4) -> list[float]:
    """Numbers with this many significant digits."""
    return [float(f"{float(value):.{digits}g}") for value in values]


def step_statistics(steps: Sequence[Any]) -> dict[str, list[float]]:
    """Step by step, the mean similarity to the base model and its spread over the LoRAs; each LoRA's mean weight."""
    weighed = [step for step in steps if step.weights is not None]
    if not weighed:
        return {}
    return {
        "similarity": figures(step.similarity.mean() for step in weighed),
        "spread": figures(step.similarity.std(dim=0, correction=0).mean() for step in weighed),
        "weights": figures(np.mean([step.weights.flatten(1).mean(1).numpy() for step in weighed], axis=0)),
    }


def judged(world: Any, combination: Combination, images: Sequence[Any]) -> dict[str, Any]:
    """What the judge says of images: each concept at its place, intruders, and how close they are to true renders."""
    seen = world.judge.read(images)
    follows = world.judge.follows(images, combination.scene)
    asked = questions(combination.scene)
    return {
        "present": {concept: list(map(int, follows[asked[concept]])) for concept in combination.named},
        "intruders": {
            concept: list(map(int, shown(seen, concept)))
            for concept in combination.loras
            if concept not in combination.named
        },
        "follows": figures(np.mean(list(follows.values()), axis=0)),
        "distance": figures(world.judge.distance(images, combination.scene)),
    }


# --- a suite ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unit:
    """The work on one combination of LoRAs of one kind: the ways not yet in the results file."""

    combination: Combination
    kind: str
    seeds: tuple[int, ...]

    def key(self, options: Options) -> str:
        """What tells a row from all others."""
        identity = [self.kind, self.combination.name, list(self.seeds), STEPS, resolved(options)]
        return json.dumps(identity, ensure_ascii=False, sort_keys=True)

    def rows(self, world: Any, variants: Iterable[Options]) -> Iterator[dict[str, Any]]:
        """A row for each way; what comes fast is compared with what is exact."""

        @functools.cache
        def painting(options: str) -> Painting:
            return paint(world, self.combination, self.kind, json.loads(options), self.seeds)

        for options in map(resolved, variants):
            made = painting(json.dumps(options))
            exact = painting(json.dumps({**options, "refresh": 0})) if options.get("refresh") else None
            yield {
                "key": self.key(options),
                "kind": self.kind,
                "group": self.combination.group,
                "combination": self.combination.name,
                "prompt": self.combination.prompt,
                "variant": variant_name(options),
                "seeds": list(self.seeds),
                **judged(world, self.combination, made.images),
                **step_statistics(made.steps),
                **({} if exact is None else {"psnr": psnr(made.images, exact.images)}),
                "cost": round(made.cost, 3),
                "seconds": round(made.seconds, 2),
            }


def units(suite: Suite, kinds: Sequence[str]) -> list[Unit]:
    """A suite's work, in an order of which every beginning is balanced."""
    chosen = interleaved(suite.groups, suite.half)[: suite.combinations]
    return [
        Unit(combination, kind, tuple(range(combination.seed, combination.seed + suite.images)))
        for combination in chosen
        for kind in kinds
    ]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a results file; a last line cut short by an interrupt does not count."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def append(path: Path, row: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def run(work: Sequence[Unit], variants: Sequence[Options], path: Path, world: Any, deadline: float) -> int:
    """Does the work that the results file does not hold, until it is done or time is up; returns how many rows."""
    done = {row["key"] for row in read_rows(path)}
    added = 0
    for unit in work:
        missing = [options for options in variants if unit.key(options) not in done]
        for row in unit.rows(world, missing):
            append(path, row)
            added += 1
            if time.monotonic() > deadline:
                return added
    return added


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=SUITES, default="quick")
    parser.add_argument("--kinds", nargs="+", choices=("quiet", "leaky"), default=("quiet", "leaky"))
    parser.add_argument("--budget", type=float, default=60, metavar="MINUTES", help="start nothing new after so long")
    parser.add_argument("--results", type=Path, help="the results file; default benchmarks/results/SUITE.jsonl")
    parser.add_argument("--report", action="store_true", help="only write table and plot of the results file")
    args = parser.parse_args()
    path = args.results or RESULTS / f"{args.suite}.jsonl"
    suite = SUITES[args.suite]
    if not args.report:
        from accelerate import PartialState

        from benchmarks.world import World

        workers = PartialState(cpu=True)
        deadline = time.monotonic() + 60 * args.budget
        mine = units(suite, args.kinds)[workers.process_index :: workers.num_processes]
        added = run(mine, suite.variants, path, World(), deadline)
        print(f"{added} rows added to {path}")
        workers.wait_for_everyone()
        if not workers.is_main_process:
            return
    from benchmarks.report import write_report

    print(write_report(read_rows(path), path))


if __name__ == "__main__":
    main()
