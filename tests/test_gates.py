"""The gated sum: what it is in the cases that can be told without computing it, and against the oracle."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loratorio_ext import core
from tests import oracle
from tests.test_core import assert_close, exact, generator, options, similarities, step
from tests.test_places import SIZE, halves, places, shares

SHARPNESS = [0.0, 0.5, 1.0, 4.0, 64.0]


def gated(**changed):
    return core.LoRAtorio(**options(combination="gates", **changed))


def differences(predictions):
    return predictions.cond - predictions.host_cond


@st.composite
def cases(draw):
    """Everything that `core.gates` takes: (relative, chosen, prior, share), LoRAs that diverge nowhere among them."""
    relative = core.relative_divergence(1 - draw(similarities()), draw(st.sampled_from([0.0, 0.5, 1.0])))
    n, _, h, w = relative.shape
    chosen = torch.rand(relative.shape, generator=generator(draw(st.integers(0, 1000)))) > 0.3
    prior = draw(st.one_of(st.none(), places(n, (h, w))))
    return (
        relative,
        draw(st.sampled_from([None, chosen])),
        None if prior is None else prior.unsqueeze(1),
        draw(st.one_of(st.none(), shares(n))),
    )


class TestGates:
    @given(cases(), st.sampled_from(SHARPNESS))
    def test_agrees_with_the_oracle(self, case, sharpness):
        relative, chosen, prior, share = case
        n, _, h, w = relative.shape
        found = core.gates(relative, sharpness, chosen, prior, share)
        wanted = oracle.gates(
            exact(relative),
            sharpness,
            np.ones(relative.shape, bool) if chosen is None else chosen.numpy(),
            np.ones(n) if share is None else exact(share),
            np.ones((n, h, w)) if prior is None else exact(prior[:, 0]),
        )
        assert found.dtype == torch.float32 and (found >= 0).all() and (found <= 1).all()
        assert_close(found, wanted, tolerance=1e-4)

    @given(similarities(), st.sampled_from(SHARPNESS[1:]))
    def test_the_most_divergent_acts_in_full_and_who_does_not_diverge_not_at_all(self, similarity, sharpness):
        relative = core.relative_divergence(1 - similarity, 0.0)
        gates = core.gates(relative, sharpness)
        diverges = relative.amax(dim=0) > 0
        assert torch.equal(gates.amax(dim=0), diverges.float())
        assert (gates[relative == 0] == 0).all()

    @given(similarities(), st.permutations(range(6)), st.floats(0.01, 100))
    def test_neither_the_order_nor_a_common_factor_matters(self, similarity, order, factor):
        relative = core.relative_divergence(1 - similarity, 0.5)
        order = [i for i in order if i < len(relative)]
        gates = core.gates(relative, 4.0)
        # Where a number lies in memory decides how it is rounded.
        torch.testing.assert_close(core.gates(relative[order], 4.0), gates[order])
        torch.testing.assert_close(core.gates(relative * factor, 4.0), core.gates(relative, 4.0), rtol=1e-4, atol=1e-6)

    def test_by_hand(self):
        relative = torch.tensor([[4.0, 1.0], [2.0, 1.0], [0.0, 0.0]]).view(3, 1, 1, 2)
        assert core.gates(relative, 2.0).flatten(1).tolist() == [[1, 1], [0.25, 1], [0, 0]]
        share = torch.tensor([0.25, 1.0, 1.0])
        assert core.gates(relative, 1.0, share=share).flatten(1).tolist() == [[0.5, 0.25], [1, 1], [0, 0]]

    def test_a_rival_counts_as_far_as_it_may_act(self):
        relative = torch.tensor([4.0, 8.0]).view(2, 1, 1, 1)
        for reach, rival in ((1.0, 0.5), (0.75, 4 / 6), (0.5, 1.0), (1e-6, 1.0), (0.0, 1.0)):
            prior = torch.tensor([1.0, reach]).view(2, 1, 1, 1)
            gates = core.gates(relative, 1.0, prior=prior).flatten()
            torch.testing.assert_close(gates, torch.tensor([rival, reach]))

    def test_who_is_left_out_is_no_rival(self):
        relative = torch.tensor([1.0, 100.0]).view(2, 1, 1, 1)
        chosen = torch.tensor([True, False]).view(2, 1, 1, 1)
        for sharpness in SHARPNESS:
            assert core.gates(relative, sharpness, chosen).flatten().tolist() == [1, 0]

    def test_extremes_stay_numbers(self):
        relative = torch.tensor([1e-38, 1e-30, 4096.0, 0.0]).view(4, 1, 1, 1)
        prior = torch.tensor([1.0, 1e-38, 1e-30, 1.0]).view(4, 1, 1, 1)
        for share in (None, torch.tensor([1e30, 1e-30, 1.0, 1e30])):
            for sharpness in SHARPNESS:
                gates = core.gates(relative, sharpness, prior=prior, share=share)
                assert gates.isfinite().all() and (gates <= 1).all()

    def test_what_is_not_a_number_is_not_hidden(self):
        relative = torch.ones(2, 1, 1, 2)
        relative[0, 0, 0, 0] = torch.nan
        assert core.gates(relative, 4.0)[:, 0, 0, 0].isnan().any()


class TestComposition:
    @pytest.mark.parametrize("sharpness", SHARPNESS)
    @pytest.mark.parametrize("n", [1, 2, 5])
    def test_copies_of_one_lora_add_up(self, n, sharpness):
        one = step(1, (0, 1), seed=n)
        copies = replace(
            one, **{name: getattr(one, name).expand(n, -1, -1, -1, -1) for name in ("cond", "uncond", "eps")}
        )
        result = gated(sharpness=sharpness, base_share=0.0).combine(copies)
        assert (result.weights == 1).all()
        cond = exact(one.host_cond) + n * exact(differences(one)[0])
        assert_close(result.cond, cond, relative_to=cond)
        uncond = exact(one.host_uncond) + n * exact(one.uncond[0] - one.host_uncond)
        assert_close(result.uncond, uncond, relative_to=uncond)

    @pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
    def test_a_lora_alone_is_its_own_score_and_recentres(self, share):
        predictions = step(1, (0, 0, 1))
        result = gated(base_share=share).combine(predictions)
        assert (result.weights == 1).all()
        assert_close(result.cond, exact(predictions.cond[0]), relative_to=5.0)
        uncond = share * exact(predictions.host_uncond) + (1 - share) * exact(predictions.uncond[0])
        assert_close(result.uncond, uncond, relative_to=5.0)

    @pytest.mark.parametrize("patches", ["grid", "sliding"])
    def test_a_lora_that_changes_nothing_changes_nothing(self, patches):
        """Neither alone nor in company."""
        predictions = step(3, (0, 1))
        silent = {
            "cond": predictions.host_cond,
            "uncond": predictions.host_uncond,
            "eps": predictions.eps_base,
        }
        with_one = replace(
            predictions,
            **{name: torch.cat([getattr(predictions, name), own.unsqueeze(0)]) for name, own in silent.items()},
        )
        method = gated(patches=patches)
        result, without = method.combine(with_one), method.combine(predictions)
        assert (result.weights[3] == 0).all() and torch.equal(result.weights[:3], without.weights)
        assert_close(result.cond, exact(without.cond), relative_to=5.0)
        assert_close(result.uncond, exact(without.uncond), relative_to=5.0)
        alone = method.combine(replace(predictions, **{name: own.unsqueeze(0) for name, own in silent.items()}))
        assert (alone.weights == 0).all()
        assert torch.equal(alone.cond, predictions.host_cond) and torch.equal(alone.uncond, predictions.host_uncond)

    def test_sharpness_0_is_the_plain_sum_of_differences(self):
        predictions = step(4, (0, 0, 1))
        result = gated(sharpness=0.0, base_share=0.0).combine(predictions)
        assert_close(result.cond, exact(predictions.host_cond + differences(predictions).sum(dim=0)), 10.0)
        uncond = predictions.host_uncond + (predictions.uncond - predictions.host_uncond).sum(dim=0)
        assert_close(result.uncond, exact(uncond), relative_to=10.0)

    def test_high_sharpness_takes_each_patch_from_one_lora(self):
        order = torch.stack([torch.randperm(4, generator=generator(i)) for i in range(24)]).T.reshape(4, 2, 3, 4)
        gates = core.gates(1 + order.float(), 64.0)
        assert torch.equal(gates.round(decimals=5), (order == 3).float())

    @given(st.integers(1, 4), st.integers(0, 1000), st.sampled_from(SHARPNESS))
    def test_every_parameterisation_gives_the_same(self, n, seed, sharpness):
        """Also where the gates add up to more than 1: noise, x0 = x - sigma * eps, and v."""
        full = step(n, (0, 1), seed)
        x = full.host_cond - full.gain * full.eps_base
        method = gated(sharpness=sharpness)
        as_noise = method.combine(replace(full, host_cond=full.eps_base, cond=full.eps, gain=1.0))
        as_x0 = method.combine(full)
        scale = float(as_x0.cond.abs().max())
        assert_close(as_x0.cond, exact(x) + full.gain * exact(as_noise.cond), relative_to=scale)
        v = replace(full, host_cond=0.6 * full.eps_base - 0.8 * x, cond=0.6 * full.eps - 0.8 * x, gain=0.6)
        assert_close(method.combine(v).cond, 0.6 * exact(as_noise.cond) - 0.8 * exact(x), relative_to=scale)

    def test_soft_halves_leave_no_gap_between_equals(self):
        one = step(1, (0,))
        pair = replace(
            one,
            **{name: getattr(one, name).expand(2, -1, -1, -1, -1) for name in ("cond", "uncond", "eps")},
            place=halves(2),
        )
        result = gated(patch_size=1).combine(pair)
        assert_close(result.weights.sum(dim=0), np.ones((1, *SIZE)))
        assert_close(result.cond, exact(one.cond[0]), relative_to=5.0)

    def test_nowhere_is_the_base_models_own(self):
        predictions = replace(step(3, (0, 0, 1)), place=torch.zeros(3, *SIZE))
        result = gated().combine(predictions)
        assert (result.weights == 0).all()
        assert torch.equal(result.cond, predictions.host_cond)
        torch.testing.assert_close(result.uncond, predictions.host_uncond)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_models_get_half_precision_back(self, dtype):
        full = step(3, (0, 0, 1))
        half = replace(
            full,
            **{name: each.to(dtype) for name, each in vars(full).items() if isinstance(each, torch.Tensor)},
        )
        result = gated().combine(half)
        assert result.cond.dtype == result.uncond.dtype == dtype and result.weights.dtype == torch.float32
        cond, _, weights = oracle.loratorio(
            *map(exact, (half.eps, half.eps_base, half.cond, half.uncond, half.host_uncond)),
            half.image_of_row,
            options(combination="gates"),
            base_cond=exact(half.host_cond),
        )
        assert_close(result.weights, weights, tolerance=1e-4)
        assert_close(result.cond, cond, relative_to=cond, tolerance=2**-7)
