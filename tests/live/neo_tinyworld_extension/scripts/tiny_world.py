"""Lets Forge Neo take the tiny world for what it is, a Stable Diffusion 1.x: which checkpoint is one it tells by widths
that are written in the host, and its tokenizer and the other parts' sizes lie in the host's folders.

The tiny world's folder says the environment variable LORATORIO_TINYWORLD; without it nothing is changed.
"""

import json
import os
from pathlib import Path


def know(weights):
    from huggingface_guess.model_list import SD15

    unet = json.loads((weights / "unet" / "config.json").read_text(encoding="utf-8"))
    widths = {"context_dim": unet["cross_attention_dim"], "model_channels": unet["block_out_channels"][0]}
    SD15.unet_config = SD15.unet_config | widths
    SD15.unet_extra_config = SD15.unet_extra_config | {"num_heads": unet["attention_head_dim"]}
    SD15.huggingface_repo = str(weights)  # an absolute path: the host looks there, not among its own folders


if os.environ.get("LORATORIO_TINYWORLD"):
    know(Path(os.environ["LORATORIO_TINYWORLD"]))
