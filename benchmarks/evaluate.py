"""Does composition work? Composes tiny-world LoRAs by every method and lets the world's judge count.

::

    ./dev evaluate --suite quick                # every method, a few images of each
    ./dev evaluate --suite ceiling              # what perfect information reaches, beside Merge and the defaults
    ./dev evaluate --suite sweep                # the defaults with one option otherwise, on the same half
    ./dev evaluate --suite sweep --variants "p 2"   # some of these
    ./dev evaluate --suite confirm              # the defaults, between Merge and the ceiling, on the other half
    ./dev evaluate --suite five                 # the defaults and finer patches with five LoRAs, likewise
    ./dev evaluate --suite others               # other methods, baselines and turbo modes, likewise
    ./dev evaluate --suite soup                 # a baseline that learns for each of them
    ./dev evaluate --suite pool                 # all LoRAs loaded, one to three of them named
    ./dev evaluate --report                     # table and plot of what is in the results file

Every row of the results file (JSON lines) is one combination of LoRAs, composed in one way, for a few seeds, which are
the same for every way. What the file holds is not computed again, so a run may be cut short and taken up. Several
processes share the work: ``accelerate launch --num_processes N -m benchmarks.evaluate …`` on GPUs, on CPUs
``torchrun --nproc_per_node N -m benchmarks.evaluate …``. The same runner takes ComposLoRA and a real checkpoint:
``--suite composlora --root DIR --model FILE``.
"""

import argparse
import contextlib
import functools
import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from benchmarks import composlora
from benchmarks.ceiling import in_every_pass
from benchmarks.painting import Painting, paint, psnr, step_statistics
from benchmarks.report import write_report
from benchmarks.variants import (
    BOUNDS,
    CONFIRM,
    EVERYWHERE,
    FIVE,
    METHODS,
    OTHERS,
    POOL,
    SOUP,
    SWEEP,
    TURBO,
    Options,
    exact_of,
    resolved,
    variant_name,
)
from benchmarks.world import KINDS, World, interleaved, render

RESULTS = Path(__file__).resolve().parent / "results"


NAMED = ("2", "3", "4", "5")
"""Groups whose scenes name all LoRAs that are loaded."""


@dataclass(frozen=True)
class Suite:
    """What to compose in which ways: ``images`` of every combination of one half at a time, alone and in company, until
    a group has as many as it is ``wanted`` to; 0: once."""

    half: str
    variants: tuple[Options, ...]
    images: int
    groups: tuple[str, ...] = (*NAMED, "2+1")
    combinations: int | None = None
    wanted: int = 0


SUITES = {
    "quick": Suite("confirm", METHODS, images=2, combinations=10),
    "ceiling": Suite("choose", BOUNDS, images=4, groups=NAMED, wanted=96),
    "sweep": Suite("choose", SWEEP, images=2, groups=NAMED),
    "confirm": Suite("confirm", CONFIRM, images=2, groups=NAMED, wanted=200),
    "five": Suite("confirm", FIVE, images=6, groups=("5",), wanted=48),
    "others": Suite("confirm", (*METHODS, *OTHERS, *TURBO), images=2),
    "soup": Suite("confirm", SOUP, images=2),
    "pool": Suite("confirm", POOL, images=2, groups=("1", "1+6", "2", "2+5", "3", "3+4")),
}


@dataclass(frozen=True)
class Unit:
    """One combination of LoRAs of one kind, for a few seeds."""

    combination: Any
    kind: str
    seeds: tuple[int, ...]

    def key(self, world: Any, options: Options) -> str:
        """What tells a row from all others."""
        identity = [world.state, self.kind, self.combination.name, self.seeds, dict(world.call), resolved(options)]
        identity += ["half"] if world.half else []
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]

    def effective(self, options: Options) -> dict[str, Any]:
        """The options as they act here: those that act alike are painted once."""
        others = {name: value for name, value in options.items() if name != EVERYWHERE}
        if not (concept := in_every_pass(self.combination, options)):
            return others
        return {**others, EVERYWHERE: "everywhere" if concept == self.combination.scene.style else "surroundings"}

    def rows(self, world: Any, variants: Iterable[Options]) -> Iterator[dict[str, Any]]:
        """A row for each way; what comes fast is compared with what is exact."""

        @functools.cache
        def painting(options: str) -> Painting:
            return paint(world, self.combination, self.kind, json.loads(options), self.seeds)

        for options in map(resolved, variants):
            made = painting(json.dumps(self.effective(options)))
            exact = exact_of(options)
            yield {
                "key": self.key(world, options),
                "kind": self.kind,
                "group": self.combination.group,
                "combination": self.combination.name,
                "prompt": self.combination.prompt,
                "variant": variant_name(options),
                "seeds": list(self.seeds),
                **world.judged(self.combination, made.images),
                **step_statistics(made.steps),
                **({} if exact is None else {"psnr": psnr(made.images, painting(json.dumps(exact)).images)}),
                "cost": round(made.cost, 3),
                "seconds": round(made.seconds, 2),
            }


def units(suite: Suite, kinds: Sequence[str], concepts: Sequence[str] = tuple(render.CONCEPTS)) -> list[Unit]:
    """A suite's work as far as it needs these concepts only, in an order of which every beginning is balanced."""
    possible = [each for each in interleaved(suite.groups, suite.half) if set(each.loras) <= set(concepts)]
    chosen = possible[: suite.combinations]
    once = Counter(each.group for each in chosen)
    rounds = {group: max(1, math.ceil(suite.wanted / (suite.images * count))) for group, count in once.items()}
    return [
        Unit(each, kind, tuple(range(each.seed + turn * suite.images, each.seed + (turn + 1) * suite.images)))
        for turn in range(max(rounds.values(), default=0))
        for each in chosen
        if turn < rounds[each.group]
        for kind in kinds
    ]


def named(variants: Iterable[Options], words: Sequence[str]) -> tuple[Options, ...]:
    """The variants whose names in tables hold all of the words; raises `SystemExit` where there is none."""
    found = tuple(each for each in variants if all(f" {word}," in f" {variant_name(each)}," for word in words))
    if not found:
        raise SystemExit(f"No variant of this suite is named with {', '.join(map(repr, words))}")
    return found


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a results file; a line that an interrupt cut short does not count."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = []
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def append(path: Path, row: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def run(work: Sequence[Unit], variants: Sequence[Options], path: Path, world: Any, deadline: float) -> int:
    """Does the work that the results file does not hold, until it is done or time is up; returns how many rows."""
    done = {row["key"] for row in read_rows(path)}
    added = 0
    for unit in work:
        missing = [options for options in variants if unit.key(world, options) not in done]
        for row in unit.rows(world, missing):
            append(path, row)
            added += 1
            if time.monotonic() > deadline:
                return added
    return added


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=(*SUITES, "composlora"), default="quick")
    parser.add_argument("--budget", type=float, default=60, metavar="MINUTES", help="start nothing new after so long")
    parser.add_argument("--results", type=Path, help="the results file; default benchmarks/results/SUITE.jsonl")
    parser.add_argument("--report", action="store_true", help="only write table and plot of the results file")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument(
        "--variants", nargs="+", metavar="WORDS", default=(), help="those named with all of these words"
    )
    parser.add_argument("--concepts", nargs="+", choices=render.CONCEPTS, default=tuple(render.CONCEPTS))
    parser.add_argument("--half", action="store_true", help="multiply in bfloat16: faster where the processor can")
    composlora.add_arguments(parser.add_argument_group("--suite composlora"))
    args = parser.parse_args()
    path = args.results or RESULTS / f"{args.suite}.jsonl"
    if not args.report:
        workers = PartialState(cpu=not torch.cuda.is_available())  # which otherwise does not share a CPU's work
        deadline = time.monotonic() + 60 * args.budget
        if args.suite == "composlora":
            world = composlora.World(args, workers.device, args.half)
            variants, work = METHODS, [Unit(each, args.style, (composlora.SEED,)) for each in world.combinations()]
        else:
            world, variants = World(workers.device, args.half), named(SUITES[args.suite].variants, args.variants)
            work = units(SUITES[args.suite], args.kinds, args.concepts)
        with torch.autocast(workers.device.type, torch.bfloat16, enabled=args.half):
            added = run(work[workers.process_index :: workers.num_processes], variants, path, world, deadline)
        print(f"{added} rows added to {path}")
        workers.wait_for_everyone()
        if not workers.is_main_process:
            return
    print(write_report(read_rows(path), path))


if __name__ == "__main__":
    main()
