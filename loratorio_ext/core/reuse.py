"""A cost that does not grow with the number of LoRAs: refresh a few in a step, reuse the others' differences.

A LoRA's difference from the base model, ``delta_i = eps_i - eps_0``, changes slowly over the steps. The base model is
evaluated afresh in every step, the LoRAs in turn; of the others the last known difference is taken. (Not in the
paper.)
"""

from dataclasses import replace

import torch
from torch import Tensor

from loratorio_ext.core.methods import ComposedStep, Method, Plan, Predictions


class InTurn:
    """``method`` with ``refresh`` LoRAs evaluated in a step, after ``warmup`` steps in which all are.

    A LoRA that was never evaluated yet counts as the base model. One object serves one sampling pass.
    """

    def __init__(self, method: Method, refresh: int, warmup: int):
        self.method, self.refresh, self.warmup = method, refresh, warmup
        self.fresh: tuple[int, ...] = ()
        self.count = self.next = 0
        self.deltas: dict[int, tuple[Tensor, Tensor | None]] = {}

    def plan(self, step: int, n: int) -> Plan:
        plan = self.method.plan(step, n)
        self.count = n
        self.fresh = plan.isolated
        if self.warmup > 0:
            self.warmup -= 1
        elif self.refresh < n:
            self.fresh = tuple(sorted((self.next + i) % n for i in range(self.refresh)))
            self.next = (self.next + self.refresh) % n
        return replace(plan, isolated=self.fresh)

    def combine(self, predictions: Predictions) -> ComposedStep:
        for position, lora in enumerate(self.fresh):
            self.deltas[lora] = self.differences(predictions, position, self.deltas.get(lora))
        gain = predictions.gain
        nothing = torch.zeros_like(predictions.host_cond)
        cond = torch.stack([self.deltas[i][0] if i in self.deltas else nothing for i in range(self.count)])
        uncond = predictions.uncond
        if uncond is not None:
            base = predictions.host_uncond
            known = [self.deltas[i][1] if i in self.deltas else None for i in range(self.count)]
            uncond = torch.stack([base if delta is None else base + gain * delta for delta in known])
        return self.method.combine(
            replace(
                predictions,
                cond=predictions.host_cond + gain * cond,
                uncond=uncond,
                eps=predictions.eps_base + cond,
            )
        )

    @staticmethod
    def differences(predictions: Predictions, position: int, before: tuple | None) -> tuple[Tensor, Tensor | None]:
        """A fresh LoRA's differences from the base, as noise; the unconditional one is kept where not evaluated."""
        cond = predictions.eps[position] - predictions.eps_base
        if predictions.uncond is None or predictions.host_uncond is None:
            return cond, before[1] if before else None
        return cond, (predictions.uncond[position] - predictions.host_uncond) / predictions.gain
