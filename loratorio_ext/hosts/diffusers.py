"""Diffusers pipelines: composition inside a pipeline that otherwise stays diffusers' own.

::

    pipe = load_pipeline("model.safetensors")
    loras = [load_lora(pipe, "knight.safetensors", 0.8), load_lora(pipe, "watercolour.safetensors")]
    with composed(pipe, loras, patch_size=4) as composition:
        image = pipe("a knight in a forest, watercolour", num_inference_steps=30).images[0]

While entered, two calls of the pipeline are answered in its place: ``encode_prompt``, which encodes the prompts under
every LoRA alone too, and the UNet's, which evaluates what the method plans and returns composed rows. Everything else
(schedulers, callbacks, guidance, decoding; image-to-image, inpainting, ControlNet) is the pipeline's, and after leaving
nothing of this remains.

The UNet's call is taken over by a `ModelHook` in diffusers' own `HookRegistry`, so that it stacks with offloading and
the other hooks there. A guider (`BaseGuidance`) would be the natural place to combine predictions, but guiders belong
to modular pipelines, which exist for SDXL only, and one sees neither the model's input nor the scheduler that turn a v
prediction into noise.
"""

import json
import math
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.loaders.single_file_utils import infer_diffusers_model_type, load_single_file_checkpoint
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from diffusers.utils.state_dict_utils import (
    DIFFUSERS_OLD_TO_PEFT,
    DIFFUSERS_TO_PEFT,
    convert_state_dict,
    convert_unet_state_dict_to_peft,
)
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from torch import Tensor, nn

from loratorio_ext.core import Plan, Predictions, method_from, patch_similarity
from loratorio_ext.errors import FileFormatError, SettingsError, UnsupportedError
from loratorio_ext.hosts.diffusers_files import (
    adapter_config,
    check_checkpoint,
    check_folder,
    check_lora,
    existing,
    read_header,
)
from loratorio_ext.isolation import (
    ROWS_OF_A_POOL,
    CudaMemory,
    IsolatedCalls,
    Isolation,
    LowRank,
    Row,
    is_finite,
    is_inert,
)
from loratorio_ext.multipliers import check_multiplier
from loratorio_ext.samplers import parse_sampler
from loratorio_ext.settings import Settings

UNET = "unet"
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
HOOK = "loratorio"


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
    config = dict(pipe.scheduler.config)
    trailing = config.get("timestep_spacing") == "trailing" and not karras  # Karras' goes from first to last
    spacing = {} if trailing else sampler.spacing
    schedule = {"use_karras_sigmas": karras} if sampler.karras else {}
    return getattr(diffusers, sampler.scheduler).from_config(config, **sampler.options, **spacing, **schedule)


def generators(seeds: Iterable[int]) -> list[torch.Generator]:
    """One source of noise an image, on the CPU: an image depends on its own seed alone, on every device."""
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


# --- LoRA files -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoRA:
    """One LoRA at its weights, as branches by layer name (``unet.…``, ``text_encoder.…``, ``text_encoder_2.…``).

    ``pooled``: it belongs to a pool, and takes no part where LoRAs act merged.
    """

    name: str
    branches: Mapping[str, LowRank]
    pooled: bool = False

    @property
    def speaks_to_text_encoder(self) -> bool:
        return any(not name.startswith(f"{UNET}.") for name in self.branches)


def layers_of(pipe: Any) -> dict[str, nn.Module]:
    """The layers that a LoRA may change, by component and name."""
    components = {name: getattr(pipe, name, None) for name in (UNET, *TEXT_ENCODERS)}
    return {
        f"{component}.{name}": layer
        for component, model in components.items()
        if model is not None
        for name, layer in model.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d))
    }


def to_peft_names(component: str, model: nn.Module, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of one component under PEFT's names (``LAYER.lora_A.weight``), by the conversions diffusers loads with.

    Name by name, since training scripts write attention in one layout and what is beyond it in another.
    """
    if component == UNET:
        return convert_unet_state_dict_to_peft(values)
    names = convert_state_dict(values, DIFFUSERS_OLD_TO_PEFT | DIFFUSERS_TO_PEFT)
    if hasattr(model, "text_model"):
        return names
    return {name.removeprefix("text_model."): value for name, value in names.items()}


def default_scale(metadata: Mapping[str, Any], layer: str, rank: int) -> float:
    """A layer's scale by the PEFT configuration that a file may bring along; 1 where there is none."""
    patterns = metadata.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(patterns, layer), metadata.get("lora_alpha", rank))
    return alpha / (math.sqrt(rank) if metadata.get("use_rslora") else rank)


def component_branches(
    component: str, model: nn.Module, values: Mapping[str, Any], metadata: Mapping[str, Any], weight: float
) -> dict[str, LowRank]:
    """The branches of one component from its matrices and alphas, named alike; `KeyError` for what is neither."""
    matrices: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    for name, value in to_peft_names(component, model, values).items():
        layer, _, part = name.partition(".lora_")
        if name.endswith(".alpha"):
            alphas[layer.removesuffix(".alpha")] = float(value)
        elif part in ("A.weight", "B.weight"):
            matrices.setdefault(layer, {})[part] = value
        else:
            raise KeyError(f"{component}.{name}")
    branches = {}
    for layer, pair in matrices.items():
        if len(pair) < 2:
            raise KeyError(f"{component}.{layer}.lora_{next(iter(pair))} alone")
        down, up = pair["A.weight"], pair["B.weight"]
        if min(down.ndim, up.ndim) < 2:
            raise ValueError(f"{component}.{layer}: down {tuple(down.shape)}, up {tuple(up.shape)}")
        rank = len(down)
        scale = alphas[layer] / rank if layer in alphas else default_scale(metadata, layer, rank)
        branches[f"{component}.{layer}"] = LowRank(down, up, scale * weight)
    return branches


def misfit(branch: LowRank, layer: nn.Module | None) -> str | None:
    """Why a branch cannot belong to a layer, in words and shapes, or None where it can."""
    down, up = tuple(branch.down.shape), tuple(branch.up.shape)
    if layer is None:
        return f"no such layer (LoRA: down {down}, up {up})"
    fan_out, *kernel = tuple(layer.weight.shape)
    if isinstance(layer, nn.Linear):  # a quantised weight has another shape
        fan_out, kernel = layer.out_features, [layer.in_features]
    narrows = list(down[1:]) == kernel or (down[1] == math.prod(kernel) and set(down[2:]) <= {1})
    widens = up[:2] == (fan_out, down[0]) and set(up[2:]) <= {1}
    if not narrows or not widens:
        return f"LoRA down {down}, up {up}; layer {tuple(layer.weight.shape)}"
    return None


def check_fit(name: str, branches: Mapping[str, LowRank], pipe: Any) -> None:
    """Raises `UnsupportedError` unless every branch belongs to a layer of the pipeline's models."""
    layers = layers_of(pipe)
    misfits = {layer: why for layer, branch in branches.items() if (why := misfit(branch, layers.get(layer)))}
    if misfits:
        examples = "; ".join(f"{layer}: {why}" for layer, why in list(misfits.items())[:3])
        raise UnsupportedError(
            f"LoRAtorio: {name} was made for another architecture than this {type(pipe).__name__}: "
            f"{len(misfits)} of its {len(branches)} layers do not fit ({examples}{'; …' if len(misfits) > 3 else ''})"
        )


def load_lora(
    pipe: Any, path: str | Path, te_weight: float = 1.0, unet_weight: float | None = None, name: str | None = None
) -> LoRA:
    """A LoRA file (kohya, diffusers or PEFT layout) at its multipliers; ``unet_weight`` None: the text encoders' too.

    Layers to which it adds nothing are left out. Raises `FileError` for what is no safetensors file, is no LoRA or
    holds NaN or infinity, `UnsupportedError` for kinds that are no plain LoRA and for LoRAs of another architecture,
    and `SettingsError` for multipliers that are no numbers in range.
    """
    path = Path(path)
    name = name or path.stem
    unet_weight = te_weight if unet_weight is None else unet_weight
    weights = {component: check_multiplier(te_weight, name, "te_weight") for component in TEXT_ENCODERS}
    weights[UNET] = check_multiplier(unet_weight, name, "unet_weight")
    header = read_header(path)
    check_lora(header)
    dora = [key for key in header.shapes if "dora_scale" in key or "lora_magnitude_vector" in key]
    if dora:
        raise UnsupportedError(f"LoRAtorio: {name} is a DoRA (key {dora[0]}), which cannot be isolated here")
    peft = adapter_config(header)
    branches: dict[str, LowRank] = {}
    try:
        matrices, alphas = pipe.lora_state_dict(load_file(path), unet_config=pipe.unet.config)
        values = {**matrices, **(alphas or {})}
        for component, weight in weights.items():
            mine = without_prefix(values, component)
            if mine:
                model = getattr(pipe, component, None)
                branches |= component_branches(component, model, mine, without_prefix(peft, component), weight)
        unknown = [key for key in values if key.partition(".")[0] not in weights]
        if unknown:
            raise KeyError(unknown[0])
    except Exception as error:  # whatever diffusers stumbles over in names that are not what it expects
        what = textwrap.shorten(str(error.args[0] if error.args else error), 300, placeholder=" …")
        raise UnsupportedError(f"LoRAtorio: {name} holds what is no LoRA that diffusers can read: {what}") from error
    check_fit(name, branches, pipe)
    for layer, branch in branches.items():
        if not is_finite(branch):
            raise header.refused(f"is damaged: what it holds for {layer} is not finite (NaN or infinity)")
    return LoRA(name, {layer: branch for layer, branch in branches.items() if not is_inert(branch)})


def without_prefix(values: Mapping[str, Any], component: str) -> dict[str, Any]:
    """The entries of one component, by their names inside it."""
    prefix = f"{component}."
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


# --- one call of the UNet ---------------------------------------------------------------------------------------------


def unet_text(encoded: Sequence[Tensor | None]) -> dict[str, Tensor]:
    """What ``encode_prompt`` returned, as the UNet is given it: negative rows first, where there are any.

    ``encoded``: embeddings ``[R, L, D]`` and negative ones; of SDXL also the pooled ``[R, D']`` and negative pooled.
    """
    pairs = zip(("encoder_hidden_states", "text_embeds"), encoded[0::2], encoded[1::2])
    return {name: cond if uncond is None else torch.cat([uncond, cond]) for name, cond, uncond in pairs}


def with_text(arguments: Mapping[str, Any], text: Mapping[str, Tensor]) -> dict[str, Any]:
    """The UNet's arguments with these encodings of the prompts in place of those it was given."""
    given = {**arguments, "encoder_hidden_states": text["encoder_hidden_states"]}
    if "text_embeds" in text:
        given["added_cond_kwargs"] = {**arguments["added_cond_kwargs"], "text_embeds": text["text_embeds"]}
    return given


def take_rows(value: Any, rows: list[int], count: int) -> Any:
    """These rows of every tensor that has ``count`` rows, however deep in containers."""
    if isinstance(value, Tensor):
        return value[rows] if value.ndim > 0 and len(value) == count else value
    if isinstance(value, Mapping):
        return {name: take_rows(each, rows, count) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(take_rows(each, rows, count) for each in value)
    return value


def signal_share(scheduler: Any, timestep: Tensor) -> Tensor:
    """The squared share of the image in the UNet's input (DDPM's alpha-bar) in the call under way.

    Schedulers that keep sigmas know the noise of this very call, which may lie between two timesteps of training.
    """
    if hasattr(scheduler, "sigmas") and hasattr(scheduler, "index_for_timestep"):
        index = scheduler.step_index
        sigma = scheduler.sigmas[scheduler.index_for_timestep(timestep) if index is None else index]
        return 1 / (1 + sigma**2)
    return scheduler.alphas_cumprod[torch.as_tensor(timestep).cpu().long()]


def predicted_noise(scheduler: Any, output: Tensor, x: Tensor, timestep: Tensor) -> Tensor:
    """The noise that the UNet's ``output [R, C, H, W]`` for its input ``x`` means.

    Whatever the scheduler's own scale, it has brought ``x`` to ``sqrt(a) * image + sqrt(1 - a) * noise`` before.
    """
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return output
    share = signal_share(scheduler, timestep).to(output.device, torch.float32)
    x, output = x[:, : output.shape[1]].float(), output.float()  # an inpainting model's input has more channels
    if kind == "v_prediction":
        return share.sqrt() * output + (1 - share).sqrt() * x
    if kind == "sample":
        return (x - share.sqrt() * output) / (1 - share).sqrt()
    raise UnsupportedError(f"LoRAtorio: models that predict {kind!r} are not supported")


def noise_gain(scheduler: Any, timestep: Tensor) -> float:
    """How the UNet's output moves with the noise it means; see `predicted_noise`."""
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return 1.0
    share = float(signal_share(scheduler, timestep).flatten()[0].clamp(min=1e-8))  # 0 at zero terminal SNR
    return share**-0.5 if kind == "v_prediction" else -(((1 - share) / share) ** 0.5)


# --- composition ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """What one call of the UNet came to, on the CPU.

    ``plan``: the evaluations it took. ``similarity [M, R, h, w]`` of the M LoRAs that were evaluated, and ``weights
    [N, R, h, w]`` of all, patch by patch, where the method has them.
    """

    index: int
    timestep: float
    plan: Plan
    similarity: Tensor | None = None
    weights: Tensor | None = None


class Composition(ModelHook):
    """LoRAs at work in a pipeline, and what was seen of them: ``steps``, of the pipeline's latest call.

    ``on_step`` is told of every step as it is done.
    """

    def __init__(
        self, pipe: Any, loras: Sequence[LoRA], settings: Settings, on_step: Callable[[Step], None] | None = None
    ):
        super().__init__()
        self.pipe, self.loras, self.settings, self.on_step = pipe, loras, settings, on_step
        self.inert: tuple[str, ...] = ()
        self.method = method_from(settings)
        # The last one, without a branch, makes `Plan.BASE` an index like any other.
        self.isolation = Isolation(layers_of(pipe), [*(lora.branches for lora in loras), {}])
        self.limit = ROWS_OF_A_POOL if any(lora.pooled for lora in loras) else None
        self.isolated = self.isolated_calls()
        self.encode = pipe.encode_prompt
        self.texts: dict[int, dict[str, Tensor]] = {}
        self.guided = False
        self.steps: list[Step] = []

    def isolated_calls(self) -> IsolatedCalls:
        """Model calls for images of one size: how many rows a call may hold is found at the first."""
        return IsolatedCalls(self.isolation, self.limit, CudaMemory.of(torch.device(self.pipe._execution_device)))

    def acting(self, whom: int) -> AbstractContextManager:
        """While entered, the models hold what ``whom`` says: a LoRA's index, `Plan.BASE` or `Plan.MERGED`."""
        if whom == Plan.MERGED:
            return self.isolation.merged([index for index, lora in enumerate(self.loras) if not lora.pooled])
        return self.isolation.rows([whom])

    def encode_prompt(self, *args: Any, **kwargs: Any) -> tuple:
        """In place of the pipeline's: encodes under none of the LoRAs, each alone, and all; returns the first.

        A pipeline does this once, at the beginning of a call.
        """
        base = self.encode(*args, **kwargs)
        self.steps = []
        self.isolated = self.isolated_calls()  # images may be of another size than before
        self.guided = base[1] is not None
        self.texts = dict.fromkeys((Plan.BASE, Plan.MERGED, *range(len(self.loras))), unet_text(base))
        speaking = [index for index, lora in enumerate(self.loras) if lora.speaks_to_text_encoder]
        if speaking and any(name.endswith("prompt_embeds") and kwargs[name] is not None for name in kwargs):
            raise UnsupportedError("LoRAtorio: LoRAs for the text encoder need the prompt itself, not its embeddings")
        for whom in (*speaking, *([Plan.MERGED] if speaking else [])):
            with self.acting(whom):
                self.texts[whom] = unet_text(self.encode(*args, **kwargs))
        return base

    def plan_step(self) -> Plan:
        index = len(self.steps)
        inside = self.settings.composes_at(index / self.pipe.num_timesteps)
        return self.method.plan(index, len(self.loras)) if inside else Plan(host=Plan.MERGED)

    def new_forward(
        self,
        unet: nn.Module,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        return_dict: bool = True,
        **others: Any,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """In place of the UNet's: the plan's evaluations, composed into the rows that the pipeline asked for."""
        arguments = {**others, "sample": sample, "timestep": timestep, "encoder_hidden_states": encoder_hidden_states}
        plan = self.plan_step()
        if len(sample) != len(self.texts[Plan.BASE]["encoder_hidden_states"]):
            raise UnsupportedError(f"LoRAtorio: {type(self.pipe).__name__} guides by more than a negative prompt")
        step = Step(len(self.steps), float(torch.as_tensor(timestep).flatten()[0]), plan)
        if plan.host == Plan.MERGED:
            with self.acting(plan.host):
                output = self.evaluate(with_text(arguments, self.texts[plan.host]))
        else:
            output, step = self.compose(plan, arguments, step)
        self.steps.append(step)
        if self.on_step is not None:
            self.on_step(step)
        return UNet2DConditionOutput(sample=output) if return_dict else (output,)

    def evaluate(self, arguments: Mapping[str, Any]) -> Tensor:
        """One call of the real UNet."""
        return self.fn_ref.original_forward(**arguments, return_dict=False)[0]

    def compose(self, plan: Plan, arguments: Mapping[str, Any], step: Step) -> tuple[Tensor, Step]:
        """The composed rows, unconditional ones first, and the step with what was seen."""
        x, timestep = arguments["sample"], arguments["timestep"]
        unconds = len(x) // 2 if self.guided else 0
        output, cond, uncond = self.predict(plan, arguments, unconds)

        def noise(rows: Tensor) -> Tensor:
            return predicted_noise(self.pipe.scheduler, rows, x[unconds:], timestep)

        predictions = Predictions(
            host_cond=output[unconds:],
            host_uncond=output[:unconds] if unconds else None,
            cond=cond,
            uncond=uncond,
            eps_base=noise(output[unconds:]),
            eps=torch.stack([noise(rows) for rows in cond]) if len(cond) else cond,
            image_of_row=tuple(range(len(output) - unconds)),
            gain=noise_gain(self.pipe.scheduler, timestep),
        )
        composed = self.method.combine(predictions)
        if composed.weights is not None:
            similarity = patch_similarity(predictions.eps, predictions.eps_base, self.settings.patch_size)
            step = Step(step.index, step.timestep, plan, similarity.cpu(), composed.weights.cpu())
        rows = composed.cond if composed.uncond is None else torch.cat([composed.uncond, composed.cond])
        return rows, step

    def predict(self, plan: Plan, arguments: Mapping[str, Any], unconds: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """The plan's host ``[unconds + R, C, H, W]``, its isolated LoRAs ``[N, R, C, H, W]``, and where asked for their
        unconditional rows ``[N, unconds, C, H, W]``."""
        count, first = len(arguments["sample"]), 0 if plan.uncond else unconds
        rows = [(plan.host, row) for row in range(count)]
        rows += [(lora, row) for lora in plan.isolated for row in range(first, count)]

        def call(batch: Sequence[Row]) -> Tensor:
            text = {
                name: torch.stack([self.texts[lora][name][row] for lora, row in batch])
                for name in self.texts[plan.host]
            }
            return self.evaluate(with_text(take_rows(arguments, [row for _, row in batch], count), text))

        output, isolated = self.isolated(rows, call).split([count, len(rows) - count])
        isolated = isolated.unflatten(0, (len(plan.isolated), count - first))
        cond, uncond = isolated[:, unconds - first :], isolated[:, : unconds - first]
        return output, cond, uncond if plan.uncond and unconds else None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """While entered, the pipeline composes."""
        with hooked(self.pipe.unet, self), replaced(self.pipe, "encode_prompt", self.encode_prompt):
            yield


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
            "LoRAtorio: this pipeline, or another one with the same UNet, composes already; leave that first, or load "
            "the pipeline once more"
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
    kind = type(pipe).__name__
    unet = getattr(pipe, UNET, None)
    if unet is None or not hasattr(pipe, "encode_prompt"):
        raise UnsupportedError(f"LoRAtorio: {kind} is no Stable Diffusion pipeline with a UNet")
    for name in (UNET, *TEXT_ENCODERS):
        model = getattr(pipe, name, None)
        if model is None:
            continue
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
    settings: Settings | None = None,
    on_step: Callable[[Step], None] | None = None,
    **options: Any,
) -> Iterator[Composition]:
    """While entered, calls of ``pipe`` compose the LoRAs.

    ``options``: the options of `loratorio_ext.settings` by name (and ``preset``), over those of ``settings``. A pool is
    given as LoRAs, too (see ``LoRA.pooled``), not by name. LoRAs that add nothing take no part: ``loras`` of what is
    yielded are those that do, in order, and ``inert`` the others' names. Without LoRAs nothing is touched.

    Raises `UnsupportedError` for what cannot be composed, also a pipeline, or a UNet that it shares, that composes
    already.
    """
    check_supported(pipe)
    settings = Settings.from_mapping(options, settings)
    if settings.pool:
        message = "LoRAtorio: there are no names to choose a pool from; load its LoRAs and list them, too"
        raise SettingsError(message, field="pool", value=settings.pool)
    for name in ("loras", "everywhere"):
        if getattr(settings, name):
            message = f"LoRAtorio: the option {name} does nothing in diffusers pipelines yet"
            raise UnsupportedError(message, field=name, value=getattr(settings, name), allowed="nothing")
    for lora in loras:
        check_fit(lora.name, lora.branches, pipe)
    composition = Composition(pipe, [lora for lora in loras if lora.branches], settings, on_step)
    composition.inert = tuple(lora.name for lora in loras if not lora.branches)
    if not composition.loras:
        yield composition
        return
    with claimed(pipe.unet, composition), composition.installed():
        yield composition
