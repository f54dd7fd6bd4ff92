"""The method, written out literally: numpy float64, loops over LoRAs, images, patches and pixels.

Slow on purpose, and without a line in common with the package: the tests hold the package against it.
"""

import math

import numpy as np

SMALLEST_TEMPERATURE = 1e-6


def boxes(height, width, p):
    """The patches, by row and column: pixel bounds (top, bottom, left, right); those at the edge may be partial."""
    return [
        [(top, min(top + p, height), left, min(left + p, width)) for left in range(0, width, p)]
        for top in range(0, height, p)
    ]


def cosine(a, b):
    """Of two vectors; 1 if either has no length."""
    scale_a, scale_b = np.abs(a).max(), np.abs(b).max()
    if scale_a == 0 or scale_b == 0:
        return 1.0
    a, b = a / scale_a, b / scale_b
    return float(np.dot(a, b) / math.sqrt(np.dot(a, a) * np.dot(b, b)))


def patch_similarity(eps, eps_base, p):
    """[N,B,C,H,W], [B,C,H,W] -> [N,B,h,w]."""
    eps, eps_base = np.asarray(eps, np.float64), np.asarray(eps_base, np.float64)
    n, b, _, height, width = eps.shape
    grid = boxes(height, width, p)
    out = np.empty((n, b, len(grid), len(grid[0])))
    for i in range(n):
        for j in range(b):
            for y, row in enumerate(grid):
                for x, (top, bottom, left, right) in enumerate(row):
                    mine = eps[i, j, :, top:bottom, left:right].ravel()
                    base = eps_base[j, :, top:bottom, left:right].ravel()
                    out[i, j, y, x] = cosine(mine, base)
    return out


def kept(ranking, k):
    """The indices of the k lowest; of equals the first."""
    return sorted(range(len(ranking)), key=lambda i: (ranking[i], i))[:k]


def top_k_mask(similarity, k, scope):
    similarity = np.asarray(similarity, np.float64)
    n, b, h, w = similarity.shape
    k = k or n
    mask = np.zeros(similarity.shape, bool)
    for j in range(b):
        means = [similarity[i, j].sum() / (h * w) for i in range(n)]
        for y in range(h):
            for x in range(w):
                ranking = means if scope == "image" else [similarity[i, j, y, x] for i in range(n)]
                for i in kept(ranking, k):
                    mask[i, j, y, x] = True
    return mask


def softmin_weights(similarity, temperature, top_k=None, scope="image", mask=None):
    """``temperature``: a number, or one an image and patch (broadcastable to [B,h,w]); ``mask`` instead of top_k."""
    similarity = np.asarray(similarity, np.float64)
    n, b, h, w = similarity.shape
    tau = np.broadcast_to(np.asarray(temperature, np.float64), (b, h, w))
    mask = top_k_mask(similarity, top_k, scope) if mask is None else mask
    out = np.zeros_like(similarity)
    for j in range(b):
        for y in range(h):
            for x in range(w):
                members = [i for i in range(n) if mask[i, j, y, x]]
                lowest = min(similarity[i, j, y, x] for i in members)
                e = {i: math.exp(-(similarity[i, j, y, x] - lowest) / tau[j, y, x]) for i in members}
                for i in members:
                    out[i, j, y, x] = e[i] / sum(e.values())
    return out


def relative_divergence(similarity, gamma):
    """r, not negated: [N,B,h,w]."""
    d = 1 - np.asarray(similarity, np.float64)
    n, b, h, w = d.shape
    out = np.zeros_like(d)
    for i in range(n):
        for j in range(b):
            mean = d[i, j].sum() / (h * w)
            if mean > 0:
                out[i, j] = d[i, j] / mean**gamma
    return out


def adaptive_temperature(score, kappa, mask=None):
    """[N,B,h,w] -> [B,1,1]; of the LoRAs that the mask leaves in."""
    score = np.asarray(score, np.float64)
    mask = np.ones(score.shape, bool) if mask is None else mask
    n, b, h, w = score.shape
    out = np.empty((b, 1, 1))
    for j in range(b):
        deviations = []
        for y in range(h):
            for x in range(w):
                values = [score[i, j, y, x] for i in range(n) if mask[i, j, y, x]]
                mean = sum(values) / len(values)
                deviations.append(math.sqrt(sum((value - mean) ** 2 for value in values) / len(values)))
        out[j] = max(kappa * sum(deviations) / len(deviations), SMALLEST_TEMPERATURE)
    return out


def upsample_nearest(weights, size, p):
    weights = np.asarray(weights, np.float64)
    height, width = size
    out = np.empty((*weights.shape[:2], height, width))
    for y in range(height):
        for x in range(width):
            out[:, :, y, x] = weights[:, :, y // p, x // p]
    return out


def upsample_bilinear(weights, size, p):
    """Patch k's centre lies at pixel coordinate (k + 1/2) p; beyond the outermost centres the weight is theirs."""
    weights = np.asarray(weights, np.float64)
    height, width = size
    h, w = weights.shape[-2:]

    def between(pixel, count):
        position = min(max((pixel + 0.5) / p - 0.5, 0), count - 1)
        first = math.floor(position)
        return first, min(first + 1, count - 1), position - first

    out = np.empty((*weights.shape[:2], height, width))
    for y in range(height):
        top, bottom, down = between(y, h)
        for x in range(width):
            left, right, across = between(x, w)
            out[:, :, y, x] = (
                (1 - down) * (1 - across) * weights[:, :, top, left]
                + (1 - down) * across * weights[:, :, top, right]
                + down * (1 - across) * weights[:, :, bottom, left]
                + down * across * weights[:, :, bottom, right]
            )
    return out


UPSAMPLE = {"nearest": upsample_nearest, "bilinear": upsample_bilinear}


def compose(predictions, weights):
    """[N,B,C,H,W], [N,B,H,W] -> [B,C,H,W]."""
    predictions, weights = np.asarray(predictions, np.float64), np.asarray(weights, np.float64)
    out = np.zeros(predictions.shape[1:])
    n, b, c = predictions.shape[:3]
    for i in range(n):
        for j in range(b):
            for channel in range(c):
                out[j, channel] += weights[i, j] * predictions[i, j, channel]
    return out


def recenter(base_uncond, composed_uncond, base_share):
    return base_share * np.asarray(base_uncond, np.float64) + (1 - base_share) * np.asarray(composed_uncond, np.float64)


def guide(cond, uncond, image_of_row, row_weights, scale):
    """The host's CFG with AND: e(∅) + scale * sum over an image's rows of weight * (e(c) - e(∅))."""
    cond, uncond = np.asarray(cond, np.float64), np.asarray(uncond, np.float64)
    out = uncond.copy()
    for row, image in enumerate(image_of_row):
        out[image] += scale * row_weights[row] * (cond[row] - uncond[image])
    return out


def loratorio(eps, eps_base, cond, uncond, base_uncond, image_of_row, options, mask=None):
    """Sections 1 to 4: (cond [R,C,H,W], uncond [B,C,H,W] or None, patch weights [N,R,h,w]).

    ``mask [N,R,h,w]``: who takes part, where that was settled in an earlier step.
    """
    p = options["patch_size"]
    similarity = patch_similarity(eps, eps_base, p)
    if mask is None:
        mask = top_k_mask(similarity, options["top_k"], options["selection_scope"])
    score = -relative_divergence(similarity, options["relativity"])
    tau = options["temperature"]
    if options["temperature_mode"] == "adaptive":
        tau = adaptive_temperature(score, tau, mask)
    weights = softmin_weights(score, tau, mask=mask)
    pixels = UPSAMPLE[options["upsampling"]](weights, np.shape(cond)[-2:], p)
    composed = compose(cond, pixels)
    if base_uncond is None:
        return composed, None, weights
    share = options["base_share"]
    if share == 1:
        return composed, np.asarray(base_uncond, np.float64), weights
    of_image = np.stack(
        [
            np.mean([pixels[:, row] for row in range(len(image_of_row)) if image_of_row[row] == image], axis=0)
            for image in range(len(base_uncond))
        ],
        axis=1,
    )
    return composed, recenter(base_uncond, compose(uncond, of_image), share), weights


def composite(predictions):
    """[N,B,C,H,W] -> [B,C,H,W]: everyone's own prediction, averaged."""
    return sum(np.asarray(predictions, np.float64)[i] for i in range(len(predictions))) / len(predictions)


def switch(step, every, n):
    """Whose turn it is: 0 for the first ``every`` steps, then 1, ..., then 0 again."""
    turn = 0
    for _ in range(step // every):
        turn = 0 if turn == n - 1 else turn + 1
    return turn


class Selection:
    """Section 3 in every m-th step: between them everyone keeps the mask of the last selection."""

    def __init__(self, every):
        self.every, self.steps, self.mask = every, 0, None

    def __call__(self, eps, eps_base, options):
        """The mask [N,R,h,w] of this step. Of a full evaluation, only what the mask leaves in is to be used."""
        if self.steps % self.every == 0:
            similarity = patch_similarity(eps, eps_base, options["patch_size"])
            self.mask = top_k_mask(similarity, options["top_k"], options["selection_scope"])
        self.steps += 1
        return self.mask


class Reuse:
    """Section 5: a few LoRAs are fresh in a step; of the others the last known difference from the base is taken, and
    grown by the square root of what it grew before. Unconditional rows are fresh in every other round of turns."""

    def __init__(self, refresh, warmup):
        self.refresh, self.warmup = refresh, warmup
        self.steps, self.turn = 0, 0
        self.cond, self.uncond = {}, {}

    def __call__(self, eps, eps_base, unconds, base_uncond, gain):
        """What is known of every LoRA in this step: (eps [N,R,C,H,W], unconds [N,B,C,H,W]).

        Given is what a full evaluation finds; of it only the fresh LoRAs' part is looked at.
        """
        n, step = len(eps), self.steps
        fresh, with_uncond = list(range(n)), True
        if step >= self.warmup and self.refresh < n:
            fresh = [(self.turn + i) % n for i in range(self.refresh)]
            with_uncond = (self.turn // n) % 2 == 0
            self.turn += self.refresh
        self.steps += 1
        for i in fresh:
            self.learn(self.cond, i, step, np.asarray(eps[i] - eps_base, np.float64))
            if base_uncond is not None and with_uncond:
                self.learn(self.uncond, i, step, np.asarray((unconds[i] - base_uncond) / gain, np.float64))
        known = np.stack([eps_base + self.expected(self.cond, i, step) for i in range(n)])
        if base_uncond is None:
            return known, unconds
        return known, np.stack([base_uncond + gain * self.expected(self.uncond, i, step) for i in range(n)])

    @staticmethod
    def learn(known, i, step, delta):
        growth = [1.0] * len(delta)
        if i in known:
            last, before, _ = known[i]
            for row in range(len(delta)):
                old, new = math.sqrt((before[row] ** 2).sum()), math.sqrt((delta[row] ** 2).sum())
                if old > 0 and new > 0:
                    growth[row] = min(max((new / old) ** (1 / (step - last)), 0.5), 2.0)
        known[i] = step, delta, growth

    @staticmethod
    def expected(known, i, step):
        if i not in known:
            return 0
        last, delta, growth = known[i]
        return np.stack([delta[row] * growth[row] ** (0.5 * (step - last)) for row in range(len(delta))])
