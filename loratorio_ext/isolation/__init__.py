"""One LoRA at a time, or many row by row, in a torch model whose weights stay untouched."""

from loratorio_ext.isolation.batches import BatchedCalls, IsolatedCalls
from loratorio_ext.isolation.branches import Branch, Delta, LowRank
from loratorio_ext.isolation.rows import Isolation

__all__ = ["BatchedCalls", "Branch", "Delta", "IsolatedCalls", "Isolation", "LowRank"]
