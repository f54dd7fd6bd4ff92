"""Side branches in Forge Neo's own layers, without a server: GGUF, 8-bit floats, formats with scales, and layers whose
LoRAs the host adds in passing.

Run by the host's own Python in the host's folder; prints a JSON object of the largest difference between a row under
its LoRA's side branches and the same row with the LoRA merged into the weight as numbers, as a part of what the LoRA
changes at all, by case::

    cd NEO; venv/bin/python EXTENSION/tests/live/neo_layers.py
"""

import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path.cwd()), str(Path.cwd() / "modules_forge" / "packages"), str(ROOT)]
sys.argv = [sys.argv[0], "--cpu"]

import modules_forge.initialization  # noqa: E402, F401  (the host's own packages come first)
from backend import operations  # noqa: E402
from backend.operations_gguf import ParameterGGUF  # noqa: E402
from backend.quant_ops import QuantizedTensor  # noqa: E402

from loratorio_ext.hosts.forge_backends import Neo  # noqa: E402
from loratorio_ext.hosts.forge_patches import branches  # noqa: E402
from loratorio_ext.isolation import Isolation  # noqa: E402

NEO = Neo()
OUT, FEATURES = 32, 64


def normal(*shape):
    return torch.randn(shape)


def stores():
    """A LoRA, the same layer's full difference, and a DoRA."""
    full = (0.5, ("diff", (0.1 * normal(OUT, FEATURES),)), 1.0, None, None, False)
    return [{"layer.weight": [patch]} for patch in (lora(), full, lora(dora_scale=1 + torch.rand(OUT, 1)))]


def lora(dora_scale=None):
    from modules_forge.packages.comfy.weight_adapter.lora import LoRAAdapter

    weights = (0.3 * normal(OUT, 4), 0.3 * normal(4, FEATURES), 2.0, None, dora_scale, None)
    return 0.8, LoRAAdapter(set(), weights), 1.0, None, None, False


def difference(layer, in_passing=()):
    """Rows of all LoRAs in one batch against the layer's weight as numbers with each of them merged; the weight has the
    patches ``in_passing`` already."""
    model, x = torch.nn.ModuleDict({"layer": layer}), normal(3, FEATURES)
    before, made = NEO.dense(layer.weight).float().clone(), []
    dense = NEO.merge(list(in_passing), before, "")
    for store in stores():
        fitting, misfits = branches(model, store, NEO.weight, NEO.merge)
        assert not misfits, misfits
        made.append((store, fitting))
    assert torch.equal(NEO.dense(layer.weight).float(), before), "the live weight was changed"
    with torch.inference_mode():
        base = layer(x)
        with Isolation({"layer.weight": layer}, [fitting for _, fitting in made]).rows([0, 1, 2]):
            rows = layer(torch.cat([x, x, x])).chunk(3)
        added = [x @ (NEO.merge(store["layer.weight"], dense, "") - dense).T for store, _ in made]
    return max(float((row - base - each).abs().max() / each.abs().max()) for row, each in zip(rows, added))


def plain():
    with operations.using_forge_operations(device="cpu", dtype=torch.float32):
        layer = torch.nn.Linear(FEATURES, OUT, bias=False)
    layer.load_state_dict({"weight": 0.2 * normal(OUT, FEATURES)})
    return difference(layer)


def patched_in_passing():
    """As the host does on the fly, and for weights that do not fit where it computes."""
    from backend.patcher.base import LowVramPatch

    with operations.using_forge_operations(device="cpu", dtype=torch.float32, manual_cast_enabled=True):
        layer = torch.nn.Linear(FEATURES, OUT, bias=False)
    layer.load_state_dict({"weight": 0.2 * normal(OUT, FEATURES)})
    patches = [lora(), lora()]
    layer.weight_function = [LowVramPatch("layer.weight", {"layer.weight": patches})]
    return difference(layer, patches)


def float8():
    with operations.using_forge_operations(device="cpu", dtype=torch.float8_e4m3fn, manual_cast_enabled=True):
        layer = torch.nn.Linear(FEATURES, OUT, bias=False)
    layer.load_state_dict({"weight": 0.2 * normal(OUT, FEATURES)})
    return difference(layer)


FORMATS = {
    "scaled_float8": ("TensorCoreFP8E4M3Layout", "float8_e4m3fn", {"scale": "recalculate"}),
    "mxfp8": ("TensorCoreMXFP8Layout", "mxfp8", {}),
    "nvfp4": ("TensorCoreNVFP4Layout", "nvfp4", {}),
    "int8": ("TensorWiseINT8Layout", "int8_tensorwise", {}),
    "rotated_int8": (
        "TensorWiseINT8Layout",
        "int8_tensorwise",
        {"per_channel": True, "convrot": True, "convrot_groupsize": 64},
    ),
}
"""Formats with scales: how the host lays them out, what files call them, and how numbers become such."""


def scaled(layout, name, how):
    layer = operations.mixed_precision_ops({}, torch.float32, full_precision_mm=True).Linear(
        FEATURES, OUT, bias=False, device="cpu", dtype=torch.float32
    )
    weight = QuantizedTensor.from_float(0.2 * normal(OUT, FEATURES), layout, **how)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    layer.layout_type, layer.quant_format = layout, name
    return difference(layer)


def gguf():
    from modules_forge.packages import gguf as library

    kind = library.GGMLQuantizationType.Q8_0
    packed = torch.from_numpy(library.quants.quantize((0.2 * normal(OUT, FEATURES)).numpy(), kind))
    parameter = ParameterGGUF(packed, tensor_type=kind, tensor_shape=torch.Size((OUT, FEATURES)))
    with operations.using_forge_operations(device="cpu", dtype=torch.float32, bnb_dtype="gguf"):
        layer = torch.nn.Linear(FEATURES, OUT, bias=False)
    layer.load_state_dict({"weight": parameter})
    layer.weight.gguf_cls.bake(layer.weight)
    return difference(layer)


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    found = {case.__name__: case() for case in (plain, patched_in_passing, float8, gguf)}
    print(json.dumps(found | {name: scaled(*how) for name, how in FORMATS.items()}))
