"""Random checkpoints of the families that Forge Neo knows, in sizes that fit a test, and LoRA files for them.

Run by the host's own Python in the host's folder, with the host's own classes::

    cd NEO; venv/bin/python EXTENSION/tests/live/neo_checkpoints.py flux --checkpoints FOLDER --loras FOLDER
"""

import argparse
import importlib.util
import sys
from math import prod
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(Path.cwd()), str(Path.cwd() / "modules_forge" / "packages")]
FAMILIES = ("sdxl", "flux", "schnell", "zimage", "qwen", "chroma", "klein", "lumina", "anima", "ernie")

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
    from backend.nn import anima, chroma, clip, ernie, flux, lumina, qwen, t5, unet, vae, wan_vae
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
    }[family]

    def clip_of(name):
        config = CLIPTextConfig.from_pretrained(str(huggingface / repository / name))
        return clip.IntegratedCLIP(CLIPTextModel, config, add_text_projection=True)

    def config_of(name):
        return loader.read_arbitrary_config(str(huggingface / repository / name))

    def kl(kind=vae.IntegratedAutoencoderKL):
        return kind.from_config(kind.load_config(str(huggingface / repository / "vae")))

    def wan():
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
        "qwen": (qwen.QwenImageTransformer2DModel, "qwen25_7b.", llama.Qwen25_7BVLI, wan),
        "klein": (
            flux.IntegratedFluxTransformer2DModel,
            "qwen3_4b.transformer.",
            llama.Qwen3_4B,
            lambda: kl(vae.AutoencoderKLFlux2),
        ),
        "anima": (anima.Anima, "qwen3_06b.transformer.", llama.Qwen3_06B, wan),
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


MODULES = {"text_encoders.qwen3_4b.transformer.": "qwen3.", "text_encoders.gemma2_2b.transformer.": "gemma2."}
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


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("--checkpoints", type=Path, required=True)
    parser.add_argument("--loras", type=Path, required=True)
    arguments = parser.parse_args()
    sys.argv = [sys.argv[0], "--cpu", "--force-fp32"]
    torch.set_num_threads(1)

    import modules_forge.initialization  # noqa: F401  (the host's own packages come first)
    from backend import operations
    from safetensors.torch import save_file

    small = small_families()
    small.shrink(arguments.family)
    generator = torch.Generator().manual_seed(0)
    with operations.using_forge_operations(device="cpu", dtype=torch.float32):
        parts = parts_of(arguments.family, small.MODELS)
    state = {}
    for prefix, module in parts.items():
        state |= random_weights(prefix, module, generator)
    save_file(as_published(arguments.family, state), arguments.checkpoints / f"small-{arguments.family}.safetensors")
    for name, rank, layers, with_text in (("a", 4, 1, True), ("b", 8, 2, False), ("c", 2, 3, True)):
        save_file(lora(state, parts, generator, rank, layers, with_text), arguments.loras / f"{name}.safetensors")


if __name__ == "__main__":
    main()
