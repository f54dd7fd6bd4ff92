"""Which LoRAs a pool's entries mean, among those that a host lists. No host, no disk: names in, LoRAs out.

An entry is a name (``robot``), a path below the host's LoRA folder (``styles/oil``), or a pattern of names (``robot*``)
or of paths (``styles/*``, which reaches into folders below); a colon and a number after it is a weight, two are those
of text encoders and UNet (``robot:0.8``, ``robot:0.2:1``). Entries are only ever compared with what is listed, so none
can reach a file that the host does not offer by itself.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import PurePath
from typing import Any

from loratorio_ext.errors import SettingsError, nearest_name, shown
from loratorio_ext.multipliers import check_multiplier

NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)")
WILD = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class Listed:
    """A LoRA that the host lists: its name in prompts, its file, and the file's path below the LoRA folder without its
    ending, parts joined by slashes. ``alias``: another name that prompts may use. ``metadata``: what the file says.
    ``size``: the file's bytes, 0 where nobody asked."""

    name: str
    file: str
    path: str
    alias: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    size: int = field(default=0, compare=False)

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, self.path, self.alias) if self.alias else (self.name, self.path)

    @property
    def folder(self) -> str:
        return self.path.rpartition("/")[0]


@dataclass(frozen=True)
class Member:
    """A LoRA of a pool at its weights, and the ``entry`` that it is in the pool by."""

    lora: Listed
    text: float
    unet: float
    entry: str = field(default="", compare=False)


def path_below(file: str, folder: str) -> str:
    """A LoRA's path below the LoRA folder as entries name it; of a file that lies elsewhere, its name alone."""
    path = PurePath(file).with_suffix("")
    try:
        return path.relative_to(folder).as_posix()
    except ValueError:
        return path.name


def readings(entry: str) -> list[tuple[str, tuple[float, ...]]]:
    """What an entry may say, with more and more of the numbers at its end (two at most) taken as weights."""
    found: list[tuple[str, tuple[float, ...]]] = [(entry, ())]
    while len(found) < 3:
        text, weights = found[-1]
        rest, _, last = text.rpartition(":")
        if not rest or not NUMBER.fullmatch(last.strip()):
            break
        found.append((rest, (float(last), *weights)))
    return found


def named(name: str, listed: Sequence[Listed]) -> Listed | None:
    """The one LoRA of this very path, else name, else alias, or None; of several, `SettingsError` is raised."""
    for kind in ("path", "name", "alias"):
        found = {lora.file: lora for lora in listed if getattr(lora, kind) == name}
        if len(found) > 1:
            paths = ", ".join(sorted(lora.path for lora in found.values()))
            message = f"LoRAtorio: {shown(name)} in the pool may be any of {paths}"
            raise SettingsError(message, field="pool", value=name, allowed=f"one of {paths}")
        if found:
            return next(iter(found.values()))
    return None


def matching(pattern: str, listed: Iterable[Listed]) -> list[Listed]:
    """The LoRAs whose paths (for a pattern with a slash) or names match."""
    if not WILD.search(pattern):
        return []
    by_path = "/" in pattern
    return [lora for lora in listed if fnmatchcase(lora.path if by_path else lora.name, pattern)]


def folders(listed: Iterable[Listed]) -> list[str]:
    """Every folder with a LoRA in it or below it, as a pattern: ``styles/*``."""
    found = set()
    for lora in listed:
        parts = lora.folder.split("/") if lora.folder else []
        found |= {"/".join(parts[: i + 1]) + "/*" for i in range(len(parts))}
    return sorted(found)


def unknown(entry: str, listed: Sequence[Listed]) -> SettingsError:
    """The error for an entry that means nothing here, with what is near it."""
    if not listed:
        message = f"LoRAtorio: there is no LoRA {shown(entry)} for the pool: the host lists none at all"
        return SettingsError(message, field="pool", value=entry)
    near = {name: name for lora in listed for name in lora.names}
    near |= {folder.removesuffix("/*"): folder for folder in folders(listed)} | {name: name for name in folders(listed)}
    what = "no LoRA matches" if WILD.search(entry) else "there is no LoRA"
    wanted = entry.strip().rstrip("/")
    # Whatever case or folder was meant: the nearest of what is there.
    by_lower = {name.lower(): meant for name, meant in near.items()}
    hint = nearest_name(wanted.lower(), by_lower).removeprefix("; did you mean ").removesuffix("?")
    hint = f"; did you mean {by_lower[hint]}?" if hint else ""
    return SettingsError(f"LoRAtorio: {what} {shown(entry)} for the pool{hint}", field="pool", value=entry)


def meaning(entry: str, listed: Sequence[Listed]) -> tuple[bool, list[Listed], tuple[float, ...]]:
    """Whether an entry names one LoRA, the LoRAs it means, and the weights it gives them."""
    for text, weights in readings(entry):
        one = named(text, listed)
        found = [one] if one else matching(text, listed)
        if found:
            return one is not None, found, weights
    raise unknown(text, listed)


def resolve(pool: Iterable[str], listed: Sequence[Listed], weight: float) -> list[Member]:
    """The pool's LoRAs, each once, in the order in which entries first mean them.

    An entry that names a LoRA goes before one that matches it, of two of a kind the later one; entries without a weight
    mean ``weight``. LoRAs at weight 0 are left out. Raises `SettingsError` for an entry that means nothing here, and
    for weights that are out of range.
    """
    members: dict[str, Member] = {}
    by_name: set[str] = set()
    for entry in pool:
        one, found, weights = meaning(entry, listed)
        te, unet = (weights[0], weights[-1]) if weights else (weight, weight)
        for each in (te, unet):
            check_multiplier(each, f"{shown(entry)} of the pool", "pool")
        for lora in found:
            if one or lora.file not in by_name:
                members[lora.file] = Member(lora, te, unet, entry)
        if one:
            by_name.add(found[0].file)
    return [member for member in members.values() if member.text or member.unet]


def gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def check_size(members: Iterable[Member], most_files: int, most_bytes: int, otherwise: str = "raise the limit") -> None:
    """Raises `SettingsError` for a pool of more than ``most_files`` LoRAs, or whose files hold more than ``most_bytes``
    together; 0 is no limit. Every LoRA of a pool is in memory while an image is made. ``otherwise``: what to do when so
    many are meant."""
    members = list(members)
    size = sum(member.lora.size for member in members)
    too_many, too_large = 0 < most_files < len(members), 0 < most_bytes < size
    if not too_many and not too_large:
        return
    entries = Counter(member.entry for member in members)
    if too_large and not too_many:
        entries = Counter()
        for member in members:
            entries[member.entry] += member.lora.size
    entry = entries.most_common(1)[0][0]
    by_entry = [member.lora.size for member in members if member.entry == entry]
    allowed = " and ".join(
        [f"at most {most_files} LoRAs"] * bool(most_files) + [f"at most {gib(most_bytes)} in all"] * bool(most_bytes)
    )
    raise SettingsError(
        f"LoRAtorio: the pool holds {len(members)} LoRAs of {gib(size)}, of which {shown(entry)} brings "
        f"{len(by_entry)} of {gib(sum(by_entry))}, and may hold {allowed}, since all of it is in memory at once: name "
        f"fewer, leave some out with a weight of 0 (name:0), or {otherwise}",
        field="pool",
        value=entry,
        allowed=allowed,
    )
