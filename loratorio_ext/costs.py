"""What the steps of a composition cost before they are made, in rows of the model. No host is needed."""

from collections.abc import Sequence

from loratorio_ext.claims import Claim
from loratorio_ext.core import Reselection, method_from
from loratorio_ext.settings import Settings


def rows_by_step(settings: Settings, claims: Sequence[Claim], steps: int, cond: int = 1, uncond: int = 1) -> list[int]:
    """The model's rows in each of the sampler's ``steps`` model calls, for LoRAs with these ``claims``.

    ``cond``, ``uncond``: rows of a plain step with the prompts, and with the negative prompts.
    """
    method, rows = method_from(settings), []
    for step in range(steps):
        progress = step / steps
        if not claims or not settings.composes_at(progress):
            rows.append(cond + uncond)
            continue
        members = [index for index, claim in enumerate(claims) if claim.acts_at(progress)]
        plan = method.plan(step, len(claims), members, any(claims[index].placed for index in members))
        isolated = len(plan.isolated)
        if isinstance(method, Reselection) and step % settings.reselect_every and settings.top_k:
            isolated = min(isolated, settings.top_k)
        rows.append(cond + uncond + isolated * (cond + plan.uncond * uncond))
    return rows
