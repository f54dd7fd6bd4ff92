"""The tiny model in Stable Diffusion 1.x arrangement: its parts, untrained, and the constants they share.

How large it is says `shape`.
"""

from pathlib import Path

from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from shape import CHANNELS, HEADS, LATENT, PREDICTION, RESNETS

# The tokenizer, and beside it the text encoder's configuration, for hosts that want both.
CLIP = Path(__file__).parent / "weights" / "tokenizer"

SCALING = 0.18215  # Stable Diffusion's; the VAE is rescaled so that latents times this have unit variance
TOKENS = 77
START, END = 49406, 49407  # of a prompt; the latter pads it, too
WIDTH = 64  # of the text encoder, and so of the cross attention


def tokenizer() -> CLIPTokenizer:
    """CLIP's own tokenizer."""
    return CLIPTokenizer.from_pretrained(CLIP)


def text_encoder() -> CLIPTextModel:
    """Two layers, 64 wide, CLIP's whole vocabulary."""
    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        hidden_act="quick_gelu",
        bos_token_id=START,
        eos_token_id=END,
    )
    return CLIPTextModel(config)


def vae() -> AutoencoderKL:
    """Factor 8, four latent channels; one ResNet a level in the decoder, none in the encoder."""
    return AutoencoderKL(
        sample_size=8 * LATENT,
        block_out_channels=(64,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=0,
        latent_channels=4,
        scaling_factor=SCALING,
    )


def unet() -> UNet2DConditionModel:
    """Levels with attention, but for the finest, and attention in the middle.

    Stable Diffusion's group norms have 32 groups, whatever the width: with 32 channels they would wipe out every
    channel's mean, and a flat background's colour with it. `attention_head_dim` is the number of heads here.
    """
    coarser = len(CHANNELS) - 1
    return UNet2DConditionModel(
        sample_size=LATENT,
        block_out_channels=CHANNELS,
        down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * coarser),
        up_block_types=(*["CrossAttnUpBlock2D"] * coarser, "UpBlock2D"),
        layers_per_block=RESNETS,
        cross_attention_dim=WIDTH,
        attention_head_dim=HEADS,
    )


def scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=PREDICTION,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def pipeline(unet, text, vae) -> StableDiffusionPipeline:
    """diffusers' pipeline round the parts, with no safety checker."""
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer(),
        unet=unet,
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
