"""Diffusers pipelines: composition inside a pipeline that otherwise stays diffusers' own.

::

    pipe = load_pipeline("model.safetensors")
    loras = [load_lora(pipe, "knight.safetensors", 0.8), load_lora(pipe, "watercolour.safetensors")]
    with composed(pipe, loras, patch_size=4) as composition:
        image = pipe("a knight in a forest, watercolour", num_inference_steps=30).images[0]

While entered, calls of the pipeline are answered in its place: of ``encode_prompt``, which encodes the prompts under
every LoRA alone too; of a ControlNet, which reads them; and of the denoiser (UNet or transformer, see
`loratorio_ext.hosts.denoisers`), which evaluates what the method plans and returns composed rows. Everything else
(schedulers, callbacks, guidance, decoding; image-to-image, inpainting) is the pipeline's, and after leaving nothing of
this remains.

The denoiser's call is taken over by a `ModelHook` in diffusers' own `HookRegistry`, so that it stacks with offloading
and the other hooks there. A guider (`BaseGuidance`) would be the natural place to combine predictions, but guiders
belong to modular pipelines, and one sees neither the model's input nor the scheduler that turn a v prediction into
noise.
"""

import functools
import inspect
import json
import math
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.loaders.single_file_utils import infer_diffusers_model_type, load_single_file_checkpoint
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from loratorio_ext.claims import (
    Claim,
    Claims,
    Tagged,
    claims_of,
    heeding,
    in_words,
    left_out,
    not_heeded,
    places_and_shares,
)
from loratorio_ext.core import DIVERGENCE, Method, Plan, Predictions, method_from
from loratorio_ext.errors import FileFormatError, SettingsError, UnsupportedError
from loratorio_ext.headers import existing, read_header
from loratorio_ext.hosts.denoisers import (
    ROWS_APART,
    Call,
    Encoded,
    Layout,
    Texts,
    noise_gain,
    parameterisation,
    predicted_noise,
    stacked,
)
from loratorio_ext.hosts.diffusers_files import (
    check_checkpoint,
    check_folder,
)
from loratorio_ext.hosts.diffusers_loras import (
    LoRA,
    check_fit,
    denoiser_of,
    layers_of,
    load_lora,
    text_encoders_of,
)
from loratorio_ext.hosts.tensors import tensors_in
from loratorio_ext.isolation import (
    ROWS_OF_A_POOL,
    CudaMemory,
    IsolatedCalls,
    Isolation,
    Row,
)
from loratorio_ext.pool import Listed
from loratorio_ext.samplers import parse_sampler
from loratorio_ext.settings import OPTION, Settings

__all__ = [
    "Composition",
    "LoRA",
    "Step",
    "check_supported",
    "composed",
    "generators",
    "load_lora",
    "load_pipeline",
    "scheduler_for",
]

HOOK = "loratorio"
GIVEN_TEXTS = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
"""Arguments of pipelines in which texts are given encoded already, the prompt's first."""


# --- pipelines --------------------------------------------------------------------------------------------------------


def pipeline_class(checkpoint: Path, config: Path | None) -> type[DiffusionPipeline]:
    """The text-to-image pipeline for a single-file checkpoint: ``config`` names it, or the checkpoint's keys tell."""
    if config is not None:
        return getattr(diffusers, json.loads((config / "model_index.json").read_text())["_class_name"])
    kind = infer_diffusers_model_type(load_single_file_checkpoint(str(checkpoint)))
    return diffusers.StableDiffusionXLPipeline if kind.startswith("xl") else diffusers.StableDiffusionPipeline


def load_pipeline(path: str | Path, config: str | Path | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """A text-to-image pipeline (SD 1.x, SD 2.x, SDXL) from a diffusers folder or one ``.safetensors`` checkpoint.

    A checkpoint holds no tokenizer and no configuration: ``config`` is a diffusers folder that has them (its weights
    are not looked at). Without it diffusers takes those of the original model, from its cache or the hub.
    """
    path = existing(path)
    config = None if config is None else existing(config)
    for folder in filter(None, (path if path.is_dir() else None, config)):
        check_folder(folder)
    if not path.is_dir():
        check_checkpoint(read_header(path))
    try:
        if path.is_dir():  # other files than safetensors would be unpickled
            pipe = DiffusionPipeline.from_pretrained(path, dtype=dtype, local_files_only=True, use_safetensors=True)
        else:
            given = {} if config is None else {"config": str(config)}
            kind = pipeline_class(path, config)
            pipe = kind.from_single_file(str(path), dtype=dtype, local_files_only=True, **given)
    except Exception as error:  # whatever diffusers stumbles over in files that are not what it expects
        hint = "" if path.is_dir() or config else " (config, a diffusers folder like it, makes up for what it lacks)"
        why = textwrap.shorten(f"{type(error).__name__}: {error}", 600, placeholder=" …")
        raise FileFormatError(f"LoRAtorio: diffusers cannot load {path}{hint}: {why}", value=str(path)) from error
    check_numbers(pipe, path)
    return pipe


def all_finite(value: Tensor) -> bool:
    """Whether no number is NaN or infinite; quick, since a sum of what is finite is, too, but for giants."""
    if not value.is_floating_point() or value.is_meta:
        return True
    value = value.float() if value.element_size() == 1 else value  # float8 knows neither sum nor isfinite
    return math.isfinite(value.sum(dtype=torch.float32).item()) or bool(value.isfinite().all())


def check_numbers(pipe: Any, path: Path) -> None:
    """Raises `FileFormatError` where a weight of the pipeline's models is NaN or infinite."""
    for component, model in pipe.components.items():
        for name, value in model.state_dict().items() if isinstance(model, nn.Module) else ():
            if not all_finite(value):
                raise FileFormatError(
                    f"LoRAtorio: {path} is damaged: {component}.{name} holds NaN or infinity in {value.dtype}",
                    value=str(path),
                )


def scheduler_for(pipe: Any, sampler: str) -> Any:
    """A scheduler of the kind that WebUIs call ``sampler``, for the noise schedule that the pipeline has."""
    sampler, karras = parse_sampler(sampler)
    if parameterisation(pipe.scheduler) == "flow_prediction":
        if (sampler.name, karras) != ("Euler", False):
            raise SettingsError(
                f"LoRAtorio: {type(pipe).__name__} follows a flow, for which the only sampler is Euler",
                field="sampler",
                value=sampler.name,
                allowed="Euler",
            )
        return type(pipe.scheduler).from_config(pipe.scheduler.config)
    config = dict(pipe.scheduler.config)
    trailing = config.get("timestep_spacing") == "trailing" and not karras  # Karras' goes from first to last
    spacing = {} if trailing else sampler.spacing
    schedule = {"use_karras_sigmas": karras} if sampler.karras else {}
    return getattr(diffusers, sampler.scheduler).from_config(config, **sampler.options, **spacing, **schedule)


def generators(seeds: Iterable[int]) -> list[torch.Generator]:
    """One source of noise an image, on the CPU: an image depends on its own seed alone, on every device."""
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


# --- composition ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """What one denoising step came to, on the CPU.

    ``timestep``: as the denoiser is given it. ``plan``: the evaluations it took, whose numbers are those of ``loras``,
    the names of all that compete. ``similarity [E, R, h, w]`` of the E LoRAs that were ``evaluated``, and ``weights
    [M, R, h, w]`` of the M ``members`` that took part, patch by patch, where the method has them; gates, with that
    `combination`, which need not add up to 1. ``everywhere``: the names of those in every pass.
    """

    index: int
    timestep: float
    plan: Plan
    loras: tuple[str, ...]
    similarity: Tensor | None = None
    weights: Tensor | None = None
    everywhere: tuple[str, ...] = ()

    @property
    def members(self) -> list[str]:
        """The names of those that took part: the first axis of ``weights``."""
        return [self.loras[index] for index in self.plan.members]

    @property
    def evaluated(self) -> list[str]:
        """The names of those that were evaluated alone: the first axis of ``similarity``."""
        return [self.loras[index] for index in self.plan.isolated]


@dataclass
class UnderWay:
    """The step under way: its conditional rows' noisy latents ``x [R, ...]`` at ``timestep``, the plan, what was
    predicted where there is something to compose, and whether the unconditional rows were called for, too."""

    plan: Plan
    x: Tensor
    timestep: Tensor
    predictions: Predictions | None = None
    guided: bool = False

    def is_of(self, call: Call) -> bool:
        """Whether a call is about the same noisy latents at the same time."""
        x = call.x[-len(self.x) :]
        return torch.equal(call.timestep.flatten()[0], self.timestep.flatten()[0]) and torch.equal(x, self.x)


class Composition(ModelHook):
    """LoRAs at work in a pipeline, and what was seen of them: ``steps``, of the pipeline's latest call.

    ``loras`` compete by their ``claims``; those ``everywhere`` act in every pass, the bare model's too. ``inert`` are
    the names of LoRAs that add nothing; ``notes`` say what is otherwise than asked, ``unnamed`` which the latest
    call's prompts leave out, and why. ``on_step`` is told of every step as it is done.
    """

    def __init__(
        self, pipe: Any, loras: Sequence[LoRA], settings: Settings, on_step: Callable[[Step], None] | None = None
    ):
        super().__init__()
        self.pipe, self.settings, self.on_step = pipe, settings, on_step
        self.new_method: Callable[[], Method] = functools.partial(method_from, settings)
        """Makes the method of one call of the pipeline; another one may be put in its place between calls."""
        claims = claims_by_name(loras, settings)
        acting = [(lora, claim) for lora, claim in zip(loras, claims.each) if lora.branches]
        self.inert = tuple(lora.name for lora in loras if not lora.branches)
        self.loras = [lora for lora, claim in acting if not claim.base]
        self.own_claims = [claim for _, claim in acting if not claim.base]
        self.claims: list[Claim] = self.own_claims
        self.everywhere = [lora for lora, claim in acting if claim.base]
        notes = [not_heeded(settings.method, self.claims), *in_words(claims)]
        notes += [f"{name} is no LoRA given here" for name in claims.unused]
        self.notes = tuple(filter(None, notes))
        self.denoiser = getattr(pipe, denoiser_of(pipe))
        layers = layers_of(pipe)
        # The last one, without a branch, makes `Plan.BASE` an index like any other.
        self.isolation = Isolation(layers, [*(lora.branches for lora in self.loras), {}])
        self.base = Isolation(layers, [lora.branches for lora in self.everywhere])
        self.limit = ROWS_OF_A_POOL if any(lora.pooled for lora in self.loras) else None
        self.encode = pipe.encode_prompt
        self.steps: list[Step] = []
        self.calling = False
        self.start()

    def start(self) -> None:
        """Forget what belonged to the pipeline's call before: images may be others, and of another size."""
        self.steps = []
        self.claims, self.unnamed = self.own_claims, ()
        self.method = self.new_method()
        self.texts, self.control = Texts(), Encoded()
        self.given: list[Any] = []
        self.under_way: UnderWay | None = None
        self.isolated = IsolatedCalls(
            self.isolation, self.limit, CudaMemory.of(torch.device(self.pipe._execution_device))
        )

    @contextmanager
    def call_of_pipeline(self, arguments: Mapping[str, Any]) -> Iterator[None]:
        """Around every call of the pipeline, with these arguments."""
        self.start()
        self.given = [arguments[name] for name in GIVEN_TEXTS if arguments.get(name) is not None]
        self.heed(arguments)
        self.calling = True
        try:
            with self.base.merged():
                yield
        finally:
            self.calling = False
        if not self.steps:
            kind, denoiser = type(self.pipe).__name__, denoiser_of(self.pipe)
            raise UnsupportedError(f"LoRAtorio: {kind} never called its {denoiser}, so nothing was composed")

    def acting(self, whom: int) -> AbstractContextManager:
        """While entered, the models hold what ``whom`` says: a LoRA's index, `Plan.BASE` or `Plan.MERGED`."""
        if whom == Plan.MERGED:
            return self.isolation.merged([index for index, lora in enumerate(self.loras) if not lora.pooled])
        return self.isolation.rows([whom])

    def encode_prompt(self, *args: Any, **kwargs: Any) -> tuple:
        """In place of the pipeline's: encodes under none of the LoRAs, each alone, and all; returns the first.

        A pipeline does this at the beginning of a call, for all prompts or for each.
        """
        base = self.encode(*args, **kwargs)
        if not self.calling:
            return base
        encoded = any(name.endswith("prompt_embeds") and kwargs[name] is not None for name in kwargs)
        speaking = self.speaking(encoded)
        under = {}
        for whom in (*speaking, *([Plan.MERGED] if speaking else [])):
            with self.acting(whom):
                under[whom] = self.encode(*args, **kwargs)
        self.texts.add(base, under)
        return base

    def heed(self, given: Mapping[str, Any]) -> None:
        """Let the prompts that the pipeline is ``given`` say whom they name; warns of those they leave out.

        Left to itself ("auto"), it keeps everybody where prompts are not seen.
        """
        unnamed, option = self.settings.unnamed, OPTION["unnamed"]
        if unnamed == option.idle or not option.used_by(self.settings.method):
            return
        prompts = given.get("prompt")
        if prompts is None and unnamed == "auto":
            return
        if prompts is None:
            raise UnsupportedError("LoRAtorio: whom a prompt names is not seen in its embeddings", field="unnamed")
        prompts = [prompts] if isinstance(prompts, str) else prompts
        each = [prompt for prompt in prompts for _ in range(given.get("num_images_per_prompt") or 1)]
        pooled = [lora.pooled for lora in self.loras]
        self.claims = heeding(self.own_claims, pooled, each, unnamed)
        notes = [
            *left_out([lora.name for lora in self.loras], self.claims),
            not_heeded(self.settings.method, self.claims),
        ]
        self.unnamed = tuple(note for note in notes if note is not None and note not in self.notes)
        for note in self.unnamed:
            warnings.warn(f"LoRAtorio: {note}", stacklevel=2)

    def speaking(self, encoded: bool) -> list[int]:
        """The LoRAs that change the bare model's texts; where any LoRA changes texts, they must not be given
        ``encoded`` already."""
        speaking = [index for index, lora in enumerate(self.loras) if lora.speaks_to_text_encoder]
        if encoded and (speaking or any(lora.speaks_to_text_encoder for lora in self.everywhere)):
            raise UnsupportedError("LoRAtorio: LoRAs for the text encoder need the prompt itself, not its embeddings")
        return speaking

    def plan_step(self) -> Plan:
        index = len(self.steps)
        count = getattr(self.pipe, "num_timesteps", None) or len(self.pipe.scheduler.timesteps)
        progress = index / count
        if not self.settings.composes_at(progress):
            return Plan(host=Plan.MERGED)
        members = [lora for lora, claim in enumerate(self.claims) if claim.acts_at(progress)]
        placed = any(self.claims[lora].placed for lora in members)
        return self.method.plan(index, len(self.loras), members, placed)

    def sides(self, call: Call) -> tuple[list[int], list[int]]:
        """The call's conditional rows, which begin a step, and its unconditional ones, which may come in a later call
        of their own."""
        again = self.under_way is not None and self.under_way.is_of(call)
        cond, uncond = self.texts.sides(call, second=again)
        if cond:
            known = not again and len(uncond) in (0, len(cond))
        else:
            known = again and not self.under_way.guided and len(uncond) == len(self.under_way.x)
        if not known:
            raise UnsupportedError(f"LoRAtorio: {type(self.pipe).__name__} guides by more than a negative prompt")
        return cond, uncond

    def new_forward(
        self, denoiser: nn.Module, *args: Any, return_dict: bool = True, **kwargs: Any
    ) -> Transformer2DModelOutput | tuple[Any]:
        """In place of the denoiser's: the plan's evaluations, composed into the rows that the pipeline asked for."""
        call = Call.of(denoiser, args, kwargs)
        if not self.texts.outputs and not self.speaking(encoded=True):
            self.texts.add(self.given, {})  # some pipelines take these without encode_prompt
        cond, uncond = self.sides(call)
        if cond:
            self.under_way = UnderWay(self.plan_step(), call.x[cond], call.timestep)
        step = self.under_way
        step.guided = bool(uncond)
        weights = None
        if step.plan.host == Plan.MERGED:
            with self.acting(Plan.MERGED):
                output = self.evaluate(self.arguments(call, Plan.MERGED))
        else:
            output, weights = self.compose(call, step, cond, uncond)
        if cond:
            self.done(step, weights)
        output = list(output) if call.in_lists else output
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def done(self, step: UnderWay, weights: Tensor | None) -> None:
        """Keep what a step came to, and tell of it."""
        seen = {"everywhere": tuple(lora.name for lora in self.everywhere)}
        if weights is not None:
            eps, eps_base = step.predictions.eps, step.predictions.eps_base
            similarity = 1 - DIVERGENCE[self.settings.patches](eps, eps_base, self.settings.patch_size)
            seen |= {"similarity": similarity.cpu(), "weights": weights.cpu()}
        names = tuple(lora.name for lora in self.loras)
        self.steps.append(Step(len(self.steps), float(step.timestep.flatten()[0]), step.plan, names, **seen))
        if self.on_step is not None:
            self.on_step(self.steps[-1])

    def arguments(self, call: Call, whom: int) -> Mapping[str, Any]:
        """The call's arguments as they are under ``whom``: its texts, and what a ControlNet made of these."""
        return self.control.arguments(replace(call, arguments=self.texts.arguments(call, whom)), whom)

    def evaluate(self, arguments: Mapping[str, Any]) -> Tensor:
        """One call of the real denoiser."""
        return stacked(self.fn_ref.original_forward(**arguments, return_dict=False)[0])

    def compose(self, call: Call, step: UnderWay, cond: list[int], uncond: list[int]) -> tuple[Tensor, Tensor | None]:
        """The call's output in composed rows, and the patch weights of its conditional ones, where there are any.

        Where guidance comes in two calls, a step's predictions are combined in the first without unconditional rows,
        and in the second with them. Channels beyond the latents' (a learned variance) are left as the host's.
        """
        layout = Layout.of(self.denoiser, call)
        x = layout.to_grid(call.x)
        wanted = [row for row in range(call.count) if row in cond or step.plan.uncond]
        output, isolated = self.predict(step.plan, call, wanted)

        def predicted(rows: Tensor) -> Tensor:
            return layout.to_grid(rows)[:, : x.shape[1]]

        def noise(rows: Tensor) -> Tensor:
            return predicted_noise(self.pipe.scheduler, rows, x[cond], call.timestep)

        def of_loras(side: list[int]) -> Tensor:
            return each[:, [wanted.index(row) for row in side]]

        host = predicted(output)
        each = predicted(isolated).unflatten(0, (len(step.plan.isolated), len(wanted)))
        guidance = {}
        if uncond:
            guidance = {"host_uncond": host[uncond], "uncond": of_loras(uncond) if step.plan.uncond else None}
        if cond:
            eps = [noise(rows) for rows in of_loras(cond)]
            image_of_row = tuple(range(len(cond)))
            step.predictions = Predictions(
                host_cond=host[cond],
                cond=of_loras(cond),
                eps_base=noise(host[cond]),
                eps=torch.stack(eps) if eps else of_loras(cond),
                image_of_row=image_of_row,
                gain=noise_gain(self.pipe.scheduler, call.timestep),
                **places_and_shares([self.claims[lora] for lora in step.plan.members], x, image_of_row),
                **{"host_uncond": None, "uncond": None, **guidance},
            )
        composed = self.method.combine(replace(step.predictions, **guidance))
        rows = torch.empty_like(host)
        for side, values in ((cond, composed.cond), (uncond, composed.uncond)):
            if side:
                rows[side] = values
        return layout.into(output, rows), composed.weights if cond else None

    def predict(self, plan: Plan, call: Call, wanted: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The output under the plan's host, ``[R, ...]``, and the ``wanted`` rows of it under each of the isolated
        LoRAs, ``[N * len(wanted), ...]``."""
        groups = [[(plan.host, row) for row in range(call.count)]]
        groups += [[(lora, row) for row in wanted] for lora in plan.isolated]
        arguments = {whom: self.arguments(call, whom) for whom in (plan.host, *plan.isolated)}

        def evaluate(batch: Sequence[Row]) -> Tensor:
            return self.evaluate(call.take([arguments[whom] for whom, _ in batch], [row for _, row in batch]))

        if type(self.denoiser).__name__ in ROWS_APART:
            groups = [list(chain(*groups))]
        outputs = [self.isolated(group, evaluate) for group in groups if group]
        return torch.cat(outputs).tensor_split([call.count])

    @contextmanager
    def installed(self) -> Iterator[None]:
        """While entered, the pipeline composes."""
        encode_prompt = functools.update_wrapper(functools.partial(self.encode_prompt), self.encode)
        controlnet = getattr(self.pipe, "controlnet", None)
        with (
            hooked(self.denoiser, self),
            nullcontext() if controlnet is None else hooked(controlnet, ControlUnderLoRAs(self)),
            replaced(self.pipe, "encode_prompt", encode_prompt),
            calls_inside(self.pipe, self.call_of_pipeline),
        ):
            yield


def claims_by_name(loras: Sequence[LoRA], settings: Settings) -> Claims:
    """The LoRAs' claims by their own parts and the options; several of one name are all meant by it."""
    listed = [Listed(lora.name, str(index), lora.name) for index, lora in enumerate(loras)]
    tagged = [Tagged(each, parts=lora.parts, words=lora.words, pooled=lora.pooled) for each, lora in zip(listed, loras)]
    return claims_of(settings, tagged)


class ControlUnderLoRAs(ModelHook):
    """Lets a ControlNet, which reads the prompt too, read it under each LoRA that changes texts."""

    def __init__(self, composition: Composition):
        super().__init__()
        self.composition = composition

    def new_forward(self, controlnet: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """In place of the ControlNet's: its own output, and beside it those under the LoRAs are kept for this step."""
        base, texts = self.fn_ref.original_forward(*args, **kwargs), self.composition.texts
        call = Call.of(controlnet, args, kwargs)
        others = {whom: self.fn_ref.original_forward(**texts.arguments(call, whom)) for whom in texts.under}
        under = {whom: list(tensors_in(output)) for whom, output in others.items()}
        self.composition.control = Encoded()
        self.composition.control.add(list(tensors_in(base)), under)
        return base


@contextmanager
def calls_inside(pipe: Any, around: Callable[[Mapping[str, Any]], AbstractContextManager]) -> Iterator[None]:
    """While entered, every call of the pipeline runs inside an ``around(arguments)``.

    Python looks for ``__call__`` in the class, so for that long the pipeline is of one made for it, of the same name.
    """
    kind = type(pipe)

    @functools.wraps(kind.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with around(inspect.signature(kind.__call__).bind(self, *args, **kwargs).arguments):
            return kind.__call__(self, *args, **kwargs)

    pipe.__class__ = type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})
    try:
        yield
    finally:
        pipe.__class__ = kind


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """While entered, ``owner.name`` is ``value``, as an attribute of the instance."""
    before = vars(owner).copy()
    setattr(owner, name, value)
    try:
        yield
    finally:
        if name in before:
            setattr(owner, name, before[name])
        else:
            delattr(owner, name)


@contextmanager
def claimed(module: nn.Module, owner: Any) -> Iterator[None]:
    """While entered, nobody else can enter for this module, in no thread: `UnsupportedError` is raised."""
    if vars(module).setdefault(HOOK, owner) is not owner:  # one operation, so that of two threads one comes first
        raise UnsupportedError(
            f"LoRAtorio: this pipeline, or another one with the same {type(module).__name__}, is composing already; "
            "leave that first, or load the pipeline once more"
        )
    try:
        yield
    finally:
        del vars(module)[HOOK]


@contextmanager
def hooked(module: nn.Module, hook: ModelHook) -> Iterator[None]:
    """While entered, ``hook`` is in the module's registry; afterwards a registry of our making is gone as well."""
    own = [name for name in ("forward", "_diffusers_hook") if name not in vars(module)]
    registry = HookRegistry.check_if_exists_or_initialize(module)
    registry.register_hook(hook, HOOK)
    try:
        yield
    finally:
        registry.remove_hook(HOOK, recurse=False)
        if not registry.hooks:
            for name in own:
                delattr(module, name)


def check_supported(pipe: Any) -> None:
    """Raises `UnsupportedError` for pipelines in which LoRAs cannot be isolated."""
    if not hasattr(pipe, "encode_prompt"):
        raise UnsupportedError(f"LoRAtorio: {type(pipe).__name__} is no text-to-image pipeline: it encodes no prompt")
    for name in (denoiser_of(pipe), *text_encoders_of(pipe)):
        model = getattr(pipe, name)
        for part, module in model.named_modules():
            if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
                where = ".".join(filter(None, (name, part)))
                raise UnsupportedError(f"LoRAtorio: LoRAs cannot be isolated in the compiled {where} of this pipeline")
        if getattr(model, "peft_config", None):
            raise UnsupportedError(f"LoRAtorio: the {name} of this pipeline holds LoRAs; call unload_lora_weights()")
        if any(getattr(module, "fused_projections", False) for module in model.modules()):
            raise UnsupportedError(f"LoRAtorio: the {name} has fused projections; call unfuse_qkv_projections()")


@contextmanager
def composed(
    pipe: Any,
    loras: Sequence[LoRA],
    /,  # an option is named loras, too
    settings: Settings | None = None,
    on_step: Callable[[Step], None] | None = None,
    **options: Any,
) -> Iterator[Composition]:
    """While entered, calls of ``pipe`` compose the LoRAs.

    ``options``: the options of `loratorio_ext.settings` by name (and ``preset``), over those of ``settings``. A pool is
    given as LoRAs, too (see ``LoRA.pooled``), not by name. The options ``loras`` and ``everywhere`` mean LoRAs by their
    names or patterns of these. LoRAs that add nothing take no part: ``loras`` of what is yielded are those that
    compete, in order, ``everywhere`` those in every pass, and ``inert`` the others' names. Without LoRAs nothing is
    touched.

    Raises `UnsupportedError` for what cannot be composed, also a pipeline, or a UNet that it shares, that composes
    already, and `SettingsError` for bad options and parts. Of what is otherwise than asked it warns; see ``notes``.
    """
    check_supported(pipe)
    settings = Settings.from_mapping(options, settings)
    if settings.pool:
        message = "LoRAtorio: there are no names to choose a pool from; load its LoRAs and list them, too"
        raise SettingsError(message, field="pool", value=settings.pool)
    for lora in loras:
        check_fit(lora.name, lora.branches, pipe)
    composition = Composition(pipe, loras, settings, on_step)
    for note in composition.notes:
        warnings.warn(f"LoRAtorio: {note}", stacklevel=3)
    if not composition.loras and not composition.everywhere:
        yield composition
        return
    with claimed(composition.denoiser, composition), composition.installed():
        yield composition
