"""Composition in diffusers pipelines against the literal reference over diffusers' own PEFT adapters, in float64."""

import base64
import inspect
import io
import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import cache
from itertools import product

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import accelerate
import diffusers
from diffusers import ControlNetModel
from diffusers.hooks import HookRegistry, ModelHook
from PIL import Image
from safetensors.torch import load_file, save_file

from loratorio_ext.claims import Claim
from loratorio_ext.core import Plan
from loratorio_ext.errors import FileFormatError, MissingFileError, SettingsError, UnsupportedError
from loratorio_ext.hosts.denoisers import predicted_noise
from loratorio_ext.hosts.diffusers import (
    composed,
    load_lora,
    load_pipeline,
    scheduler_for,
)
from loratorio_ext.masks import kept
from loratorio_ext.samplers import SAMPLERS
from loratorio_ext.settings import Settings
from tests import oracle
from tests.gauge import Gauge
from tests.tiny_pipelines import (
    FAMILIES,
    KINDS,
    LAYOUTS,
    assert_untouched,
    draw,
    draw_lora,
    make_pipeline,
    state,
    touched_layers,
    write_lora,
)

# What diffusers' schedulers and PEFT warn of in themselves.
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("DeprecationWarning", "UserWarning")]

PROMPT, NEGATIVE = ["a red cat", "two dogs"], ["blurry", "dark"]
SIZE = (9, 11)  # latent pixels, so that patches at the edge are partial
STEPS, CFG = 4, 4.0
OPTIONS = {"patch_size": 4, "temperature_mode": "adaptive", "temperature": 1.0, "relativity": 0.5}
LORAS = [("everything", "kohya", 2.0), ("convolutions", "peft", None), ("text", "diffusers", None)]
WEIGHTS = [(0.7, 0.9), (1.0, 1.0), (0.8, 0.8)]


@pytest.fixture(scope="module")
def pipes():
    return {family: make_pipeline(family) for family in FAMILIES}


@pytest.fixture(scope="module")
def files(pipes, tmp_path_factory):
    """For each family the files of `LORAS`."""
    folder = tmp_path_factory.mktemp("loras")
    return {
        family: [
            write_lora(folder / f"{family}-{index}.safetensors", pipe, kind, index, layout, alpha, rank=2 + index)
            for index, (kind, layout, alpha) in enumerate(LORAS)
        ]
        for family, pipe in pipes.items()
    }


def loras_of(pipe, files, weights=WEIGHTS):
    return [load_lora(pipe, file, *weight) for file, weight in zip(files, weights)]


def noise(images=2, size=SIZE):
    return torch.stack([torch.randn(4, *size, generator=torch.Generator().manual_seed(each)) for each in range(images)])


def arguments(pipe, prompt=PROMPT, negative=NEGATIVE, cfg=CFG, steps=STEPS, size=SIZE, **others):
    """Of a call of the pipeline."""
    return {
        "prompt": prompt,
        "negative_prompt": negative,
        "num_inference_steps": steps,
        "guidance_scale": cfg,
        "height": 8 * size[0],
        "width": 8 * size[1],
        "latents": noise(len(prompt), size).to(pipe.unet.dtype),
        "output_type": "latent",
        **others,
    }


def generate(pipe, loras=(), /, on_step=None, call=None, **options):
    with composed(pipe, loras, on_step=on_step, **options):
        return pipe(**arguments(pipe, **(call or {}))).images


# --- the reference: adapters that diffusers loads and PEFT applies ----------------------------------------------------


@cache
def adapted(family, files=(), weights=()):
    """A float64 pipeline in which these LoRAs act, by diffusers' own means."""
    pipe = make_pipeline(family, torch.float64)
    names = [f"lora{index}" for index in range(len(files))]
    for name, file in zip(names, files):
        pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name)
    if files:
        parts = ("unet", "text_encoder", *(["text_encoder_2"] if family == "sdxl" else []))
        pipe.set_adapters(names, [{part: unet if part == "unet" else te for part in parts} for te, unet in weights])
    return pipe


def reference_noise(scheduler, output, x, t, step):
    """Model output to noise, the way each scheduler's formulas have it."""
    if scheduler.config.prediction_type == "epsilon":
        return output
    if type(scheduler).__name__.startswith("Euler"):
        share = 1 / (1 + float(scheduler.sigmas[step]) ** 2)
    else:
        share = float(scheduler.alphas_cumprod[int(t)])
    return math.sqrt(share) * output + math.sqrt(1 - share) * x


def acts_at(claim, progress):
    first, last = claim.steps
    return first <= progress < last or last == 1 and first <= progress


@torch.no_grad()
def reference(family, files, weights, method, options, call=None, sampler="DDIM", parts=(), rest=False, kept=None):
    """Latents by a plain loop: a pipeline for every LoRA, the oracle's composition, guidance, the scheduler's step.

    ``parts``: of each LoRA's claim; those in every pass are in the base's pipeline and in all others. ``rest``: what
    the others are not clearly at home in is the base's; or, ``kept``, that of one of them, by its number."""
    claims = [Claim.of(each) for each in parts or [{}] * len(files)]

    def holding(*loras):
        loras = [i for i in range(len(files)) if i in loras or claims[i].base]
        return adapted(family, tuple(files[i] for i in loras), tuple(weights[i] for i in loras))

    base = holding()
    call = arguments(base, **(call or {}))
    images, guided = len(call["prompt"]), call["guidance_scale"] > 1
    scheduler = scheduler_for(base, sampler)
    scheduler.set_timesteps(call["num_inference_steps"])
    options = asdict(Settings.from_mapping(options))
    momentum = oracle.Momentum(options["momentum"])
    texts = {}

    def predict(pipe, x, t):
        """(cond, uncond) of a pipeline."""
        if pipe not in texts:
            named = {"negative_prompt": call["negative_prompt"], "device": "cpu", "num_images_per_prompt": 1}
            texts[pipe] = pipe.encode_prompt(prompt=call["prompt"], do_classifier_free_guidance=guided, **named)
        out = []
        for sign in (0, 1) if guided else (0,):
            size = [8 * x.shape[2], 8 * x.shape[3]]
            ids = torch.tensor([[*size, 0, 0, *size]] * images, dtype=x.dtype)
            added = {"text_embeds": texts[pipe][2 + sign], "time_ids": ids} if family == "sdxl" else None
            out.append(pipe.unet(x, t, encoder_hidden_states=texts[pipe][sign], added_cond_kwargs=added)[0].numpy())
        return out if guided else (out[0], None)

    x = call["latents"] * scheduler.init_noise_sigma
    for step, t in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(x, t)
        progress = step / len(scheduler.timesteps)
        inside = options["start"] <= progress and (progress < options["end"] or options["end"] == 1)
        members = [i for i, claim in enumerate(claims) if not claim.base and acts_at(claim, progress)]
        place, share = None, [claims[i].share for i in members]
        if any(claims[i].placed for i in members):
            places = [claims[i].place(*x.shape[2:]) for i in members]
            place = np.stack([np.ones(x.shape[2:]) if each is None else each.double().numpy() for each in places])
        if method == "merge" or not inside:
            cond, uncond = predict(holding(*range(len(files))), scaled, t)
        elif not members:
            cond, uncond = predict(base, scaled, t)
        elif method == "switch":
            cond, uncond = predict(
                holding(members[oracle.switch(step, options["switch_every"], len(members))]), scaled, t
            )
        else:
            conds, unconds = zip(*(predict(holding(i), scaled, t) for i in members))
            base_cond, base_uncond = predict(base, scaled, t)
            if method == "composite":
                cond = oracle.composite(conds, share, place, base_cond)
                uncond = oracle.composite(unconds, share, place, base_uncond) if guided else None
            else:
                eps_base, *eps = (
                    reference_noise(scheduler, out, scaled.numpy(), t, step) for out in (base_cond, *conds)
                )
                rows = range(images)
                relative = momentum(eps, eps_base, options, members)
                keeps = None if kept is None else [[i == kept] * images for i in members]
                claimed = (place, share, base_cond, relative, rest, keeps)
                cond, uncond, _ = oracle.loratorio(
                    eps, eps_base, conds, unconds, base_uncond, rows, options, None, *claimed
                )
        out = oracle.guide(cond, uncond, range(images), [1] * images, call["guidance_scale"]) if guided else cond
        x = scheduler.step(torch.from_numpy(np.asarray(out)).to(x), t, x).prev_sample
    return x


@contextmanager
def rows_of_calls(pipe):
    """While entered, the number of rows of every call of the UNet is noted."""
    rows = []
    hook = pipe.unet.conv_in.register_forward_hook(lambda layer, args, out: rows.append(len(out)))
    try:
        yield rows
    finally:
        hook.remove()


def relative_error(actual, expected):
    return float((actual.double() - expected).norm() / expected.norm())


def check(
    pipes,
    files,
    family="sd1",
    method="loratorio",
    call=None,
    sampler="DDIM",
    weights=WEIGHTS,
    parts=(),
    told=(),
    **options,
):
    """``told``: what the package is told instead of ``parts``, where it is to find out who is in every pass and that
    the rest is theirs."""
    options = {**OPTIONS, **options} if method == "loratorio" else options
    expected = reference(family, files, weights, method, options, call, sampler, parts, rest=bool(told))
    pipe = pipes[family]
    loras = loras_of(pipe, files, weights)
    loras = [replace(lora, parts=each) for lora, each in zip(loras, told or parts)] if parts else loras
    before = pipe.scheduler
    pipe.scheduler = scheduler_for(pipe, sampler)
    try:
        actual = generate(pipe, loras, call=call, method=method, **options)
        plain = generate(pipe, call=call)
    finally:
        pipe.scheduler = before
    error = relative_error(actual, expected)
    print(f"relative error {error:.1e}")
    assert error < 1e-4
    assert relative_error(plain, expected) > 0.05  # the LoRAs are not idle


class TestAgainstPeft:
    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("method", ["loratorio", "composite", "switch", "merge"])
    def test_every_method(self, pipes, files, family, method):
        options = {"switch_every": 1} if method == "switch" else {}
        check(pipes, files[family], family, method, **options)

    @pytest.mark.parametrize("family", ["sd1", "sd2v"])
    @pytest.mark.parametrize("sampler", ["Euler", "Euler Karras", "DPM++ 2M"])
    def test_samplers(self, pipes, files, family, sampler):
        check(pipes, files[family], family, sampler=sampler)

    @pytest.mark.parametrize(
        "options",
        [
            {"temperature_mode": "fixed", "temperature": 0.05, "relativity": 0.0},
            {"relativity": 1.0, "patch_size": 3},
            {"base_share": 1.0},
            {"base_share": 0.0, "upsampling": "bilinear"},
            {"top_k": 2},
            {"top_k": 1, "selection_scope": "patch"},
            {"patch_size": 64},
            {"combination": "gates"},
            {"combination": "gates", "base_share": 0.0, "patch_size": 2, "top_k": 2},
            {"patches": "sliding", "momentum": 0.5},
            {"start": 0.5},
            {"end": 0.5},
        ],
        ids=str,
    )
    def test_options(self, pipes, files, options):
        check(pipes, files["sd1"], **options)

    @pytest.mark.parametrize("kind, layout", list(product(KINDS, LAYOUTS)))
    def test_one_lora_of_every_kind_and_layout(self, pipes, tmp_path, kind, layout):
        """One LoRA, composed by the mean, is its own plain prediction."""
        file = write_lora(tmp_path / "one.safetensors", pipes["sd1"], kind, 7, layout, 1.5)
        check(pipes, [file], "sd1", "composite", {"steps": 2}, weights=[(0.8, 0.8)])

    @pytest.mark.parametrize("family", ["sd1", "sdxl"])
    def test_without_guidance(self, pipes, files, family):
        check(pipes, files[family], family, call={"cfg": 1.0})

    def test_one_image_of_one_lora(self, pipes, files):
        check(pipes, files["sd1"][:1], call={"prompt": ["a cat"], "negative": [""]})


class TestSurroundings:
    @pytest.mark.parametrize("words", ["oil style", "bamboo forest"])
    @pytest.mark.parametrize("family", ["sd1", "sdxl"])
    def test_the_rest_is_left_to_who_is_in_every_pass(self, pipes, files, family, words):
        told = [{"words": words}, *[{}] * (len(WEIGHTS) - 1)]
        check(pipes, files[family], family, parts=[EVERYWHERE, *told[1:]], told=told)

    def test_to_one_lora_and_with_a_place_and_whole_regions(self, pipes, files):
        two, options = files["sd1"][:2], {"regions": True, "patches": "sliding", "momentum": 0.5}
        told = [{"words": "oil style"}, {"at": "left"}]
        check(pipes, two, weights=WEIGHTS[:2], parts=[EVERYWHERE, told[1]], told=told, **options)

    @pytest.mark.parametrize("words", ["oil style", "bamboo forest"])
    def test_who_competes_and_is_known_to_keep_the_rest_does(self, pipes, files, words):
        """As a style does where styles compete, a background wherever it does."""
        pipe, options = pipes["sd1"], {**OPTIONS, "rest": True, "styles": "compete", "regions": True}
        loras = loras_of(pipe, files["sd1"])
        knowing = [loras[0], replace(loras[1], parts={"words": words}), *loras[2:]]
        expected = reference("sd1", files["sd1"], WEIGHTS, "loratorio", options, kept=1)
        kept, shared_out = (generate(pipe, knowing, **{**options, "rest": rest}) for rest in (True, False))
        assert relative_error(kept, expected) < 1e-4
        assert relative_error(shared_out, expected) > 1e-3

    def test_a_step_tells_who_is_in_every_pass(self, pipes, files):
        pipe, seen = pipes["sd1"], []
        first, *others = loras_of(pipe, files["sd1"])
        generate(pipe, [replace(first, parts={"words": "town"}), *others], on_step=seen.append)
        assert {step.everywhere for step in seen} == {(first.name,)}
        generate(pipe, [first, *others], on_step=seen.append)
        assert seen[-1].everywhere == ()


LEFT, RIGHT = {"at": "left"}, {"at": "0.5-0-1-1", "share": 2.0}
EVERYWHERE = {"base": True}


def mask(height=6, width=8):
    """White at the right top, grey below."""
    pixels = np.zeros((height, width), np.uint8)
    pixels[: height // 2, width // 2 :], pixels[height // 2 :] = 255, 100
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return kept(base64.b64encode(file.getvalue()).decode())


class TestClaimsAgainstPeft:
    """Where, when and how much each LoRA acts, and LoRAs in every pass."""

    @pytest.mark.parametrize("method", ["loratorio", "composite"])
    @pytest.mark.parametrize(
        "parts",
        [
            [LEFT, RIGHT, {}],
            [{"share": 0.5}, {}, {"share": 3.0}],
            [{"mask": mask()}, {"at": "0-0-0.3-0.4"}, {"mask": mask(), "at": "top"}],
            [{"steps": "0-0.5"}, {"steps": "0.5-1", "at": "left"}, {"steps": "0.25-0.75", "share": 2.0}],
            [{"steps": "0-0.25"}, {"steps": "0.75-1"}, {"steps": "0.75-1"}],
            [EVERYWHERE, {}, LEFT],
            [{}, EVERYWHERE, EVERYWHERE],
        ],
        ids=["places", "shares", "masks", "steps", "gap", "everywhere", "two everywhere"],
    )
    def test_parts(self, pipes, files, method, parts):
        check(pipes, files["sd1"], method=method, parts=parts)

    @pytest.mark.parametrize(
        "parts", [[LEFT, RIGHT, {"share": 0.5}], [{"steps": "0-0.5"}, EVERYWHERE, {"steps": "0.25-1"}]], ids=str
    )
    def test_parts_with_gates(self, pipes, files, parts):
        check(pipes, files["sd1"], parts=parts, combination="gates", sharpness=2.0, momentum=0.5)

    @pytest.mark.parametrize("family", ["sd2v", "sdxl"])
    def test_families(self, pipes, files, family):
        check(pipes, files[family], family, parts=[EVERYWHERE, LEFT, {"share": 2.0, "steps": "0-0.5"}])

    @pytest.mark.parametrize(
        "options",
        [
            {"base_share": 1.0},
            {"base_share": 0.0, "upsampling": "bilinear", "patch_size": 3},
            {"top_k": 1, "selection_scope": "patch"},
            {"start": 0.5},
            {"call": {"cfg": 1.0}},
        ],
        ids=str,
    )
    def test_options(self, pipes, files, options):
        check(pipes, files["sd1"], parts=[EVERYWHERE, LEFT, RIGHT], **options)

    def test_turns_are_taken_by_those_that_take_part(self, pipes, files):
        parts = [{"steps": "0-0.75"}, EVERYWHERE, {"steps": "0.25-1"}]
        check(pipes, files["sd1"], method="switch", switch_every=1, parts=parts)

    @pytest.mark.parametrize("method", ["loratorio", "composite", "switch", "merge"])
    def test_one_beside_one_in_every_pass_is_both_merged(self, pipes, files, method):
        """Adapters of both, as diffusers sums them, text encoders and convolutions included."""
        pipe = pipes["sd1"]
        two = files["sd1"][0], files["sd1"][2]
        expected = reference("sd1", two, WEIGHTS[:2], "merge", {})
        lora, other = loras_of(pipe, two, WEIGHTS[:2])
        options = {"base_share": 0.0} if method == "loratorio" else {}
        actual = generate(pipe, [lora, other], method=method, everywhere=[other.name], **options)
        assert relative_error(actual, expected) < 1e-4
        assert relative_error(generate(pipe, [lora], method=method, **options), expected) > 0.01

    @pytest.mark.parametrize("window", [{"start": 0.5}, {"end": 0.5}], ids=str)
    def test_a_lora_of_the_pool_in_every_pass_is_in_merged_steps_too(self, pipes, files, window):
        pipe = pipes["sd1"]
        first, second, other = loras_of(pipe, files["sd1"])
        options = {"everywhere": [other.name], **window}
        expected = generate(pipe, [first, second, other], **options)
        assert torch.equal(generate(pipe, [first, second, replace(other, pooled=True)], **options), expected)
        assert not torch.equal(generate(pipe, [first, second], **window), expected)

    @pytest.mark.parametrize("method", ["loratorio", "composite", "switch", "merge"])
    def test_all_in_every_pass_are_just_merged(self, pipes, files, method):
        pipe = pipes["sd1"]
        expected = reference("sd1", files["sd1"], WEIGHTS, "merge", {})
        with composed(pipe, loras_of(pipe, files["sd1"]), method=method, everywhere=["*"]) as composition:
            actual = pipe(**arguments(pipe)).images
        assert relative_error(actual, expected) < 1e-4
        assert composition.loras == [] and len(composition.everywhere) == 3
        for step in composition.steps:
            assert step.plan.isolated == () and (step.weights is None or len(step.weights) == 0)


class TestPrecision:
    """A denoiser in half precision, or in float32 under autocast, whose noise is recovered in float32."""

    @pytest.mark.parametrize("family", ["sd1", "sd2v"])
    @pytest.mark.parametrize("options", [{}, {"refresh": 1, "warmup": 1}, {"method": "composite"}], ids=str)
    def test_half(self, files, family, options):
        exact, half = make_pipeline(family), make_pipeline(family, torch.bfloat16)
        images = [generate(pipe, loras_of(pipe, files[family][:2], WEIGHTS[:2]), **options) for pipe in (exact, half)]
        assert images[1].dtype == torch.bfloat16 and relative_error(images[1].float(), images[0]) < 0.1

    @pytest.mark.parametrize("family", ["sd1", "sd2v"])
    @pytest.mark.parametrize("options", [{}, {"refresh": 1, "warmup": 1}, {"method": "composite"}], ids=str)
    def test_autocast(self, pipes, files, family, options):
        pipe = pipes[family]
        loras = loras_of(pipe, files[family][:2], WEIGHTS[:2])
        exact = generate(pipe, loras, **options)
        with torch.autocast("cpu", torch.bfloat16):
            assert relative_error(generate(pipe, loras, **options).float(), exact) < 0.1


class TestUnnamed:
    """LoRAs whose trigger words the prompt does not have."""

    @pytest.mark.parametrize("method", ["loratorio", "composite", "switch"])
    def test_left_out_is_as_if_it_were_not_there(self, pipes, files, method):
        pipe = pipes["sd1"]
        first, second = loras_of(pipe, files["sd1"][:2], WEIGHTS[:2])
        unnamed = replace(second, parts={"words": "zorg robot"})
        with composed(pipe, [first, unnamed], method=method, unnamed="drop") as composition:
            dropped = pipe(**arguments(pipe)).images
        assert all(step.members == [first.name] for step in composition.steps)
        assert composition.unnamed == (
            f"{second.name} takes no part: the prompt has none of its trigger words (zorg robot)",
        )
        assert torch.equal(dropped, generate(pipe, [first], method=method))
        everyone = generate(pipe, [first, second], method=method)
        assert torch.equal(generate(pipe, [first, unnamed], method=method, unnamed="keep"), everyone)
        assert torch.equal(generate(pipe, [first, unnamed], method=method, unnamed="drop_pooled"), everyone)
        pooled = replace(unnamed, pooled=True)
        assert torch.equal(generate(pipe, [first, pooled], method=method, unnamed="drop_pooled"), dropped)
        named, call = replace(second, parts={"words": "zorg, cat"}), {"prompt": ["a red cat", "cats"]}
        everyone = generate(pipe, [first, second], method=method, call=call)
        assert torch.equal(generate(pipe, [first, named], method=method, unnamed="drop", call=call), everyone)

    @pytest.mark.parametrize("method", ["loratorio", "composite"])
    def test_of_a_batch_each_image_for_itself(self, pipes, files, method):
        pipe = pipes["sd1"]
        first, second = loras_of(pipe, files["sd1"][:2], WEIGHTS[:2])
        of_cats = replace(second, parts={"words": "cat"})
        options = {"method": method} | ({} if method == "composite" else OPTIONS)
        images = generate(pipe, [first, of_cats], unnamed="drop", **options)  # "a red cat", "two dogs"
        both, alone = generate(pipe, [first, second], **options), generate(pipe, [first], **options)
        assert relative_error(images[0], both[0]) < 1e-4 and relative_error(images[1], alone[1]) < 1e-4
        assert relative_error(both[1], alone[1]) > 0.01
        with pytest.warns(UserWarning, match="takes no part in image 2: .*none of its trigger words .cat."):
            generate(pipe, [first, of_cats], unnamed="drop", **options)

    def test_merging_leaves_nobody_out_and_does_not_say_so(self, pipes, files):
        pipe = pipes["sd1"]
        first, second = loras_of(pipe, files["sd1"][:2], WEIGHTS[:2])
        unnamed = replace(second, parts={"words": "zorg"})
        with composed(pipe, [first, unnamed], method="merge", unnamed="drop") as composition:
            merged = pipe(**arguments(pipe)).images
        assert composition.unnamed == ()
        assert torch.equal(merged, generate(pipe, [first, second], method="merge"))

    def test_the_next_call_asks_its_own_prompts(self, pipes, files):
        pipe = pipes["sd1"]
        first, second = loras_of(pipe, files["sd1"][:2], WEIGHTS[:2])
        with composed(pipe, [first, replace(second, parts={"words": "dog"})], unnamed="drop") as composition:
            for prompt, names in (("a cat", [first.name]), ("a dog", [first.name, second.name])):
                pipe(**arguments(pipe, [prompt], [""], steps=1))
                assert composition.steps[0].members == names
                assert bool(composition.unnamed) == (len(names) == 1)

    def test_nobody_named_is_the_bare_model(self, pipes, files):
        pipe = pipes["sd1"]
        lora = replace(loras_of(pipe, files["sd1"][:1])[0], parts={"words": "zorg"})
        assert torch.equal(generate(pipe, [lora], unnamed="drop"), pipe(**arguments(pipe)).images)

    def test_by_itself_the_prompt_chooses_from_a_pool(self, pipes, files):
        pipe = pipes["sd1"]
        first, second, third = (
            replace(lora, pooled=True, parts={"words": words})
            for lora, words in zip(loras_of(pipe, files["sd1"][:3], WEIGHTS[:3]), ("cat", "zorg", "comet"))
        )
        call = {"prompt": ["a cat", "a comet"]}
        chosen = generate(pipe, [first, second, third], call=call)
        apart = [generate(pipe, [lora], call=call)[i] for i, lora in enumerate((first, third))]
        for image, alone in zip(chosen, apart):
            assert relative_error(image, alone) < 1e-4
        nobody = {"prompt": ["a ball", "a ball"]}
        everyone = generate(pipe, [first, second, third], unnamed="keep", call=nobody)
        assert torch.equal(generate(pipe, [first, second, third], call=nobody), everyone)

    def test_words_are_those_of_the_file(self, pipes, files, tmp_path):
        tensors = load_file(files["sd1"][0])
        save_file(tensors, tmp_path / "a.safetensors", {"ss_tag_frequency": json.dumps({"10": {"zorg robot": 9}})})
        lora = load_lora(pipes["sd1"], tmp_path / "a.safetensors")
        assert lora.words == ("zorg robot",)
        with composed(pipes["sd1"], [lora, *loras_of(pipes["sd1"], files["sd1"])]) as composition:
            assert [claim.words for claim in composition.claims] == [("zorg robot",), (), (), ()]

    def test_embeddings_name_nobody(self, pipes, files):
        pipe = pipes["sd1"]
        embeds, negative = pipe.encode_prompt(PROMPT, "cpu", 1, True, NEGATIVE)
        given = {"prompt": None, "negative_prompt": None, "prompt_embeds": embeds, "negative_prompt_embeds": negative}
        lora = loras_of(pipe, files["sd1"])[1]
        with composed(pipe, [lora], unnamed="drop"), pytest.raises(UnsupportedError, match="embeddings") as caught:
            pipe(**{**arguments(pipe), **given})
        assert caught.value.field == "unnamed"
        with composed(pipe, [replace(lora, pooled=True, parts={"words": "zorg"})]) as composition:
            pipe(**{**arguments(pipe), **given})
        assert composition.unnamed == () and composition.steps[0].members == [lora.name]


class TestClaims:
    def test_alone_at_the_left(self, pipes, files):
        """One LoRA, at the left: the rest is the bare model's, in the weights and in the first step's latents."""
        pipe = pipes["sd1"]
        lora = load_lora(pipe, files["sd1"][1], at="left")
        options = {**OPTIONS, "patch_size": 1, "base_share": 0.0}
        with composed(pipe, [lora], **options) as composition:
            left = pipe(**arguments(pipe, steps=1)).images
        whole, plain = (
            generate(pipe, loras, call={"steps": 1}, **options) for loras in ([replace(lora, parts={})], [])
        )
        weights = composition.steps[0].weights
        assert weights.shape == (1, 2, *SIZE)
        torch.testing.assert_close(weights[0], Claim.of(LEFT).place(*SIZE).expand(2, *SIZE))
        torch.testing.assert_close(left[..., :4], whole[..., :4], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(left[..., 7:], plain[..., 7:], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(whole[..., 7:], plain[..., 7:], rtol=1e-2, atol=1e-2)

    def test_outside_its_steps_a_lora_costs_nothing(self, pipes, files):
        pipe, images = pipes["sd1"], len(PROMPT)
        names = [file.stem for file in files["sd1"]]
        windows = dict(zip(names, ({"steps": "0-0.5"}, {"steps": "0-0.25"}, {"steps": "0.75-1"})))
        with rows_of_calls(pipe) as rows, composed(pipe, loras_of(pipe, files["sd1"]), loras=windows) as composition:
            pipe(**arguments(pipe))
        assert rows == [2 * images * (1 + count) for count in (2, 1, 0, 1)]
        assert [step.members for step in composition.steps] == [names[:2], names[:1], [], names[2:]]
        assert all(
            step.evaluated == step.members and len(step.weights) == len(step.members) for step in composition.steps
        )
        assert all(len(step.similarity) == len(step.evaluated) for step in composition.steps)

    def test_everywhere_costs_no_row(self, pipes, files):
        pipe = pipes["sd1"]
        loras = loras_of(pipe, files["sd1"])
        with rows_of_calls(pipe) as rows:
            generate(pipe, loras, everywhere=[loras[0].name])
        assert rows == [2 * len(PROMPT) * 3] * STEPS

    def test_without_claims_not_a_bit_changes(self, pipes, files):
        """What says the method's own leaves images as they are without it."""
        pipe = pipes["sd1"]
        loras = loras_of(pipe, files["sd1"])
        expected = generate(pipe, loras, **OPTIONS)
        said = {lora.name: {"share": 1, "steps": "0-1", "base": False} for lora in loras}
        assert torch.equal(generate(pipe, loras, loras=said, **OPTIONS), expected)
        same = [replace(lora, parts={"share": 1.0, "base": False}) for lora in loras]
        assert torch.equal(generate(pipe, same, everywhere=["*"], **OPTIONS), expected)

    def test_a_loras_own_parts_win_over_the_options_one_by_one(self, pipes, files):
        pipe = pipes["sd1"]
        first, second = files["sd1"][:2]
        mine = load_lora(pipe, first, at="left"), load_lora(pipe, second)
        options = {first.stem: {"at": "right", "share": 2}, second.stem: {"at": "right"}}
        with composed(pipe, mine, loras=options) as composition:
            assert composition.claims == [Claim.of({"at": "left", "share": 2.0}), Claim.of({"at": "right"})]
        assert composition.notes == ()

    def test_in_turn_a_lora_out_of_its_steps_is_not_refreshed(self, pipes, files):
        pipe = pipes["sd1"]
        windows = {files["sd1"][0].stem: {"steps": "0-0.5"}}
        with composed(pipe, loras_of(pipe, files["sd1"]), refresh=1, warmup=1, loras=windows) as composition:
            pipe(**arguments(pipe))
        assert [len(step.weights) for step in composition.steps] == [3, 3, 2, 2]
        assert all(0 not in step.plan.isolated for step in composition.steps[2:])
        assert [len(step.similarity) for step in composition.steps] == [3, 1, 1, 1]

    @pytest.mark.parametrize(
        "method, parts, said",
        [
            ("switch", {"at": "left"}, "knows no place and no share"),
            ("merge", {"steps": "0-0.5"}, "knows no place, share or steps"),
        ],
    )
    def test_what_a_method_cannot_heed_is_said(self, pipes, files, method, parts, said):
        pipe = pipes["sd1"]
        loras = [load_lora(pipe, files["sd1"][1], **parts), load_lora(pipe, files["sd1"][0])]
        with pytest.warns(UserWarning, match=f"LoRAtorio: method {method} {said}"):
            with composed(pipe, loras, method=method) as composition:
                actual = pipe(**arguments(pipe)).images
        assert len(composition.notes) == 1 and said in composition.notes[0]
        expected = generate(pipe, [replace(lora, parts={}) for lora in loras], method=method)
        assert torch.equal(actual, expected)

    def test_what_means_no_lora_is_said(self, pipes, files):
        pipe = pipes["sd1"]
        with pytest.warns(UserWarning, match="loras.knigth is no LoRA"):
            options = {"loras": {"knigth": {"at": "left"}}, "everywhere": ["lcm*"]}
            with composed(pipe, loras_of(pipe, files["sd1"]), **options) as composition:
                assert len(composition.notes) == 2

    def test_embeddings_instead_of_a_prompt(self, pipes, files):
        pipe = pipes["sd1"]
        embeddings = pipe.encode_prompt(PROMPT, "cpu", 1, True, NEGATIVE)
        call = arguments(pipe, prompt=PROMPT) | {"prompt": None, "negative_prompt": None}
        call |= dict(zip(("prompt_embeds", "negative_prompt_embeds"), embeddings))
        speaking, silent = loras_of(pipe, files["sd1"])[:2]
        with pytest.raises(UnsupportedError, match="prompt itself"):
            with composed(pipe, [speaking, silent], everywhere=[speaking.name]):
                pipe(**call)

    @pytest.mark.parametrize(
        "parts, message",
        [
            ({"at": "lft"}, "at must be .*did you mean left"),
            ({"share": 0}, "share must be a number from 0.01"),
            ({"stepps": "0-1"}, "no part 'stepps'; did you mean steps"),
            ({"mask": "x"}, "mask must be a PNG"),
        ],
        ids=str,
    )
    def test_bad_parts(self, pipes, files, parts, message):
        with pytest.raises(SettingsError, match=message):
            load_lora(pipes["sd1"], files["sd1"][0], **parts)
        with pytest.raises(SettingsError, match=message), composed(pipes["sd1"], [], loras={"a": parts}):
            pass

    def test_a_place_for_what_is_in_every_pass(self, pipes, files):
        lora = load_lora(pipes["sd1"], files["sd1"][0], at="left")
        with pytest.raises(SettingsError, match=f"{lora.name} says at of a LoRA that is in every pass"):
            with composed(pipes["sd1"], [lora], everywhere=["*"]):
                pass

    @pytest.mark.parametrize("where", ["success", "accident"])
    def test_nothing_stays(self, pipes, files, where):
        pipe = pipes["sd1"]
        plain = pipe(**arguments(pipe)).images
        before = state(pipe)

        def callback(pipe, step, timestep, tensors):
            if where == "accident":
                raise RuntimeError("an accident")
            return tensors

        loras = loras_of(pipe, files["sd1"])
        with composed(pipe, loras, everywhere=[loras[0].name], loras={loras[1].name: LEFT}):
            with pytest.raises(RuntimeError) if where == "accident" else nullcontext():
                pipe(**arguments(pipe), callback_on_step_end=callback)
        assert_untouched(pipe, before)
        assert torch.equal(pipe(**arguments(pipe)).images, plain)


class TestConsequences:
    """What follows from the method, without a reference."""

    def test_no_lora_is_the_pipeline_itself(self, pipes):
        pipe = pipes["sd1"]
        assert torch.equal(generate(pipe, []), pipe(**arguments(pipe)).images)

    def test_copies_of_one_lora_compose_to_it(self, pipes, files):
        pipe = pipes["sd1"]
        one = generate(pipe, loras_of(pipe, files["sd1"])[:1], **OPTIONS)
        three = generate(pipe, loras_of(pipe, files["sd1"])[:1] * 3, **OPTIONS)
        assert relative_error(three, one.double()) < 1e-4

    def test_zero_weight_is_the_base_model(self, pipes, files):
        pipe = pipes["sdxl"]
        silent = generate(pipe, loras_of(pipe, files["sdxl"], [(0.0, 0.0)] * 3), **OPTIONS)
        assert relative_error(silent, generate(pipe).double()) < 1e-5

    def test_the_order_of_loras_is_indifferent(self, pipes, files):
        pipe = pipes["sd2v"]
        loras = loras_of(pipe, files["sd2v"])
        expected = generate(pipe, loras, **OPTIONS).double()
        assert relative_error(generate(pipe, loras[::-1], **OPTIONS), expected) < 1e-4

    def test_images_of_a_batch_are_independent(self, pipes, files):
        pipe = pipes["sdxl"]
        loras = loras_of(pipe, files["sdxl"])
        both = generate(pipe, loras, **OPTIONS)
        first = generate(pipe, loras, call={"prompt": PROMPT[:1], "negative": NEGATIVE[:1]}, **OPTIONS)
        assert relative_error(both[:1], first.double()) < 1e-4

    def test_split_batches_agree_with_one(self, pipes, files):
        pipe = pipes["sd1"]
        loras = loras_of(pipe, files["sd1"])
        expected = generate(pipe, loras, **OPTIONS).double()
        for limit in (1, 3, 8):
            with rows_of_calls(pipe) as rows, composed(pipe, loras, **OPTIONS) as composition:
                composition.limit = limit
                assert relative_error(pipe(**arguments(pipe)).images, expected) < 1e-4
            assert max(rows) <= limit

    def test_what_fits_is_measured_anew_for_every_call_of_the_pipeline(self, pipes, files, monkeypatch):
        pipe, gauges = pipes["sd1"], []

        def gauge(device):
            gauges.append(Gauge(free=500))
            return gauges[-1]

        monkeypatch.setattr("loratorio_ext.hosts.diffusers.CudaMemory.of", gauge)
        loras = loras_of(pipe, files["sd1"])
        with rows_of_calls(pipe) as rows, composed(pipe, loras, **OPTIONS):
            first, second = (pipe(**arguments(pipe)).images for _ in range(2))
        host = 2 * len(PROMPT)
        assert [size for each in gauges for size in each.batches] == [host, host] and max(rows) == host
        monkeypatch.undo()
        assert torch.equal(first, second)
        assert relative_error(first, generate(pipe, loras, **OPTIONS).double()) < 1e-4

    def test_images_per_prompt_and_callbacks_are_the_pipelines_own(self, pipes, files):
        pipe = pipes["sd1"]
        seen = []

        def callback(pipe, step, timestep, tensors):
            seen.append((step, tensors["latents"].shape[0]))
            return tensors

        with composed(pipe, loras_of(pipe, files["sd1"]), **OPTIONS):
            call = arguments(pipe, prompt=PROMPT[:1], negative=NEGATIVE[:1])
            call |= {"latents": noise(3), "num_images_per_prompt": 3, "callback_on_step_end": callback}
            assert pipe(**call).images.shape[0] == 3
        assert seen == [(step, 3) for step in range(STEPS)]


class TestVariants:
    """Pipelines that start from images, or are led by them: against the pipeline with the LoRA loaded by diffusers."""

    @pytest.mark.parametrize(
        "family, kind",
        [("sd1", "Img2Img"), ("sd1", "Inpaint"), ("sd1", "ControlNet"), ("sdxl", "Img2Img"), ("sdxl", "ControlNet")],
    )
    def test_copies_of_one_lora_compose_to_it(self, files, family, kind):
        file = files[family][0]
        pipe = variant(family, kind)
        plain = pipe(**images_and_noise(pipe)).images
        before = state(pipe)
        with composed(pipe, [load_lora(pipe, file)] * 3, base_share=0.0):
            actual = pipe(**images_and_noise(pipe)).images
        assert_untouched(pipe, before)
        assert torch.equal(pipe(**images_and_noise(pipe)).images, plain)
        pipe.load_lora_weights(str(file.parent), weight_name=file.name)
        expected = pipe(**images_and_noise(pipe)).images.double()
        assert relative_error(actual, expected) < 1e-4
        assert relative_error(plain, expected) > 0.02

    def test_rows_beyond_guidance(self, files):
        pipe = variant("sd1", "PAG")
        with pytest.raises(UnsupportedError, match="6 rows for 2 images"):
            generate(pipe, loras_of(pipe, files["sd1"]), call={"pag_scale": 3.0})


def variant(family, kind):
    """Another pipeline around a family's models; a ControlNet reads the prompt, too."""
    base = make_pipeline(family)
    name = f"StableDiffusion{'XL' if family == 'sdxl' else ''}{kind}Pipeline"
    parts = dict(base.components)
    if kind == "ControlNet":
        parts["controlnet"] = draw(
            ControlNetModel.from_unet(base.unet, conditioning_embedding_out_channels=(8,) * 4), 7
        )
    if family == "sd1":
        parts["requires_safety_checker"] = False
    pipe = getattr(diffusers, name)(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images_and_noise(pipe):
    """Arguments of a call, with the images that the pipeline takes."""
    call = arguments(pipe, size=(8, 8), generator=[torch.Generator().manual_seed(each) for each in (1, 2)])
    takes = inspect.signature(type(pipe).__call__).parameters
    generator = torch.Generator().manual_seed(3)
    for name, channels in (("image", 3), ("mask_image", 1)):
        image = torch.rand(2, channels, 64, 64, generator=generator)
        call[name] = (image > 0.5).float() if name == "mask_image" else image
    if "strength" in takes:
        del call["latents"]
    return {name: value for name, value in call.items() if name in takes}


class TestRecord:
    def test_steps(self, pipes, files):
        pipe, seen = pipes["sd1"], []
        with composed(pipe, loras_of(pipe, files["sd1"]), on_step=seen.append, start=0.5, **OPTIONS) as composition:
            for _ in range(2):  # a second call starts anew
                pipe(**arguments(pipe))
                assert composition.steps == seen[-STEPS:]
        merged, inside = seen[1], seen[2]
        assert merged.plan.host == Plan.MERGED and merged.similarity is None and merged.weights is None
        assert inside.index == 2 and inside.plan == Plan(host=Plan.BASE, isolated=(0, 1, 2), members=(0, 1, 2))
        assert inside.timestep == float(pipe.scheduler.timesteps[2])
        assert inside.similarity.shape == inside.weights.shape == (3, 2, *SIZE)
        torch.testing.assert_close(inside.weights.sum(0), torch.ones(2, *SIZE))
        assert inside.similarity.max() <= 1

    def test_cost(self, pipes, files):
        """Base and isolated rows in one batch: 2 (N + 1) an image, and N + 2 when only the base guides."""
        pipe = pipes["sd1"]
        for share, expected in ((0.5, 2 * 4), (1.0, 3 + 2)):
            with rows_of_calls(pipe) as rows:
                generate(pipe, loras_of(pipe, files["sd1"]), base_share=share)
            assert rows == [len(PROMPT) * expected] * STEPS


class TestNothingStays:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_after_success(self, pipes, files, family):
        pipe = pipes[family]
        plain = pipe(**arguments(pipe)).images
        before = state(pipe)
        for method in ("loratorio", "switch", "merge"):
            generate(pipe, loras_of(pipe, files[family]), method=method)
        assert_untouched(pipe, before)
        assert torch.equal(pipe(**arguments(pipe)).images, plain)

    @pytest.mark.parametrize("where", ["text_encoder", "unet", "callback"])
    @pytest.mark.parametrize("method", ["loratorio", "merge"])
    def test_after_an_exception(self, pipes, files, where, method):
        pipe = pipes["sd1"]
        plain = pipe(**arguments(pipe)).images
        before = state(pipe)
        calls = []

        def fail(*_):
            calls.append(1)
            if len(calls) == 3:
                raise RuntimeError("an accident")
            return _[-1] if where == "callback" else None

        layer = {"text_encoder": pipe.text_encoder, "unet": pipe.unet.mid_block}.get(where)
        handle = None if layer is None else layer.register_forward_hook(fail)
        try:
            with (
                pytest.raises(RuntimeError, match="an accident"),
                composed(pipe, loras_of(pipe, files["sd1"]), method=method),
            ):
                pipe(**arguments(pipe), **({"callback_on_step_end": fail} if where == "callback" else {}))
        finally:
            if handle is not None:
                handle.remove()
        assert_untouched(pipe, before)
        assert torch.equal(pipe(**arguments(pipe)).images, plain)

    def test_hooks_of_others_stay(self, pipes, files):
        pipe = make_pipeline("sd1")
        HookRegistry.check_if_exists_or_initialize(pipe.unet).register_hook(ModelHook(), "other")
        generate(pipe, loras_of(pipe, files["sd1"]))
        assert list(pipe.unet._diffusers_hook.hooks) == ["other"]


class TestNoise:
    @pytest.mark.parametrize("sampler", SAMPLERS)
    @pytest.mark.parametrize("kind", ["v_prediction", "sample"])
    def test_a_perfect_prediction_means_the_noise_that_was_added(self, pipes, sampler, kind):
        """At every step of every scheduler: the noise level is the one its own formulas go by."""
        scheduler = scheduler_for(pipes["sd2v"], sampler)
        scheduler.register_to_config(prediction_type=kind)
        scheduler.set_timesteps(6)
        image, eps = noise(2), noise(4)[2:]
        x = eps * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            scheduler.scale_model_input(x, t)
            if hasattr(scheduler, "sigmas"):
                index = scheduler.index_for_timestep(t) if scheduler.step_index is None else scheduler.step_index
                share = 1 / (1 + scheduler.sigmas[index] ** 2)
            else:
                share = scheduler.alphas_cumprod[int(t)]
            noisy = share.sqrt() * image + (1 - share).sqrt() * eps
            output = image if kind == "sample" else share.sqrt() * eps - (1 - share).sqrt() * image
            torch.testing.assert_close(predicted_noise(scheduler, output, noisy, t), eps, rtol=1e-3, atol=1e-3)
            try:
                x = scheduler.step(output, t, x).prev_sample
            except (NotImplementedError, ValueError):
                assert kind == "sample"  # which few schedulers know
                return

    def test_unknown_parameterisation(self, pipes):
        scheduler = scheduler_for(pipes["sd1"], "Euler")
        scheduler.register_to_config(prediction_type="trigflow")
        with pytest.raises(UnsupportedError, match="trigflow"):
            predicted_noise(scheduler, noise(), noise(), torch.tensor(1))


class TestLoraFiles:
    def test_alpha_and_multipliers_scale_each_layer(self, pipes, tmp_path):
        pipe = pipes["sdxl"]
        path = write_lora(tmp_path / "a.safetensors", pipe, "everything", 1, "kohya", alpha=6.0, rank=3)
        values = load_file(path)
        odd = [name for name in values if name.endswith(".alpha")][::2]
        save_file({**values, **{name: torch.tensor(1.5) for name in odd}}, path)
        lora = load_lora(pipe, path, 0.5, 0.25)
        assert lora.name == "a" and lora.speaks_to_text_encoder
        assert set(lora.branches) == {
            f"{component}.{name}" for component, name, _ in touched_layers(pipe, "everything")
        }
        scales = {
            component: {branch.scale for name, branch in lora.branches.items() if name.startswith(f"{component}.")}
            for component in ("unet", "text_encoder", "text_encoder_2")
        }
        assert scales["unet"] == {0.25 * 2, 0.25 * 0.5}
        assert scales["text_encoder"] == scales["text_encoder_2"] == {0.5 * 2, 0.5 * 0.5}

    def test_peft_configuration_in_the_file(self, pipes, tmp_path):
        pipe = pipes["sd1"]
        path = write_lora(tmp_path / "a.safetensors", pipe, "attention", 1, "peft", rank=4)
        layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
        config = {"unet.r": 4, "unet.lora_alpha": 8, "unet.alpha_pattern": {layer: 2}, "unet.use_rslora": True}
        save_file(load_file(path), path, metadata={"format": "pt", "lora_adapter_metadata": json.dumps(config)})
        branches = load_lora(pipe, path).branches
        assert branches[f"unet.{layer}"].scale == 1
        assert {branch.scale for branch in branches.values()} == {1, 4}

    def test_weight_of_the_unet_follows_the_text_encoders(self, pipes, files):
        lora = load_lora(pipes["sd1"], files["sd1"][1], 0.3)
        assert {branch.scale for branch in lora.branches.values()} == {0.3}
        assert not lora.speaks_to_text_encoder

    def test_missing(self, pipes, tmp_path):
        with pytest.raises(MissingFileError, match="nowhere.safetensors does not exist"):
            load_lora(pipes["sd1"], tmp_path / "nowhere.safetensors")

    def test_not_safetensors(self, pipes, tmp_path):
        path = tmp_path / "a.safetensors"
        path.write_bytes(b"not at all")
        with pytest.raises(FileFormatError, match="a.safetensors is not a safetensors file"):
            load_lora(pipes["sd1"], path)

    @pytest.mark.parametrize("made_for, loaded_in", [("sd1", "sdxl"), ("sdxl", "sd1"), ("sd1", "sd2v")])
    def test_another_architecture(self, pipes, files, made_for, loaded_in):
        with pytest.raises(UnsupportedError) as caught:
            load_lora(pipes[loaded_in], files[made_for][0])
        message = str(caught.value)
        assert "another architecture" in message and "layers do not fit" in message
        assert "unet." in message or "text_encoder" in message
        assert "(3, 16" in message or "(2, 16" in message or "(2, 32" in message

    @pytest.mark.parametrize(
        "key", ["lora_unet_conv_in.hada_w1_a", "lora_unet_conv_in.dora_scale", "unet.x.norm.weight"]
    )
    def test_no_plain_lora(self, pipes, files, tmp_path, key):
        values = load_file(files["sd1"][0 if key.startswith("lora") else 1])
        path = tmp_path / "other.safetensors"
        save_file({**values, key: torch.ones(3, 3)}, path)
        with pytest.raises(UnsupportedError, match="other .*" + key.rpartition(".")[2]):
            load_lora(pipes["sd1"], path)

    def test_foreign_keys(self, pipes, tmp_path):
        path = tmp_path / "other.safetensors"
        save_file({"transformer.blocks.0.lora_A.weight": torch.ones(2, 2)}, path)
        with pytest.raises(UnsupportedError, match="transformer.blocks.0"):
            load_lora(pipes["sd1"], path)


def nothing(values):
    """The LoRA with one factor all zero."""
    return {name: value * 0 if "up" in name else value for name, value in values.items()}


def alpha_zero(values):
    return {name: value * 0 if name.endswith(".alpha") else value for name, value in values.items()}


class TestInert:
    """A LoRA that adds nothing takes no part."""

    @pytest.mark.parametrize("change", [nothing, alpha_zero, lambda values: {}], ids=["zero", "alpha 0", "empty"])
    @pytest.mark.parametrize("method", ["loratorio", "composite", "switch"])
    def test_the_others_compose_as_without_it(self, pipes, files, tmp_path, change, method):
        pipe, path = pipes["sd1"], tmp_path / "inert.safetensors"
        save_file(change(load_file(files["sd1"][0])), path)
        inert, others = load_lora(pipe, path), loras_of(pipe, files["sd1"])
        options = OPTIONS if method == "loratorio" else {"switch_every": 1}
        expected = generate(pipe, others, method=method, **options)
        with composed(pipe, [others[0], inert, *others[1:]], method=method, **options) as composition:
            assert torch.equal(pipe(**arguments(pipe)).images, expected)
            assert composition.inert == ("inert",) and composition.loras == others
        assert all(step.weights is None or len(step.weights) == 3 for step in composition.steps)

    def test_alone_it_leaves_the_pipeline_as_it_is(self, pipes, files):
        pipe = pipes["sd1"]
        at_zero = load_lora(pipe, files["sd1"][0], 0.0)
        assert torch.equal(generate(pipe, [at_zero]), pipe(**arguments(pipe)).images)


class TestOffloading:
    """Hooks of others that move weights about, as when memory is short; here from main memory to itself."""

    def test_models(self, pipes, files):
        expected = generate(pipes["sd1"], loras_of(pipes["sd1"], files["sd1"]), **OPTIONS)
        pipe = make_pipeline("sd1")
        pipe.enable_model_cpu_offload(device="cpu")
        assert torch.equal(generate(pipe, loras_of(pipe, files["sd1"]), **OPTIONS), expected)

    def test_layers_of_the_unet(self, pipes, files):
        expected = generate(pipes["sd1"], loras_of(pipes["sd1"], files["sd1"]), **OPTIONS)
        pipe = make_pipeline("sd1")
        accelerate.cpu_offload(pipe.unet, torch.device("cpu"))
        assert next(pipe.unet.parameters()).is_meta
        assert torch.equal(generate(pipe, loras_of(pipe, files["sd1"]), **OPTIONS), expected)


class TestUnsupported:
    def test_adapters_in_the_pipeline(self, files):
        pipe = make_pipeline("sd1")
        pipe.load_lora_weights(str(files["sd1"][0].parent), weight_name=files["sd1"][0].name)
        with pytest.raises(UnsupportedError, match="unload_lora_weights"), composed(pipe, []):
            pass

    def test_compiled_unet(self, pipes):
        pipe = make_pipeline("sd1")
        pipe.unet = torch.compile(pipe.unet)
        with pytest.raises(UnsupportedError, match="compiled unet"), composed(pipe, []):
            pass

    def test_a_part_compiled_after_the_loras_were_loaded(self, files):
        pipe = make_pipeline("sd1")
        loras = loras_of(pipe, files["sd1"])
        pipe.unet.mid_block = torch.compile(pipe.unet.mid_block)
        with pytest.raises(UnsupportedError, match="compiled unet.mid_block"), composed(pipe, loras):
            pass

    def test_a_pipeline_composes_once_at_a_time(self, pipes, files):
        pipe = pipes["sd1"]
        loras, shared = loras_of(pipe, files["sd1"]), type(pipe)(**pipe.components, requires_safety_checker=False)
        expected = generate(pipe, loras)
        before = state(pipe)
        with composed(pipe, loras):
            for other in (pipe, shared):
                with pytest.raises(UnsupportedError, match="composing already"), composed(other, loras):
                    pass
            assert torch.equal(pipe(**arguments(pipe)).images, expected)
        assert_untouched(pipe, before)
        with composed(shared, loras):
            pass

    def test_of_several_threads_one_composes(self, pipes, files):
        pipe = pipes["sd1"]
        loras, start, before = loras_of(pipe, files["sd1"]), threading.Barrier(8, timeout=60), state(pipe)

        def enter(_):
            start.wait()
            try:
                with composed(pipe, loras):
                    start.wait()
                    return "composed"
            except UnsupportedError as error:
                start.wait()
                return str(error)

        with ThreadPoolExecutor(8) as threads:
            outcomes = list(threads.map(enter, range(8)))
        assert outcomes.count("composed") == 1
        assert all("composing already" in outcome for outcome in outcomes if outcome != "composed")
        assert_untouched(pipe, before)

    def test_embeddings_instead_of_a_prompt(self, pipes, files):
        pipe = pipes["sd1"]
        embeddings = pipe.encode_prompt(PROMPT, "cpu", 1, True, NEGATIVE)
        call = arguments(pipe, prompt=PROMPT) | {"prompt": None, "negative_prompt": None}
        call |= dict(zip(("prompt_embeds", "negative_prompt_embeds"), embeddings))
        with pytest.raises(UnsupportedError, match="prompt itself"), composed(pipe, loras_of(pipe, files["sd1"])):
            pipe(**call)
        silent = loras_of(pipe, files["sd1"])[1:2]
        with composed(pipe, silent, **OPTIONS):
            given = pipe(**call).images
        assert torch.equal(given, generate(pipe, silent, **OPTIONS))

    def test_bad_options(self, pipes):
        with pytest.raises(SettingsError, match="patch_size"), composed(pipes["sd1"], [], patch_size=0):
            pass


class TestPipelines:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_folder(self, pipes, tmp_path, family):
        pipe = pipes[family]
        pipe.save_pretrained(tmp_path / "model")
        again = load_pipeline(tmp_path / "model")
        again.set_progress_bar_config(disable=True)
        assert type(again) is type(pipe)
        assert torch.equal(again(**arguments(again)).images, pipe(**arguments(pipe)).images)

    def test_errors(self, tmp_path):
        with pytest.raises(MissingFileError, match="nowhere"):
            load_pipeline(tmp_path / "nowhere")
        with pytest.raises(FileFormatError, match="model_index.json"):
            load_pipeline(tmp_path)
        (tmp_path / "model.safetensors").write_bytes(b"0" * 100)
        with pytest.raises(FileFormatError, match="not a safetensors file"):
            load_pipeline(tmp_path / "model.safetensors")


def test_kinds_cover_linear_and_conv_layers(pipes):
    layers = [layer for _, _, layer in touched_layers(pipes["sd1"], "everything")]
    assert {type(layer).__name__ for layer in layers} >= {"Linear", "Conv2d"}
    assert {layer.kernel_size for layer in layers if isinstance(layer, torch.nn.Conv2d)} == {(1, 1), (3, 3)}
    assert set(KINDS) and len(draw_lora(pipes["sd1"], "everything", 0)) == len(layers)
