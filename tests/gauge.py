"""A device that tells its memory, where there is none: what `CudaMemory` says, for tests."""


class Gauge:
    """Every row takes ``a_row`` bytes of ``free`` ones; ``batches`` are the sizes of the calls that were measured."""

    def __init__(self, free, a_row=100):
        self.free, self.a_row, self.batches = free, a_row, []

    def measured(self, call):
        output = call()
        self.batches.append(len(output))
        return output, self.a_row * len(output)

    def rows_that_fit(self, bytes_a_row):
        return max(1, int(self.free // bytes_a_row))
