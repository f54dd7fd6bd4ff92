"""The method, written out literally: numpy float64, loops over LoRAs, images, patches and pixels.

Slow on purpose, and without a line in common with the package: the tests hold the package against it.
"""

import math

import numpy as np

SMALLEST_TEMPERATURE = 1e-6
SMALLEST_SPREAD = 1e-4
SMALLEST_DIVERGENCE = 1e-10


def boxes(height, width, p):
    """The patches, by row and column: pixel bounds (top, bottom, left, right); those at the edge may be partial."""
    return [
        [(top, min(top + p, height), left, min(left + p, width)) for left in range(0, width, p)]
        for top in range(0, height, p)
    ]


def cosine(a, b):
    """Of two vectors; 1 if either has no length, or if they are as good as parallel."""
    scale_a, scale_b = np.abs(a).max(), np.abs(b).max()
    if scale_a == 0 or scale_b == 0:
        return 1.0
    a, b = a / scale_a, b / scale_b
    value = float(np.dot(a, b) / math.sqrt(np.dot(a, a) * np.dot(b, b)))
    return 1.0 if 1 - value < SMALLEST_DIVERGENCE else value


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


def window_similarity(eps, eps_base, p):
    """[N,B,C,H,W], [B,C,H,W] -> [N,B,H,W]: of what lies around each pixel, up to p/2 pixels away in both directions; at
    just p/2 (p even) a row or column counts half."""
    eps, eps_base = np.asarray(eps, np.float64), np.asarray(eps_base, np.float64)
    n, b, _, height, width = eps.shape

    def counts(position, centre):
        distance = abs(position - centre)
        return 0.5 if distance == p / 2 else float(distance < p / 2)

    out = np.empty((n, b, height, width))
    for y in range(height):
        for x in range(width):
            rows = [counts(position, y) for position in range(height)]
            columns = [counts(position, x) for position in range(width)]
            within = np.sqrt(np.outer(rows, columns))  # squared again in products
            for i in range(n):
                for j in range(b):
                    out[i, j, y, x] = cosine((within * eps[i, j]).ravel(), (within * eps_base[j]).ravel())
    return out


SIMILARITY = {"grid": patch_similarity, "sliding": window_similarity}


def patch_prior(place, p):
    """[N,H,W] -> [N,h,w]: the mean over the pixels that a patch has."""
    place = np.asarray(place, np.float64)
    grid = boxes(*place.shape[1:], p)
    out = np.empty((len(place), len(grid), len(grid[0])))
    for i in range(len(place)):
        for y, row in enumerate(grid):
            for x, (top, bottom, left, right) in enumerate(row):
                out[i, y, x] = place[i, top:bottom, left:right].sum() / ((bottom - top) * (right - left))
    return out


def kept(ranking, k):
    """The indices of the k lowest; of equals the first."""
    return sorted(range(len(ranking)), key=lambda i: (ranking[i], i))[:k]


def top_k_mask(similarity, k, scope, prior=None):
    """``prior [N,h,w]``: where it is 0 a LoRA is no candidate, and an image's mean is weighted by it."""
    similarity = np.asarray(similarity, np.float64)
    n, b, h, w = similarity.shape
    k = k or n
    prior = np.ones((n, h, w)) if prior is None else prior
    mask = np.zeros(similarity.shape, bool)
    for j in range(b):
        means = [(prior[i] * similarity[i, j]).sum() / prior[i].sum() if prior[i].any() else math.inf for i in range(n)]
        for y in range(h):
            for x in range(w):
                ranking = means
                if scope == "patch":
                    ranking = [similarity[i, j, y, x] if prior[i, y, x] > 0 else math.inf for i in range(n)]
                for i in kept(ranking, k):
                    mask[i, j, y, x] = prior[i, y, x] > 0
    return mask


def softmin_weights(similarity, temperature, top_k=None, scope="image", mask=None, claim=None):
    """``temperature``: a number, or one an image and patch (broadcastable to [B,h,w]); ``mask`` instead of top_k;
    ``claim [N,h,w]`` or ``[N,B,h,w]``: a factor on everyone's exponential."""
    similarity = np.asarray(similarity, np.float64)
    n, b, h, w = similarity.shape
    tau = np.broadcast_to(np.asarray(temperature, np.float64), (b, h, w))
    mask = top_k_mask(similarity, top_k, scope) if mask is None else mask
    claim = np.ones((n, h, w)) if claim is None else claim
    claim = claim if np.ndim(claim) == 4 else np.repeat(claim[:, None], b, axis=1)
    out = np.zeros_like(similarity)
    for j in range(b):
        for y in range(h):
            for x in range(w):
                members = [i for i in range(n) if mask[i, j, y, x] and claim[i, j, y, x] > 0]
                if not members:
                    continue
                # Whatever is taken off all logits alike: here the largest, so that one exponential is 1.
                logit = {i: math.log(claim[i, j, y, x]) - similarity[i, j, y, x] / tau[j, y, x] for i in members}
                e = {i: math.exp(logit[i] - max(logit.values())) for i in members}
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
    """[N,B,h,w] -> [B,1,1]; of the LoRAs that the mask leaves in, where it leaves several."""
    score = np.asarray(score, np.float64)
    mask = np.ones(score.shape, bool) if mask is None else mask
    n, b, h, w = score.shape
    out = np.empty((b, 1, 1))
    for j in range(b):
        deviations = []
        for y in range(h):
            for x in range(w):
                values = [score[i, j, y, x] for i in range(n) if mask[i, j, y, x]]
                if len(values) < 2:
                    continue
                mean = sum(values) / len(values)
                deviations.append(math.sqrt(sum((value - mean) ** 2 for value in values) / len(values)))
        mean = sum(deviations) / len(deviations) if deviations else 0
        out[j] = max(kappa * mean, SMALLEST_TEMPERATURE, SMALLEST_SPREAD * np.abs(score[:, j]).mean())
    return out


TYPICAL, COHESION, LEAST = 0.6, 4, 1e-4


def typical(divergences):
    """[h,w] -> the 0.6 quantile."""
    values = sorted(np.asarray(divergences, np.float64).ravel())
    place = TYPICAL * (len(values) - 1)
    below = math.floor(place)
    above = min(below + 1, len(values) - 1)
    return values[below] + (place - below) * (values[above] - values[below])


def at_least_typical(relative):
    """[N,R,h,w]: nobody's divergence is below the 0.6 quantile of its own in the image."""
    out = np.array(relative, np.float64)
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            least = typical(out[i, j])
            out[i, j] = np.where(out[i, j] < least, least, out[i, j])
    return out


REST, ALIKE = 1.5, 1e-3


def of_rest(relative, mask):
    """[N,R,h,w] -> [1,R,h,w]: what the base competes by where it has the rest, from those in the mask anywhere."""
    n, rows, h, w = relative.shape
    out = np.zeros((1, rows, h, w))
    for j in range(rows):
        out[0, j] = REST * max((relative[i, j].sum() / (h * w) for i in range(n) if mask[i, j].any()), default=0)
    return out


def claim_of_base(eps, eps_base, relative, mask):
    """[R]: what the base's weight is multiplied by where it has no rest by itself, and what it competes by. The
    variance of what those in the mask anywhere change, as a part of what it were if they had nothing in common: a half
    is all, less than a thousandth is rounding. Times 1 - t, where t is the largest of their typical divergences, in
    units of each one's mean: a quarter is all."""
    n, rows, h, w = relative.shape
    out = np.zeros(rows)
    for j in range(rows):
        members = [i for i in range(n) if mask[i, j].any()]
        if len(members) < 2:
            continue
        changes = [np.asarray(eps[i][j], np.float64) - np.asarray(eps_base[j], np.float64) for i in members]
        mean, k = sum(changes) / len(changes), len(changes)
        alone = sum((change**2).sum() for change in changes)
        apart = sum(((change - mean) ** 2).sum() for change in changes)
        disagreement = 0 if alone == 0 else apart / alone * k / (k - 1)
        if disagreement < ALIKE:
            continue
        flat = 0
        for i in members:
            average = relative[i, j].sum() / (h * w)
            flat = max(flat, typical(relative[i, j]) / average if average > 0 else 0)
        out[j] = min(disagreement / 0.5, 1) * min(max((1 - flat) / 0.25, 0), 1)
    return out


def placed(place, row):
    """Whether anyone's place, of ``place [N,H,W]`` or ``[N,R,H,W]``, is a part of a row's image."""
    return any(np.ptp(each if each.ndim == 2 else each[row]) > 0 for each in np.asarray(place))


def neighbourhood(weights, reach):
    """[N,R,h,w]: the fourth power of the mean weight up to ``reach`` cells away, in either direction; cells at just
    that distance count half."""
    n, rows, h, w = weights.shape
    out = np.empty_like(weights)
    for y in range(h):
        for x in range(w):
            total, cells = 0, 0
            for v in range(max(0, y - reach), min(h, y + reach + 1)):
                for u in range(max(0, x - reach), min(w, x + reach + 1)):
                    count = (0.5 if abs(v - y) == reach else 1) * (0.5 if abs(u - x) == reach else 1)
                    total, cells = total + count * weights[:, :, v, u], cells + count
            out[:, :, y, x] = np.maximum(total / cells, LEAST) ** COHESION
    return out


def gates(relative, q, mask, share, prior):
    """[N,R,h,w] from r, the mask [N,R,h,w], share [N] and prior [N,h,w]: prior_i (c_i / max_j prior_j c_j)**q with
    c = share r, at most prior_i; of those in the mask."""
    n, rows, h, w = relative.shape
    out = np.zeros_like(relative)
    for j in range(rows):
        for y in range(h):
            for x in range(w):
                claim = [share[i] * relative[i, j, y, x] for i in range(n)]
                members = [i for i in range(n) if mask[i, j, y, x]]
                largest = max([prior[i, y, x] * claim[i] for i in members], default=0)
                for i in members:
                    ratio = min(1, claim[i] / largest) if largest > 0 else float(claim[i] > 0)
                    out[i, j, y, x] = prior[i, y, x] * ratio**q
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


def compose(predictions, weights, base=None):
    """[N,B,C,H,W], [N,B,H,W] -> [B,C,H,W]; what the weights leave of 1 is that of ``base [B,C,H,W]``."""
    predictions, weights = np.asarray(predictions, np.float64), np.asarray(weights, np.float64)
    out = np.zeros(predictions.shape[1:])
    n, b, c = predictions.shape[:3]
    for i in range(n):
        for j in range(b):
            for channel in range(c):
                out[j, channel] += weights[i, j] * predictions[i, j, channel]
    if base is not None:
        for j in range(b):
            for channel in range(c):
                out[j, channel] += (1 - sum(weights[i, j] for i in range(n))) * np.asarray(base[j, channel], np.float64)
    return out


def gated_sum(predictions, gates, base):
    """[N,B,C,H,W], [N,B,H,W], [B,C,H,W] -> [B,C,H,W]: the base, and everyone's difference from it through a gate."""
    predictions, base = np.asarray(predictions, np.float64), np.asarray(base, np.float64)
    out = base.copy()
    for i in range(len(predictions)):
        for j in range(len(base)):
            for channel in range(len(base[j])):
                out[j, channel] += gates[i, j] * (predictions[i, j, channel] - base[j, channel])
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


def coverage(prior, mask):
    """[R,h,w]: the priors [N,h,w] of those whom the mask [N,R,h,w] leaves in, added up, at most 1."""
    n, rows, h, w = mask.shape
    out = np.zeros((rows, h, w))
    for i in range(n):
        for j in range(rows):
            out[j] += np.where(mask[i, j], prior[i], 0)
    return np.minimum(out, 1)


def loratorio(
    eps, eps_base, cond, uncond, base_uncond, image_of_row, options, mask=None, place=None, share=None, base_cond=None,
    relative=None, rest=False, kept=None,
):  # fmt: skip
    """Sections 1 to 4, or the gated sum: (cond [R,C,H,W], uncond [B,C,H,W] or None, patch weights [N,R,h,w]).

    ``mask [N,R,h,w]``: who takes part, where that was settled in an earlier step. ``place [N,H,W]``: where everyone may
    act, the rest is ``base_cond [R,C,H,W]`` and ``base_uncond``; ``share [N]``: a factor on everyone's claim.
    ``relative [N,R,h,w]``: the relative divergences, where earlier steps have a part in them. ``rest``: whether
    the base competes as well, like one more LoRA, in all rows or ``[R]``; in others it does by the option ``rest``,
    as far as `claim_of_base` says, but beside nobody, beside places, and beside those who keep the rest, by ``kept
    [N,R]``: these compete by no less than the base would. What it wins is ``base_cond`` and ``base_uncond``.
    """
    p = options["patch_size"]
    similarity = SIMILARITY[options["patches"]](eps, eps_base, p)
    if options["patches"] == "sliding":
        p = 1  # of the weights
    n, _, h, w = similarity.shape
    gated = options["combination"] == "gates"
    everywhere = place is None
    rows = similarity.shape[1]
    rest = np.broadcast_to(np.asarray(rest, np.float64), (rows,)).copy()
    partial = np.any(rest) or not everywhere or (options["rest"] and n > 1 and not gated)
    prior = np.ones((n, h, w)) if everywhere else patch_prior(place, p)
    share_of = np.ones(n) if share is None else np.asarray(share, np.float64)
    if mask is None:
        mask = top_k_mask(similarity, options["top_k"], options["selection_scope"], prior)
    if relative is None:
        relative = relative_divergence(similarity, options["relativity"])
    if gated:
        weights = gates(relative, options["sharpness"], mask, share_of, prior)
    else:
        tau = options["temperature"]
        claim, rivals, spread = np.stack([[share_of[i] * prior[i]] * rows for i in range(n)]), mask, mask
        known = rest > 0
        if options["rest"] and n > 1:
            claims, at_least = claim_of_base(eps, eps_base, relative, mask), of_rest(relative, mask)[0]
            relative = np.array(relative, np.float64)
            for j in range(rows):
                keepers = [i for i in range(n) if kept is not None and kept[i][j] and mask[i, j].any()]
                for i in keepers:
                    relative[i, j] = np.where(relative[i, j] < at_least[j], at_least[j], relative[i, j])
                if not rest[j] and not keepers and (everywhere or not placed(place, j)):
                    rest[j] = claims[j]
        if np.any(rest):
            of_base, known = (np.broadcast_to(each.reshape(1, -1, 1, 1), mask[:1].shape) for each in (rest, known))
            relative = np.concatenate([relative, of_base * of_rest(relative, mask)])
            claim, rivals = np.concatenate([claim, of_base]), np.concatenate([mask, of_base > 0])
            spread = np.concatenate([mask, known])
        if options["temperature_mode"] == "adaptive":
            tau = adaptive_temperature(-relative, tau, spread)
        if options["regions"]:
            relative = at_least_typical(relative)
            alone = softmin_weights(-relative, tau, mask=rivals, claim=claim)
            claim = claim * neighbourhood(alone, options["patch_size"] // p)
        weights = softmin_weights(-relative, tau, mask=rivals, claim=claim)[:n] * coverage(prior, mask)
    pixels = UPSAMPLE[options["upsampling"]](weights, np.shape(cond)[-2:], p)
    if gated:
        composed = gated_sum(cond, pixels, base_cond)
    else:
        composed = compose(cond, pixels, base_cond if partial else None)
    if base_uncond is None:
        return composed, None, weights
    base_share = options["base_share"]
    if base_share == 1:
        return composed, np.asarray(base_uncond, np.float64), weights
    of_image = np.stack(
        [
            np.mean([pixels[:, row] for row in range(len(image_of_row)) if image_of_row[row] == image], axis=0)
            for image in range(len(base_uncond))
        ],
        axis=1,
    )
    if gated:
        composed_uncond = gated_sum(uncond, of_image, base_uncond)
    else:
        composed_uncond = compose(uncond, of_image, base_uncond if partial else None)
    return composed, recenter(base_uncond, composed_uncond, base_share), weights


def composite(predictions, share=None, place=None, base=None):
    """[N,B,C,H,W] -> [B,C,H,W]: everyone's own prediction, averaged; weighted by ``share [N]`` and ``place [N,H,W]``,
    whose sum, at most 1, is how much of a pixel is the LoRAs' at all, the rest being that of ``base [B,C,H,W]``."""
    predictions = np.asarray(predictions, np.float64)
    share = np.ones(len(predictions)) if share is None else np.asarray(share, np.float64)
    if place is None:
        return sum(share[i] * predictions[i] for i in range(len(predictions))) / sum(share)
    out = np.array(base, np.float64)
    height, width = place.shape[1:]
    for y in range(height):
        for x in range(width):
            claims = [share[i] * float(place[i, y, x]) for i in range(len(predictions))]
            if sum(claims) == 0:
                continue
            mean = sum(claims[i] * predictions[i, :, :, y, x] for i in range(len(predictions))) / sum(claims)
            covered = min(1, float(place[:, y, x].sum()))
            out[:, :, y, x] = covered * mean + (1 - covered) * out[:, :, y, x]
    return out


def switch(step, every, n):
    """Whose turn it is: 0 for the first ``every`` steps, then 1, ..., then 0 again."""
    turn = 0
    for _ in range(step // every):
        turn = 0 if turn == n - 1 else turn + 1
    return turn


class Selection:
    """Section 3 in every m-th step, and when a LoRA comes or goes: between them everyone keeps the mask of the last
    selection."""

    def __init__(self, every):
        self.every, self.steps, self.mask, self.members, self.anew = every, 0, None, None, True

    def __call__(self, eps, eps_base, options, place=None, members=None):
        """The mask [N,R,h,w] of this step. Of a full evaluation of the ``members`` (None: always the same ones), only
        what the mask leaves in is to be used."""
        if self.steps % self.every == 0 or members != self.members:
            sliding = options["patches"] == "sliding"
            similarity = SIMILARITY[options["patches"]](eps, eps_base, options["patch_size"])
            prior = None if place is None else patch_prior(place, 1 if sliding else options["patch_size"])
            self.mask = top_k_mask(similarity, options["top_k"], options["selection_scope"], prior)
            self.anew = True
        else:
            self.anew = False
        self.members = members
        self.steps += 1
        return self.mask


class Momentum:
    """Everyone's relative divergence as an exponential mean over the steps in which it took part without a break."""

    def __init__(self, momentum):
        self.momentum, self.known = momentum, {}

    def __call__(self, eps, eps_base, options, members=None, mask=None):
        """The relative divergences [M,R,h,w] of the ``members`` (None: always the same ones) in this step; whom the
        mask leaves out everywhere counts for nothing, and is not evaluated."""
        similarity = SIMILARITY[options["patches"]](eps, eps_base, options["patch_size"])
        relative = relative_divergence(similarity, options["relativity"])
        members = list(range(len(eps))) if members is None else list(members)
        self.known = {i: self.known[i] for i in members if i in self.known}
        for position, i in enumerate(members):
            if mask is not None and not mask[position].any():
                continue
            if i in self.known:
                relative[position] = self.momentum * self.known[i] + (1 - self.momentum) * relative[position]
            self.known[i] = relative[position].copy()
        return relative


class Reuse:
    """Section 5: a few LoRAs are fresh in a step; of the others the last known difference from the base is taken, and
    grown by the square root of what it grew before. Unconditional rows are fresh in every other round of turns. Who was
    no member in the step before is fresh, too, with them."""

    def __init__(self, refresh, warmup):
        self.refresh, self.warmup = refresh, warmup
        self.steps, self.last, self.round, self.before = 0, -1, 0, None
        self.cond, self.uncond = {}, {}

    def __call__(self, eps, eps_base, unconds, base_uncond, gain, members=None):
        """What is known of every member in this step: (eps [M,R,C,H,W], unconds [M,B,C,H,W]).

        Given is what a full evaluation of all LoRAs finds; of it only the fresh ones' part is looked at.
        """
        n, step = len(eps), self.steps
        members = list(range(n)) if members is None else list(members)
        fresh, with_uncond = members, True
        if step >= self.warmup and self.refresh < len(members):
            fresh = [i for i in members if self.before is not None and i not in self.before]
            with_uncond = bool(fresh)
            known_ones = [i for i in members if i not in fresh]
            turns = []
            while len(fresh) < self.refresh and len(turns) < len(known_ones):
                self.last += 1
                if self.last == n:
                    self.last, self.round = 0, self.round + 1
                if self.last in known_ones:
                    with_uncond = with_uncond or (not turns and self.round % 2 == 0)
                    turns.append(self.last)
                    fresh = [*fresh, self.last]
        self.before = members
        self.steps += 1
        for i in fresh:
            self.learn(self.cond, i, step, np.asarray(eps[i] - eps_base, np.float64))
            if base_uncond is not None and with_uncond:
                self.learn(self.uncond, i, step, np.asarray((unconds[i] - base_uncond) / gain, np.float64))
        known = np.stack([eps_base + self.expected(self.cond, i, step) for i in members])
        if base_uncond is None:
            return known, None
        return known, np.stack([base_uncond + gain * self.expected(self.uncond, i, step) for i in members])

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
