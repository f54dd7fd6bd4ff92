"""Selecting in every n-th step: exact where it selects, each image's own choice between, and cheaper for it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from loratorio_ext.core import LoRAtorio, Predictions, Reselection, method_from
from loratorio_ext.settings import Settings
from tests import oracle

SIZE = (7, 5)
GAIN = -2.5


def step(n, image_of_row, seed, uncond=True):
    """A full evaluation (float64); which LoRA is loud where changes from step to step."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    rows, images = len(image_of_row), max(image_of_row) + 1
    loud = 0.2 + randn(n, rows, 1, 1, 1).abs()
    base = randn(rows, 4, *SIZE)
    eps = base + loud * randn(n, rows, 4, *SIZE)
    x = randn(images, 4, *SIZE)[list(image_of_row)]
    return Predictions(
        host_cond=x + GAIN * base,
        host_uncond=randn(images, 4, *SIZE) if uncond else None,
        cond=x + GAIN * eps,
        uncond=randn(n, images, 4, *SIZE) if uncond else None,
        eps_base=base,
        eps=eps,
        image_of_row=tuple(image_of_row),
        gain=GAIN,
    )


def only(full, plan):
    """What a plan asks for of a full evaluation."""
    group = list(plan.isolated)
    uncond = full.uncond[group] if plan.uncond and full.uncond is not None else None
    return Predictions(**vars(full) | {"cond": full.cond[group], "eps": full.eps[group], "uncond": uncond})


def options(**changed):
    plain = dict(patch_size=2, temperature=0.3, temperature_mode="adaptive", relativity=0.5, base_share=0.5, top_k=2)
    plain |= {"combination": "shares", "sharpness": 4.0, "patches": "grid", "regions": False, "rest": False}
    return plain | {"upsampling": "nearest", "selection_scope": "image"} | changed


def equal(first, second):
    pairs = [(getattr(first, name), getattr(second, name)) for name in ("cond", "uncond", "weights")]
    return all(one is other is None or torch.equal(one, other) for one, other in pairs)


@st.composite
def method_options(draw):
    return options(
        patch_size=draw(st.integers(1, 9)),
        temperature_mode=draw(st.sampled_from(["fixed", "adaptive"])),
        relativity=draw(st.sampled_from([0.0, 0.5, 1.0])),
        base_share=draw(st.sampled_from([0.0, 0.5, 1.0])),
        top_k=draw(st.integers(0, 5)),
        selection_scope=draw(st.sampled_from(["image", "patch"])),
        combination=draw(st.sampled_from(["shares", "gates"])),
        patches=draw(st.sampled_from(["grid", "sliding"])),
        regions=draw(st.booleans()),
        rest=draw(st.booleans()),
    )


@given(
    chosen=method_options(),
    every=st.integers(1, 4),
    n=st.integers(1, 5),
    rows=st.sampled_from([(0,), (0, 1), (0, 0, 1), (1, 0, 1)]),
    skipped=st.sets(st.integers(0, 5)),
    keepers=st.sets(st.integers(0, 4)),
    seed=st.integers(0, 1000),
)
@hypothesis_settings(deadline=None, max_examples=60)
def test_agrees_with_the_oracle_over_the_steps(chosen, every, n, rows, skipped, keepers, seed):
    """Steps without unconditional rows (NGMS) among them, and LoRAs that keep the rest."""
    kept = torch.tensor([[i in keepers] * len(rows) for i in range(n)])
    method, selection = Reselection(LoRAtorio(**chosen), every), oracle.Selection(every)
    for number in range(6):
        full = replace(step(n, rows, 100 * seed + number, uncond=number not in skipped), kept=kept)
        plan = method.plan(number, n)
        composed = method.combine(only(full, plan))
        mask = selection(full.eps.numpy(), full.eps_base.numpy(), chosen)
        assert set(plan.isolated) >= {i for i in range(n) if mask[i].any()}
        unconds = [None if each is None else each.numpy() for each in (full.uncond, full.host_uncond)]
        cond, uncond, weights = oracle.loratorio(
            full.eps.numpy(), full.eps_base.numpy(), full.cond.numpy(), *unconds, rows, chosen, mask,
            base_cond=full.host_cond.numpy(), kept=kept.numpy(),
        )  # fmt: skip
        np.testing.assert_allclose(composed.weights, weights, atol=1e-4)
        np.testing.assert_allclose(composed.cond, cond, atol=2e-3)
        if uncond is None:
            assert composed.uncond is None
        else:
            np.testing.assert_allclose(composed.uncond, uncond, atol=2e-3)


@pytest.mark.parametrize("scope", ["image", "patch"])
def test_steps_that_select_are_bit_for_bit_a_selection_in_every_step(scope):
    plain = LoRAtorio(**options(selection_scope=scope))
    method = Reselection(plain, 3)
    evaluated = []
    for number in range(7):
        full = step(5, (0, 1), number)
        plan = method.plan(number, 5)
        composed = method.combine(only(full, plan))
        evaluated.append(len(plan.isolated))
        if number % 3 == 0:
            assert len(plan.isolated) == 5
            assert equal(composed, plain.combine(full))
        else:
            assert not equal(composed, plain.combine(full))
    if scope == "image":
        assert all(2 <= count <= 4 for i, count in enumerate(evaluated) if i % 3)


@pytest.mark.parametrize("k", [0, 4, 5, 64])
def test_keeping_all_is_bit_for_bit_no_selection(k):
    plain, method = LoRAtorio(**options(top_k=0)), Reselection(LoRAtorio(**options(top_k=k)), 2)
    for number in range(4):
        full = step(4, (0, 1), number)
        plan = method.plan(number, 4)
        assert plan == plain.plan(number, 4)
        assert equal(method.combine(only(full, plan)), plain.combine(full))
        assert equal(LoRAtorio(**options(top_k=k)).combine(full), plain.combine(full))


@pytest.mark.parametrize("mode", ["fixed", "adaptive"])
def test_a_choice_that_would_not_change_loses_nothing(mode):
    """The same LoRAs are loud in every step: the result is that of a full evaluation, with less evaluated."""
    chosen = options(temperature_mode=mode)
    plain, method = LoRAtorio(**chosen), Reselection(LoRAtorio(**chosen), 4)
    for number in range(4):
        full = step(6, (0,), number)
        loud = torch.tensor([0.1, 2.0, 0.1, 0.1, 3.0, 0.1], dtype=torch.float64).view(6, 1, 1, 1, 1)
        noise = torch.randn(full.eps.shape, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
        full = Predictions(**vars(full) | {"eps": full.eps_base + loud * noise})
        plan = method.plan(number, 6)
        assert plan.isolated == (tuple(range(6)) if number == 0 else (1, 4))
        composed, exact = method.combine(only(full, plan)), plain.combine(full)
        torch.testing.assert_close(composed.weights, exact.weights, atol=1e-6, rtol=0)
        torch.testing.assert_close(composed.cond, exact.cond)
        torch.testing.assert_close(composed.uncond, exact.uncond)


def test_an_image_does_not_depend_on_its_batch():
    pair, alone = Reselection(LoRAtorio(**options()), 3), Reselection(LoRAtorio(**options()), 3)
    for number in range(6):
        full = step(5, (0, 1), 50 + number)
        first = Predictions(
            **vars(full)
            | {"host_cond": full.host_cond[:1], "host_uncond": full.host_uncond[:1], "cond": full.cond[:, :1]}
            | {
                "uncond": full.uncond[:, :1],
                "eps_base": full.eps_base[:1],
                "eps": full.eps[:, :1],
                "image_of_row": (0,),
            }
        )
        both = pair.combine(only(full, pair.plan(number, 5)))
        one = alone.combine(only(first, alone.plan(number, 5)))
        for mine, theirs in ((both.cond, one.cond), (both.uncond, one.uncond), (both.weights[:, :1], one.weights)):
            torch.testing.assert_close(mine[:1] if len(mine) == 2 else mine, theirs, atol=1e-5, rtol=1e-5)


def test_a_step_that_was_broken_off_before_it_selected_is_made_up_for():
    method = Reselection(LoRAtorio(**options()), 3)
    assert len(method.plan(0, 5).isolated) == 5
    assert len(method.plan(1, 5).isolated) == 5
    method.combine(step(5, (0,), 1))
    assert len(method.plan(2, 5).isolated) == 2


def test_another_number_of_loras_is_selected_anew():
    method = Reselection(LoRAtorio(**options()), 10)
    method.combine(only(step(5, (0,), 1), method.plan(0, 5)))
    assert len(method.plan(1, 5).isolated) == 2
    assert len(method.plan(2, 4).isolated) == 4


MEMBERS = [(0, 1, 2, 4), (0, 1, 2, 4), (0, 1, 2, 3, 4), (1, 3), (1, 3), (), (1, 2, 3), (0, 2, 4), (0, 2, 4)]


@pytest.mark.parametrize("scope", ["image", "patch"])
@pytest.mark.parametrize("every", [2, 10])
def test_loras_that_come_and_go_are_selected_anew(scope, every):
    chosen = options(selection_scope=scope)
    method, selection = Reselection(LoRAtorio(**chosen), every), oracle.Selection(every)
    before = None
    for number, members in enumerate(MEMBERS):
        full = step(5, (0, 1), number)
        plan = method.plan(number, 5, members)
        assert plan.members == members
        if members != before or number % every == 0:
            assert plan.isolated == members
        before = members
        composed = method.combine(only(full, plan))
        if not members:
            assert torch.equal(composed.cond, full.host_cond) and torch.equal(composed.uncond, full.host_uncond)
            selection.members, selection.steps = members, selection.steps + 1
            continue
        group = list(members)
        eps, cond, uncond = (each[group].numpy() for each in (full.eps, full.cond, full.uncond))
        mask = selection(eps, full.eps_base.numpy(), chosen, members=members)
        wanted = oracle.loratorio(
            eps, full.eps_base.numpy(), cond, uncond, full.host_uncond.numpy(), (0, 1), chosen, mask
        )
        for found, value in zip((composed.cond, composed.uncond, composed.weights), wanted):
            np.testing.assert_allclose(found, value, atol=2e-3)


def test_base_only_guidance_needs_no_unconditional_rows():
    method = Reselection(LoRAtorio(**options(base_share=1.0)), 2)
    full = step(4, (0,), 1)
    for number in range(3):
        plan = method.plan(number, 4)
        assert not plan.uncond
        torch.testing.assert_close(method.combine(only(full, plan)).uncond, full.host_uncond)


def test_settings_choose_it():
    assert isinstance(method_from(Settings(reselect_every=2, top_k=3)), Reselection)
    assert isinstance(method_from(Settings(top_k=3, momentum=0.0)), LoRAtorio)
    assert not isinstance(method_from(Settings(reselect_every=2, refresh=1)), Reselection)
