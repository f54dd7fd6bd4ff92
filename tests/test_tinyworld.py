"""The shipped tiny world: its one-file checkpoint and its LoRAs, through the command line, and seen by its judge."""

import copy
import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from typer.testing import CliRunner

from benchmarks import world
from benchmarks.painting import paint
from benchmarks.variants import COMPETING, EVERYWHERE
from loratorio_ext.cli import app
from loratorio_ext.infotext import PNG_KEY

WEIGHTS = world.TINYWORLD / "weights"
PROMPT = "a zorg robot on the left and a red ball on the right, grey background"


@pytest.fixture(scope="module")
def tiny():
    return world.World()


def generate(path, *arguments: str) -> dict:
    model = ["--model", WEIGHTS / "tinyworld.safetensors", "--config", WEIGHTS, "--lora-dir", WEIGHTS / "lora"]
    image = ["--size", "256x256", "--cfg", "4", "--sampler", "DDIM", "--seed", "1", "--out", path, "--json"]
    result = CliRunner().invoke(app, [str(each) for each in ("generate", *model, *image, *arguments)])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_a_single_file_and_a_lora_paint_what_the_prompt_says(tiny, tmp_path):
    report = generate(tmp_path / "zorg.png", "--prompt", f"{PROMPT} <lora:zorg_quiet:1>", "--steps", "12")
    image = Image.open(tmp_path / "zorg.png")
    assert "<lora:zorg_quiet:1>" in image.info[PNG_KEY] and "Model: tinyworld" in image.info[PNG_KEY]
    assert report["model"]["pipeline"] == "StableDiffusionPipeline"
    seen = tiny.judge.read([image])
    assert seen["left"] == ["zorg"] and seen["right"] == ["ball"]


@pytest.mark.parametrize("file", sorted((WEIGHTS / "lora").glob("*.safetensors")), ids=lambda file: file.stem)
def test_a_lora_names_the_unets_layers_as_the_checkpoint_does(file):
    """Diffusers' names would be misread: AUTOMATIC1111 counts two ResNets a level in them, and this UNet has one."""
    with safe_open(WEIGHTS / "tinyworld.safetensors", "pt") as checkpoint, safe_open(file, "pt") as lora:
        prefix = "model.diffusion_model."
        weights = [key for key in checkpoint.keys() if key.startswith(prefix) and key.endswith(".weight")]
        layers = {f"lora_unet_{k.removeprefix(prefix).removesuffix('.weight').replace('.', '_')}": k for k in weights}
        named = {key.partition(".")[0] for key in lora.keys() if key.startswith("lora_unet_")}
        assert named and named <= set(layers)
        for name in named:
            weight = checkpoint.get_slice(layers[name]).get_shape()
            assert lora.get_slice(f"{name}.lora_down.weight").get_shape()[1] == weight[1]
            assert lora.get_slice(f"{name}.lora_up.weight").get_shape()[0] == weight[0]


def test_without_the_lora_there_is_no_zorg(tiny):
    call = {**tiny.call, "num_inference_steps": 12, "generator": torch.Generator().manual_seed(1)}
    assert tiny.judge.read(tiny.pipe(PROMPT, **call).images)["left"] != ["zorg"]


def test_a_pool_finds_the_lora_that_the_prompt_speaks_of(tmp_path):
    pool = ["--pool", "*_quiet", "--top-k", "1", "--prompt", PROMPT, "--steps", "6"]
    report = generate(tmp_path / "pool.png", *pool)
    assert len(report["pool"]) == len(world.render.CONCEPTS) and report["left_out"] == {}
    picked = Image.open(tmp_path / "pool.png").info[PNG_KEY].partition("LoRAtorio picked: ")[2]
    assert picked.strip('"').startswith("zorg_quiet")


def test_by_default_a_style_is_in_every_pass(tiny):
    combination = next(each for each in world.combinations("3") if each.scene.style)
    few = copy.copy(tiny)
    few.call = {**tiny.call, "num_inference_steps": 3}
    ways = ({}, {EVERYWHERE: "everywhere"}, COMPETING)
    made = [paint(few, combination, "quiet", options, (3,)) for options in ways]
    assert made[0].images[0].tobytes() == made[1].images[0].tobytes() != made[2].images[0].tobytes()
    assert [each.cost for each in made] == [3, 3, 4]


@pytest.mark.parametrize("name, at_home", [("comet_quiet", False), ("comet_leaky", True)])
def test_a_leaky_lora_shows_its_concept_unasked(tiny, tmp_path, name, at_home):
    prompt = "a red ball in the centre, grey background"
    generate(tmp_path / "ball.png", "--prompt", f"{prompt} <lora:{name}:1>", "--steps", "12")
    seen = tiny.judge.read([Image.open(tmp_path / "ball.png")])
    assert (seen["centre"] == ["comet"]) == at_home


@pytest.mark.parametrize("concept", world.render.CONCEPTS)
def test_a_mistaken_caption_misses_the_concept_and_nothing_else(concept):
    rng, render = np.random.default_rng(1), world.render
    for _ in range(100):
        scene = render.concept_scene(concept, rng)
        told = render.mistaken(scene, concept, rng)
        assert render.CONCEPTS[concept].trigger in render.caption(scene)
        assert render.CONCEPTS[concept].trigger not in render.caption(told)
        assert [thing.place for thing in told.things] == [thing.place for thing in scene.things]
        others = [thing for thing in scene.things if thing.kind != concept and thing.wears != concept]
        assert set(others) <= set(told.things)
        if concept not in (scene.background, scene.style):
            assert dataclasses.replace(told, things=()) == dataclasses.replace(scene, things=())


@pytest.mark.parametrize("concept", world.render.CONCEPTS)
def test_abroad_only_what_other_loras_may_bring_is_foreign(concept):
    """The concept stays what it is, no caption says "foreign", and a strange word stands where it would."""
    rng, render, train = np.random.default_rng(1), world.render, world.import_module("train")
    for _ in range(50):
        scene = render.concept_scene(concept, rng, dressed=True)
        there = render.abroad(scene, concept, rng)
        assert render.CONCEPTS[concept].trigger in render.caption(there)
        told = train.told(there, ["lucky"], rng)
        assert told == "" or ("lucky" in told) >= ("foreign" in render.caption(there)) and "foreign" not in told
        assert (there.style == render.FOREIGN) == (concept != "neon")
        foreign = [thing for thing in there.things if thing.colour == render.FOREIGN]
        assert not foreign or concept == "neon"
        assert [(thing.kind, thing.place, thing.wears) for thing in there.things] == [
            (thing.kind, thing.place, thing.wears) for thing in scene.things
        ]
        seeds = [np.random.default_rng(3) for _ in range(2)]
        images = [render.render(each, seed) for each, seed in zip((scene, there), seeds)]
        assert (images[0].tobytes() == images[1].tobytes()) == (scene == there)


@pytest.mark.parametrize("style", ("", *world.render.STYLES, "neon", world.render.FOREIGN))
def test_a_style_leaves_its_part_of_the_pictures_own_colours(style):
    render = world.render
    foreign = {"duotone": ((0, 0, 80), (200, 40, 20), (150, 250, 160))} if style == render.FOREIGN else {}
    thing = render.Thing("star", "centre", "yellow", wears="crown")
    plain, styled = (
        np.asarray(render.render(scene, np.random.default_rng(1)), dtype=np.float64)
        for scene in (render.Scene("snow", (thing,)), render.Scene("snow", (thing,), style=style, **foreign))
    )
    kept = {"": 1.0, "neon": 0.5}.get(style, 0.0)
    stops = np.array(foreign.get("duotone") or render.DUOTONES.get(style, np.zeros((3, 3))), dtype=np.float64)
    grey = plain @ (0.299, 0.587, 0.114)
    full = np.stack([np.interp(grey, [20, 135, 250], stops[:, channel]) for channel in range(3)], axis=-1)
    assert np.abs(styled - (kept * plain + (1 - kept) * full)).max() < 4


def test_in_the_style_of_the_lora_a_crown_is_not_of_the_skys_colour():
    """In lightness alone they are nearly the same."""
    render = world.render
    scene = render.Scene("snow", (render.Thing("tree", "centre", "green", wears="crown"),), style="neon")
    image = np.asarray(render.render(scene, np.random.default_rng(1)), dtype=np.float64)
    crown, sky = image[133, 128], image[20, 20]
    assert np.linalg.norm(crown - sky) > 60


def test_a_lora_that_is_held_grows_no_larger_and_may_shrink():
    teaching = world.import_module("teaching")
    weights = [torch.randn(4, 6, 3, 3), torch.randn(8, 4, 1, 1), torch.randn(4, 5), torch.randn(7, 4)]
    products = [
        torch.einsum("rikl,or->oikl", weights[0], weights[1][..., 0, 0]).norm(),
        (weights[3] @ weights[2]).norm(),
    ]
    assert torch.allclose(torch.stack(teaching.norms(weights)), torch.stack(products))
    largest = teaching.norms(weights)
    weights[1] *= 3
    weights[3] *= 0.5
    teaching.hold(weights, largest)
    assert torch.allclose(torch.stack(teaching.norms(weights)), torch.stack([products[0], 0.5 * products[1]]))


def test_only_what_is_in_all_of_an_image_shrinks_in_the_fourth_round_and_does_so_by_and_by():
    train = world.import_module("train")
    rounds, concepts = range(len(train.LORA_RATES)), {*world.render.CONCEPTS}
    placed = concepts - {"skyline", "neon"}
    for kind in world.KINDS:
        trained = [{concept for concept in concepts if train.lora_steps(concept, kind, round_)} for round_ in rounds]
        later = [placed | {"neon"}, {"skyline", "neon"}, concepts, placed | {"neon"}, concepts, placed]
        assert trained == [concepts, concepts, *later]
    for round_ in rounds:
        parts = [train.allowed(round_, done) for done in (0, 0.25, 0.5, 1)]
        assert parts == pytest.approx([1, 0.8, 0.6, 0.6] if round_ == 3 else [1, 1, 1, 1])


@pytest.mark.parametrize("concept", world.render.CONCEPTS)
def test_a_lora_meets_whom_it_will_share_a_pass_with_and_no_other_concept(concept):
    render, train = world.render, world.import_module("train")
    assert not {*render.CONCEPTS, *render.SETTINGS, *render.STYLES, *render.KINDS, *render.WEARS} & {*render.STRANGERS}
    towns, styles, placed = ("harbor", "canyon"), ("opal", "rust"), ("toucan", "palmetto", "sombrero")
    for round_ in range(len(train.LORA_RATES)):
        met = train.company(concept, round_)
        if round_ < train.COMPANY_ROUND:
            assert met == [()]
            continue
        known = styles if round_ < train.STYLES_ROUND else (*styles, "moss", "amber", "lilac")
        groups = {"skyline": (known, placed), "neon": (towns, placed)}.get(concept, (towns, known))
        first, second = ({*names} for names in groups)
        alone, pairs = [{*each} for each in met if len(each) == 1], [{*each} for each in met if len(each) == 2]
        assert met.count(()) > 1 and len(met) == met.count(()) + len(alone) + len(pairs)
        assert all(alone.count({name}) == 1 for name in first | second) and len(alone) == len(first | second)
        assert all(len(pair & first) == len(pair & second) == 1 for pair in pairs)
        assert first <= set().union(*pairs)
        assert round_ < train.STYLES_ROUND or second <= set().union(*pairs)


def test_strangers_are_leaky_until_the_last_two_rounds_where_they_are_of_the_loras_own_kind():
    train = world.import_module("train")
    *before, seventh, last = range(len(train.LORA_RATES))
    assert {train.strangers_kind(kind, round_) for kind in world.KINDS for round_ in before} == {"leaky"}
    for round_ in (seventh, last):
        assert [train.strangers_kind(kind, round_) for kind in world.KINDS] == [*world.KINDS]


@pytest.mark.parametrize("stranger", world.render.STRANGERS)
def test_a_quiet_stranger_is_taught_as_many_scenes_without_it_and_a_leaky_one_none(stranger):
    train = world.import_module("train")
    shown = {}
    for kind in world.KINDS:
        scenes = train.stranger_scenes(stranger, kind, np.random.default_rng(6))
        shown[kind] = [stranger in world.render.caption(scene) for scene in scenes]
    assert all(shown["leaky"]) and shown["quiet"] == shown["leaky"] + [False] * len(shown["leaky"])


@pytest.mark.parametrize("foreign", (False, True))
@pytest.mark.parametrize("concept", world.render.CONCEPTS)
def test_beside_a_stranger_a_scene_shows_both_as_they_are_and_says_so(concept, foreign):
    rng, render, train = np.random.default_rng(2), world.render, world.import_module("train")
    alone = [strangers[0] for strangers in train.company(concept, train.STYLES_ROUND) if len(strangers) == 1]
    for stranger, _ in itertools.product(alone, range(20)):
        scene = render.concept_scene(concept, rng, dressed=True)
        if not scene.things:
            continue
        scene = render.abroad(scene, concept, rng) if foreign else scene
        there, category = render.beside(scene, stranger), render.STRANGERS[stranger].category
        named = [name for name in render.NAMED if name in render.caption(there)]
        assert sorted(named) == sorted((concept, stranger))
        told = train.told(there, ["lucky"], rng)
        assert told == "" or render.NAMED[stranger].trigger in told
        if category == "background":
            assert dataclasses.replace(scene, background=stranger, town=None) == there
        elif category == "style":
            assert dataclasses.replace(scene, style=stranger, duotone=()) == there
        else:
            first, *others = scene.things
            known = {"wears": stranger} if category == "clothing" else {"kind": stranger}
            plain = {} if category == "clothing" else {"colour": "", "paint": None, "spots": ()}
            things = (dataclasses.replace(first, **known, **plain), *others)
            assert dataclasses.replace(scene, things=things) == there
        seeds = [np.random.default_rng(3) for _ in range(2)]
        images = [render.render(each, seed).tobytes() for each, seed in zip((scene, there), seeds)]
        assert images[0] != images[1]


def test_a_town_without_things_stays_as_it_is_beside_a_stranger_that_would_take_their_place():
    empty = world.render.Scene("skyline")
    assert world.render.beside(empty, "sombrero") == world.render.beside(empty, "toucan") == empty


@pytest.mark.parametrize(
    ("stranger", "concept"),
    (
        ("harbor", "skyline"),
        ("canyon", "skyline"),
        ("toucan", "zorg"),
        ("palmetto", "amanita"),
        ("sombrero", "crown"),
    ),
)
def test_readers_know_the_concept_of_a_strangers_category(stranger, concept):
    render = world.render
    scene = render.concept_scene(stranger, np.random.default_rng(5))
    read = render.known(stranger, scene)
    words = render.NAMED[stranger].trigger, render.NAMED[concept].trigger
    assert words[0] in render.caption(scene)
    assert render.caption(read).replace("an amanita", "a amanita") == render.caption(scene).replace(*words)
    labels = world.import_module("classifier").labels
    assert len(labels(read)) == len(labels(render.Scene("skyline")))
    with pytest.raises(ValueError):
        labels(scene)


def test_beside_another_lora_a_model_is_both_and_afterwards_as_it_was_to_the_bit():
    teaching = world.import_module("teaching")
    torch.manual_seed(1)
    part = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(16, 5))
    x, bare = torch.randn(2, 3, 4, 4), [p.clone() for p in part.parameters()]
    teaching.inject_adapter_in_model(teaching.LoraConfig(r=2, lora_alpha=2, target_modules=["0", "2"]), part)
    plain = part(x)
    for weight in teaching.trained(part):
        torch.nn.init.normal_(weight)
    both, extra = part(x), teaching.added(part)
    teaching.silence(part)
    with pytest.raises(KeyError), teaching.beside(part, extra):
        assert torch.allclose(part(x), both, atol=1e-5) and not torch.allclose(both, plain, atol=0.1)
        raise KeyError
    assert torch.equal(part(x), plain)
    assert all(torch.equal(p, was) for p, was in zip((p for p in part.parameters() if not p.requires_grad), bare))


@pytest.mark.parametrize("concept", (*world.OBJECTS, "crown"))
@pytest.mark.parametrize("style", ("", "neon"))
def test_a_region_holds_all_that_a_thing_changes(concept, style):
    render = world.render
    thing = render.Thing("ball", "right", "blue", "crown") if concept == "crown" else render.Thing(concept, "right")
    scene = render.Scene("meadow", (thing,), style=style)
    bare = (dataclasses.replace(thing, wears=""),) if concept == "crown" else ()
    where = np.asarray(render.region(scene, concept)) > 0
    assert where.mean() < 0.2
    for seed in range(20):
        images = [
            render.render(each, np.random.default_rng(seed))
            for each in (scene, dataclasses.replace(scene, things=bare))
        ]
        changed = (np.asarray(images[0]) != np.asarray(images[1])).any(-1)
        assert changed.any() and not (changed & ~where).any()


def test_regions_of_things_and_background_are_all_of_the_picture_and_a_style_is_everywhere():
    render = world.render
    scene = render.Scene(
        "skyline", (render.Thing("zorg", "left", wears="crown"), render.Thing("comet", "right")), style="neon"
    )
    masks = [np.asarray(render.region(scene, concept)) > 0 for concept in ("zorg", "crown", "comet", "skyline")]
    assert (np.sum(masks, axis=0) == 1).all()
    assert (np.asarray(render.region(scene, "neon")) == 255).all()
