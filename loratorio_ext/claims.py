"""Where, when and how much each LoRA of an image may act, and which of them are in every pass.

A claim comes from the LoRA's tag in the prompt, else from the option ``loras``; that it is in every pass may be said by
the option ``everywhere``, too. In which of a batch's images a LoRA takes part, their prompts may say. Importing this
module needs no host.
"""

import io
from base64 import b64decode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from loratorio_ext.errors import SettingsError
from loratorio_ext.parts import Box, box_of, parts_of_tag, span_of, tag_text
from loratorio_ext.pool import Listed, matching
from loratorio_ext.settings import OPTION
from loratorio_ext.styles import is_background, is_style
from loratorio_ext.triggers import is_named, phrases

SOFTNESS = 0.1
"""Of the image's side: so wide is an edge of a place, centred on where the place ends. At the image's border there is
none."""


def ramp(size: int, first: float, last: float) -> Tensor:
    """How far the centre of each of ``size`` pixels lies between two fractions of the side: ``[size]`` in [0, 1]."""
    pixel = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    rise = torch.ones_like(pixel) if first <= 0 else ((pixel - first) / SOFTNESS + 0.5).clamp(0, 1)
    fall = torch.ones_like(pixel) if last >= 1 else ((last - pixel) / SOFTNESS + 0.5).clamp(0, 1)
    return rise * fall


def box_place(box: Box, height: int, width: int) -> Tensor:
    """A rectangle with soft edges, ``[H, W]`` in [0, 1]. Places that share an edge add up to 1 across it."""
    left, top, right, bottom = box
    return (ramp(height, top, bottom)[:, None] * ramp(width, left, right)).float()


def mask_place(mask: str, height: int, width: int) -> Tensor:
    """A mask, as `masks` keeps it, stretched over the image: ``[H, W]`` in [0, 1], each pixel the mean of the mask's
    pixels in it."""
    from PIL import Image

    with Image.open(io.BytesIO(b64decode(mask))) as image:
        grey = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width)
    return F.interpolate(grey[None, None].float() / 255, (height, width), mode="area")[0, 0]


@dataclass(frozen=True)
class Claim:
    """A LoRA's claim to the image: at first that of every LoRA of the method, everywhere and always.

    ``at``: edges of the place where it may act, left, top, right, bottom in fractions of the image. ``share``: a
    factor on its claim. ``steps``: the fractions of the steps between which it takes part. ``mask``: where it may
    act, in the form of `masks`; with a place, where both say so. ``words``: its trigger words, by phrases; none
    where they are not known. ``base``: it is in every pass, and claims nothing. ``yields``: where it is not clearly
    at home it leaves the image to who is in every pass. ``keeps``: it is at home where nobody else is, as a style
    or a background. ``images``: of each of a batch's images, whether it takes part; None: in all.
    """

    at: Box | None = None
    share: float = 1.0
    steps: tuple[float, float] = (0.0, 1.0)
    mask: str | None = None
    words: tuple[str, ...] = ()
    base: bool = False
    yields: bool = False
    keeps: bool = False
    images: tuple[bool, ...] | None = None

    @classmethod
    def of(cls, parts: Mapping[str, Any]) -> "Claim":
        """The claim that checked parts (see `parts`) say."""
        readings = {"at": box_of, "steps": span_of, "words": phrases}
        return cls(**{name: readings.get(name, lambda value: value)(value) for name, value in parts.items()})

    @property
    def in_some(self) -> bool:
        """Whether it takes part in some of a batch's images, and not in others."""
        return self.images is not None and len(set(self.images)) > 1

    @property
    def placed(self) -> bool:
        """Whether it is less than the whole of every image."""
        return self.at is not None or self.mask is not None or self.in_some

    def place(self, height: int, width: int) -> Tensor | None:
        """Where the LoRA may act in an image of so many latent pixels, ``[H, W]`` in [0, 1]; None: everywhere."""
        places = [] if self.at is None else [box_place(self.at, height, width)]
        places += [] if self.mask is None else [mask_place(self.mask, height, width)]
        return torch.stack(places).prod(dim=0) if places else None

    def acts_in(self, image: int) -> bool:
        """Whether the LoRA takes part in an image of the batch."""
        return self.images is None or self.images[image]

    def acts_at(self, progress: float) -> bool:
        """Whether the LoRA takes part when the share ``progress`` of the steps is done: from the first fraction up to
        the last, if in any image."""
        first, last = self.steps
        anywhere = self.images is None or any(self.images)
        return anywhere and first <= progress and (progress < last or last == 1)


def place_of(
    claims: Iterable[Claim], height: int, width: int, image_of_row: Sequence[int] | None = None
) -> Tensor | None:
    """Where each of several LoRAs may act, ``[N, H, W]``; None: all of them everywhere.

    Where some take part in some images only, ``[N, R, H, W]``: of R rows, whose images ``image_of_row`` are.
    """
    claims = list(claims)
    places = [claim.place(height, width) for claim in claims]
    in_some = any(claim.in_some for claim in claims)
    if all(place is None for place in places) and not in_some:
        return None
    whole = torch.stack([torch.ones(height, width) if place is None else place for place in places])
    if not in_some:
        return whole
    rows = [[claim.acts_in(image) for image in image_of_row] for claim in claims]
    return whole.unsqueeze(1) * torch.tensor(rows).float()[..., None, None]


def share_of(claims: Iterable[Claim]) -> Tensor | None:
    """The factors on several LoRAs' claims, ``[N]``; None: 1 for all of them."""
    shares = [claim.share for claim in claims]
    return None if all(share == 1 for share in shares) else torch.tensor(shares)


def rest_of(claims: Sequence[Claim], image_of_row: Sequence[int]) -> Tensor | None:
    """Of R rows, whose images ``image_of_row`` are, which leave to those in every pass what nobody is clearly at home
    in, ``[R]``: where all yield who take part in the image; None: no row."""
    rows = [all(claim.yields for claim in claims if claim.acts_in(image)) for image in image_of_row]
    return torch.tensor(rows) if claims and any(rows) else None


def kept_of(claims: Sequence[Claim], image_of_row: Sequence[int]) -> Tensor | None:
    """Which of several LoRAs keep what nobody else is clearly at home in, in which of R rows, whose images
    ``image_of_row`` are: ``[N, R]``; None: nobody in any."""
    kept = torch.tensor([[claim.keeps and claim.acts_in(image) for image in image_of_row] for claim in claims])
    return kept if kept.any() else None


def places_and_shares(claims: Sequence[Claim], like: Tensor, image_of_row: Sequence[int]) -> dict[str, Tensor | None]:
    """``place``, ``share``, ``rest`` and ``kept`` of `Predictions`, in latents of the size and on the device of ``like
    [..., H, W]``; of the claims of those who take part in a step."""
    found = {
        "place": place_of(claims, *like.shape[-2:], image_of_row),
        "share": share_of(claims),
        "rest": rest_of(claims, image_of_row),
        "kept": kept_of(claims, image_of_row),
    }
    return {name: None if each is None else each.to(like.device) for name, each in found.items()}


def not_heeded(method: str, claims: Iterable[Claim]) -> str | None:
    """What the method cannot make of these claims, in words for the user."""
    claims = list(claims)
    if method == "merge" and any(replace(claim, base=False, words=()) != Claim() for claim in claims):
        return "method merge knows no place, share or steps of a LoRA: all act everywhere, all the time"
    if method == "switch" and any(claim.placed or claim.share != 1 for claim in claims):
        return "method switch knows no place and no share of a LoRA: whose turn it is has the whole image"
    return None


# --- from tags and options --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tagged:
    """A LoRA that is active in an image. ``items``: what its tag holds after ``lora:``, split at the colons; none for
    the LoRAs of a pool. ``parts``: checked parts that were given along with it otherwise. ``words``: its trigger words,
    by phrases, as far as its file tells them, for where no part does. ``pooled``: it is one of a pool's."""

    lora: Listed
    items: tuple[str, ...] = ()
    parts: Mapping[str, Any] = field(default_factory=dict)
    words: tuple[str, ...] = ()
    pooled: bool = False

    @property
    def text(self) -> str:
        """How errors name it."""
        return tag_text(self.items) if self.items else self.lora.name


@dataclass(frozen=True)
class Claims:
    """``each``: the active LoRAs' claims, in their order. ``unused``: what the options ``loras`` and ``everywhere``
    name that no active LoRA is. ``styles`` and ``backgrounds``: the names of those that are in every pass because
    they are that."""

    each: tuple[Claim, ...]
    unused: tuple[str, ...] = ()
    styles: tuple[str, ...] = ()
    backgrounds: tuple[str, ...] = ()


def meant(entry: str, listed: Sequence[Listed]) -> list[Listed]:
    """The LoRAs of this very path, else name, else alias, else those that match, as an entry of the pool is read."""
    for kind in ("path", "name", "alias"):
        found = [lora for lora in listed if getattr(lora, kind) == entry]
        if found:
            return found
    return matching(entry, listed)


def option_parts(loras: Mapping[str, Mapping[str, Any]], active: Sequence[Listed]) -> dict[str, tuple[str, Mapping]]:
    """By file, the entry of the option ``loras`` that means an active LoRA: its name there, and its parts."""
    found: dict[str, tuple[str, Mapping]] = {}
    for name, parts in loras.items():
        for lora in meant(name, active):
            if lora.file in found:
                other, _ = found[lora.file]
                message = f"LoRAtorio: loras.{other} and loras.{name} are the same LoRA ({lora.path})"
                raise SettingsError(message, field=f"loras.{name}", value=dict(parts), allowed="one entry a LoRA")
            found[lora.file] = name, parts
    return found


def parts_said(settings: Any, tagged: Sequence[Tagged]) -> tuple[list[dict[str, Any]], list[str]]:
    """The parts of the active LoRAs' claims, and what of the options is `Claims.unused`; see `claims_of`."""
    active = [each.lora for each in tagged]
    by_option = option_parts(settings.loras, active)
    in_every_pass = {lora.file: entry for entry in settings.everywhere for lora in meant(entry, active)}
    found = []
    for each in tagged:
        name, parts = by_option.get(each.lora.file, ("", {}))
        in_tag = {**parts_of_tag(each.items), **each.parts}
        said = {**parts, **in_tag}
        told = "base" in said
        base = said.pop("base", each.lora.file in in_every_pass)
        if base and said:
            part = next(iter(said))
            where = each.text if part in in_tag else f"loras.{name}"
            raise SettingsError(
                f"LoRAtorio: {where} says {part} of a LoRA that is in every pass, where it shares nothing; leave out "
                f"{part}, or what puts it into every pass (base, or everywhere)",
                field=f"{part} in {where}",
                value=said[part],
            )
        found.append({**said, "base": base} if base or told else said)
    unused = [f"loras.{name}" for name in settings.loras if not meant(name, active)]
    unused += [f"everywhere: {entry}" for entry in settings.everywhere if not meant(entry, active)]
    return found, unused


def claims_of(settings: Any, tagged: Sequence[Tagged]) -> Claims:
    """The active LoRAs' claims by their tags and the options ``loras`` and ``everywhere`` of ``settings``.

    Raises `SettingsError` for a part that is not allowed, which names it, and for a LoRA in every pass that is given a
    place, a share or steps of its own.
    """
    said, unused = parts_said(settings, tagged)
    claims = [
        replace(Claim.of(parts), words=phrases(parts["words"]) if "words" in parts else each.words)
        for parts, each in zip(said, tagged)
    ]
    kinds, option = kinds_of(tagged, claims), OPTION["styles"]
    styles = settings.styles if settings.in_force(option) else option.idle
    all_asked = settings.unnamed == "drop"
    free = [not all_asked and not tag.pooled and parts.keys() <= {"words"} for tag, parts in zip(tagged, said)]
    joining = in_every_pass(styles, claims, kinds, free)
    claims = [replace(claim, base=claim.base or joins) for claim, joins in zip(claims, joining)]
    yields = yielding(styles, claims, kinds)
    asked = settings.matters(OPTION["rest"])
    claims = [
        replace(claim, yields=each, keeps=asked and bool(kind) and not claim.base and not each)
        for claim, kind, each in zip(claims, kinds, yields)
    ]

    def joined(as_kind: str) -> tuple[str, ...]:
        return tuple(tag.lora.name for tag, kind, joins in zip(tagged, kinds, joining) if joins and kind == as_kind)

    return Claims(tuple(claims), tuple(unused), joined(STYLE), joined(BACKGROUND))


STYLE, BACKGROUND = "style", "background"


def kinds_of(tagged: Sequence[Tagged], claims: Sequence[Claim]) -> list[str]:
    """Of each active LoRA, which of the two it is; "": neither."""

    def kind(path: str, words: Sequence[str]) -> str:
        return STYLE if is_style(path, words) else BACKGROUND if is_background(path, words) else ""

    return [kind(tag.lora.path, claim.words) for tag, claim in zip(tagged, claims)]


def in_every_pass(option: str, claims: Sequence[Claim], kinds: Sequence[str], free: Sequence[bool]) -> Sequence[bool]:
    """Of each active LoRA, whether it is in every pass since it is a style, or the background; by the ``option``
    styles, and only of those that are ``free``: they have a tag, and nothing else is said of them.

    Only if others are left that compete; not of a pool's, whom the prompt's words choose, nor where such words are
    asked of every LoRA: who is in every pass is not asked. A background only if it is the one there is, and nobody else
    of either kind is in every pass: each more that is merged there disturbs the others.
    """
    nobody = [False] * len(claims)
    if option == "compete":
        return nobody
    styles, backgrounds = ([each == kind and may for each, may in zip(kinds, free)] for kind in (STYLE, BACKGROUND))
    taken = any(styles) or any(claim.base and kind for claim, kind in zip(claims, kinds))
    if option != "surroundings" or taken or sum(backgrounds) > 1:
        backgrounds = nobody
    found = [style or background for style, background in zip(styles, backgrounds)]
    compete = any(not claim.base and not joins for claim, joins in zip(claims, found))
    return found if compete else nobody


def yielding(option: str, claims: Sequence[Claim], kinds: Sequence[str]) -> list[bool]:
    """Of each active LoRA, whether it leaves what it is not clearly at home in to those in every pass, by the
    ``option`` styles: if a style or a background is among these, every other but a background that competes."""
    around = option == "surroundings" and any(claim.base and kind for claim, kind in zip(claims, kinds))
    return [around and not claim.base and kind != BACKGROUND for claim, kind in zip(claims, kinds)]


def in_words(claims: Claims) -> list[str]:
    """What is to be said of those that are in every pass as styles or as the background."""
    otherwise = "(base=0 in its tag, or styles, says otherwise)"
    return [
        *(f"{name} is a style, and so in every pass {otherwise}" for name in claims.styles),
        *(f"{name} is the background, and so in every pass {otherwise}" for name in claims.backgrounds),
    ]


# --- what prompts ask for ---------------------------------------------------------------------------------------------


def heeding(claims: Sequence[Claim], pooled: Sequence[bool], prompts: Sequence[str], unnamed: str) -> list[Claim]:
    """The claims as far as the ``prompts``, one an image, name their LoRAs; of a LoRA that all of them name, as it is.

    ``unnamed``: the option; ``pooled``: of each LoRA whether it is one of a pool's. A LoRA in every pass is not asked,
    nor is one whose words are not known.
    """
    named = [[is_named(prompt, claim.words) for prompt in prompts] for claim in claims]
    from_pool = [each for each, claim, of_pool in zip(named, claims, pooled) if of_pool and claim.words]
    # By image: whether those of the prompt, and those of the pool, must be named to take part.
    none, every = [False] * len(prompts), [True] * len(prompts)
    some = [any(each[image] for each in from_pool) for image in range(len(prompts))]
    of_prompts, of_pools = {
        "keep": (none, none),
        "auto": (none, some),
        "drop_pooled": (none, every),
        "drop": (every, every),
    }[unnamed]

    def as_named(claim: Claim, of_pool: bool, each: Sequence[bool]) -> Claim:
        heeded = of_pools if of_pool else of_prompts
        images = tuple(is_asked or claim.base or not heeds for is_asked, heeds in zip(each, heeded))
        return replace(claim, images=None if all(images) else images)

    return [as_named(*each) for each in zip(claims, pooled, named)]


FEW = 3
"""So many LoRAs are spoken of one by one."""


def left_out(names: Sequence[str], claims: Sequence[Claim]) -> list[str]:
    """What is to be said of LoRAs that some images of a batch, or all, do not name: of each, or of many together."""
    said = []
    absences = dict.fromkeys(claim.images for claim in claims if claim.images is not None)
    for images in absences:
        absent = [(name, claim) for name, claim in zip(names, claims) if claim.images == images]
        numbers = ", ".join(str(number) for number, acts in enumerate(images, 1) if not acts)
        where = f" in image {numbers}" if any(images) else ""
        if len(absent) > FEW:
            whose = f"{', '.join(name for name, _ in absent[:FEW])} and {len(absent) - FEW} more take no part{where}"
            said.append(f"{whose}: the prompt has none of their trigger words")
        else:
            lack = f"takes no part{where}: the prompt has none of its trigger words"
            said += [f"{name} {lack} ({', '.join(claim.words)})" for name, claim in absent]
    return said
