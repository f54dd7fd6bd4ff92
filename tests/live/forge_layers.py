"""Side branches in Forge's own layers, without a server: a tiny Flux transformer, GGUF and 8-bit float weights, scaled
ones, and layers whose LoRAs the host adds in passing.

Run by the host's own Python in the host's folder; prints a JSON object of the largest difference between a row under
its LoRA's side branches and the same row with the LoRA merged, as a part of what the LoRA changes at all, by case::

    cd FORGE; venv/bin/python EXTENSION/tests/live/forge_layers.py
"""

import json
import sys
from copy import deepcopy
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path.cwd()), str(Path.cwd() / "packages_3rdparty"), str(ROOT)]
sys.argv = [sys.argv[0], "--always-cpu"]

from backend import operations, utils  # noqa: E402
from backend.nn.flux import IntegratedFluxTransformer2DModel  # noqa: E402
from backend.operations_gguf import ParameterGGUF  # noqa: E402

from loratorio_ext.hosts.forge_backends import Forge  # noqa: E402
from loratorio_ext.hosts.forge_patches import branches  # noqa: E402
from loratorio_ext.isolation import Isolation  # noqa: E402

HIDDEN = 48
FORGE = Forge()


def normal(*shape):
    return torch.randn(shape)


def lora(out, features, rank, strength=1.0, offset=None):
    value = ("lora", (0.3 * normal(out, rank), 0.3 * normal(rank, features), rank / 2, None, None))
    return [strength, value, 1.0, offset, None]


def flux_patches(model, rank):
    """Every Linear: the joint projections as three LoRAs of their parts, the rest as LoRA; one layer as LoKr."""
    patches = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, operations.ForgeOperations.Linear):
            continue
        out, features = layer.weight.shape
        if name.endswith("qkv"):
            parts = [(0, first * HIDDEN, HIDDEN) for first in range(3)]
            patches[f"{name}.weight"] = [lora(HIDDEN, features, rank, 0.7, offset) for offset in parts]
        elif name == "txt_in":
            value = ("lokr", (normal(2, 2), 0.1 * normal(out // 2, features // 2), *[None] * 7))
            patches[f"{name}.weight"] = [[1.0, value, 1.0, None, None]]
        else:
            patches[f"{name}.weight"] = [lora(out, features, rank)]
    patches["img_in.bias"] = [[0.5, (normal(HIDDEN),), 1.0, None, None]]
    return patches


def isolation_of(model, stores):
    """Side branches for every store; a LoRA that does not fit is an error here."""
    loras = []
    for store in stores:
        fitting, misfits = branches(model, store, FORGE.weight, FORGE.merge)
        assert not misfits, misfits
        loras.append(fitting)
    names = {name for each in loras for name in each}
    return Isolation({name: model.get_submodule(name.rpartition(".")[0]) for name in names}, loras)


def merged(model, store):
    model = deepcopy(model)
    for name, patches in store.items():
        weight = utils.get_attr(model, name)
        utils.set_attr_raw(model, name, torch.nn.Parameter(FORGE.merge(patches, weight, name), requires_grad=False))
    return model


def difference(rows, truth, base):
    return float((rows - truth).abs().max() / (truth - base).abs().max())


def flux():
    with operations.using_forge_operations(device="cpu", dtype=torch.float32):
        model = IntegratedFluxTransformer2DModel(16, 12, 20, HIDDEN, 2.0, 2, 1, 2, [8, 8, 8], 10000, True, True)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for name, layer in model.named_modules():
        if isinstance(layer, operations.ForgeOperations.Linear):
            out, features = layer.out_features, layer.in_features
            shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, features), (out,)
    shapes = {name: shape for name, shape in shapes.items() if not name.endswith("dummy")}
    state = {name: 0.2 * normal(*shape) + (1.0 if name.endswith("scale") else 0.0) for name, shape in shapes.items()}
    model.load_state_dict(state)
    inputs = (normal(2, 16, 8, 6), torch.tensor([0.9, 0.4]), normal(2, 5, 20), normal(2, 12), torch.tensor([3.5, 3.5]))
    stores = [flux_patches(model, rank) for rank in (2, 5)]
    isolation = isolation_of(model, stores)
    with torch.no_grad():
        base = model(*inputs)
        with isolation.rows([1, 0]):
            rows = model(*[torch.cat([each, each]) for each in inputs]).chunk(2)
        again = model(*inputs)
        truth = [merged(model, stores[index])(*inputs) for index in (1, 0)]
    assert torch.equal(base, again)
    return max(difference(a, b, base) for a, b in zip(rows, truth))


def quantised(layer, weight):
    """One Linear that keeps its weight in another form, under LoRA, LoKr and DoRA."""
    model = torch.nn.ModuleDict({"layer": layer})
    out, features = weight.shape
    lokr = ("lokr", (normal(2, 2), 0.1 * normal(out // 2, features // 2), *[None] * 7))
    dora = ("lora", (0.3 * normal(out, 4), 0.3 * normal(4, features), 2.0, None, 1 + torch.rand(out, 1)))
    kinds = (lora(out, features, 4), [1.0, lokr, 1.0, None, None], [0.8, dora, 1.0, None, None])
    stores = [{"layer.weight": [patch]} for patch in kinds]
    x = normal(3, features)
    isolation = isolation_of(model, stores)
    with torch.no_grad():
        base = layer(x)
        with isolation.rows([0, 1, 2]):
            rows = layer(torch.cat([x, x, x])).chunk(3)
        truth = [x @ FORGE.merge(store["layer.weight"], weight.float(), "").T for store in stores]
    return max(difference(a, b, base) for a, b in zip(rows, truth))


def gguf():
    import gguf as library

    class Tensor:
        """What the host's loader makes a parameter of."""

        tensor_type = library.GGMLQuantizationType.Q8_0

        def __init__(self, weight):
            self.data = library.quants.quantize(weight.numpy(), self.tensor_type)
            self.shape = list(reversed(weight.shape))

    with operations.using_forge_operations(
        device="cpu", dtype=torch.float32, manual_cast_enabled=True, bnb_dtype="gguf"
    ):
        layer = torch.nn.Linear(64, 32, bias=False)
    layer.load_state_dict({"weight": ParameterGGUF(Tensor(0.2 * normal(32, 64)))})
    layer.weight.gguf_cls.bake(layer.weight)
    return quantised(layer, FORGE.dense(layer.weight))


def float8_layer():
    with operations.using_forge_operations(device="cpu", dtype=torch.float8_e4m3fn, manual_cast_enabled=True):
        layer = torch.nn.Linear(64, 32, bias=False)
    layer.load_state_dict({"weight": 0.2 * normal(32, 64)})
    return layer


def float8():
    layer = float8_layer()
    return quantised(layer, layer.weight)


def scaled_float8():
    layer = float8_layer()
    layer.scale_weight = torch.nn.Parameter(torch.tensor(0.4))
    return quantised(layer, layer.weight.float() * 0.4)


def patched_in_passing():
    layer, patches = float8_layer(), [lora(32, 64, 4), lora(32, 64, 2)]
    layer.forge_online_loras = {"weight": patches}
    return quantised(layer, FORGE.merge(patches, layer.weight.float(), ""))


CASES = (flux, gguf, float8, scaled_float8, patched_in_passing)

if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(json.dumps({case.__name__: case() for case in CASES}))
