"""Whole regions: what they are told by, in cases that can be told without computing them, and against the oracle."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loratorio_ext import core
from loratorio_ext.core.regions import COHESION, LEAST, at_least_typical, log_neighbourhood, typical
from tests import oracle
from tests.test_core import assert_close, exact, options, similarities, step

SIZE = 12
HALF = SIZE // 2


def whole(**changed):
    return core.LoRAtorio(
        **options(**{"regions": True, "temperature_mode": "adaptive", "patches": "sliding", **changed})
    )


def weights_of(relative, rest=None, **changed):
    return whole(**changed).weights(relative, None, relative=relative, rest=rest)


def scene():
    """A background that diverges in the lower three quarters and hardly in its sky; a thing that is loud in a corner
    and would rather see surroundings of its own: everywhere a little, in the sky too. ``[2, 1, 12, 12]``."""
    background, thing = torch.full((SIZE, SIZE), 1.2), torch.full((SIZE, SIZE), 0.6)
    background[:3] = 0.3
    thing[-4:, -4:] = 6.0
    return torch.stack([background, thing]).unsqueeze(1)


class TestTypical:
    @given(similarities())
    def test_agrees_with_the_oracle(self, similarity):
        relative = core.relative_divergence(1 - similarity, 1.0)
        assert_close(
            at_least_typical(relative, typical(relative)), oracle.at_least_typical(exact(relative)), relative_to=10.0
        )

    def test_nobody_is_below_its_own_and_who_is_above_stays(self):
        relative = torch.arange(10.0).view(1, 1, 2, 5).repeat(2, 1, 1, 1)
        relative[1] += 100
        found = at_least_typical(relative, typical(relative))
        assert found[0].flatten().tolist() == pytest.approx([5.4] * 6 + [6, 7, 8, 9])
        assert found[1].flatten().tolist() == pytest.approx([105.4] * 6 + [106, 107, 108, 109])


class TestNeighbourhood:
    @given(similarities(), st.integers(1, 4))
    def test_agrees_with_the_oracle(self, similarity, reach):
        weights = core.softmin_weights(similarity, 0.1)
        found = log_neighbourhood(weights, reach).exp()
        assert_close(found, oracle.neighbourhood(exact(weights), reach), tolerance=1e-4)

    def test_at_an_edge_counts_what_there_is(self):
        factor = log_neighbourhood(torch.full((2, 1, 4, 4), 0.5), 2).exp()
        torch.testing.assert_close(factor, torch.full_like(factor, 0.5**COHESION))

    def test_who_is_nowhere_around_may_come_back(self):
        assert log_neighbourhood(torch.zeros(1, 1, 4, 4), 2).exp().min() == pytest.approx(LEAST**COHESION)


class TestWeights:
    def test_a_background_keeps_its_sky_and_a_thing_its_corner(self):
        patch_by_patch = replace(whole(), regions=False).weights(scene(), None, relative=scene())
        assert patch_by_patch[1, 0, 0].min() > 0.6  # the sky is the thing's
        weights = weights_of(scene())
        assert weights[0, 0, 0].min() > 0.95
        assert weights[1, 0, -3:, -3:].min() > 0.95

    def test_a_spot_in_anothers_region_is_its(self):
        relative = torch.full((2, 1, SIZE, SIZE), 1.0)
        relative[0, :, :, :4], relative[1, :, :, -4:] = 2.0, 2.0
        relative[1, 0, 6, 1] = 2.1
        assert replace(whole(), regions=False).weights(relative, None, relative=relative)[1, 0, 6, 1] > 0.5
        assert weights_of(relative)[1, 0, 6, 1] < 0.1

    @pytest.mark.parametrize("n", [2, 5])
    def test_who_diverges_alike_has_alike(self, n):
        relative = scene()[:1].repeat(n, 1, 1, 1)
        assert_close(weights_of(relative), torch.full_like(relative, 1 / n).numpy())

    def test_one_alone_has_all(self):
        assert (weights_of(scene()[1:]) == 1).all()

    def test_nobody_gains_where_it_may_not_act(self):
        place = torch.ones(2, SIZE, SIZE)
        place[0, :, :HALF] = 0
        predictions = replace(step(2, (0,), size=(SIZE, SIZE)), place=place)
        weights = whole().combine(predictions).weights
        assert (weights[0, 0, :, :HALF] == 0).all() and (weights[1, 0, :, :HALF] == 1).all()
        assert_close(weights.sum(dim=0), torch.ones(1, SIZE, SIZE).numpy())

    def test_gates_know_no_regions(self):
        predictions = step(3, (0, 1))
        on, off = (core.LoRAtorio(**options(combination="gates", regions=regions)) for regions in (True, False))
        assert torch.equal(on.combine(predictions).weights, off.combine(predictions).weights)
