"""Loads the tiny world's pipeline in diffusers, offline."""

from diffusers import DDIMScheduler, StableDiffusionPipeline

import model
import shape


def pipeline() -> StableDiffusionPipeline:
    """The base model, with DDIM; pictures are of `8 * LATENT` pixels a side."""
    file = str(shape.WEIGHTS / "tinyworld.safetensors")
    options = {"config": str(shape.WEIGHTS), "local_files_only": True, "safety_checker": None}
    pipe = StableDiffusionPipeline.from_single_file(file, tokenizer=model.tokenizer(), **options)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe
