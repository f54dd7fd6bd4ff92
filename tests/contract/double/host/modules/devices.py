"""The accelerator; here never one."""

import torch

device = torch.device("cpu")


def torch_gc() -> None:
    """Free what the accelerator holds in reserve."""
