"""What model calls cost: how many, of how many rows, in what time."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch


class Tally:
    """Model calls as they are made. The device may run behind, so that only it can say how long one took."""

    def __init__(self):
        self.sizes: list[int] = []
        """Rows of each call."""
        self.alone = 0
        """Rows, of all calls, on which one LoRA acted alone."""
        self._took: list[tuple] = []

    @contextmanager
    def call(self, loras: Sequence[int]) -> Iterator[None]:
        """Around a model call, of which each row is that of one of ``loras``: an index, or below 0 for none or all."""
        on_cuda = torch.cuda.is_available()

        def now():
            if not on_cuda:
                return time.perf_counter()
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event

        start = now()
        yield
        self._took.append((start, now()))
        self.sizes.append(len(loras))
        self.alone += sum(lora >= 0 for lora in loras)

    @property
    def seconds(self) -> float:
        """How long all calls took, from each one's beginning to its end."""
        if not self._took or isinstance(self._took[0][0], float):
            return sum(end - start for start, end in self._took)
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in self._took) / 1000
