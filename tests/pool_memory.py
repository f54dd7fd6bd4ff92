"""Prints by how many MB the peak memory of this process grows when a pool of 25 LoRAs is evaluated twice in batches of
five. Its argument is the budget for stacked matrices in MB; without one, there is none.

A program of its own: a peak never goes down again.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import nn

from loratorio_ext.isolation import IsolatedCalls, Isolation, LowRank

POOL, LAYERS, WIDTH, RANK = 25, 12, 768, 48


def peak() -> float:
    """MB of memory that this process has had at most."""
    if sys.platform == "linux":
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    budget = int(float(sys.argv[1]) * 2**20) if len(sys.argv) > 1 else 2**40
    torch.set_num_threads(1)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))).requires_grad_(False)
    names = [name for name, _ in model.named_children()]
    loras = [
        {name: LowRank(torch.randn(RANK, WIDTH), torch.randn(WIDTH, RANK), 1e-4) for name in names} for _ in range(POOL)
    ]
    isolation = Isolation(dict(model.named_children()), loras, budget)
    calls = IsolatedCalls(isolation, limit=10)
    rows = torch.randn(2, 16, WIDTH)

    everything = [(lora, row) for lora in range(POOL) for row in range(len(rows))]

    def call(batch):
        return model(rows[[row for _, row in batch]])

    model(rows.repeat(5, 1, 1))
    before = peak()
    for _ in range(2):
        calls(everything, call)
    print(round(peak() - before, 1))


if __name__ == "__main__":
    main()
