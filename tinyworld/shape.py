"""The measures of this world's model; `model` makes it."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
LATENT = 16  # latents are 4 x 16 x 16, pictures 3 x 128 x 128
CHANNELS = (64, 64)  # of the UNet's levels, with attention at all but the finest and in the middle
RESNETS = 2  # of a level
HEADS = 2
PREDICTION = "epsilon"
