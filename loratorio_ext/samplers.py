"""Samplers by the names that WebUIs give them, and what diffusers calls them. Imports neither diffusers nor torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from loratorio_ext.errors import SettingsError, nearest_name, shown


@dataclass(frozen=True)
class Sampler:
    """A sampler: the ``scheduler``'s class in diffusers, and its ``options``.

    ``karras``: whether it has a Karras schedule. ``schedule``: what WebUIs call the schedule that it has without one.
    A sampler of WebUIs that they give no schedule by name ("Automatic") keeps its own steps; the others are spread over
    the whole of the noise, first to last, as WebUIs do.
    """

    name: str
    scheduler: str
    karras: bool
    schedule: str = "Uniform"
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def spacing(self) -> Mapping[str, Any]:
        return {} if self.schedule == "Automatic" else {"timestep_spacing": "linspace"}


SAMPLERS = {
    sampler.name: sampler
    for sampler in (
        Sampler("DDIM", "DDIMScheduler", False, "Automatic"),
        Sampler("PLMS", "PNDMScheduler", False, "Automatic", {"skip_prk_steps": True}),
        Sampler("Euler", "EulerDiscreteScheduler", True),
        Sampler("Euler a", "EulerAncestralDiscreteScheduler", False),
        Sampler("Heun", "HeunDiscreteScheduler", True),
        Sampler("DPM2", "KDPM2DiscreteScheduler", True),
        Sampler("DPM2 a", "KDPM2AncestralDiscreteScheduler", True),
        # Of the N + 1 steps that this scheduler spreads over the noise it leaves out the last.
        Sampler(
            "DPM++ 2M",
            "DPMSolverMultistepScheduler",
            True,
            "SGM Uniform",
            {"algorithm_type": "dpmsolver++", "solver_order": 2},
        ),
        Sampler(
            "DPM++ 2M SDE",
            "DPMSolverMultistepScheduler",
            True,
            "SGM Uniform",
            {"algorithm_type": "sde-dpmsolver++", "solver_order": 2},
        ),
        Sampler("UniPC", "UniPCMultistepScheduler", True, "Automatic"),
        Sampler("LCM", "LCMScheduler", False, "Automatic"),
    )
}

ALLOWED = f"one of {', '.join(SAMPLERS)}"


@dataclass(frozen=True)
class Sampling:
    """How a model is sampled where nothing else is said."""

    steps: int = 30
    cfg: float = 7.0
    sampler: str = "DPM++ 2M"


def parse_sampler(text: str) -> tuple[Sampler, bool]:
    """A sampler by its name in any case, and whether "Karras" is said after it; else `SettingsError`."""
    by_lower = {name.lower(): sampler for name, sampler in SAMPLERS.items()}
    said = " ".join(text.lower().split())
    name = said.removesuffix(" karras")
    if name not in by_lower:
        near = nearest_name(name, by_lower).removeprefix("; did you mean ").removesuffix("?")
        hint = f"; did you mean {by_lower[near].name}?" if near else ""
        raise SettingsError(
            f"LoRAtorio: there is no sampler {shown(text)}{hint} (samplers: {', '.join(SAMPLERS)})",
            field="sampler",
            value=text,
            allowed=ALLOWED,
        )
    sampler = by_lower[name]
    if name != said and not sampler.karras:
        having = ", ".join(each.name for each in SAMPLERS.values() if each.karras)
        raise SettingsError(
            f"LoRAtorio: {sampler.name} has no Karras schedule (these have: {having})",
            field="sampler",
            value=text,
            allowed=ALLOWED,
        )
    return sampler, name != said


def schedule_type(sampler: Sampler, karras: bool, spacing: str | None) -> str:
    """What WebUIs call the schedule that ran, so that a pasted infotext makes the same noise levels.

    ``spacing``: the scheduler's own; "trailing" leaves out the last of N + 1 steps.
    """
    if karras:
        return "Karras"
    return "SGM Uniform" if spacing == "trailing" and sampler.spacing else sampler.schedule
