"""The command line: ``loratorio generate`` composes images with diffusers, without a WebUI.

Exit codes: 0 done; 1 an unforeseen failure; 2 a bad option (out of range, a size not divisible by 8, no LoRA at all);
3 a file that does not exist; 4 a file that is not what it should be (not safetensors, no model that diffusers loads);
5 a LoRA of another architecture or of a kind, or a model, that cannot be composed.
"""

import functools
import inspect
import json
import random
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from loratorio_ext import __version__
from loratorio_ext.errors import FileFormatError, LoRAtorioError, MissingFileError, SettingsError, UnsupportedError
from loratorio_ext.infotext import PNG_KEY, LoraToken, infotext, join_prompt, split_prompt
from loratorio_ext.pool import Listed, Member, path_below, resolve
from loratorio_ext.record import PICKED_KEY, Record, written_shares
from loratorio_ext.settings import OPTIONS, PRESETS, Lines, Option, Settings

try:
    import typer
except ImportError as error:
    raise SystemExit("The command line needs more packages: pip install 'sd-webui-loratorio[standalone]'") from error

EXIT_CODES = {SettingsError: 2, MissingFileError: 3, FileFormatError: 4, UnsupportedError: 5}

NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)")

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)


def main() -> None:
    app()


@app.callback()
def about() -> None:
    """LoRAtorio: compose several LoRAs in one image, without training."""


# --- what is asked ----------------------------------------------------------------------------------------------------


def parse_lora(text: str) -> tuple[Path, float, float]:
    """``FILE``, ``FILE:weight`` or ``FILE:te:unet``: the file and its multipliers in text encoders and UNet."""
    file, weights = text, []
    while len(weights) < 2 and NUMBER.fullmatch(file.rpartition(":")[2]) and ":" in file:
        file, _, weight = file.rpartition(":")
        weights.insert(0, float(weight))
    te_weight, unet_weight = (weights * 2 if len(weights) == 1 else weights) or (1.0, 1.0)
    return Path(file), te_weight, unet_weight


def parse_size(text: str) -> tuple[int, int]:
    """Width and height from ``WxH``, in pixels."""
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    size = tuple(map(int, match.groups())) if match else (0, 0)
    if not all(size) or any(side % 8 for side in size):
        raise SettingsError(f"LoRAtorio: size must be WIDTHxHEIGHT, both divisible by 8, got {text!r}")
    return size


def find_lora(name: str, folder: Path | None) -> Path:
    """The file that a prompt's token means: by its name, anywhere in the folder."""
    if folder is None:
        raise SettingsError(f"LoRAtorio: the prompt names the LoRA {name!r}; say with --lora-dir where it lies")
    if not folder.is_dir():
        raise MissingFileError(f"LoRAtorio: {folder} is not a folder")
    found = sorted(path for path in folder.rglob("*.safetensors") if path.stem == name)
    if not found:
        raise MissingFileError(f"LoRAtorio: there is no {name}.safetensors in {folder}")
    if len(found) > 1:
        raise SettingsError(f"LoRAtorio: {name!r} may be any of {', '.join(map(str, found))}; give one with --lora")
    return found[0]


def pool_members(settings: Settings, folder: Path | None, taken: Iterable[Path]) -> list[Member]:
    """The pool's LoRAs among the files of the folder, without those that are ``taken`` already."""
    if not settings.pool:
        return []
    if folder is None:
        raise SettingsError("LoRAtorio: a pool is chosen from a folder; say with --lora-dir which")
    if not folder.is_dir():
        raise MissingFileError(f"LoRAtorio: {folder} is not a folder")
    files = sorted(folder.rglob("*.safetensors"))
    listed = [Listed(file.stem, str(file), path_below(str(file), str(folder))) for file in files]
    known = {path.resolve() for path in taken}
    members = resolve(settings.pool, listed, settings.pool_weight)
    return [member for member in members if Path(member.lora.file).resolve() not in known]


def load_pool(host: Any, pipe: Any, members: Iterable[Member]) -> tuple[list[Any], dict[str, str]]:
    """The pool's LoRAs that fit the pipeline, and why others are left out, by name."""
    loaded, left_out = [], {}
    for member in members:
        try:
            lora = host.load_lora(pipe, member.lora.file, member.text, member.unet, member.lora.name)
            loaded.append(replace(lora, pooled=True))
        except (FileFormatError, UnsupportedError) as error:
            left_out[member.lora.path] = error.detail
            typer.echo(f"LoRAtorio: {member.lora.path} is left out of the pool: {error.detail}", err=True)
    return loaded, left_out


def requested_loras(
    files: Iterable[str], tokens: Iterable[LoraToken], folder: Path | None, pool: Sequence[str] = ()
) -> dict[Path, tuple[float, float]]:
    """Every LoRA file asked for, with its multipliers: the prompt's before the others, a file named twice once.

    Without a ``pool`` there must be one.
    """
    in_prompt = {find_lora(token.name, folder): (token.te_weight, token.unet_weight) for token in tokens}
    requested = in_prompt | {path: (te, unet) for path, te, unet in map(parse_lora, files)}
    if not requested and not pool:
        raise SettingsError(
            "LoRAtorio: no LoRA given; name one with --lora FILE, or in the prompt as <lora:name:weight>"
        )
    for path in requested:
        if not path.is_file():
            raise MissingFileError(f"LoRAtorio: {path} does not exist")
    return requested


# --- what is handed back ----------------------------------------------------------------------------------------------


def numbered(path: Path, count: int) -> list[Path]:
    """A file for each of ``count`` images: the path itself for a single one."""
    if count == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{index}{path.suffix}") for index in range(count)]


def rounded(values: Any) -> list[float]:
    return [round(float(value), 6) for value in values]


def step_report(step: Any, seconds: float) -> dict[str, Any]:
    """One step in numbers: for each LoRA the mean and lowest similarity to the base model, and its share of the image.

    ``spread`` is what the adaptive temperature multiplies when nothing is relative: the standard deviation over the
    LoRAs, averaged over patches.
    """
    report = {"step": step.index, "timestep": step.timestep, "seconds": seconds}
    if step.weights is not None:
        similarity = step.similarity.flatten(1)
        report["similarity"] = {
            "mean": rounded(similarity.mean(1)),
            "lowest": rounded(similarity.amin(1)),
            "spread": round(float(similarity.std(0, correction=0).mean()), 6),
        }
        report["weights"] = rounded(step.weights.flatten(1).mean(1))
    return report


class Clock:
    """Seconds since the last lap."""

    def __init__(self):
        self.last = time.perf_counter()

    def lap(self) -> float:
        last, self.last = self.last, time.perf_counter()
        return round(self.last - last, 4)


def save(image: Any, path: Path, text: str) -> None:
    """Write the image as PNG, with its infotext where WebUIs look for it."""
    from PIL.PngImagePlugin import PngInfo

    information = PngInfo()
    information.add_text(PNG_KEY, text)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, pnginfo=information)


# --- options from the table -------------------------------------------------------------------------------------------


def parameter(option: Option) -> inspect.Parameter:
    """An option of the table as one of the command; without being given it is None, so that presets can fill it in."""
    several = isinstance(option, Lines)
    allowed = "repeatable" if several else f"{option.allowed}; default {option.default}"
    help_text = f"{option.help} ({allowed})"
    panel = f"Composition: {option.group}" if option.group else "Composition"
    annotation = Annotated[
        (list[str] if several else option.given_as) | None, typer.Option(help=help_text, rich_help_panel=panel)
    ]
    return inspect.Parameter(option.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def with_table(command: Callable) -> Callable:
    """The command with an option for every row of the table, all of which come to it as ``**options``.

    ``enabled`` is a WebUI's: the command always composes.
    """
    own = list(inspect.signature(command).parameters.values())[:-1]
    table = [parameter(option) for option in OPTIONS if option.name != "enabled"]
    own = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in own]

    @functools.wraps(command)
    def wrapper(**values):
        return command(**values)

    wrapper.__signature__ = inspect.Signature([*own, *table])
    wrapper.__annotations__ = {each.name: each.annotation for each in (*own, *table)}
    return wrapper


def with_exit_codes(command: Callable) -> Callable:
    """The command, whose errors for the user become a line and an exit code."""

    @functools.wraps(command)
    def wrapper(**values):
        try:
            return command(**values)
        except LoRAtorioError as error:
            typer.echo(str(error), err=True)
            raise typer.Exit(next((code for kind, code in EXIT_CODES.items() if isinstance(error, kind)), 1)) from error

    return wrapper


# --- the command ------------------------------------------------------------------------------------------------------


@app.command()
@with_exit_codes
@with_table
def generate(
    model: Annotated[Path, typer.Option(help="Checkpoint (.safetensors) or diffusers folder: SD 1.x, 2.x, SDXL.")],
    prompt: Annotated[str, typer.Option(help="What to paint; <lora:name:weight> names LoRAs of --lora-dir.")],
    lora: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE[:WEIGHT]", help="A LoRA file; FILE:TE:UNET sets both multipliers. Repeatable."),
    ] = None,
    lora_dir: Annotated[Path | None, typer.Option(help="Where the prompt's LoRAs lie.")] = None,
    negative: Annotated[str, typer.Option(help="What not to paint.")] = "",
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Sampling steps.")] = 30,
    cfg: Annotated[float, typer.Option(min=1, max=100, help="Guidance scale.")] = 7.0,
    sampler: Annotated[str, typer.Option(help="Sampler by its WebUI name; 'Karras' may follow.")] = "DPM++ 2M",
    seed: Annotated[int, typer.Option(min=-1, max=2**63 - 1, help="The first image's; -1: random.")] = -1,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="Pixels; default: the model's own.")] = None,
    batch: Annotated[int, typer.Option(min=1, max=1000, help="Images at once, each with the next seed.")] = 1,
    out: Annotated[Path, typer.Option(help="PNG to write; several get a number each.")] = Path("loratorio.png"),
    as_json: Annotated[bool, typer.Option("--json", help="Print a report of options, times and similarities.")] = False,
    config: Annotated[
        Path | None,
        typer.Option(help="Diffusers folder with tokenizer and configuration for a single-file checkpoint."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="Torch device; default: the GPU where there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16; default: by device.")] = None,
    preset: Annotated[str, typer.Option(help=f"{', '.join(PRESETS)}: options to start from.")] = "default",
    **options: Any,
) -> None:
    """Compose LoRAs in an image and write it as PNG, whose infotext pastes back into a WebUI.

    Exit codes: 0 done, 1 unforeseen failure, 2 bad option, 3 missing file, 4 unreadable file, 5 LoRA or model that
    cannot be composed.
    """
    given = {name: value for name, value in options.items() if value is not None}
    settings = Settings.from_mapping({**given, "preset": preset, "enabled": True})
    text, tokens = split_prompt(prompt)
    width, height = (None, None) if size is None else parse_size(size)
    requested = requested_loras(lora or (), tokens, lora_dir, settings.pool)
    members = pool_members(settings, lora_dir, requested)
    first = random.randrange(2**32) if seed < 0 else seed
    seeds = range(first, first + batch)

    from loratorio_ext.heatmaps import pictures
    from loratorio_ext.hosts import diffusers as host  # only now: importing diffusers takes seconds

    clock = Clock()
    sampler_name, karras = host.parse_sampler(sampler)
    device, dtype = host.where_to_compute(device, dtype)
    pipe = host.load_pipeline(model, config, dtype).to(device)
    host.check_supported(pipe)
    pipe.scheduler = host.scheduler_for(pipe, sampler)
    loras = [host.load_lora(pipe, path, *weights) for path, weights in requested.items()]
    pooled, left_out = load_pool(host, pipe, members)
    loras += pooled
    if not loras:
        raise UnsupportedError("LoRAtorio: no LoRA of the pool can be composed in this model")
    loading = clock.lap()

    seen: list[dict[str, Any]] = []
    record = Record()

    def see(step: Any) -> None:
        seen.append(step_report(step, clock.lap()))
        if step.weights is not None:
            record.add([lora.name for lora in loras], step.weights.float().numpy(), range(batch))

    with host.composed(pipe, loras, replace(settings, pool=()), see):
        images = pipe(
            prompt=text.strip(),
            negative_prompt=negative,
            num_inference_steps=steps,
            guidance_scale=cfg,
            width=width,
            height=height,
            num_images_per_prompt=batch,
            generator=host.generators(seeds),
        ).images
    decoding = clock.lap()

    named = [LoraToken(path.stem, *weights) for path, weights in requested.items()]
    parameters = {
        "Steps": steps,
        "Sampler": sampler_name,
        "Schedule type": "Karras" if karras else "Automatic",
        "CFG scale": cfg,
        "Seed": None,
        "Size": "x".join(map(str, images[0].size)),
        "Model": model.stem,
        "RNG": "CPU",
        **settings.to_infotext(),
        "Version": f"LoRAtorio {__version__}",
    }
    files = numbered(out, batch)
    shares = record.shares() if settings.pool or settings.top_k else []
    for index, (image, file, each) in enumerate(zip(images, files, seeds)):
        own = {"Seed": each, PICKED_KEY: written_shares(shares[index]) if shares else None}
        save(image, file, infotext(join_prompt(text.strip(), named), negative, {**parameters, **own}))
        if settings.show_maps:
            smooth = settings.upsampling == "bilinear"
            for kind, picture in pictures(record, index, image, smooth).items():
                picture.save(file.with_name(f"{file.stem}-{kind}.png"))
    if not as_json:
        typer.echo("\n".join(map(str, files)))
        return
    report = {
        "images": [{"file": str(file), "seed": each} for file, each in zip(files, seeds)],
        "loras": [{"file": str(path), "weights": weights} for path, weights in requested.items()],
        "pool": [{"file": m.lora.file, "weights": (m.text, m.unet)} for m in members if m.lora.path not in left_out],
        "left_out": left_out,
        "model": {"file": str(model), "pipeline": type(pipe).__name__, "device": device, "dtype": str(dtype)},
        "call": {"prompt": text.strip(), "negative": negative, "steps": steps, "cfg": cfg, "sampler": sampler},
        "options": {option.name: getattr(settings, option.name) for option in OPTIONS},
        "seconds": {"loading": loading, "steps": sum(each["seconds"] for each in seen), "decoding": decoding},
        "steps": seen,
        "version": __version__,
    }
    typer.echo(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
