"""Rows of a LoRA in a shared batch against a copy of the model that holds this LoRA alone, merged into its weights."""

import copy
import subprocess
import sys
from itertools import combinations, permutations
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from loratorio_ext.isolation import (
    CudaMemory,
    Delta,
    IsolatedCalls,
    Isolation,
    LowRank,
    in_main_memory,
    is_finite,
    is_inert,
)
from tests.gauge import Gauge

CHANNELS, WIDTH, TOKENS = 8, 12, 5


class TinyUNet(nn.Module):
    """Every kind of layer and call that a diffusion UNet has, in a few channels."""

    def __init__(self):
        super().__init__()
        self.time = nn.Linear(6, CHANNELS)  # called with [rows, features]
        self.conv_in = nn.Conv2d(4, CHANNELS, 3, padding=1)
        self.norm = nn.GroupNorm(2, CHANNELS)
        self.down = nn.Conv2d(CHANNELS, WIDTH, 3, stride=2, padding=1)
        self.tiled = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, padding_mode="circular")
        self.proj = nn.Conv2d(WIDTH, WIDTH, 1, bias=False)
        self.layer_norm = nn.LayerNorm(WIDTH)
        self.attention = nn.Linear(WIDTH, WIDTH, bias=False)  # called with [rows, pixels, features]
        self.context = nn.Linear(7, WIDTH)  # called with [rows, tokens, features]
        self.grid = nn.Linear(WIDTH, WIDTH)  # called with [rows, height, width, features], not contiguous
        self.untouched = nn.Linear(WIDTH, WIDTH)
        self.out = nn.Conv2d(WIDTH, 4, (1, 3), padding=(0, 1))

    def forward(self, x, t, context):
        h = self.conv_in(x) + self.time(t)[:, :, None, None]
        h = self.down(torch.nn.functional.silu(self.norm(h)))
        h = h + self.tiled(h)
        h = self.proj(h)
        tokens = self.layer_norm(h.flatten(2).transpose(1, 2))
        keys = self.context(context)
        tokens = tokens + torch.softmax(self.attention(tokens) @ keys.transpose(1, 2), dim=-1) @ keys
        h = h + tokens.transpose(1, 2).reshape(h.shape)
        h = self.grid(h.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        h = h + self.untouched(h.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.out(h)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def layers_of(model):
    return {name: layer for name, layer in model.named_modules() if hasattr(layer, "weight")}


def make_model(dtype=torch.float64):
    torch.manual_seed(0)
    return TinyUNet().to(dtype).eval().requires_grad_(False)


def make_inputs(rows, dtype=torch.float64, seed=1, size=(6, 10)):
    g = generator(seed)
    shapes = [(rows, 4, *size), (rows, 6), (rows, TOKENS, 7)]
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]


# -- branches and the weight difference they stand for ----------------------------------------------------------------


def low_rank(layer, rank, scale, g, shape="own", mid=False):
    """A `LowRank` for a layer. ``shape``: "own", or the matrices shaped as for a "linear" or a "conv" layer."""

    def rand(*size):
        return torch.randn(size, generator=g, dtype=torch.float64) * 0.3

    if isinstance(layer, nn.Linear):
        down, up = rand(rank, layer.in_features), rand(layer.out_features, rank)
        if shape == "conv":
            down, up = down[:, :, None, None], up[:, :, None, None]
        return LowRank(down, up, scale)
    kernel = layer.kernel_size
    up = rand(layer.out_channels, rank, 1, 1)
    if mid:
        down, middle = rand(rank + 1, layer.in_channels, 1, 1), rand(rank, rank + 1, *kernel)
        if shape == "linear":
            down, up = down.flatten(1), up.flatten(1)
        return LowRank(down, up, scale, middle)
    down = rand(rank, layer.in_channels, *kernel)
    if shape == "linear":
        up = up.flatten(1)
        down = down.flatten(1) if kernel == (1, 1) else down
    return LowRank(down, up, scale)


def delta(layer, g, weight=True, bias=True):
    def rand(like):
        return torch.randn(like.shape, generator=g, dtype=torch.float64) * 0.2

    has_bias = bias and layer.bias is not None
    return Delta(rand(layer.weight) if weight else None, rand(layer.bias) if has_bias else None)


def weight_difference(layer, branch):
    """The (dW, db) of a branch, formed literally."""
    if isinstance(branch, Delta):
        return branch.weight, branch.bias
    up, down = branch.up.flatten(1), branch.down
    if branch.mid is not None:
        full = torch.einsum("or,rskl,si->oikl", up, branch.mid, down.flatten(1))
    else:
        full = (up @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])
    return branch.scale * full.reshape(layer.weight.shape), None


def merged(model, branches):
    """A copy of the model with one LoRA's differences added to its weights."""
    alone = copy.deepcopy(model)
    for name, branch in branches.items():
        layer = alone.get_submodule(name)
        dw, db = weight_difference(layer, branch)
        if dw is not None:
            layer.weight += dw.to(layer.weight)
        if db is not None:
            layer.bias += db.to(layer.bias)
    return alone


def alone(model, lora, inputs):
    return merged(model, lora)(*inputs)


def make_loras(model, seed=2):
    """Four LoRAs: mixed ranks, different layers, every kind of branch, and one that touches nothing."""
    g = generator(seed)
    layer = layers_of(model)
    everywhere = {name: low_rank(layer[name], 4, 0.8, g) for name in layer if name not in ("norm", "layer_norm")}
    del everywhere["untouched"]
    odd_shapes = {
        "time": low_rank(layer["time"], 1, -0.5, g, "conv"),
        "attention": low_rank(layer["attention"], 7, 1.3, g, "conv"),
        "grid": low_rank(layer["grid"], 2, 1.0, g),
        "proj": low_rank(layer["proj"], 3, 0.6, g, "linear"),
        "down": low_rank(layer["down"], 2, 0.7, g, "linear", mid=True),
        "tiled": low_rank(layer["tiled"], 5, 0.7, g, mid=True),
        "out": low_rank(layer["out"], 2, 0.9, g, "linear"),
    }
    whole = {
        "time": delta(layer["time"], g),
        "conv_in": delta(layer["conv_in"], g, bias=False),
        "norm": delta(layer["norm"], g),
        "down": delta(layer["down"], g),
        "tiled": delta(layer["tiled"], g, weight=False),
        "proj": delta(layer["proj"], g),
        "layer_norm": delta(layer["layer_norm"], g),
        "attention": delta(layer["attention"], g),
        "context": delta(layer["context"], g, weight=False),
        "grid": low_rank(layer["grid"], 6, 0.4, g),
    }
    few = {
        "norm": delta(layer["norm"], g, weight=False),
        "layer_norm": delta(layer["layer_norm"], g, bias=False),
        "context": low_rank(layer["context"], 3, 2.0, g),
    }
    return [everywhere, odd_shapes, whole, few, {}]


def run_group(isolation, model, group, inputs):
    """Every row of ``inputs`` under each LoRA of the group: [len(group), rows, ...]."""
    with isolation.rows(group):
        out = model(*[value.repeat(len(group), *[1] * (value.ndim - 1)) for value in inputs])
    return out.view(len(group), -1, *out.shape[1:])


def hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def assert_same(actual, expected, tolerance):
    assert actual.shape == expected.shape
    worst = (actual - expected).abs().max().item()
    assert worst <= tolerance * expected.abs().max().item(), f"off by {worst}"


TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
GROUPS = [group for size in range(1, 6) for group in combinations(range(5), size)]
SPLITS = [
    [[0, 1, 2, 3, 4]],
    [[0], [1], [2], [3], [4]],
    [[0, 1], [2, 3], [4]],
    [[0, 1, 2], [3, 4]],
    [[4, 3, 2, 1, 0]],
    [[2], [0, 4, 1, 3]],
]


class TestRowsAreAlone:
    @DTYPES
    @pytest.mark.parametrize("group", GROUPS, ids=str)
    def test_every_group(self, group, dtype):
        model = make_model(dtype)
        loras = make_loras(model)
        inputs = make_inputs(2, dtype)
        actual = run_group(Isolation(layers_of(model), loras), model, group, inputs)
        for segment, index in enumerate(group):
            assert_same(actual[segment], alone(model, loras[index], inputs), TOLERANCE[dtype])

    def test_the_loras_of_these_tests_differ(self):
        model = make_model()
        inputs = make_inputs(1)
        outputs = [alone(model, lora, inputs) for lora in make_loras(model)]
        assert torch.equal(outputs[-1], model(*inputs))
        for one, other in combinations(outputs, 2):
            assert (one - other).abs().max() > 0.01

    @pytest.mark.parametrize("split", SPLITS, ids=str)
    @pytest.mark.parametrize("rows", [1, 3])
    def test_every_split_of_the_loras_gives_the_same(self, split, rows):
        model = make_model()
        loras = make_loras(model)
        isolation = Isolation(layers_of(model), loras)
        inputs = make_inputs(rows)
        for group in split:
            actual = run_group(isolation, model, group, inputs)
            for segment, index in enumerate(group):
                assert_same(actual[segment], alone(model, loras[index], inputs), TOLERANCE[torch.float64])

    @pytest.mark.parametrize("order", list(permutations(range(3))), ids=str)
    def test_rows_follow_the_groups_order(self, order):
        model = make_model()
        loras = make_loras(model)
        inputs = make_inputs(1)
        actual = run_group(Isolation(layers_of(model), loras), model, order, inputs)
        for segment, index in enumerate(order):
            assert_same(actual[segment], alone(model, loras[index], inputs), TOLERANCE[torch.float64])

    def test_each_row_has_its_own_input(self):
        model = make_model()
        loras = make_loras(model)
        inputs = make_inputs(6)  # LoRA 2: rows 0-2, LoRA 0: rows 3-5
        with Isolation(layers_of(model), loras).rows([2, 0]):
            actual = model(*inputs)
        for index, rows in ((2, slice(0, 3)), (0, slice(3, 6))):
            expected = alone(model, loras[index], [value[rows] for value in inputs])
            assert_same(actual[rows], expected, TOLERANCE[torch.float64])

    def test_one_lora_twice_in_a_group(self):
        model = make_model()
        loras = make_loras(model)
        inputs = make_inputs(2)
        actual = run_group(Isolation(layers_of(model), loras), model, [1, 1, 0], inputs)
        assert_same(actual[0], alone(model, loras[1], inputs), 1e-12)
        assert_same(actual[1], actual[0], 1e-12)

    @settings(max_examples=30)
    @given(st.data())
    def test_any_mixture(self, data):
        model = make_model()
        layers = layers_of(model)
        g = generator(data.draw(st.integers(0, 10_000)))
        loras = []
        for _ in range(data.draw(st.integers(1, 4))):
            lora = {}
            for name in data.draw(st.sets(st.sampled_from(sorted(layers)))):
                layer = layers[name]
                if isinstance(layer, (nn.GroupNorm, nn.LayerNorm)) or data.draw(st.booleans()):
                    kind = data.draw(st.sampled_from(["both", "weight", "bias"]))
                    if kind == "bias" and layer.bias is None:
                        kind = "weight"
                    lora[name] = delta(layer, g, weight=kind != "bias", bias=kind != "weight")
                else:
                    shape = data.draw(st.sampled_from(["own", "linear", "conv"]))
                    rank = data.draw(st.integers(1, 9))
                    lora[name] = low_rank(layer, rank, data.draw(st.floats(-2, 2)), g, shape, data.draw(st.booleans()))
            loras.append(lora)
        inputs = make_inputs(data.draw(st.integers(1, 3)), size=data.draw(st.sampled_from([(4, 4), (5, 3), (1, 7)])))
        actual = run_group(Isolation(layers, loras), model, range(len(loras)), inputs)
        for segment, lora in enumerate(loras):
            assert_same(actual[segment], alone(model, lora, inputs), 1e-10)

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_without_gradients_and_with_parameters_that_want_them(self, mode):
        model = make_model().requires_grad_(True)
        loras = make_loras(model)
        inputs = make_inputs(2)
        with torch.no_grad():
            expected = alone(model, loras[0], inputs)
        with mode():
            actual = run_group(Isolation(layers_of(model), loras), model, [0, 2], inputs)
        assert_same(actual[0], expected, 1e-12)

    def test_loras_kept_in_half_precision(self):
        model = make_model(torch.float32)
        loras = make_loras(model)
        halves = [
            {
                name: LowRank(b.down.half(), b.up.half(), b.scale, None if b.mid is None else b.mid.half())
                for name, b in lora.items()
            }
            for lora in loras[:2]
        ]
        # The same numbers in double, so that only the arithmetic is compared.
        exact = [
            {
                name: LowRank(b.down.double(), b.up.double(), b.scale, None if b.mid is None else b.mid.double())
                for name, b in lora.items()
            }
            for lora in halves
        ]
        inputs = make_inputs(2, torch.float32)
        actual = run_group(Isolation(layers_of(model), halves), model, [0, 1], inputs)
        for segment in (0, 1):
            assert_same(actual[segment], alone(model, exact[segment], inputs), TOLERANCE[torch.float32])

    def test_half_precision_model(self):
        model = make_model(torch.bfloat16)
        exact = make_model(torch.bfloat16).double()
        loras = make_loras(model)
        inputs = make_inputs(2, torch.bfloat16)
        actual = run_group(Isolation(layers_of(model), loras), model, [0, 1, 2], inputs)
        assert actual.dtype == torch.bfloat16
        for segment, lora in enumerate(loras[:3]):
            expected = alone(exact, lora, [value.double() for value in inputs])
            assert_same(actual[segment].double(), expected, 0.1)

    def test_autocast(self):
        """A host in autocast: weights in float32, activations in half precision at some layers and not at others."""
        model = make_model(torch.float32)
        loras = make_loras(model)
        inputs = make_inputs(2, torch.float32)
        group = list(range(len(loras)))
        with torch.autocast("cpu", torch.bfloat16):
            together = run_group(Isolation(layers_of(model), loras), model, group, inputs)
            for rows, lora in zip(together.float(), loras):
                assert_same(rows, alone(model, lora, inputs).float(), 0.05)

    def test_weights_in_another_dtype_than_the_activations(self):
        # As with weights stored in 8 bits: the layer casts for itself, and only its output tells what it computes in.
        class Casting(nn.Linear):
            def forward(self, x):
                return nn.functional.linear(x.double(), self.weight.double(), self.bias.double())

        layer = Casting(6, 5).to(torch.float8_e4m3fn)
        g = generator(0)
        lora = {"layer": low_rank(layer, 3, 1.0, g)}
        x = torch.randn(4, 6, generator=g)
        with torch.no_grad(), Isolation({"layer": layer}, [lora]).rows([0]):
            actual = layer(x)
        dw, _ = weight_difference(layer, lora["layer"])
        expected = nn.functional.linear(x.double(), layer.weight.double() + dw, layer.bias.double())
        assert_same(actual, expected.detach(), 1e-12)

    def test_a_tiling_host_that_changes_padding_later(self):
        model = make_model()
        loras = make_loras(model)
        isolation = Isolation(layers_of(model), loras)
        inputs = make_inputs(1)
        run_group(isolation, model, [0, 1], inputs)
        for layer in (model.conv_in, model.down):
            layer.padding_mode = "circular"
        actual = run_group(isolation, model, [0, 1], inputs)
        for segment in (0, 1):
            assert_same(actual[segment], alone(model, loras[segment], inputs), 1e-12)

    def test_other_batch_sizes_and_latent_sizes_with_the_same_stacks(self):
        model = make_model()
        loras = make_loras(model)
        isolation = Isolation(layers_of(model), loras)
        for rows, size in ((1, (6, 10)), (3, (5, 3)), (2, (8, 8))):
            inputs = make_inputs(rows, size=size)
            actual = run_group(isolation, model, [0, 2], inputs)
            assert_same(actual[1], alone(model, loras[2], inputs), 1e-12)


class TestEdges:
    def test_low_rank_linear_with_a_middle(self):
        layer = nn.Linear(6, 5).double()
        g = generator(0)
        branch = LowRank(
            torch.randn(4, 6, 1, 1, generator=g).double(),
            torch.randn(5, 3, 1, 1, generator=g).double(),
            0.5,
            torch.randn(3, 4, 1, 1, generator=g).double(),
        )
        x = torch.randn(2, 6, generator=g).double()
        with torch.no_grad(), Isolation({"layer": layer}, [{"layer": branch}]).rows([0]):
            actual = layer(x)
        dw, _ = weight_difference(layer, branch)
        assert_same(actual, nn.functional.linear(x, layer.weight + dw, layer.bias).detach(), 1e-12)

    def test_linear_shaped_weights_of_a_3x3_convolution(self):
        layer = nn.Conv2d(4, 5, 3, padding=1).double()
        g = generator(0)
        own = low_rank(layer, 2, 0.5, g)
        flat = LowRank(own.down.flatten(1), own.up.flatten(1), own.scale)
        x = torch.randn(2, 4, 6, 6, generator=g).double()
        with torch.no_grad():
            with Isolation({"layer": layer}, [{"layer": flat}]).rows([0]):
                actual = layer(x)
            assert_same(actual, alone_layer(layer, own)(x), 1e-12)

    def test_ranks_that_do_not_match_are_no_branch(self):
        layer = nn.Linear(6, 5)
        small, broken = (
            LowRank(torch.ones(8, 6), torch.ones(5, 8), 1.0),
            LowRank(torch.ones(2, 6), torch.ones(5, 4), 1.0),
        )
        isolation = Isolation({"layer": layer}, [{"layer": small}, {"layer": broken}])
        with pytest.raises((RuntimeError, ValueError)), isolation.rows([0, 1]):
            layer(torch.ones(2, 6))

    def test_unknown_layer(self):
        with pytest.raises(KeyError, match="nowhere"):
            Isolation({}, [{"nowhere": Delta(torch.ones(1))}])


def alone_layer(layer, branch):
    changed = copy.deepcopy(layer)
    with torch.no_grad():
        changed.weight += weight_difference(layer, branch)[0]
    return changed


class TestNothingStays:
    def snapshot(self, model):
        return {name: value.clone() for name, value in model.state_dict().items()}

    def assert_untouched(self, model, before, inputs, expected):
        assert hooks(model) == 0
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert torch.equal(model(*inputs), expected)

    def test_after_leaving(self):
        model = make_model()
        before, inputs = self.snapshot(model), make_inputs(2)
        expected = model(*inputs)
        isolation = Isolation(layers_of(model), make_loras(model))
        assert hooks(model) == 0, "making it hooks nothing"
        run_group(isolation, model, [0, 1, 2], inputs)
        self.assert_untouched(model, before, inputs, expected)

    @pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt(), GeneratorExit()], ids=repr)
    def test_after_an_exception_in_the_model(self, error):
        model = make_model()
        before, inputs = self.snapshot(model), make_inputs(2)
        expected = model(*inputs)
        isolation = Isolation(layers_of(model), make_loras(model))

        def fail(*_):
            raise error

        handle = model.out.register_forward_pre_hook(fail)
        with pytest.raises(type(error)):
            run_group(isolation, model, [0, 1], inputs)
        handle.remove()
        self.assert_untouched(model, before, inputs, expected)
        again = run_group(isolation, model, [0, 1], inputs)
        assert_same(again[1], alone(model, make_loras(model)[1], inputs), 1e-12)

    def test_after_a_group_that_does_not_exist(self):
        model = make_model()
        isolation = Isolation(layers_of(model), make_loras(model))
        with pytest.raises(IndexError), isolation.rows([0, 99]):
            pass
        assert hooks(model) == 0

    def test_only_layers_that_the_group_touches_are_hooked(self):
        model = make_model()
        loras = make_loras(model)
        isolation = Isolation(layers_of(model), loras)
        for group in ([0], [3], [3, 4], [1, 2], [4], []):
            touched = {name for index in group for name in loras[index]}
            with isolation.rows(group):
                hooked = {name for name, layer in layers_of(model).items() if layer._forward_hooks}
            assert hooked == touched
        assert "untouched" not in set().union(*loras)

    def test_a_group_without_branches_is_the_bare_model(self):
        model = make_model()
        inputs = make_inputs(2)
        actual = run_group(Isolation(layers_of(model), make_loras(model)), model, [4, 4], inputs)
        assert torch.equal(actual.flatten(0, 1), model(*[value.repeat(2, *[1] * (value.ndim - 1)) for value in inputs]))

    def test_hooks_of_others_stay(self):
        model = make_model()
        calls = []
        model.proj.register_forward_hook(lambda *_: calls.append(1))
        run_group(Isolation(layers_of(model), make_loras(model)), model, [0], make_inputs(1))
        assert hooks(model) == 1 and calls == [1]

    def test_inputs_and_branches_are_left_alone(self):
        model = make_model()
        loras = make_loras(model)
        inputs = make_inputs(2)
        before = [value.clone() for value in inputs], copy.deepcopy(loras)
        run_group(Isolation(layers_of(model), loras), model, [0, 1, 2, 3], inputs)
        assert all(torch.equal(one, other) for one, other in zip(inputs, before[0]))
        for lora, old in zip(loras, before[1]):
            for name, branch in lora.items():
                for field, value in vars(branch).items():
                    same = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: a == b
                    assert same(value, getattr(old[name], field))

    @pytest.mark.parametrize("group, rows", [([0, 1], 3), ([0, 1, 2], 4), ([0, 1, 2], 2), ([0, 3], 1)])
    def test_rows_that_cannot_be_shared_equally(self, group, rows):
        model = make_model()
        isolation = Isolation(layers_of(model), make_loras(model))
        with pytest.raises(ValueError, match=f"{rows} rows .* {len(group)} LoRAs"), isolation.rows(group):
            model(*make_inputs(rows))
        assert hooks(model) == 0

    def test_forgotten_stacks_are_made_again(self):
        model = make_model()
        loras = make_loras(model)
        isolation = Isolation(layers_of(model), loras)
        inputs = make_inputs(1)
        first = run_group(isolation, model, [0, 1], inputs)
        isolation.forget()
        assert torch.equal(run_group(isolation, model, [0, 1], inputs), first)

    def test_stacks_do_not_pile_up_beyond_those_of_each_group(self):
        model = make_model()
        isolation = Isolation(layers_of(model), make_loras(model))
        run_group(isolation, model, [0, 1], make_inputs(1))
        made = len(isolation._stacks)
        for rows in (1, 2, 3):
            run_group(isolation, model, [0, 1], make_inputs(rows))
        assert len(isolation._stacks) == made


def test_branches_in_main_memory_are_the_same_branches():
    model = make_model()
    loras = make_loras(model)
    moved = [{name: in_main_memory(branch) for name, branch in lora.items()} for lora in loras]
    assert {type(branch) for lora in moved for branch in lora.values()} == {LowRank, Delta}
    inputs = make_inputs(1)
    expected = run_group(Isolation(layers_of(model), loras), model, [0, 1, 2], inputs)
    assert torch.equal(run_group(Isolation(layers_of(model), moved), model, [0, 1, 2], inputs), expected)


class TestBudget:
    """Stacked matrices within a budget of memory: as if there were none, but for what is kept."""

    @pytest.mark.parametrize("budget", [0, 1, 2000, 5000, 10**9])
    def test_whatever_the_budget_the_rows_are_the_same(self, budget):
        model = make_model()
        loras = make_loras(model)
        free, bound = Isolation(layers_of(model), loras), Isolation(layers_of(model), loras, budget)
        inputs = make_inputs(1)
        for group in ([0, 1], [2], [0, 1, 2], [0, 1], [2], [1, 0]):
            assert torch.equal(run_group(bound, model, group, inputs), run_group(free, model, group, inputs))
            assert bound._stacks.nbytes <= budget
        assert (len(bound._stacks) == 0) == (budget < 2)

    def test_the_least_recently_used_goes_first(self):
        model = make_model()
        loras = make_loras(model)
        inputs, sizes = make_inputs(1), []
        for group in ([0], [1]):
            alone = Isolation(layers_of(model), loras, 10**9)
            run_group(alone, model, group, inputs)
            sizes.append(alone._stacks.nbytes)
        isolation = Isolation(layers_of(model), loras, sum(sizes))

        def kept():
            return {group for _, group, *_ in isolation._stacks._kept}

        for group in ([0], [1], [0]):
            run_group(isolation, model, group, inputs)
        assert kept() == {(0,), (1,)}
        one = run_group(isolation, model, [2], inputs)
        assert (2,) in kept() and isolation._stacks.nbytes <= sum(sizes)
        of_the_older = [key for key in isolation._stacks._kept if key[1] == (1,)]
        of_the_newer = [key for key in isolation._stacks._kept if key[1] == (0,)]
        assert not of_the_older or of_the_newer
        assert torch.equal(run_group(isolation, model, [2], inputs), one)

    def test_forgetting_asks_for_the_budget_anew(self, monkeypatch):
        from loratorio_ext.isolation import rows

        budgets = iter([10**9, 0])
        monkeypatch.setattr(rows, "budget_for_matrices", lambda device: next(budgets))
        model = make_model()
        isolation = Isolation(layers_of(model), make_loras(model))
        run_group(isolation, model, [0, 1], make_inputs(1))
        assert len(isolation._stacks) > 0
        isolation.forget()
        run_group(isolation, model, [0, 1], make_inputs(1))
        assert len(isolation._stacks) == 0

    @pytest.mark.parametrize("budget, stays", [(24, True), (None, False)], ids=["bound", "free"])
    def test_a_pool_of_25_on_a_cpu(self, budget, stays):
        """Peak memory of a process in which 25 LoRAs are evaluated in batches of five, above that of the LoRAs
        themselves: it stays within the budget (in MB) and a batch's own tensors; without one it does not."""
        program = Path(__file__).with_name("pool_memory.py")
        argument = [] if budget is None else [str(budget)]
        done = subprocess.run([sys.executable, program, *argument], capture_output=True, text=True, check=True)
        grown = float(done.stdout)
        assert (grown < 24 + 30) == stays, f"{grown} MB"


class Memory:
    """A model call with room for ``room`` rows, that notes the calls made of it."""

    def __init__(self, model, inputs, room, words="CUDA out of memory. Tried to allocate"):
        self.model, self.inputs, self.room, self.words, self.calls = model, inputs, room, words, []

    def __call__(self, batch):
        self.calls.append(list(batch))
        assert len(self.calls) < 100, "tried again and again"
        if len(batch) > self.room:
            raise RuntimeError(self.words)
        here = [row for _, row in batch]
        return self.model(*[value[here] for value in self.inputs])

    @property
    def done(self):
        """The rows of the calls that went through, in order."""
        return [row for batch in self.calls if len(batch) <= self.room for row in batch]


def rows_of(loras, count):
    return [(lora, row) for lora in loras for row in range(count)]


class TestCalls:
    @pytest.mark.parametrize("rows", [1, 2, 5])
    @pytest.mark.parametrize("limit", [None, 1, 2, 3, 4, 7, 100])
    @pytest.mark.parametrize("room", [1, 2, 3, 6, 100])
    def test_whatever_fits_every_lora_has_its_rows(self, rows, limit, room):
        model = make_model()
        loras = [*make_loras(model), {}]
        inputs = make_inputs(rows)
        everything = rows_of([-1, 2, 0, 1], rows)
        memory = Memory(model, inputs, room)
        isolated = IsolatedCalls(Isolation(layers_of(model), loras), limit)
        actual = isolated(everything, memory)
        for segment, index in enumerate([-1, 2, 0, 1]):
            assert_same(actual[segment * rows : (segment + 1) * rows], alone(model, loras[index], inputs), 1e-12)
        assert hooks(model) == 0
        if limit is not None:
            assert all(len(batch) <= limit for batch in memory.calls)
        assert memory.done == everything, "nothing twice"

    @pytest.mark.parametrize("limit", [None, 1, 2, 3, 4, 5])
    def test_loras_may_have_fewer_rows_than_the_base_model(self, limit):
        model = make_model()
        loras = [*make_loras(model), {}]
        inputs = make_inputs(3)
        everything = [*rows_of([-1], 3), (0, 0), (0, 1), (3, 0), (3, 1), (2, 2)]
        actual = IsolatedCalls(Isolation(layers_of(model), loras), limit)(everything, Memory(model, inputs, 100))
        for predicted, (lora, row) in zip(actual, everything, strict=True):
            assert_same(predicted, alone(model, loras[lora], inputs)[row], 1e-12)

    def test_all_in_one_call_where_memory_allows(self):
        model = make_model()
        memory = Memory(model, make_inputs(2), 100)
        IsolatedCalls(Isolation(layers_of(model), make_loras(model)))(rows_of([0, 1, 2, 3], 2), memory)
        assert memory.calls == [rows_of([0, 1, 2, 3], 2)]

    @pytest.mark.parametrize(
        "rows, limit, sizes",
        [
            (rows_of(range(4), 2), 7, [4, 4]),
            (rows_of(range(5), 2), 8, [6, 4]),
            (rows_of(range(3), 5), 2, [2, 2, 1] * 3),
            ([*rows_of([-1], 2), (0, 0), (1, 0), (2, 0)], 4, [3, 2]),
        ],
    )
    def test_batches_are_few_and_even_and_do_not_part_a_lora_without_need(self, rows, limit, sizes):
        model = make_model()
        memory = Memory(model, make_inputs(5), 100)
        IsolatedCalls(Isolation(layers_of(model), [*make_loras(model), {}, {}]), limit)(rows, memory)
        assert [len(batch) for batch in memory.calls] == sizes

    def test_the_smaller_limit_stays(self):
        model = make_model()
        memory = Memory(model, make_inputs(2), 4)
        isolated = IsolatedCalls(Isolation(layers_of(model), make_loras(model)))
        isolated(rows_of([0, 1, 2, 3], 2), memory)
        assert isolated.limit == 4 and len(memory.calls) == 3
        isolated(rows_of([0, 1, 2, 3], 2), memory)
        assert len(memory.calls) == 5, "not tried at full size again"

    def test_not_even_one_row_fits(self):
        model = make_model()
        isolated = IsolatedCalls(Isolation(layers_of(model), make_loras(model)))
        with pytest.raises(RuntimeError, match="out of memory"):
            isolated(rows_of([0, 1], 1), Memory(model, make_inputs(1), 0))
        assert hooks(model) == 0

    def test_other_errors_are_not_tried_again(self):
        model = make_model()
        memory = Memory(model, make_inputs(1), 0, "mat1 and mat2 shapes cannot be multiplied")
        with pytest.raises(RuntimeError, match="mat1"):
            IsolatedCalls(Isolation(layers_of(model), make_loras(model)))(rows_of([0, 1], 1), memory)
        assert len(memory.calls) == 1 and hooks(model) == 0

    @pytest.mark.parametrize(
        "free, limit, sizes",
        [
            (10**6, None, [2, 8]),
            (450, None, [2, 4, 4]),
            (450, 3, [2, 2, 2, 2, 2]),
            (99, None, [2] + [1] * 8),
        ],
        ids=["plenty", "four rows", "a limit besides", "hardly any"],
    )
    def test_what_fits_is_known_before_it_is_tried(self, free, limit, sizes):
        """The first batch is the host's own pass; it is measured, once."""
        model = make_model()
        loras = [*make_loras(model), {}]
        inputs = make_inputs(2)
        gauge, memory = Gauge(free), Memory(model, inputs, 100)
        isolated = IsolatedCalls(Isolation(layers_of(model), loras), limit, gauge)
        everything = rows_of([-1, 0, 1, 2, 3], 2)
        first = isolated(everything, memory)
        assert [len(batch) for batch in memory.calls] == sizes and gauge.batches == [2]
        again = isolated(everything, memory)
        assert gauge.batches == [2] and memory.done == everything * 2
        for predicted in (first, again):
            for segment, index in enumerate([-1, 0, 1, 2, 3]):
                assert_same(predicted[2 * segment : 2 * segment + 2], alone(model, loras[index], inputs), 1e-12)

    def test_a_measured_batch_that_does_not_fit_is_halved_and_measured(self):
        model = make_model()
        gauge, memory = Gauge(300), Memory(model, make_inputs(4), 2)
        isolated = IsolatedCalls(Isolation(layers_of(model), [*make_loras(model), {}]), None, gauge)
        everything = rows_of([-1, 0], 4)
        isolated(everything, memory)
        assert [len(batch) for batch in memory.calls] == [4, 2, 2, 2, 2]
        assert gauge.batches == [2] and isolated.limit == 2 and memory.done == everything

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    def test_a_real_device_tells_what_a_call_takes(self):
        device = torch.device("cuda")
        memory = CudaMemory.of(device)
        x = torch.ones(2**20, device=device)

        def call():
            return ((x + 1) * (x + 2)).sum()  # two intermediates of 4 MiB at least

        _, spent = memory.measured(call)
        assert 2**23 <= spent <= 2**25
        free = memory.rows_that_fit(1)
        assert memory.rows_that_fit(2) <= free / 2 + 1 and memory.rows_that_fit(10**18) == 1


@pytest.mark.parametrize(
    ("branch", "inert"),
    [
        (LowRank(torch.ones(2, 3), torch.ones(4, 2), 1.0), False),
        (LowRank(torch.ones(2, 3), torch.ones(4, 2), 0.0), True),
        (LowRank(torch.zeros(2, 3), torch.ones(4, 2), 1.0), True),
        (LowRank(torch.ones(2, 3), torch.zeros(4, 2), 1.0), True),
        (LowRank(torch.ones(2, 3), torch.ones(4, 2), 1.0, torch.zeros(2, 2, 1, 1)), True),
        (LowRank(torch.eye(2).to(torch.float8_e4m3fn), torch.ones(4, 2).to(torch.float8_e4m3fn), 1.0), False),
        (Delta(torch.zeros(3, 3)), True),
        (Delta(torch.zeros(3, 3), torch.tensor([0.0, 1.0, 0.0])), False),
        (Delta(None, torch.zeros(3)), True),
        (Delta(torch.full((3, 3), torch.nan)), False),
    ],
)
def test_a_branch_is_inert_where_it_adds_nothing(branch, inert):
    assert is_inert(branch) == inert


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_branch_is_finite_in_every_number(bad, dtype):
    good, spoiled = torch.full((2, 2), 6e4, dtype=dtype), torch.tensor([[0.0, 1.0], [bad, 1.0]], dtype=dtype)
    assert is_finite(LowRank(good, good, 1.0, good)) and is_finite(Delta(None, good)) and is_finite(Delta(good))
    assert not is_finite(LowRank(good, good, bad))
    for branch in (
        LowRank(spoiled, good, 1.0),
        LowRank(good, spoiled, 1.0),
        LowRank(good, good, 1.0, spoiled),
        Delta(spoiled),
        Delta(good, spoiled),
    ):
        assert not is_finite(branch)


@pytest.mark.skipif(
    not hasattr(torch.compiler, "set_stance"), reason="PyTorch 2.6 and later can be told not to compile"
)
def test_code_that_was_compiled_before_does_not_hide_a_lora():
    """The compiled model has seen this shape plainly, and does not look for hooks."""
    model, (x, t) = TinyUNet().requires_grad_(False), (torch.randn(2, 4, 6, 6), torch.randn(2, 6))
    context = torch.randn(2, TOKENS, 7)
    layer = model.attention
    lora = LowRank(torch.randn(2, WIDTH), torch.randn(WIDTH, 2), 1.0)
    merged = copy.deepcopy(model)
    merged.attention.weight += lora.up @ lora.down
    compiled = torch.compile(model, backend="eager")
    plain = compiled(x, t, context)
    with Isolation({"attention": layer}, [{"attention": lora}]).rows([0]):
        rows = compiled(x, t, context)
    assert torch.allclose(rows, merged(x, t, context), atol=1e-5)
    assert torch.equal(compiled(x, t, context), plain)
