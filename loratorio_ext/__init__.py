"""LoRAtorio: training-free composition of several LoRAs in one image (arXiv 2508.11624)."""

__version__ = "0.1.0"
