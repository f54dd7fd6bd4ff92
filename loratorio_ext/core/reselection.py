"""Dynamic selection at a lower price: the whole pool in every n-th step, between them only the LoRAs chosen there.

(The paper selects in every step.)
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from loratorio_ext.core.methods import ComposedStep, LoRAtorio, Plan, Predictions
from loratorio_ext.core.momentum import Momentum


class Reselection:
    """``method`` with its selection made anew in every ``every``-th step only.

    In the steps between, every row (and with ``selection_scope`` "patch" every patch) keeps its own choice, and the
    LoRAs that anyone has chosen are evaluated. A row's result depends on its own choice alone: as long as a new
    selection would choose the same, it is that of a selection in every step. When a LoRA comes or goes the choice is
    made anew, of those that take part now. One object serves one sampling pass.
    """

    def __init__(self, method: LoRAtorio | Momentum, every: int):
        self.method, self.every = method, every
        self.steps = 0
        self.members: tuple[int, ...] = ()
        self.chosen: Tensor | None = None
        self.group: tuple[int, ...] = ()
        """The places among the members of those that are evaluated."""

    def plan(self, step: int, n: int, members: Sequence[int] | None = None, placed: bool = False) -> Plan:
        plan = self.method.plan(step, n, members, placed)
        if plan.members != self.members or self.steps % self.every == 0:
            self.chosen = None
        self.members, self.steps = plan.members, self.steps + 1
        self.group = tuple(range(len(self.members)))
        if self.chosen is not None:
            self.group = tuple(self.chosen.flatten(1).any(dim=1).nonzero().flatten().tolist())
        return replace(plan, isolated=tuple(self.members[position] for position in self.group))

    def combine(self, predictions: Predictions) -> ComposedStep:
        if not self.method.selects(len(self.members)):
            return self.method.combine(predictions)
        if self.chosen is None:
            self.chosen = self.method.select(predictions)
        group = list(self.group)
        of_members = {name: getattr(predictions, name) for name in ("place", "share", "kept")}
        of_group = {name: None if each is None else each[group] for name, each in of_members.items()}
        composed = self.method.combine(replace(predictions, chosen=self.chosen[group], among=self.group, **of_group))
        weights = torch.zeros_like(self.chosen, dtype=composed.weights.dtype)
        weights[group] = composed.weights
        return replace(composed, weights=weights)
