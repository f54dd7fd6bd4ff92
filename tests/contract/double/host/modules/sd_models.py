"""A tiny latent diffusion model with random weights, laid out and named like Stable Diffusion's."""

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import networks
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modules.prompt_parser import SdConditioning
from modules.sd_hijack import model_hijack

WIDTH = 16
CHUNK = 75
VOCABULARY = 512


# --- layers that ask for their LoRAs before they compute --------------------------------------------------------------


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return networks.network_forward(self, x, super().forward)


class Conv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return networks.network_forward(self, x, super().forward)


class GroupNorm(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return networks.network_forward(self, x, super().forward)


class LayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return networks.network_forward(self, x, super().forward)


# --- text -------------------------------------------------------------------------------------------------------------


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(attention(self.q_proj(x), self.k_proj(x), self.v_proj(x)))


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(-1) @ v


class Perceptron(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = Linear(WIDTH, 2 * WIDTH), Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class EncoderLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer_norm1, self.self_attn = LayerNorm(WIDTH), SelfAttention()
        self.layer_norm2, self.mlp = LayerNorm(WIDTH), Perceptron()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class TextModel(nn.Module):
    """The path ``text_model.encoder.layers`` is part of LoRA files' keys."""

    def __init__(self):
        super().__init__()
        self.text_model = nn.Module()
        self.text_model.encoder = nn.Module()
        self.text_model.encoder.layers = nn.ModuleList([EncoderLayer()])
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Parameter(0.3 * torch.randn(CHUNK + 2, WIDTH))

    def forward(self, vectors: Tensor) -> Tensor:
        x = vectors + self.positions
        for layer in self.text_model.encoder.layers:
            x = layer(x)
        return F.layer_norm(x, x.shape[-1:])


class TextEncoder(nn.Module):
    """Words to vectors, in chunks of 75 words between a start and an end: ``[texts, 77 * chunks, WIDTH]``."""

    def __init__(self):
        super().__init__()
        self.transformer = TextModel()

    def forward(self, texts: Sequence[str]) -> Tensor:
        words = [self.vectors(text) for text in texts]
        chunks = max(1, math.ceil(max(map(len, words)) / CHUNK))
        start, end = self.transformer.tokens.weight[:2]
        rows = []
        for vectors in words:
            padded = torch.stack([*vectors, *[end] * (chunks * CHUNK - len(vectors))])
            rows += [torch.cat([start[None], chunk, end[None]]) for chunk in padded.chunk(chunks)]
        encoded = self.transformer(torch.stack(rows))
        return encoded.reshape(len(texts), -1, WIDTH)

    def vectors(self, text: str) -> list[Tensor]:
        """One vector a word, or those of an embedding of that name."""
        found = []
        for word in text.replace(",", " , ").split():
            embedding = model_hijack.embedding_db.word_embeddings.get(word)
            number = 2 + zlib.crc32(word.lower().encode()) % (VOCABULARY - 2)
            found += self.transformer.tokens.weight[number, None] if embedding is None else embedding.vectors
        return found


# --- images -----------------------------------------------------------------------------------------------------------


class ResBlock(nn.Module):
    def __init__(self, channels: int, out: int):
        super().__init__()
        self.in_layers = nn.Sequential(GroupNorm(4, channels), nn.SiLU(), Conv2d(channels, out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), Linear(WIDTH, out))
        self.out_layers = nn.Sequential(GroupNorm(4, out), nn.SiLU(), nn.Dropout(0.0), Conv2d(out, out, 3, padding=1))
        self.skip_connection = nn.Identity() if channels == out else Conv2d(channels, out, 1)

    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        hidden = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(hidden)


class CrossAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.to_out = nn.Sequential(Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return self.to_out(attention(self.to_q(x), self.to_k(context), self.to_v(context)))


class TransformerBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.attn1 = LayerNorm(WIDTH), CrossAttention()
        self.norm2, self.attn2 = LayerNorm(WIDTH), CrossAttention()

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        normed = self.norm1(x)
        x = x + self.attn1(normed, normed)
        return x + self.attn2(self.norm2(x), context)


class SpatialTransformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = GroupNorm(4, WIDTH)
        self.proj_in = Conv2d(WIDTH, WIDTH, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock()])
        self.proj_out = Conv2d(WIDTH, WIDTH, 1)

    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        rows = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)
        for block in self.transformer_blocks:
            rows = block(rows, context)
        return x + self.proj_out(rows.transpose(1, 2).reshape(x.shape))


def waves(numbers: Tensor) -> Tensor:
    """Numbers up to some thousands to vectors ``[..., WIDTH]``."""
    angles = numbers.float()[..., None] * torch.exp(torch.linspace(0, -math.log(10000), WIDTH // 2))
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class UNet(nn.Module):
    """Most of what it predicts is its input, so that noise falls as it should, to an image of middling contrast."""

    def __init__(self):
        super().__init__()
        self.time_embed = nn.Sequential(Linear(WIDTH, WIDTH), nn.SiLU(), Linear(WIDTH, WIDTH))
        self.input_blocks = nn.ModuleList(
            [
                nn.ModuleList([Conv2d(4, WIDTH, 3, padding=1)]),
                nn.ModuleList([ResBlock(WIDTH, WIDTH), SpatialTransformer()]),
            ]
        )
        self.middle_block = nn.ModuleList([ResBlock(WIDTH, WIDTH)])
        self.output_blocks = nn.ModuleList([nn.ModuleList([ResBlock(2 * WIDTH, WIDTH), SpatialTransformer()])])
        self.out = nn.Sequential(GroupNorm(4, WIDTH), nn.SiLU(), Conv2d(WIDTH, 4, 3, padding=1))

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor, vector: Tensor | None = None) -> Tensor:
        emb = self.time_embed(waves(timesteps))
        if vector is not None:
            emb = emb + vector
        entered = self.input_blocks[0][0](x)
        hidden = entered
        for block in [*self.input_blocks[1], *self.middle_block]:
            hidden = block(hidden, emb, context)
        hidden = torch.cat([hidden, entered], dim=1)
        for block in self.output_blocks[0]:
            hidden = block(hidden, emb, context)
        return 0.7 * (x + self.out(hidden))


class DiffusionWrapper(nn.Module):
    """Conditions by name to the UNet's arguments. ``c_concat`` is handed over by every caller, and unused here."""

    conditioning_key = "crossattn"

    def __init__(self):
        super().__init__()
        self.diffusion_model = UNet()

    def forward(self, x, t, c_concat, c_crossattn=None, crossattn=None, vector=None) -> Tensor:
        if len(c_concat[0]) < len(x):
            raise ValueError(f"image conditioning of {len(c_concat[0])} rows for {len(x)}")
        return self.diffusion_model(x, t, crossattn if c_crossattn is None else torch.cat(c_crossattn, dim=1), vector)


@dataclass(frozen=True)
class CheckpointInfo:
    name: str


class LatentDiffusion(nn.Module):
    """The model. ``parameterization`` says whether the UNet predicts noise (eps) or velocity (v)."""

    cond_stage_key = "txt"
    is_sdxl = is_sd3 = False

    def __init__(self, family: str):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.add_text_encoder(TextEncoder())
            self.model = DiffusionWrapper()
            for layer in self.modules():
                if isinstance(layer, (GroupNorm, LayerNorm)):
                    nn.init.normal_(layer.weight, 1.0, 0.2)
                    nn.init.normal_(layer.bias, 0.0, 0.1)
                elif isinstance(layer, (Linear, Conv2d)):
                    nn.init.normal_(layer.weight, 0.0, layer.weight[0].numel() ** -0.5)
            self.pixels = 0.12 * torch.randn(3 * 8 * 8, 4)
        self.parameterization = "v" if family == "sd2v" else "eps"
        self.sd_checkpoint_info = CheckpointInfo(f"tiny-{family}")
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        self.alphas_cumprod = (1 - betas).cumprod(0).float()
        self.requires_grad_(False)

    def add_text_encoder(self, encoder: TextEncoder) -> None:
        self.cond_stage_model = encoder

    def text_layers(self) -> Iterator[tuple[str, nn.Module]]:
        """The text encoder's layers by the names that LoRAs find them by."""
        for path, layer in self.cond_stage_model.named_modules():
            yield path.replace(".", "_"), layer

    def get_learned_conditioning(self, texts: SdConditioning) -> Any:
        return self.cond_stage_model(texts)

    def apply_model(self, x: Tensor, t: Tensor, cond: dict[str, Any]) -> Tensor:
        return self.model(x, t, **cond)

    def tile(self, tiling: bool) -> None:
        """Let the image's edges meet, or not."""
        for layer in self.model.modules():
            if isinstance(layer, Conv2d):
                layer.padding_mode = "circular" if tiling else "zeros"

    def decode_first_stage(self, latents: Tensor) -> Tensor:
        """``[B, 4, h, w]`` to pixels ``[B, 3, 8 h, 8 w]`` in -1 to 1: each latent pixel is a patch of its own."""
        return F.pixel_shuffle(torch.einsum("pc, bchw -> bphw", self.pixels, latents), 8)

    def encode_first_stage(self, pixels: Tensor) -> Tensor:
        """The latents whose patches come closest."""
        inverse = torch.linalg.pinv(self.pixels)
        return torch.einsum("cp, bphw -> bchw", inverse, F.pixel_unshuffle(pixels, 8))


class DiffusionEngine(LatentDiffusion):
    """The model after SDXL's manner: conditionings are dicts, of the tokens' vectors and one for text and image size.

    An empty negative prompt is all zeros there.
    """

    is_sdxl = True

    def add_text_encoder(self, encoder: TextEncoder) -> None:
        self.conditioner = nn.Module()
        self.conditioner.embedders = nn.ModuleList([encoder])

    def text_layers(self) -> Iterator[tuple[str, nn.Module]]:
        for path, layer in self.conditioner.embedders.named_modules():
            yield path.replace(".", "_"), layer

    def get_learned_conditioning(self, texts: SdConditioning) -> dict[str, Tensor]:
        crossattn = self.conditioner.embedders[0](texts)
        if texts.is_negative_prompt and not any(texts):
            crossattn = torch.zeros_like(crossattn)
        size = waves(torch.tensor([texts.width or 1024, texts.height or 1024])).sum(dim=0)
        return {"crossattn": crossattn, "vector": crossattn.mean(dim=1) + size}


FAMILIES = {"sd1": LatentDiffusion, "sd2v": LatentDiffusion, "sdxl": DiffusionEngine}


model_data = SimpleNamespace(sd_model=None)


def load_model(family: str) -> LatentDiffusion:
    """The model with the host's names on its layers, and the conditioning of the empty prompt."""
    model = FAMILIES[family](family)
    model.network_layer_mapping = dict(model.text_layers())
    for path, layer in model.model.named_modules():
        model.network_layer_mapping[path.replace(".", "_")] = layer
    for name, layer in model.network_layer_mapping.items():
        layer.network_layer_name = name
    empty = model.get_learned_conditioning(SdConditioning([""]))
    model.cond_stage_model_empty_prompt = empty["crossattn"] if model.is_sdxl else empty
    model_data.sd_model = model
    return model
