"""The measures of this world's model; `model` makes it."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
LATENT = 16  # latents are 4 x 16 x 16, pictures 3 x 128 x 128
CHANNELS = (64, 64)  # of the UNet's levels, with attention at all but the finest and in the middle
RESNETS = 2  # of a level
HEADS = 2
PREDICTION = "epsilon"
DECODER_STEPS = ((240, 64, 16), (100, 128, 4))  # (steps, crop, batch): crops first, since they are cheap
DECODER_RATE = 2e-4
DECODER_NOISE = (0.02, 0.02)  # on the latents, from and to, so that the decoder bears small errors
