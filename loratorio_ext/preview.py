"""What a composition will be made of and what it will cost, before it is made: for the panel. No host is needed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from loratorio_ext.claims import Claim, Tagged, claims_of
from loratorio_ext.costs import rows_by_step
from loratorio_ext.infotext import TOKEN
from loratorio_ext.pool import Listed, resolve
from loratorio_ext.settings import OPTIONS, PRESETS, UNTOUCHED_BY_PRESETS, Option, Settings
from loratorio_ext.triggers import phrases, trigger_words

STEPS = 20
"""Of an image whose cost is foretold."""
CUSTOM = "custom"


@dataclass(frozen=True)
class Seen:
    """A LoRA that prompt or pool names. ``lora``: the host's, None: not found. ``weights``: as text. ``pooled``: by the
    pool alone. ``styled``: by a style of the host's alone. ``claim``: where, when and how much it may act."""

    name: str
    weights: str
    lora: Listed | None = None
    pooled: bool = False
    styled: bool = False
    claim: Claim = Claim()

    @property
    def everywhere(self) -> bool:
        return self.claim.base


def tags_of(prompt: str) -> list[tuple[str, ...]]:
    """The prompt's LoRA tags, as what they hold between colons; of a LoRA named twice the last, as in the host."""
    found = (tuple(match[2].split(":")) for match in TOKEN.finditer(prompt) if match[1] in ("lora", "lyco"))
    return list({items[0]: items for items in found}.values())


def weights_of(items: Sequence[str]) -> str:
    """A tag's weights as they stand there: ``0.8``, or ``0.5, 1`` for text encoder and UNet; 1 where there are none."""
    named = dict(item.split("=", 1) for item in items if "=" in item)
    plain = [item for item in items[1:] if "=" not in item][:2]
    weights = [named.get("te", plain[0] if plain else "1"), named.get("unet", plain[-1] if plain else "1")]
    return ", ".join(dict.fromkeys(weights))


def tagged_as(each: Seen, items: tuple[str, ...]) -> Tagged:
    """A LoRA that was found, with its trigger words, which are read from files, unless nothing here asks for them."""
    words = () if each.pooled else phrases(trigger_words(each.lora.file, each.lora.metadata))
    return Tagged(each.lora, items, words=words, pooled=each.pooled)


def seen(prompt: str, settings: Settings, listed: Sequence[Listed], typed: str | None = None) -> list[Seen]:
    """Every LoRA of prompt and pool, the prompt's first. Raises `SettingsError` for what will be refused.

    ``typed``: the prompt without what the chosen styles add to it; None: they add nothing.
    """
    by_name = {name: lora for lora in listed for name in (lora.alias, lora.name) if name}
    tags, own = tags_of(prompt), {items[0] for items in tags_of(prompt if typed is None else typed)}
    found = [Seen(items[0], weights_of(items), by_name.get(items[0]), styled=items[0] not in own) for items in tags]
    taken = {each.lora.file for each in found if each.lora}
    for member in resolve(settings.pool, listed, settings.pool_weight) if settings.pool else []:
        if member.lora.file not in taken:
            weights = ", ".join(dict.fromkeys((f"{member.text:g}", f"{member.unet:g}")))
            found.append(Seen(member.lora.name, weights, member.lora, pooled=True))
    items = [*tags, *((),) * (len(found) - len(tags))]
    tagged = [tagged_as(each, items) for each, items in zip(found, items) if each.lora]
    claims = iter(claims_of(settings, tagged).each)
    return [replace(each, claim=next(claims)) if each.lora else each for each in found]


def cost(settings: Settings, loras: Sequence[Seen]) -> float:
    """How many plain steps a step costs in the mean, of those LoRAs that are found: rows of the UNet, two a plain
    step."""
    claims = [each.claim for each in loras if each.lora and not each.everywhere]
    return sum(rows_by_step(settings, claims, STEPS)) / (2 * STEPS)


def as_factor(number: float) -> str:
    return f"{number:.1f}".removesuffix(".0")


def cost_in_words(settings: Settings, loras: Sequence[Seen]) -> str:
    """What an image will cost, and what it would with a cheaper preset."""
    count = sum(each.lora is not None and not each.everywhere for each in loras)
    if not count:
        return "No LoRA to compose: name some in the prompt, or choose a pool."
    own = cost(settings, loras)
    noun = "1 LoRA" if count == 1 else f"{count} LoRAs"
    plain = "a plain one" if own < 1.05 else f"{as_factor(own)} plain ones"
    cheaper = {}
    if settings.method == "loratorio":
        for name in PRESETS:
            other = cost(replace(settings, **preset_values(name)), loras)
            if other < own - 0.2:
                cheaper[name] = other
    said = "".join(f", as {as_factor(other)} with preset {name}" for name, other in cheaper.items())
    return f"{noun}: a step takes about as long as {plain}{said}."


# --- presets ----------------------------------------------------------------------------------------------------------

BY_PRESETS: tuple[Option, ...] = tuple(option for option in OPTIONS if option.name not in UNTOUCHED_BY_PRESETS)
"""The options that a preset sets."""


def preset_values(name: str) -> dict[str, Any]:
    values = Settings.from_mapping({"preset": name})
    return {option.name: getattr(values, option.name) for option in BY_PRESETS}


def preset_of(settings: Settings, preferred: str = "default") -> str:
    """The preset whose values the settings have, or `CUSTOM`."""
    names = [name for name in (preferred, *PRESETS) if name in PRESETS]
    values = {option.name: getattr(settings, option.name) for option in BY_PRESETS}
    return next((name for name in names if preset_values(name) == values), CUSTOM)


def preset_in_words(settings: Settings) -> str:
    """Which values are not at their defaults."""
    changed = [option for option in BY_PRESETS if getattr(settings, option.name) != option.default]
    said = ", ".join(f"{option.label} {option.write(getattr(settings, option.name))}" for option in changed)
    return f"Sets {said}; the rest is at its default." if said else "Everything is at its default: exact in every step."
