"""Composition in pipelines around transformers against the literal reference, a family each.

The reference is the family's own pipeline in float64, whose denoiser is replaced by a loop over the predictions of
pipelines that each hold one LoRA by diffusers' and PEFT's own means, composed by the oracle.
"""

from dataclasses import asdict, replace
from functools import cache

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import diffusers
import peft
from safetensors.torch import load_file, save_file

from loratorio_ext.claims import Claim
from loratorio_ext.errors import SettingsError, UnsupportedError
from loratorio_ext.hosts.denoisers import Call, Layout
from loratorio_ext.hosts.diffusers import check_supported, composed, load_lora, scheduler_for
from loratorio_ext.settings import Settings
from tests import oracle
from tests.tiny_pipelines import assert_untouched, state
from tests.tiny_transformers import (
    FAMILIES,
    PROMPTS,
    STEPS,
    VARIANTS,
    arguments,
    image_vae,
    make_pipeline,
    pack,
    unpack,
    write_lora,
)

pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("DeprecationWarning", "UserWarning", "FutureWarning")
]
diffusers.utils.logging.set_verbosity_error()  # that a model was cast to float64

OPTIONS = {"patch_size": 2, "temperature_mode": "adaptive", "temperature": 1.0, "relativity": 0.5, "base_share": 0.5}
KINDS = ("everything", "attention", "rest")
WEIGHTS = (0.9, 1.0, 0.8)


@cache
def pipeline(name):
    return make_pipeline(name)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """For each family a LoRA of every kind."""
    folder = tmp_path_factory.mktemp("loras")

    @cache
    def of_family(name):
        return tuple(
            write_lora(folder / f"{name}-{kind}.safetensors", pipeline(name), kind, seed)
            for seed, kind in enumerate(KINDS)
        )

    return of_family


def generate(pipe, files, call, parts=(), **options):
    loras = [load_lora(pipe, file, weight) for file, weight in zip(files, WEIGHTS)]
    loras = [replace(lora, parts=each) for lora, each in zip(loras, parts)] if parts else loras
    with composed(pipe, loras, **{**OPTIONS, **options}):
        return pipe(**call).images


def relative_error(actual, expected):
    return float((actual.double() - expected).norm() / expected.norm())


# --- the reference ----------------------------------------------------------------------------------------------------


@cache
def adapted(name, files=(), weights=()):
    """A float64 pipeline in which these LoRAs act, by diffusers' own means."""
    pipe = make_pipeline(name, torch.float64)
    names = [f"lora{index}" for index in range(len(files))]
    for adapter, file, weight in zip(names, files, weights):
        if hasattr(pipe, "load_lora_weights"):
            pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=adapter)
        else:
            inject(pipe.transformer, load_file(file), weight)
    if names and hasattr(pipe, "set_adapters"):
        pipe.set_adapters(names, list(weights))
    return pipe


def inject(model, state, weight):
    """A LoRA by PEFT alone, for models of which diffusers loads none."""
    state = {key.removeprefix("transformer."): value for key, value in state.items()}
    rank = len(next(value for key, value in state.items() if ".lora_A." in key))
    layers = [key.removesuffix(".lora_A.weight") for key in state if ".lora_A." in key]
    peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=rank * weight, target_modules=layers), model)
    peft.set_peft_model_state_dict(model, state)


def texts_of(name, pipe, call):
    """(conditional, unconditional) arguments of the transformer that hold the text, for families that encode it."""
    guided = "negative_prompt" in call
    length = {"max_sequence_length": 16}
    if name == "sd3":
        prompt, negative = call["prompt"], call.get("negative_prompt")
        p, n, pooled, npooled = pipe.encode_prompt(
            prompt, prompt, prompt, negative_prompt=negative, do_classifier_free_guidance=guided, **length
        )
        return [
            {"encoder_hidden_states": text, "pooled_projections": pool} for text, pool in ((p, pooled), (n, npooled))
        ]
    if name.startswith("flux-"):
        encoded = [pipe.encode_prompt(text, **length) for text in (call["prompt"], call.get("negative_prompt")) if text]
        encoded = [{"encoder_hidden_states": text, "pooled_projections": pool} for text, pool, _ in encoded]
        return [*encoded, None][:2]
    return [{}, {}]


def to_numpy(name, output):
    """A prediction as ``[R, C, H, W]``."""
    if isinstance(output, list):
        output = torch.stack(output)[:, :, 0]
    return (unpack(output) if FAMILIES[name].packed else output).numpy()


class Reference:
    """What a method makes of predictions: of the bare model, of each LoRA alone, of all merged, in this order."""

    def __init__(self, method, options, count, parts=()):
        self.method, self.count = method, count
        self.claims = [Claim.of(each) for each in parts or [{}] * count]
        self.options = asdict(Settings.from_mapping({**OPTIONS, **options}))
        self.momentum = [oracle.Momentum(self.options["momentum"]) for _ in range(2)]
        self.reuse = [oracle.Reuse(options["refresh"], options["warmup"]) for _ in range(2) if "refresh" in options]

    def __call__(self, step, conds, unconds=None):
        """(cond, uncond) ``[R, C, H, W]`` each, from ``[1 + N + 1, R, C, H, W]`` each."""
        progress = step / STEPS
        if self.method == "merge" or progress < self.options.get("start", 0):
            return conds[-1], None if unconds is None else unconds[-1]
        members = [i for i, claim in enumerate(self.claims) if claim.acts_at(progress)]
        base, eps = conds[0], conds[1:-1][members]
        base_uncond, of_loras = (None, None) if unconds is None else (unconds[0], unconds[1:-1][members])
        if not members:
            return base, base_uncond
        share = [self.claims[i].share for i in members]
        size = base.shape[-2:]
        places = [self.claims[i].place(*size) for i in members]
        placed = any(each is not None for each in places)
        place = [np.ones(size) if each is None else each.double().numpy() for each in places] if placed else None
        place = np.stack(place) if placed else None
        if self.method == "switch":
            turn = oracle.switch(step, self.options["switch_every"], self.count)
            return eps[turn], None if unconds is None else of_loras[turn]
        if self.method == "composite":
            cond = oracle.composite(eps, share, place, base)
            return cond, None if unconds is None else oracle.composite(of_loras, share, place, base_uncond)
        if self.reuse:
            eps, of_loras = self.reuse[unconds is not None](eps, base, of_loras, base_uncond, 1.0)
        rows = range(len(base))
        relative = self.momentum[unconds is not None](eps, base, self.options, members)
        cond, uncond, _ = oracle.loratorio(
            eps, base, eps, of_loras, base_uncond, rows, self.options, None, place, share, base, relative
        )
        return cond, uncond


@torch.no_grad()
def reference(name, files, guided, method, options, call, parts=()):
    """``parts``: of each LoRA's claim; those in every pass are in the base's pipeline and in all others."""
    family = FAMILIES[name]
    weights = WEIGHTS[: len(files)]
    everywhere = [index for index, each in enumerate(parts) if each.get("base")]

    def holding(*loras):
        loras = [index for index in range(len(files)) if index in loras or index in everywhere]
        return adapted(name, tuple(files[index] for index in loras), tuple(weights[index] for index in loras))

    base = holding()
    competing = [index for index in range(len(files)) if index not in everywhere]
    merged = holding(*competing) if hasattr(base, "set_adapters") else base
    pipes = [base, *map(holding, competing), merged]
    forwards = [pipe.transformer.forward for pipe in pipes]
    texts = [texts_of(name, pipe, call) for pipe in pipes]
    compose = Reference(method, options, len(competing), [parts[index] for index in competing] if parts else ())
    together = guided and family.guidance in ("first", "last")
    calls, conds = [], []

    def halves(rows):
        """(cond, uncond) of the rows of one call."""
        first, second = rows[: len(rows) // 2], rows[len(rows) // 2 :]
        return (second, first) if family.guidance == "first" else (first, second)

    def both(cond, uncond):
        return (uncond, cond) if family.guidance == "first" else (cond, uncond)

    def forward(*args, return_dict=None, **kwargs):
        second = guided and not together and len(calls) % 2 == 1
        step = len(calls) // (2 if guided and not together else 1)
        calls.append(step)
        outputs = []
        for each, (text, negative) in zip(forwards, texts):
            own = negative if second else text
            if together:
                own = {key: torch.cat(both(text[key], negative[key])) for key in text}
            outputs.append(to_numpy(name, each(*args, return_dict=False, **{**kwargs, **own})[0]))
        outputs = np.stack(outputs)[:, :, :4]  # the channels of the latents; a learned variance follows them
        if together:
            split = [halves(rows) for rows in outputs]
            out = np.concatenate(both(*compose(step, *(np.stack(side) for side in zip(*split)))))
        elif second:
            out = compose(step, conds[-1], outputs)[1]
        else:
            conds.append(outputs)
            out = compose(step, outputs)[0]
        out = torch.from_numpy(np.array(out))
        if name == "z-image":
            return (list(out[:, :, None]),)
        if name == "pixart-sigma":
            out = torch.cat([out, torch.zeros_like(out)], dim=1)
        return (pack(out) if family.packed else out,)

    base.transformer.forward = forward
    try:
        return base(**call).images
    finally:
        del base.transformer.forward


def check(name, files, guided=True, method="loratorio", call=None, parts=(), **options):
    call = call or {}
    expected = reference(name, files, guided, method, options, arguments(name, guided, torch.float64, **call), parts)
    pipe = pipeline(name)
    call = arguments(name, guided, **call)
    actual = generate(pipe, files, call, parts, method=method, **options)
    plain = pipe(**call).images
    error = relative_error(actual, expected)
    print(f"{name}: relative error {error:.1e}, of the plain image {relative_error(plain, expected):.2f}")
    assert error < 1e-4
    assert relative_error(plain, expected) > 0.02  # the LoRAs are not idle


@pytest.mark.parametrize("name", FAMILIES)
class TestAgainstPeft:
    @pytest.mark.parametrize("count", [1, 2, 3])
    def test_guided(self, files, name, count):
        check(name, files(name)[-count:])

    def test_without_guidance(self, files, name):
        check(name, files(name), guided=False)


@pytest.mark.parametrize("name", ["flux-dev", "sd3", "z-image"])
class TestEveryMethod:
    """In families that guide by two calls, by the first rows of one, and by the last."""

    @pytest.mark.parametrize(
        "options",
        [
            {"method": "composite"},
            {"method": "merge"},
            {"method": "switch", "switch_every": 1},
            {"start": 0.5},
            {"base_share": 1.0},
            {"base_share": 0.0, "upsampling": "bilinear", "patch_size": 3},
            {"top_k": 1},
            {"combination": "gates", "patch_size": 3},
            {"patches": "sliding"},
            {"refresh": 1, "warmup": 1},
        ],
        ids=str,
    )
    def test_options(self, files, name, options):
        check(name, files(name), **options)


@pytest.mark.parametrize("name", ["flux-dev", "sd3", "z-image"])
class TestClaims:
    """Where, when and how much, on tokens, a grid and lists; and LoRAs in every pass."""

    @pytest.mark.parametrize("method", ["loratorio", "composite"])
    def test_places_shares_and_steps(self, files, name, method):
        parts = [{"at": "left"}, {"at": "0.3-0-1-0.4", "share": 2.0}, {"steps": "0-0.5"}]
        check(name, files(name), method=method, parts=parts)

    def test_everywhere(self, files, name):
        check(name, files(name), parts=[{"base": True}, {}, {"at": "top"}])

    def test_one_beside_one_in_every_pass_is_both_merged(self, files, name):
        both, call = files(name)[:2], arguments(name, True, torch.float64)
        expected = reference(name, both, True, "merge", {}, call)
        parts = [{}, {"base": True}]
        actual = generate(pipeline(name), both, arguments(name, True), parts, base_share=0.0)
        assert relative_error(actual, expected) < 1e-4


class TestGuidance:
    def test_a_negative_prompt_that_is_the_prompt(self, files):
        """Texts do not tell then which rows are unconditional."""
        for name in ("flux-schnell", "sd3"):
            check(name, files(name), call={"negative_prompt": PROMPTS})
        texts = arguments("z-image", dtype=torch.float64)["prompt_embeds"]
        same = {"prompt_embeds": texts, "negative_prompt_embeds": texts}
        check("z-image", files("z-image"), call={key: [each.float() for each in value] for key, value in same.items()})

    def test_rows_of_a_call(self, files):
        """Base and isolated rows in one batch: N + 1 an image and call, one where only the base guides; distilled: no
        second call."""
        pipe = pipeline("flux-dev")
        for call, share, expected in ((True, 0.5, [8, 8]), (True, 1.0, [8, 2]), (False, 0.5, [8])):
            sizes = []

            def note(layer, args, out, sizes=sizes):
                sizes.append(len(out))

            hook = pipe.transformer.x_embedder.register_forward_hook(note)
            generate(pipe, files("flux-dev"), arguments("flux-dev", call), base_share=share)
            hook.remove()
            assert sizes == expected * STEPS

    def test_a_second_call_of_the_pipeline_starts_anew(self, files):
        pipe = pipeline("flux-dev")
        loras = [load_lora(pipe, file) for file in files("flux-dev")]
        with composed(pipe, loras, **OPTIONS, refresh=1, warmup=1) as composition:
            first, second = (pipe(**arguments("flux-dev")).images for _ in range(2))
            assert torch.equal(first, second)
            assert [step.index for step in composition.steps] == list(range(STEPS))
            assert composition.steps[0].weights.shape == (3, 2, 6, 10)


def test_the_command_line(files, tmp_path):
    """A folder of Flux, its LoRAs and its only sampler, as `loratorio generate` takes them."""
    typer = pytest.importorskip("typer.testing")
    from loratorio_ext.cli import app

    make_pipeline("flux-dev", vae=image_vae()).save_pretrained(tmp_path / "model")
    asked = [
        "generate",
        "--model",
        tmp_path / "model",
        "--prompt",
        "a cat",
        "--steps",
        2,
        "--size",
        "64x64",
        "--seed",
        1,
    ]
    asked += [word for file in files("flux-dev") for word in ("--lora", file)]
    asked += ["--device", "cpu", "--quiet", "--out", tmp_path / "flux.png"]
    result = typer.CliRunner().invoke(app, [*map(str, asked), "--sampler", "Euler"])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "flux.png").is_file()
    refused = typer.CliRunner().invoke(app, [*map(str, asked), "--sampler", "DDIM"])
    assert refused.exit_code == 2 and "FluxPipeline follows a flow" in refused.output


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.pipeline)
def test_copies_of_one_lora_compose_to_it(variant, tmp_path):
    """From images, masks, control images: held against the pipeline with the LoRA loaded by diffusers."""
    pipe = variant.make()

    def image():
        torch.manual_seed(0)  # some of these pipelines draw from it what they do not draw from their generator
        return pipe(**variant.arguments(pipe)).images

    plain = image()
    kind = "rest" if variant.controlnet else "attention"  # ControlNets read the text, too
    file = write_lora(tmp_path / "one.safetensors", pipe, kind, 1, strength=0.6)
    with composed(pipe, [load_lora(pipe, file, 0.8)] * 3, base_share=0.0, patch_size=2):
        actual = image()
    assert torch.equal(image(), plain)
    pipe.load_lora_weights(str(tmp_path), weight_name=file.name, adapter_name="one")
    pipe.set_adapters(["one"], [0.8])
    expected = image().double()
    assert relative_error(actual, expected) < 1e-4
    assert relative_error(plain, expected) > 0.02


class TestNothingStays:
    @pytest.mark.parametrize("name", FAMILIES)
    def test_after_success(self, files, name):
        pipe = pipeline(name)
        plain = pipe(**arguments(name)).images
        before = state(pipe)
        generate(pipe, files(name), arguments(name))
        assert_untouched(pipe, before)
        assert torch.equal(pipe(**arguments(name)).images, plain)

    @pytest.mark.parametrize("name", ["flux-dev", "sd3", "z-image"])
    @pytest.mark.parametrize("where", ["denoiser", "callback"])
    def test_after_an_exception(self, files, name, where):
        pipe = pipeline(name)
        plain = pipe(**arguments(name)).images
        before = state(pipe)
        calls = []

        def fail(*args):
            calls.append(1)
            if len(calls) == 2:
                raise RuntimeError("an accident")
            return args[-1] if where == "callback" else None

        handle = list(pipe.transformer.modules())[-1].register_forward_hook(fail) if where == "denoiser" else None
        call = {"callback_on_step_end": fail} if where == "callback" else {}
        try:
            with pytest.raises(RuntimeError, match="an accident"):
                generate(pipe, files(name), arguments(name, **call))
        finally:
            if handle is not None:
                handle.remove()
        assert_untouched(pipe, before)
        assert torch.equal(pipe(**arguments(name)).images, plain)


class TestFiles:
    """LoRAs in layouts of their own, against the pipeline with the LoRA loaded by diffusers, or injected by PEFT."""

    def one_alone(self, file):
        pipe = pipeline("flux-dev")
        plain = pipe(**arguments("flux-dev")).images
        with composed(pipe, [load_lora(pipe, file)], method="composite"):
            return pipe(**arguments("flux-dev")).images, plain

    def kohya(self, layers, rank=2):
        """{name: (in, out)} as a file of kohya's trainer has it."""
        generator = torch.Generator().manual_seed(9)
        state = {}
        for name, (fan_in, out) in layers.items():
            down, up = torch.randn(rank, fan_in, generator=generator), torch.randn(out, rank, generator=generator)
            state |= {f"{name}.lora_down.weight": 0.3 * down, f"{name}.lora_up.weight": 0.3 * up}
            state[f"{name}.alpha"] = torch.tensor(1.0)
        return state

    def test_kohya(self, tmp_path):
        """Whose layers hold query, key and value together."""
        layers = {
            "lora_unet_double_blocks_0_img_attn_qkv": (32, 96),
            "lora_unet_double_blocks_0_txt_mlp_0": (32, 128),
            "lora_te1_text_model_encoder_layers_0_mlp_fc1": (16, 32),
        }
        save_file(self.kohya(layers), tmp_path / "kohya.safetensors")
        actual, plain = self.one_alone(tmp_path / "kohya.safetensors")
        pipe = make_pipeline("flux-dev")
        pipe.load_lora_weights(str(tmp_path), weight_name="kohya.safetensors")
        expected = pipe(**arguments("flux-dev")).images.double()
        assert relative_error(actual, expected) < 1e-4 < relative_error(plain, expected)

    def test_kohya_for_an_encoder_that_diffusers_drops(self, tmp_path):
        layers = {
            "lora_unet_double_blocks_0_txt_mlp_0": (32, 128),
            "lora_te2_encoder_block_0_layer_0_SelfAttention_q": (32, 16),
        }
        save_file(self.kohya(layers), tmp_path / "t5.safetensors")
        with pytest.raises(UnsupportedError, match="t5 .*lora_te2_encoder_block_0"):
            load_lora(pipeline("flux-dev"), tmp_path / "t5.safetensors")

    def test_t5(self, tmp_path):
        pipe = make_pipeline("flux-dev")
        layer = "encoder.block.0.layer.0.SelfAttention.q"
        generator = torch.Generator().manual_seed(4)
        shapes = {"lora_A": (2, 32), "lora_B": (16, 2)}
        values = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
        state = {f"text_encoder_2.{layer}.{key}.weight": value for key, value in values.items()}
        save_file(state, tmp_path / "t5.safetensors")
        actual, plain = self.one_alone(tmp_path / "t5.safetensors")
        inject(pipe.text_encoder_2, {key.removeprefix("text_encoder_2."): value for key, value in state.items()}, 1.0)
        expected = pipe(**arguments("flux-dev")).images.double()
        assert relative_error(actual, expected) < 1e-4 < relative_error(plain, expected)


def group_offloaded(pipe):
    cpu = torch.device("cpu")
    pipe.transformer.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")


def stored_in_float8(pipe):
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def in_bfloat16(pipe):
    pipe.to(torch.bfloat16)


class TestSavingMemory:
    @pytest.mark.parametrize("name", ["flux-dev", "z-image"])
    @pytest.mark.parametrize(
        "save, tolerance",
        [(group_offloaded, 1e-4), (stored_in_float8, 1e-4), (in_bfloat16, 0.02)],
        ids=["group_offloaded", "stored_in_float8", "in_bfloat16"],
    )
    def test_copies_of_one_lora_compose_to_it(self, files, name, save, tolerance):
        pipe = make_pipeline(name)
        save(pipe)
        call = arguments(
            name, dtype=next(pipe.transformer.parameters()).dtype if save is in_bfloat16 else torch.float32
        )
        plain = pipe(**call).images
        lora = load_lora(pipe, files(name)[0])
        with composed(pipe, [lora] * 3, base_share=0.0, patch_size=2):
            three = pipe(**call).images
        assert torch.equal(pipe(**call).images, plain)
        with composed(pipe, [lora], method="merge"):
            one = pipe(**call).images.double()
        assert relative_error(three, one) < tolerance < relative_error(plain, one)


class TestRefused:
    def test_more_calls_than_guidance_takes(self, files):
        """Stable Diffusion 3's skip-layer guidance."""
        more = {"skip_guidance_layers": [0], "skip_layer_guidance_start": -0.1, "skip_layer_guidance_stop": 1.0}
        with pytest.raises(UnsupportedError, match="guides by more than a negative prompt"):
            generate(pipeline("sd3"), files("sd3"), arguments("sd3", **more))

    def test_rows_beyond_guidance(self, files):
        pipe = make_pipeline("sd3", kind="StableDiffusion3PAGPipeline")
        with pytest.raises(UnsupportedError, match="neither guidance by a negative prompt nor none"):
            generate(pipe, files("sd3"), arguments("sd3", pag_scale=3.0))

    def test_texts_changed_on_the_way(self, files):
        def change(pipe, step, timestep, tensors):
            return {"prompt_embeds": tensors["prompt_embeds"] + 1}

        call = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
        with pytest.raises(UnsupportedError, match="another text than encode_prompt returned"):
            generate(pipeline("chroma"), files("chroma"), arguments("chroma", **call))

    def test_frames(self):
        call = Call({"hidden_states": torch.zeros(1, 4, 3, 8, 8)}, "hidden_states")
        with pytest.raises(UnsupportedError, match="FluxTransformer2DModel is given 3 frames: videos"):
            Layout.of(pipeline("flux-dev").transformer, call)

    def test_tokens_in_an_unknown_order(self):
        call = Call({"hidden_states": torch.zeros(1, 15, 16)}, "hidden_states")
        with pytest.raises(UnsupportedError, match=r"latents \(1, 15, 16\) of SD3Transformer2DModel .* not known"):
            Layout.of(pipeline("sd3").transformer, call)

    def test_scale_of_loras(self, files):
        call = arguments("flux-dev", joint_attention_kwargs={"scale": 0.5})
        with pytest.raises(UnsupportedError, match="joint_attention_kwargs has a scale for LoRAs"):
            generate(pipeline("flux-dev"), files("flux-dev"), call)

    def test_a_call_without_denoising(self, files, monkeypatch):
        pipe = pipeline("flux-dev")
        monkeypatch.setattr(type(pipe), "__call__", lambda self: "a picture of something else")
        with pytest.raises(UnsupportedError, match="FluxPipeline never called its transformer"):
            generate(pipe, files("flux-dev"), {})

    def test_composing_twice(self, files):
        pipe = pipeline("flux-dev")
        other = diffusers.FluxImg2ImgPipeline(**{**pipe.components, "vae": None})
        loras = [load_lora(pipe, file) for file in files("flux-dev")]
        with composed(pipe, loras):
            for again in (pipe, other):
                with pytest.raises(UnsupportedError, match="composing already"), composed(again, loras):
                    pass

    def test_compiled_after_the_lora_was_loaded(self, files):
        pipe = make_pipeline("flux-dev")
        loras = [load_lora(pipe, file) for file in files("flux-dev")]
        pipe.transformer.transformer_blocks[0] = torch.compile(pipe.transformer.transformer_blocks[0])
        with pytest.raises(UnsupportedError, match="compiled transformer"), composed(pipe, loras):
            pass

    def test_another_sampler_than_the_flows(self):
        pipe = pipeline("flux-dev")
        assert scheduler_for(pipe, "Euler").config == pipe.scheduler.config
        for sampler in ("DPM++ 2M", "Euler Karras"):
            with pytest.raises(SettingsError, match="FluxPipeline follows a flow"):
                scheduler_for(pipe, sampler)

    def test_two_denoisers(self):
        model = pipeline("flux-dev").transformer
        parts = {"transformer": model, "transformer_2": model, "scheduler": FAMILIES["flux-dev"].scheduler()}
        pipe = diffusers.WanPipeline(tokenizer=None, text_encoder=None, vae=None, **parts)
        with pytest.raises(
            UnsupportedError, match="one UNet or transformer to denoise, has transformer and transformer_2"
        ):
            check_supported(pipe)
