"""Where and how much: LoRAs with a place in the image and a share of their own, against the oracle."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loratorio_ext import core
from tests import oracle
from tests.test_core import assert_close, composite_step, exact, generator, method_options, options, step
from tests.test_reselection import only

SIZE = (7, 5)
ROWS = [(0,), (0, 1), (0, 0, 1), (1, 0, 1)]


def ramp(size=SIZE):
    """Rising from 0 to 1 from left to right, both included."""
    return torch.linspace(0, 1, size[1]).expand(size)


def halves(n, size=SIZE, hard=False):
    """The right side and the left in turn, which add up to 1 in every pixel of two."""
    right = ramp(size).round() if hard else ramp(size)
    return torch.stack([right if i % 2 == 0 else 1 - right for i in range(n)])


@st.composite
def places(draw, n, size=SIZE):
    """``[n, H, W]``: everywhere, nowhere, soft and hard edges, holes, faint."""
    kinds = {
        "everywhere": lambda g: torch.ones(size),
        "nowhere": lambda g: torch.zeros(size),
        "soft": lambda g: ramp(size),
        "hard": lambda g: 1 - ramp(size).round(),
        "holes": lambda g: (torch.rand(size, generator=g) > 0.5).float(),
        "faint": lambda g: 1e-6 * torch.rand(size, generator=g),
        "any": lambda g: torch.rand(size, generator=g),
    }
    g = generator(draw(st.integers(0, 1000)))
    return torch.stack([kinds[draw(st.sampled_from(sorted(kinds)))](g) for _ in range(n)])


def shares(n):
    return st.lists(st.sampled_from([1.0, 0.01, 0.5, 2.0, 100.0]), min_size=n, max_size=n).map(torch.tensor)


def expected(predictions, chosen, mask=None):
    def maybe(tensor):
        return None if tensor is None else exact(tensor)

    return oracle.loratorio(
        *(exact(each) for each in (predictions.eps, predictions.eps_base, predictions.cond)),
        *(maybe(each) for each in (predictions.uncond, predictions.host_uncond)),
        predictions.image_of_row,
        chosen,
        mask,
        *(maybe(each) for each in (predictions.place, predictions.share)),
        exact(predictions.host_cond),
        rest=False if predictions.rest is None else predictions.rest.numpy(),
        kept=None if predictions.kept is None else predictions.kept.numpy(),
    )


def assert_agree(result, wanted, tolerance=1e-4):
    for found, value in zip((result.cond, result.uncond, result.weights), wanted):
        assert (found is None) == (value is None)
        if value is not None:
            assert_close(found, value, relative_to=max(1, np.abs(value).max()), tolerance=tolerance)


class TestPrior:
    @given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 8), st.integers(1, 8), st.integers(0, 1000))
    def test_agrees_with_the_oracle(self, n, p, height, width, seed):
        place = torch.rand(n, height, width, generator=generator(seed))
        prior = core.LoRAtorio(**options(patch_size=p)).prior(place)
        assert_close(prior[:, 0], oracle.patch_prior(exact(place), p))

    def test_a_partial_patch_counts_with_the_pixels_it_has(self):
        place = torch.zeros(1, 5, 5)
        place[..., 4:] = 1
        assert core.LoRAtorio(**options(patch_size=4)).prior(place).tolist() == [[[[0, 1], [0, 1]]]]

    def test_everywhere_is_exactly_one(self):
        for p in (3, 7, 64):
            assert (core.LoRAtorio(**options(patch_size=p)).prior(torch.ones(2, 11, 13)) == 1).all()


class TestPlacesOfEachRow:
    """Rows in which a LoRA may act elsewhere than in others, as where only some images of a batch name it."""

    @staticmethod
    def row_of(predictions, row):
        """The step as if this row were all there is."""
        image = predictions.image_of_row[row]
        return replace(
            predictions,
            **{name: getattr(predictions, name)[row : row + 1] for name in ("host_cond", "eps_base")},
            **{name: getattr(predictions, name)[:, row : row + 1] for name in ("cond", "eps")},
            host_uncond=predictions.host_uncond[image : image + 1],
            uncond=predictions.uncond[:, image : image + 1],
            image_of_row=(0,),
            place=predictions.place[:, row],
        )

    @given(st.data(), method_options(), st.integers(1, 4), st.sampled_from(ROWS), st.integers(0, 1000))
    def test_each_row_is_the_oracles_with_its_own_places(self, data, chosen, n, rows, seed):
        place = torch.stack([data.draw(places(n)) for _ in rows], dim=1)
        predictions = replace(step(n, rows, seed), place=place, share=data.draw(st.one_of(st.none(), shares(n))))
        result = core.LoRAtorio(**chosen).combine(predictions)
        side = 1 if chosen["patches"] == "sliding" else chosen["patch_size"]
        base_share, pixels = chosen["base_share"], []
        for row in range(len(rows)):
            cond, _, weights = expected(self.row_of(predictions, row), chosen)
            assert_close(result.weights[:, row : row + 1], weights, tolerance=1e-4)
            assert_close(result.cond[row : row + 1], cond, relative_to=max(1, np.abs(cond).max()), tolerance=1e-4)
            pixels.append(oracle.UPSAMPLE[chosen["upsampling"]](weights, SIZE, side)[:, 0])
        for image in range(len(predictions.host_uncond)):
            mean = np.mean([pixels[row] for row in range(len(rows)) if rows[row] == image], axis=0)[:, None]
            own, base = (exact(each[..., image, :, :, :]) for each in (predictions.uncond, predictions.host_uncond))
            uncond = oracle.recenter(base[None], oracle.compose(own[:, None], mean, base[None]), base_share)
            scale = max(1, np.abs(uncond).max())
            assert_close(result.uncond[image : image + 1], uncond, relative_to=scale, tolerance=1e-4)

    @given(st.data(), st.integers(1, 4), st.sampled_from(ROWS), st.integers(0, 1000))
    def test_composite(self, data, n, rows, seed):
        place = torch.stack([data.draw(places(n)) for _ in rows], dim=1)
        share = data.draw(st.one_of(st.none(), shares(n)))
        predictions = replace(step(n, rows, seed), place=place, share=share)
        result = core.Composite().combine(predictions)
        shared = None if share is None else exact(share)
        for row in range(len(rows)):
            one = self.row_of(predictions, row)
            cond = oracle.composite(exact(one.cond), shared, exact(one.place), exact(one.host_cond))
            assert_close(result.cond[row : row + 1], cond, relative_to=max(1, np.abs(cond).max()), tolerance=1e-4)
        if len(set(rows)) == len(rows):  # then an image's weights are its one row's
            for row, image in enumerate(rows):
                one = self.row_of(predictions, row)
                uncond = oracle.composite(exact(one.uncond), shared, exact(one.place), exact(one.host_uncond))
                scale = max(1, np.abs(uncond).max())
                assert_close(result.uncond[image : image + 1], uncond, relative_to=scale, tolerance=1e-4)

    @given(method_options(), st.integers(1, 4), st.sampled_from(ROWS), st.integers(0, 1000))
    def test_the_same_in_every_row_is_one_for_all(self, chosen, n, rows, seed):
        predictions = step(n, rows, seed)
        for method in (core.LoRAtorio(**chosen), core.Composite()):
            all_rows = method.combine(replace(predictions, place=halves(n)))
            each_row = method.combine(replace(predictions, place=halves(n).unsqueeze(1).expand(n, len(rows), *SIZE)))
            torch.testing.assert_close(each_row.cond, all_rows.cond)
            torch.testing.assert_close(each_row.uncond, all_rows.uncond)

    def test_a_row_in_which_nobody_may_act_is_the_base_models(self):
        predictions = step(2, (0, 1))
        place = torch.ones(2, 2, *SIZE)
        place[:, 1] = 0
        for method in (core.LoRAtorio(**options(base_share=0.0)), core.Composite()):
            result = method.combine(replace(predictions, place=place))
            torch.testing.assert_close(result.cond[1], predictions.host_cond[1])
            torch.testing.assert_close(result.uncond[1], predictions.host_uncond[1])
            assert not torch.allclose(result.cond[0], predictions.host_cond[0], atol=0.1)


class TestLoRAtorio:
    @given(st.data(), method_options(), st.integers(1, 4), st.sampled_from(ROWS), st.integers(0, 1000), st.booleans())
    def test_agrees_with_the_oracle_end_to_end(self, data, chosen, n, rows, seed, with_uncond):
        method = core.LoRAtorio(**chosen)
        predictions = replace(
            step(n, rows, seed, with_uncond=with_uncond, isolated_uncond=method.plan(0, n).uncond),
            place=data.draw(st.one_of(st.none(), places(n))),
            share=data.draw(st.one_of(st.none(), shares(n))),
        )
        result = method.combine(predictions)
        assert result.weights.isfinite().all() and (result.weights >= 0).all()
        assert_agree(result, expected(predictions, chosen))

    @given(method_options(), st.integers(1, 4), st.sampled_from(ROWS), st.integers(0, 1000))
    def test_shares_of_one_change_no_bit(self, chosen, n, rows, seed):
        method, predictions = core.LoRAtorio(**chosen), step(n, rows, seed)
        plain, shared = method.combine(predictions), method.combine(replace(predictions, share=torch.ones(n)))
        for name in ("cond", "uncond", "weights"):
            assert torch.equal(getattr(plain, name), getattr(shared, name))

    @given(method_options(), st.integers(1, 4), st.sampled_from(ROWS), st.integers(0, 1000))
    def test_a_place_that_is_everywhere_changes_nothing(self, chosen, n, rows, seed):
        method, predictions = core.LoRAtorio(**chosen), step(n, rows, seed)
        plain = method.combine(predictions)
        placed = method.combine(replace(predictions, place=torch.ones(n, *SIZE)))
        for name in ("cond", "uncond", "weights"):
            torch.testing.assert_close(getattr(placed, name), getattr(plain, name), rtol=1e-5, atol=1e-4)

    @given(st.data(), method_options(), st.permutations(range(4)), st.integers(0, 1000))
    def test_the_order_of_the_loras_does_not_matter(self, data, chosen, order, seed):
        place, share = data.draw(places(4)), data.draw(shares(4))
        predictions = replace(step(4, (0, 0, 1), seed), place=place, share=share)
        shuffled = replace(
            predictions,
            **{name: getattr(predictions, name)[order] for name in ("cond", "uncond", "eps", "place", "share")},
        )
        method = core.LoRAtorio(**chosen)
        first, second = method.combine(predictions), method.combine(shuffled)
        torch.testing.assert_close(second.weights, first.weights[order], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(second.cond, first.cond, rtol=1e-3, atol=2e-3)
        torch.testing.assert_close(second.uncond, first.uncond, rtol=1e-3, atol=2e-3)

    @pytest.mark.parametrize("mode", ["fixed", "adaptive"])
    @pytest.mark.parametrize("share", [1.0, 0.01, 100.0])
    def test_a_lora_alone_acts_as_far_as_its_place_says(self, mode, share):
        predictions = replace(step(1, (0, 1)), place=ramp()[None], share=torch.tensor([share]))
        result = core.LoRAtorio(**options(patch_size=1, temperature_mode=mode, base_share=0.25)).combine(predictions)
        assert_close(result.weights, exact(ramp().expand(1, 2, *SIZE)))
        p = ramp()
        torch.testing.assert_close(result.cond, p * predictions.cond[0] + (1 - p) * predictions.host_cond)
        own = p * predictions.uncond[0] + (1 - p) * predictions.host_uncond
        torch.testing.assert_close(result.uncond, 0.25 * predictions.host_uncond + 0.75 * own)

    def test_left_and_right_with_soft_edges_leave_no_gap(self):
        predictions = replace(step(2, (0, 1)), place=halves(2))
        result = core.LoRAtorio(**options(patch_size=1)).combine(predictions)
        assert_close(result.weights.sum(dim=0), np.ones((2, *SIZE)))
        assert (result.weights[0, ..., 0] == 0).all() and (result.weights[1, ..., -1] == 0).all()

    @pytest.mark.parametrize("mode", ["fixed", "adaptive"])
    def test_halves_are_each_loras_own_prediction(self, mode):
        place = halves(2, (4, 6), hard=True)
        predictions = replace(step(2, (0, 1), size=(4, 6)), place=place)
        result = core.LoRAtorio(**options(patch_size=1, temperature_mode=mode, base_share=0.0)).combine(predictions)
        right = place[0].bool()
        torch.testing.assert_close(result.cond, torch.where(right, *predictions.cond))
        torch.testing.assert_close(result.uncond, torch.where(right, *predictions.uncond))

    def test_nowhere_is_the_base_models_own(self):
        predictions = replace(step(3, (0, 0, 1)), place=torch.zeros(3, *SIZE))
        result = core.LoRAtorio(**options(temperature_mode="adaptive", top_k=2)).combine(predictions)
        assert (result.weights == 0).all()
        torch.testing.assert_close(result.cond, predictions.host_cond)
        torch.testing.assert_close(result.uncond, predictions.host_uncond)

    def test_what_a_lora_does_where_it_is_no_candidate_touches_nobody(self):
        """Neither the others' weights there, nor the temperature."""
        chosen = options(temperature_mode="adaptive", patch_size=1)
        place = torch.stack([torch.ones(SIZE), torch.ones(SIZE), ramp().round()])
        predictions = replace(step(3, (0,)), place=place)
        eps = predictions.eps.clone()
        eps[2, ..., :2] += 50
        louder = core.LoRAtorio(**chosen).combine(replace(predictions, eps=eps))
        assert torch.equal(louder.weights, core.LoRAtorio(**chosen).combine(predictions).weights)

    def test_patches_of_a_single_candidate_do_not_lower_the_temperature(self):
        """Two LoRAs that meet in one column only: there they share as two LoRAs of an image of that column do."""
        place = torch.zeros(2, 6, 6)
        place[0, :, :4], place[1, :, 3:] = 1, 1
        chosen = options(temperature_mode="adaptive", temperature=0.5, patch_size=1)
        full = step(2, (0,), size=(6, 6))
        column = step(2, (0,), size=(6, 1))
        column = replace(column, eps=full.eps[..., 3:4], eps_base=full.eps_base[..., 3:4])
        result = core.LoRAtorio(**chosen).combine(replace(full, place=place))
        torch.testing.assert_close(result.weights[..., 3:4], core.LoRAtorio(**chosen).combine(column).weights)

    @pytest.mark.parametrize("share", [0.01, 0.5, 2.0, 100.0])
    def test_a_share_multiplies_the_odds(self, share):
        predictions = step(2, (0, 1))
        method = core.LoRAtorio(**options(temperature_mode="adaptive", temperature=1.0))
        plain = method.combine(predictions).weights
        shared = method.combine(replace(predictions, share=torch.tensor([share, 1.0]))).weights
        odds = share * plain[0] / plain[1]
        torch.testing.assert_close(shared[0], odds / (1 + odds))

    def test_extremes_stay_numbers(self):
        place = torch.stack([torch.full(SIZE, 1e-38), torch.full(SIZE, 1e-30), torch.zeros(SIZE)])
        share = torch.tensor([1e-30, 1e30, 1.0])
        for temperature in (1e-4, 1e6):
            method = core.LoRAtorio(**options(temperature=temperature))
            weights = method.combine(replace(step(3, (0,)), place=place, share=share)).weights
            assert weights.isfinite().all() and (weights <= 1).all()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_models(self, dtype):
        full = replace(step(3, (0, 0, 1)), place=halves(3), share=torch.tensor([1.0, 2.0, 0.5]))
        half = core.Predictions(
            **{name: each.to(dtype) if isinstance(each, torch.Tensor) else each for name, each in vars(full).items()}
        )
        result = core.LoRAtorio(**options()).combine(half)
        assert result.cond.dtype == result.uncond.dtype == dtype and result.weights.dtype == torch.float32
        assert_agree(result, expected(half, options()), tolerance=2**-7)


class TestSelection:
    def test_a_lora_takes_no_ones_place_where_it_may_not_act(self):
        """The loudest LoRA may act on the right only: on the left the next two are kept."""
        place = torch.stack([torch.ones(SIZE), torch.ones(SIZE), torch.ones(SIZE), ramp().round()])
        predictions = replace(step(4, (0,), spread=2.0), place=place)
        weights = core.LoRAtorio(**options(top_k=2, selection_scope="patch", patch_size=1)).combine(predictions).weights
        assert ((weights > 0).sum(dim=0) == 2).all()
        assert (weights[3, ..., :2] == 0).all()

    def test_an_images_ranking_goes_by_what_a_lora_does_in_its_place(self):
        base = torch.ones(1, 4, 4, 8)
        eps = base.repeat(3, 1, 1, 1, 1)
        eps[0, ..., :4] *= -1  # loud on the left, where it may not act
        eps[1, :, 0] *= -0.5
        eps[2, :, 1] *= 0.2
        right = torch.zeros(4, 8)
        right[:, 4:] = 1
        place = torch.stack([right, torch.ones(4, 8), torch.ones(4, 8)])
        method = core.LoRAtorio(**options(top_k=2))
        chosen = method.choose(core.patch_similarity(eps, base, 2), method.prior(place))
        assert chosen.flatten(1).any(dim=1).tolist() == [False, True, True]

    def test_who_is_left_out_covers_nothing(self):
        """Only one of the two sides is kept: on the other the base model remains, as it would without that LoRA."""
        place = halves(2, hard=True)
        predictions = replace(step(2, (0,)), place=place)
        result = core.LoRAtorio(**options(top_k=1, patch_size=1)).combine(predictions)
        left = ~place[0].bool()  # the second LoRA is the louder one
        torch.testing.assert_close(result.cond[0], torch.where(left, predictions.cond[1, 0], predictions.host_cond[0]))

    @given(st.data(), method_options(), st.integers(1, 3), st.integers(2, 4), st.integers(0, 1000))
    def test_every_nth_step_agrees_with_the_oracle(self, data, chosen, every, n, seed):
        method, selection = core.Reselection(core.LoRAtorio(**chosen), every), oracle.Selection(every)
        place, share = data.draw(places(n)), data.draw(shares(n))
        for number in range(4):
            full = replace(step(n, (0, 1), 100 * seed + number), place=place, share=share)
            plan = method.plan(number, n)
            assert plan.members == tuple(range(n))
            result = method.combine(only(full, plan))
            mask = selection(exact(full.eps), exact(full.eps_base), chosen, exact(place))
            assert_agree(result, expected(full, chosen, mask))

    def test_of_a_pool_that_may_act_nowhere_nobody_is_evaluated_again(self):
        method = core.Reselection(core.LoRAtorio(**options(top_k=1)), 4)
        full = replace(step(3, (0,)), place=torch.zeros(3, *SIZE))
        method.combine(only(full, method.plan(0, 3)))
        plan = method.plan(1, 3)
        assert plan.isolated == () and plan.members == (0, 1, 2)
        result = method.combine(only(full, plan))
        assert torch.equal(result.cond, full.host_cond) and torch.equal(result.uncond, full.host_uncond)
        assert result.weights.shape == (3, 1, 4, 3) and (result.weights == 0).all()


class TestInTurn:
    @pytest.mark.parametrize("refresh, warmup", [(1, 0), (1, 1), (2, 1)])
    @pytest.mark.parametrize("top_k", [0, 2])
    def test_agrees_with_the_oracle(self, refresh, warmup, top_k):
        chosen = options(temperature_mode="adaptive", top_k=top_k)
        n, rows = 3, (0, 0, 1)
        place, share = torch.stack([ramp(), 1 - ramp(), torch.ones(SIZE)]), torch.tensor([1.0, 3.0, 0.5])
        method, reuse = core.InTurn(core.LoRAtorio(**chosen), refresh, warmup), oracle.Reuse(refresh, warmup)
        for number in range(8):
            full = replace(step(n, rows, number), place=place, share=share)
            result = method.combine(only(full, method.plan(number, n)))
            base, host_cond = exact(full.eps_base), exact(full.host_cond)
            eps, unconds = reuse(exact(full.eps), base, exact(full.uncond), exact(full.host_uncond), full.gain)
            cond = host_cond + full.gain * (eps - base)
            wanted = oracle.loratorio(
                eps, base, cond, unconds, exact(full.host_uncond), rows, chosen, None, exact(place), exact(share),
                host_cond,
            )  # fmt: skip
            assert_agree(result, wanted, tolerance=5e-4)


class TestComposite:
    @given(st.data(), st.integers(1, 4))
    def test_places_agree_with_the_oracle(self, data, n):
        place, share = data.draw(places(n)), data.draw(st.one_of(st.none(), shares(n)))
        plan = core.Composite().plan(0, n, placed=True)
        assert plan.host == core.Plan.BASE and plan.isolated == plan.members == tuple(range(n))
        predictions = replace(step(n, (0, 0, 1)), place=place, share=share)
        result = core.Composite().combine(predictions)
        weights = (None if share is None else exact(share), exact(place))
        for found, parts, base in (
            (result.cond, predictions.cond, predictions.host_cond),
            (result.uncond, predictions.uncond, predictions.host_uncond),
        ):
            assert_close(found, oracle.composite(exact(parts), *weights, exact(base)), relative_to=exact(parts))

    @given(st.data(), st.integers(1, 4))
    def test_shares_alone_need_no_base(self, data, n):
        predictions, cond, uncond = composite_step(n)
        share = data.draw(shares(n))
        result = core.Composite().combine(replace(predictions, share=share))
        assert core.Composite().plan(0, n).host == 0
        for found, parts in ((result.cond, cond), (result.uncond, uncond)):
            assert_close(found, oracle.composite(exact(parts), exact(share)), relative_to=exact(parts))

    def test_shares_of_one_are_the_plain_mean(self):
        predictions, *_ = composite_step(3)
        plain = core.Composite().combine(predictions)
        shared = core.Composite().combine(replace(predictions, share=torch.ones(3)))
        torch.testing.assert_close(shared.cond, plain.cond)
        torch.testing.assert_close(shared.uncond, plain.uncond)


METHODS = [core.LoRAtorio(**options()), core.Composite(), core.Switch(2)]


class TestMembers:
    @pytest.mark.parametrize("placed", [False, True])
    @pytest.mark.parametrize("method", [*METHODS, core.Merge()], ids=lambda method: type(method).__name__)
    def test_all_is_what_nothing_said_means(self, method, placed):
        for number in range(7):
            assert method.plan(number, 3, (0, 1, 2), placed) == method.plan(number, 3, None, placed)

    def test_loras_that_do_not_act_cost_nothing(self):
        plan = core.LoRAtorio(**options()).plan(0, 5, [1, 4])
        assert (plan.host, plan.isolated, plan.members) == (core.Plan.BASE, (1, 4), (1, 4))
        plan = core.Composite().plan(0, 5, [1, 3, 4])
        assert (plan.host, plan.isolated, plan.members) == (1, (3, 4), (1, 3, 4))
        assert core.Merge().plan(0, 5, [1]) == core.Merge().plan(0, 5)

    def test_switch_takes_turns_among_those_that_act(self):
        hosts = [core.Switch(2).plan(number, 5, (1, 4)).host for number in range(6)]
        assert hosts == [1, 1, 4, 4, 1, 1]

    @pytest.mark.parametrize("given", [None, torch.ones(0)], ids=["none", "empty"])
    @pytest.mark.parametrize(
        "method",
        [*METHODS, core.InTurn(METHODS[0], 1, 0), core.Reselection(core.LoRAtorio(**options(top_k=1)), 2)],
        ids=lambda method: type(method).__name__,
    )
    def test_nobody_is_the_base_model(self, method, given):
        plan = method.plan(0, 3, ())
        assert (plan.host, plan.isolated, plan.members) == (core.Plan.BASE, (), ())
        place = None if given is None else given.view(0, 1, 1).expand(0, *SIZE)
        full = replace(step(0, (0, 0, 1)), place=place, share=given)
        result = method.combine(full)
        assert torch.equal(result.cond, full.host_cond) and torch.equal(result.uncond, full.host_uncond)
        if isinstance(method, core.Switch | core.Composite):
            assert result.weights is None
        else:
            assert result.weights.shape == (0, 3, 4, 3)
