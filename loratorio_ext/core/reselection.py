"""Dynamic selection at a lower price: the whole pool in every n-th step, between them only the LoRAs chosen there.

(The paper selects in every step.)
"""

from dataclasses import replace

import torch
from torch import Tensor

from loratorio_ext.core.methods import ComposedStep, LoRAtorio, Plan, Predictions
from loratorio_ext.core.patches import patch_similarity


class Reselection:
    """``method`` with its selection made anew in every ``every``-th step only.

    In the steps between, every row (and with ``selection_scope`` "patch" every patch) keeps its own choice, and the
    LoRAs that anyone has chosen are evaluated. A row's result depends on its own choice alone: as long as a new
    selection would choose the same, it is that of a selection in every step. One object serves one sampling pass.
    """

    def __init__(self, method: LoRAtorio, every: int):
        self.method, self.every = method, every
        self.count = self.steps = 0
        self.chosen: Tensor | None = None
        self.group: tuple[int, ...] = ()

    def plan(self, step: int, n: int) -> Plan:
        plan = self.method.plan(step, n)
        if not self.method.selects(n):
            return plan
        if n != self.count or self.steps % self.every == 0:
            self.chosen = None
        self.count, self.steps = n, self.steps + 1
        self.group = plan.isolated
        if self.chosen is not None:
            self.group = tuple(self.chosen.flatten(1).any(dim=1).nonzero().flatten().tolist())
        return replace(plan, isolated=self.group)

    def combine(self, predictions: Predictions) -> ComposedStep:
        if not self.method.selects(self.count):
            return self.method.combine(predictions)
        if self.chosen is None:
            similarity = patch_similarity(predictions.eps, predictions.eps_base, self.method.patch_size)
            self.chosen = self.method.choose(similarity)
        group = list(self.group)
        composed = self.method.combine(replace(predictions, chosen=self.chosen[group]))
        weights = torch.zeros_like(self.chosen, dtype=composed.weights.dtype)
        weights[group] = composed.weights
        return replace(composed, weights=weights)
