"""The benchmarks' bookkeeping: combinations, resuming, statistics, tables; and one run over a tiny random pipeline."""

import argparse
import copy
import json
import math
import os
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import ceiling, composlora, demo, evaluate, soup, world
from benchmarks.baselines import CMLoRA, high_frequency_share
from benchmarks.evaluate import SUITES, Suite, Unit, named, read_rows, run, units
from benchmarks.painting import paint, psnr, step_statistics
from benchmarks.report import overview_table, write_report
from benchmarks.statistics import (
    Share,
    complete,
    loudest_are_named,
    painted_in_every_way,
    paired_difference,
    share_clean,
    share_complete,
    share_intruded,
    share_of_named,
    share_present,
)
from benchmarks.variants import (
    CEILING,
    CEILING_OF_SHARES,
    COMPETING,
    COMPOSITE,
    EVERYWHERE,
    METHODS,
    OTHERS,
    PERFECT,
    STYLES_ONLY,
    SWEEP,
    TRUTH,
    exact_of,
    resolved,
    variant_name,
)
from loratorio_ext.core import Plan, Predictions
from loratorio_ext.hosts.diffusers import Step, load_lora
from loratorio_ext.hosts.diffusers_loras import layers_of
from loratorio_ext.isolation import Isolation
from tests.tiny_pipelines import make_pipeline, write_lora

ROOT = Path(__file__).resolve().parents[1]
GROUPS = ("2", "3", "4", "5", "2+1", "3+1")


# --- combinations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group, count", list(zip(GROUPS, (21, 31, 22, 6, 21, 31))))
def test_every_combination_is_one_scene_that_names_its_concepts(group, count):
    found = world.combinations(group)
    assert len({each.name for each in found}) == count
    for each in found:
        assert each.group == group
        assert len(set(each.loras)) == len(each.loras)
        assert set(world.questions(each.scene)) == set(each.named)
        for concept in world.render.CONCEPTS:
            assert (world.render.CONCEPTS[concept].trigger in each.prompt) == (concept in each.named), each.prompt


def test_halves_share_nothing_and_miss_nothing():
    found = world.combinations("3")
    choose, confirm = world.split(found, "choose"), world.split(found, "confirm")
    assert {each.name for each in choose} | {each.name for each in confirm} == {each.name for each in found}
    assert not {each.name for each in choose} & {each.name for each in confirm}
    assert abs(len(choose) - len(confirm)) <= 1


def test_a_beginning_of_the_work_is_balanced():
    assert [each.group for each in world.interleaved(GROUPS[:4], "choose")[:8]] == ["2", "3", "4", "5"] * 2
    assert world.interleaved(GROUPS, "choose") == world.interleaved(GROUPS, "choose")


# --- variants ---------------------------------------------------------------------------------------------------------


def test_every_variant_of_a_suite_has_a_name_of_its_own():
    for suite in SUITES.values():
        assert len({variant_name(options) for options in suite.variants}) == len(suite.variants)
    assert variant_name({"preset": "paper"}) == "fixed τ 1, γ 0, p 4, λ 0.5"


def test_variants_are_found_by_words_of_their_names():
    variants = SUITES["sweep"].variants
    assert named(variants, ()) == variants
    assert {variant_name(each) for each in named(variants, ("gates q 4", "surroundings in every pass"))} == {
        "gates q 4, γ 1, p 4, λ 0.25, sliding, momentum 0.8, surroundings in every pass"
    }
    with pytest.raises(SystemExit, match="'p 20'"):
        named(variants, ("p 20",))


def test_a_row_does_not_depend_on_what_its_method_ignores():
    assert resolved({"method": "merge"}) == {"method": "merge"}
    assert resolved({"method": "switch", "temperature": 9.0}) == resolved({"method": "switch"})
    assert all("enabled" not in resolved(options) for options in SWEEP)
    assert resolved({"warmup": 7, "selection_scope": "patch", "pool": ["a"]}) == resolved({})
    assert resolved({"warmup": 7, "refresh": 1}) != resolved({"refresh": 1})
    gates = {"combination": "gates"}
    assert resolved({**gates, "temperature": 9.0, "temperature_mode": "fixed"}) == resolved(gates) != resolved({})
    assert resolved({"sharpness": 9.0}) == resolved({})
    assert resolved({**gates, "sharpness": 9.0}) != resolved(gates)
    assert resolved({"patches": "sliding", "upsampling": "bilinear"}) == resolved({"patches": "sliding"})


def test_what_is_cheap_is_compared_with_what_is_exact():
    assert exact_of(resolved({})) is exact_of(resolved({"method": "merge"})) is exact_of(resolved({"top_k": 2})) is None
    for cheap in ({"refresh": 1}, {"base_share": 1.0}, {"preset": "fast"}):
        assert exact_of(resolved(cheap)) == resolved({})
    assert exact_of(resolved({"top_k": 2, "reselect_every": 3})) == resolved({"top_k": 2})


# --- baselines --------------------------------------------------------------------------------------------------------


def predictions_of(cond):
    """Composite's: the first LoRA is the host's own pass."""
    return Predictions(
        host_cond=cond[0],
        host_uncond=-cond[0],
        cond=cond[1:],
        uncond=-cond[1:],
        eps_base=cond[0],
        eps=cond[1:],
        image_of_row=(0,),
        gain=1.0,
    )


def waves(*periods):
    """``[N, 1, 1, 12, 12]``: stripes of these widths."""
    across = torch.arange(12.0)
    return torch.stack([torch.cos(2 * torch.pi * across / period).expand(1, 1, 12, 12) for period in periods])


def test_frequencies_are_told_apart():
    shares = high_frequency_share(waves(12, 2, 3, 6))
    torch.testing.assert_close(shares, torch.tensor([0.0, 1.0, 1.0, 0.0]), atol=1e-5, rtol=0)
    assert high_frequency_share(torch.zeros(1, 1, 1, 4, 4)) == 0


def test_cmlora_lets_low_frequencies_dominate_late_and_in_turn():
    """Three LoRAs of falling width: 0 is the widest; whoever dominates has 2.5 of 4.5, the others 1."""
    cond, method, dominant = waves(12, 4, 2), CMLoRA(10), []
    for number in range(10):
        assert method.plan(number, 3) == Plan(host=0, isolated=(1, 2), members=(0, 1, 2))
        result = method.combine(predictions_of(cond))
        weights = torch.tensor([[[1.0, 1, 2.5], [1, 2.5, 1], [2.5, 1, 1]][-1 - i] for i in range(3)]) / 4.5
        mixes = torch.einsum("kn,n...->k...", weights, cond)
        found = [i for i, mix in enumerate(mixes) if torch.allclose(mix, result.cond, atol=1e-5)]
        dominant += found
        torch.testing.assert_close(result.uncond, -result.cond)
    assert dominant == [2, 1, 2, 1, 2, 1, 1, 0, 1, 0]


def test_cmlora_of_one_is_its_own_prediction():
    cond, method = waves(3), CMLoRA(4)
    for number in range(4):
        method.plan(number, 1)
        torch.testing.assert_close(method.combine(predictions_of(cond)).cond, cond[0])


def test_baselines_paint(tiny):
    combination = world.combinations("2")[0]

    def image(options):
        return paint(tiny, combination, "quiet", options, (3,)).images[0].tobytes()

    assert image({"baseline": "concatenated", "power": 0.0}) == image({"method": "merge"})
    made = [image(options) for options in ({"method": "merge"}, {"method": "composite"}, *OTHERS)]
    assert len(set(made)) == len(made)
    assert image({"method": "composite"}) == made[1], "a baseline leaves nothing behind"


def test_a_soup_learns_what_its_scenes_show(tiny):
    combination = world.combinations("2")[0]
    loras = [tiny.lora(concept, "quiet") for concept in combination.loras]
    assert {value for each in soup.learned(tiny.pipe, loras, None, 0) for value in each.values()} == {1.0}

    def scenes(count, rng):
        pictures, captions = soup.similar_scenes(combination.scene, count, rng)
        return torch.nn.functional.interpolate(pictures, (32, 32)), captions

    def error(coefficients):
        errors = []
        for seed in range(4):
            drawn, generator = scenes(8, np.random.default_rng(100 + seed)), torch.Generator().manual_seed(seed)
            with torch.no_grad():
                found = soup.error(tiny.pipe, soup.merged(tiny.pipe, loras, coefficients), *drawn, generator)
            errors.append(float(found))
        return np.mean(errors)

    found = soup.learned(tiny.pipe, loras, scenes, 12)
    ones = [dict.fromkeys(lora.branches, 1.0) for lora in loras]
    assert error(found) < error(ones)


def test_a_soup_at_ones_is_merge(tiny):
    combination = world.combinations("2")[0]
    both = ({"baseline": "soup", "steps": 0}, {"method": "merge"})
    first, second = (paint(tiny, combination, "quiet", options, (3,)).images[0] for options in both)
    assert first.tobytes() == second.tobytes()
    loras = [tiny.lora(concept, "quiet") for concept in combination.loras]
    weights = soup.merged(tiny.pipe, loras, [dict.fromkeys(lora.branches, 1.0) for lora in loras])
    own = {f"{name.removeprefix('unet.')}.weight": each for name, each in weights.items() if name.startswith("unet.")}
    inputs = torch.randn(1, 4, 8, 8), torch.tensor([9]), torch.randn(1, 77, tiny.pipe.unet.config.cross_attention_dim)
    isolation = Isolation(layers_of(tiny.pipe), [lora.branches for lora in loras])
    with torch.no_grad():
        by_weights = torch.func.functional_call(tiny.pipe.unet, own, inputs).sample
        with isolation.merged():
            torch.testing.assert_close(by_weights, tiny.pipe.unet(*inputs).sample, rtol=1e-4, atol=1e-5)


# --- statistics -------------------------------------------------------------------------------------------------------


def row(variant="merge", combination="zorg+skyline", **fields):
    return {
        "kind": "quiet",
        "group": "2",
        "combination": combination,
        "variant": variant,
        "present": {"zorg": [1, 1, 0], "skyline": [1, 0, 0]},
        "intruders": {},
        "distance": [1.0, 2.0, 3.0],
        "cost": 1.0,
        "seeds": [1, 2, 3],
        **fields,
    }


def test_wilson_intervals():
    assert Share(0, 10).interval == pytest.approx((0, 0.2775), abs=1e-4)
    assert Share(8, 16).interval == pytest.approx((0.2800, 0.7200), abs=1e-4)
    assert str(Share(16, 16)) == "100 % (81–100)"
    assert math.isnan(Share(0, 0).value)


def test_shares_count_images_and_concepts():
    assert complete(row()) == [True, False, False]
    assert complete(row(clean=[0, 1, 1])) == [False, False, False] and complete(row(clean=[1, 0, 0]))[0]
    assert share_clean([row(clean=[1, 0, 1]), row()]) == Share(2, 3)
    assert share_complete([row(), row()]) == Share(2, 6)
    assert share_present([row()]) == Share(3, 6)
    assert share_present([row()], "zorg") == Share(2, 3)
    assert share_intruded([row(intruders={"neon": [0, 1, 1]}), row()]) == Share(2, 3)


def test_whether_the_named_loras_are_the_loudest():
    found = row(weights=[0.5, 0.1, 0.1, 0.3])
    assert share_of_named(found) == pytest.approx(0.6)
    assert loudest_are_named(found) == 0.5


def test_differences_are_paired_by_combination():
    rows = [row("a", name, present={"zorg": [1, 1]}) for name in "xyz"]
    rows += [row("b", name, present={"zorg": [0, 1]}) for name in "xy"]
    assert paired_difference(rows, "a", "b") == (0.5, 0.5, 0.5)
    assert all(math.isnan(value) for value in paired_difference(rows, "a", "c"))


def test_only_scenes_that_every_way_has_painted_are_compared():
    rows = [row("a", name, seeds=[seed]) for name in "xy" for seed in (1, 2)] + [row("b", "x", seeds=[2])]
    assert [(each["variant"], each["combination"], each["seeds"]) for each in painted_in_every_way(rows)] == [
        ("a", "x", [2]),
        ("b", "x", [2]),
    ]
    assert painted_in_every_way([]) == []


def test_the_overview_has_a_column_for_each_kind_and_number():
    kind = {"kind": "leaky", "present": {"zorg": [1, 1, 1]}, "clean": [1, 1, 0]}
    table = overview_table([row(), row(**kind), row("shy", **kind)]).splitlines()
    assert table[0] == "|  | quiet, N = 2 | leaky, N = 2 | all: complete | shown | clean | distance | cost |"
    assert table[2:] == [
        "| merge | 33 | 67 | 50 % (19–81) | 67 % | 67 % | 2.0 | 1.0 |",
        "| shy |  | 67 | 67 % (21–94) | 100 % | 67 % | 2.0 | 1.0 |",
    ]
    beside = overview_table([row(), row(group="2+1", intruders={"neon": [1, 0, 0]})]).splitlines()
    assert "| clean | an unnamed one shows | distance |" in beside[0] and "| 33 % | 2.0 |" in beside[2]


def test_psnr():
    from PIL import Image

    black, grey = (Image.new("RGB", (8, 8), (value,) * 3) for value in (0, 51))
    assert psnr([black, grey], [black, black]) == [99.0, 13.98]


# --- report -----------------------------------------------------------------------------------------------------------


def test_a_lora_that_takes_no_part_in_a_step_has_no_weight_there():
    def step(index, members, weights):
        plan, patches = Plan(Plan.BASE, members, members=members), torch.ones(len(members), 1, 2, 2)
        return Step(index, 1.0, plan, ("a", "b"), patches, torch.tensor(weights).view(-1, 1, 1, 1) * patches)

    found = step_statistics([step(0, (0, 1), [0.25, 0.75]), step(1, (1,), [1.0]), Step(2, 1.0, Plan(Plan.MERGED), ())])
    assert found["weights"] == pytest.approx([0.125, 0.875])


def test_the_report_tables_and_plots_every_variant(tmp_path):
    seen = {"similarity": [0.99, 0.9], "spread": [0.001, 0.02], "weights": [0.5, 0.5], "psnr": [20.0, 30.0, 22.0]}
    rows = [row(), row("composite"), row("shy", **seen), row("shy", group="2+1", intruders={"neon": [1, 0, 0]}, **seen)]
    text = write_report(rows, tmp_path / "rows.jsonl")
    assert (tmp_path / "rows.md").read_text(encoding="utf-8") == text
    assert (tmp_path / "rows.png").stat().st_size > 1000
    assert "| merge | 33 % (6–79) |" in text
    assert "N = 2, 1 more unnamed" in text
    assert "| quiet, N = 2 | 0.9900 ± 0.0010 |" in text
    assert "22.0 |" in text
    assert "| shy | 100 %, 100 % |" in text
    assert "| shy | 1.00 | +0 (+0 to +0) | +0 (+0 to +0) | 22.0 |" in text
    assert (tmp_path / "rows-price.png").stat().st_size > 1000
    assert write_report([], None) == "no results yet"


# --- a run ------------------------------------------------------------------------------------------------------------


class Judge:
    """Sees every concept asked for in the first image only."""

    def read(self, images):
        heads = [*world.render.PLACES, *(f"{place} wears" for place in world.render.PLACES), "background", "style"]
        return {head: ["comet", *[""] * (len(images) - 1)] for head in heads}

    def follows(self, images, scene):
        return {head: [True, *[False] * (len(images) - 1)] for head in world.questions(scene).values()}

    def marks(self, images):
        return {"clean": [True] * len(images)}

    def distance(self, images, scene):
        return [1.5] * len(images)


class TinyWorld:
    """Random models in place of the trained ones."""

    call = {"num_inference_steps": 3, "guidance_scale": 4.0, "width": 32, "height": 32}
    half, state = False, "random"

    def __init__(self, folder):
        self.pipe, self.judge = make_pipeline("sd1"), Judge()
        self.files = {
            concept: write_lora(folder / f"{concept}.safetensors", self.pipe, "attention", seed)
            for seed, concept in enumerate(world.render.CONCEPTS)
        }

    def lora(self, concept, kind):
        return load_lora(self.pipe, self.files[concept])

    def judged(self, combination, images):
        return world.judged(self.judge, combination, images)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return TinyWorld(tmp_path_factory.mktemp("tinyworld"))


VARIANTS = ({"method": "merge"}, {"preset": "paper"}, {"refresh": 1, "warmup": 1})


def test_a_run_is_taken_up_where_it_was_cut_short(tiny, tmp_path):
    path = tmp_path / "results" / "quick.jsonl"
    unit = Unit(world.combinations("2+1")[0], "quiet", (7, 8))
    assert run([unit], VARIANTS, path, tiny, deadline=time.monotonic()) == 1
    assert run([unit], VARIANTS, path, tiny, deadline=math.inf) == 2
    assert run([unit], VARIANTS, path, tiny, deadline=math.inf) == 0
    merge, paper, turbo = rows = read_rows(path)
    assert [each["variant"] for each in rows] == [variant_name(options) for options in VARIANTS]
    assert complete(paper) == [True, False]
    assert len(paper["weights"]) == 3 and sum(paper["weights"]) == pytest.approx(1, abs=1e-3)
    assert len(paper["similarity"]) == len(paper["spread"]) == 3
    assert "similarity" not in merge and "psnr" not in merge
    assert len(turbo["psnr"]) == 2 and min(turbo["psnr"]) > 5
    assert (merge["cost"], paper["cost"]) == (1, 4)
    assert turbo["cost"] == pytest.approx((4 + 2 + 2) / 3, abs=1e-3)
    assert set(paper["intruders"]) == set(unit.combination.loras) - set(unit.combination.named)


@pytest.mark.parametrize(
    "style, background, painted",
    [
        (False, False, [None]),
        (True, False, [None, "everywhere"]),
        (False, True, [None, "surroundings"]),
        (True, True, [None, "everywhere"]),
    ],
)
def test_ways_that_act_alike_are_one_painting(tiny, monkeypatch, style, background, painted):
    """Without a style nobody is in every pass, or the background; with one it is the style, either way."""
    combination = next(
        each
        for each in world.combinations("2")
        if (bool(each.scene.style), each.scene.background == "skyline") == (style, background)
    )
    made, ways = [], (COMPOSITE, *({**COMPOSITE, EVERYWHERE: styles} for styles in ("everywhere", "surroundings")))
    monkeypatch.setattr(evaluate, "paint", lambda *args: made.append(args[3].get(EVERYWHERE)) or paint(*args))
    rows = list(Unit(combination, "quiet", (1,)).rows(tiny, ways))
    assert made == painted and len({row["key"] for row in rows}) == 3


def test_a_line_cut_short_is_not_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"key": "whole"}) + '\n{"key": "ha')
    assert read_rows(path) == [{"key": "whole"}]
    assert read_rows(tmp_path / "none.jsonl") == []


def test_every_way_starts_from_the_same_seeds(tiny):
    suite = SUITES["quick"]
    work = units(suite, ("quiet", "leaky"))
    assert len(work) == 2 * suite.combinations
    assert len({unit.key(tiny, suite.variants[0]) for unit in work}) == len(work)
    combination = world.combinations("2")[0]
    first, again = (paint(tiny, combination, "quiet", {"method": "merge"}, (3,)).images[0] for _ in range(2))
    assert first.tobytes() == again.tobytes()


def test_a_group_gets_as_many_images_as_are_wanted():
    """Seeds go on where they ended, every group is there at every beginning, and nothing is painted twice."""
    suite = Suite("confirm", METHODS, images=4, groups=("2", "5"), wanted=40)
    work = units(suite, ("quiet",))
    found = [(unit.combination.name, seed) for unit in work for seed in unit.seeds]
    assert len(set(found)) == len(found)
    images = Counter(unit.combination.group for unit in work for _ in unit.seeds)
    assert images == {"2": 40, "5": 48}, "of 10 and of 3 combinations"
    assert {unit.combination.group for unit in work[:2]} == {"2", "5"}
    assert units(replace(suite, wanted=0), ("quiet",)) == work[:13]


def test_perfect_masks_say_where_each_lora_acts(tiny, monkeypatch):
    """The same as when somebody draws them; without them the image is another."""
    combination = world.combinations("2")[0]
    first, second = combination.loras
    halves = {first: Image.new("L", (32, 32), 255), second: Image.new("L", (32, 32), 255)}
    halves[first].paste(0, (16, 0, 32, 32))
    halves[second].paste(0, (0, 0, 16, 32))
    monkeypatch.setattr(ceiling.render, "region", lambda scene, concept: halves[concept])
    (image,) = paint(tiny, combination, "quiet", CEILING, (3,)).images
    gates = {name: value for name, value in CEILING.items() if name != PERFECT}
    drawn = {tiny.lora(c, "quiet").name: {"mask": ceiling.written(mask)} for c, mask in halves.items()}
    (by_hand,) = paint(tiny, combination, "quiet", {**gates, "loras": drawn}, (3,)).images
    (everywhere,) = paint(tiny, combination, "quiet", gates, (3,)).images
    assert image.tobytes() == by_hand.tobytes() != everywhere.tobytes()


def test_a_style_in_every_pass_claims_no_place(tiny):
    """The same as when somebody says so; where no style is named, nothing changes."""
    combination = next(each for each in world.combinations("2") if each.scene.style)
    style = tiny.lora(combination.scene.style, "quiet").name
    ways = ({EVERYWHERE: "everywhere"}, {"loras": {style: {"base": True}}}, {})
    image, by_hand, beside = (paint(tiny, combination, "quiet", {**COMPETING, **way}, (3,)).images[0] for way in ways)
    assert image.tobytes() == by_hand.tobytes() != beside.tobytes()
    plain = next(each for each in world.combinations("2") if not each.scene.style)
    images = [paint(tiny, plain, "quiet", options, (3,)).images[0] for options in ({EVERYWHERE: "everywhere"}, {})]
    assert images[0].tobytes() == images[1].tobytes()
    names = [variant_name(options) for options in (COMPETING, STYLES_ONLY, {}, CEILING_OF_SHARES)]
    names += [variant_name({**CEILING_OF_SHARES, EVERYWHERE: styles}) for styles in ("everywhere", "surroundings")]
    assert len(set(names)) == 6 and sum("style in every pass" in name for name in names) == 2
    assert sum("surroundings in every pass" in name for name in names) == 2


def test_true_renders_are_what_the_judge_calls_right():
    judge, right = world.import_module("classifier").Classifier.load(), {}
    combinations = {group: world.combinations(group) for group in "2345"}
    for combination in (each for group in combinations.values() for each in group):
        made = paint(None, combination, "quiet", TRUTH, (3, 4))
        assert made.cost == 0 and made.steps == [] and len(made.images) == 2
        follows = judge.follows(made.images, combination.scene)
        asked = [follows[question] for question in world.questions(combination.scene).values()]
        right[combination.name] = [all(of_image) for of_image in zip(*asked, judge.clean(made.images))]
    assert all(all(right[each.name]) for group in "25" for each in combinations[group])
    assert np.mean(list(right.values())) > 0.985


@pytest.mark.parametrize("scene", [each.scene for each in world.combinations("3") if each.scene.style][:6])
@pytest.mark.parametrize("other", ("", "sepia", "night", "mint"))
def test_a_style_is_read_by_the_colours_that_are_nearest(tiny, scene, other):
    """Compositions miss a style's colours by a little: a third of the way to another style, it is not the other yet."""
    images = [
        np.float64(world.render.render(each, np.random.default_rng(5))) for each in (scene, replace(scene, style=other))
    ]
    near = Image.fromarray((images[0] * 2 / 3 + images[1] / 3).round().astype(np.uint8))
    assert tiny.judge.follows([near], scene)["style"] == [True]


def test_half_precision_has_rows_of_its_own(tiny):
    unit = Unit(world.combinations("2")[0], "quiet", (1,))
    half = copy.copy(tiny)
    half.half = True
    assert unit.key(tiny, {}) != unit.key(half, {})


def test_rows_of_other_weights_are_other_rows(tiny, tmp_path):
    unit = Unit(world.combinations("2")[0], "quiet", (1,))
    other = copy.copy(tiny)
    other.state = "trained again"
    assert unit.key(tiny, {}) != unit.key(other, {})
    (tmp_path / "lora").mkdir()
    file = tmp_path / "lora" / "zorg.safetensors"
    file.write_bytes(b"one")
    before = world.state(tmp_path)
    (tmp_path / "README.md").write_text("no weights")
    assert world.state(tmp_path) == before
    file.write_bytes(b"two")
    assert world.state(tmp_path) != before


def test_the_demo_labels_every_method_and_lora(tiny, monkeypatch):
    monkeypatch.setattr(demo, "SIZE", 32)
    page = demo.demonstrate(tiny, world.combinations("3")[0], "quiet", (1, 2))
    rows = len(demo.METHODS) + 1  # below LoRAtorio's: who painted what
    assert page.width == demo.MARGIN + 2 * (32 + demo.GAP)
    assert (page.height - demo.GAP - rows * (32 + demo.GAP)) % demo.LINE == 0
    size = (demo.MARGIN + 32 + demo.GAP, demo.GAP + 2 * demo.LINE + 32 + demo.GAP)
    assert demo.sheet("one two", ["1"], {"a method": [Image.new("RGB", (32, 32))]}).size == size
    assert demo.sheet("one two " * 40, ["1"], {}).height > demo.sheet("one two", ["1"], {}).height, "long prompts wrap"


def test_the_demos_weights_are_laid_over_its_own_images(tiny):
    made = paint(tiny, world.combinations("3")[0], "quiet", {"temperature": 0.01}, (1, 2))
    laid = demo.overlays(made)
    changed = [np.abs(np.float64(a) - np.float64(b)).mean() for a, b in zip(laid, made.images)]
    assert min(changed) > 1 and laid[0].tobytes() != laid[1].tobytes()


def test_composlora_combines_a_character_with_every_choice_of_other_categories(tiny, tmp_path):
    sizes = {"character": 3, "clothing": 2, "style": 2, "background": 2, "object": 2}
    information = {
        category: [{"id": f"{category}_{i}", "trigger": [f"{category} {i}", "word"]} for i in range(1, size + 1)]
        for category, size in sizes.items()
    }
    found = list(composlora.combinations(information, "photo"))
    counts = [sum(each.group == group for each in found) for group in "2345"]
    assert counts == [24, 72, 96, 48]  # with the anime half as many: 480
    assert found[0].prompt == "photo, character 1, word, clothing 1, word"
    assert all(each.loras[0].startswith("character") for each in found)


def test_composlora_runs_through_the_same_runner(tiny, tmp_path):
    information = {category: [{"id": f"{category}_1", "trigger": [category]}] for category in ("character", "style")}
    (tmp_path / "anime_lora_info.json").write_text(json.dumps(information))
    loras = tmp_path / "models" / "lora" / "anime"
    loras.mkdir(parents=True)
    for seed, category in enumerate(information):
        write_lora(loras / f"{category}_1.safetensors", tiny.pipe, "attention", seed)
    tiny.pipe.save_pretrained(tmp_path / "model")
    given = ["--root", tmp_path, "--model", tmp_path / "model", "--style", "anime", "--steps", "2", "--size", "32"]
    parser = argparse.ArgumentParser()
    composlora.add_arguments(parser)
    bench = composlora.World(parser.parse_args(list(map(str, given))))
    bench.score = Score()
    (combination,) = bench.combinations()
    path = tmp_path / "composlora.jsonl"
    assert run([Unit(combination, "anime", (composlora.SEED,))], VARIANTS, path, bench, deadline=math.inf) == 3
    assert [each["clipscore"] for each in read_rows(path)] == [[30.0]] * 3
    assert "| merge | 30.00 ± nan |" in write_report(read_rows(path), path)


class Score:
    """In place of CLIPScore."""

    def __call__(self, pixels, words):
        assert pixels.shape == (3, 32, 32) and words == "character, style"
        return 30.0

    def reset(self):
        pass


def test_two_processes_share_the_work(tmp_path):
    """Each takes its own part of the units, and all of it is done once."""
    concepts, path = ("zorg", "comet"), tmp_path / "quick.jsonl"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    evaluate = ["-m", "benchmarks.evaluate", "--suite", "quick", "--results", path, "--concepts", *concepts]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*launch, *evaluate], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    suite = SUITES["quick"]
    wanted = {
        (unit.kind, unit.combination.name, variant_name(options))
        for unit in units(suite, ("quiet", "leaky"), concepts)
        for options in suite.variants
    }
    found = [(each["kind"], each["combination"], each["variant"]) for each in read_rows(path)]
    assert set(found) == wanted and len(found) == len(wanted) > len(suite.variants)
    assert done.stdout.count("rows added") == 2 and "\n0 rows added" not in done.stdout
