"""Random checkpoints of the families that Forge Neo knows, in sizes that fit a test, and LoRA files for them.

Run by the host's own Python in the host's folder, with the host's own classes::

    cd NEO; venv/bin/python EXTENSION/tests/live/neo_checkpoints.py flux --checkpoints FOLDER --loras FOLDER

Of Flux also with the diffusion model in ``--storage`` of fewer bits: ``float8`` (scaled), or ``gguf``, which takes text
encoders and VAE from files of their own beside it.
"""

import argparse
import importlib.util
import sys
from math import prod
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(Path.cwd()), str(Path.cwd() / "modules_forge" / "packages")]
FAMILIES = ("sdxl", "flux", "schnell", "zimage", "qwen", "chroma", "klein", "lumina", "anima", "ernie", "wan", "krea")

SDXL = {  # what the host knows the family by, all levels equally wide
    "in_channels": 4,
    "model_channels": 320,
    "out_channels": 4,
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 1, 1],
    "num_head_channels": 64,
    "use_spatial_transformer": True,
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "transformer_depth_middle": 10,
    "context_dim": 2048,
    "use_linear_in_transformer": True,
    "num_classes": "sequential",
    "adm_in_channels": 2816,
}


def small_families():
    """The module of the tests' extension that holds the sizes."""
    path = HERE / "neo_family_extension" / "scripts" / "small_families.py"
    spec = importlib.util.spec_from_file_location("small_families", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parts_of(family, models):
    """``{prefix in the checkpoint: a module of the host's}``; the diffusion model first, then text encoders, last the
    VAE."""
    from backend import loader
    from backend.nn import anima, chroma, clip, ernie, flux, krea, lumina, qwen, t5, unet, vae, wan, wan_vae
    from backend.nn.llm import llama
    from transformers import CLIPTextConfig, CLIPTextModel

    huggingface = Path(loader.HF)
    repository = {
        "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
        "flux": "black-forest-labs/FLUX.1-dev",
        "schnell": "black-forest-labs/FLUX.1-schnell",
        "zimage": "Tongyi-MAI/Z-Image-Turbo",
        "qwen": "Qwen/Qwen-Image",
        "chroma": "Chroma",
        "klein": "black-forest-labs/FLUX.2-klein-4B",
        "lumina": "neta-art/Neta-Lumina",
        "anima": "circlestone-labs/Anima",
        "ernie": "baidu/ERNIE-Image",
        "wan": "Wan-AI/Wan2.1-T2V-14B",
        "krea": "krea/Krea-2-Raw",
    }[family]

    def clip_of(name):
        config = CLIPTextConfig.from_pretrained(str(huggingface / repository / name))
        return clip.IntegratedCLIP(CLIPTextModel, config, add_text_projection=True)

    def config_of(name):
        return loader.read_arbitrary_config(str(huggingface / repository / name))

    def kl(kind=vae.IntegratedAutoencoderKL):
        return kind.from_config(kind.load_config(str(huggingface / repository / "vae")))

    def of_videos():
        return wan_vae.WanVAE.from_config(wan_vae.WanVAE.load_config(str(huggingface / repository / "vae")))

    dit, config = "model.diffusion_model.", models.get(family)
    if family == "sdxl":
        return {
            dit: unet.IntegratedUNet2DConditionModel.from_config(SDXL),
            "clip_l.": clip_of("text_encoder"),
            "clip_g.": clip_of("text_encoder_2"),
            "first_stage_model.": kl(),
        }
    if family in ("flux", "schnell"):
        return {
            dit: flux.IntegratedFluxTransformer2DModel(**config),
            "text_encoders.clip_l.": clip_of("text_encoder"),
            "text_encoders.t5xxl.": t5.IntegratedT5(config_of("text_encoder_2")),
            "vae.": kl(),
        }
    if family == "chroma":
        model, text = chroma.IntegratedChromaTransformer2DModel(**config), t5.IntegratedT5(config_of("text_encoder"))
        return {dit: model, "text_encoders.t5xxl.": text, "vae.": kl()}
    kinds = {
        "zimage": (lumina.NextDiT, "qwen3_4b.transformer.", llama.Qwen3_4B, kl),
        "lumina": (lumina.NextDiT, "gemma2_2b.transformer.", llama.Gemma2_2B, kl),
        "qwen": (qwen.QwenImageTransformer2DModel, "qwen25_7b.", llama.Qwen25_7BVLI, of_videos),
        "klein": (
            flux.IntegratedFluxTransformer2DModel,
            "qwen3_4b.transformer.",
            llama.Qwen3_4B,
            lambda: kl(vae.AutoencoderKLFlux2),
        ),
        "wan": (wan.WanModel, "umt5xxl.", t5.IntegratedT5, of_videos),
        "krea": (krea.SingleStreamDiT, "qwen3vl_4b.transformer.", llama.Qwen3VL, of_videos),
        "anima": (anima.Anima, "qwen3_06b.transformer.", llama.Qwen3_06B, of_videos),
        "ernie": (
            ernie.ErnieImageModel,
            "ministral3_3b.transformer.",
            llama.Ministral3_3B,
            lambda: kl(vae.AutoencoderKLFlux2),
        ),
    }
    model, prefix, text, decoder = kinds[family]
    return {
        dit: model(**config),
        f"text_encoders.{prefix}": text(config_of("text_encoder")),
        "vae.": decoder(),
    }


def random_weights(prefix, module, generator):
    """Matrices of gain 0.7, norms near one, small biases; what decodes an image is tamer."""
    found = {}
    for name, tensor in module.state_dict().items():
        if not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.ndim < 2 or name.endswith(("gamma", "pad_token")):
            near = 1.0 if name.endswith(("weight", "scale", "gamma", "running_var")) else 0.0
            found[prefix + name] = (near + 0.1 * noise).half()
        elif "embed" in name and "token" in name or name.endswith("shared.weight"):
            found[prefix + name] = (0.7 * noise).half()
        else:
            found[prefix + name] = (0.7 * noise / prod(tensor.shape[1:]) ** 0.5).half()
    return found


def as_published(family, state):
    """Names of the parts as checkpoints of the family have them."""
    if family != "sdxl":
        return state
    from huggingface_guess.model_list import SDXL as Names

    text = {name: value for name, value in state.items() if name.startswith("clip_")}
    rest = {name: value for name, value in state.items() if not name.startswith("clip_")}
    names = Names({})
    return rest | {n: v.contiguous() for n, v in names.process_clip_state_dict_for_saving(text).items()}


MODULES = {
    "text_encoders.qwen3_4b.transformer.": "qwen3.",
    "text_encoders.gemma2_2b.transformer.": "gemma2.",
    "text_encoders.qwen3_06b.transformer.": "qwen3_06b.",
    "text_encoders.qwen3vl_4b.transformer.": "qwen3vl_4b.",
    "text_encoders.ministral3_3b.transformer.": "ministral3.",
}
"""What the host calls a text encoder, where that is not its name in the checkpoint."""


def lora(state, parts, generator, rank, layers, with_text):
    """A LoRA in the names that all hosts of this line read: those of the model's own layers."""
    found = {}
    dit, *texts, _ = parts
    wanted = {dit: "diffusion_model."}
    if with_text:
        for prefix in texts:
            name = prefix.removeprefix("text_encoders.")
            wanted[prefix] = "text_encoders." + MODULES.get(prefix, name)
    for prefix, called in wanted.items():
        number = 0
        for name, weight in state.items():
            if not name.startswith(prefix) or not name.endswith(".weight") or weight.ndim != 2 or "embed" in name:
                continue
            number += 1
            if number % layers:
                continue
            size = 0.5 * float(weight.float().norm()) / (weight.shape[0] * rank * weight.shape[1]) ** 0.5
            base = called + name.removeprefix(prefix).removesuffix(".weight")
            up = size * torch.randn(weight.shape[0], rank, generator=generator)
            found[f"{base}.lora_up.weight"] = up.half()
            found[f"{base}.lora_down.weight"] = torch.randn(rank, weight.shape[1], generator=generator).half()
            found[f"{base}.alpha"] = torch.tensor(float(rank))
    return found


def in_scaled_float8(state, prefix):
    """Large matrices of the diffusion model as 8-bit floats with a scale each, in the way of published files."""
    found = {f"{prefix}scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}  # two: to be computed with as numbers
    for name, tensor in state.items():
        if name.startswith(f"{prefix}double_blocks.") and tensor.ndim == 2:
            scale = tensor.float().abs().max() / 448
            found[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
            found[name.removesuffix("weight") + "scale_weight"] = scale
        else:
            found[name] = tensor
    return found


def write_gguf(path, state):
    """A diffusion model with its matrices in blocks of 8-bit numbers."""
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize

    writer = GGUFWriter(path, "flux")
    for name, tensor in state.items():
        numbers = tensor.float().numpy()
        if tensor.ndim == 2 and tensor.shape[1] % 32 == 0:
            packed = quantize(numbers, GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, packed, raw_dtype=GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_apart(folder, family, state, prefixes):
    """Each part in a file of its own, the diffusion model as GGUF."""
    from safetensors.torch import save_file

    for prefix in prefixes:
        part = {name.removeprefix(prefix): each for name, each in state.items() if name.startswith(prefix)}
        if prefix == prefixes[0]:
            write_gguf(folder / f"small-{family}.gguf", part)
        else:
            part = {name.removeprefix("transformer."): each for name, each in part.items()}
            save_file(part, folder / f"{prefix.strip('.').rpartition('.')[2]}.safetensors")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    small = small_families()
    parser.add_argument("family", choices=(*FAMILIES, *small.MADE_LIKE))
    parser.add_argument("--storage", choices=("half", "float8", "gguf"), default="half")
    parser.add_argument("--checkpoints", type=Path, required=True)
    parser.add_argument("--loras", type=Path, required=True)
    arguments = parser.parse_args()
    sys.argv = [sys.argv[0], "--cpu", "--force-fp32"]
    torch.set_num_threads(1)

    import modules_forge.initialization  # noqa: F401  (the host's own packages come first)
    from backend import operations
    from safetensors.torch import save_file

    family = small.MADE_LIKE.get(arguments.family, arguments.family)
    small.shrink(family)
    generator = torch.Generator().manual_seed(0)
    with operations.using_forge_operations(device="cpu", dtype=torch.float32):
        parts = parts_of(family, small.MODELS)
    state = {}
    for prefix, module in parts.items():
        state |= random_weights(prefix, module, generator)
    if arguments.storage == "gguf":
        write_apart(arguments.checkpoints, arguments.family, state, list(parts))
    else:
        kept = in_scaled_float8(state, next(iter(parts))) if arguments.storage == "float8" else state
        save_file(as_published(family, kept), arguments.checkpoints / f"small-{arguments.family}.safetensors")
    for name, rank, layers, with_text in (("a", 4, 1, True), ("b", 8, 2, False), ("c", 2, 3, True)):
        save_file(lora(state, parts, generator, rank, layers, with_text), arguments.loras / f"{name}.safetensors")


if __name__ == "__main__":
    main()
