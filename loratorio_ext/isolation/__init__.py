"""One LoRA at a time, or many row by row, in a torch model whose weights stay untouched."""

from loratorio_ext.isolation.batches import ROWS_OF_A_POOL, BatchedCalls, IsolatedCalls
from loratorio_ext.isolation.branches import Branch, Delta, LowRank, in_main_memory
from loratorio_ext.isolation.rows import Isolation

__all__ = [
    "ROWS_OF_A_POOL",
    "BatchedCalls",
    "Branch",
    "Delta",
    "IsolatedCalls",
    "Isolation",
    "LowRank",
    "in_main_memory",
]
