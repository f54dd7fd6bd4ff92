"""Composition in pipelines around transformers against the literal reference, a family each.

The reference is the family's own pipeline in float64, whose denoiser is replaced by a loop over the predictions of
pipelines that each hold one LoRA by diffusers' and PEFT's own means, composed by the oracle.
"""

from functools import cache

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import diffusers
import peft
from safetensors.torch import load_file

from loratorio_ext.hosts.diffusers import composed, load_lora
from tests import oracle
from tests.tiny_transformers import FAMILIES, arguments, make_pipeline, pack, unpack, write_lora

pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("DeprecationWarning", "UserWarning", "FutureWarning")
]
diffusers.utils.logging.set_verbosity_error()  # that a model was cast to float64

OPTIONS = {"patch_size": 2, "temperature_mode": "adaptive", "temperature": 1.0, "relativity": 0.5, "base_share": 0.5}
ALL_OPTIONS = {"upsampling": "nearest", "top_k": 0, "selection_scope": "image"}
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


def generate(pipe, files, call, **options):
    loras = [load_lora(pipe, file, weight) for file, weight in zip(files, WEIGHTS)]
    with composed(pipe, loras, **{**OPTIONS, **options}):
        return pipe(**call).images


def relative_error(actual, expected):
    return float((actual.double() - expected).norm() / expected.norm())


# --- the reference ----------------------------------------------------------------------------------------------------


@cache
def adapted(name, file=None, weight=1.0):
    """A float64 pipeline in which this LoRA acts, by diffusers' own means."""
    pipe = make_pipeline(name, torch.float64)
    if file is not None:
        if not hasattr(pipe, "load_lora_weights"):
            inject(pipe.transformer, load_file(file), weight)
            return pipe
        pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name="one")
        pipe.set_adapters(["one"], [weight])
    return pipe


def inject(model, state, weight):
    """A LoRA by PEFT alone, for models of which diffusers loads none."""
    state = {key.removeprefix("transformer."): value for key, value in state.items()}
    rank = len(next(value for key, value in state.items() if ".lora_A." in key))
    layers = [key.removesuffix(".lora_A.weight") for key in state if ".lora_A." in key]
    peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=rank * weight, target_modules=layers), model)
    peft.set_peft_model_state_dict(model, state)


def texts_of(name, pipe, guided):
    """(conditional, unconditional) arguments of the transformer that hold the text, for families that encode it."""
    call = arguments(name, guided)
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
        return [{"encoder_hidden_states": text, "pooled_projections": pool} for text, pool, _ in encoded]
    return [{}, {}]


def to_numpy(name, output):
    """A prediction as ``[R, C, H, W]``."""
    if isinstance(output, list):
        output = torch.stack(output)[:, :, 0]
    return (unpack(output) if FAMILIES[name].packed else output).numpy()


@torch.no_grad()
def reference(name, files, guided, options, call):
    family = FAMILIES[name]
    base = adapted(name)
    alone = [adapted(name, file, weight) for file, weight in zip(files, WEIGHTS)]
    forwards = [pipe.transformer.forward for pipe in (base, *alone)]
    texts = [texts_of(name, pipe, guided) for pipe in (base, *alone)]
    calls, first = [], []

    def forward(*args, return_dict=None, **kwargs):
        rows = len(args[0] if args else kwargs["hidden_states"])
        images = list(range(2))
        second = family.guidance == "second" and guided and len(calls) % 2 == 1
        calls.append(rows)
        together = guided and family.guidance in ("first", "last")
        assert rows == (4 if together else 2)
        outputs = []
        for each, own in zip(forwards, texts):
            text = own[1] if second else own[0]
            if together:
                order = own[::-1] if family.guidance == "first" else own
                text = {key: torch.cat([half[key] for half in order]) for key in own[0]}
            outputs.append(to_numpy(name, each(*args, return_dict=False, **{**kwargs, **text})[0]))
        if together:
            halves = [(out[:2], out[2:]) for out in outputs]
            conds, unconds = zip(*(half[::-1] if family.guidance == "first" else half for half in halves))
        elif second:
            conds, unconds = first.pop(), outputs
        else:
            conds, unconds = outputs, [None] * len(outputs)
            first[:] = [outputs]
        predicting = 4  # channels of the latents; a learned variance follows them
        eps_base, *eps = (out[:, :predicting] for out in conds)
        cond, uncond, _ = oracle.loratorio(
            eps,
            eps_base,
            [out[:, :predicting] for out in conds[1:]],
            None if unconds[0] is None else [out[:, :predicting] for out in unconds[1:]],
            None if unconds[0] is None else unconds[0][:, :predicting],
            images,
            {**OPTIONS, **ALL_OPTIONS, **options},
        )
        rows = [uncond] if second else [cond]
        if together:
            rows = [uncond, cond] if family.guidance == "first" else [cond, uncond]
        out = torch.from_numpy(np.concatenate(rows))
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


def check(name, files, guided, **options):
    expected = reference(name, files, guided, options, arguments(name, guided, torch.float64))
    pipe = pipeline(name)
    actual = generate(pipe, files, arguments(name, guided), **options)
    plain = pipe(**arguments(name, guided)).images
    error = relative_error(actual, expected)
    print(f"{name}: relative error {error:.1e}, of the plain image {relative_error(plain, expected):.2f}")
    assert error < 1e-4
    assert relative_error(plain, expected) > 0.02  # the LoRAs are not idle


@pytest.mark.parametrize("name", FAMILIES)
class TestAgainstPeft:
    @pytest.mark.parametrize("count", [1, 2, 3])
    def test_guided(self, files, name, count):
        check(name, files(name)[-count:], guided=True)

    def test_without_guidance(self, files, name):
        check(name, files(name), guided=False)
