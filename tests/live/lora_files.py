"""Random LoRA files of every kind, cut to fit a tiny checkpoint.

    layers = read_layers(checkpoint)
    write_lora(path, layers, Recipe("tiny", "lora", seed=1, strength=0.5))

or, for the whole ``CATALOGUE``::

    python tests/live/lora_files.py --checkpoint tiny-sd1.safetensors --out models/Lora

Needs torch, numpy and safetensors. Key names are kohya's: diffusers' layer names for SD 1.x and 2.x, the checkpoint's
own for SDXL and for UNets of another depth than Stable Diffusion's, which diffusers has no names for. ``strength`` is
the ratio of root mean squares of a layer's change and its weight, whatever the kind.
Files depend on the recipe and the checkpoint alone.
"""

from __future__ import annotations

import argparse
import re
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

UNET = "model.diffusion_model."
CLIP = "cond_stage_model.transformer.text_model.encoder."
OPEN_CLIP = "cond_stage_model.model.transformer."
SDXL_CLIP = "conditioner.embedders.0.transformer.text_model.encoder."
SDXL_OPEN_CLIP = "conditioner.embedders.1.model.transformer."

RESNET_PARTS = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
OPEN_CLIP_PARTS = {
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Layer:
    """A layer of the checkpoint that LoRAs may change."""

    name: str
    """its key in a LoRA file, such as ``lora_unet_mid_block_resnets_0_conv1``"""

    path: str
    """its name in the checkpoint, below the model's prefix"""

    weight: Tensor
    """[out, in] linear, [out, in, k, k] convolution, [channels] norm"""

    bias: Tensor | None

    @property
    def form(self) -> str:
        """``linear``, ``conv1x1``, ``conv3x3`` or ``norm``."""
        if self.weight.ndim == 1:
            return "norm"
        return "linear" if self.weight.ndim == 2 else f"conv{self.weight.shape[2]}x{self.weight.shape[3]}"

    @property
    def part(self) -> str:
        """``unet`` or ``text``."""
        return "unet" if self.name.startswith("lora_unet") else "text"

    @property
    def fan_in(self) -> int:
        """Inputs of one output: in, or in * k * k."""
        return self.weight[0].numel()


def diffusers_path(path: str) -> str:
    """UNet layer name in diffusers' words; ``path`` itself where those have none for this layout."""
    if path == "out.2":
        return "conv_out"
    if match := re.fullmatch(r"time_embed\.([02])", path):
        return f"time_embedding.linear_{1 + int(match[1]) // 2}"
    if path == "input_blocks.0.0":
        return "conv_in"
    if match := re.fullmatch(r"middle_block\.([012])\.(.+)", path):
        index, rest = int(match[1]), match[2]
        if index == 1:
            return f"mid_block.attentions.0.{rest}"
        return f"mid_block.resnets.{index // 2}.{RESNET_PARTS[rest]}"
    if match := re.fullmatch(r"input_blocks\.(\d+)\.0\.op", path):
        return f"down_blocks.{int(match[1]) // 3 - 1}.downsamplers.0.conv"
    if match := re.fullmatch(r"(input|output)_blocks\.(\d+)\.([01])\.(.+)", path):
        place = int(match[2]) - (match[1] == "input")
        block = f"{'down' if match[1] == 'input' else 'up'}_blocks.{place // 3}"
        if match[3] == "1":
            return f"{block}.attentions.{place % 3}.{match[4]}"
        return f"{block}.resnets.{place % 3}.{RESNET_PARTS[match[4]]}"
    return path


def key_name(prefix: str, path: str) -> str:
    return f"{prefix}_{path}".replace(".", "_")


def open_clip_layers(weights: Weights, prefix: str, key_prefix: str) -> Iterable[Layer]:
    """Layers of an OpenCLIP text model; a joint [3 * width, width] attention projection counts as three."""
    for key, weight in weights.items():
        path = key.removeprefix(prefix)
        match = re.fullmatch(r"resblocks\.(\d+)\.(.+?)[._]weight", path)
        if path == key or not match:
            continue
        number, part = match.groups()
        place = f"text_model.encoder.layers.{number}"
        if part == "attn.in_proj":
            biases = weights[f"{prefix}resblocks.{number}.attn.in_proj_bias"].chunk(3)
            for letter, rows, bias in zip("qkv", weight.chunk(3), biases, strict=True):
                yield Layer(key_name(key_prefix, f"{place}.self_attn.{letter}_proj"), path, rows, bias)
        elif part in OPEN_CLIP_PARTS:
            bias = weights[f"{prefix}resblocks.{number}.{part}.bias"]
            yield Layer(key_name(key_prefix, f"{place}.{OPEN_CLIP_PARTS[part]}"), path, weight, bias)


def plain_layers(weights: Weights, prefix: str, rename: Callable[[str], str]) -> Iterable[Layer]:
    """Layers below ``prefix``, named by ``rename``."""
    for key, weight in weights.items():
        if key.startswith(prefix) and key.endswith(".weight"):
            path = key.removeprefix(prefix).removesuffix(".weight")
            yield Layer(rename(path), path, weight, weights.get(key.removesuffix("weight") + "bias"))


def read_layers(checkpoint: Path) -> list[Layer]:
    """Linear, convolution and norm layers of UNet and text models, in the checkpoint's order."""
    weights = load_file(checkpoint)
    is_sdxl = any(key.startswith(SDXL_CLIP) for key in weights)
    own_names = is_sdxl or f"{UNET}input_blocks.3.0.op.weight" not in weights
    te, te2 = ("lora_te1", "lora_te2") if is_sdxl else ("lora_te", "lora_te")
    layers = [
        *plain_layers(weights, UNET, lambda path: key_name("lora_unet", path if own_names else diffusers_path(path))),
        *plain_layers(weights, SDXL_CLIP if is_sdxl else CLIP, lambda path: key_name(te, f"text_model.encoder.{path}")),
        *open_clip_layers(weights, SDXL_OPEN_CLIP if is_sdxl else OPEN_CLIP, te2),
    ]
    return [layer for layer in layers if layer.path != "out.0"]  # the last norm has no name in LoRA files


class Draw:
    """Source of a layer's random tensors, and the measure its change is fitted to."""

    def __init__(self, layer: Layer, recipe: Recipe):
        seed = recipe.seed * 2**32 + zlib.crc32(layer.name.encode())
        self.generator = torch.Generator().manual_seed(seed)
        self.rank = recipe.rank
        self.strength = recipe.strength
        self.target = recipe.strength * rms(layer.weight)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def fit(self, factor: Tensor, change: Tensor, scale: float = 1.0) -> Tensor:
        """``factor`` rescaled so that ``change * scale``, linear in it, has the root mean square wanted."""
        return factor * (self.target / (rms(change) * scale))


def rms(tensor: Tensor) -> float:
    """Root mean square."""
    return tensor.square().mean().sqrt().item()


def divisor(number: int, limit: int = 8) -> int:
    """The largest divisor of ``number`` up to ``limit``."""
    return max(candidate for candidate in range(1, limit + 1) if number % candidate == 0)


def cayley(skew: Tensor) -> Tensor:
    """Rotations [..., n, n] from arbitrary [..., n, n] blocks: (1 + Q)(1 - Q)^-1, Q = blocks - blocks^T."""
    q = skew - skew.transpose(-1, -2)
    eye = torch.eye(q.shape[-1])
    return (eye + q) @ torch.linalg.inv(eye - q)


def lora(layer: Layer, draw: Draw) -> Weights:
    """``up @ down``, scaled by alpha / rank = 1/2. A k x k convolution's down keeps its kernel (LoCon)."""
    down = draw.normal(draw.rank, *layer.weight.shape[1:])
    up = draw.normal(layer.weight.shape[0], draw.rank)
    up = draw.fit(up, up @ down.flatten(1), 0.5)
    if layer.weight.ndim == 4:
        up = up[:, :, None, None]
    return {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(draw.rank / 2)}


def lora_no_alpha(layer: Layer, draw: Draw) -> Weights:
    """No alpha: the scale is 1."""
    weights = lora(layer, draw)
    del weights["alpha"]
    return weights


def lora_scale(layer: Layer, draw: Draw) -> Weights:
    """``scale`` in the file, which goes before alpha / rank."""
    return lora(layer, draw) | {"scale": torch.tensor(0.5), "alpha": torch.tensor(3.0 * draw.rank)}


def lora_peft(layer: Layer, draw: Draw) -> Weights:
    """PEFT's names for the two factors. No alpha: hosts drop it."""
    weights = lora_no_alpha(layer, draw)
    return {"lora_A.weight": weights["lora_down.weight"], "lora_B.weight": weights["lora_up.weight"]}


def lora_reshaped(layer: Layer, draw: Draw) -> Weights:
    """Factors of the other dimensionality: [r, in, 1, 1] on linear layers, [r, in] on 1x1 convolutions."""
    weights = lora(layer, draw)
    for key in ("lora_down.weight", "lora_up.weight"):
        tensor = weights[key]
        weights[key] = tensor[:, :, None, None] if tensor.ndim == 2 else tensor.flatten(1)
    return weights


def lora_mid(layer: Layer, draw: Draw) -> Weights:
    """Convolutions as 1x1 down, k x k mid and 1x1 up (CP decomposition)."""
    if layer.form != "conv3x3":
        return lora(layer, draw)
    out, channels, *kernel = layer.weight.shape
    rank = draw.rank
    down, mid, up = (draw.normal(*shape) for shape in ((rank, channels), (rank, rank, *kernel), (out, rank)))
    up = draw.fit(up, torch.einsum("or, rskl, si -> oikl", up, mid, down), 0.5)
    return {
        "lora_down.weight": down[:, :, None, None],
        "lora_mid.weight": mid,
        "lora_up.weight": up[:, :, None, None],
        "alpha": torch.tensor(rank / 2),
    }


def lora_bias(layer: Layer, draw: Draw) -> Weights:
    """A dense ``bias`` of the weight's shape, which is added to ``up @ down`` before scaling."""
    return lora(layer, draw) | {"bias": draw.target * draw.normal(*layer.weight.shape)}


def dora(layer: Layer, draw: Draw) -> Weights:
    """``dora_scale`` [1, in(, 1, 1)]: the norm that each input channel of the changed weight is brought to."""
    norms = layer.weight.transpose(0, 1).flatten(1).norm(dim=1)
    scale = norms * (1 + draw.strength * draw.normal(*norms.shape)).abs()
    return lora(layer, draw) | {"dora_scale": scale.reshape(1, -1, *[1] * (layer.weight.ndim - 2))}


def loha(layer: Layer, draw: Draw) -> Weights:
    """Hadamard product of two low-rank products, [out, r] @ [r, in * k * k] each."""
    out, fan_in, rank = layer.weight.shape[0], layer.fan_in, draw.rank
    w1_a, w1_b = draw.normal(out, rank), draw.normal(rank, fan_in)
    w2_a, w2_b = draw.normal(out, rank), draw.normal(rank, fan_in)
    w1_a = draw.fit(w1_a, (w1_a @ w1_b) * (w2_a @ w2_b), 0.5)
    alpha = torch.tensor(rank / 2)
    return {"hada_w1_a": w1_a, "hada_w1_b": w1_b, "hada_w2_a": w2_a, "hada_w2_b": w2_b, "alpha": alpha}


def loha_tucker(layer: Layer, draw: Draw) -> Weights:
    """LoHa of two CP decompositions: t [r, r, k, k], a [r, out], b [r, in]."""
    out, channels, *kernel = layer.weight.shape
    if layer.form != "conv3x3":
        return loha(layer, draw)
    rank, weights, changes = draw.rank, {}, []
    for number in (1, 2):
        t, a, b = (draw.normal(*shape) for shape in ((rank, rank, *kernel), (rank, out), (rank, channels)))
        changes.append(torch.einsum("rskl, ro, si -> oikl", t, a, b))
        weights |= {f"hada_t{number}": t, f"hada_w{number}_a": a, f"hada_w{number}_b": b}
    weights["hada_w1_a"] = draw.fit(weights["hada_w1_a"], changes[0] * changes[1], 0.5)
    return weights | {"alpha": torch.tensor(rank / 2)}


def kronecker_shapes(layer: Layer) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes [out1, in1], [out2, in2] whose Kronecker product is [out, in]."""
    out, channels = layer.weight.shape[:2]
    out1, in1 = divisor(out), divisor(channels)
    return (out1, in1), (out // out1, channels // in1)


def lokr(layer: Layer, draw: Draw) -> Weights:
    """Kronecker product of two whole matrices; a convolution's kernel is in the second."""
    shape1, shape2 = kronecker_shapes(layer)
    w1, w2 = draw.normal(*shape1), draw.normal(*shape2, *layer.weight.shape[2:])
    return {"lokr_w1": draw.fit(w1, torch.kron(w1, w2.flatten(1))), "lokr_w2": w2}


def lokr_factored(layer: Layer, draw: Draw) -> Weights:
    """Kronecker product of two low-rank matrices, scaled by alpha / rank = 1/2."""
    (out1, in1), (out2, in2) = kronecker_shapes(layer)
    in2 *= layer.weight[0, 0].numel()
    rank = draw.rank
    w1_a, w1_b, w2_a, w2_b = (draw.normal(*s) for s in ((out1, rank), (rank, in1), (out2, rank), (rank, in2)))
    w1_a = draw.fit(w1_a, torch.kron(w1_a @ w1_b, w2_a @ w2_b), 0.5)
    alpha = torch.tensor(rank / 2)
    return {"lokr_w1_a": w1_a, "lokr_w1_b": w1_b, "lokr_w2_a": w2_a, "lokr_w2_b": w2_b, "alpha": alpha}


def lokr_tucker(layer: Layer, draw: Draw) -> Weights:
    """Kronecker product whose second factor is a CP decomposition: t2 [r, r, k, k], w2_a [r, out2], w2_b [r, in2]."""
    if layer.form != "conv3x3":
        return lokr_factored(layer, draw)
    shape1, (out2, in2) = kronecker_shapes(layer)
    rank, kernel = draw.rank, layer.weight.shape[2:]
    shapes = (shape1, (rank, rank, *kernel), (rank, out2), (rank, in2))
    w1, t2, w2_a, w2_b = (draw.normal(*shape) for shape in shapes)
    w2 = torch.einsum("rskl, ro, si -> oikl", t2, w2_a, w2_b)
    w1 = draw.fit(w1, torch.kron(w1, w2.flatten(1)), 0.5)
    return {"lokr_w1": w1, "lokr_t2": t2, "lokr_w2_a": w2_a, "lokr_w2_b": w2_b, "alpha": torch.tensor(rank / 2)}


def ia3(layer: Layer, draw: Draw) -> Weights:
    """A factor per input of the second feed-forward projection, per output of the others."""
    on_input = "ff_net_2" in layer.name or "fc2" in layer.name
    size = layer.weight.shape[1] if on_input else layer.weight.shape[0]
    return {"weight": draw.strength * draw.normal(size), "on_input": torch.tensor(on_input)}


def oft(layer: Layer, draw: Draw) -> Weights:
    """Blocks [out / n, n, n] whose Cayley transforms rotate groups of outputs."""
    size = divisor(layer.weight.shape[0])
    return {"oft_blocks": draw.strength / size**0.5 / 2 * draw.normal(layer.weight.shape[0] // size, size, size)}


def oft_constrained(layer: Layer, draw: Draw) -> Weights:
    """kohya's OFT: ``alpha`` bounds the blocks' norm (times the number of outputs)."""
    return oft(layer, draw) | {"alpha": torch.tensor(1e-2)}


def oft_rescaled(layer: Layer, draw: Draw) -> Weights:
    """LyCORIS' OFT with ``rescale``, a factor per output."""
    rescale = 1 + draw.strength / 2 * draw.normal(layer.weight.shape[0])
    return oft(layer, draw) | {"rescale": rescale.reshape(-1, *[1] * (layer.weight.ndim - 1))}


def oft_diag(layer: Layer, draw: Draw) -> Weights:
    """LyCORIS' earlier OFT, which holds the rotations themselves."""
    return {"oft_diag": cayley(oft(layer, draw)["oft_blocks"])}


def boft(layer: Layer, draw: Draw) -> Weights:
    """Butterfly OFT: two rounds of 4x4 blocks [2, out / 4, 4, 4], one where the outputs do not split further."""
    out = layer.weight.shape[0]
    return {"oft_blocks": draw.strength / 6 * draw.normal(2 if out % 8 == 0 else 1, out // 4, 4, 4)}


def glora(layer: Layer, draw: Draw) -> Weights:
    """``W a2 a1 + b2 b1``: a2 [in, r], a1 [r, in], b2 [out, r], b1 [r, in]. Its scale is 1 whatever alpha."""
    (out, channels), rank = layer.weight.shape, draw.rank
    a1, a2 = draw.normal(rank, channels), draw.normal(channels, rank)
    b1, b2 = draw.normal(rank, channels), draw.normal(out, rank)
    a2, b2 = draw.fit(a2, layer.weight.float() @ a2 @ a1, 2**0.5), draw.fit(b2, b2 @ b1, 2**0.5)
    return {"a1.weight": a1, "a2.weight": a2, "b1.weight": b1, "b2.weight": b2, "alpha": torch.tensor(float(rank))}


def full(layer: Layer, draw: Draw) -> Weights:
    """The change itself, and the bias' where the layer has one."""
    weights = {"diff": draw.target * draw.normal(*layer.weight.shape)}
    if layer.bias is not None:
        weights["diff_b"] = draw.strength * rms(layer.bias) * draw.normal(*layer.bias.shape)
    return weights


def norm(layer: Layer, draw: Draw) -> Weights:
    """Changes of a norm's weight and bias."""
    channels = layer.weight.shape[0]
    return {"w_norm": draw.target * draw.normal(channels), "b_norm": draw.target * draw.normal(channels)}


LINEAR = frozenset({"linear"})
POINTWISE = LINEAR | {"conv1x1"}
ALL = POINTWISE | {"conv3x3"}
NORM = frozenset({"norm"})


@dataclass(frozen=True)
class Kind:
    """A kind of network file."""

    weights: Callable[[Layer, Draw], Weights]
    """what a layer gets in the file, by the last part of its key"""

    forms: frozenset[str]
    """forms of layer that the kind is made for"""

    unet_prefix: str = ""
    """prefix of keys that hold the checkpoint's own layer names; empty: ``Layer.name`` is the key"""

    def key(self, layer: Layer) -> str:
        if self.unet_prefix and layer.part == "unet":
            return key_name(self.unet_prefix, layer.path)
        return layer.name


KINDS = {
    "lora": Kind(lora, POINTWISE),
    "lora_no_alpha": Kind(lora_no_alpha, POINTWISE),
    "lora_scale": Kind(lora_scale, POINTWISE),
    "lora_peft": Kind(lora_peft, POINTWISE),
    "lora_reshaped": Kind(lora_reshaped, POINTWISE),
    "lora_bias": Kind(lora_bias, POINTWISE),
    "locon": Kind(lora, ALL),
    "locon_mid": Kind(lora_mid, ALL),
    "dora": Kind(dora, ALL),
    "loha": Kind(loha, ALL),
    "loha_tucker": Kind(loha_tucker, ALL),
    "lokr": Kind(lokr, ALL),
    "lokr_factored": Kind(lokr_factored, ALL),
    "lokr_tucker": Kind(lokr_tucker, ALL),
    "ia3": Kind(ia3, LINEAR),
    "oft": Kind(oft, ALL),
    "oft_constrained": Kind(oft_constrained, ALL, unet_prefix="oft_unet"),
    "oft_rescaled": Kind(oft_rescaled, ALL),
    "oft_diag": Kind(oft_diag, ALL),
    "boft": Kind(boft, ALL),
    "glora": Kind(glora, LINEAR),
    "full": Kind(full, ALL),
    "norm": Kind(norm, NORM),
}


@dataclass(frozen=True)
class Recipe:
    """How a LoRA file is made; equal recipes make equal files."""

    name: str
    kind: str
    """a key of ``KINDS``"""

    seed: int
    strength: float
    """root mean square of a layer's change, in those of its weight"""

    rank: int = 4
    layers: str = ""
    """regular expression searched for in ``Layer.name``: the layers it touches"""

    dtype: torch.dtype = torch.float32


def lora_weights(layers: Iterable[Layer], recipe: Recipe) -> Weights:
    """Tensors of a LoRA file by key."""
    kind = KINDS[recipe.kind]
    return {
        f"{kind.key(layer)}.{suffix}": tensor.to(
            recipe.dtype if tensor.is_floating_point() else tensor.dtype
        ).contiguous()
        for layer in layers
        if layer.form in kind.forms and re.search(recipe.layers, layer.name)
        for suffix, tensor in kind.weights(layer, Draw(layer, recipe)).items()
    }


def write_lora(path: Path, layers: Iterable[Layer], recipe: Recipe) -> Path:
    """Write one LoRA file. One entry of metadata, its name: more would be written in a random order."""
    save_file(lora_weights(layers, recipe), path, metadata={"ss_output_name": recipe.name})
    return path


CATALOGUE = (
    *(Recipe(kind, kind, seed, strength=0.15) for seed, kind in enumerate(KINDS, start=1)),
    Recipe("unet_only", "lora", 101, 0.15, rank=8, layers="lora_unet"),
    Recipe("text_only", "lora", 102, 0.4, rank=8, layers="lora_te"),
    Recipe("rank_1", "lora", 103, 0.15, rank=1),
    Recipe("rank_16_half", "locon", 104, 0.15, rank=16, dtype=torch.float16),
    Recipe("cross_attention", "lora", 105, 0.4, layers="attn2"),
    Recipe("down_blocks", "locon", 106, 0.2, layers="down_blocks|input_blocks"),
    Recipe("up_blocks", "locon", 107, 0.2, layers="up_blocks|output_blocks"),
    Recipe("resnets", "locon", 108, 0.2, layers="resnets|in_layers|out_layers|emb_layers|skip_connection"),
)
"""One LoRA of each kind, and some of other ranks and reach; the names are the files'."""


def write_catalogue(checkpoint: Path, folder: Path, recipes: Iterable[Recipe] = CATALOGUE) -> list[Path]:
    """Write a LoRA file for each recipe into ``folder``."""
    layers = read_layers(checkpoint)
    folder.mkdir(parents=True, exist_ok=True)
    return [write_lora(folder / f"{recipe.name}.safetensors", layers, recipe) for recipe in recipes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    for path in write_catalogue(arguments.checkpoint, arguments.out):
        print(path)


if __name__ == "__main__":
    main()
