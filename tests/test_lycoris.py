"""Networks of every kind in diffusers pipelines, against weights changed by each kind's formula, written out in float64
as AUTOMATIC1111's Lora extension has it."""

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("lycoris")

import peft
from safetensors.torch import load_file, save_file
from torch import nn

from loratorio_ext.errors import UnsupportedError
from loratorio_ext.hosts.diffusers import composed, load_lora
from loratorio_ext.hosts.diffusers_loras import names_of_layers
from loratorio_ext.isolation import LowRank
from tests import tiny_transformers
from tests.live.lora_files import KINDS, Layer, Recipe, lora_weights
from tests.test_diffusers import arguments, relative_error
from tests.tiny_pipelines import assert_untouched, make_pipeline, state, text_name

pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("DeprecationWarning", "UserWarning")]

REFUSED = {"lora_scale", "lora_bias", "oft_diag"}
NAMED_OTHERWISE = {"oft_constrained"}  # by the checkpoint's names
PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te"}


@pytest.fixture(scope="module")
def pipe():
    return make_pipeline("sd1")


def changeable(pipe):
    """(component, name, layer) of all layers that files of some kind change."""
    for component in PREFIXES:
        for name, layer in getattr(pipe, component).named_modules():
            inside = component == "unet" or "layers." in name
            if inside and isinstance(layer, (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm)):
                yield component, name, layer


def layers_of_files(pipe):
    """The same as files know them."""
    return [
        Layer(
            f"{PREFIXES[component]}_{text_name(pipe, component, name)}".replace(".", "_"),
            name,
            layer.weight,
            layer.bias,
        )
        for component, name, layer in changeable(pipe)
    ]


def write(path, pipe, kind, strength=0.3):
    recipe = Recipe(kind, kind, 5, strength, rank=2)
    layers = layers_of_files(pipe)
    if kind in NAMED_OTHERWISE:
        layers = [layer for layer in layers if layer.part == "text"]
    state = lora_weights(layers, recipe)
    save_file(state, path, metadata={"format": "pt"})
    return path


def tucker(core, a, b):
    return np.einsum("rskl,ro,si->oikl", core, a, b)


def cayley(blocks, bound):
    q = blocks - np.swapaxes(blocks, -1, -2)
    size = np.linalg.norm(q)
    if bound and size > bound:
        q = q * bound / size
    eye = np.eye(q.shape[-1])
    return (eye + q) @ np.linalg.inv(eye - q)


def butterfly(rounds, rows):
    """Round i turns blocks of outputs that lie 2^i half blocks apart."""
    for i, blocks in enumerate(rounds):
        number, size, _ = blocks.shape
        distance = 2**i * size // 2
        order = np.arange(len(rows)).reshape(-1, 2, distance).transpose(0, 2, 1).ravel()
        turned = np.concatenate([blocks[j] @ rows[order][j * size : (j + 1) * size] for j in range(number)])
        rows = np.empty_like(turned)
        rows[order] = turned
    return rows


def change(parts, weight):
    """Of a layer's ``weight``, by the parts of its network."""
    get = parts.get
    alpha, out = float(parts["alpha"]) if "alpha" in parts else None, len(weight)
    rows = weight.reshape(out, -1)

    def scale(rank):
        return 1 if alpha is None else alpha / rank

    if "lora_A.weight" in parts:
        return parts["lora_B.weight"].reshape(out, -1) @ parts["lora_A.weight"].reshape(len(parts["lora_A.weight"]), -1)
    if "lora_down.weight" in parts:
        down, up = parts["lora_down.weight"], parts["lora_up.weight"].reshape(out, -1)
        rank = len(down)
        delta = up @ down.reshape(rank, -1)
        if "lora_mid.weight" in parts:
            delta = np.einsum("or,rskl,si->oikl", up, parts["lora_mid.weight"], down.reshape(rank, -1))
        delta = scale(rank) * delta.reshape(weight.shape)
        if "dora_scale" in parts:
            whole = weight + delta
            axes = tuple(axis for axis in range(weight.ndim) if axis != 1)
            delta = whole * parts["dora_scale"] / np.sqrt((whole**2).sum(axis=axes, keepdims=True)) - weight
        return delta
    if "hada_w1_a" in parts:
        halves = [[parts[f"hada_w{i}_a"], parts[f"hada_w{i}_b"], get(f"hada_t{i}")] for i in (1, 2)]
        one, two = (a @ b if core is None else tucker(core, a, b) for a, b, core in halves)
        return scale(len(parts["hada_w1_b"])) * one * two
    if "lokr_w1" in parts or "lokr_w1_a" in parts:
        one = parts["lokr_w1"] if "lokr_w1" in parts else parts["lokr_w1_a"] @ parts["lokr_w1_b"]
        if "lokr_t2" in parts:
            two = tucker(parts["lokr_t2"], parts["lokr_w2_a"], parts["lokr_w2_b"])
        else:
            two = parts["lokr_w2"] if "lokr_w2" in parts else parts["lokr_w2_a"] @ parts["lokr_w2_b"]
        ranks = [len(parts[key]) for key in ("lokr_w1_b", "lokr_w2_b") if key in parts]
        return (scale(ranks[-1]) if ranks else 1) * np.kron(one, two.reshape(len(two), -1))
    if "on_input" in parts:
        return weight * (parts["weight"] if parts["on_input"] else parts["weight"].reshape(-1, 1))
    if "a1.weight" in parts:
        a1, a2, b1, b2 = (parts[f"{name}.weight"] for name in ("a1", "a2", "b1", "b2"))
        return weight @ a2 @ a1 + b2 @ b1
    if "oft_blocks" in parts:
        turns = cayley(parts["oft_blocks"], (alpha or 0) * out)
        if turns.ndim == 3:
            size = turns.shape[1]
            turned = np.concatenate([turn.T @ rows[i * size : (i + 1) * size] for i, turn in enumerate(turns)])
        else:
            turned = butterfly(turns, rows)
        return turned * get("rescale", np.ones(out)).reshape(-1, 1) - rows
    return parts["w_norm" if "w_norm" in parts else "diff"]


def merged(file, te, unet):
    """A pipeline in whose weights the file's changes are."""
    pipe = make_pipeline("sd1")
    parts = {}
    for key, value in load_file(file).items():
        layer, _, part = key.partition(".")
        parts.setdefault(layer, {})[part] = value
    for (_, _, layer), known in zip(changeable(pipe), layers_of_files(pipe)):
        mine = {part: value.double().numpy() for part, value in parts.pop(known.name, {}).items()}
        if mine:
            strength = te if known.part == "text" else unet
            delta = change(mine, layer.weight.double().numpy()).reshape(layer.weight.shape)
            layer.weight.data += strength * torch.from_numpy(np.asarray(delta))
            bias = mine.get("diff_b", mine.get("b_norm"))
            if bias is not None:
                layer.bias.data += strength * torch.from_numpy(bias)
    assert not parts
    return pipe


@pytest.mark.parametrize("kind", sorted(set(KINDS) - REFUSED))
def test_one_alone_is_the_model_with_its_changes(pipe, tmp_path, kind):
    file = write(tmp_path / f"{kind}.safetensors", pipe, kind)
    call = {"steps": 2}
    plain = pipe(**arguments(pipe, **call)).images
    before = state(pipe)
    with composed(pipe, [load_lora(pipe, file, 0.5, 0.8)], method="composite"):
        actual = pipe(**arguments(pipe, **call)).images
    assert_untouched(pipe, before)
    assert torch.equal(pipe(**arguments(pipe, **call)).images, plain)
    expected = merged(file, 0.5, 0.8)(**arguments(pipe, **call)).images.double()
    assert relative_error(plain, expected) > 0.005
    assert relative_error(actual, expected) < 1e-4


@pytest.mark.parametrize("kind", sorted(REFUSED))
def test_what_is_refused_is_named(pipe, tmp_path, kind):
    file = write(tmp_path / f"{kind}.safetensors", pipe, kind)
    part = {"lora_scale": "scale", "lora_bias": "bias", "oft_diag": "oft_diag"}[kind]
    with pytest.raises(UnsupportedError, match=rf"{kind} .*\.{part}"):
        load_lora(pipe, file)


def test_several_kinds_in_one_file(pipe, tmp_path):
    """Layers of a low-rank product stay one."""
    layers = layers_of_files(pipe)
    state = lora_weights(layers[::2], Recipe("a", "locon", 1, 0.3)) | lora_weights(
        layers[1::2], Recipe("b", "loha", 2, 0.3)
    )
    save_file(state, tmp_path / "both.safetensors")
    lora = load_lora(pipe, tmp_path / "both.safetensors", 1.0)
    kinds = {isinstance(branch, LowRank) for branch in lora.branches.values()}
    assert kinds == {True, False}
    with composed(pipe, [lora], method="composite"):
        actual = pipe(**arguments(pipe, steps=2)).images
    expected = merged(tmp_path / "both.safetensors", 1.0, 1.0)(**arguments(pipe, steps=2)).images
    assert relative_error(actual, expected.double()) < 1e-4


def test_names_of_layers_in_other_words():
    names = names_of_layers(
        pipe := make_pipeline("sdxl"),
        [
            "lora_unet_input_blocks_1_0_in_layers_2",
            "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q",
            "lora_unet_middle_block_1_proj_in",
            "lora_te2_text_model_encoder_layers_1_mlp_fc1",
            "unet.mid_block.resnets.0.conv1",
            "lycoris_mid_block_resnets_0_conv1",
        ],
    )
    assert names["lora_unet_input_blocks_1_0_in_layers_2"] == "unet.down_blocks.0.resnets.0.conv1"
    query = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    assert names["lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q"] == query
    assert names["lora_unet_middle_block_1_proj_in"] == "unet.mid_block.attentions.0.proj_in"
    assert names["lora_te2_text_model_encoder_layers_1_mlp_fc1"].endswith("encoder.layers.1.mlp.fc1")
    assert names["unet.mid_block.resnets.0.conv1"] == names["lycoris_mid_block_resnets_0_conv1"]
    with pytest.raises(KeyError, match="lora_unet_nowhere, which is no layer of this StableDiffusionXLPipeline"):
        names_of_layers(pipe, ["lora_unet_nowhere"])


def test_a_transformer(tmp_path):
    """By LyCORIS' own names."""
    pipe, twin = (tiny_transformers.make_pipeline("flux-dev") for _ in range(2))
    linear = [(name, layer) for name, layer in twin.transformer.named_modules() if isinstance(layer, nn.Linear)]
    layers = [Layer(f"lycoris_{name}".replace(".", "_"), name, layer.weight, layer.bias) for name, layer in linear]
    state = lora_weights(layers, Recipe("a", "lokr_factored", 1, 0.3, rank=2))
    save_file(state, tmp_path / "lokr.safetensors")
    for known, (_, layer) in zip(layers, linear):
        mine = {key.partition(".")[2]: value for key, value in state.items() if key.startswith(f"{known.name}.")}
        mine = {part: value.double().numpy() for part, value in mine.items()}
        layer.weight.data += torch.from_numpy(change(mine, layer.weight.double().numpy()).reshape(layer.weight.shape))
    call = tiny_transformers.arguments("flux-dev")
    with composed(pipe, [load_lora(pipe, tmp_path / "lokr.safetensors")], method="composite"):
        actual = pipe(**call).images
    expected = twin(**call).images.double()
    assert relative_error(actual, expected) < 1e-4 < relative_error(pipe(**call).images, expected)


@pytest.mark.parametrize(
    "key, why",
    [
        ("base_model.model.mid_block.resnets.0.conv1.hada_w1_a", "PEFT's own layout"),
        ("lora_unet_mid_block_resnets_0_conv1.hada_w1_a", "has hada_w1_a, but no hada_w1_b"),
        ("lora_unet_nowhere.hada_w1_a", "lora_unet_nowhere, which is no layer of this StableDiffusionPipeline"),
        ("lora_unet_mid_block_resnets_0_conv1.diff", r"diff do not fit a layer \(32, 32, 3, 3\)"),
    ],
)
def test_what_is_wrong_is_named(pipe, tmp_path, key, why):
    save_file({key: torch.ones(2, 2)}, tmp_path / "wrong.safetensors")
    with pytest.raises(UnsupportedError, match=f"wrong .*{why}"):
        load_lora(pipe, tmp_path / "wrong.safetensors")


def test_weights_that_cannot_be_looked_at(pipe, tmp_path):
    file = write(tmp_path / "loha.safetensors", pipe, "loha")
    small = make_pipeline("sd1")
    small.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    with pytest.raises(UnsupportedError, match="loha .* quantised or offloaded"):
        load_lora(small, file)


def test_in_another_pipeline_than_it_was_loaded_for(pipe, tmp_path):
    lora = load_lora(pipe, write(tmp_path / "loha.safetensors", pipe, "loha"))
    with pytest.raises(UnsupportedError, match="another architecture"), composed(make_pipeline("sd2v"), [lora]):
        pass


def test_dora_of_peft(pipe, tmp_path):
    """Against the adapter that PEFT itself makes of it."""
    targets = ["attn1.to_q", "attn2.to_v", "ff.net.2"]
    unet = make_pipeline("sd1").unet
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=targets, use_dora=True)
    peft.inject_adapter_in_model(config, unet)
    state = peft.get_peft_model_state_dict(unet)
    generator = torch.Generator().manual_seed(3)
    state = {
        name: value * (1 + 0.2 * torch.rand(value.shape, generator=generator))
        if "magnitude" in name
        else 0.3 * torch.randn(value.shape, generator=generator)
        for name, value in state.items()
    }
    peft.set_peft_model_state_dict(unet, state)
    save_file({f"unet.{name}": value for name, value in state.items()}, tmp_path / "dora.safetensors")
    with composed(pipe, [load_lora(pipe, tmp_path / "dora.safetensors")], method="composite"):
        actual = pipe(**arguments(pipe, steps=2)).images
    other = make_pipeline("sd1")
    other.unet = unet
    expected = other(**arguments(other, steps=2)).images
    assert relative_error(actual, expected.double()) < 1e-4
    assert relative_error(pipe(**arguments(pipe, steps=2)).images, expected.double()) > 0.005
