"""Prompts with weights and long ones, in compositions and without."""

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("compel")

import compel

from loratorio_ext.errors import UnsupportedError
from loratorio_ext.hosts.diffusers import composed, load_lora
from loratorio_ext.hosts.prompts import weighted_prompts
from tests import test_diffusers, tiny_pipelines, tiny_transformers
from tests.test_diffusers import relative_error
from tests.tiny_pipelines import assert_untouched, state

pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("DeprecationWarning", "UserWarning", "FutureWarning")
]

COMPEL = {"sd1": compel.CompelForSD, "sdxl": compel.CompelForSDXL, "flux-dev": compel.CompelForFlux}
WEIGHTED = ["a (red)1.4 cat", "two dogs++ and a bird-"]
PLAIN = ["a red cat", "two dogs and a bird"]


def make(family):
    return (tiny_transformers if family == "flux-dev" else tiny_pipelines).make_pipeline(family)


def arguments(family, pipe, prompt, **others):
    if family == "flux-dev":
        return tiny_transformers.arguments(family, prompt=prompt, **{"max_sequence_length": 77, **others})
    return test_diffusers.arguments(pipe, prompt=prompt, steps=2, **others)


def write(family, path, pipe):
    """A LoRA that changes text encoders, too."""
    if family == "flux-dev":
        return tiny_transformers.write_lora(path, pipe, "rest", 1)
    return tiny_pipelines.write_lora(path, pipe, "everything", 1)


@pytest.mark.parametrize("family", COMPEL)
class TestWeights:
    def test_a_prompt_without_weights_is_the_pipelines_own(self, family):
        pipe = make(family)
        expected = pipe(**arguments(family, pipe, PLAIN)).images
        before = state(pipe)
        with weighted_prompts(pipe):
            actual = pipe(**arguments(family, pipe, PLAIN)).images
        assert relative_error(actual, expected.double()) < 1e-5
        assert_untouched(pipe, before)

    def test_under_a_lora_texts_are_the_loras(self, family, tmp_path):
        """Against the pipeline with the LoRA loaded by diffusers, and texts by compel alone."""
        pipe = make(family)
        file = write(family, tmp_path / "one.safetensors", pipe)
        call = arguments(family, pipe, WEIGHTED)
        with weighted_prompts(pipe), composed(pipe, [load_lora(pipe, file)], method="composite"):
            actual = pipe(**call).images
        with composed(pipe, [load_lora(pipe, file)], method="composite"):
            unweighted = pipe(**arguments(family, pipe, PLAIN)).images
        pipe.load_lora_weights(str(tmp_path), weight_name=file.name)
        texts = COMPEL[family](pipe)(WEIGHTED, negative_prompt=call["negative_prompt"])
        given = {
            "prompt_embeds": texts.embeds,
            "negative_prompt_embeds": texts.negative_embeds,
            "pooled_prompt_embeds": texts.pooled_embeds,
            "negative_pooled_prompt_embeds": texts.negative_pooled_embeds,
        }
        given = {name: value for name, value in given.items() if value is not None}
        expected = pipe(**{**call, "prompt": None, "negative_prompt": None, **given}).images.double()
        assert relative_error(actual, expected) < 1e-4
        assert relative_error(unweighted, expected) > 1e-3


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_the_end_of_a_long_prompt_counts(family):
    pipe = make(family)
    long = "letter by letter this is far beyond the seventy five tokens that one encoder reads at once: "
    with weighted_prompts(pipe):
        images = [pipe(**arguments(family, pipe, [f"{long}{end}"] * 2)).images for end in ("cat", "dog")]
    assert relative_error(*images) > 1e-4
    assert torch.equal(*(pipe(**arguments(family, pipe, [f"{long}{end}"] * 2)).images for end in ("cat", "dog")))


def test_images_per_prompt():
    pipe = make("sd1")
    call = arguments("sd1", pipe, WEIGHTED[:1], negative=["dark"], num_images_per_prompt=2)
    call["latents"] = test_diffusers.noise(2)
    with weighted_prompts(pipe):
        both = pipe(**call).images
        first = pipe(**{**call, "num_images_per_prompt": 1, "latents": call["latents"][:1]}).images
    assert relative_error(both[:1], first.double()) < 1e-5


class TestRefused:
    def test_entered_inside_a_composition(self, tmp_path):
        """There the composition would be given encoded texts, which no LoRA changes any more."""
        pipe = make("sd1")
        lora = load_lora(pipe, write("sd1", tmp_path / "one.safetensors", pipe))
        with pytest.raises(UnsupportedError, match="prompt itself"), composed(pipe, [lora]), weighted_prompts(pipe):
            pipe(**arguments("sd1", pipe, WEIGHTED))

    def test_a_pipeline_that_compel_does_not_know(self):
        pipe = tiny_transformers.make_pipeline("chroma")
        with pytest.raises(UnsupportedError, match="not in ChromaPipeline"), weighted_prompts(pipe):
            pass

    @pytest.mark.parametrize("more", [{"prompt_2": ["other"] * 2}, {"clip_skip": 1}], ids=str)
    def test_what_would_be_lost(self, more):
        pipe = make("sdxl")
        with pytest.raises(UnsupportedError, match=next(iter(more))), weighted_prompts(pipe):
            pipe(**arguments("sdxl", pipe, WEIGHTED, **more))

    def test_another_length_than_compel_has(self):
        pipe = make("flux-dev")
        with pytest.raises(UnsupportedError, match="max_sequence_length must be 77, is 16"), weighted_prompts(pipe):
            pipe(**arguments("flux-dev", pipe, WEIGHTED, max_sequence_length=16))
