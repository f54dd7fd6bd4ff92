"""In how many model calls the isolated LoRAs are evaluated: all rows in one where memory allows."""

import logging
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from loratorio_ext.isolation.rows import Isolation

logger = logging.getLogger("loratorio")

ROWS_OF_A_POOL = 16
"""At most so many rows of a pool of LoRAs run in one batch: more is no faster, and there may be many of them."""

Batch = tuple[Sequence[int], slice]
"""LoRAs (positions in the group) and the rows of each that one model call holds."""


def split(loras: Sequence[int], rows: slice, limit: int) -> list[Batch]:
    """Batches of at most ``limit`` rows that cover ``rows`` of every LoRA, as few and as even as can be."""
    count = rows.stop - rows.start
    if count > limit:
        starts = range(rows.start, rows.stop, limit)
        return [([lora], slice(start, min(start + limit, rows.stop))) for lora in loras for start in starts]
    calls = -(-len(loras) // (limit // count))
    size = -(-len(loras) // calls)
    return [(loras[start : start + size], rows) for start in range(0, len(loras), size)]


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a model call failed for want of memory; backends other than CUDA only say so in words."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or "out of memory" in str(error).lower()


class BatchedCalls:
    """Evaluates LoRAs in batches of at most ``limit`` rows (None: all at once).

    When memory runs out ``forget()`` frees what was kept for larger batches, the limit is halved, nothing that was
    computed is lost, and the smaller limit stays.
    """

    def __init__(self, forget: Callable[[], None], limit: int | None = None):
        self.forget, self.limit = forget, limit

    def __call__(self, loras: int, rows: int, call: Callable[[Sequence[int], slice], Tensor]) -> Tensor:
        """``[loras, rows, ...]``: what the model says of each row under each of so many LoRAs.

        ``call(positions, part)`` runs the model on rows ``part`` for the LoRAs at these positions, one LoRA's rows
        after the other's.
        """
        results: list[list[Tensor]] = [[] for _ in range(loras)]
        work = deque(split(range(loras), slice(0, rows), self.limit or loras * rows))
        while work:
            positions, part = work.popleft()
            try:
                output = call(positions, part)
            except RuntimeError as error:
                attempted = len(positions) * (part.stop - part.start)
                if attempted == 1 or not is_out_of_memory(error):
                    raise
                self.limit = attempted // 2
                logger.warning("Out of memory with %d rows in a batch: going on with %d", attempted, self.limit)
                work.extendleft(reversed(split(positions, part, self.limit)))
            else:
                for position, predicted in zip(positions, output.chunk(len(positions))):
                    results[position].append(predicted)
                continue
            # Out of the handler, whose traceback would keep the failed call's tensors alive.
            self.forget()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return torch.stack([torch.cat(parts) for parts in results])


class IsolatedCalls(BatchedCalls):
    """Evaluates LoRAs, each alone: around every call the rows of its batch are theirs."""

    def __init__(self, isolation: Isolation, limit: int | None = None):
        super().__init__(isolation.forget, limit)
        self.isolation = isolation

    def __call__(self, group: Sequence[int], rows: int, call: Callable[[Sequence[int], slice], Tensor]) -> Tensor:
        """As `BatchedCalls`, for the LoRAs ``group``; positions count in it."""

        def isolated(positions: Sequence[int], part: slice) -> Tensor:
            with self.isolation.rows([group[position] for position in positions]):
                return call(positions, part)

        return super().__call__(len(group), rows, isolated)
