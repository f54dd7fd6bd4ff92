"""Refreshing LoRAs in turn: exact where nothing is stale, cheap where it says so, and right about what it reuses."""

import pytest
import torch

from loratorio_ext.core import InTurn, LoRAtorio, Plan, Predictions, method_from
from loratorio_ext.settings import Settings

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
        composed, exact = method.combine(only(full, plan)), METHOD.combine(full)
        torch.testing.assert_close(composed.cond, exact.cond)
        torch.testing.assert_close(composed.uncond, exact.uncond)


def test_every_lora_is_refreshed_in_turn():
    world, method = World(drift=0.1), InTurn(METHOD, refresh=1, warmup=0)
    seen = []
    for step in range(2 * N):
        full = world.step(1.0)
        plan = method.plan(step, N)
        method.combine(only(full, plan))
        seen += plan.isolated
        fresh = plan.isolated[0]
        torch.testing.assert_close(method.deltas[fresh][0], full.eps[fresh] - full.eps_base)
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
    known = [method.deltas[i][1].clone() for i in range(N)]
    skipped = Predictions(**{**vars(only(world.step(2.0), method.plan(1, N))), "host_uncond": None, "uncond": None})
    assert method.combine(skipped).uncond is None
    for i in range(N):
        torch.testing.assert_close(method.deltas[i][1], known[i])


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


def test_settings_choose_it():
    assert isinstance(method_from(Settings(refresh=2)), InTurn)
    assert isinstance(method_from(Settings()), LoRAtorio)
    assert method_from(Settings(refresh=2)) is not method_from(Settings(refresh=2))
