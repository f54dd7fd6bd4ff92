"""The host's LoRAs: modules by layer, read from files, and layers whose weights hold what the list asks for."""

import hashlib
import json
import logging
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from modules import errors, shared
from modules.sd_hijack import Embedding, model_hijack
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

loaded_networks: list["Network"] = []
networks_in_memory: dict[str, "Network"] = {}
failures: dict[str, int] = {}
"""how many layers a LoRA did not fit, by its name"""

available_networks: dict[str, "NetworkOnDisk"] = {}
available_network_aliases: dict[str, "NetworkOnDisk"] = {}
forbidden_network_aliases: dict[str, int] = {}

layer_of_key: dict[str, str] = {}
"""the names of layers that have another name in LoRA files"""


# --- files ------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def read(path: Path, changed: int) -> dict[str, Tensor]:
    """A file's tensors. The host reads it again each time; here only what is made of it is made anew."""
    return load_file(path)


def read_metadata(path: Path) -> dict[str, Any]:
    """What a file says of itself; values that are JSON are taken apart."""
    try:
        with safe_open(path, framework="pt") as opened:
            found = opened.metadata() or {}
    except Exception as error:
        errors.display(error, f"reading lora {path}")
        return {}
    return {key: json.loads(value) if value[:1] == "{" else value for key, value in found.items()}


class NetworkOnDisk:
    def __init__(self, name: str, filename: str):
        self.name, self.filename = name, filename
        self.metadata = read_metadata(Path(filename))
        self.alias = self.metadata.get("ss_output_name", name)

    @property
    def shorthash(self) -> str:
        return hashlib.sha256(Path(self.filename).read_bytes()).hexdigest()[:12]


def list_available_networks() -> None:
    """Look for files, in folders below as well; of two of a name the later one is known."""
    for known in (available_networks, available_network_aliases, forbidden_network_aliases):
        known.clear()
    for path in sorted(Path(shared.cmd_opts.lora_dir).rglob("*.safetensors")):
        entry = NetworkOnDisk(path.stem, str(path))
        available_networks[entry.name] = entry
        if entry.alias in available_network_aliases:
            forbidden_network_aliases[entry.alias.lower()] = 1
        available_network_aliases[entry.name] = available_network_aliases[entry.alias] = entry


def on_disk(name: str) -> NetworkOnDisk | None:
    """The file that a prompt's name means."""
    known = available_networks if name.lower() in forbidden_network_aliases else available_network_aliases
    return known.get(name)


class Network:
    """A LoRA: its modules by layer name, and the multipliers of its last mention."""

    def __init__(self, name: str, network_on_disk: NetworkOnDisk):
        self.name = self.mentioned_name = name
        self.network_on_disk = network_on_disk
        self.te_multiplier = self.unet_multiplier = 1.0
        self.dyn_dim = None
        self.modules: dict[str, NetworkModule] = {}
        self.bundle_embeddings: dict[str, Embedding] = {}


def load_network(name: str, network_on_disk: NetworkOnDisk) -> Network:
    """Read a file; raises AssertionError if a layer's tensors are of no kind known here."""
    network = Network(name, network_on_disk)
    path = Path(network_on_disk.filename)
    mapping = shared.sd_model.network_layer_mapping
    weights: dict[str, dict[str, Tensor]] = {}
    for key, tensor in read(path, path.stat().st_mtime_ns).items():
        layer, _, part = key.partition(".")
        if layer == "bundle_emb":
            embedding = part.split(".")[0]
            network.bundle_embeddings[embedding] = Embedding(embedding, tensor.float())
            continue
        layer = layer_of_key.get(layer, layer)
        if layer in mapping:
            weights.setdefault(layer, {})[part] = tensor
        else:
            logging.debug("Network %s didn't match keys: %s", path, key)
    for layer, parts in weights.items():
        kind = next((kind for kind in KINDS if any(needed <= parts.keys() for needed in kind.needs)), None)
        if kind is None:
            raise AssertionError(f"no module type would accept those keys: {', '.join(parts)}")
        network.modules[layer] = kind(network, layer, mapping[layer], parts)
    return network


def load_networks(names: list[str], te_multipliers=None, unet_multipliers=None, dyn_dims=None) -> None:
    """List these LoRAs, and no others. Those listed before are kept, the rest is read from disk."""
    database = model_hijack.embedding_db
    for network in loaded_networks:
        for embedding in network.bundle_embeddings.values():
            if embedding.loaded:
                database.register_embedding_by_name(None, shared.sd_model, embedding.name)
    known = networks_in_memory | {network.name: network for network in loaded_networks if network.name in names}
    loaded_networks.clear()
    missing = []
    for i, name in enumerate(names):
        if on_disk(name) is None:
            list_available_networks()
        entry = on_disk(name)
        if name not in known and entry is not None:
            try:
                known[name] = networks_in_memory[name] = load_network(name, entry)
            except Exception as error:
                errors.display(error, f"loading network {entry.filename}")
                continue
        if name not in known:
            missing.append(name)
            logging.info("Couldn't find network with name %s", name)
            continue
        network = known[name]
        network.te_multiplier = te_multipliers[i] if te_multipliers else 1.0
        network.unet_multiplier = unet_multipliers[i] if unet_multipliers else 1.0
        network.dyn_dim = dyn_dims[i] if dyn_dims else 1.0
        loaded_networks.append(network)
        for embedding in network.bundle_embeddings.values():
            embedding.loaded = True
            database.register_embedding(embedding, shared.sd_model)
    if missing:
        model_hijack.comments.append(f"Lora not found: {', '.join(missing)}")
    while len(networks_in_memory) > shared.opts.lora_in_memory_limit:
        networks_in_memory.pop(next(iter(networks_in_memory)))


# --- layers -----------------------------------------------------------------------------------------------------------


def network_forward(layer: nn.Module, x: Tensor, forward: Any) -> Tensor:
    """A layer's output under the LoRAs that are listed: in its weights, or, by an option, beside them."""
    if not shared.opts.lora_functional:
        network_apply_weights(layer)
        return forward(x)
    if not loaded_networks:
        return forward(x)
    restore(layer)
    layer.network_current_names = ()
    layer.network_weights_backup = None
    y = forward(x)
    for network in loaded_networks:
        if layer.network_layer_name in network.modules:
            y = network.modules[layer.network_layer_name].forward(x, y)
    return y


def network_apply_weights(layer: nn.Module) -> None:
    """Bring a layer's weights to what the list of LoRAs asks for, from the backup of its own."""
    name = getattr(layer, "network_layer_name", None)
    wanted = tuple((each.name, each.te_multiplier, each.unet_multiplier, each.dyn_dim) for each in loaded_networks)
    if name is None or wanted == getattr(layer, "network_current_names", ()):
        return
    if getattr(layer, "network_weights_backup", None) is None:
        bias = getattr(layer, "bias", None)
        layer.network_weights_backup = (layer.weight.clone(), None if bias is None else bias.clone())
    restore(layer)
    for network in loaded_networks:
        if name in network.modules:
            try:
                merge(layer, network.modules[name])
            except RuntimeError as error:
                logging.debug("Network %s layer %s: %s", network.name, name, error)
                failures[network.name] = failures.get(network.name, 0) + 1
    layer.network_current_names = wanted


@torch.no_grad()
def merge(layer: nn.Module, module: "NetworkModule") -> None:
    change, bias_change = module.calc_updown(layer.weight)
    layer.weight.copy_(layer.weight + change)
    if bias_change is not None:
        if layer.bias is None:
            layer.bias = nn.Parameter(bias_change, requires_grad=False)
        else:
            layer.bias.copy_(layer.bias + bias_change)


@torch.no_grad()
def restore(layer: nn.Module) -> None:
    backup = getattr(layer, "network_weights_backup", None)
    if backup is None:
        return
    layer.weight.copy_(backup[0])
    if backup[1] is not None:
        layer.bias.copy_(backup[1])
    elif hasattr(layer, "bias"):
        layer.bias = None


# --- kinds of modules -------------------------------------------------------------------------------------------------


class NetworkModule:
    """What a LoRA does to one layer. ``calc_updown`` is the change of weight and bias at the LoRA's multipliers."""

    needs: tuple[set[str], ...] = ()
    """sets of keys, any of which makes a file's layer one of this kind"""

    dim = None

    def __init__(self, network: Network, sd_key: str, layer: nn.Module, weights: dict[str, Tensor]):
        self.network, self.sd_key, self.sd_module = network, sd_key, layer
        self.w = {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in weights.items()}
        self.bias, self.dora_scale = self.w.get("bias"), self.w.get("dora_scale")
        self.alpha, self.scale = (self.w[key].item() if key in self.w else None for key in ("alpha", "scale"))

    def multiplier(self) -> float:
        text = "transformer" in self.sd_key[:20]
        return self.network.te_multiplier if text else self.network.unet_multiplier

    def calc_scale(self) -> float:
        if self.scale is not None:
            return self.scale
        return 1.0 if self.alpha is None or self.dim is None else self.alpha / self.dim

    def change(self, weight: Tensor) -> Tensor:
        """The weight's change before bias, scale, DoRA and multiplier."""
        raise NotImplementedError

    def bias_change(self) -> Tensor | None:
        return None

    def calc_updown(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        change = self.change(weight)
        if self.bias is not None:
            change = change.reshape(self.bias.shape) + self.bias
        if change.numel() == weight.numel():
            change = change.reshape(weight.shape)
        change = change * self.calc_scale()
        if self.dora_scale is not None:
            merged = weight + change
            norm = merged.transpose(0, 1).flatten(1).norm(dim=1).reshape(1, -1, *[1] * (weight.ndim - 2))
            change = merged * (self.dora_scale / norm) - weight
        bias = self.bias_change()
        return change * self.multiplier(), None if bias is None else bias * self.multiplier()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """A layer's output ``y`` for ``x`` with the change added."""
        change, bias = self.calc_updown(self.sd_module.weight)
        layer = self.sd_module
        if isinstance(layer, nn.Conv2d):
            return y + F.conv2d(x, change, bias, layer.stride, layer.padding)
        if isinstance(layer, nn.Linear):
            return y + F.linear(x, change, bias)
        if isinstance(layer, nn.GroupNorm):
            return y + F.group_norm(x, layer.num_groups, change, bias, layer.eps)
        return y + F.layer_norm(x, layer.normalized_shape, change, bias, layer.eps)


class LowRank(NetworkModule):
    """LoRA and LoCon, with a core (``lora_mid``) or without."""

    needs = ({"lora_up.weight", "lora_down.weight"}, {"lora_A.weight", "lora_B.weight"})

    def __init__(self, network: Network, sd_key: str, layer: nn.Module, weights: dict[str, Tensor]):
        if "lora_A.weight" in weights:  # with nothing else taken from the file
            weights = {"lora_down.weight": weights["lora_A.weight"], "lora_up.weight": weights["lora_B.weight"]}
        super().__init__(network, sd_key, layer, weights)
        self.up_model, self.down_model = self.factor("lora_up.weight"), self.factor("lora_down.weight")
        self.mid_model = self.factor("lora_mid.weight") if "lora_mid.weight" in weights else None
        self.dim = len(weights["lora_down.weight"])

    def factor(self, key: str) -> nn.Module:
        """A bias-free layer around a matrix, of the form that the model's layer has."""
        weight, layer = self.w[key], self.sd_module
        if isinstance(layer, nn.Linear):
            weight = weight.flatten(1)
            module = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        elif isinstance(layer, nn.Conv2d):
            weight = weight if weight.ndim == 4 else weight[:, :, None, None]
            wide = {"stride": layer.stride, "padding": layer.padding} if weight.shape[2:] != (1, 1) else {}
            module = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2:], bias=False, device="meta", **wide)
        else:
            raise AssertionError(f"Lora layer {self.sd_key} matched a layer with unsupported type")
        module.weight = nn.Parameter(weight, requires_grad=False)
        return module

    def change(self, weight: Tensor) -> Tensor:
        up, down = self.up_model.weight.flatten(1), self.down_model.weight
        if self.mid_model is not None:
            return torch.einsum("or, rskl, si -> oikl", up, self.mid_model.weight, down.flatten(1))
        dyn = self.network.dyn_dim
        product = up[:, :dyn] @ down.flatten(1)[:dyn]
        return product.reshape(len(up), *down.shape[1:])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Beside the weights the host knows neither core nor DoRA nor dyn."""
        return y + self.up_model(self.down_model(x)) * self.multiplier() * self.calc_scale()


def tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``core [r, s, k, l]``, ``a [r, out]``, ``b [s, in]`` to ``[out, in, k, l]``."""
    return torch.einsum("rskl, ro, si -> oikl", core, a, b)


class Hadamard(NetworkModule):
    """LoHa: the elementwise product of two low-rank matrices."""

    needs = ({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},)

    def change(self, weight: Tensor) -> Tensor:
        return self.factor(1) * self.factor(2)

    def factor(self, number: int) -> Tensor:
        a, b, core = (self.w.get(f"hada_{part}") for part in (f"w{number}_a", f"w{number}_b", f"t{number}"))
        self.dim = len(b)
        return a @ b if core is None else tucker(core, a, b)

    def calc_scale(self) -> float:
        self.dim = len(self.w["hada_w1_b"])
        return super().calc_scale()


class Kronecker(NetworkModule):
    """LoKr: the Kronecker product of two matrices, each whole or of low rank."""

    needs = ({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"})

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        for key in ("lokr_w1_b", "lokr_w2_b"):
            if key in self.w:
                self.dim = len(self.w[key])

    def change(self, weight: Tensor) -> Tensor:
        return torch.kron(self.factor(1), self.factor(2).flatten(1))

    def factor(self, number: int) -> Tensor:
        if f"lokr_w{number}" in self.w:
            return self.w[f"lokr_w{number}"]
        a, b = self.w[f"lokr_w{number}_a"], self.w[f"lokr_w{number}_b"]
        core = self.w.get(f"lokr_t{number}")
        return a @ b if core is None else tucker(core, a, b)


class IA3(NetworkModule):
    """A factor for each input, or for each output."""

    needs = ({"weight", "on_input"},)

    def change(self, weight: Tensor) -> Tensor:
        return weight * (self.w["weight"] if self.w["on_input"] else self.w["weight"].reshape(-1, 1))


class GLoRA(NetworkModule):
    """A low-rank change, and one of the weight by itself."""

    needs = ({"a1.weight", "a2.weight", "b1.weight", "b2.weight"},)

    def change(self, weight: Tensor) -> Tensor:
        a1, a2, b1, b2 = (self.w[f"{name}.weight"] for name in ("a1", "a2", "b1", "b2"))
        return b2 @ b1 + weight @ a2 @ a1


class Rotation(NetworkModule):
    """OFT: blocks of outputs rotated, once, or in several rounds over outputs that are shuffled in between (BOFT)."""

    needs = ({"oft_blocks"}, {"oft_diag"})

    def calc_scale(self) -> float:
        return 1.0

    def change(self, weight: Tensor) -> Tensor:
        rotations, rotated = self.rotations(len(weight)), weight.flatten(1)
        if rotations.ndim == 3:
            rotated = turn(rotations.transpose(1, 2), rotated)
        else:
            for number, blocks in enumerate(rotations):
                distance = 2**number * blocks.shape[-1] // 2
                rotated = rotated.unflatten(0, (-1, 2, distance)).transpose(1, 2).flatten(0, 2)
                rotated = turn(blocks, rotated).unflatten(0, (-1, distance, 2)).transpose(1, 2).flatten(0, 2)
        if "rescale" in self.w:
            rotated = rotated * self.w["rescale"].reshape(-1, 1)
        return rotated.reshape(weight.shape) - weight

    def rotations(self, outputs: int) -> Tensor:
        """``[blocks, n, n]``, or ``[rounds, blocks, n, n]``."""
        if "oft_diag" in self.w:
            return self.w["oft_diag"]
        skew = self.w["oft_blocks"] - self.w["oft_blocks"].transpose(-1, -2)
        if self.alpha:
            norm = skew.norm()
            skew = skew * (norm.clamp(max=self.alpha * outputs) + 1e-8) / (norm + 1e-8)
        eye = torch.eye(skew.shape[-1])
        return (eye + skew) @ torch.linalg.inv(eye - skew)


def turn(blocks: Tensor, rows: Tensor) -> Tensor:
    """``blocks [b, n, n]`` applied to groups of n of the ``rows [b * n, ...]``."""
    return (blocks @ rows.unflatten(0, blocks.shape[:2])).flatten(0, 1)


class Full(NetworkModule):
    """The change itself, of weight and bias."""

    needs = ({"diff"},)

    def change(self, weight: Tensor) -> Tensor:
        return self.w["diff"]

    def bias_change(self) -> Tensor | None:
        return self.w.get("diff_b")


class Norm(NetworkModule):
    needs = ({"w_norm", "b_norm"},)

    def change(self, weight: Tensor) -> Tensor:
        return self.w["w_norm"]

    def bias_change(self) -> Tensor | None:
        return self.w["b_norm"]


KINDS = (LowRank, Hadamard, IA3, Kronecker, Full, Norm, GLoRA, Rotation)
