"""The measures of the tiny world's model; `model` makes it."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
LATENT = 32  # latents are 4 x 32 x 32, pictures 3 x 256 x 256
CHANNELS = (64, 64, 128)  # of the UNet's levels, with attention at all but the finest and in the middle
RESNETS = 1  # of a level
HEADS = 4
PREDICTION = "v_prediction"  # it learns layouts and plain colours faster than noise prediction
DECODER_STEPS = ((700, 64, 16), (80, 128, 4))  # (steps, crop, batch): crops first, since they are cheap
DECODER_RATE = 5e-4
DECODER_NOISE = (0.0, 0.1)  # on the latents, from and to, so that the decoder evens out what the UNet leaves of it
