"""Divergence in a window around every pixel, against the oracle and against patches where the two are the same."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given

from loratorio_ext import core
from tests import oracle
from tests.test_core import assert_close, exact, generator, noises, options, step


class TestWindowDivergence:
    @given(noises(scales=[1.0, 1e-3, 1e3, 1e18, 1e-18]))
    def test_agrees_with_the_oracle(self, case):
        eps, base, p = case
        divergence = core.window_divergence(eps, base, p)
        assert divergence.dtype == torch.float32
        assert_close(divergence, 1 - oracle.window_similarity(exact(eps), exact(base), p))

    def test_small_divergences_are_resolved(self):
        g = generator(3)
        base = torch.randn(1, 4, 9, 9, generator=g)
        eps = 1.3 * base + 0.003 * torch.randn(2, 1, 4, 9, 9, generator=g)
        expected = 1 - oracle.window_similarity(exact(eps), exact(base), 4)
        assert 1e-6 < expected.max() < 1e-4
        assert_close(core.window_divergence(eps, base, 4), expected, relative_to=expected, tolerance=1e-3)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_any_dtype_is_computed_in_float32(self, dtype):
        base = torch.randn(2, 4, 6, 6, generator=generator(0)).to(dtype)
        eps = torch.randn(3, 2, 4, 6, 6, generator=generator(1)).to(dtype)
        divergence = core.window_divergence(eps, base, 3)
        assert divergence.dtype == torch.float32
        assert_close(divergence, 1 - oracle.window_similarity(exact(eps), exact(base), 3))

    @given(noises(scales=[1.0, 1e3]))
    def test_a_pixel_each_is_the_patch_of_one_pixel(self, case):
        eps, base, _ = case
        assert_close(core.window_divergence(eps, base, 1), exact(core.patch_divergence(eps, base, 1)), tolerance=1e-5)

    def test_within_an_odd_window_it_is_the_cosine_of_that_cut(self):
        g = generator(2)
        base, eps = torch.randn(1, 4, 7, 7, generator=g), torch.randn(1, 1, 4, 7, 7, generator=g)
        divergence = core.window_divergence(eps, base, 3)
        inner = torch.cosine_similarity(eps[0, 0, :, 2:5, 3:6].flatten(), base[0, :, 2:5, 3:6].flatten(), dim=0)
        corner = torch.cosine_similarity(eps[0, 0, :, :2, 5:].flatten(), base[0, :, :2, 5:].flatten(), dim=0)
        assert abs(1 - divergence[0, 0, 3, 4] - inner) < 1e-5
        assert abs(1 - divergence[0, 0, 0, 6] - corner) < 1e-5

    @pytest.mark.parametrize("p", [2, 3, 4])
    def test_windows_are_centred(self, p):
        """What is mirrored has the mirrored divergence."""
        g = generator(4)
        base, eps = torch.randn(1, 4, 6, 8, generator=g), torch.randn(2, 1, 4, 6, 8, generator=g)
        mirrored = core.window_divergence(eps.flip(-1, -2), base.flip(-1, -2), p).flip(-1, -2)
        assert_close(mirrored, exact(core.window_divergence(eps, base, p)))

    def test_larger_than_twice_the_image_is_one_window(self):
        g = generator(5)
        base, eps = torch.randn(1, 4, 5, 4, generator=g), torch.randn(1, 1, 4, 5, 4, generator=g)
        whole = 1 - torch.cosine_similarity(eps.flatten(), base.flatten(), dim=0)
        assert_close(core.window_divergence(eps, base, 64), np.full((1, 1, 5, 4), whole))

    @pytest.mark.parametrize("size", [(8, 8), (7, 5)])
    def test_windows_that_are_all_the_whole_image_leave_nothing_to_compete_by(self, size):
        """Relative divergence is 1 everywhere then, and rounding must not decide who wins: all weights are alike."""
        adaptive = options(patch_size=64, patches="sliding", relativity=1.0, temperature_mode="adaptive")
        eps = torch.randn(3, 1, 4, *size, generator=generator(5))
        weights = core.LoRAtorio(**adaptive).weights(eps, torch.randn(1, 4, *size, generator=generator(6)))
        assert (weights - 1 / 3).abs().max() < 0.01

    def test_what_is_not_a_number_is_not_hidden(self):
        eps, base = torch.randn(2, 1, 4, 5, 5), torch.randn(1, 4, 5, 5)
        eps[0, 0, 0, 0, 0] = math.nan
        assert core.window_divergence(eps, base, 2)[0].isnan().any()

    @pytest.mark.parametrize("p", [0, -1])
    def test_patch_size_must_be_positive(self, p):
        with pytest.raises(ValueError, match="patch_size"):
            core.window_divergence(torch.ones(1, 1, 1, 2, 2), torch.ones(1, 1, 2, 2), p)


@pytest.mark.parametrize("combination", ["shares", "gates"])
def test_weights_have_no_borders(combination):
    """Two LoRAs, one at home on the left, one on the right: patches change hands from one pixel to the next."""
    predictions = step(2, (0,), size=(16, 16))
    left = torch.where(torch.arange(16) < 8, 1.0, 0.6)
    home = torch.stack([left, left.flip(0)]).view(2, 1, 1, 1, 16)
    eps = predictions.eps_base + home * torch.randn(1, 4, 16, 16, generator=generator(0))
    predictions = replace(predictions, eps=eps)
    chosen = options(combination=combination, patch_size=4, sharpness=1.0, temperature_mode="adaptive", temperature=1.0)
    jumps = {}
    for patches in ("grid", "sliding"):
        weights = core.LoRAtorio(**{**chosen, "patches": patches}).combine(predictions).weights
        pixels = core.upsample_weights(weights, (16, 16), 1 if patches == "sliding" else 4)
        jumps[patches] = pixels.diff(dim=-1).abs().amax()
    assert weights.shape == (2, 1, 16, 16)
    assert jumps["sliding"] < 0.7 * jumps["grid"]
