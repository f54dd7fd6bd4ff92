"""A cost that does not grow with the number of LoRAs: refresh a few in a step, reuse the others' differences.

A LoRA's difference from the base model, ``delta_i = eps_i - eps_0``, changes slowly over the steps. The base model is
evaluated afresh in every step, the LoRAs in turn; of the others the last known difference is taken, grown as it used to
grow. (Not in the paper; `docs/speed.md` has what it costs in detail.)
"""

from collections.abc import Sequence
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

    A LoRA that comes or comes back later is evaluated at once, whosever turn it is: nothing is known of it, or what is
    known is of a step long past. The turns, by the LoRAs' own numbers, go on among those that take part.
    """

    def __init__(self, method: Method, refresh: int, warmup: int):
        self.method, self.refresh, self.warmup = method, refresh, warmup
        self.members: tuple[int, ...] = ()
        self.fresh: tuple[int, ...] = ()
        self.evaluated: tuple[int, ...] | None = None
        """The members of the last step that was combined."""
        self.last, self.rounds = -1, 0
        self.calls = -1
        self.cond: dict[int, Known] = {}
        self.uncond: dict[int, Known] = {}

    def plan(self, step: int, n: int, members: Sequence[int] | None = None, placed: bool = False) -> Plan:
        plan = self.method.plan(step, n, members, placed)
        self.calls += 1
        self.members, self.fresh, uncond = plan.members, plan.isolated, plan.uncond
        if self.calls >= self.warmup and self.refresh < len(self.members):
            newcomers = set() if self.evaluated is None else set(self.members) - set(self.evaluated)
            others = [lora for lora in self.members if lora not in newcomers]
            turns, in_a_round_with_uncond = self.take_turns(others, self.refresh - len(newcomers))
            self.fresh = tuple(sorted(newcomers | turns))
            uncond = uncond and (in_a_round_with_uncond or bool(newcomers))
        return replace(plan, isolated=self.fresh, uncond=uncond)

    def take_turns(self, loras: Sequence[int], count: int) -> tuple[set[int], bool]:
        """The next ``count`` of these LoRAs, and whether they begin in a round with unconditional rows."""
        turns = sorted(loras, key=lambda lora: (lora <= self.last, lora))[: max(count, 0)]
        rounds = [self.rounds + (lora <= self.last) for lora in turns]
        if turns:
            self.last, self.rounds = turns[-1], rounds[-1]
        return set(turns), bool(turns) and rounds[0] % 2 == 0

    def combine(self, predictions: Predictions) -> ComposedStep:
        self.evaluated = self.members
        if not self.members:
            return self.method.combine(predictions)
        gain, base = predictions.gain, predictions.host_uncond
        for position, lora in enumerate(self.fresh):
            self.learn(self.cond, lora, predictions.eps[position] - predictions.eps_base)
            if predictions.uncond is not None and base is not None:
                self.learn(self.uncond, lora, (predictions.uncond[position] - base) / gain)

        def moved(host: Tensor, delta: Tensor) -> Tensor:
            """In the host's own type: noise and gain may be of a finer one."""
            return (host + gain * delta).to(host.dtype)

        cond = self.expected(self.cond, predictions.host_cond)
        return self.method.combine(
            replace(
                predictions,
                cond=moved(predictions.host_cond, cond),
                uncond=None if base is None else moved(base, self.expected(self.uncond, base)),
                eps=predictions.eps_base + cond,
            )
        )

    def learn(self, known: dict[int, Known], lora: int, delta: Tensor) -> None:
        before = known.get(lora)
        if before is not None and before.step == self.calls:  # combined before, without unconditional rows
            return
        known[lora] = Known.first(self.calls, delta) if before is None else before.then(self.calls, delta)

    def expected(self, known: dict[int, Known], like: Tensor) -> Tensor:
        """Every member's difference in this model call, ``[N, R, C, H, W]``."""
        nothing = torch.zeros_like(like)
        return torch.stack([known[i].at(self.calls) if i in known else nothing for i in self.members])
