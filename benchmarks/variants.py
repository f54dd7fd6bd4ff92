"""The ways of composing that the benchmarks compare: options of `loratorio_ext.settings`, and their names in tables."""

from collections.abc import Mapping
from typing import Any

from loratorio_ext.settings import OPTION, OPTIONS, Settings

Options = Mapping[str, Any]

MERGE, COMPOSITE = {"method": "merge"}, {"method": "composite"}
SWITCH = {"method": "switch", "switch_every": 2}  # so that in a few steps each of five LoRAs has its turns
PAPER = {"preset": "paper"}
CENTRE = {
    "method": "loratorio",
    "patch_size": 2,
    "temperature_mode": "adaptive",
    "temperature": 0.3,
    "relativity": 1.0,
    "base_share": 0.5,
}
"""The point from which the sweep goes along each axis."""

SWEEP = (
    *({**PAPER, "temperature": tau} for tau in (1.0, 0.01)),
    *({**CENTRE, "patch_size": p, "relativity": gamma} for p in (2, 4) for gamma in (0.0, 0.5, 1.0)),
    *({**CENTRE, "temperature": kappa} for kappa in (0.1, 1.0)),
    *({**CENTRE, "base_share": share} for share in (0.0, 1.0)),
)
DETAILS = (
    *({**CENTRE, "patch_size": p, "upsampling": "bilinear"} for p in (2, 4)),
    *({**CENTRE, "patch_size": p} for p in (1, 8)),
    {**CENTRE, "patch_size": 4, "base_share": 0.25},
    *({**PAPER, "temperature": tau, "patch_size": p} for tau, p in ((0.1, 4), (0.01, 2))),
)
TURBO = ({"preset": "balanced"}, {"preset": "fast"}, {"base_share": 1.0})
METHODS = (MERGE, SWITCH, COMPOSITE, PAPER, {})
POOL = (
    MERGE,
    PAPER,
    {},
    {"top_k": 3},
    {"top_k": 3, "reselect_every": 4},
    {"top_k": 2, "selection_scope": "patch"},
    {"unnamed": "drop"},
)
"""Ways to deal with more LoRAs than the prompt names."""


NEEDS = {"warmup": "refresh", "selection_scope": "top_k", "reselect_every": "top_k"}
"""Options that mean nothing while another one is off."""
FORM = ("enabled", "pool", "pool_weight", "show_maps")
"""Options that say which LoRAs there are and what is shown of them: here every combination names its own."""


def resolved(options: Options) -> dict[str, Any]:
    """Every option that has an effect, by name, so that a result means the same when defaults change."""
    settings = Settings.from_mapping(options)
    return {
        option.name: getattr(settings, option.name)
        for option in OPTIONS
        if option.used_by(settings.method)
        and option.name not in FORM
        and (option.name not in NEEDS or getattr(settings, NEEDS[option.name]))
    }


def exact_of(options: Options) -> dict[str, Any] | None:
    """What a cheaper way is to be compared with, the same without what makes it cheap; None: it is exact itself."""
    cheap = options.get("refresh") or options.get("base_share") == 1 or options.get("reselect_every", 1) > 1
    exact = {"refresh": 0, "base_share": OPTION["base_share"].default, "reselect_every": 1}
    return resolved({**options, **exact}) if cheap else None


def variant_name(options: Options) -> str:
    """Options in a few words, with the method's symbols: "adaptive κ 0.3, γ 0.5, p 2, λ 0.5"."""
    settings = Settings.from_mapping(options)
    if settings.method == "switch":
        return f"switch every {settings.switch_every}"
    if settings.method != "loratorio":
        return settings.method
    temperature = {"adaptive": "adaptive κ", "fixed": "fixed τ"}[settings.temperature_mode]
    words = [
        f"{temperature} {settings.temperature:g}",
        f"γ {settings.relativity:g}",
        f"p {settings.patch_size}",
        f"λ {settings.base_share:g}",
    ]
    if settings.upsampling != "nearest":
        words.append(settings.upsampling)
    if settings.top_k:
        words.append(f"top {settings.top_k} per {settings.selection_scope}")
        if settings.reselect_every > 1:
            words.append(f"chosen every {settings.reselect_every} steps")
    if settings.refresh:
        words.append(f"refresh {settings.refresh} after {settings.warmup}")
    if settings.unnamed != "keep":
        words.append(f"unnamed {settings.unnamed}")
    return ", ".join(words)
