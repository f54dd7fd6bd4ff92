"""What the device says of its memory. Only CUDA does; elsewhere one tries, and makes do with less where it fails."""

from collections.abc import Callable

import torch
from torch import Tensor

BUDGET_ELSEWHERE = 2**32
"""Bytes for stacked matrices where the device does not tell how much memory it has: 4 GiB."""
SHARE_FOR_ROWS = 0.8
"""Of the free memory, for the rows of one batch: the rest is for what fragments it."""


def free_bytes(device: torch.device) -> int:
    """Bytes that PyTorch can still allocate on a CUDA device: the driver's free ones, and those it holds unused."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def budget_for_matrices(device: torch.device) -> int:
    """Bytes that stacked matrices may take on a device: on CUDA, half of what is free now."""
    return free_bytes(device) // 2 if device.type == "cuda" else BUDGET_ELSEWHERE


class CudaMemory:
    """The memory of a CUDA device, as far as rows of a batch go.

    A driver may let a batch that does not fit spill into main memory in place of failing, at a tenth of the speed: so
    what fits must be known before.
    """

    def __init__(self, device: torch.device):
        self.device = device

    @classmethod
    def of(cls, device: torch.device) -> "CudaMemory | None":
        """None for a device that does not tell."""
        return cls(device) if device.type == "cuda" else None

    def measured(self, call: Callable[[], Tensor]) -> tuple[Tensor, int]:
        """What ``call()`` returns, and how many bytes it took on its way beyond those that stay allocated (a model that
        was brought to the device by it, say)."""
        torch.cuda.reset_peak_memory_stats(self.device)
        output = call()
        return output, torch.cuda.max_memory_allocated(self.device) - torch.cuda.memory_allocated(self.device)

    def rows_that_fit(self, bytes_a_row: float) -> int:
        """How many rows a batch may have now, at least one."""
        return max(1, int(SHARE_FOR_ROWS * free_bytes(self.device) // max(bytes_a_row, 1)))
