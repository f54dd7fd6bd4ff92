"""The ways of composing that the benchmarks compare: options of `loratorio_ext.settings`, and their names in tables."""

from collections.abc import Mapping
from typing import Any

from loratorio_ext.settings import OPTION, OPTIONS, Settings

Options = Mapping[str, Any]

BASELINE = "baseline"
"""The option that names a way of composing that is none of the package's (see `baselines`)."""

MERGE, COMPOSITE = {"method": "merge"}, {"method": "composite"}
SWITCH = {"method": "switch", "switch_every": 2}  # so that in a few steps each of five LoRAs has its turns
PAPER = {"preset": "paper"}
COMPETING = {"styles": "compete"}
"""A style competes like any other LoRA."""
SHARED_OUT = {"rest": False}
"""The LoRAs share out the whole image, wherever nobody's surroundings are in every pass."""
STYLES_ONLY = {"styles": "everywhere"}
"""A style is in every pass, a background competes."""
PATCH_BY_PATCH = {"patches": "grid", "momentum": 0.0, "regions": False, **SHARED_OUT, **COMPETING}
"""Every patch and every step for itself, as in the paper."""
TURBO = ({"preset": "balanced"}, {"preset": "fast"}, {"base_share": 1.0})
METHODS = (MERGE, SWITCH, COMPOSITE, PAPER, {})
OTHERS = ({BASELINE: "cmlora"}, *({BASELINE: "concatenated", "power": power} for power in (0.5, 1.0)))
SOUP = ({BASELINE: "soup", "steps": 60},)
"""Learns for every combination, which takes longer than painting it."""
FINER = {"patch_size": 2}
"""Patches of a sixteenth of the tiny world's side, as the defaults' are at 512 pixels."""
POOL = (
    MERGE,
    PAPER,
    COMPETING,
    {**COMPETING, "top_k": 3},
    {**COMPETING, "top_k": 3, "reselect_every": 4},
    {**COMPETING, "top_k": 2, "selection_scope": "patch"},
    {**COMPETING, "unnamed": "drop"},
)
"""Ways to deal with more LoRAs than the prompt names; a pool's styles compete."""

TRUTH = {"true_renders": True}
"""No composition at all: the scene as the world's renderer draws it, to see what the judge says of that."""
PERFECT = "perfect_masks"
CEILING = {**PATCH_BY_PATCH, PERFECT: True, "combination": "gates", "sharpness": 0.0, "patch_size": 1}
"""Perfect information (see `benchmarks.ceiling`): each LoRA's difference in full where the scene has its concept."""
CEILING_OF_SHARES = {**CEILING, "combination": "shares"}
"""The same where weights must add up to 1: a style and a thing share a patch."""
EVERYWHERE = "in_every_pass"
"""The option that a LoRA is in every pass, the base model's included, as a user says with ``base=1``; in the words of
the option ``styles`` a style's ("everywhere"), or else a background's ("surroundings")."""
REACHED = {**CEILING_OF_SHARES, "base_share": 0.25, EVERYWHERE: "surroundings"}
"""The best use of perfect information so far."""
CEILINGS = (
    *({**REACHED, "base_share": share} for share in (0.0, 0.25, 0.5)),
    {**REACHED, "combination": "gates"},
    {**REACHED, EVERYWHERE: "everywhere"},
    {**CEILING_OF_SHARES, "base_share": 0.25},
)
"""The ceiling is the best of them: what perfect information reaches also depends on how it is used."""
BOUNDS = (TRUTH, *CEILINGS, MERGE, {})
CONFIRM = (TRUTH, REACHED, MERGE, PAPER, {})
"""What is confirmed, in as many images as can be: the defaults, between what a host does and what perfect information
reaches."""
FIVE = (REACHED, FINER, {})
"""What is confirmed of five LoRAs, which make few combinations."""
SWEEP = (
    REACHED,
    {},
    *({"patch_size": p} for p in (2, 8)),
    *({"relativity": gamma} for gamma in (0.0, 0.5)),
    *({"temperature": kappa} for kappa in (0.1, 1.0)),
    {"temperature_mode": "fixed", "temperature": 0.1},
    *({"base_share": share} for share in (0.0, 0.5)),
    *({"patches": "grid", "upsampling": upsampling} for upsampling in ("nearest", "bilinear")),
    *({"momentum": momentum} for momentum in (0.0, 0.9)),
    {"regions": False},
    SHARED_OUT,
    STYLES_ONLY,
    COMPETING,
    *({"combination": "gates", "sharpness": q} for q in (4.0, 2.0)),
)
"""The defaults with one option otherwise, beside the best use of perfect information."""

NEEDS = {"reselect_every": "top_k"}
"""Options that mean nothing while another one is off, beside those that say so in the table."""
FORM = ("enabled", "pool", "pool_weight", "show_maps")
"""Options that say which LoRAs there are and what is shown of them: here every combination names its own."""


IN_EVERY_PASS = {"everywhere": ", style in every pass", "surroundings": ", surroundings in every pass"}
"""What is said of the option ``styles``."""
OWN = (PERFECT, EVERYWHERE)
"""Options that only the benchmarks know, beside the product's."""


def of_product(options: Options) -> dict[str, Any]:
    """The options without what only the benchmarks know."""
    return {name: value for name, value in options.items() if name not in OWN}


def resolved(options: Options) -> dict[str, Any]:
    """Every option that has an effect, by name, so that a result means the same when defaults change."""
    if BASELINE in options or options == TRUTH:
        return dict(options)
    settings = Settings.from_mapping({n: value for n, value in of_product(options).items() if n not in FORM})
    return {name: options[name] for name in OWN if name in options} | {
        option.name: settings.effect(option)
        for option in OPTIONS
        if settings.in_force(option)
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
    if options == TRUTH:
        return "true renders"
    if BASELINE in options:
        says = {"cmlora": "CMLoRA", "concatenated": "concatenated at 1/N^{power:g}", "soup": "soup of {steps} steps"}
        return says[options[BASELINE]].format(**options)
    settings = Settings.from_mapping(of_product(options))
    styles = options.get(EVERYWHERE) or settings.effect(OPTION["styles"])
    everywhere = IN_EVERY_PASS.get(styles, "")
    if PERFECT in options:
        return f"perfect masks, {settings.combination}, λ {settings.base_share:g}{everywhere}"
    if settings.method == "switch":
        return f"switch every {settings.switch_every}"
    if settings.method != "loratorio":
        return settings.method
    temperature = {"adaptive": "adaptive κ", "fixed": "fixed τ"}[settings.temperature_mode]
    gated = settings.combination == "gates"
    words = [
        f"gates q {settings.sharpness:g}" if gated else f"{temperature} {settings.temperature:g}",
        f"γ {settings.relativity:g}",
        f"p {settings.patch_size}",
        f"λ {settings.base_share:g}",
    ]
    if settings.patches != "grid":
        words.append(settings.patches)
    elif settings.upsampling != "nearest":
        words.append(settings.upsampling)
    if settings.momentum:
        words.append(f"momentum {settings.momentum:g}")
    if settings.matters(OPTION["regions"]):
        words.append("whole regions")
    if settings.matters(OPTION["rest"]):
        words.append("rest to the bare model")
    if settings.top_k:
        words.append(f"top {settings.top_k} per {settings.selection_scope}")
        if settings.reselect_every > 1:
            words.append(f"chosen every {settings.reselect_every} steps")
    if settings.refresh:
        words.append(f"refresh {settings.refresh} after {settings.warmup}")
    if settings.matters(OPTION["unnamed"]):
        words.append(f"unnamed {settings.unnamed}")
    return ", ".join(words) + everywhere
