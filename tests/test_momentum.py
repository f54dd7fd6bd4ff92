"""Divergence carried over the steps: an exponential mean of those steps in which a LoRA took part."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from loratorio_ext.core import InTurn, LoRAtorio, Momentum, Reselection, method_from
from loratorio_ext.settings import Settings
from tests import oracle
from tests.test_reselection import MEMBERS, equal, method_options, only, options, step


def assert_agree(result, wanted):
    for found, value in zip((result.cond, result.uncond, result.weights), wanted):
        np.testing.assert_allclose(found, value, atol=2e-3)


def wanted(full, members, chosen, relative, mask=None):
    group = list(members)
    eps, cond, uncond = (each[group].numpy() for each in (full.eps, full.cond, full.uncond))
    base = full.eps_base.numpy(), full.host_uncond.numpy(), full.host_cond.numpy()
    return oracle.loratorio(
        eps, base[0], cond, uncond, base[1], full.image_of_row, chosen, mask, base_cond=base[2], relative=relative
    )


@given(chosen=method_options(), momentum=st.sampled_from([0.3, 0.8, 0.99]), seed=st.integers(0, 1000))
@hypothesis_settings(deadline=None, max_examples=60)
def test_agrees_with_the_oracle_while_loras_come_and_go(chosen, momentum, seed):
    method, reference = Momentum(LoRAtorio(**chosen), momentum), oracle.Momentum(momentum)
    for number, members in enumerate(MEMBERS):
        full = step(5, (0, 0, 1), 100 * seed + number)
        result = method.combine(only(full, method.plan(number, 5, members)))
        if not members:
            reference.known = {}
            assert torch.equal(result.cond, full.host_cond)
            continue
        relative = reference(full.eps[list(members)].numpy(), full.eps_base.numpy(), chosen, members)
        expected = wanted(full, members, chosen, relative)
        if chosen["base_share"] == 1:
            assert_agree(result, (expected[0], full.host_uncond.numpy(), expected[2]))
        else:
            assert_agree(result, expected)


@pytest.mark.parametrize("combination", ["shares", "gates"])
@pytest.mark.parametrize("scope", ["image", "patch"])
@pytest.mark.parametrize("every", [2, 3])
def test_who_is_not_evaluated_keeps_what_is_known_of_it(every, scope, combination):
    chosen = options(selection_scope=scope, combination=combination)
    method = Reselection(Momentum(LoRAtorio(**chosen), 0.7), every)
    selection, reference = oracle.Selection(every), oracle.Momentum(0.7)
    for number in range(7):
        full = step(5, (0, 1), number)
        result = method.combine(only(full, method.plan(number, 5)))
        mask = selection(full.eps.numpy(), full.eps_base.numpy(), chosen)
        left = None if selection.anew else mask
        relative = reference(full.eps.numpy(), full.eps_base.numpy(), chosen, mask=left)
        assert_agree(result, wanted(full, range(5), chosen, relative, mask))


def test_refreshed_in_turn_it_carries_what_is_expected():
    chosen = options(top_k=0, combination="gates")
    method, reference = InTurn(Momentum(LoRAtorio(**chosen), 0.6), 1, 2), oracle.Momentum(0.6)
    reuse = oracle.Reuse(1, 2)
    for number in range(7):
        full = step(3, (0, 1), number)
        result = method.combine(only(full, method.plan(number, 3)))
        base, host_cond, host_uncond = (each.numpy() for each in (full.eps_base, full.host_cond, full.host_uncond))
        eps, unconds = reuse(full.eps.numpy(), base, full.uncond.numpy(), host_uncond, full.gain)
        cond = host_cond + full.gain * (eps - base)
        relative = reference(eps, base, chosen)
        assert_agree(
            result,
            oracle.loratorio(
                eps, base, cond, unconds, host_uncond, (0, 1), chosen, base_cond=host_cond, relative=relative
            ),
        )


def test_a_step_combined_twice_counts_once():
    """Guidance in two calls: first without unconditional rows, then with them."""
    once, twice = (Momentum(LoRAtorio(**options(top_k=0)), 0.8) for _ in range(2))
    for number in range(4):
        full = step(3, (0, 1), number)
        once.plan(number, 3), twice.plan(number, 3)
        twice.combine(full)
        assert equal(once.combine(full), twice.combine(full))


def test_the_first_step_is_that_without_momentum_and_later_ones_are_not():
    plain, method = LoRAtorio(**options(top_k=0)), Momentum(LoRAtorio(**options(top_k=0)), 0.8)
    same = []
    for number in range(3):
        full = step(3, (0,), number)
        method.plan(number, 3)
        same.append(equal(method.combine(full), plain.combine(full)))
    assert same == [True, False, False]


def test_steps_that_repeat_change_nothing():
    plain, method = LoRAtorio(**options(top_k=0)), Momentum(LoRAtorio(**options(top_k=0)), 0.8)
    full = step(3, (0,), 5)
    for number in range(4):
        method.plan(number, 3)
        torch.testing.assert_close(method.combine(full).weights, plain.combine(full).weights)


def test_settings_choose_it():
    assert isinstance(method_from(Settings(momentum=0.0)), LoRAtorio)
    assert isinstance(method_from(Settings(momentum=0.5)), Momentum)
    assert isinstance(method_from(Settings(momentum=0.5, refresh=1)).method, Momentum)
    assert isinstance(method_from(Settings(momentum=0.5, top_k=2, reselect_every=3)).method, Momentum)
    assert not isinstance(method_from(Settings(method="composite", momentum=0.5)), Momentum)
