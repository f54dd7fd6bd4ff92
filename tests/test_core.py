"""The core against the literal reference of the method in `oracle`."""

import inspect
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loratorio_ext import core
from loratorio_ext.settings import OPTIONS, Settings
from tests import oracle

TOLERANCE = 1e-5


def exact(tensor):
    """The same values in float64, for the oracle."""
    return tensor.detach().double().numpy()


def assert_close(actual, expected, relative_to=1.0, tolerance=TOLERANCE):
    """Equal to ``tolerance`` times the larger of 1 and ``relative_to``'s largest magnitude (given: relative)."""
    scale = float(np.abs(relative_to).max())
    assert tuple(actual.shape) == tuple(np.shape(expected))
    worst = float(np.abs(exact(actual) - expected).max())
    assert worst <= tolerance * scale, f"off by {worst} (allowed {tolerance * scale})"


def generator(seed):
    return torch.Generator().manual_seed(seed)


# How a LoRA's noise may look beside the base's, given the base's and fresh noise of the same shape.
KINDS = {
    "near": lambda base, noise: base + 0.03 * noise,
    "independent": lambda base, noise: noise,
    "same": lambda base, noise: base.clone(),
    "opposite": lambda base, noise: -base,
    "scaled": lambda base, noise: 7.5 * base,
    "zero": lambda base, noise: torch.zeros_like(base),
    "constant": lambda base, noise: torch.full_like(base, 0.5),
    "zero corner": lambda base, noise: noise * (torch.arange(base.shape[-1]) >= base.shape[-1] // 2),
    "one spike": lambda base, noise: base + 1000 * (noise == noise.max()),
}
# Magnitudes: to the edges of what squares in float32 survive, and past them.
SCALES = [1.0, 1e-3, 1e3, 1e18, 1e-18, 1e30, 1e-30]

shapes = st.tuples(*[st.integers(1, 6), st.integers(1, 3), st.integers(1, 4), st.integers(1, 11), st.integers(1, 11)])
patch_sizes = st.integers(1, 13)
seeds = st.integers(0, 2**31)


@st.composite
def noises(draw, scales=SCALES):
    """(eps [N,B,C,H,W], eps_base [B,C,H,W], patch size): ragged shapes, kinds mixed over the LoRAs."""
    n, *rest = draw(shapes)
    g = generator(draw(seeds))
    base = torch.randn(rest, generator=g)
    if draw(st.booleans()):
        base[..., : rest[-1] // 2] = 0
    kinds = draw(st.lists(st.sampled_from(sorted(KINDS)), min_size=n, max_size=n))
    eps = torch.stack([KINDS[kind](base, torch.randn(rest, generator=g)) for kind in kinds])
    return eps * draw(st.sampled_from(scales)), base * draw(st.sampled_from(scales)), draw(patch_sizes)


@st.composite
def similarities(draw, max_n=6):
    """[N,B,h,w] like those of real steps: near 1 and close together, or anywhere in [-1, 1], ties and ones included."""
    n, b = draw(st.integers(1, max_n)), draw(st.integers(1, 3))
    h, w = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    values = torch.rand(n, b, h, w, generator=generator(draw(seeds)))
    values = 1 - values * draw(st.sampled_from([2.0, 1.0, 0.1, 1e-3, 1e-5]))
    if draw(st.booleans()):
        values[draw(st.integers(0, n - 1))] = 1.0
    if n > 1 and draw(st.booleans()):
        values[1] = values[0]
    return values


temperatures = st.floats(-4, 6).map(lambda exponent: min(max(10.0**exponent, 1e-4), 1e6))


class TestSimilarity:
    @given(noises())
    def test_agrees_with_the_oracle(self, case):
        eps, base, p = case
        similarity = core.patch_similarity(eps, base, p)
        assert similarity.dtype == torch.float32
        assert_close(similarity, oracle.patch_similarity(exact(eps), exact(base), p))

    @given(noises(scales=[1.0, 1e-3]), st.sampled_from([torch.float16, torch.bfloat16, torch.float64]))
    def test_any_dtype_is_computed_in_float32(self, case, dtype):
        eps, base, p = case
        eps, base = eps.clamp(-60000, 60000).to(dtype), base.to(dtype)
        similarity = core.patch_similarity(eps, base, p)
        assert similarity.dtype == torch.float32
        assert_close(similarity, oracle.patch_similarity(exact(eps), exact(base), p))

    def test_half_precision_whose_squares_overflow(self):
        base = torch.full((1, 4, 8, 8), 60000.0, dtype=torch.float16)
        eps = base.unsqueeze(0) * torch.tensor([1.0, -1.0], dtype=torch.float16).view(2, 1, 1, 1, 1)
        similarity = core.patch_similarity(eps, base, 4)
        assert torch.equal(similarity[0], torch.ones(1, 2, 2))
        assert torch.equal(similarity[1], -torch.ones(1, 2, 2))

    def test_magnitudes_mixed_within_one_image(self):
        g = generator(0)
        base, eps = torch.randn(1, 4, 8, 8, generator=g), torch.randn(2, 1, 4, 8, 8, generator=g)
        base[..., :4, :] *= 1e18
        eps[..., :4] *= 1e-18
        assert_close(core.patch_similarity(eps, base, 3), oracle.patch_similarity(exact(eps), exact(base), 3))

    @pytest.mark.parametrize(
        "size, p", [((7, 5), 4), ((1, 9), 2), ((3, 3), 64), ((8, 8), 8), ((6, 10), 3), ((5, 4), 1)]
    )
    def test_grid_has_a_patch_for_every_started_one(self, size, p):
        similarity = core.patch_similarity(torch.randn(2, 3, 4, *size), torch.randn(3, 4, *size), p)
        assert similarity.shape == (2, 3, math.ceil(size[0] / p), math.ceil(size[1] / p))

    def test_partial_edge_patch_counts_with_the_pixels_it_has(self):
        g = generator(1)
        base, eps = torch.randn(1, 4, 5, 5, generator=g), torch.randn(1, 1, 4, 5, 5, generator=g)
        similarity = core.patch_similarity(eps, base, 4)
        corner = torch.cosine_similarity(eps[0, 0, :, 4:, 4:].flatten(), base[0, :, 4:, 4:].flatten(), dim=0)
        edge = torch.cosine_similarity(eps[0, 0, :, :4, 4:].flatten(), base[0, :, :4, 4:].flatten(), dim=0)
        assert abs(similarity[0, 0, 1, 1] - corner) < TOLERANCE
        assert abs(similarity[0, 0, 0, 1] - edge) < TOLERANCE

    def test_rows_and_columns_are_not_confused(self):
        base = torch.ones(1, 1, 2, 6)
        eps = torch.ones(1, 1, 1, 2, 6)
        eps[..., 4:] = -1
        assert core.patch_similarity(eps, base, 2).tolist() == [[[[1.0, 1.0, -1.0]]]]

    @given(noises())
    def test_a_lora_that_says_what_the_base_says_is_exactly_one(self, case):
        _, base, p = case
        assert (core.patch_similarity(base.expand(3, *base.shape), base, p) == 1).all()

    @pytest.mark.parametrize("which", ["lora", "base", "both"])
    def test_zero_norm_is_no_evidence(self, which):
        base, eps = torch.randn(1, 4, 4, 4, generator=generator(2)), -torch.ones(2, 1, 4, 4, 4)
        if which in ("lora", "both"):
            eps[1, ..., :2, :2] = 0
        if which in ("base", "both"):
            base[..., :2, :2] = 0
        similarity = core.patch_similarity(eps, base, 2)
        assert similarity[1, 0, 0, 0] == 1
        assert (similarity[1, 0, 1, 1] != 1).all()

    def test_small_divergences_are_resolved(self):
        # Early steps: divergence 1e-4 and less, where 1 - dot would be off by several percent.
        g = generator(3)
        base = torch.randn(1, 4, 16, 16, generator=g)
        eps = base + 0.003 * torch.randn(2, 1, 4, 16, 16, generator=g)
        expected = oracle.patch_similarity(exact(eps), exact(base), 4)
        assert 1e-6 < (1 - expected).max() < 1e-4
        assert_close(core.patch_similarity(eps, base, 4), expected, tolerance=1e-7)

    def test_what_is_not_a_number_is_not_hidden(self):
        eps, base = torch.ones(2, 1, 4, 4, 4), torch.ones(1, 4, 4, 4)
        eps[0, 0, 0, 0, 0] = math.nan
        similarity = core.patch_similarity(eps, base, 2)
        assert similarity[0, 0, 0, 0].isnan() and similarity.isnan().sum() == 1

    @pytest.mark.parametrize("p", [0, -1])
    def test_patch_size_must_be_positive(self, p):
        with pytest.raises(ValueError, match="patch_size"):
            core.patch_similarity(torch.ones(1, 1, 1, 2, 2), torch.ones(1, 1, 2, 2), p)

    def test_inputs_are_left_alone(self):
        eps, base = torch.randn(2, 1, 4, 5, 5), torch.randn(1, 4, 5, 5)
        eps_before, base_before = eps.clone(), base.clone()
        core.patch_similarity(eps, base, 2)
        assert torch.equal(eps, eps_before) and torch.equal(base, base_before)

    def test_views_and_strides_do_not_matter(self):
        eps = torch.randn(2, 3, 7, 6, 4, generator=generator(4)).permute(0, 1, 4, 2, 3)
        base = torch.randn(3, 4, 7, 6, generator=generator(5)).to(memory_format=torch.channels_last)
        actual = core.patch_similarity(eps, base, 3)
        assert_close(actual, oracle.patch_similarity(exact(eps), exact(base), 3))


class TestSoftMin:
    @given(similarities(), temperatures)
    def test_agrees_with_the_oracle(self, similarity, tau):
        weights = core.softmin_weights(similarity, tau)
        assert weights.dtype == torch.float32
        assert_close(weights, oracle.softmin_weights(exact(similarity), tau))
        assert_close(weights.sum(dim=0), np.ones(similarity.shape[1:]))

    @given(similarities(), st.lists(temperatures, min_size=3, max_size=3), st.booleans())
    def test_a_temperature_an_image_or_a_patch(self, similarity, taus, per_patch):
        _, b, h, w = similarity.shape
        tau = torch.tensor(taus[:b]).view(b, 1, 1)
        if per_patch:
            tau = tau * (1 + torch.arange(h * w).view(h, w)).clamp(max=3)
        weights = core.softmin_weights(similarity, tau)
        assert_close(weights, oracle.softmin_weights(exact(similarity), exact(tau)))

    @pytest.mark.parametrize(
        "tau",
        [2, 2.0, np.float64(2), torch.tensor(2), torch.tensor(2.0), torch.full((1, 1, 1), 2.0, dtype=torch.float64)],
        ids=["int", "float", "numpy", "int tensor", "scalar tensor", "double tensor"],
    )
    def test_every_form_of_temperature_gives_the_same_float32_weights(self, tau):
        similarity = torch.rand(3, 2, 4, 4, generator=generator(0))
        weights = core.softmin_weights(similarity, tau)
        assert weights.dtype == torch.float32
        assert_close(weights, oracle.softmin_weights(exact(similarity), 2.0))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    @pytest.mark.parametrize("top_k", [None, 2])
    def test_any_dtype_of_similarity(self, dtype, top_k):
        similarity = torch.rand(3, 2, 4, 4, generator=generator(1)).to(dtype)
        weights = core.softmin_weights(similarity, 0.1, top_k, "patch")
        assert weights.dtype == torch.float32
        assert_close(weights, oracle.softmin_weights(exact(similarity), 0.1, top_k, "patch"))

    def test_called_by_keyword(self):
        similarity = torch.rand(3, 1, 2, 2, generator=generator(2))
        by_name = core.softmin_weights(similarity=similarity, temperature=0.5, top_k=2, scope="image")
        assert torch.equal(by_name, core.softmin_weights(similarity, 0.5, 2))
        assert torch.equal(
            core.softmin_weights(similarity, 0.5), core.softmin_weights(similarity, temperature=0.5, top_k=None)
        )

    @pytest.mark.parametrize("tau", [1e-4, 1e-2, 1.0, 1e6])
    def test_stable_at_the_ends_of_the_range(self, tau):
        similarity = torch.tensor([-1.0, -0.999, 0.0, 1.0]).view(4, 1, 1, 1)
        weights = core.softmin_weights(similarity, tau)
        assert weights.isfinite().all()
        assert_close(weights, oracle.softmin_weights(exact(similarity), tau))

    def test_large_scores_do_not_overflow(self):
        # Relative scores reach minus the number of patches.
        score = torch.tensor([-4096.0, -4095.9995, 0.0]).view(3, 1, 1, 1)
        weights = core.softmin_weights(score, 1e-4)
        assert_close(weights, oracle.softmin_weights(exact(score), 1e-4))

    @given(similarities())
    def test_infinite_temperature_is_the_plain_mean(self, similarity):
        weights = core.softmin_weights(similarity, 1e6)
        assert_close(weights, np.full(similarity.shape, 1 / len(similarity)))

    def test_zero_temperature_is_the_lowest_similarity_of_each_patch(self):
        order = torch.stack([torch.randperm(4, generator=generator(i)) for i in range(24)]).T
        similarity = 0.5 + 0.1 * order.reshape(4, 2, 3, 4)
        weights = core.softmin_weights(similarity, 1e-4)
        winner = torch.nn.functional.one_hot(similarity.argmin(dim=0), 4).movedim(-1, 0).float()
        assert torch.equal(weights, winner)

    @given(similarities(), temperatures)
    def test_identical_loras_weigh_the_same(self, similarity, tau):
        doubled = torch.cat([similarity, similarity])
        weights = core.softmin_weights(doubled, tau)
        assert torch.equal(weights[: len(similarity)], weights[len(similarity) :])

    @given(similarities(), temperatures)
    def test_more_divergence_more_weight(self, similarity, tau):
        weights = core.softmin_weights(similarity, tau)
        by_similarity = similarity.argsort(dim=0)
        assert (weights.gather(0, by_similarity).diff(dim=0) <= 0).all()

    @pytest.mark.parametrize("tau", [0, 0.0, -1, math.nan, -math.inf])
    def test_temperature_must_be_positive(self, tau):
        with pytest.raises(ValueError, match="temperature"):
            core.softmin_weights(torch.ones(2, 1, 1, 1), tau)


@st.composite
def apart(draw):
    """Similarities no two of which, nor two image means, are so close that rounding could rank them."""
    n, b, h, w = (draw(st.integers(1, high)) for high in (6, 3, 4, 4))
    g = generator(draw(seeds))
    order = torch.rand(n, b, h * w, generator=g).argsort(dim=0).float()
    offset = torch.rand(n, b, 1, generator=g).argsort(dim=0).float() / (h * w) / 2
    return (0.9 - 0.05 * (order + offset)).view(n, b, h, w)


class TestSelection:
    @given(apart(), st.integers(0, 7), st.sampled_from(["image", "patch"]), temperatures)
    def test_agrees_with_the_oracle(self, similarity, k, scope, tau):
        means = similarity.double().mean(dim=(-2, -1)).sort(dim=0).values
        if len(means) > 1 and scope == "image" and means.diff(dim=0).min() < 1e-5:
            return
        mask = core.top_k_mask(similarity, k, scope)
        assert mask.dtype == torch.bool
        assert np.array_equal(mask.numpy(), oracle.top_k_mask(exact(similarity), k, scope))
        weights = core.softmin_weights(similarity, tau, top_k=k, scope=scope)
        assert_close(weights, oracle.softmin_weights(exact(similarity), tau, k, scope))
        assert (weights[~mask] == 0).all()
        assert_close(weights.sum(dim=0), np.ones(similarity.shape[1:]))

    @pytest.mark.parametrize("scope", ["image", "patch"])
    @pytest.mark.parametrize("k", [None, 0, 3, 99])
    def test_all_or_more_is_no_selection(self, k, scope):
        similarity = torch.rand(3, 2, 4, 4, generator=generator(0))
        assert torch.equal(core.softmin_weights(similarity, 0.1, k, scope), core.softmin_weights(similarity, 0.1))

    @pytest.mark.parametrize("scope", ["image", "patch"])
    @pytest.mark.parametrize("k", [1, 2, 3])
    def test_of_equals_k_are_kept(self, k, scope):
        weights = core.softmin_weights(torch.full((4, 2, 3, 3), 0.7), 0.1, k, scope)
        assert ((weights > 0).sum(dim=0) == k).all()
        assert_close(weights.sum(dim=0), np.ones((2, 3, 3)))

    def test_image_scope_ranks_by_the_mean_not_by_any_patch(self):
        similarity = torch.tensor([[0.0, 1.0, 1.0], [0.5, 0.5, 0.5], [0.9, 0.9, 0.9]]).view(3, 1, 1, 3)
        assert core.softmin_weights(similarity, 1.0, 1, "image")[:, 0, 0].tolist() == [[0, 0, 0], [1, 1, 1], [0, 0, 0]]
        assert core.softmin_weights(similarity, 1.0, 1, "patch")[:, 0, 0].tolist() == [[1, 0, 0], [0, 1, 1], [0, 0, 0]]

    def test_each_image_selects_its_own(self):
        similarity = torch.tensor([[0.1, 0.9], [0.9, 0.1]]).view(2, 2, 1, 1)
        assert core.softmin_weights(similarity, 1.0, 1).flatten(1).tolist() == [[1, 0], [0, 1]]

    @pytest.mark.parametrize("scope", ["batch", "", None, "Image"])
    def test_unknown_scope(self, scope):
        with pytest.raises(ValueError, match="scope"):
            core.softmin_weights(torch.ones(2, 1, 1, 1), 1.0, 1, scope)

    def test_negative_k(self):
        with pytest.raises(ValueError, match="top_k"):
            core.softmin_weights(torch.ones(2, 1, 1, 1), 1.0, -1)


class TestRelativeAndAdaptive:
    @given(similarities(), st.floats(0, 1))
    def test_relative_similarity_agrees_with_the_oracle(self, similarity, gamma):
        score = core.relative_similarity(similarity, gamma)
        expected = -oracle.relative_divergence(exact(similarity), gamma)
        assert score.dtype == torch.float32 and score.isfinite().all()
        assert_close(score, expected, relative_to=max(1, np.abs(expected).max()))

    @pytest.mark.parametrize("gamma", [0, 0.5, 1])
    def test_a_lora_that_nowhere_diverges_gives_zeros(self, gamma):
        similarity = torch.ones(2, 2, 3, 3)
        similarity[1, 1, 0, 0] = 0.5
        score = core.relative_similarity(similarity, gamma)
        assert (score[0] == 0).all() and (score[1, 0] == 0).all()
        assert score[1, 1, 0, 0] < 0 and score.isfinite().all()

    def test_a_similarity_rounded_past_one_is_no_divergence(self):
        score = core.relative_similarity(torch.full((1, 1, 2, 2), 1.0000001), 0.5)
        assert (score == 0).all()

    def test_gamma_one_makes_loud_and_soft_alike(self):
        divergence = torch.rand(1, 1, 4, 4, generator=generator(0)) * 0.1
        score = core.relative_similarity(1 - torch.cat([divergence, 10 * divergence]), 1)
        assert_close(score[0], exact(score[1]), relative_to=exact(score), tolerance=1e-4)
        assert_close(score.mean(dim=(-2, -1)), -np.ones((2, 1)))

    @given(similarities(), temperatures)
    def test_gamma_zero_is_the_papers_rule(self, similarity, tau):
        weights = core.softmin_weights(core.relative_similarity(similarity, 0.0), tau)
        assert_close(weights, oracle.softmin_weights(exact(similarity), tau), tolerance=1e-4)

    @given(similarities(), st.sampled_from([0.1, 0.3, 1.0, 1000.0]), st.sampled_from([0.0, 0.5, 1.0]))
    def test_adaptive_temperature_agrees_with_the_oracle(self, similarity, kappa, gamma):
        score = core.relative_similarity(similarity, gamma)
        tau = core.adaptive_temperature(score, kappa)
        expected = oracle.adaptive_temperature(exact(score), kappa)
        assert tau.shape == (similarity.shape[1], 1, 1) and tau.dtype == torch.float32
        assert (tau > 0).all()
        assert_close(tau, expected, relative_to=max(1, expected.max()))
        relative = np.abs(exact(tau) / expected - 1).max()
        assert relative < 1e-3, "small temperatures are to be right too, not only small"

    @pytest.mark.parametrize("n", [1, 3])
    def test_adaptive_temperature_of_equals_is_positive(self, n):
        tau = core.adaptive_temperature(torch.full((n, 2, 3, 3), 0.9), 0.3)
        assert (tau > 0).all()
        assert_close(core.softmin_weights(torch.full((n, 2, 3, 3), 0.9), tau), np.full((n, 2, 3, 3), 1 / n))

    def test_each_image_has_its_own_temperature(self):
        score = torch.rand(3, 2, 4, 4, generator=generator(1)) * torch.tensor([1.0, 100.0]).view(1, 2, 1, 1)
        tau = core.adaptive_temperature(score, 1.0)
        alone = torch.cat([core.adaptive_temperature(score[:, i : i + 1], 1.0) for i in range(2)])
        assert torch.allclose(tau, alone) and tau[1] > 10 * tau[0]

    def test_adaptive_weights_do_not_change_when_all_divergences_shrink_together(self):
        divergence = torch.rand(3, 1, 4, 4, generator=generator(2))
        weights = []
        for scale in (0.5, 0.005):
            score = core.relative_similarity(1 - scale * divergence, 0.0)
            weights.append(core.softmin_weights(score, core.adaptive_temperature(score, 0.3)))
        assert_close(weights[0], exact(weights[1]), tolerance=1e-3)

    def test_called_by_keyword(self):
        similarity = torch.rand(2, 1, 2, 2)
        score = core.relative_similarity(similarity=similarity, gamma=0.5)
        assert core.adaptive_temperature(score=score, kappa=0.3).shape == (1, 1, 1)


class TestUpsampling:
    @given(shapes, patch_sizes, seeds, st.sampled_from(["nearest", "bilinear"]))
    def test_agrees_with_the_oracle(self, shape, p, seed, mode):
        n, b, _, height, width = shape
        patches = (math.ceil(height / p), math.ceil(width / p))
        weights = torch.rand(n, b, *patches, generator=generator(seed)).softmax(dim=0)
        pixels = core.upsample_weights(weights, (height, width), p, mode)
        assert pixels.dtype == torch.float32
        assert_close(pixels, oracle.UPSAMPLE[mode](exact(weights), (height, width), p))
        assert_close(pixels.sum(dim=0), np.ones((b, height, width)))
        assert (pixels >= 0).all()

    def test_nearest_is_the_default_and_exact(self):
        weights = torch.rand(2, 1, 2, 3)
        pixels = core.upsample_weights(weights=weights, size=(3, 5), patch_size=2)
        assert torch.equal(pixels, core.upsample_weights(weights, torch.Size((3, 5)), 2, mode="nearest"))
        assert set(pixels.flatten().tolist()) == set(weights.flatten().tolist())
        assert pixels[0, 0, 2, 4] == weights[0, 0, 1, 2]

    @pytest.mark.parametrize("mode", ["nearest", "bilinear"])
    def test_one_patch_is_one_weight(self, mode):
        weights = torch.tensor([0.25, 0.75]).view(2, 1, 1, 1)
        pixels = core.upsample_weights(weights, (5, 7), 64, mode)
        assert torch.equal(pixels, weights.expand(2, 1, 5, 7))

    @pytest.mark.parametrize("mode", ["nearest", "bilinear"])
    def test_patches_of_one_pixel_stay_as_they_are(self, mode):
        weights = torch.rand(2, 3, 5, 4)
        assert torch.equal(core.upsample_weights(weights, (5, 4), 1, mode), weights)

    def test_bilinear_has_no_seams(self):
        weights = torch.tensor([0.0, 1.0, 0.0]).view(1, 1, 1, 3)
        row = core.upsample_weights(weights, (4, 12), 4, "bilinear")[0, 0, 0]
        assert row.diff().abs().max() <= 0.25
        assert row[0] == 0 and row[5] == row[6] == 0.875

    def test_too_few_patches_are_an_error(self):
        for mode in ("nearest", "bilinear"):
            with pytest.raises(ValueError, match="cover"):
                core.upsample_weights(torch.ones(1, 1, 2, 2), (5, 4), 2, mode)

    @pytest.mark.parametrize("mode", ["bicubic", "", None])
    def test_unknown_mode(self, mode):
        with pytest.raises(ValueError, match="mode"):
            core.upsample_weights(torch.ones(1, 1, 2, 2), (4, 4), 2, mode)


FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# Half a unit in the last place, of results rounded once.
ROUNDING = {torch.float32: 1e-5, torch.float64: 1e-5, torch.float16: 2**-11, torch.bfloat16: 2**-8}


class TestSums:
    @given(shapes, seeds, st.sampled_from(FLOATS), st.sampled_from([1.0, 1e-2, 1e4]))
    def test_compose_agrees_with_the_oracle(self, shape, seed, dtype, scale):
        g = generator(seed)
        predictions = (scale * torch.randn(shape, generator=g)).to(dtype)
        weights = torch.rand(shape[0], shape[1], *shape[3:], generator=g).softmax(dim=0)
        composed = core.compose(predictions=predictions, weights=weights)
        assert composed.dtype == dtype
        expected = oracle.compose(exact(predictions), exact(weights))
        assert_close(composed, expected, relative_to=exact(predictions), tolerance=ROUNDING[dtype])

    def test_compose_sums_half_precision_in_float32(self):
        # In float16 two ones are lost beside 2048; together they make the next number.
        predictions = torch.tensor([2048.0, 1.0, 1.0], dtype=torch.float16).view(3, 1, 1, 1, 1)
        assert core.compose(predictions, torch.ones(3, 1, 1, 1)).item() == 2050

    def test_compose_of_huge_predictions(self):
        predictions = torch.full((3, 1, 4, 2, 2), 1e38)
        assert_close(core.compose(predictions, torch.full((3, 1, 2, 2), 1 / 3)), np.full((1, 4, 2, 2), 1e38), 1e38)

    def test_weights_are_shared_by_the_channels_and_not_by_the_images(self):
        predictions = torch.stack([torch.zeros(2, 3, 1, 2), torch.ones(2, 3, 1, 2)])
        weights = torch.tensor([[[0.25, 0.5]], [[0.75, 1.0]]])
        composed = core.compose(predictions, torch.stack([1 - weights, weights]))
        assert torch.equal(composed, weights.unsqueeze(1).expand(2, 3, 1, 2))

    @given(shapes, seeds, st.sampled_from(FLOATS), st.sampled_from([0, 0.0, 0.25, 0.5, 0.9, 1.0, 1]))
    def test_recenter_agrees_with_the_oracle(self, shape, seed, dtype, share):
        g = generator(seed)
        base, composed = (torch.randn(shape[1:], generator=g).to(dtype) for _ in range(2))
        result = core.recenter(base_uncond=base, composed_uncond=composed, base_share=share)
        assert result.dtype == dtype
        expected = oracle.recenter(exact(base), exact(composed), share)
        assert_close(result, expected, relative_to=max(exact(base).max(), 1), tolerance=2 * ROUNDING[dtype])

    def test_recenter_at_its_ends_is_exact(self):
        base, composed = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
        assert torch.equal(core.recenter(base, composed, 1.0), base)
        assert torch.equal(core.recenter(base, composed, 0.0), composed)

    def test_the_order_of_parameterisations_does_not_matter(self):
        # Weights sum to 1: composing x0 = x - sigma * eps is composing eps.
        g = generator(0)
        x, sigma = torch.randn(1, 4, 6, 6, generator=g), 3.0
        eps = torch.randn(3, 1, 4, 6, 6, generator=g)
        pixels = torch.rand(3, 1, 6, 6, generator=g).softmax(dim=0)
        from_noise = x - sigma * core.compose(eps, pixels)
        assert_close(core.compose(x - sigma * eps, pixels), exact(from_noise), relative_to=exact(from_noise))


def test_signatures_that_others_call():
    names = {name: list(inspect.signature(getattr(core, name)).parameters) for name in core.__all__ if name.islower()}
    assert names["patch_similarity"] == ["eps", "eps_base", "patch_size"]
    assert names["softmin_weights"] == ["similarity", "temperature", "top_k", "scope", "log_claim"]
    assert names["relative_similarity"] == ["similarity", "gamma"]
    assert names["adaptive_temperature"] == ["score", "kappa", "chosen"]
    assert names["upsample_weights"] == ["weights", "size", "patch_size", "mode"]
    assert names["compose"] == ["predictions", "weights", "base"]
    assert names["recenter"] == ["base_uncond", "composed_uncond", "base_share"]


def options(**changed):
    plain = {
        "patch_size": 2,
        "temperature": 0.05,
        "temperature_mode": "fixed",
        "relativity": 0.0,
        "base_share": 0.5,
        "upsampling": "nearest",
        "top_k": 0,
        "selection_scope": "image",
        "combination": "shares",
        "sharpness": 4.0,
        "patches": "grid",
        "regions": False,
        "rest": False,
    }
    return {**plain, **changed}


@st.composite
def method_options(draw):
    return options(
        patch_size=draw(st.integers(1, 9)),
        temperature=draw(st.sampled_from([0.05, 0.3, 1.0, 1e6])),
        temperature_mode=draw(st.sampled_from(["fixed", "adaptive"])),
        relativity=draw(st.sampled_from([0.0, 0.5, 1.0])),
        base_share=draw(st.sampled_from([0.0, 0.25, 0.5, 1.0])),
        upsampling=draw(st.sampled_from(["nearest", "bilinear"])),
        top_k=draw(st.integers(0, 4)),
        selection_scope=draw(st.sampled_from(["image", "patch"])),
        combination=draw(st.sampled_from(["shares", "gates"])),
        sharpness=draw(st.sampled_from([0.0, 0.5, 1.0, 4.0])),
        patches=draw(st.sampled_from(["grid", "grid", "sliding"])),
        regions=draw(st.booleans()),
        rest=draw(st.booleans()),
    )


def step(n, image_of_row, seed=0, size=(7, 5), spread=0.7, with_uncond=True, isolated_uncond=True):
    """A step's `Predictions`: noise eps, and host outputs x0 = x - sigma * eps, so that the two are told apart."""
    g = generator(seed)
    rows, images, sigma = len(image_of_row), max(image_of_row) + 1, 2.5
    x = torch.randn(images, 4, *size, generator=g)
    eps_base = torch.randn(rows, 4, *size, generator=g)
    loud = torch.linspace(0.5, 1.5, n).view(n, 1, 1, 1, 1) if n else 1.0
    eps = eps_base + spread * loud * torch.randn(n, rows, 4, *size, generator=g)
    x_rows = x[list(image_of_row)]
    return core.Predictions(
        host_cond=x_rows - sigma * eps_base,
        host_uncond=torch.randn(images, 4, *size, generator=g) if with_uncond else None,
        cond=x_rows - sigma * eps,
        uncond=torch.randn(n, images, 4, *size, generator=g) if with_uncond and isolated_uncond else None,
        eps_base=eps_base,
        eps=eps,
        image_of_row=tuple(image_of_row),
        gain=-sigma,
    )


def expected(predictions, chosen):
    def maybe(tensor):
        return None if tensor is None else exact(tensor)

    return oracle.loratorio(
        exact(predictions.eps),
        exact(predictions.eps_base),
        exact(predictions.cond),
        maybe(predictions.uncond),
        maybe(predictions.host_uncond),
        predictions.image_of_row,
        chosen,
        base_cond=exact(predictions.host_cond),
    )


class TestLoRAtorio:
    # AND: three rows of image 0, two of image 1; rows of an image need not be neighbours.
    ROWS = [(0,), (0, 1), (0, 0, 0), (0, 0, 1, 1, 1), (1, 0, 1)]

    @given(method_options(), st.integers(1, 4), st.sampled_from(ROWS), st.integers(0, 1000), st.booleans())
    def test_agrees_with_the_oracle_end_to_end(self, chosen, n, rows, seed, with_uncond):
        wants = core.LoRAtorio(**chosen).plan(0, n).uncond
        predictions = step(n, rows, seed, with_uncond=with_uncond, isolated_uncond=wants)
        result = core.LoRAtorio(**chosen).combine(predictions)
        cond, uncond, weights = expected(predictions, chosen)
        # The scores themselves are float32: temperature 0.05 magnifies their rounding a little.
        tolerance = 1e-4
        assert_close(result.weights, weights, tolerance=tolerance)
        assert_close(result.cond, cond, relative_to=cond, tolerance=tolerance)
        if not with_uncond:
            assert result.uncond is None
            return
        assert_close(result.uncond, uncond, relative_to=max(1, np.abs(uncond).max()), tolerance=tolerance)
        row_weights = [1.0 + 0.25 * row for row in range(len(rows))]
        guided = oracle.guide(exact(result.cond), exact(result.uncond), rows, row_weights, 7.0)
        wanted = oracle.guide(cond, uncond, rows, row_weights, 7.0)
        assert np.abs(guided - wanted).max() <= 10 * tolerance * np.abs(wanted).max()

    def test_weights_come_from_noise_and_apply_to_the_hosts_outputs(self):
        predictions = step(2, (0,), size=(4, 4))
        result = core.LoRAtorio(**options()).combine(predictions)
        similarity = oracle.patch_similarity(exact(predictions.eps), exact(predictions.eps_base), 2)
        assert_close(result.weights, oracle.softmin_weights(similarity, 0.05), tolerance=1e-4)
        from_outputs = oracle.patch_similarity(exact(predictions.cond), exact(predictions.host_cond), 2)
        assert np.abs(similarity - from_outputs).max() > 0.01

    def test_the_image_uncond_is_weighted_by_the_mean_of_its_own_rows(self):
        rows = (0, 1, 0)
        predictions = step(2, rows, seed=3, size=(4, 4))
        method = core.LoRAtorio(**options(base_share=0.0))
        pixels = core.upsample_weights(method.weights(predictions.eps, predictions.eps_base), (4, 4), 2)
        mean = torch.stack([pixels[:, [0, 2]].mean(dim=1), pixels[:, 1]], dim=1)
        assert_close(method.combine(predictions).uncond, exact(core.compose(predictions.uncond, mean)), 5.0)

    @pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
    def test_base_share(self, share):
        predictions = step(1, (0, 1))
        uncond = core.LoRAtorio(**options(base_share=share)).combine(predictions).uncond
        assert_close(
            uncond, share * exact(predictions.host_uncond) + (1 - share) * exact(predictions.uncond[0]), relative_to=5.0
        )

    def test_a_plan_with_isolated_unconds_is_held_to_them(self):
        # Re-centring silently left out would look like success.
        with pytest.raises((TypeError, ValueError, AttributeError)):
            core.LoRAtorio(**options(base_share=0.5)).combine(step(2, (0,), isolated_uncond=False))

    def test_one_lora_takes_all_and_recentres(self):
        predictions = step(1, (0, 1))
        result = core.LoRAtorio(**options(temperature_mode="adaptive")).combine(predictions)
        assert (result.weights == 1).all()
        assert torch.equal(result.cond, predictions.cond[0])

    @pytest.mark.parametrize("mode", ["fixed", "adaptive"])
    @pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
    @pytest.mark.parametrize("n", [2, 5])
    def test_copies_of_one_lora_compose_to_its_own_score(self, n, gamma, mode):
        one = step(1, (0, 1), seed=n)
        copies = core.Predictions(
            host_cond=one.host_cond,
            host_uncond=one.host_uncond,
            cond=one.cond.expand(n, -1, -1, -1, -1),
            uncond=one.uncond.expand(n, -1, -1, -1, -1),
            eps_base=one.eps_base,
            eps=one.eps.expand(n, -1, -1, -1, -1),
            image_of_row=one.image_of_row,
            gain=-2.5,
        )
        method = core.LoRAtorio(**options(temperature_mode=mode, relativity=gamma))
        result = method.combine(copies)
        assert_close(result.weights, np.full(result.weights.shape, 1 / n))
        assert_close(result.cond, exact(one.cond[0]), relative_to=exact(one.cond))
        assert_close(result.uncond, exact(method.combine(one).uncond), relative_to=5.0)

    @pytest.mark.parametrize("mode", ["fixed", "adaptive"])
    @pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
    def test_loras_that_change_nothing_give_the_base_models_own_score(self, gamma, mode):
        one = step(1, (0, 1))
        silent = core.Predictions(
            host_cond=one.host_cond,
            host_uncond=one.host_uncond,
            cond=one.host_cond.expand(3, -1, -1, -1, -1),
            uncond=one.host_uncond.expand(3, -1, -1, -1, -1),
            eps_base=one.eps_base,
            eps=one.eps_base.expand(3, -1, -1, -1, -1),
            image_of_row=one.image_of_row,
            gain=-2.5,
        )
        result = core.LoRAtorio(**options(temperature_mode=mode, relativity=gamma)).combine(silent)
        assert_close(result.weights, np.full(result.weights.shape, 1 / 3))
        assert_close(result.cond, exact(one.host_cond), relative_to=exact(one.host_cond))
        assert_close(result.uncond, exact(one.host_uncond), relative_to=5.0)

    def test_high_temperature_is_composites_mean(self):
        predictions = step(3, (0, 1))
        result = core.LoRAtorio(**options(temperature=1e6)).combine(predictions)
        assert_close(result.cond, oracle.composite(exact(predictions.cond)), relative_to=exact(predictions.cond))

    def test_low_temperature_takes_each_patch_from_one_lora(self):
        predictions = step(3, (0,), size=(6, 6))
        result = core.LoRAtorio(**options(temperature=1e-4)).combine(predictions)
        similarity = oracle.patch_similarity(exact(predictions.eps), exact(predictions.eps_base), 2)
        winners = similarity[:, 0].argmin(axis=0).repeat(2, axis=0).repeat(2, axis=1)
        for y in range(6):
            for x in range(6):
                wanted = predictions.cond[winners[y, x], 0, :, y, x]
                assert torch.allclose(result.cond[0, :, y, x], wanted, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("p, grid", [(7, (1, 1)), (64, (1, 1)), (1, (7, 5)), (4, (2, 2)), (5, (2, 1))])
    def test_patch_size_from_pixel_to_image(self, p, grid):
        result = core.LoRAtorio(**options(patch_size=p)).combine(step(2, (0,), size=(7, 5)))
        assert result.weights.shape == (2, 1, *grid)

    @given(method_options(), st.permutations(range(4)), st.integers(0, 1000))
    def test_the_order_of_the_loras_does_not_matter(self, chosen, order, seed):
        predictions = step(4, (0, 0, 1), seed)
        shuffled = core.Predictions(
            host_cond=predictions.host_cond,
            host_uncond=predictions.host_uncond,
            cond=predictions.cond[order],
            uncond=predictions.uncond[order],
            eps_base=predictions.eps_base,
            eps=predictions.eps[order],
            image_of_row=predictions.image_of_row,
            gain=-2.5,
        )
        method = core.LoRAtorio(**chosen)
        first, second = method.combine(predictions), method.combine(shuffled)
        assert_close(second.weights, exact(first.weights[order]), tolerance=1e-4)
        assert_close(second.cond, exact(first.cond), relative_to=exact(first.cond), tolerance=1e-4)
        assert_close(second.uncond, exact(first.uncond), relative_to=5.0, tolerance=1e-4)

    @given(method_options(), st.integers(0, 1000))
    def test_doubling_the_batch_changes_no_image(self, chosen, seed):
        one = step(3, (0, 0, 1), seed)
        two = core.Predictions(
            host_cond=one.host_cond.repeat(2, 1, 1, 1),
            host_uncond=one.host_uncond.repeat(2, 1, 1, 1),
            cond=one.cond.repeat(1, 2, 1, 1, 1),
            uncond=one.uncond.repeat(1, 2, 1, 1, 1),
            eps_base=one.eps_base.repeat(2, 1, 1, 1),
            eps=one.eps.repeat(1, 2, 1, 1, 1),
            image_of_row=(0, 0, 1, 2, 2, 3),
            gain=-2.5,
        )
        method = core.LoRAtorio(**chosen)
        single, double = method.combine(one), method.combine(two)
        assert_close(double.cond, exact(single.cond.repeat(2, 1, 1, 1)), relative_to=exact(single.cond))
        assert_close(double.uncond, exact(single.uncond.repeat(2, 1, 1, 1)), relative_to=5.0)

    @pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
    @pytest.mark.parametrize("scope", ["image", "patch"])
    def test_selection_keeps_the_most_divergent_whatever_the_relativity(self, scope, gamma):
        # With gamma 1 every LoRA's mean relative divergence is 1: ranking by it would be ranking rounding errors.
        for seed in range(8):
            predictions = step(4, (0, 1), seed, spread=0.2)
            chosen = options(top_k=2, selection_scope=scope, relativity=gamma)
            weights = core.LoRAtorio(**chosen).combine(predictions).weights
            similarity = oracle.patch_similarity(exact(predictions.eps), exact(predictions.eps_base), 2)
            assert ((weights > 0).numpy() <= oracle.top_k_mask(similarity, 2, scope)).all()
            assert_close(weights, expected(predictions, chosen)[2], tolerance=1e-4)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_models_get_half_precision_back(self, dtype):
        full = step(3, (0, 0, 1))
        half = core.Predictions(
            **{
                name: value.to(dtype) if isinstance(value, torch.Tensor) else value
                for name, value in vars(full).items()
            }
        )
        chosen = options(temperature_mode="adaptive", temperature=0.3)
        result = core.LoRAtorio(**chosen).combine(half)
        assert result.cond.dtype == result.uncond.dtype == dtype and result.weights.dtype == torch.float32
        cond, uncond, weights = expected(half, chosen)
        assert_close(result.weights, weights, tolerance=1e-4)
        assert_close(result.cond, cond, relative_to=cond, tolerance=2 * ROUNDING[dtype])
        assert_close(result.uncond, uncond, relative_to=uncond, tolerance=2 * ROUNDING[dtype])

    def test_predictions_are_left_alone(self):
        predictions = step(3, (0, 0, 1))
        before = {name: value.clone() for name, value in vars(predictions).items() if isinstance(value, torch.Tensor)}
        core.LoRAtorio(**options()).combine(predictions)
        assert all(torch.equal(getattr(predictions, name), value) for name, value in before.items())


def rows_of(plan, images=1):
    """Rows that a plan evaluates in a step, the host's own pass (cond and uncond) included."""
    return images * (2 + len(plan.isolated) * (2 if plan.uncond else 1))


class TestPlans:
    @pytest.mark.parametrize("n", [1, 2, 3, 6])
    def test_cost_of_loratorio(self, n):
        plan = core.LoRAtorio(**options(base_share=0.5)).plan(0, n)
        assert plan.host == core.Plan.BASE and plan.isolated == tuple(range(n))
        assert rows_of(plan) == 2 * (n + 1)
        assert rows_of(core.LoRAtorio(**options(base_share=0.0)).plan(0, n)) == 2 * (n + 1)
        assert rows_of(core.LoRAtorio(**options(base_share=1.0)).plan(0, n)) == n + 2

    @pytest.mark.parametrize("n", [1, 2, 3, 6])
    def test_cost_of_composite_is_one_evaluation_a_lora(self, n):
        plan = core.Composite().plan(0, n)
        assert sorted((plan.host, *plan.isolated)) == list(range(n))
        assert plan.uncond and rows_of(plan) == 2 * n

    @pytest.mark.parametrize("every", [1, 2, 5])
    @pytest.mark.parametrize("n", [1, 2, 3])
    def test_switch_takes_turns_in_prompt_order(self, n, every):
        for at in range(4 * n * every):
            plan = core.Switch(every).plan(at, n)
            assert plan.host == oracle.switch(at, every, n)
            assert plan.isolated == ()

    def test_merge_is_the_hosts_own_pass(self):
        plan = core.Merge().plan(3, 4)
        assert plan.host == core.Plan.MERGED and plan.isolated == ()

    def test_special_hosts_are_no_index_of_a_lora(self):
        assert core.Plan.BASE < 0 and core.Plan.MERGED < 0 and core.Plan.BASE != core.Plan.MERGED


def composite_step(n, dtype=torch.float32, with_uncond=True):
    """The host's pass is LoRA 0; the others are isolated."""
    g = generator(n)
    cond = torch.randn(n, 3, 4, 5, 4, generator=g).to(dtype)
    uncond = torch.randn(n, 2, 4, 5, 4, generator=g).to(dtype)
    predictions = core.Predictions(
        host_cond=cond[0],
        host_uncond=uncond[0] if with_uncond else None,
        cond=cond[1:],
        uncond=uncond[1:] if with_uncond else None,
        eps_base=cond[0],
        eps=cond[1:],
        image_of_row=(0, 0, 1),
        gain=-2.5,
    )
    return predictions, cond, uncond


class TestBaselines:
    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("n", [1, 2, 3, 6])
    def test_composite_is_the_mean_of_all(self, n, dtype):
        predictions, cond, uncond = composite_step(n, dtype)
        result = core.Composite().combine(predictions)
        assert result.weights is None
        assert result.cond.dtype == result.uncond.dtype == dtype
        for actual, parts in ((result.cond, cond), (result.uncond, uncond)):
            mean = oracle.composite(exact(parts))
            assert_close(actual, mean, relative_to=exact(parts), tolerance=ROUNDING[dtype])

    def test_composite_without_uncond_rows(self):
        predictions, cond, _ = composite_step(3, with_uncond=False)
        result = core.Composite().combine(predictions)
        assert result.uncond is None
        assert_close(result.cond, oracle.composite(exact(cond)), relative_to=5.0)

    def test_composite_of_one_without_isolated_predictions(self):
        predictions, cond, uncond = composite_step(1)
        result = core.Composite().combine(predictions)
        assert torch.equal(result.cond, cond[0]) and torch.equal(result.uncond, uncond[0])

    def test_composite_ignores_the_order(self):
        predictions, cond, _ = composite_step(4)
        order = random.Random(0).sample(range(4), 4)
        shuffled = core.Predictions(
            **{**vars(predictions), "host_cond": cond[order[0]], "cond": cond[order[1:]], "uncond": predictions.uncond}
        )
        first = core.Composite().combine(predictions).cond
        assert_close(core.Composite().combine(shuffled).cond, exact(first), relative_to=5.0)

    @pytest.mark.parametrize("method", [core.Switch(5), core.Merge()])
    def test_switch_and_merge_leave_the_hosts_pass_as_it_is(self, method):
        predictions, *_ = composite_step(1)
        result = method.combine(predictions)
        assert torch.equal(result.cond, predictions.host_cond)
        assert torch.equal(result.uncond, predictions.host_uncond)
        assert result.weights is None


class TestMethodFromSettings:
    def test_every_method_gets_the_options_of_its_name(self):
        chosen = Settings(
            patch_size=7, temperature=0.7, relativity=0.25, upsampling="bilinear", base_share=0.75, top_k=3,
            patches="grid", momentum=0.0, regions=False, rest=False,
        )  # fmt: skip
        assert core.method_from(chosen) == core.LoRAtorio(7, 0.7, "adaptive", 0.25, 0.75, "bilinear", 3, "image")
        gates = Settings(combination="gates", sharpness=2, patches="sliding", momentum=0.0)
        wanted = {"combination": "gates", "sharpness": 2.0, "patches": "sliding"}
        assert wanted.items() <= vars(core.method_from(gates)).items()
        carrying = core.method_from(Settings(momentum=0.5))
        assert isinstance(carrying, core.Momentum)
        assert (carrying.method, carrying.momentum) == (core.method_from(Settings(momentum=0.0)), 0.5)
        paper = Settings.from_mapping({"preset": "paper"})
        assert core.method_from(paper) == core.LoRAtorio(
            paper.patch_size, 1.0, "fixed", 0.0, 0.5, "nearest", 0, "image"
        )
        assert core.method_from(Settings(method="switch", switch_every=3)).plan(3, 2).host == 1
        assert core.method_from(Settings(method="composite")) == core.Composite()
        assert core.method_from(Settings(method="merge")) == core.Merge()

    def test_an_option_a_method_uses_says_so(self):
        for name in ("loratorio", "composite", "switch", "merge"):
            fields = set(vars(core.method_from(Settings(method=name, momentum=0.0))))
            around = {"refresh", "warmup", "reselect_every", "momentum"}  # of what comes around the method
            around |= {"show_maps", "styles"}  # of the host, and of who competes at all
            assert fields == {option.name for option in OPTIONS if option.methods == (name,)} - around


def test_the_oracle_itself_on_a_case_done_by_hand():
    # Two LoRAs, one pixel row of two patches: the first LoRA turns against the base on the left, the second agrees.
    base = np.ones((1, 1, 1, 2))
    eps = np.array([[[[[-1.0, 1.0]]]], [[[[1.0, 1.0]]]]])
    similarity = oracle.patch_similarity(eps, base, 1)
    assert similarity[:, 0, 0].tolist() == [[-1, 1], [1, 1]]
    weights = oracle.softmin_weights(similarity, 1.0)
    assert weights[0, 0, 0].tolist() == pytest.approx([math.e**2 / (math.e**2 + 1), 0.5])
    assert oracle.relative_divergence(similarity, 1)[:, 0, 0].tolist() == [[2, 0], [0, 0]]
    assert oracle.adaptive_temperature(similarity, 0.3).item() == pytest.approx(0.3 * (1 + 0) / 2)
    assert oracle.upsample_bilinear(np.array([[[[0.0, 1.0]]]]), (1, 4), 2).ravel().tolist() == [0, 0.25, 0.75, 1]
