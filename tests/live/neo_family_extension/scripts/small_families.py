"""Lets Forge Neo load families of models in sizes that fit a test: the text encoders' widths, which are written in the
host, and for some families the diffusion model's own, which the host takes from what it detects.

Which family it is says the environment variable LORATORIO_FAMILY; without it nothing is changed.
"""

import os
from dataclasses import replace
from pathlib import Path

LLM = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
"""Widths of the language models that encode prompts; their depth stays, since engines ask for layers by number."""
T5 = {"d_model": 64, "d_ff": 128, "d_kv": 32, "num_heads": 2, "num_layers": 2}
CLIP_LAYERS = 2
EYES = {"num_heads": 2, "hidden_size": 64, "intermediate_size": 64, "depth": 1, "deepstack_visual_indexes": [0]}
"""Of one of the language models, which looks at pictures, too."""

FLUX = {
    "in_channels": 16,
    "out_channels": 16,
    "hidden_size": 128,
    "num_heads": 1,
    "axes_dim": [16, 56, 56],
    "theta": 10000,
    "patch_size": 2,
    "mlp_ratio": 4.0,
    "depth": 2,
    "depth_single_blocks": 2,
    "qkv_bias": True,
    "context_in_dim": 64,
    "vec_in_dim": 768,
}
LUMINA = {
    "patch_size": 2,
    "in_channels": 16,
    "dim": 256,
    "cap_feat_dim": 64,
    "n_layers": 2,
    "qk_norm": True,
    "n_heads": 2,
    "n_kv_heads": 2,
    "axes_lens": [1536, 512, 512],
}
MODELS = {
    "flux": {"guidance_embed": True, **FLUX},
    "schnell": {"guidance_embed": False, **FLUX},
    "zimage": LUMINA
    | {"axes_dims": [32, 48, 48], "rope_theta": 256.0, "ffn_dim_multiplier": 8 / 3}
    | {"z_image_modulation": True, "time_scale": 1000.0, "pad_tokens_multiple": 32},
    "lumina": LUMINA | {"axes_dims": [32, 48, 48], "rope_theta": 10000.0, "ffn_dim_multiplier": 4.0},
    "qwen": {"in_channels": 64, "num_layers": 2, "num_attention_heads": 1, "joint_attention_dim": 64},
    "chroma": FLUX
    | {"in_channels": 64, "out_channels": 64, "in_dim": 64, "out_dim": 128, "hidden_dim": 64, "n_layers": 2}
    | {"txt_ids_dims": [], "vec_in_dim": None},
    "klein": FLUX
    | {"in_channels": 128, "out_channels": 128, "axes_dim": [32, 32, 32, 32], "theta": 2000, "patch_size": 1}
    | {"mlp_ratio": 3.0, "qkv_bias": False, "vec_in_dim": None, "context_in_dim": 3 * 64, "guidance_embed": False}
    | {"global_modulation": True, "mlp_silu_act": True, "ops_bias": False, "default_ref_method": "index"}
    | {"ref_index_scale": 10.0, "txt_ids_dims": [3]},
    "wan": {"model_type": "t2v", "in_dim": 16, "out_dim": 16, "dim": 128, "num_heads": 1, "num_layers": 2}
    | {"ffn_dim": 256, "text_dim": 64},
    "anima": {"in_channels": 16, "out_channels": 16, "patch_spatial": 2, "patch_temporal": 1, "model_channels": 256}
    | {"crossattn_emb_channels": 64, "adaln_lora_dim": 64, "num_blocks": 2, "num_heads": 2},
    "krea": {"features": 256, "tdim": 64, "heads": 2, "kvheads": 1, "layers": 2, "txtdim": 64, "txtheads": 2}
    | {"txtkvheads": 2},
    "ernie": {"hidden_size": 256, "num_attention_heads": 2, "num_layers": 2, "ffn_hidden_size": 256}
    | {"text_in_dim": 64, "in_channels": 128, "out_channels": 128, "patch_size": 1},
}
"""Arguments of the host's own classes."""

DETECTED = {
    "zimage": {"image_model": "lumina2", "dim": 3840},
    "lumina": {"image_model": "lumina2", "dim": 2304},
    "qwen": {"image_model": "qwen_image"},
    "chroma": {"image_model": "chroma"},
    "klein": {"image_model": "flux2", "hidden_size": 3072},
    "wan": {"image_model": "wan2.1", "model_type": "t2v"},
    "anima": {"image_model": "anima"},
    "krea": {"image_model": "krea2"},
    "ernie": {"image_model": "ernie"},
}
"""What the host is told that it has found in a checkpoint whose own sizes it would not know."""


MADE_LIKE = {"rectified": "sdxl", "kontext": "flux", "qwen-edit": "qwen"}
"""What the host tells from another family by the checkpoint's name."""


class Hidden(dict):
    """A configuration that the host may choose a class by, and not compare with the class's sizes."""

    def __contains__(self, key):
        return False


def small_encoders():
    import transformers
    from backend import loader
    from backend.nn.llm import llama

    read = loader.read_arbitrary_config

    def small_config(directory):
        config = read(directory)
        return config | T5 if "d_ff" in config else Hidden(config)

    loader.read_arbitrary_config = small_config
    for name, kind in list(vars(llama).items()):
        if isinstance(kind, type) and {"hidden_size", "num_hidden_layers"} <= {
            each.name for each in getattr(kind, "__dataclass_fields__", {}).values()
        }:
            setattr(llama, name, lambda kind=kind: replace(kind(), **LLM))
    if hasattr(llama, "QWEN3VL_VISION"):
        llama.QWEN3VL_VISION = {**llama.QWEN3VL_VISION, **EYES}
    width, heads, adapter = LLM["hidden_size"], LLM["num_attention_heads"], llama.LLMAdapter
    llama.LLMAdapter = lambda: adapter(width, width, width, num_layers=2, num_heads=heads)
    from_pretrained = transformers.CLIPTextConfig.from_pretrained

    def shallow(path):
        config = from_pretrained(path)
        config.num_hidden_layers = CLIP_LAYERS
        return config

    transformers.CLIPTextConfig.from_pretrained = shallow
    elsewhere = str(Path(loader.HF) / "black-forest-labs" / "FLUX.1-dev" / "tokenizer_2")
    t5 = transformers.T5TokenizerFast.from_pretrained
    transformers.T5Tokenizer.from_pretrained = transformers.T5TokenizerFast.from_pretrained = lambda path: t5(
        path if (Path(path) / "tokenizer.json").exists() else elsewhere
    )
    vision = llama.qwen_vl.Qwen2VLVisionTransformer
    llama.qwen_vl.Qwen2VLVisionTransformer = lambda hidden_size, output_hidden_size: vision(
        64, output_hidden_size, 64, num_heads=2, num_layers=1
    )


def small_model(family):
    if family not in DETECTED:
        return
    from huggingface_guess import detection

    known = detection.model_config_from_unet_config

    def named(_config, state_dict=None):
        guess = known(dict(DETECTED[family]), state_dict)
        guess.unet_config = dict(MODELS[family])
        return guess

    detection.detect_unet_config = lambda state_dict, prefix: dict(DETECTED[family])
    detection.model_config_from_unet_config = named


def shrink(family):
    """Let the host take checkpoints of this family in the sizes of the tests."""
    small_encoders()
    small_model(MADE_LIKE.get(family, family))


if os.environ.get("LORATORIO_FAMILY"):
    shrink(os.environ["LORATORIO_FAMILY"])
