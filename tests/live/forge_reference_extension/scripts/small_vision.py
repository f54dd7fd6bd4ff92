"""Looks at pictures for IP-Adapter models of the tests, in the place of a vision model of a gigabyte that would have to
be downloaded: the mean colours of a grid of 4 x 4, and their squares."""

from types import SimpleNamespace

import torch
from modules_forge import supported_preprocessor


class SmallVision:
    def encode_image(self, image):
        """``image [B, H, W, 3]`` in 0 to 1: embeddings ``[B, 96]``."""
        grid = torch.nn.functional.adaptive_avg_pool2d(image.movedim(-1, 1).float(), 4).flatten(1)
        return SimpleNamespace(image_embeds=torch.cat([grid, grid**2], dim=1))


supported_preprocessor.PreprocessorClipVision.load_clipvision = lambda self: SmallVision()
