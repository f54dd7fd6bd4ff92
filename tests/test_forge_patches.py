"""Side branches made of what Forge and reForge store, against merging, with no host about."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from loratorio_ext.hosts.forge_backends import ReForge
from loratorio_ext.hosts.forge_patches import as_held, branches, joined, low_rank
from loratorio_ext.isolation import Delta, Isolation, LowRank


def change(patch, weight):
    """What a patch adds to a weight, by the hosts' rules."""
    strength, value, _, offset, _ = patch
    if len(value) == 1:
        return strength * value[0]
    up, down, alpha, mid, *_ = value[1]
    scale = strength * (1 if alpha is None else alpha / down.shape[0])
    if mid is None:
        product = up.flatten(1) @ down.flatten(1)
    else:
        product = torch.einsum("or, rskl, si -> oikl", up.flatten(1), mid, down.flatten(1))
    whole = torch.zeros_like(weight)
    part = whole if offset is None else whole.narrow(*offset)
    part += scale * product.reshape(part.shape)
    return whole


def merge(patches, weight, name):
    return weight + sum(change(patch, weight) for patch in patches)


def lora(out, features, rank, alpha=None, kernel=(), mid=None):
    """up, down, alpha, mid, DoRA scale"""
    ones = [1] * len(kernel)
    down = torch.randn(rank, features, *(ones if mid is not None else kernel))
    return "lora", (torch.randn(out, rank, *ones), down, alpha, mid, None)


def patch(value, strength=1.0, offset=None, function=None, of_weight=1.0):
    return [strength, value, of_weight, offset, function]


LINEAR, CONV = torch.Size((12, 6)), torch.Size((8, 4, 3, 3))

LOW_RANK = {
    "without alpha": (LINEAR, [patch(lora(12, 6, 3), 0.7)]),
    "alpha": (LINEAR, [patch(lora(12, 6, 3, alpha=1.5), -0.7)]),
    "several of one file": (LINEAR, [patch(lora(12, 6, 3), 0.7), patch(lora(12, 6, 2, alpha=4.0), 0.5)]),
    "parts of a joint projection": (
        LINEAR,
        [patch(lora(4, 6, 2, alpha=1.0), 0.7, offset=(0, first, 4)) for first in (0, 4, 8)],
    ),
    "convolution": (CONV, [patch(lora(8, 4, 3, kernel=(3, 3)))]),
    "convolution with flat matrices": (
        CONV,
        [patch(("lora", (torch.randn(8, 2), torch.randn(2, 36), 1.0, None, None)))],
    ),
    "convolution with a middle": (CONV, [patch(lora(8, 4, 3, alpha=1.0, kernel=(3, 3), mid=torch.randn(3, 3, 3, 3)))]),
}

NOT_LOW_RANK = {
    "difference": (LINEAR, patch((torch.randn(12, 6),))),
    "another kind": (LINEAR, patch(("loha", (torch.randn(12, 3),)))),
    "DoRA": (LINEAR, patch(("lora", (*lora(12, 6, 3)[1][:4], torch.randn(12, 1))))),
    "scaled weight": (LINEAR, patch(lora(12, 6, 3), of_weight=0.5)),
    "function of the change": (LINEAR, patch(lora(12, 6, 3), function=abs)),
    "part of the inputs": (LINEAR, patch(lora(12, 3, 2), offset=(1, 0, 3))),
    "other shape": (LINEAR, patch(lora(12, 5, 3))),
}


def layer_of(shape):
    return nn.Linear(shape[1], shape[0]) if len(shape) == 2 else nn.Conv2d(shape[1], shape[0], 3, padding=1)


def under(layer, patches, x):
    """The layer's output with the patches as side branches of the weight."""
    model = nn.ModuleDict({"layer": layer})
    fitting, misfits = branches(model, {"layer.weight": patches}, getattr, merge)
    assert not misfits
    with torch.no_grad(), Isolation({"layer.weight": layer}, [fitting]).rows([0]):
        return layer(x), fitting["layer.weight"]


@pytest.mark.parametrize("shape, patches", LOW_RANK.values(), ids=LOW_RANK)
def test_low_rank_patches_become_low_rank_branches(shape, patches):
    layer = layer_of(shape)
    x = torch.randn(2, 5, 6) if len(shape) == 2 else torch.randn(2, 4, 6, 6)
    output, made = under(layer, patches, x)
    assert isinstance(made, LowRank)
    with torch.no_grad():
        layer.weight.copy_(merge(patches, layer.weight, ""))
        torch.testing.assert_close(output, layer(x), atol=1e-4, rtol=1e-4)


def test_adapters_are_read_like_tuples():
    kind, weights = lora(12, 6, 3, alpha=2.0)
    adapter = SimpleNamespace(name=kind, weights=(*weights, None))
    ours, theirs = low_rank([patch((kind, weights))], LINEAR), low_rank([patch(adapter)], LINEAR)
    assert torch.equal(ours.up, theirs.up) and torch.equal(ours.down, theirs.down)


@pytest.mark.parametrize("shape, one", NOT_LOW_RANK.values(), ids=NOT_LOW_RANK)
def test_everything_else_does_not(shape, one):
    assert low_rank([one], shape) is None
    assert low_rank([patch(lora(12, 6, 3)), one], shape) is None


def test_differences_are_what_the_host_merges():
    layer, x = layer_of(LINEAR), torch.randn(2, 6)
    patches = [patch((torch.randn(12, 6),), 0.5), patch(lora(12, 6, 3))]
    output, made = under(layer, patches, x)
    assert isinstance(made, Delta)
    with torch.no_grad():
        layer.weight.copy_(merge(patches, layer.weight, ""))
        torch.testing.assert_close(output, layer(x))


def test_weight_and_bias_are_branches_of_their_own():
    model, x = nn.ModuleDict({"layer": nn.Linear(6, 12)}), torch.randn(2, 6)
    store = {"layer.weight": [patch(lora(12, 6, 3))], "layer.bias": [patch((torch.randn(12),))]}
    fitting, misfits = branches(model, store, getattr, merge)
    layer = model["layer"]
    with torch.no_grad():
        with Isolation(dict.fromkeys(store, layer), [fitting]).rows([0]):
            output = layer(x)
        for name, patches in store.items():
            parameter = model.get_parameter(name)
            parameter.copy_(merge(patches, parameter, name))
        torch.testing.assert_close(output, layer(x))
    assert not misfits


def test_what_the_host_adds_in_passing_is_a_part_of_the_weight():
    """Where LoRAs are not merged for want of memory: a difference that depends on the weight must see them."""
    layer = nn.Linear(6, 12)
    weight, bias = layer.weight.clone(), layer.bias.clone()
    layer.weight_function = [lambda weight: weight.add_(1), lambda weight: weight.mul_(2)]
    with torch.no_grad():
        torch.testing.assert_close(ReForge().weight(layer, "weight"), 2 * (weight + 1))
    assert torch.equal(layer.weight, weight)
    assert torch.equal(ReForge().weight(layer, "bias"), bias)


def test_a_misfit_is_one_though_the_host_merges_nothing_and_says_nothing():
    model = nn.ModuleDict({"layer": nn.Linear(6, 12)})
    store = {"layer.weight": [patch(lora(12, 5, 3))]}
    fitting, misfits = branches(model, store, getattr, lambda patches, weight, name: weight)
    assert not fitting
    assert "for a layer of 12 x 5" in str(misfits["layer.weight"])


def test_misfits_are_told_by_name():
    def refuse(patches, weight, name):
        raise RuntimeError("shapes differ")

    model = nn.ModuleDict({"layer": nn.Linear(6, 12), "cube": nn.Conv3d(2, 2, 3), "words": nn.Embedding(3, 4)})
    names = ("layer.weight", "cube.weight", "words.weight", "nowhere.weight", "layer.scale")
    fitting, misfits = branches(model, {name: [patch(lora(5, 5, 2))] for name in names}, getattr, refuse)
    assert not fitting
    assert misfits.keys() == set(names)


def test_joined_stores_keep_the_order_of_loras():
    first, second = {"a": [1], "b": [2]}, {"b": [3], "c": [4]}
    assert joined([first, second]) == {"a": [1], "b": [2, 3], "c": [4]}


def test_a_lora_with_several_segments_of_a_batch_is_stacked_once():
    layer = nn.Linear(6, 12)
    loras = [{"layer": low_rank([patch(lora(12, 6, rank))], LINEAR)} for rank in (2, 3)]
    isolation = Isolation({"layer": layer}, [*loras, {}])
    x = torch.randn(8, 5, 6)
    with torch.no_grad():
        alone = []
        for index in range(3):
            with isolation.rows([index]):
                alone.append(layer(x))
        for group in ([1, 0, 1, 0], [0, 2, 1, 0]):
            with isolation.rows(group):
                rows = layer(x).chunk(4)
            for segment, index in enumerate(group):
                torch.testing.assert_close(rows[segment], alone[index].chunk(4)[segment])


def held(*strengths):
    """A parameter's patches as a host holds them, one for each strength."""
    return [(strength, ("diff", (torch.zeros(1),)), 1.0, None, None, False) for strength in strengths]


def test_patches_of_the_host_are_told_apart_by_their_order():
    """Other extensions may have changed strengths, block by block."""
    own = [{"x": held(1.0), "y": held(1.0)}, {"y": held(0.5)}]
    host = {"x": held(0.0), "y": held(0.3, 0.2)}
    first, second = as_held(own, host)
    assert first == {"x": host["x"], "y": host["y"][:1]}
    assert second == {"y": host["y"][1:]}


@pytest.mark.parametrize("host", [{"x": held(1.0, 1.0)}, {"x": held(0.3)}, {"z": held(1.0, 0.5)}], ids=str)
def test_patches_that_are_not_the_prompts_are_refused(host):
    with pytest.raises(ValueError, match="other patches"):
        as_held([{"x": held(1.0)}, {"y": held(0.5)}], host)


def test_patches_that_nobody_changed_stay_as_they_were_loaded():
    own = [{"x": held(1.0)}, {"x": held(0.5)}]
    assert as_held(own, {"x": held(1.0, 0.5)}) == own
    assert as_held(own, {}) == own


def test_what_follows_a_patchs_five_values_is_of_no_account():
    up, down = torch.randn(6, 2), torch.randn(2, 5)
    patch = (0.7, ("lora", (up, down, None, None, None)), 1.0, None, None)
    five, six = (low_rank([each], torch.Size((6, 5))) for each in (patch, (*patch, True)))
    assert torch.equal(five.up, six.up) and torch.equal(five.down, six.down)
