"""Places are settled early: LoRAs' divergences carried over the steps.

(Not in the paper, where each step stands for itself.)
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from loratorio_ext.core.methods import ComposedStep, LoRAtorio, Plan, Predictions


class Momentum:
    """``method`` with each LoRA's relative divergence in a patch as an exponential mean over the steps: ``momentum`` of
    what it was before, and the rest of this step's.

    Who is selected is decided by this step's divergence. A LoRA that was not evaluated in a step keeps what is known of
    it; one that took no part begins anew. One object serves one sampling pass.
    """

    def __init__(self, method: LoRAtorio, momentum: float):
        self.method, self.momentum = method, momentum
        self.members: tuple[int, ...] = ()
        self.before: dict[int, Tensor] = {}
        """As it was after the step before, so that a step may be combined twice."""
        self.now: dict[int, Tensor] = {}

    def plan(self, step: int, n: int, members: Sequence[int] | None = None, placed: bool = False) -> Plan:
        plan = self.method.plan(step, n, members, placed)
        known = self.before | self.now
        self.members, self.now = plan.members, {}
        self.before = {lora: known[lora] for lora in plan.members if lora in known}
        return plan

    def selects(self, n: int) -> bool:
        return self.method.selects(n)

    def select(self, predictions: Predictions) -> Tensor | None:
        return self.method.select(predictions)

    def combine(self, predictions: Predictions) -> ComposedStep:
        if not len(predictions.eps):
            return self.method.combine(predictions)
        among = range(len(self.members)) if predictions.among is None else predictions.among
        latest = self.method.relative_divergence(predictions)
        self.now = {self.members[position]: self.carried(position, each) for position, each in zip(among, latest)}
        return self.method.combine(replace(predictions, relative=torch.stack(list(self.now.values()))))

    def carried(self, position: int, latest: Tensor) -> Tensor:
        """One LoRA's relative divergence ``[R, h, w]``."""
        before = self.before.get(self.members[position])
        return latest if before is None else self.momentum * before + (1 - self.momentum) * latest
