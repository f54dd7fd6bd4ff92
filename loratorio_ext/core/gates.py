"""The gated sum: every LoRA's difference from the base model is added, through a gate of its own in each patch.

``e = e_0 + sum_i m_i (e_i - e_0)``: the winner of a patch acts in full, the others fade, and LoRAs that agree, or act
in different patches, add up. (Not in the paper, whose weights add up to 1.)
"""

import torch
from torch import Tensor


def gates(
    relative: Tensor,
    sharpness: float,
    chosen: Tensor | None = None,
    prior: Tensor | None = None,
    share: Tensor | None = None,
) -> Tensor:
    """``m_i = (r_i / max_j r_j) ** sharpness`` in every patch: ``[N, B, h, w] -> [N, B, h, w]`` in [0, 1].

    Gates need not add up to 1: two LoRAs that diverge alike are both let through, as when their weights are merged; so
    is one LoRA alone. With sharpness 0 all are 1 (the plain sum of differences). Where a LoRA does not diverge its gate
    is 0, at any other sharpness.

    ``chosen [N, B, h, w]``: who takes part; the others neither act nor compete. ``share [N]`` is a factor on everyone's
    ``r``. ``prior``, which broadcasts to ``[N, B, h, w]``: how far each LoRA may act in a patch; it multiplies the
    gate, and its LoRA competes as far as it may act.
    """
    claim = relative if share is None else relative * share.to(relative).view(-1, 1, 1, 1)
    if chosen is not None:
        claim = claim.masked_fill(~chosen, 0)
    strongest = (claim if prior is None else claim * prior).amax(dim=0)
    unrivalled = strongest == 0
    ratio = claim / torch.where(unrivalled, torch.ones_like(strongest), strongest)
    ratio = torch.where(unrivalled, (claim > 0).to(ratio), ratio.clamp(max=1))
    gate = ratio.pow(sharpness)
    if chosen is not None:
        gate = gate.masked_fill(~chosen, 0)
    return gate if prior is None else gate * prior
