"""A cost that does not grow with the number of LoRAs: refresh a few in a step, reuse the others' differences.

A LoRA's difference from the base model, ``delta_i = eps_i - eps_0``, changes slowly over the steps. The base model is
evaluated afresh in every step, the LoRAs in turn; of the others the last known difference is taken, grown as it used to
grow. (Not in the paper; `docs/speed.md` has what it costs in detail.)
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loratorio_ext.core.methods import ComposedStep, Method, Plan, Predictions

TRUST = 0.5
"""How much of the growth seen before is expected to go on: 0 none, 1 all of it."""
LARGEST_GROWTH = 2.0
"""In one step, either way: a guard against differences near zero."""


def norm_of_rows(rows: Tensor) -> Tensor:
    """``[R, C, H, W] -> [R, 1, 1, 1]`` in float32."""
    return rows.float().flatten(1).norm(dim=1).view(-1, 1, 1, 1)


@dataclass(frozen=True)
class Known:
    """A LoRA's difference from the base, ``delta [R, C, H, W]`` as noise, as it was in model call ``step``, and the
    factor by which each row's norm grew in a step until then, ``growth [R, 1, 1, 1]``."""

    step: int
    delta: Tensor
    growth: Tensor

    @classmethod
    def first(cls, step: int, delta: Tensor) -> "Known":
        return cls(step, delta, torch.ones_like(norm_of_rows(delta)))

    def then(self, step: int, delta: Tensor) -> "Known":
        """What is known after a later evaluation."""
        before, now = norm_of_rows(self.delta), norm_of_rows(delta)
        ratio = torch.where((before > 0) & (now > 0), now / before, torch.ones_like(now))
        growth = ratio.pow(1 / (step - self.step)).clamp(1 / LARGEST_GROWTH, LARGEST_GROWTH)
        return Known(step, delta, growth)

    def at(self, step: int) -> Tensor:
        """The difference to be expected in a model call from then on, ``[R, C, H, W]``."""
        return self.delta * self.growth.pow(TRUST * (step - self.step)).to(self.delta.dtype)


class InTurn:
    """``method`` with ``refresh`` LoRAs evaluated in a step, after ``warmup`` steps in which all are.

    Unconditional rows are refreshed in every other round of turns: guidance weighs their differences less. A LoRA that
    was never evaluated yet counts as the base model. One object serves one sampling pass.
    """

    def __init__(self, method: Method, refresh: int, warmup: int):
        self.method, self.refresh, self.warmup = method, refresh, warmup
        self.fresh: tuple[int, ...] = ()
        self.count = self.turns = 0
        self.calls = -1
        self.cond: dict[int, Known] = {}
        self.uncond: dict[int, Known] = {}

    def plan(self, step: int, n: int) -> Plan:
        plan = self.method.plan(step, n)
        self.calls += 1
        self.count = n
        self.fresh, uncond = plan.isolated, plan.uncond
        if self.calls >= self.warmup and self.refresh < n:
            self.fresh = tuple(sorted((self.turns + i) % n for i in range(self.refresh)))
            uncond = uncond and self.turns // n % 2 == 0
            self.turns += self.refresh
        return replace(plan, isolated=self.fresh, uncond=uncond)

    def combine(self, predictions: Predictions) -> ComposedStep:
        gain, base = predictions.gain, predictions.host_uncond
        for position, lora in enumerate(self.fresh):
            self.learn(self.cond, lora, predictions.eps[position] - predictions.eps_base)
            if predictions.uncond is not None and base is not None:
                self.learn(self.uncond, lora, (predictions.uncond[position] - base) / gain)
        cond = self.expected(self.cond, predictions.host_cond)
        uncond = None if base is None else base + gain * self.expected(self.uncond, base)
        return self.method.combine(
            replace(
                predictions,
                cond=predictions.host_cond + gain * cond,
                uncond=uncond,
                eps=predictions.eps_base + cond,
            )
        )

    def learn(self, known: dict[int, Known], lora: int, delta: Tensor) -> None:
        before = known.get(lora)
        if before is not None and before.step == self.calls:  # combined before, without unconditional rows
            return
        known[lora] = Known.first(self.calls, delta) if before is None else before.then(self.calls, delta)

    def expected(self, known: dict[int, Known], like: Tensor) -> Tensor:
        """Every LoRA's difference in this model call, ``[N, R, C, H, W]``."""
        nothing = torch.zeros_like(like)
        return torch.stack([known[i].at(self.calls) if i in known else nothing for i in range(self.count)])
