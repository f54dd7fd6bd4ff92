"""The rest: who has what no LoRA is clearly at home in, in cases that can be told without computing them, and beside
the oracle."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loratorio_ext import core
from loratorio_ext.core.regions import typical
from loratorio_ext.core.rest import ALIKE, REST, base_claim, disagreement, of_rest, room
from tests import oracle
from tests.test_core import assert_close, exact, generator, method_options, options, similarities, step
from tests.test_places import ROWS, assert_agree, expected, places, shares
from tests.test_regions import SIZE, scene, weights_of, whole

LEFT, RIGHT = slice(1, 4), slice(-4, -1)


def things(seed=0, rows=1):
    """Two things that change the model's noise a lot where they are, one in an upper corner each, and everywhere
    else a little, each in its own way: eps ``[2, R, 4, 12, 12]`` and eps_base ``[R, 4, 12, 12]``."""
    g = generator(seed)
    eps_base = torch.randn(rows, 4, SIZE, SIZE, generator=g)
    change = 0.1 * torch.randn(2, rows, 4, SIZE, SIZE, generator=g)
    for each, place in zip(change, (LEFT, RIGHT)):
        each[..., LEFT, place] *= 10
    return eps_base + change, eps_base


def of(eps, eps_base, **changed):
    """Weights of them by the defaults of this project, momentum apart, with the rest to the bare model."""
    chosen = {"relativity": 1.0, "temperature": 0.3, "rest": True, **changed}
    return whole(**chosen).weights(eps, eps_base)


def room_of(relative, members):
    return room(relative, typical(relative), members)


def members(n, rows=1):
    return torch.ones(n, rows, dtype=torch.bool)


class TestDisagreement:
    @given(st.integers(1, 5), st.sampled_from(ROWS), st.integers(0, 1000), st.booleans())
    def test_the_claim_agrees_with_the_oracle(self, n, rows, seed, some):
        predictions = step(n, rows, seed, size=(6, 5))
        relative = torch.rand(n, len(rows), 6, 5, generator=generator(seed)) ** 4
        chosen = torch.rand(relative.shape, generator=generator(seed + 1)) > (0.97 if some else -1)
        found = base_claim(predictions.eps, predictions.eps_base, relative, typical(relative), chosen if some else None)
        wanted = oracle.claim_of_base(
            *(exact(each) for each in (predictions.eps, predictions.eps_base, relative)), chosen.numpy()
        )
        assert_close(found, wanted, tolerance=1e-4)

    def test_copies_agree_and_independent_ones_do_not(self):
        eps, eps_base = things()
        copies = eps[:1].repeat(3, 1, 1, 1, 1)
        assert disagreement(copies, eps_base, members(3)).tolist() == [0]
        assert disagreement(copies + 1e-4 * torch.randn_like(copies), eps_base, members(3)).tolist() == [0]
        assert disagreement(eps, eps_base, members(2)).item() > 0.8

    def test_of_one_lora_at_half_its_strength(self):
        eps, eps_base = things()
        half = torch.stack([eps[0], eps_base + (eps[0] - eps_base) / 2])
        assert disagreement(half, eps_base, members(2)).item() == pytest.approx(0.2, rel=1e-4)

    def test_opposites_do_not_disagree_more_than_strangers(self):
        eps, eps_base = things()
        opposite = torch.stack([eps[0], 2 * eps_base - eps[0]])
        assert disagreement(opposite, eps_base, members(2)).tolist() == [1]

    @pytest.mark.parametrize("scale", [1e-30, 1e30])
    def test_however_large_the_changes_are(self, scale):
        eps, eps_base = things()
        change = eps - eps_base
        found = disagreement(scale * change, torch.zeros_like(eps_base), members(2))
        assert_close(found, disagreement(change, torch.zeros_like(eps_base), members(2)).double().numpy())

    def test_nobody_alone_disagrees(self):
        eps, eps_base = things()
        assert disagreement(eps, eps_base, torch.tensor([[True], [False]])).tolist() == [0]
        assert disagreement(eps, eps_base, members(2) & False).tolist() == [0]

    def test_who_changes_nothing_disagrees_with_nobody(self):
        _, eps_base = things()
        assert disagreement(eps_base.expand(2, 1, 4, SIZE, SIZE), eps_base, members(2)).tolist() == [0]

    def test_less_than_rounding_is_none(self):
        g, eps_base = generator(1), torch.zeros(1, 4, SIZE, SIZE)
        one, other = torch.randn(2, 1, 4, SIZE, SIZE, generator=g)
        for distance, disagrees in ((0.1 * ALIKE**0.5, False), (10 * ALIKE**0.5, True)):
            found = disagreement(torch.stack([one, one + distance * other]), eps_base, members(2))
            assert (found.item() > 0) == disagrees


class TestHome:
    def test_who_is_everywhere_leaves_no_rest_and_who_has_a_corner_does(self):
        background, thing = scene()
        relative = core.relative_divergence(scene(), 1.0)
        assert room_of(relative, members(2)).tolist() == [0]
        assert room_of(relative, torch.tensor([[False], [True]])).tolist() == [1]
        even = torch.ones_like(background)
        assert room_of(torch.stack([even, thing]), members(2)).item() == pytest.approx(0, abs=1e-6)
        in_half = torch.linspace(0, 1, SIZE * SIZE).view(1, 1, SIZE, SIZE) ** 3
        assert 0 < room_of(in_half, members(1)).item() < 1

    def test_it_is_asked_in_units_of_each_ones_mean(self):
        relative = torch.cat([scene()[1:], 100 * scene()[1:]])
        assert_close(room_of(relative, members(2)), room_of(relative[:1], members(1)).numpy())

    def test_who_diverges_nowhere_is_at_home_nowhere(self):
        assert room_of(torch.zeros(2, 1, SIZE, SIZE), members(2)).tolist() == [1]


class TestWeights:
    def test_what_nobody_is_at_home_in_is_the_bare_models(self):
        eps, eps_base = things()
        shared, left = (of(eps, eps_base, rest=rest)[:, 0] for rest in (False, True))
        assert_close(shared.sum(dim=0), torch.ones(SIZE, SIZE).numpy())
        ground = left[:, 7:]
        assert ground.sum(dim=0).max() < 0.1
        for lora, place in enumerate((LEFT, RIGHT)):
            inside = left[lora, 2, place]
            assert inside.min() > 0.9, "a thing keeps its own place"

    @pytest.mark.parametrize("n", [1, 2, 4])
    @pytest.mark.parametrize("changed", [{}, {"temperature_mode": "fixed", "temperature": 1e-4}, {"regions": False}])
    def test_one_lora_and_its_copies_are_that_lora(self, n, changed):
        eps, eps_base = things()
        weights = of(eps[:1].repeat(n, 1, 1, 1, 1), eps_base, **changed)
        assert_close(weights, torch.full_like(weights, 1 / n).numpy())

    def test_beside_a_background_nothing_is_left(self):
        eps, eps_base = things()
        everywhere = eps_base + torch.randn(1, 1, 4, SIZE, SIZE, generator=generator(5))
        three = torch.cat([eps, everywhere])
        assert_close(of(three, eps_base).sum(dim=0), torch.ones(1, SIZE, SIZE).numpy(), tolerance=1e-3)

    def test_an_image_does_not_depend_on_its_batch(self):
        eps, eps_base = things(rows=2)
        eps[1, 1] = eps[0, 1]
        both = of(eps, eps_base)
        for row in range(2):
            assert_close(both[:, [row]], of(eps[:, [row]], eps_base[[row]]).double().numpy())
        assert both[:, 0].sum(dim=0).min() < 0.1 and both[:, 1].sum(dim=0).min() > 0.999

    def test_who_is_not_chosen_disagrees_with_nobody(self):
        eps, eps_base = things()
        weights = of(eps, eps_base, top_k=1)
        assert_close(weights.sum(dim=0), torch.ones(1, SIZE, SIZE).numpy())
        assert sorted(weights.amax(dim=(1, 2, 3)).tolist()) == [0, 1]

    def test_a_place_says_who_is_at_home(self):
        """Of its own image, and not of others: the first row's LoRAs have halves, the second row's the whole."""
        eps, eps_base = things(rows=2)
        place = torch.ones(2, 2, SIZE, SIZE)
        place[0, 0, :, SIZE // 2 :], place[1, 0, :, : SIZE // 2] = 0, 0
        weights = whole(relativity=1.0, temperature=0.3, rest=True).weights(eps, eps_base, place=place)
        assert_close(weights[:, 0].sum(dim=0), torch.ones(SIZE, SIZE).numpy())
        assert_close(weights[:, [1]], of(eps[:, [1]], eps_base[[1]]).double().numpy())

    def test_who_is_known_to_keep_the_rest_does_row_by_row(self):
        eps, eps_base = things(rows=2)
        method = whole(relativity=1.0, temperature=0.3, rest=True)
        weights = method.weights(eps, eps_base, kept=torch.tensor([[False, False], [True, False]]))
        assert_close(weights[:, 0].sum(dim=0), torch.ones(SIZE, SIZE).numpy())
        assert weights[1, 0, 7:].min() > 0.9 and weights[0, 0, 2, LEFT].min() > 0.9
        assert_close(weights[:, [1]], of(eps[:, [1]], eps_base[[1]]).double().numpy())

    def test_a_background_keeps_what_a_thing_is_not_clearly_at_home_in(self):
        """Where the thing diverges more than the background, though less than half as much again as it does in the
        mean; but not where it is at home."""
        thing = torch.full((1, 1, SIZE, SIZE), 3.0)
        thing[..., LEFT, LEFT] = 12
        background = torch.full_like(thing, 0.5)
        background[..., RIGHT, RIGHT] = 8
        relative = core.relative_divergence(torch.cat([background, thing]), 1.0)
        method = whole(relativity=1.0, temperature=0.3, rest=True, regions=False)
        shared, kept = (
            method.weights(*things(), relative=relative, kept=kept)[0, 0]
            for kept in (None, torch.tensor([[True], [False]]))
        )
        assert kept[:, 5:].min() > 0.95 and shared[4:-4].max() < 0.2
        assert kept[LEFT, LEFT].max() < 0.01

    def test_of_two_that_keep_it_who_diverges_more_has_it(self):
        """Each is at home in it; where neither diverges more than one must to be so, they share it."""
        eps, eps_base = things()
        relative = torch.full((3, 1, SIZE, SIZE), 0.5)
        relative[0, ..., :3], relative[1, ..., -3:] = 8, 8
        method = whole(relativity=0.0, temperature=0.3, rest=True, regions=False)
        kept = torch.tensor([[True], [True], [False]])
        weights = method.weights(torch.cat([eps, eps[:1]]), eps_base, relative=relative, kept=kept)[:, 0]
        assert weights[0, :, :3].min() > 0.9 and weights[1, :, -3:].min() > 0.9
        assert_close(weights[:2, :, 3:-3], torch.full((2, SIZE, SIZE - 6), 0.5).numpy(), tolerance=0.02)

    def test_who_is_not_chosen_keeps_nothing(self):
        """Of three, two that are chosen: as if there were but these, whatever the third would keep."""
        eps, eps_base = things()
        third = eps_base + 0.01 * torch.randn(1, 1, 4, SIZE, SIZE, generator=generator(7))
        method = whole(relativity=1.0, temperature=0.3, rest=True, top_k=2)
        weights = method.weights(torch.cat([eps, third]), eps_base, kept=torch.tensor([[False], [False], [True]]))
        assert_close(weights[:2], of(eps, eps_base).double().numpy())
        assert (weights[2] == 0).all()

    def test_who_is_not_in_an_image_disagrees_with_nobody_there(self):
        eps, eps_base = things(rows=2)
        place = torch.ones(2, 2, SIZE, SIZE)
        place[1, 0] = 0
        weights = whole(relativity=1.0, temperature=0.3, rest=True).weights(eps, eps_base, place=place)
        assert (weights[0, 0] == 1).all() and weights[:, 1].sum(dim=0).min() < 0.1

    @given(st.data(), method_options(), st.integers(1, 4), st.sampled_from(ROWS), st.integers(0, 1000))
    def test_steps_agree_with_the_oracle(self, data, chosen, n, rows, seed):
        """With divergences that leave a rest, which those of mere noise hardly do."""
        chosen |= {"combination": "shares", "rest": True, "relativity": 1.0}
        place = data.draw(st.one_of(st.none(), places(n)))
        share = data.draw(st.one_of(st.none(), shares(n)))
        kept = torch.tensor(data.draw(st.lists(st.booleans(), min_size=n * len(rows), max_size=n * len(rows))))
        kept = kept.view(n, len(rows)) if kept.any() else None
        predictions = replace(step(n, rows, seed, size=(12, 8)), kept=kept)
        quiet = 0.05 + (torch.rand(n, 1, 1, 12, 8, generator=generator(seed)) > 0.8).float()
        eps = predictions.eps_base + quiet * (predictions.eps - predictions.eps_base)
        cond = predictions.host_cond + predictions.gain * (eps - predictions.eps_base)
        if place is not None:
            place = torch.nn.functional.interpolate(place[None], (12, 8))[0]
        predictions = replace(predictions, eps=eps, cond=cond, place=place, share=share)
        assert_agree(core.LoRAtorio(**chosen).combine(predictions), expected(predictions, chosen), tolerance=1e-3)


class TestSurroundings:
    """Where the base model's pass knows the surroundings: it competes in full."""

    @given(similarities(), st.integers(0, 1000))
    def test_agrees_with_the_oracle(self, similarity, seed):
        relative = core.relative_divergence(1 - similarity, 0.5)
        chosen = torch.rand(relative.shape, generator=torch.Generator().manual_seed(seed)) > 0.8
        for mask in (torch.ones_like(chosen), chosen):
            found = of_rest(relative, None if mask.all() else mask)
            assert_close(found, oracle.of_rest(exact(relative), mask.numpy()), relative_to=10.0)

    @given(st.data(), method_options(), st.integers(0, 5), st.sampled_from(ROWS), st.integers(0, 1000))
    def test_steps_agree_with_the_oracle(self, data, chosen, n, rows, seed):
        chosen["combination"] = "shares"
        place = data.draw(st.one_of(st.none(), places(n))) if n else None
        share = data.draw(st.one_of(st.none(), shares(n))) if n else None
        rest = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows))))
        predictions = replace(step(n, rows, seed), place=place, share=share, rest=rest)
        if n:
            assert_agree(core.LoRAtorio(**chosen).combine(predictions), expected(predictions, chosen))
        else:
            assert torch.equal(core.LoRAtorio(**chosen).combine(predictions).cond, predictions.host_cond)

    def test_what_nobody_is_clearly_at_home_in_is_the_base_models(self):
        weights = weights_of(scene()[1:], rest=torch.tensor([True]))[0, 0]
        assert weights[-3:, -3:].min() > 0.95 and weights[:6].max() < 0.05

    def test_rows_are_asked_one_by_one(self):
        """So that an image does not depend on who else is in its batch."""
        relative = scene().expand(2, 2, SIZE, SIZE)
        found = weights_of(relative, rest=torch.tensor([True, False]))
        assert torch.equal(found[:, :1], weights_of(scene(), rest=torch.tensor([True])))
        assert_close(found[:, 1:], weights_of(scene()).double().numpy())
        assert found[:, 0].sum(dim=0).min() < 0.5

    def test_it_is_to_be_beaten_by_a_multiple_of_the_mean(self):
        relative = torch.ones(1, 1, SIZE, SIZE)
        assert of_rest(relative).unique().tolist() == [REST]
        assert of_rest(torch.cat([relative, 3 * relative])).unique().tolist() == [3 * REST]
        nobody_else = torch.tensor([True, False]).view(2, 1, 1, 1).expand(2, 1, SIZE, SIZE)
        assert of_rest(torch.cat([relative, 3 * relative]), nobody_else).unique().tolist() == [REST]

    def test_a_place_is_no_way_around_it(self):
        place = torch.zeros(1, SIZE, SIZE)
        place[:, -4:] = 1
        predictions = replace(
            step(1, (0,), size=(SIZE, SIZE)), place=place, relative=scene()[1:], rest=torch.tensor([True])
        )
        weights = whole().combine(predictions).weights[0, 0]
        assert (weights[:-4] == 0).all() and weights[-3:, -3:].min() > 0.95 and weights[-3:, :6].max() < 0.05

    def test_gates_need_no_such_rival(self):
        predictions = step(3, (0, 1))
        method = core.LoRAtorio(**options(combination="gates"))
        left = replace(predictions, rest=torch.tensor([True, False]))
        assert torch.equal(method.combine(predictions).cond, method.combine(left).cond)
