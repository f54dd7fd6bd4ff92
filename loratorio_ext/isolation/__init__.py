"""One LoRA at a time, or many row by row, in a torch model whose weights stay untouched."""

from loratorio_ext.isolation.batches import ROWS_OF_A_POOL, BatchedCalls, IsolatedCalls, Row
from loratorio_ext.isolation.branches import Branch, Delta, LowRank, in_main_memory, is_finite, is_inert, scaled
from loratorio_ext.isolation.memory import CudaMemory
from loratorio_ext.isolation.rows import Isolation, uncompiled
from loratorio_ext.isolation.tally import Tally

__all__ = [
    "ROWS_OF_A_POOL",
    "BatchedCalls",
    "Branch",
    "CudaMemory",
    "Delta",
    "IsolatedCalls",
    "Isolation",
    "LowRank",
    "Row",
    "Tally",
    "in_main_memory",
    "is_finite",
    "is_inert",
    "scaled",
    "uncompiled",
]
