"""What is asked of the command line: files, LoRAs and sizes, understood and checked before anything slow is begun."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loratorio_ext.errors import (
    FileFormatError,
    LoRAtorioError,
    MissingFileError,
    SettingsError,
    nearest_name,
    shown,
)
from loratorio_ext.headers import existing, read_header
from loratorio_ext.hosts.diffusers_files import (
    check_checkpoint,
    check_folder,
    check_lora,
    same_file,
)
from loratorio_ext.infotext import LoraToken, parse_items
from loratorio_ext.parts import items_of
from loratorio_ext.pool import Listed, Member, check_size, path_below, resolve
from loratorio_ext.samplers import Sampling
from loratorio_ext.settings import Settings
from loratorio_ext.standalone import tinyworld

LORA_FORM = "FILE, FILE:WEIGHT or FILE:TE:UNET, each with parts after it like :at=left"
LARGEST_SIDE = 16384
SIZE_FORM = f"WIDTHxHEIGHT in pixels, both divisible by 8 and at most {LARGEST_SIDE}"

LORA_FILE = re.compile(r"(.*?\.safetensors)((?::[^:/\\]*)*)", re.IGNORECASE | re.DOTALL)
NOT_A_FILE = re.compile(r"([^:]*|[A-Za-z]:[/\\][^:]*)((?::[^:/\\]*)*)", re.DOTALL)


@dataclass(frozen=True)
class Model:
    """A model's file or folder, the folder that has its configuration, and that of its LoRAs; None: not said."""

    path: Path
    config: Path | None = None
    lora_dir: Path | None = None
    sampling: Sampling = Sampling()

    @property
    def name(self) -> str:
        return self.path.name if self.path.is_dir() else self.path.stem


def find_model(text: str, config: Path | None, lora_dir: Path | None) -> Model:
    """The model by its path, or the tiny world by its name; refused where its files cannot be one."""
    if config is not None:
        with blaming("config", str(config)):
            check_folder(existing(config))
    if text == tinyworld.NAME:
        folder = tinyworld.weights()
        return Model(folder / f"{text}.safetensors", config or folder, lora_dir or folder / "lora", tinyworld.SAMPLING)
    with blaming("model", text):
        path = existing(text)
        check_folder(path) if path.is_dir() else check_checkpoint(read_header(path))
    return Model(path, config, lora_dir)


@contextmanager
def blaming(field: str, value: str) -> Iterator[None]:
    """While entered, errors that name no option to blame name this one."""
    try:
        yield
    except LoRAtorioError as error:
        error.field, error.value = error.field or field, value if error.value is None else error.value
        raise


@dataclass(frozen=True)
class Requested:
    """A LoRA file that was asked for, with its multipliers in text encoders and UNet, and the parts of its claim."""

    path: Path
    te_weight: float = 1.0
    unet_weight: float = 1.0
    parts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def token(self) -> LoraToken:
        """How a prompt asks for it."""
        return LoraToken(self.path.stem, self.te_weight, self.unet_weight, self.parts)


def parse_lora(text: str) -> Requested:
    """``FILE``, ``FILE:weight`` or ``FILE:te:unet``, and parts as in a prompt's token."""
    match = LORA_FILE.fullmatch(text) or NOT_A_FILE.fullmatch(text)
    if match is None:
        return Requested(Path(text))
    file, items = match.group(1), match.group(2).split(":")[1:]
    if sum("=" not in item for item in items) > 2:
        raise SettingsError(
            f"LoRAtorio: lora must be {LORA_FORM}, got {shown(text)}", field="lora", value=text, allowed=LORA_FORM
        )
    read = parse_items(file, items, f"--lora {text}", "lora")
    return Requested(Path(file), read.te_weight, read.unet_weight, read.parts)


def parse_size(text: str) -> tuple[int, int]:
    """Width and height from ``WxH``, in pixels."""
    match = re.fullmatch(r"(\d{1,9})x(\d{1,9})", text, re.ASCII)
    size = tuple(map(int, match.groups())) if match else (0, 0)
    if not all(0 < side <= LARGEST_SIDE and side % 8 == 0 for side in size):
        raise SettingsError(
            f"LoRAtorio: size must be {SIZE_FORM}, got {shown(text)}", field="size", value=text, allowed=SIZE_FORM
        )
    return size


def lora_files(folder: Path) -> list[Path]:
    """Every LoRA file in the folder and below it."""
    if not folder.is_dir():
        raise MissingFileError(f"LoRAtorio: {folder} is not a folder", field="lora_dir", value=str(folder))
    return sorted(folder.rglob("*.safetensors"))


def find_lora(name: str, folder: Path | None, field: str = "prompt") -> Path:
    """The file that a name means, in a prompt's token or as ``--lora``: anywhere in the folder."""
    if folder is None:
        said = "the prompt names the LoRA" if field == "prompt" else "there is no file"
        message = (
            f"LoRAtorio: {said} {shown(name)}; say with --lora-dir where LoRAs lie that are named without a folder"
        )
        raise SettingsError(message, field="lora_dir", allowed="a folder")
    files = lora_files(folder)
    found = [path for path in files if path.stem == name]
    if not found:
        hint = nearest_name(name, {path.stem for path in files})
        message = f"LoRAtorio: there is no {name}.safetensors in {folder}{hint}"
        raise MissingFileError(message, field=field, value=name)
    if len({same_file(path) for path in found}) > 1:
        paths = ", ".join(map(str, found))
        message = f"LoRAtorio: {shown(name)} may be any of {paths}; give one with --lora"
        raise SettingsError(message, field=field, value=name, allowed=f"one of {paths}")
    return found[0]


def given_file(path: Path, folder: Path | None) -> Path:
    """The file that ``--lora`` gives: by its path, or by its name in the folder."""
    if path.is_file():
        return path
    if path.is_dir():
        message = (
            f"LoRAtorio: {path} is a folder; --lora takes a file, and --lora-dir the folder of those named in prompts"
        )
        raise FileFormatError(message, field="lora", value=str(path), allowed=LORA_FORM)
    if len(path.parts) == 1 and not path.suffix and folder is not None:
        return find_lora(path.name, folder, "lora")
    hint = ""
    if path.parent.is_dir():
        hint = nearest_name(path.name, [each.name for each in path.parent.glob("*.safetensors")])
    raise MissingFileError(f"LoRAtorio: {path} does not exist{hint}", field="lora", value=str(path), allowed=LORA_FORM)


def requested_loras(
    files: Iterable[str], tokens: Iterable[LoraToken], folder: Path | None, pool: Sequence[str] = ()
) -> tuple[list[Requested], list[str]]:
    """Every LoRA asked for, the prompt's before the others, each file once, and what there is to say of that.

    Of a file that is named twice the last multipliers and parts hold. Without a ``pool`` there must be one LoRA.
    """
    asked = [
        Requested(find_lora(token.name, folder), token.te_weight, token.unet_weight, token.parts) for token in tokens
    ]
    asked += [replace(each, path=given_file(each.path, folder)) for each in map(parse_lora, files)]
    if not asked and not pool:
        raise SettingsError(
            "LoRAtorio: no LoRA given; name one with --lora FILE, or in the prompt as <lora:name:weight>",
            field="lora",
            allowed=LORA_FORM,
        )
    once: dict[tuple[int, int] | str, Requested] = {}
    notes = []
    for each in asked:
        key = same_file(each.path)
        if key in once:
            at = ":".join((f"{each.te_weight:g}:{each.unet_weight:g}", *items_of(each.parts)))
            notes.append(f"{once[key].path} and {each.path} are one LoRA, which takes part once, at weight {at}")
        once[key] = each
    for each in once.values():
        with blaming("lora", str(each.path)):
            check_lora(read_header(each.path))
    return list(once.values()), notes


def listed_file(file: Path, folder: Path | None) -> Listed:
    """A LoRA's file as the pool's entries and the options know it."""
    return Listed(file.stem, str(file), path_below(str(file), str(file.parent if folder is None else folder)))


def pool_members(
    settings: Settings, folder: Path | None, taken: Iterable[Path], most_files: int, most_bytes: int
) -> list[Member]:
    """The pool's LoRAs among the files of the folder, each file once, without those that are ``taken`` already.

    Raises `SettingsError` for a pool that is larger than the limits; see `check_size`.
    """
    if not settings.pool:
        return []
    if folder is None:
        message = "LoRAtorio: a pool is chosen from a folder; say with --lora-dir which"
        raise SettingsError(message, field="lora_dir", allowed="a folder")
    listed = [
        replace(listed_file(file, folder), size=file.stat().st_size) for file in lora_files(folder) if file.is_file()
    ]
    known = {same_file(path) for path in taken}
    members = []
    for member in resolve(settings.pool, listed, settings.pool_weight):
        key = same_file(member.lora.file)
        if key not in known:
            known.add(key)
            members.append(member)
    check_size(members, most_files, most_bytes, "raise the limits, --pool-files and --pool-gib")
    return members
