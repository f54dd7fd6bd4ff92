"""Samplers by the WebUIs' names, and the schedules that an infotext says they ran with."""

import inspect

import numpy as np
import pytest

from loratorio_ext.errors import SettingsError
from loratorio_ext.samplers import SAMPLERS, parse_sampler, schedule_type

pytest.importorskip("diffusers")

import diffusers

from loratorio_ext.hosts.diffusers import scheduler_for
from tests.tiny_pipelines import make_pipeline

# What diffusers' schedulers warn of in themselves.
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("DeprecationWarning", "UserWarning")]

STEPS = 12


@pytest.fixture(scope="module")
def pipe():
    return make_pipeline("sd1")


def training_sigmas(scheduler):
    """The noise levels ``[1000]`` the model knows, rising."""
    alphas = scheduler.alphas_cumprod.double().numpy()
    return np.sqrt((1 - alphas) / alphas)


def webui_sigmas(schedule, known, steps):
    """What the WebUI makes of a schedule's name, by the formulas of k-diffusion and of its own sd_schedulers.py."""
    low, high = known[0], known[-1]
    if schedule == "Karras":
        ramp = np.linspace(0, 1, steps)
        return (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    times = {"Uniform": np.linspace(999, 0, steps), "SGM Uniform": np.linspace(999, 0, steps + 1)[:-1]}[schedule]
    return np.exp(np.interp(times, np.arange(1000), np.log(known)))


def own_sigmas(scheduler, steps):
    """The scheduler's noise levels, one a step."""
    sigmas = scheduler.sigmas.double().numpy()[:-1]
    return np.array(list(dict.fromkeys(sigmas)))[:steps] if len(sigmas) > steps else sigmas


NAMED = [name for name, sampler in SAMPLERS.items() if sampler.schedule != "Automatic" and "DPM2" not in name]


@pytest.mark.parametrize("karras", [False, True])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("name", NAMED)
def test_the_schedule_that_is_said_is_the_one_that_runs(pipe, name, spacing, karras):
    """Pasted back into a WebUI, the schedule's name makes the same noise levels, whatever the model's own spacing."""
    if karras and not SAMPLERS[name].karras:
        pytest.skip("no such schedule")
    before = pipe.scheduler
    pipe.scheduler = type(before).from_config(before.config, timestep_spacing=spacing)
    try:
        scheduler = scheduler_for(pipe, f"{name} Karras" if karras else name)
    finally:
        pipe.scheduler = before
    scheduler.set_timesteps(STEPS)
    said = schedule_type(SAMPLERS[name], karras, scheduler.config.timestep_spacing)
    assert said != "Automatic"
    # Some schedulers round to whole timesteps of training, a thousandth of the way.
    expected = webui_sigmas(said, training_sigmas(scheduler), STEPS)
    np.testing.assert_allclose(own_sigmas(scheduler, STEPS), expected, rtol=0.03)


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=lambda sampler: sampler.name)
def test_the_table_knows_which_schedulers_have_a_karras_schedule(sampler):
    kind = getattr(diffusers, sampler.scheduler)
    assert sampler.karras == ("use_karras_sigmas" in inspect.signature(kind).parameters)


@pytest.mark.parametrize("said", ["dpm++ 2m karras", "DPM++ 2M KARRAS", " DPM++  2M Karras "])
def test_names_in_any_case(said):
    assert parse_sampler(said) == (SAMPLERS["DPM++ 2M"], True)


@pytest.mark.parametrize(
    "said, hint",
    [("dpm++2m", "did you mean DPM"), ("magic", "samplers: DDIM, "), ("ddim karras", "DDIM has no Karras")],
)
def test_what_there_is_not(said, hint):
    with pytest.raises(SettingsError, match=hint) as caught:
        parse_sampler(said)
    assert (caught.value.field, caught.value.value) == ("sampler", said) and "DDIM" in caught.value.allowed
