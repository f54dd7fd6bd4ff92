"""Tiny random Stable Diffusion checkpoints that an installed WebUI loads like real ones.

Run by the host's own Python, whose model code builds the networks::

    HOST/venv/bin/python tests/live/tiny_checkpoints.py --host HOST --out models/Stable-diffusion sd1 sd2v sdxl

Each family yields ``tiny-FAMILY.safetensors`` and its sidecar ``tiny-FAMILY.yaml``; ``sd1`` and ``sdxl`` also need the
folder ``tiny-clip`` (configuration and tokenizer of a two-layer CLIP text model): its absolute path is in the sidecar.
``sd1deep`` has SD 1.5's four levels, in narrow: what some extensions count on.
``sd15`` is not tiny: ``sd15.safetensors`` has SD 1.5's UNet and text model in full size (4 GB), for timing.
Weights depend on the family and the seed alone. Images are 8 pixels a latent pixel; 64x64 is a good size.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import types
import zlib
from pathlib import Path

import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

CLIP_FOLDER = "tiny-clip"
CLIP_WIDTH = 64
REAL_CLIP_FOLDER = "clip"
REAL_CLIP_WIDTH = 768
OPEN_CLIP_ARCH = "ViT-S-32-alt"  # the smallest text tower that open_clip ships
OPEN_CLIP_WIDTH = 256
VOCABULARY = 49408

# Standard deviation of a drawn weight is GAIN / sqrt(fan_in); the first pattern found in its name counts.
GAINS = {
    "diffusion_model.out.2.weight": 1.5,  # predictions of about unit variance
    "attn2.to_q.weight": 1.5,  # cross-attention sharp enough for the prompt to matter
    "attn2.to_k.weight": 1.5,
    "decoder.conv_out.weight": 0.6,  # pixels well inside [-1, 1]
}


def unet_params(context_dim: int, **extra) -> dict:
    """UNet of two levels, 32 and 64 channels wide. Two res blocks a level: LoRA names assume that stride."""
    return {
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 32,
        "attention_resolutions": [1, 2],
        "num_res_blocks": 2,
        "channel_mult": [1, 2],
        "num_heads": 2,
        "use_spatial_transformer": True,
        "transformer_depth": 1,
        "context_dim": context_dim,
        "use_checkpoint": False,
        "legacy": False,
        **extra,
    }


def vae_params() -> dict:
    """Autoencoder with 4 latent channels and a downscaling of 8."""
    return {
        "embed_dim": 4,
        "monitor": "val/rec_loss",
        "ddconfig": {
            "double_z": True,
            "z_channels": 4,
            "resolution": 256,
            "in_channels": 3,
            "out_ch": 3,
            "ch": 32,
            "ch_mult": [1, 2, 2, 2],
            "num_res_blocks": 1,
            "attn_resolutions": [],
            "dropout": 0.0,
        },
        "lossconfig": {"target": "torch.nn.Identity"},
    }


def latent_diffusion(text_encoder: dict, unet: dict, **extra) -> dict:
    """Sidecar of an SD 1.x or 2.x model."""
    return {
        "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
        "params": {
            "linear_start": 0.00085,
            "linear_end": 0.0120,
            "num_timesteps_cond": 1,
            "timesteps": 1000,
            "first_stage_key": "jpg",
            "cond_stage_key": "txt",
            "image_size": 64,
            "channels": 4,
            "cond_stage_trainable": False,
            "conditioning_key": "crossattn",
            "scale_factor": 0.18215,
            "use_ema": False,
            **extra,
            "unet_config": {
                "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
                "params": {"image_size": 32, **unet},
            },
            "first_stage_config": {"target": "ldm.models.autoencoder.AutoencoderKL", "params": vae_params()},
            "cond_stage_config": text_encoder,
        },
    }


def sd1(clip_folder: Path) -> dict:
    """SD 1.x: noise prediction, CLIP text model."""
    text_encoder = {
        "target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder",
        "params": {"version": str(clip_folder)},
    }
    return latent_diffusion(text_encoder, unet_params(CLIP_WIDTH))


def sd1deep(clip_folder: Path) -> dict:
    """SD 1.x with the levels and blocks of SD 1.5, 32 to 128 channels wide."""
    text_encoder = {
        "target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder",
        "params": {"version": str(clip_folder)},
    }
    depth = {"channel_mult": [1, 2, 4, 4], "attention_resolutions": [4, 2, 1]}
    return latent_diffusion(text_encoder, unet_params(CLIP_WIDTH) | depth)


def sd15(clip_folder: Path) -> dict:
    """SD 1.5 in full size, but for the autoencoder."""
    text_encoder = {
        "target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder",
        "params": {"version": str(clip_folder.with_name(REAL_CLIP_FOLDER))},
    }
    size = {"model_channels": 320, "channel_mult": [1, 2, 4, 4], "attention_resolutions": [4, 2, 1], "num_heads": 8}
    return latent_diffusion(text_encoder, unet_params(REAL_CLIP_WIDTH) | size)


def sd2v(clip_folder: Path) -> dict:
    """SD 2.x: v-prediction, OpenCLIP text model, linear projections around the transformers."""
    text_encoder = {
        "target": "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder",
        "params": {"arch": OPEN_CLIP_ARCH, "version": "", "freeze": True, "layer": "penultimate"},
    }
    unet = unet_params(OPEN_CLIP_WIDTH, use_linear_in_transformer=True)
    return latent_diffusion(text_encoder, unet, parameterization="v")


def sdxl(clip_folder: Path) -> dict:
    """SDXL: both text models side by side, pooled text and sizes in the vector conditioning."""
    encoders = "sgm.modules.encoders.modules"
    diffusion = "sgm.modules.diffusionmodules"

    def embedder(input_key: str, name: str, **params) -> dict:
        return {"is_trainable": False, "input_key": input_key, "target": f"{encoders}.{name}", "params": params}

    sizes = ("original_size_as_tuple", "crop_coords_top_left", "target_size_as_tuple")
    unet = unet_params(
        CLIP_WIDTH + OPEN_CLIP_WIDTH,
        adm_in_channels=OPEN_CLIP_WIDTH + 2 * 256 * len(sizes),
        num_classes="sequential",
        use_linear_in_transformer=True,
        spatial_transformer_attn_type="softmax",
    )
    return {
        "target": "sgm.models.diffusion.DiffusionEngine",
        "params": {
            "scale_factor": 0.13025,
            "disable_first_stage_autocast": True,
            "denoiser_config": {
                "target": f"{diffusion}.denoiser.DiscreteDenoiser",
                "params": {
                    "num_idx": 1000,
                    "weighting_config": {"target": f"{diffusion}.denoiser_weighting.EpsWeighting"},
                    "scaling_config": {"target": f"{diffusion}.denoiser_scaling.EpsScaling"},
                    "discretization_config": {"target": f"{diffusion}.discretizer.LegacyDDPMDiscretization"},
                },
            },
            "network_config": {"target": f"{diffusion}.openaimodel.UNetModel", "params": unet},
            "conditioner_config": {
                "target": "sgm.modules.GeneralConditioner",
                "params": {
                    "emb_models": [
                        embedder("txt", "FrozenCLIPEmbedder", version=str(clip_folder), layer="hidden", layer_idx=1),
                        embedder(
                            "txt",
                            "FrozenOpenCLIPEmbedder2",
                            arch=OPEN_CLIP_ARCH,
                            version="",
                            freeze=True,
                            layer="penultimate",
                            always_return_pooled=True,
                            legacy=False,
                        ),
                        *(embedder(size, "ConcatTimestepEmbedderND", outdim=256) for size in sizes),
                    ]
                },
            },
            "first_stage_config": {
                "target": "sgm.models.autoencoder.AutoencoderKLInferenceWrapper",
                "params": vae_params(),
            },
        },
    }


FAMILIES = {"sd1": sd1, "sd1deep": sd1deep, "sd2v": sd2v, "sdxl": sdxl, "sd15": sd15}


def import_host_models(host: Path) -> None:
    """Put the host's model repositories on ``sys.path``; what they import only for training is stubbed."""
    repositories = host / "repositories"
    sys.path[:0] = [str(repositories / name) for name in ("stable-diffusion-stability-ai", "generative-models")]
    for name, attribute in (("taming.modules.losses.lpips", "LPIPS"), ("sgm.data", "StableDataModuleFromConfig")):
        stub = types.ModuleType(name)
        setattr(stub, attribute, None)
        sys.modules[name] = stub


def clip_text_model(real: bool = False) -> torch.nn.Module:
    """CLIP text model: two layers of width ``CLIP_WIDTH``, or SD 1.5's own size."""
    from transformers import CLIPTextConfig, CLIPTextModel

    width, layers, heads = (REAL_CLIP_WIDTH, 12, 12) if real else (CLIP_WIDTH, 2, 2)
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
        )
    )


def open_clip_text_model() -> torch.nn.Module:
    """OpenCLIP model without its image tower."""
    import open_clip

    model = open_clip.create_model(OPEN_CLIP_ARCH, device="cpu")
    del model.visual
    return model


def write_clip_folder(folder: Path, real: bool = False) -> None:
    """Configuration and tokenizer files; the byte pairs are those of the host's open_clip package."""
    import open_clip

    folder.mkdir(parents=True, exist_ok=True)
    clip_text_model(real).config.save_pretrained(folder)
    archive = Path(open_clip.__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
    merges = gzip.decompress(archive.read_bytes()).decode().split("\n")[1 : VOCABULARY - 512 - 1]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")

    # open_clip's ids are CLIP's; only its names for the two special tokens differ.
    vocabulary = dict(open_clip.tokenizer.SimpleTokenizer().encoder)
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}
    vocabulary[special["bos_token"]] = vocabulary.pop("<start_of_text>")
    vocabulary[special["eos_token"]] = vocabulary.pop("<end_of_text>")
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    special |= {"pad_token": special["eos_token"], "unk_token": special["eos_token"]}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special), encoding="utf-8")


def components(family: str, params: dict) -> dict[str, torch.nn.Module]:
    """Networks of a family by their prefix in its state dict."""
    from ldm.util import instantiate_from_config

    if family == "sdxl":
        unet = params["network_config"]
        text_models = {
            "conditioner.embedders.0.transformer": clip_text_model(),
            "conditioner.embedders.1.model": open_clip_text_model(),
        }
    else:
        unet = params["unet_config"]
        text_models = (
            {"cond_stage_model.transformer": clip_text_model(real=family == "sd15")}
            if family in ("sd1", "sd1deep", "sd15")
            else {"cond_stage_model.model": open_clip_text_model()}
        )
    return {
        "model.diffusion_model": instantiate_from_config(unet),
        "first_stage_model": instantiate_from_config(params["first_stage_config"]),
        **text_models,
    }


def draw(name: str, tensor: torch.Tensor, seed: int) -> torch.Tensor:
    """Random float32 tensor in the place of ``tensor``: it depends on name, shape and seed alone.

    No weight stays zero, and no bias either: layers initialised to zero would hide what feeds them, and emphasis in
    prompts divides by a mean that LayerNorm without a bias would leave at zero.
    """
    generator = torch.Generator().manual_seed(seed * 2**32 + zlib.crc32(name.encode()))
    noise = torch.randn(tensor.shape, generator=generator)
    if tensor.ndim == 0:
        return tensor.float()
    if tensor.ndim == 1:
        return 0.1 * noise + (1.0 if name.endswith("weight") else 0.0)
    if "embedding" in name:
        return 0.5 * noise
    gain = next((gain for pattern, gain in GAINS.items() if pattern in name), 1.0)
    return noise * gain / tensor[0].numel() ** 0.5


def state_dict(family: str, params: dict, seed: int) -> dict[str, torch.Tensor]:
    """Every parameter drawn anew; integer buffers (position ids) and masks as they are."""
    tensors = {}
    for prefix, network in components(family, params).items():
        parameters = {name for name, _ in network.named_parameters()}
        for name, tensor in network.state_dict().items():
            key = f"{prefix}.{name}"
            tensors[key] = draw(key, tensor, seed) if name in parameters else tensor.contiguous()
    return tensors


def write_checkpoint(family: str, folder: Path, seed: int = 0) -> Path:
    """Write one family's checkpoint and sidecar into ``folder``; returns the checkpoint's path."""
    model = FAMILIES[family]((folder / CLIP_FOLDER).resolve())
    path = folder / ("sd15.safetensors" if family == "sd15" else f"tiny-{family}.safetensors")
    save_file(state_dict(family, model["params"], seed), path)
    OmegaConf.save(OmegaConf.create({"model": model}), path.with_suffix(".yaml"))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", default=["sd1"], metavar="FAMILY", help=", ".join(FAMILIES))
    parser.add_argument("--host", type=Path, required=True, help="folder of an installed WebUI")
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    import_host_models(arguments.host)
    write_clip_folder(arguments.out / CLIP_FOLDER)
    if "sd15" in arguments.families:
        write_clip_folder(arguments.out / REAL_CLIP_FOLDER, real=True)
    for family in arguments.families:
        print(write_checkpoint(family, arguments.out, arguments.seed))


if __name__ == "__main__":
    main()
