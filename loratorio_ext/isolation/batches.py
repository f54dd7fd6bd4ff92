"""In how many model calls a step's rows are evaluated: all in one where memory allows."""

import logging
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from loratorio_ext.isolation.memory import CudaMemory
from loratorio_ext.isolation.rows import Isolation, shared_length
from loratorio_ext.isolation.tally import Tally

logger = logging.getLogger("loratorio")

ROWS_OF_A_POOL = 16
"""At most so many rows of a pool of LoRAs run in one batch: more is no faster, and there may be many of them."""

Row = tuple[int, int]
"""Who is to predict (an index of the isolation's LoRAs), and which row of the model's input."""
Call = Callable[[Sequence[Row]], Tensor]
"""Runs the model on such rows: ``[len(rows), ...]``, in their order."""


def pieces(rows: Sequence[Row], size: int) -> list[Sequence[Row]]:
    """Consecutive pieces of this size, the last one maybe shorter."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def split(rows: Sequence[Row], limit: int) -> list[Sequence[Row]]:
    """Batches of at most ``limit`` rows, as few and as even as can be without parting what belongs to one LoRA."""
    unit = shared_length([lora for lora, _ in rows])
    if unit > limit:
        return [piece for of_one_lora in pieces(rows, unit) for piece in pieces(of_one_lora, limit)]
    units = len(rows) // unit
    calls = -(-units // (limit // unit))
    return pieces(rows, unit * -(-units // calls))


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a model call failed for want of memory; backends other than CUDA only say so in words."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or "out of memory" in str(error).lower()


class BatchedCalls:
    """Evaluates rows in batches of at most ``limit`` of them (None: all at once).

    Where the device tells its ``memory``, the first batch holds one LoRA's rows only (most often those of the host's
    own pass, which must fit anyway); it is measured, and tells how many rows fit into what is free. When memory runs
    out all the same, ``forget()`` frees what was kept for larger batches, the limit is halved, nothing that was
    computed is lost, and the smaller limit stays.
    """

    def __init__(self, forget: Callable[[], None], limit: int | None = None, memory: CudaMemory | None = None):
        self.forget, self.limit, self.memory = forget, limit, memory
        self.tally = Tally()

    def __call__(self, rows: Sequence[Row], call: Call) -> Tensor:
        """``[len(rows), ...]``: what the model says of each of at least one row."""
        first = 0 if self.memory is None else shared_length([lora for lora, _ in rows])
        work = deque(filter(None, (rows[:first], rows[first:])))
        results: list[Tensor] = []
        while work:
            batch = work.popleft()
            if self.limit is not None and len(batch) > self.limit:
                work.extendleft(reversed(split(batch, self.limit)))
                continue
            try:
                with self.tally.call([lora for lora, _ in batch]):
                    results.append(self.evaluate(batch, call))
            except RuntimeError as error:
                if len(batch) == 1 or not is_out_of_memory(error):
                    raise
                self.limit = len(batch) // 2
                logger.warning("Out of memory with %d rows in a batch: going on with %d", len(batch), self.limit)
            else:
                continue
            # Out of the handler, whose traceback would keep the failed call's tensors alive.
            work.appendleft(batch)
            self.forget()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return torch.cat(results)

    def evaluate(self, batch: Sequence[Row], call: Call) -> Tensor:
        """One model call; the very first is measured where that is possible, and sets the limit."""
        if self.memory is None:
            return call(batch)
        output, spent = self.memory.measured(lambda: call(batch))
        fitting = self.memory.rows_that_fit(spent / len(batch))
        self.limit = fitting if self.limit is None else min(self.limit, fitting)
        self.memory = None
        logger.debug("%d bytes for %d rows: %d rows in a batch at most", spent, len(batch), self.limit)
        return output


class IsolatedCalls(BatchedCalls):
    """Evaluates rows under their LoRAs: around every call each row of its batch is its LoRA's."""

    def __init__(self, isolation: Isolation, limit: int | None = None, memory: CudaMemory | None = None):
        super().__init__(isolation.forget, limit, memory)
        self.isolation = isolation

    def act_on(self, isolation: Isolation) -> None:
        """Go on with other branches, on the same layers; what is known of memory stays."""
        self.isolation, self.forget = isolation, isolation.forget

    def __call__(self, rows: Sequence[Row], call: Call) -> Tensor:
        """As `BatchedCalls`."""

        def isolated(batch: Sequence[Row]) -> Tensor:
            with self.isolation.rows([lora for lora, _ in batch]):
                return call(batch)

        return super().__call__(rows, isolated)
