"""The command line: ``loratorio generate`` composes images with diffusers, without a WebUI.

Exit codes: 0 done; 1 an unforeseen failure, or not enough memory; 2 a bad option (out of range, a size not divisible by
8, no LoRA at all); 3 a file that does not exist; 4 a file that is not what it should be (not safetensors, damaged, no
model that diffusers loads); 5 a LoRA of another architecture or of a kind, or a model, that cannot be composed; 6 a
picture that cannot be written where it should be; 130 interrupted.
"""

import random
import shlex
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from loratorio_ext import __version__
from loratorio_ext.errors import FileFormatError, LoRAtorioError, UnsupportedError
from loratorio_ext.generation import NOTE_KEY
from loratorio_ext.hosts.devices import DTYPES, OFFLOADS, check_choice, check_offload, place, where_to_compute
from loratorio_ext.infotext import infotext, join_prompt, split_prompt
from loratorio_ext.pool import Member
from loratorio_ext.samplers import SAMPLERS, Sampler, Sampling, parse_sampler, schedule_type
from loratorio_ext.settings import OPTIONS, PRESETS, Settings
from loratorio_ext.standalone import quiet as libraries
from loratorio_ext.standalone import tinyworld
from loratorio_ext.standalone.output import check_out, numbered, save
from loratorio_ext.standalone.report import (
    INTERRUPTED,
    UNFORESEEN,
    Clock,
    error_report,
    exit_code,
    report_of,
    step_report,
    usage_report,
    written,
)

try:
    import typer
    from typer.core import TyperGroup

    from loratorio_ext.record import PICKED_KEY, Record, written_shares
    from loratorio_ext.standalone.options import with_table
    from loratorio_ext.standalone.requests import (
        Model,
        Requested,
        blaming,
        find_model,
        listed_file,
        parse_size,
        pool_members,
        requested_loras,
    )
except ImportError as error:
    raise SystemExit(
        f"The command line needs more packages ({error}); in the project's folder: pip install '.[standalone]'"
    ) from error


class Commands(TyperGroup):
    """The commands. Every failure becomes words on stderr, an exit code, and with ``--json`` a report on stdout."""

    def main(self, args: Sequence[str] | None = None, *others: Any, standalone_mode: bool = True, **more: Any) -> Any:
        args = list(sys.argv[1:] if args is None else args)
        if not standalone_mode:
            return super().main(args, *others, standalone_mode=False, **more)
        try:
            code, report = super().main(args, *others, standalone_mode=False, **more), None
            if code == INTERRUPTED:  # as Typer returns it
                raise KeyboardInterrupt
        except LoRAtorioError as error:
            typer.echo(str(error), err=True)
            code, report = exit_code(error), report_of(error)
        except KeyboardInterrupt:
            code, report = INTERRUPTED, error_report("LoRAtorio: interrupted", "KeyboardInterrupt", INTERRUPTED)
        except Exception as error:
            if hasattr(error, "format_message"):  # of the options themselves, as Typer finds it
                error.show()
                code, report = error.exit_code, usage_report(error, args)
            elif type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
                message = f"LoRAtorio: not enough memory; try --offload model, or a smaller --size or --batch: {error}"
                typer.echo(message, err=True)
                code, report = UNFORESEEN, error_report(message, type(error).__name__, UNFORESEEN)
            else:
                traceback.print_exception(error)
                message = f"LoRAtorio: unforeseen failure: {type(error).__name__}: {error}"
                typer.echo(message, err=True)
                code, report = UNFORESEEN, error_report(message, type(error).__name__, UNFORESEEN)
        if report is not None and "--json" in args:
            typer.echo(written(report))
        raise SystemExit(code if isinstance(code, int) else 0)


app = typer.Typer(cls=Commands, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)


def main() -> None:
    app()


def show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"loratorio {__version__}")
        raise typer.Exit()


@app.callback()
def about(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """LoRAtorio: compose several LoRAs in one image, without training. A first picture: loratorio demo"""


# --- from what was asked to images ------------------------------------------------------------------------------------


@dataclass
class Notes:
    """What went otherwise than asked: told on stderr, unless ``quiet``, and kept for infotext and report."""

    quiet: bool
    told: list[str] = field(default_factory=list)

    def add(self, text: str) -> None:
        if text not in self.told:
            self.told.append(text)
            if not self.quiet:
                typer.echo(f"LoRAtorio: {text}", err=True)


@dataclass(frozen=True)
class Request:
    """One run of the command, understood and checked as far as it can be without the model."""

    model: Model
    prompt: str
    negative: str
    loras: Sequence[Requested]
    members: Sequence[Member]
    settings: Settings
    steps: int
    cfg: float
    sampler: Sampler
    karras: bool
    seeds: Sequence[int]
    size: tuple[int | None, int | None]
    out: Path

    @property
    def sampler_name(self) -> str:
        return f"{self.sampler.name} Karras" if self.karras else self.sampler.name


def parts_by_file(request: Request, notes: Notes) -> dict[str, dict[str, Any]]:
    """The parts of every LoRA's claim, by its tag and the options ``loras`` and ``everywhere``."""
    from loratorio_ext.claims import Tagged, parts_said  # only now: importing torch takes a while

    folder = request.model.lora_dir
    tagged = [Tagged(listed_file(each.path, folder), parts=each.parts) for each in request.loras]
    tagged += [Tagged(member.lora) for member in request.members]
    said, unused = parts_said(request.settings, tagged)
    for name in unused:
        notes.add(f"{name} is no LoRA of this image")
    return {each.lora.file: parts for each, parts in zip(tagged, said)}


def load_loras(
    host: Any, pipe: Any, request: Request, parts: Mapping[str, Mapping[str, Any]], notes: Notes
) -> tuple[list[Any], list[Any], dict[str, str]]:
    """The LoRAs asked for, in order, those of the pool that fit, and why others of it are left out, by name."""
    asked, pooled, left_out = [], [], {}
    for lora in request.loras:
        with blaming("lora", str(lora.path)):
            file, weights = str(lora.path), (lora.te_weight, lora.unet_weight)
            asked.append(host.load_lora(pipe, file, *weights, **parts[file]))
    for member in request.members:
        try:
            file, weights = member.lora.file, (member.text, member.unet)
            lora = host.load_lora(pipe, file, *weights, member.lora.name, **parts[file])
            pooled.append(replace(lora, pooled=True))
        except (FileFormatError, UnsupportedError) as error:
            left_out[member.lora.path] = error.detail
            notes.add(f"{member.lora.path} is left out of the pool: {error.detail.removeprefix('LoRAtorio: ')}")
    if not asked and not pooled:
        raise UnsupportedError(
            "LoRAtorio: no LoRA of the pool can be composed in this model", field="pool", value=request.settings.pool
        )
    return asked, pooled, left_out


def unread(pipe: Any, text: str) -> str:
    """What CLIP's text encoders do not read of a prompt, which they cut at their length."""
    rests = []
    for tokenizer in filter(None, (getattr(pipe, name, None) for name in ("tokenizer", "tokenizer_2"))):
        if type(tokenizer).__name__.startswith("CLIPTokenizer"):
            rests.append(tokenizer.decode(tokenizer(text).input_ids[tokenizer.model_max_length - 1 : -1]))
    return max(rests, key=len, default="")


def stop_at_nan(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """A pipeline's callback: no more steps once there is nothing but noise that is no number."""
    check_image(bool(tensors["latents"].isfinite().all()), f"after step {step + 1}")
    return tensors


def check_image(finite: bool, when: str) -> None:
    """Raises `UnsupportedError` where an image would be black for NaN or infinity in it."""
    if not finite:
        raise UnsupportedError(
            f"LoRAtorio: {when} the image holds NaN or infinity, as it does when numbers outgrow their type: use "
            "smaller weights of LoRAs, or --dtype float32 or bfloat16"
        )


def compose(
    host: Any, pipe: Any, loras: Sequence[Any], request: Request, on_step: Callable[[Any], None], notes: Notes
) -> list[Any]:
    """The images of a request, whose pool is among the LoRAs and whose claims they bring along."""
    settings = replace(request.settings, pool=(), loras={}, everywhere=())
    with host.composed(pipe, loras, settings, on_step) as composition:
        for note in composition.notes:
            notes.add(note)
        result = pipe(
            prompt=request.prompt,
            negative_prompt=request.negative,
            num_inference_steps=request.steps,
            guidance_scale=request.cfg,
            width=request.size[0],
            height=request.size[1],
            num_images_per_prompt=len(request.seeds),
            generator=host.generators(request.seeds),
            callback_on_step_end=stop_at_nan,
            output_type="np",
        )
    for note in composition.unnamed:
        notes.add(note)
    import numpy as np

    check_image(bool(np.isfinite(result.images).all()), "decoded")
    for seed, found in zip(request.seeds, getattr(result, "nsfw_content_detected", None) or ()):
        if found:
            notes.add(f"the model's own safety checker has blackened the image of seed {seed}")
    return pipe.image_processor.numpy_to_pil(result.images)


def parameters_of(request: Request, pipe: Any, size: tuple[int, int], notes: Notes) -> dict[str, Any]:
    """The infotext's parameters that all images of a request share."""
    spacing = pipe.scheduler.config.get("timestep_spacing")
    return {
        "Steps": request.steps,
        "Sampler": request.sampler.name,
        "Schedule type": schedule_type(request.sampler, request.karras, spacing),
        "CFG scale": request.cfg,
        "Seed": None,
        "Size": "x".join(map(str, size)),
        "Model": request.model.name,
        "RNG": "CPU",
        **request.settings.to_infotext(),
        PICKED_KEY: None,
        NOTE_KEY: "; ".join(notes.told) or None,
        "Version": f"LoRAtorio {__version__}",
    }


def paint(request: Request, device: str | None, dtype: str | None, offload: str, notes: Notes) -> dict[str, Any]:
    """Load, compose, write; returns the report."""
    device, dtype = where_to_compute(device, dtype)
    check_offload(offload, device)
    libraries.silence_imports()
    parts = parts_by_file(request, notes)

    from loratorio_ext.heatmaps import pictures
    from loratorio_ext.hosts import diffusers as host  # only now: importing diffusers takes seconds

    libraries.silence_loading()
    clock, settings = Clock(), request.settings
    with blaming("model", str(request.model.path)):
        pipe = host.load_pipeline(request.model.path, request.model.config, dtype)
        host.check_supported(pipe)
    pipe.set_progress_bar_config(disable=notes.quiet)
    pipe.scheduler = host.scheduler_for(pipe, request.sampler_name)
    asked, pooled, left_out = load_loras(host, pipe, request, parts, notes)
    loras = [lora for lora in (*asked, *pooled) if lora.branches]
    inert = [lora.name for lora in (*asked, *pooled) if not lora.branches]
    for name in inert:
        notes.add(f"{name} adds nothing to the model (it is all zero, or its weight or alpha is), and takes no part")
    for text, what in ((request.prompt, "prompt"), (request.negative, "negative prompt")):
        if rest := unread(pipe, text):
            notes.add(f"the {what} is longer than the model reads; not read is: {rest}")
    pipe = place(pipe, device, offload)
    loading = clock.lap()

    seen: list[dict[str, Any]] = []
    record = Record()

    def see(step: Any) -> None:
        seen.append(step_report(step, clock.lap()))
        if step.weights is not None:
            rows = range(len(request.seeds))
            record.add(step.members, step.weights.float().numpy(), rows, everywhere=step.everywhere)

    images = compose(host, pipe, loras, request, see, notes)
    decoding = clock.lap()

    parameters = parameters_of(request, pipe, images[0].size, notes)
    prompt = join_prompt(request.prompt, [lora.token for lora in request.loras])
    files = numbered(request.out, len(images))
    shares = record.shares() if settings.pool or settings.top_k else []
    to_write = []
    for index, (image, file, seed) in enumerate(zip(images, files, request.seeds)):
        own = {"Seed": seed, PICKED_KEY: written_shares(shares[index]) if shares else None}
        to_write.append((image, file, infotext(prompt, request.negative, {**parameters, **own})))
        if settings.show_maps:
            smooth = settings.upsampling == "bilinear"
            for kind, picture in pictures(record, index, image, smooth).items():
                to_write.append((picture, file.with_name(f"{file.stem}-{kind}.png"), None))
    save(to_write)
    return {
        "images": [{"file": str(file), "seed": seed} for file, seed in zip(files, request.seeds)],
        "loras": [
            {"file": str(each.path), "weights": (each.te_weight, each.unet_weight), "parts": parts[str(each.path)]}
            for each in request.loras
        ],
        "pool": [
            {"file": each.lora.file, "weights": (each.text, each.unet), "parts": parts[each.lora.file]}
            for each in request.members
            if each.lora.path not in left_out
        ],
        "left_out": left_out,
        "inert": inert,
        "notes": notes.told,
        "model": {
            "file": str(request.model.path),
            "pipeline": type(pipe).__name__,
            "device": device,
            "dtype": str(dtype),
            "offload": offload,
        },
        "call": {
            "prompt": request.prompt,
            "negative": request.negative,
            "steps": request.steps,
            "cfg": request.cfg,
            "sampler": request.sampler_name,
            "schedule": parameters["Schedule type"],
        },
        "options": {option.name: getattr(settings, option.name) for option in OPTIONS},
        "seconds": {"loading": loading, "steps": sum(each["seconds"] for each in seen), "decoding": decoding},
        "steps": seen,
        "version": __version__,
    }


# --- the commands -----------------------------------------------------------------------------------------------------


def seeds_from(seed: int, count: int) -> range:
    first = random.randrange(2**32) if seed < 0 else seed
    return range(first, first + count)


def tell(report: dict[str, Any], as_json: bool, quiet: bool) -> None:
    if as_json:
        typer.echo(written(report))
    elif not quiet:
        typer.echo("\n".join(image["file"] for image in report["images"]))


def default_of(name: str) -> str:
    return f"Default {getattr(Sampling(), name)}, of the tiny model {getattr(tinyworld.SAMPLING, name)}."


@app.command()
@with_table
def generate(
    model: Annotated[
        str,
        typer.Option(
            metavar="FILE|FOLDER|tinyworld",
            help="Checkpoint (.safetensors) or diffusers folder: SD 1.x, 2.x, SDXL; or the tiny model shipped along.",
        ),
    ],
    prompt: Annotated[str, typer.Option(help="What to paint; <lora:name:weight:at=left> names LoRAs of --lora-dir.")],
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE[:WEIGHT][:PART=...]",
            help="A LoRA file; FILE:TE:UNET sets both multipliers. Parts say where (at=left), how much (share=2), when "
            "(steps=0-0.5) it acts, or that it is in every pass (base=1). Repeatable.",
        ),
    ] = None,
    lora_dir: Annotated[Path | None, typer.Option(help="Where the prompt's LoRAs lie.")] = None,
    negative: Annotated[str, typer.Option(help="What not to paint.")] = "",
    steps: Annotated[int | None, typer.Option(min=1, max=1000, help=f"Sampling steps. {default_of('steps')}")] = None,
    cfg: Annotated[float | None, typer.Option(min=1, max=100, help=f"Guidance scale. {default_of('cfg')}")] = None,
    sampler: Annotated[
        str | None,
        typer.Option(
            help=f"{', '.join(SAMPLERS)}, in any case; 'Karras' may follow "
            f"{', '.join(each.name for each in SAMPLERS.values() if each.karras)}. {default_of('sampler')}"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=-1, max=2**63 - 1, help="The first image's; -1: random.")] = -1,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="Pixels; default: the model's own.")] = None,
    batch: Annotated[int, typer.Option(min=1, max=1000, help="Images at once, each with the next seed.")] = 1,
    out: Annotated[Path, typer.Option(help="PNG to write; several get a number each.")] = Path("loratorio.png"),
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a report of options, times and similarities, or of the error.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors and --json's report.")] = False,
    config: Annotated[
        Path | None,
        typer.Option(help="Diffusers folder with tokenizer and configuration for a single-file checkpoint."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:N, mps or xpu; default: cuda where there is one.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help=f"{', '.join(DTYPES)}; default: float16 on GPUs, float32 on the CPU.")
    ] = None,
    offload: Annotated[
        str,
        typer.Option(
            help=f"{', '.join(OFFLOADS)}: what stays in main memory while a GPU computes. model: all but the model at "
            "work."
        ),
    ] = "none",
    preset: Annotated[str, typer.Option(help=f"{', '.join(PRESETS)}: options to start from.")] = "default",
    pool_files: Annotated[
        int, typer.Option(min=0, help="The most LoRAs a pool may hold, all of which are in memory; 0: no limit.")
    ] = 256,
    pool_gib: Annotated[
        float, typer.Option(min=0, max=1e6, help="The most GiB that their files may be together; 0: no limit.")
    ] = 8.0,
    **options: Any,
) -> None:
    """Compose LoRAs in an image and write it as PNG, whose infotext pastes back into a WebUI.

    Exit codes: 0 done, 1 unforeseen failure or not enough memory, 2 bad option, 3 missing file, 4 unreadable or damaged
    file, 5 LoRA or model that cannot be composed, 6 picture that cannot be written, 130 interrupted.
    """
    notes = Notes(quiet)
    given = {name: value for name, value in options.items() if value is not None}
    settings = Settings.from_mapping({**given, "preset": preset, "enabled": True})
    width_and_height = (None, None) if size is None else parse_size(size)
    if dtype is not None:
        check_choice(dtype, DTYPES, "dtype")
    check_choice(offload, OFFLOADS, "offload")
    if sampler is not None:
        parse_sampler(sampler)
    text, tokens = split_prompt(prompt)
    found = find_model(model, config, lora_dir)
    parsed_sampler, karras = parse_sampler(sampler or found.sampling.sampler)
    requested, twice = requested_loras(lora or (), tokens, found.lora_dir, settings.pool)
    for note in twice:
        notes.add(note)
    taken = [each.path for each in requested]
    members = pool_members(settings, found.lora_dir, taken, pool_files, int(pool_gib * 2**30))
    check_out(out)
    request = Request(
        model=found,
        prompt=text.strip(),
        negative=negative,
        loras=requested,
        members=members,
        settings=settings,
        steps=steps or found.sampling.steps,
        cfg=cfg or found.sampling.cfg,
        sampler=parsed_sampler,
        karras=karras,
        seeds=seeds_from(seed, batch),
        size=width_and_height,
        out=out,
    )
    tell(paint(request, device, dtype, offload, notes), as_json, quiet)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="PNG to write.")] = Path("loratorio.png"),
    seed: Annotated[int, typer.Option(min=-1, max=2**63 - 1, help="-1: random.")] = 1,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a report, or the error.")] = False,
) -> None:
    """Compose three LoRAs of the tiny model that comes along: a first picture, in seconds on a CPU."""
    if not quiet and not as_json:
        command = ["loratorio", "generate", "--model", tinyworld.NAME, "--prompt", tinyworld.PROMPT]
        command += ["--seed", str(seed), "--out", str(out)]
        typer.echo(f"{shlex.join(command)}\nLoRAs to name: {', '.join(tinyworld.loras())}", err=True)
    arguments = {"model": tinyworld.NAME, "prompt": tinyworld.PROMPT, "seed": seed, "out": out}
    generate.__wrapped__(**arguments, quiet=quiet, as_json=as_json)


if __name__ == "__main__":
    main()
