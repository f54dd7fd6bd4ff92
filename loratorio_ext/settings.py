"""The one table of options. UI, API, infotext, paste-back and command line are derived from it.

Importing this module needs no host and no torch.
"""

import json
import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, make_dataclass, replace
from functools import partial
from typing import Any

from loratorio_ext import __version__
from loratorio_ext.errors import SettingsError, nearest_name, shown
from loratorio_ext.parts import check_parts

INFOTEXT_PREFIX = "LoRAtorio"
VERSION_KEY = f"{INFOTEXT_PREFIX} version"
"""The version that wrote an infotext. In one that has it, an option without an entry had no effect."""


def key_of(name: str) -> str:
    """The key of the option of that name in an infotext."""
    return f"{INFOTEXT_PREFIX} {name.replace('_', ' ')}"


METHOD_KEY = key_of("method")


@dataclass(frozen=True)
class Option:
    """One option: what it may be, what it is without being set, and how to explain it.

    ``low`` and ``high`` are inclusive; ``choices`` are the allowed names of a text option; ``methods`` are the
    methods that use it (empty: all), others ignore it and the UI hides it. ``idle``: the value with which it does
    nothing, if there is one; ``needs``: the option while which is idle this one has no effect; ``default_needs``: the
    one while which is idle its default has none; ``replaced_by``: the one that takes its place, so that it has an
    effect only while that is idle.
    """

    name: str
    default: Any
    label: str
    help: str
    group: str
    low: float | None = None
    high: float | None = None
    step: float | None = None
    choices: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    idle: Any = None
    needs: str = ""
    default_needs: str = ""
    replaced_by: str = ""

    @property
    def kind(self) -> type:
        return type(self.default)

    @property
    def given_as(self) -> type:
        """What a command line gives: a value of the option's own type, or text that `check` reads."""
        return self.kind

    @property
    def infotext_key(self) -> str:
        return key_of(self.name)

    @property
    def allowed(self) -> str:
        """What a value must be, in words."""
        if self.kind is bool:
            return "true or false"
        if self.choices:
            return "one of " + ", ".join(self.choices)
        noun = "a whole number" if self.kind is int else "a number"
        return f"{noun} from {self.low:g} to {self.high:g}"

    @property
    def hint(self) -> str:
        """The help's first sentence, for where there is little room."""
        sentence, stop, _ = self.help.partition(". ")
        return f"{sentence}." if stop else sentence

    def used_by(self, method: str) -> bool:
        return not self.methods or method in self.methods

    def check(self, value: Any) -> Any:
        """The value in the option's own type; raises `SettingsError` unless it is of that type and within range.

        JSON knows one kind of number, so 4.0 passes for the whole number 4 and 1 for the number 1.0; text is never
        read as a number here, nor is true as 1.
        """
        whole = isinstance(value, int) and not isinstance(value, bool)
        number = whole or (isinstance(value, float) and math.isfinite(value))
        if self.kind is bool:
            valid = isinstance(value, bool)
        elif self.choices:
            valid = isinstance(value, str) and value in self.choices
        else:
            valid = number and self.low <= value <= self.high and (self.kind is float or value == int(value))
        if not valid:
            raise self.refused(value)
        return self.kind(value)

    def refused(self, value: Any) -> SettingsError:
        """The error for a value that the option may not have."""
        message = f"LoRAtorio: {self.name} must be {self.allowed}, got {shown(value)}"
        return SettingsError(message, field=self.name, value=value, allowed=self.allowed)

    def write(self, value: Any) -> str:
        """A value's infotext form."""
        return str(value)

    def parse(self, text: str) -> Any:
        """A value from its infotext form; raises `SettingsError` for what `check` would refuse."""
        if self.kind is str or not isinstance(text, str):
            return self.check(text)
        if self.kind is bool:
            return self.check({"true": True, "false": False}.get(text.strip().lower(), text))
        try:
            return self.check(float(text))
        except ValueError as error:
            raise self.refused(text) from error

    def unsaid(self, method: str, needed: bool) -> Any:
        """What a versioned infotext of an image made by ``method`` means without an entry; ``needed``: whether what its
        default needs is there."""
        return self.idle if self.idle is not None and self.used_by(method) and needed else self.default

    def read(self, params: Mapping[str, str]) -> Any:
        """The value that an image was made with, by its generation parameters; the default for images without us."""
        if self.infotext_key in params:
            return self.parse(params[self.infotext_key])
        needed = not self.default_needs or key_of(self.default_needs) in params
        unsaid = self.unsaid(params.get(METHOD_KEY, BEFORE_VERSIONS["method"]), needed)
        if VERSION_KEY in params:
            return unsaid
        if not any(key.startswith(f"{INFOTEXT_PREFIX} ") for key in params):
            return self.default
        newer = any(key_of(name) in params for name in SINCE_NEWER_DEFAULTS)
        return {**BEFORE_VERSIONS, **(NEWER_DEFAULTS if newer else {})}.get(self.name, unsaid)


BEFORE_VERSIONS: dict[str, Any] = {
    "method": "loratorio",
    "patch_size": 4,
    "temperature_mode": "adaptive",
    "temperature": 0.3,
    "relativity": 0.5,
    "upsampling": "nearest",
    "base_share": 0.5,
    "selection_scope": "image",
    "switch_every": 5,
    "warmup": 1,
    "pool_weight": 1.0,
}
"""What an infotext without a version means by an option that it does not name: the first defaults. Such texts hold only
what differed from the defaults of their day, and do not change their meaning when the table changes."""

NEWER_DEFAULTS: dict[str, Any] = {"relativity": 1.0, "warmup": 2}
SINCE_NEWER_DEFAULTS = ("loras", "everywhere")
"""Two defaults changed while texts had no version; one that names an option younger than that was written later."""


def is_line(value: Any) -> bool:
    """Whether a value is text that stands on one line: not blank, and without control characters."""
    return (
        isinstance(value, str)
        and value.strip() != ""
        and not any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in value)
    )


class Lines(Option):
    """An option that is a list of text, kept as a tuple. Its infotext form is the list in JSON."""

    allowed = "a list of text"

    def check(self, value: Any) -> tuple[str, ...]:
        """The list as a tuple; raises `SettingsError` unless every member is text of one line."""
        if not isinstance(value, (list, tuple)) or not all(map(is_line, value)):
            raise self.refused(value)
        return tuple(value)

    def write(self, value: Sequence[str]) -> str:
        return json.dumps(list(value), ensure_ascii=False)

    def parse(self, text: str) -> tuple[str, ...]:
        try:
            return self.check(json.loads(text))
        except (TypeError, ValueError, RecursionError) as error:  # JSON's errors and `SettingsError` are ValueErrors
            raise self.refused(text) from error


class Frozen(dict):
    """A mapping that stays as it is, so that it can be hashed as far as what it holds can."""

    def __hash__(self) -> int:
        return hash(frozenset(self.items()))

    def __reduce__(self):
        return type(self), (dict(self),)

    def _refuse(self, *args, **kwargs):
        raise TypeError(f"{type(self).__name__} does not change")

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse


def without_repetition(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A mapping from JSON, of which nothing is lost to a second value for the same name."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name occurs twice")
    return found


class Claims(Option):
    """An option that gives LoRAs by name the parts of their claims (see `parts`), kept as a `Frozen` mapping of such.

    Its infotext form, and that of a text box, is the mapping in JSON; blank text is the empty one.
    """

    allowed = "a mapping of LoRA names to mappings of at, share, steps, mask, words and base"
    given_as = str

    def check(self, value: Any) -> Frozen:
        """The mapping with every part checked; raises `SettingsError`, which names the LoRA and its part."""
        if isinstance(value, str):
            return self.parse(value) if value.strip() else Frozen()
        if not isinstance(value, Mapping) or not all(map(is_line, value)):
            message = f"LoRAtorio: {self.name} must be {self.allowed}, got {shown(value)}"
            raise SettingsError(message, field=self.name, value=value, allowed=self.allowed)
        return Frozen({name: Frozen(check_parts(name, parts)) for name, parts in value.items()})

    def write(self, value: Mapping[str, Any]) -> str:
        return json.dumps(value, ensure_ascii=False)

    def parse(self, text: str) -> Frozen:
        try:
            value = json.loads(text, object_pairs_hook=without_repetition)
            if not isinstance(value, Mapping):
                raise ValueError("another kind of JSON")
        except (TypeError, ValueError, RecursionError) as error:
            message = f"LoRAtorio: {self.name} must be {self.allowed}, got {shown(text)}"
            raise SettingsError(message, field=self.name, value=text, allowed=self.allowed) from error
        return self.check(value)


LORATORIO = ("loratorio",)
COMPOSING = ("loratorio", "composite", "switch")

OPTIONS = (
    Option(
        "enabled",
        False,
        "LoRAtorio",
        "Compose the prompt's LoRAs instead of summing their weights.",
        group="",
        idle=False,
    ),
    Option(
        "method",
        "loratorio",
        "Method",
        "How LoRAs share the image. loratorio: each where it knows most. composite: the mean of all. switch: one after "
        "the other. merge: the WebUI's own sum, to compare with.",
        group="Method",
        choices=("loratorio", "composite", "switch", "merge"),
    ),
    Option(
        "patch_size",
        4,
        "Patch size",
        "Side of a patch in latent pixels (1 latent pixel = 8 image pixels). Smaller: finer borders between LoRAs, "
        "noisier choice. Larger than the latent (sliding: twice as large): one weight per LoRA and image.",
        group="Weights",
        low=1,
        high=64,
        step=1,
        methods=LORATORIO,
    ),
    Option(
        "temperature_mode",
        "adaptive",
        "Temperature mode",
        "adaptive: the temperature follows how far the LoRAs' similarities spread at each step. fixed: the paper's "
        "form, the same temperature in every step.",
        group="Weights",
        choices=("adaptive", "fixed"),
        methods=LORATORIO,
        replaced_by="combination",
    ),
    Option(
        "temperature",
        0.3,
        "Temperature",
        "Lower: the most divergent LoRA takes a patch alone. Higher: all LoRAs share it evenly. In fixed mode useful "
        "values are small (0.001 to 1), since similarities lie close together.",
        group="Weights",
        low=0.0001,
        high=1_000_000.0,
        step=0.01,
        methods=LORATORIO,
        replaced_by="combination",
    ),
    Option(
        "relativity",
        1.0,
        "Relativity",
        "1: compare divergence to each LoRA's own mean over the image, so that a style or background LoRA does not "
        "drown the others. 0: compare it as it is (the paper). Lower it when such a LoRA is too weak.",
        group="Weights",
        low=0.0,
        high=1.0,
        step=0.05,
        methods=LORATORIO,
    ),
    Option(
        "upsampling",
        "nearest",
        "Upsampling",
        "How patch weights become pixel weights. nearest: the paper's. bilinear: try it when patch borders show.",
        group="Weights",
        choices=("nearest", "bilinear"),
        methods=LORATORIO,
        replaced_by="patches",
    ),
    Option(
        "base_share",
        0.25,
        "Base share of guidance",
        "Share of the bare model in the unconditional score (lambda). 0: LoRAs only. 1: bare model only, and faster, "
        "since no LoRA needs an unconditional pass.",
        group="Guidance",
        low=0.0,
        high=1.0,
        step=0.05,
        methods=LORATORIO,
    ),
    Option(
        "top_k",
        0,
        "Keep the k most divergent",
        "Of many LoRAs only this many take part at each step, the ones that diverge most. 0: all.",
        group="Pool and selection",
        low=0,
        high=64,
        step=1,
        methods=LORATORIO,
        idle=0,
    ),
    Option(
        "selection_scope",
        "image",
        "Select per",
        "Choose the k LoRAs once for the image, or in every patch by itself.",
        group="Pool and selection",
        choices=("image", "patch"),
        methods=LORATORIO,
        needs="top_k",
    ),
    Option(
        "switch_every",
        5,
        "Steps per LoRA",
        "How many steps a LoRA works before the next one takes over.",
        group="Method",
        low=1,
        high=1000,
        step=1,
        methods=("switch",),
    ),
    Option(
        "start",
        0.0,
        "Start",
        "Fraction of the steps after which composition starts; before it the LoRAs act merged. Raise it when the "
        "layout should come from the merged model.",
        group="Steps",
        low=0.0,
        high=1.0,
        step=0.05,
        methods=COMPOSING,
        idle=0.0,
    ),
    Option(
        "end",
        1.0,
        "End",
        "Fraction of the steps after which composition ends and the LoRAs act merged again. Lower it to save time in "
        "the late steps that only touch detail.",
        group="Steps",
        low=0.0,
        high=1.0,
        step=0.05,
        methods=COMPOSING,
        idle=1.0,
    ),
    Option(
        "refresh",
        0,
        "LoRAs refreshed per step",
        "0: every LoRA is evaluated in every step (exact). 1 or more: only this many, in turn; of the others the last "
        "known difference from the bare model is reused. Makes many LoRAs nearly as fast as one, for some detail.",
        group="Speed",
        low=0,
        high=64,
        step=1,
        methods=LORATORIO,
        idle=0,
    ),
    Option(
        "warmup",
        2,
        "Exact steps first",
        "How many steps evaluate every LoRA before they are refreshed in turn; the first ones settle the layout. More: "
        "closer to exact, slower.",
        group="Speed",
        low=0,
        high=1000,
        step=1,
        methods=LORATORIO,
        needs="refresh",
    ),
    Lines(
        "pool",
        (),
        "Pool",
        "More LoRAs that may take part, beside the prompt's: names, patterns (robot*) or folders (styles/*), each with "
        "a weight after a colon if it has one of its own (robot:0.8). Weight 0 leaves a LoRA out.",
        group="Pool and selection",
        methods=COMPOSING,
        idle=(),
    ),
    Option(
        "pool_weight",
        1.0,
        "Weight in the pool",
        "The weight of every LoRA of the pool that has none of its own.",
        group="Pool and selection",
        low=-2.0,
        high=2.0,
        step=0.05,
        methods=COMPOSING,
        needs="pool",
    ),
    Option(
        "reselect_every",
        1,
        "Select every n-th step",
        "1: every LoRA is evaluated in every step (exact). More: only in every n-th step; in the steps between, only "
        "the LoRAs that were kept there. It has no effect while LoRAs are refreshed in turn.",
        group="Pool and selection",
        low=1,
        high=1000,
        step=1,
        methods=LORATORIO,
        idle=1,
    ),
    Option(
        "show_maps",
        False,
        "Show who painted what",
        "Adds pictures to each image: the LoRAs' weights on it in colours, a map of each, their shares over the steps.",
        group="",
        methods=LORATORIO,
        idle=False,
    ),
    Claims(
        "loras",
        Frozen(),
        "Where, when, how much",
        "For LoRAs by name, what tags can say as well: at (left, right, top, bottom, centre, or x0-y0-x1-y1 in "
        "fractions), share (a factor on its claim), steps (first-last in fractions), words (its trigger words), base "
        "(in every pass); and mask, a picture in base64, white where it may act.",
        group="Where, when, how much",
        methods=COMPOSING,
        idle=Frozen(),
    ),
    Lines(
        "everywhere",
        (),
        "Everywhere",
        "LoRAs of the prompt or the pool that are no concept but a way of sampling (LCM, Lightning, sliders): names, "
        "patterns or folders. They act in every pass, the bare model's too, and compete for nothing.",
        group="In every pass",
        methods=COMPOSING,
        idle=(),
    ),
    Option(
        "combination",
        "shares",
        "Combination",
        "shares: in every patch the LoRAs' weights add up to 1 (the paper). gates: what each LoRA changes is added to "
        "the bare model, in full where it diverges most, fading where others diverge more; what lies apart or agrees "
        "adds up, as in merging. Temperature and temperature mode have no effect on gates.",
        group="Weights",
        choices=("shares", "gates"),
        methods=LORATORIO,
        idle="shares",
    ),
    Option(
        "sharpness",
        4.0,
        "Sharpness of gates",
        "How fast a LoRA fades where others diverge more. 0: not at all, everything is added up. 1: in proportion. "
        "Higher: one LoRA in a patch.",
        group="Weights",
        low=0.0,
        high=64.0,
        step=0.5,
        methods=LORATORIO,
        needs="combination",
    ),
    Option(
        "patches",
        "sliding",
        "Patches",
        "grid: the image is cut into patches (the paper). sliding: one around every latent pixel, so that weights "
        "have no borders; upsampling has no effect then.",
        group="Weights",
        choices=("grid", "sliding"),
        methods=LORATORIO,
        idle="grid",
    ),
    Option(
        "momentum",
        0.8,
        "Momentum",
        "How much of the divergence of earlier steps stays, as an exponential mean: who is at home where is settled "
        "early. 0: every step stands for itself (the paper).",
        group="Weights",
        low=0.0,
        high=0.99,
        step=0.05,
        methods=LORATORIO,
        idle=0.0,
    ),
    Option(
        "unnamed",
        "auto",
        "Unnamed LoRAs",
        "LoRAs whose trigger words are known, when none of them is in an image's prompt. auto: where the prompt names "
        "some of the pool, the others of the pool take no part. keep: they take part like the others. drop_pooled: "
        "those of the pool take no part in this image. drop: nor do those with a tag.",
        group="Pool and selection",
        choices=("auto", "keep", "drop_pooled", "drop"),
        methods=COMPOSING,
        idle="keep",
        default_needs="pool",
    ),
    Option(
        "styles",
        "surroundings",
        "Styles and backgrounds",
        "LoRAs with a tag that are styles or a background by name, folder or trigger words. surroundings: styles, or "
        "else the background, act in every pass, the bare model's too, and what no other LoRA is clearly at home in "
        "is left to it. everywhere: styles act in every pass, and backgrounds compete. compete: both compete for "
        "patches like the others.",
        group="In every pass",
        choices=("surroundings", "everywhere", "compete"),
        methods=LORATORIO,
        idle="compete",
    ),
    Option(
        "regions",
        True,
        "Whole regions",
        "On: each LoRA keeps its region together; where it agrees with the bare model it counts as is typical of it, "
        "and who is around a patch counts there, too. Off: every patch for itself (the paper); try it when something "
        "small vanishes into its surroundings.",
        group="Weights",
        methods=LORATORIO,
        idle=False,
        replaced_by="combination",
    ),
    Option(
        "rest",
        True,
        "The rest to the bare model",
        "On: what no LoRA is clearly at home in is the bare model's, so that none paints ghosts of other surroundings "
        "there; as far as the LoRAs disagree, and unless one of them is at home in most of the image. Where a style or "
        "a background competes it is that one's. Off: they share out the whole image (the paper); try it when parts of "
        "a thing come out as the bare model, or a background, paints them.",
        group="Weights",
        methods=LORATORIO,
        idle=False,
        replaced_by="combination",
    ),
)

UNTOUCHED_BY_PRESETS = ("enabled", "pool", "pool_weight", "show_maps", "loras", "everywhere", "unnamed")
"""What an image is made of and what is shown of it; presets say how it is composed."""

OPTION = {option.name: option for option in OPTIONS}

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {
        "method": "loratorio",
        "temperature_mode": "fixed",
        "temperature": 1.0,
        "relativity": 0.0,
        "base_share": 0.5,
        "upsampling": "nearest",
        "top_k": 0,
        "start": 0.0,
        "end": 1.0,
        "refresh": 0,
        "reselect_every": 1,
        "combination": "shares",
        "patches": "grid",
        "momentum": 0.0,
        "styles": "compete",
        "regions": False,
        "rest": False,
    },
    "balanced": {"refresh": 1},
    "fast": {"refresh": 1, "base_share": 1.0},
}
"""Named starting points: the options a preset sets; options given beside it win."""


class _Settings:
    """One checked value for every option of `OPTIONS`, by its name. Immutable."""

    def __post_init__(self):
        for option in OPTIONS:
            object.__setattr__(self, option.name, option.check(getattr(self, option.name)))
        if self.start >= self.end:
            allowed = f"less than end ({self.end:g})"
            message = f"LoRAtorio: start must be {allowed}, got {self.start:g}"
            raise SettingsError(message, field="start", value=self.start, allowed=allowed)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], base: "Settings | None" = None) -> "Settings":
        """Named options over those of ``base`` (or the defaults); ``preset`` names a preset to apply first.

        Unknown names and bad values raise `SettingsError`.
        """
        if not isinstance(values, Mapping):
            raise SettingsError(f"LoRAtorio: options must be a dict of names and values, got {shown(values)}")
        known = [*OPTION, "preset"]
        for name in values:
            if name not in known:
                hint = nearest_name(str(name), known)
                message = f"LoRAtorio: there is no option {shown(name)}{hint} (options: {', '.join(known)})"
                raise SettingsError(message, field=str(name), value=values[name], allowed="one of " + ", ".join(known))
        preset = values.get("preset", "default")
        if not isinstance(preset, str) or preset not in PRESETS:
            allowed = f"one of {', '.join(PRESETS)}"
            message = f"LoRAtorio: preset must be {allowed}, got {shown(preset)}"
            raise SettingsError(message, field="preset", value=preset, allowed=allowed)
        given = {name: value for name, value in values.items() if name != "preset"}
        return replace(base or cls(), **{**PRESETS[preset], **given})

    @classmethod
    def from_args(cls, args: Sequence[Any]) -> "Settings":
        """What a WebUI hands a script: the options' values in table order, the first of which may be a dict of names.

        A dict wins over the values that follow it (the host's defaults, or what it read from an infotext). Missing
        values keep their defaults.
        """
        if not isinstance(args, (list, tuple)):
            raise SettingsError(f"LoRAtorio: args must be a list, got {shown(args)}")
        if len(args) > len(OPTIONS):
            raise SettingsError(f"LoRAtorio: args must hold at most {len(OPTIONS)} values, got {len(args)}")
        positional = {option.name: value for option, value in zip(OPTIONS, args)}
        named = positional.pop("enabled") if args and isinstance(args[0], Mapping) else {}
        return cls.from_mapping(named, cls.from_mapping(positional))

    @classmethod
    def from_infotext(cls, params: Mapping[str, str]) -> "Settings":
        """The options that an image's generation parameters hold; those they do not name are at their defaults."""
        return cls(**{option.name: option.read(params) for option in OPTIONS})

    def composes_at(self, progress: float) -> bool:
        """Whether composition acts when the share ``progress`` of the steps is done: from ``start`` up to ``end``."""
        return self.start <= progress and (progress < self.end or self.end == 1)

    def in_force(self, option: Option) -> bool:
        """Whether an option is looked at: the method uses it, what it needs matters, and nothing takes its place."""
        needs, other = OPTION.get(option.needs), OPTION.get(option.replaced_by)
        wanted = (needs is None or self.matters(needs)) and (other is None or not self.matters(other))
        return option.used_by(self.method) and wanted

    def matters(self, option: Option) -> bool:
        """Whether an option's value has an effect: it is in force, and not idle."""
        idle = option.idle is not None and self.effect(option) == option.idle
        return not idle and self.in_force(option)

    def effect(self, option: Option) -> Any:
        """An option's value, or the idle one that its default amounts to where what that needs is not there."""
        value = getattr(self, option.name)
        return option.idle if value == option.default and not self.has(option.default_needs) else value

    def has(self, needed: str) -> bool:
        """Whether what a default needs is there: an option of that name which matters, or nothing ("")."""
        return not needed or self.matters(OPTION[needed])

    def to_infotext(self) -> dict[str, str]:
        """Generation parameters that `from_infotext` reads back, today and after defaults have changed: the version,
        what has an effect, and what else was set. Nothing when off."""
        if not self.enabled:
            return {}
        values = {option: getattr(self, option.name) for option in OPTIONS}
        said = {
            option: value
            for option, value in values.items()
            if self.matters(option) or value != option.unsaid(self.method, self.has(option.default_needs))
        }
        return {option.infotext_key: option.write(value) for option, value in said.items()} | {VERSION_KEY: __version__}


Settings = make_dataclass(
    "Settings",
    # By a factory: Python 3.10 takes any dict for a default that might change.
    [(option.name, option.kind, field(default_factory=partial(getattr, option, "default"))) for option in OPTIONS],
    bases=(_Settings,),
    frozen=True,
    namespace={"__doc__": _Settings.__doc__, "__module__": __name__},
)
