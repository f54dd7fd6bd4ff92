"""What every training of the tiny world uses: pictures as tensors, tokens, attention that is fast on a CPU, a step."""

import copy
import math
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from transformers import CLIPTextModel

import model

SEED = 20250815
EMA = 0.998
RANK = 8
LORA_UNET = r".*(to_[qkv]|to_out\.0|ff\.net\.0\.proj|ff\.net\.2|proj_in|proj_out|conv1|conv2)"
LORA_TEXT = r".*([qkv]_proj|out_proj|fc[12])"


def group_norm(self: torch.nn.GroupNorm, x: torch.Tensor) -> torch.Tensor:
    """`GroupNorm.forward` in one layout and one type: on a CPU the mixed ones are several times slower backwards."""
    return F.group_norm(x.contiguous(), self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def tensor(images) -> torch.Tensor:
    """PIL images as one batch in -1..1."""
    return torch.from_numpy(np.stack([np.asarray(i) for i in images])).permute(0, 3, 1, 2).float() / 127.5 - 1


def log(start: float, step: int, **values: float) -> None:
    """One line of progress."""
    words = " ".join(f"{k} {v:.4f}" for k, v in values.items())
    print(f"{time.time() - start:6.0f} s, step {step}: {words}", flush=True)


class Attention:
    """Attention by plain matrix products, for diffusers: faster than torch's kernel at this size on a CPU."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **_):
        """Attends to the text if there is one, else to the picture itself."""
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            x.unflatten(2, (attn.heads, -1)).transpose(1, 2).flatten(0, 1)
            for x in (attn.to_q(hidden_states) * attn.scale, attn.to_k(context), attn.to_v(context))
        )
        out = (q @ k.transpose(1, 2)).softmax(-1) @ v
        return attn.to_out[0](out.unflatten(0, (-1, attn.heads)).transpose(1, 2).flatten(2))


def tokens(tokenizer, captions: list[str]) -> torch.Tensor:
    """Token ids, padded as Stable Diffusion pads."""
    options = {"padding": "max_length", "max_length": model.TOKENS, "truncation": True, "return_tensors": "pt"}
    return tokenizer(captions, **options).input_ids


def descend(loss: torch.Tensor, weights: list, optimizer, schedule) -> None:
    """One step of training: gradients of length 1 at most."""
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(weights, 1.0)
    optimizer.step()
    schedule.step()


def rise_and_fall(optimizer, steps: int, warmup: int):
    """The rate grows for so many steps, and falls to nothing at the last."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / warmup, 1) * (1 - s / steps))


class Averaged:
    """Modules, the averages of their weights over the last steps, and how their training goes."""

    def __init__(self, parts: torch.nn.Module, steps: int, rate: float) -> None:
        """`parts` as they are now."""
        self.parts, self.step = parts, 0
        self.ema = copy.deepcopy(parts).requires_grad_(False)
        self.optimizer = torch.optim.Adam(parts.parameters(), lr=rate, betas=(0.9, 0.99))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda s: min((s + 1) / 100, 1) * (0.02 + 0.98 * (1 + math.cos(math.pi * s / steps)) / 2)
        )

    def descend(self, loss: torch.Tensor) -> None:
        """One step."""
        descend(loss, list(self.parts.parameters()), self.optimizer, self.schedule)
        self.step += 1
        decay = min(EMA, self.step / (self.step + 10))
        for kept, new in zip(self.ema.parameters(), self.parts.parameters(), strict=True):
            kept.lerp_(new.detach(), 1 - decay)


def adapt(unet, text) -> None:
    """Puts an untrained LoRA into both, and lets nothing else be trained."""
    for part, target in ((unet.requires_grad_(False), LORA_UNET), (text.requires_grad_(False), LORA_TEXT)):
        inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=target), part)


def silence(part) -> None:
    """Makes its LoRA add nothing, for good."""
    for layer in part.modules():
        if hasattr(layer, "lora_B"):
            torch.nn.init.zeros_(layer.lora_B["default"].weight)


@torch.no_grad()
def norms(weights: list) -> list[torch.Tensor]:
    """How large each layer's product is, of weights as `trained` gives them: down, up, down, up …"""
    pairs = ((down.flatten(1), up.flatten(1)) for down, up in zip(weights[::2], weights[1::2], strict=True))
    return [((down @ down.T) * (up.T @ up)).sum().sqrt() for down, up in pairs]


@torch.no_grad()
def hold(weights: list, largest: list[torch.Tensor]) -> None:
    """Shrinks what has grown larger than that."""
    for up, norm, most in zip(weights[1::2], norms(weights), largest, strict=True):
        if norm > most:
            up.mul_(most / norm)


@torch.no_grad()
def added(part) -> dict[str, torch.Tensor]:
    """What its LoRA adds to the weights of layers, by their names."""
    return {name: layer.get_delta_weight("default") for name, layer in part.named_modules() if hasattr(layer, "lora_B")}


@contextmanager
def beside(part, extra: dict[str, torch.Tensor]):
    """Meanwhile another LoRA acts in it as well: `extra` is what that one adds to the weights of layers."""
    weights = {name: part.get_submodule(name).base_layer.weight for name in extra}
    bare = {name: weight.detach().clone() for name, weight in weights.items()}
    try:
        for name, weight in weights.items():
            weight.data += extra[name]
        yield
    finally:
        for name, weight in weights.items():
            weight.data.copy_(bare[name])


def trained(*parts) -> list:
    """The weights that are to be trained."""
    return [p for part in parts for p in part.parameters() if p.requires_grad]


def load_text(work: Path) -> CLIPTextModel:
    """The text encoder as it is trained so far."""
    return CLIPTextModel.from_pretrained(work / "text_encoder")


def load_base(work: Path):
    """The trained UNet and text encoder."""
    return UNet2DConditionModel.from_pretrained(work / "unet"), load_text(work)


def adapted(work: Path):
    """The trained UNet and text encoder with an untrained LoRA, which alone is to be trained."""
    unet, text = load_base(work)
    unet.set_attn_processor(Attention())
    adapt(unet, text)
    return unet, text
