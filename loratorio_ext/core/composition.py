"""Weights from similarities, and sums from weights (paper, sections on composition and re-centred guidance)."""

import torch
from torch import Tensor

from loratorio_ext.core.selection import top_k_mask

MIN_TEMPERATURE = 1e-6
"""Below any spread of similarities that float32 resolves: keeps SoftMin of equal scores an equal split."""
MIN_SPREAD = 1e-4
"""Of the scores' mean magnitude: scores that differ by less differ by what rounding makes of equal ones."""


def softmin_weights(
    similarity: Tensor,
    temperature: float | Tensor,
    top_k: int | None = None,
    scope: str = "image",
    log_claim: Tensor | None = None,
) -> Tensor:
    """SoftMin over the LoRAs (paper: Omega): the more a LoRA diverges from the base, the more weight it has.

    ``[N, B, h, w] -> [N, B, h, w]``, summing to 1 over N. ``temperature`` is a number or broadcasts to one LoRA's
    ``[B, h, w]``; large ones tend to the plain mean, small ones to winner-takes-all. LoRAs outside the ``top_k``
    (see `top_k_mask`) get weight 0.

    ``log_claim``, which broadcasts to ``[N, B, h, w]``: the logarithm of a factor on each LoRA's weight before they are
    made to sum to 1. Minus infinity is no candidate, weight 0; where nobody is one, all weights are 0.
    """
    if not isinstance(temperature, Tensor) and not temperature > 0:
        raise ValueError(f"temperature must be greater than 0, got {temperature}")
    chosen = top_k_mask(similarity, top_k, scope)
    if log_claim is not None:
        chosen = chosen & (log_claim > -torch.inf)
    similarity = similarity.float()
    if isinstance(temperature, Tensor):
        temperature = temperature.to(similarity)
    lowest = similarity.masked_fill(~chosen, torch.inf).amin(dim=0, keepdim=True)
    logits = (lowest - similarity) / temperature
    if log_claim is not None:
        logits = logits + log_claim
    # Filled once more: SoftMax of nobody is not a number.
    return logits.masked_fill(~chosen, -torch.inf).softmax(dim=0).masked_fill(~chosen, 0)


def relative_divergence(divergence: Tensor, gamma: float) -> Tensor:
    """Divergence measured against the LoRA's own mean over the image.

    ``r = d / mean_k(d)**gamma``; ``[N, B, h, w] -> [N, B, h, w]``. ``gamma`` 0 is the paper's rule, 1 makes a LoRA that
    changes everything no louder than one that changes a corner. A LoRA that diverges nowhere gives zeros.
    """
    divergence = divergence.float()
    mean = divergence.mean(dim=(-2, -1), keepdim=True).clamp(min=0)
    silent = mean == 0
    scale = torch.where(silent, torch.ones_like(mean), mean).pow(gamma)
    return torch.where(silent, torch.zeros_like(divergence), divergence / scale)


def relative_similarity(similarity: Tensor, gamma: float) -> Tensor:
    """`relative_divergence` of ``1 - similarity``, negated so that SoftMin applies unchanged."""
    return -relative_divergence(1 - similarity.float(), gamma)


def adaptive_temperature(score: Tensor, kappa: float, chosen: Tensor | None = None) -> Tensor:
    """``kappa`` times the spread of scores: population standard deviation over N, averaged over an image's patches.

    ``[N, B, h, w] -> [B, 1, 1]``, never zero, and never so small that rounding decides (`MIN_SPREAD`); where ``chosen
    [N, B, h, w]`` is given, of the LoRAs that are chosen in a patch, averaged over the patches where there are several:
    where nobody competes there is no spread. Similarities spread a thousandfold more in late steps than in early ones;
    this keeps the sharpness of SoftMin the same in all of them.
    """
    score = score.float()
    if chosen is None:
        deviation = score.std(dim=0, correction=0)
    else:
        count = chosen.sum(dim=0)
        several = (count > 1).float().mean(dim=(-2, -1), keepdim=True)
        count = count.clamp(min=1)
        mean = score.masked_fill(~chosen, 0).sum(dim=0) / count
        deviation = ((score - mean).masked_fill(~chosen, 0).square().sum(dim=0) / count).sqrt()
        deviation = deviation / torch.where(several == 0, torch.ones_like(several), several)
    temperature = (kappa * deviation.mean(dim=(-2, -1), keepdim=True)).clamp(min=MIN_TEMPERATURE)
    return torch.maximum(temperature, MIN_SPREAD * score.abs().mean(dim=(0, -2, -1)).view(-1, 1, 1))


def compose(predictions: Tensor, weights: Tensor, base: Tensor | None = None) -> Tensor:
    """The weighted sum over LoRAs, per pixel: ``[N, B, C, H, W]``, ``[N, B, H, W] -> [B, C, H, W]``.

    What the weights leave of 1 is that of ``base [B, C, H, W]`` (None: they leave nothing); where they are more than 1,
    its weight is negative, and what is summed are the LoRAs' differences from it. All weights together are 1, so this
    serves noise, v and x0 predictions of one noisy latent alike.
    """
    composed = (weights.unsqueeze(2) * predictions.float()).sum(dim=0)
    if base is not None:
        composed = composed + (1 - weights.sum(dim=0)).unsqueeze(1) * base.float()
    return composed.to(predictions.dtype)


def recenter(base_uncond: Tensor, composed_uncond: Tensor, base_share: float) -> Tensor:
    """Re-centred guidance: ``lambda * base + (1 - lambda) * composed`` unconditional score, ``[B, C, H, W]`` each."""
    return base_share * base_uncond + (1 - base_share) * composed_uncond
