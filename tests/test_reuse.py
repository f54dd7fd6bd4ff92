"""Refreshing LoRAs in turn: exact where nothing is stale, cheap where it says so, and right about what it reuses."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from loratorio_ext.core import InTurn, LoRAtorio, Plan, Predictions, method_from
from loratorio_ext.core.reuse import Known
from loratorio_ext.settings import Settings
from tests import oracle

N, ROWS, IMAGES, SHAPE = 4, 3, 2, (4, 6, 5)
IMAGE_OF_ROW = (0, 0, 1)
METHOD = LoRAtorio(patch_size=2, temperature=0.3, temperature_mode="adaptive", relativity=0.5)


class World:
    """Models whose differences from the base are the same in every step: what is reused is never stale.

    The host speaks in x0: ``output = x - sigma * eps``.
    """

    def __init__(self, seed: int = 0, drift: float = 0.0):
        self.generator = torch.Generator().manual_seed(seed)
        self.cond = 0.3 * self.randn(N, ROWS, *SHAPE)
        self.uncond = 0.3 * self.randn(N, IMAGES, *SHAPE)
        self.drift = drift

    def randn(self, *shape):
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def step(self, sigma: float):
        """Full predictions of one step (float64)."""
        self.cond = self.cond + self.drift * self.randn(N, ROWS, *SHAPE)
        x, x_images = self.randn(ROWS, *SHAPE), self.randn(IMAGES, *SHAPE)
        base, base_uncond = self.randn(ROWS, *SHAPE), self.randn(IMAGES, *SHAPE)
        return Predictions(
            host_cond=x - sigma * base,
            host_uncond=x_images - sigma * base_uncond,
            cond=x - sigma * (base + self.cond),
            uncond=x_images - sigma * (base_uncond + self.uncond),
            eps_base=base,
            eps=base + self.cond,
            image_of_row=IMAGE_OF_ROW,
            gain=-sigma,
        )


def only(full: Predictions, plan: Plan) -> Predictions:
    """The predictions that a plan asks for."""
    isolated = list(plan.isolated)
    fields = dict(vars(full), cond=full.cond[isolated], eps=full.eps[isolated])
    return Predictions(**{**fields, "uncond": full.uncond[isolated] if plan.uncond else None})


SIGMAS = [14.6, 9.0, 5.0, 2.5, 1.2, 0.6, 0.2]


@pytest.mark.parametrize("refresh", [1, 2, 3])
def test_constant_differences_are_reused_exactly(refresh):
    world, method = World(), InTurn(METHOD, refresh=refresh, warmup=1)
    for step, sigma in enumerate(SIGMAS):
        full = world.step(sigma)
        plan = method.plan(step, N)
        assert len(plan.isolated) == (N if step == 0 else refresh)
        assert plan.uncond or step > N // refresh
        composed, exact = method.combine(only(full, plan)), METHOD.combine(full)
        torch.testing.assert_close(composed.cond, exact.cond)
        torch.testing.assert_close(composed.uncond, exact.uncond)


def test_what_is_reused_is_in_the_hosts_own_precision():
    """Noise is recovered in float32 whatever the model's type, and the gain of a step may be a tensor of it."""
    world, method = World(), InTurn(METHOD, refresh=1, warmup=1)
    for step, sigma in enumerate(SIGMAS[:3]):
        full = world.step(sigma)
        half = {name: getattr(full, name).bfloat16() for name in ("host_cond", "host_uncond", "cond", "uncond")}
        gain = torch.full((ROWS, 1, 1, 1), -sigma)[:1]
        full = replace(full, **half, eps=full.eps.float(), eps_base=full.eps_base.float(), gain=gain)
        composed = method.combine(only(full, method.plan(step, N)))
        assert composed.cond.dtype == composed.uncond.dtype == torch.bfloat16


def test_every_lora_is_refreshed_in_turn():
    world, method = World(drift=0.1), InTurn(METHOD, refresh=1, warmup=0)
    seen = []
    for step in range(2 * N):
        full = world.step(1.0)
        plan = method.plan(step, N)
        method.combine(only(full, plan))
        seen += plan.isolated
        fresh = plan.isolated[0]
        torch.testing.assert_close(method.cond[fresh].delta, full.eps[fresh] - full.eps_base)
    assert seen == [0, 1, 2, 3, 0, 1, 2, 3]


def test_stale_differences_are_the_last_known_ones():
    world, method = World(drift=0.1), InTurn(METHOD, refresh=1, warmup=1)
    first, second = world.step(2.0), world.step(1.0)
    method.combine(only(first, method.plan(0, N)))
    plan = method.plan(1, N)
    mixed = first.eps - first.eps_base + second.eps_base
    mixed[plan.isolated[0]] = second.eps[plan.isolated[0]]
    composed = method.combine(only(second, plan))
    torch.testing.assert_close(composed.weights, METHOD.weights(mixed, second.eps_base))


def test_a_lora_not_seen_yet_counts_as_the_base_model():
    world, method = World(), InTurn(METHOD, refresh=1, warmup=0)
    full = world.step(3.0)
    composed = method.combine(only(full, method.plan(0, N)))
    eps = full.eps_base.repeat(N, 1, 1, 1, 1)
    eps[0] = full.eps[0]
    torch.testing.assert_close(composed.weights, METHOD.weights(eps, full.eps_base))
    assert composed.uncond.isfinite().all()


def test_steps_without_unconditional_rows_keep_the_last_ones():
    """NGMS skips the unconditional rows of some steps; what was known of them is used again afterwards."""
    world, method = World(), InTurn(METHOD, refresh=1, warmup=1)
    method.combine(only(world.step(3.0), method.plan(0, N)))
    known = [method.uncond[i].delta.clone() for i in range(N)]
    skipped = Predictions(**{**vars(only(world.step(2.0), method.plan(1, N))), "host_uncond": None, "uncond": None})
    assert method.combine(skipped).uncond is None
    for i in range(N):
        torch.testing.assert_close(method.uncond[i].delta, known[i])


def test_base_only_guidance_needs_no_unconditional_rows():
    method = InTurn(LoRAtorio(patch_size=2, temperature=0.3, base_share=1.0), refresh=1, warmup=1)
    full = World().step(2.0)
    for step in range(3):
        plan = method.plan(step, N)
        assert not plan.uncond
        torch.testing.assert_close(method.combine(only(full, plan)).uncond, full.host_uncond)


def test_refreshing_as_many_as_there_are_is_exact_mode():
    method = InTurn(METHOD, refresh=N, warmup=0)
    for step in range(3):
        assert method.plan(step, N).isolated == tuple(range(N))


def test_unconditional_rows_are_refreshed_in_every_other_round_of_turns():
    """So that every LoRA has its turn with them, also where the number of LoRAs is even."""
    world, method = World(drift=0.1), InTurn(METHOD, refresh=1, warmup=1)
    seen = []
    for step in range(1 + 3 * N):
        plan = method.plan(step, N)
        method.combine(only(world.step(1.0), plan))
        seen.append(plan.uncond)
    assert seen == [True] + [True] * N + [False] * N + [True] * N


def test_differences_that_grow_are_expected_to_go_on_growing_more_slowly():
    world, method = World(), InTurn(METHOD, refresh=1, warmup=2)
    for step in range(3):
        world.cond, world.uncond = 1.2 * world.cond, 1.5 * world.uncond
        full = world.step(1.0)
        plan = method.plan(step, N)
        composed = method.combine(only(full, plan))
    assert plan.isolated == (0,)
    eps = full.eps_base + world.cond / 1.2 * 1.2**0.5
    eps[0] = full.eps[0]
    torch.testing.assert_close(composed.weights, METHOD.weights(eps, full.eps_base), rtol=1e-4, atol=1e-6)
    uncond = full.host_uncond - world.uncond / 1.5 * 1.5**0.5
    uncond[0] = full.uncond[0]
    expected = METHOD.combine(replace(full, eps=eps, cond=full.host_cond - (eps - full.eps_base), uncond=uncond))
    torch.testing.assert_close(composed.uncond, expected.uncond, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("first, second", [(0.0, 1.0), (1.0, 0.0), (1e-12, 1.0), (1.0, 1e-12)])
def test_growth_from_or_to_nothing_is_bounded(first, second):
    known = Known.first(0, torch.full((2, 3, 4, 4), first)).then(1, torch.full((2, 3, 4, 4), second))
    assert known.growth.min() >= 0.5 and known.growth.max() <= 2.0
    assert known.at(5).isfinite().all()


def test_a_rows_growth_is_its_own():
    """An image must not depend on what else is in its batch."""
    small, large = torch.ones(1, 3, 4, 4), torch.ones(1, 3, 4, 4)
    together = Known.first(0, torch.cat([small, large])).then(2, torch.cat([small, 1.7 * large]))
    torch.testing.assert_close(together.at(4)[:1], small)
    torch.testing.assert_close(together.at(4)[1:], 1.7 * large * 1.7**0.5)


@pytest.mark.parametrize("refresh, warmup", [(1, 0), (1, 2), (2, 1), (3, 0), (N, 0)])
def test_agrees_with_the_oracle(refresh, warmup):
    world, method, reuse = World(drift=0.2), InTurn(METHOD, refresh, warmup), oracle.Reuse(refresh, warmup)
    options = {**vars(METHOD), "base_share": METHOD.base_share}
    for step, sigma in enumerate([*SIGMAS, *SIGMAS]):
        full = world.step(sigma)
        composed = method.combine(only(full, method.plan(step, N)))
        base, base_uncond = full.eps_base.numpy(), full.host_uncond.numpy()
        eps, unconds = reuse(full.eps.numpy(), base, full.uncond.numpy(), base_uncond, -sigma)
        cond = full.host_cond.numpy() - sigma * (eps - base)
        expected = oracle.loratorio(eps, base, cond, unconds, base_uncond, IMAGE_OF_ROW, options)
        for found, wanted in zip((composed.cond, composed.uncond, composed.weights), expected):
            np.testing.assert_allclose(found.numpy(), wanted, rtol=2e-4, atol=2e-5)


def test_settings_choose_it():
    assert isinstance(method_from(Settings(refresh=2)), InTurn)
    assert isinstance(method_from(Settings(momentum=0.0)), LoRAtorio)
    assert method_from(Settings(refresh=2)) is not method_from(Settings(refresh=2))


def of(full: Predictions, members) -> Predictions:
    """What is said of these LoRAs."""
    members = list(members)
    return replace(full, cond=full.cond[members], eps=full.eps[members], uncond=full.uncond[members])


COMING_AND_GOING = [(0, 1, 2), (0, 1, 2), (0, 1, 2, 3), (0, 1, 2, 3), (1, 3), (1, 3), (), (0, 1, 2, 3), (0, 2), (2, 3)]


@pytest.mark.parametrize("refresh, warmup", [(1, 0), (1, 2), (2, 1), (3, 0)])
def test_loras_that_come_and_go_agree_with_the_oracle(refresh, warmup):
    world, method, reuse = World(drift=0.2), InTurn(METHOD, refresh, warmup), oracle.Reuse(refresh, warmup)
    options = {**vars(METHOD), "base_share": METHOD.base_share}
    for step, members in enumerate([*COMING_AND_GOING, *COMING_AND_GOING]):
        full = world.step(2.0)
        plan = method.plan(step, N, members)
        assert plan.members == members and set(plan.isolated) <= set(members)
        composed = method.combine(only(full, plan))
        base, base_uncond = full.eps_base.numpy(), full.host_uncond.numpy()
        if not members:
            reuse.before, reuse.steps = [], reuse.steps + 1
            assert torch.equal(composed.cond, full.host_cond) and torch.equal(composed.uncond, full.host_uncond)
            continue
        eps, unconds = reuse(full.eps.numpy(), base, full.uncond.numpy(), base_uncond, -2.0, members)
        cond = full.host_cond.numpy() - 2.0 * (eps - base)
        expected = oracle.loratorio(eps, base, cond, unconds, base_uncond, IMAGE_OF_ROW, options)
        for found, wanted in zip((composed.cond, composed.uncond, composed.weights), expected):
            np.testing.assert_allclose(found.numpy(), wanted, rtol=2e-4, atol=2e-5)


def test_a_lora_that_comes_is_evaluated_at_once_and_whole():
    """Not as the base model until its turn, nor as it was before it left."""
    world, method = World(drift=0.1), InTurn(METHOD, refresh=1, warmup=0)
    for step, members in enumerate([(0, 1, 2), (0, 1, 2), (0, 1, 2, 3), (0, 2, 3), (0, 1, 2, 3), (0, 1, 2, 3)]):
        full = world.step(1.0)
        plan = method.plan(step, N, members)
        method.combine(only(full, plan))
        if step in (2, 4):
            newcomer = 3 if step == 2 else 1
            assert plan.isolated == (newcomer,) and plan.uncond
            torch.testing.assert_close(method.cond[newcomer].delta, full.eps[newcomer] - full.eps_base)
            torch.testing.assert_close(method.uncond[newcomer].delta, full.host_uncond - full.uncond[newcomer])
    assert plan.isolated == (3,), "turns go on where they were: 0, 1, (3 comes), 2, (1 comes), 3"


def test_a_lora_that_came_in_a_step_that_was_broken_off_is_still_new():
    world, method = World(), InTurn(METHOD, refresh=1, warmup=0)
    method.combine(only(world.step(1.0), method.plan(0, N, (0, 1))))
    assert method.plan(1, N, (0, 1, 3)).isolated == (3,)
    assert method.plan(2, N, (0, 1, 3)).isolated == (3,)


def test_with_few_enough_members_all_are_fresh():
    world, method = World(drift=0.1), InTurn(METHOD, refresh=2, warmup=0)
    for step, members in enumerate([(0, 1, 2, 3), (1, 3), (1, 3), (2,)]):
        full = world.step(1.0)
        plan = method.plan(step, N, members)
        composed = method.combine(only(full, plan))
        if step:
            assert plan.isolated == members
            torch.testing.assert_close(composed.cond, METHOD.combine(of(full, members)).cond)
