"""AUTOMATIC1111's WebUI 1.10: the host's own UNet pass, and the isolated rows in the same batch.

Between the two callbacks of a step (``on_cfg_denoiser`` before the UNet, ``on_cfg_denoised`` after it) the host's list
of LoRAs is empty, and calls of its denoiser are answered here: rows without a LoRA are the base model's. Outside of
that the host always sees its own list.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any

import torch
from modules import devices, prompt_parser, script_callbacks, sd_unet, shared
from modules.sd_hijack import model_hijack
from modules.sd_samplers_cfg_denoiser import catenate_conds, subscript_cond
from torch import Tensor, nn

from loratorio_ext.core import ComposedStep, Plan, Predictions, method_from
from loratorio_ext.errors import UnsupportedError
from loratorio_ext.generation import Generation
from loratorio_ext.hosts.webui import (
    encode,
    leave_out,
    lora_extension,
    plan_step,
    pool_of,
    prompts_of_pass,
    tell_of_loras,
    tell_of_none,
)
from loratorio_ext.isolation import (
    ROWS_OF_A_POOL,
    Branch,
    CudaMemory,
    Delta,
    IsolatedCalls,
    Isolation,
    LowRank,
    Row,
    in_main_memory,
)

logger = logging.getLogger("loratorio")


# --- the host's LoRAs -------------------------------------------------------------------------------------------------


@contextmanager
def only(networks: ModuleType, active: Sequence[Any]) -> Iterator[None]:
    """While entered, the host's text encoders and UNet see just the LoRAs ``active``."""
    before = list(networks.loaded_networks)
    networks.loaded_networks[:] = active
    try:
        yield
    finally:
        networks.loaded_networks[:] = before


@contextmanager
def embeddings_of(active: Sequence[Any], others: Sequence[Any]) -> Iterator[None]:
    """While entered, the prompt parser knows the embeddings that the files of ``active`` bring along, and none of those
    of ``others``.

    The host has made those of its own list known (``loaded``); those of a pool's LoRAs it has never heard of.
    """
    database, model = model_hijack.embedding_db, shared.sd_model
    known = [(name, each) for lora in others for name, each in lora.bundle_embeddings.items() if each.loaded]
    unheard = [(name, each) for lora in active for name, each in lora.bundle_embeddings.items() if each.loaded is None]
    added = []
    try:
        for name, _ in known:
            database.register_embedding_by_name(None, model, name)
        for name, embedding in unheard:
            fits = database.expected_shape in (-1, embedding.shape)
            if fits and name not in database.word_embeddings:
                database.register_embedding_by_name(embedding, model, name)
                added.append(name)
        yield
    finally:
        for name in added:
            database.register_embedding_by_name(None, model, name)
        for name, embedding in known:
            database.register_embedding_by_name(embedding, model, name)


def is_text_encoder(module: Any) -> bool:
    """Whether a LoRA's module sits in a text encoder, by the rule of the host's Lora extension."""
    return "transformer" in module.sd_key[:20]


def speaks_to_text_encoder(lora: Any) -> bool:
    """Whether a LoRA changes what the text encoders say at all."""
    return bool(lora.bundle_embeddings) or (
        lora.te_multiplier != 0 and any(map(is_text_encoder, lora.modules.values()))
    )


def low_rank(module: Any, layer: nn.Module) -> LowRank | None:
    """The branch of a LoRA or LoCon module, or None where its matrices do not have the layer's shape."""
    if getattr(module, "down_model", None) is None or module.dora_scale is not None or module.bias is not None:
        return None
    up, down = module.up_model.weight, module.down_model.weight
    mid = module.mid_model.weight if module.mid_model is not None else None
    dyn = module.network.dyn_dim
    if mid is None and dyn:
        up, down = up[:, :dyn], down[:dyn]
    shape = (up.shape[0], down.shape[1], *(down if mid is None else mid).shape[2:])
    if isinstance(layer, nn.Conv2d) and layer.weight.shape[1] == 9 and shape[1] == 4:
        # The first convolution of an inpainting model: the mask's and the masked image's channels are left alone.
        down = nn.functional.pad(down, (0, 0, 0, 0, 0, 5))
        shape = (shape[0], 9, *shape[2:])
    if shape != tuple(layer.weight.shape):
        return None
    return LowRank(down, up, module.calc_scale() * module.multiplier(), mid)


def full_delta(networks: ModuleType, module: Any, layer: nn.Module) -> Delta:
    """What the host itself would add to the layer's weight and bias; raises RuntimeError where it would fail, too."""
    networks.network_apply_weights(layer)  # with no LoRA listed: brings back the layer's own weight
    weight = layer.weight if getattr(layer, "fp16_weight", None) is None else layer.fp16_weight
    updown, bias = module.calc_updown(weight.to(layer.weight.device))
    if weight.ndim == 4 and weight.shape[1] == 9:
        updown = nn.functional.pad(updown, (0, 0, 0, 0, 0, 5))
    return Delta(updown.to(weight.dtype).expand(weight.shape), bias)


def unet_branches(networks: ModuleType, network: Any, layers: dict[str, nn.Module]) -> tuple[dict[str, Branch], list]:
    """A LoRA's branches for the UNet by layer name, and the layers that it does not fit."""
    branches, misfits = {}, []
    for name, module in network.modules.items():
        if is_text_encoder(module) or name not in layers:
            continue
        try:
            branches[name] = low_rank(module, layers[name]) or full_delta(networks, module, layers[name])
        except RuntimeError as error:
            misfits.append(name)
            logger.warning("%s does not fit layer %s: %s", network.name, name, error)
    return branches, misfits


@contextmanager
def bare(networks: ModuleType) -> Iterator[None]:
    """While entered, the model's weights are its own as soon as the host looks at them."""
    with only(networks, []):
        if shared.opts.lora_functional:  # there the host leaves weights merged earlier as they are
            for layer in shared.sd_model.model.modules():
                networks.network_apply_weights(layer)
        yield


def branches_of(generation: Generation, networks: ModuleType, lora: Any) -> tuple[dict[str, Branch], list]:
    """As `unet_branches` for the model that is loaded now, made once in a generation; to be called while `bare`."""

    def made() -> tuple[dict[str, Branch], list]:
        fitting, misfits = unet_branches(networks, lora, shared.sd_model.network_layer_mapping)
        if generation.settings.pool:
            fitting = {name: in_main_memory(branch) for name, branch in fitting.items()}
        return fitting, misfits

    return generation.once(("branches", loaded_model(), lora, lora.unet_multiplier, lora.dyn_dim), made)


def load_pool(generation: Generation, networks: ModuleType, active: Sequence[Any]) -> list[Any]:
    """The pool's LoRAs beside the ``active`` ones, loaded by the host's own code and unknown to the host.

    What cannot be read, and what was made for another model, is left out and named.
    """
    taken, loaded = [lora.network_on_disk.filename for lora in active], []
    for member in pool_of(generation, taken):
        name = member.lora.name
        entry = networks.available_networks[name]
        load = partial(networks.load_network, name, entry)
        try:
            network = generation.once(("pool", entry, loaded_model()), load)
        except Exception as error:  # whatever a file may hold
            logger.warning("%s cannot be read: %s", member.lora.file, error, exc_info=True)
            leave_out(generation, name, f"its file cannot be read ({type(error).__name__})")
            continue
        network.te_multiplier, network.unet_multiplier, network.dyn_dim = member.text, member.unet, None
        with bare(networks):
            _, misfits = branches_of(generation, networks, network)
        if misfits:
            leave_out(generation, name, f"made for another model, {len(misfits)} layers have other shapes")
        elif not network.modules and not network.bundle_embeddings:
            leave_out(generation, name, "made for another model, it has none of this one's layers")
        else:
            loaded.append(network)
    return loaded


# --- conditionings ----------------------------------------------------------------------------------------------------


def pad_to_each_other(denoiser: Any, cond: Any, uncond: Any) -> tuple[Any, Any]:
    """Conditionings of equal token length where the user has chosen one of the host's ways of padding."""
    if cond.shape[1] != uncond.shape[1]:
        if shared.opts.pad_cond_uncond_v0:
            return denoiser.pad_cond_uncond_v0(cond, uncond)
        if shared.opts.pad_cond_uncond:
            return denoiser.pad_cond_uncond(cond, uncond)
    return cond, uncond


# --- one call of the host's denoiser ----------------------------------------------------------------------------------


def noise_scaling(inner_model: nn.Module, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """How a denoiser's output for ``x [R, C, H, W]`` reads as noise: ``kept`` and ``gain [R, 1, 1, 1]`` of
    ``output = kept + gain * eps``.

    Timestep samplers hand out noise; k-diffusion's denoisers (eps and v alike) hand out x0, LCM's a blend of x0 and x.
    """
    gain = -sigma.view(-1, 1, 1, 1)
    if not hasattr(inner_model, "sigmas"):
        return torch.zeros_like(x), torch.ones_like(gain)
    if hasattr(inner_model, "get_scaled_out"):
        unit, zero = torch.ones_like(gain), torch.zeros_like(gain)
        return inner_model.get_scaled_out(sigma, x, x), gain * inner_model.get_scaled_out(sigma, unit, zero)
    return x, gain


@dataclass
class HostPass:
    """One step as the host hands it to its denoiser, in one call or several: conditional rows, then unconditional ones.

    ``conds_list``: the host's rows of each image, with weights; ``texts``: this step's conditionings, positive and
    negative, for each of those whom the plan asks. ``predicted``: what the denoiser said, by LoRA and row.
    """

    plan: Plan
    conds_list: list
    texts: dict[int, tuple[Any, Any]]
    x: list[Tensor] = field(default_factory=list)
    sigma: list[Tensor] = field(default_factory=list)
    predicted: dict[Row, Tensor] = field(default_factory=dict)

    @property
    def image_of_row(self) -> tuple[int, ...]:
        """The image that each conditional row belongs to."""
        return tuple(image for image, rows in enumerate(self.conds_list) for _ in rows)

    @property
    def conds(self) -> int:
        return sum(map(len, self.conds_list))

    def wanted(self, rows: Sequence[int]) -> list[Row]:
        """What the plan asks of these rows beside the host's own predictions: each LoRA's."""
        alone = [row for row in rows if self.plan.uncond or row < self.conds]
        return [(lora, row) for lora in self.plan.isolated for row in alone]

    def text_of(self, asked: Row) -> Any:
        """The conditioning of one row, as who is to predict it reads the prompt: ``[1, tokens, C]``."""
        lora, row = asked
        cond, uncond = self.texts[lora]
        text, row = (cond, row) if row < self.conds else (uncond, row - self.conds)
        return subscript_cond(text, row, row + 1)

    def of(self, lora: int, first: int, last: int) -> Tensor:
        """The predictions of rows ``first`` to ``last``: ``[last - first, C, H, W]``."""
        return torch.stack([self.predicted[lora, row] for row in range(first, last)])


@contextmanager
def answered(model: nn.Module, answer: Callable[..., Tensor]) -> Iterator[None]:
    """While entered, calls of ``model`` are answered by ``answer``, which is given the model's own ``forward``, too."""
    own = vars(model).get("forward")
    model.forward = partial(answer, model.forward)
    try:
        yield
    finally:
        if own is None:
            del model.forward
        else:
            model.forward = own


def text_at_step(text: tuple[Any, Any], step: int) -> tuple[list, Any, Any]:
    """The rows of each image (``conds_list``), and the conditionings of a step, positive and negative."""
    conds_list, cond = prompt_parser.reconstruct_multicond_batch(text[0], step)
    return conds_list, cond, prompt_parser.reconstruct_cond_batch(text[1], step)


def text_and_others(cond: dict[str, Any], like: Any) -> tuple[Any, dict[str, Tensor]]:
    """The conditions of a call of the host's denoiser: the text, in the form of ``like``, and what is not the text's
    (image conditioning, unCLIP's) by name, ``[rows, ...]`` each."""
    of_the_text = like if isinstance(like, dict) else ("c_crossattn",)
    values = {name: value[0] if isinstance(value, list) else value for name, value in cond.items()}
    text = {name: values.pop(name) for name in of_the_text}
    return (text if isinstance(like, dict) else text["c_crossattn"]), values


def as_condition(text: Any, besides: dict[str, Tensor]) -> dict[str, Any]:
    """The host's dict of conditions for its denoiser."""
    conditions = {name: value if name == "c_adm" else [value] for name, value in besides.items()}
    return {**text, **conditions} if isinstance(text, dict) else {"c_crossattn": [text], **conditions}


class A1111Sampling:
    """Composition in one sampling pass."""

    def __init__(self, generation: Generation, networks: ModuleType, loras: list[Any]):
        self.generation, self.p, self.networks, self.loras = generation, generation.p, networks, loras
        self.settings = generation.settings
        self.method = method_from(self.settings)
        self.step = ExitStack()
        self.plan = Plan(host=Plan.MERGED)
        self.prepare()
        script_callbacks.on_cfg_denoiser(self.before_unet)
        script_callbacks.on_cfg_denoised(self.after_unet)

    def close(self) -> None:
        self.step.close()
        script_callbacks.remove_callbacks_for_function(self.before_unet)
        script_callbacks.remove_callbacks_for_function(self.after_unet)

    def prepare(self) -> None:
        """Conditionings and branches for the model that is loaded now, made once for all batches that share them."""
        check_supported()
        self.model = loaded_model()
        multipliers = tuple((lora, lora.unet_multiplier, lora.te_multiplier, lora.dyn_dim) for lora in self.loras)
        isolation = self.generation.once((self.model, multipliers), self.isolate)
        second_pass, *_ = prompts = prompts_of_pass(self.p)
        key = (self.model, multipliers, second_pass)  # images of another size: another number of rows fits
        self.isolated = self.generation.once(key, lambda: self.calls(isolation))
        self.texts = self.generation.once((self.model, multipliers, prompts), self.encode_all)

    def isolate(self) -> Isolation:
        """The LoRAs' branches on the UNet's layers."""
        branches = []
        with bare(self.networks):
            for lora in self.loras:
                fitting, misfits = branches_of(self.generation, self.networks, lora)
                branches.append(fitting)
                if misfits:
                    self.generation.note(f"{lora.name} does not fit {len(misfits)} layers of this model")
        # The last one, without a branch, makes `Plan.BASE` an index like any other.
        return Isolation(shared.sd_model.network_layer_mapping, [*branches, {}])

    def calls(self, isolation: Isolation) -> IsolatedCalls:
        """Model calls for one pass, as large as the host's options and the device's memory allow."""
        limits = [] if shared.opts.batch_cond_uncond else [self.p.batch_size]
        limits += [ROWS_OF_A_POOL] if self.settings.pool else []
        return IsolatedCalls(isolation, min(limits, default=None), CudaMemory.of(devices.device))

    def encode_all(self) -> list[Any]:
        """The prompts' schedules of conditionings: each LoRA's, and last (`Plan.BASE`) the bare model's."""
        base = self.encode([])
        return [*(self.encode([lora]) if speaks_to_text_encoder(lora) else base for lora in self.loras), base]

    def encode(self, active: Sequence[Any]) -> tuple[Any, Any]:
        """Schedules of conditionings, positive and negative, with just the LoRAs ``active``."""
        others = [lora for lora in self.loras if lora not in active]
        with only(self.networks, active), embeddings_of(active, others):
            return encode(self.p)

    def before_unet(self, params: script_callbacks.CFGDenoiserParams) -> None:
        """``on_cfg_denoiser``: make the host's pass the one that the plan asks for, isolated rows running with it."""
        denoiser = params.denoiser
        self.step.close()
        if denoiser.p is not self.p or self.generation.error is not None:
            return
        with self.generation.guarded():
            if self.model != loaded_model():
                self.prepare()
            self.denoiser = denoiser
            self.plan = plan_step(self.generation, self.method, denoiser, len(self.loras))
            if self.plan.host == Plan.MERGED:
                return
            whom = dict.fromkeys((self.plan.host, *self.plan.isolated))
            at_step = {lora: text_at_step(self.texts[lora], denoiser.step) for lora in whom}
            conds_list, params.text_cond, params.text_uncond = at_step[self.plan.host]
            texts = {lora: pad_to_each_other(denoiser, *text) for lora, (_, *text) in at_step.items()}
            self.host_pass = HostPass(self.plan, conds_list, texts)
            self.step.enter_context(only(self.networks, []))
            self.step.enter_context(answered(denoiser.inner_model, self.answer))

    def answer(self, denoise: Callable[..., Tensor], x: Tensor, sigma: Tensor, cond: dict[str, Any]) -> Tensor:
        """In place of a call of the host's denoiser: its rows, and beside them the isolated LoRAs'."""
        try:
            return self.evaluate(denoise, x, sigma, cond)
        except Exception as error:
            self.generation.fail(error)
            raise self.generation.error from error

    def evaluate(self, denoise: Callable[..., Tensor], x: Tensor, sigma: Tensor, cond: dict[str, Any]) -> Tensor:
        """The predictions for rows ``x [R, C, H, W]``, the next ones of this step; those of isolated LoRAs are kept."""
        host_pass, first = self.host_pass, sum(map(len, self.host_pass.x))
        host_pass.x.append(x)
        host_pass.sigma.append(sigma)
        rows = range(first, first + len(x))
        # The host's own rows keep the text it gives them: another extension may have changed it.
        given, besides = text_and_others(cond, like=host_pass.texts[self.plan.host][0])
        texts = {(self.plan.host, row): subscript_cond(given, row - first, row - first + 1) for row in rows}
        texts |= {asked: host_pass.text_of(asked) for asked in host_pass.wanted(rows)}

        def call(batch: Sequence[Row]) -> Tensor:
            here = [row - first for _, row in batch]
            text = catenate_conds([texts[asked] for asked in batch])
            others = {name: value[here] for name, value in besides.items()}
            return denoise(x[here], sigma[here], cond=as_condition(text, others))

        # A word that one LoRA's file brings along can make the prompt longer for it than for the others; and without
        # padding the negative prompt may be of another length.
        for length in dict.fromkeys(map(token_count, texts.values())):
            batch = [asked for asked, text in texts.items() if token_count(text) == length]
            host_pass.predicted.update(zip(batch, self.isolated(batch, call)))
        return host_pass.of(self.plan.host, first, rows.stop)

    def after_unet(self, params: script_callbacks.CFGDenoisedParams) -> None:
        """``on_cfg_denoised``: put the composed rows in the place of the host's."""
        self.step.close()
        if self.generation.error is not None or self.plan.host == Plan.MERGED:
            return
        if self.denoiser.inner_model is not params.inner_model:
            return
        with self.generation.guarded():
            predictions = self.predictions(params.x)
            composed = self.method.combine(predictions)
            names = [lora.name for lora in self.loras]
            self.generation.record(names, composed.weights, predictions.image_of_row)
            write_rows(params.x, composed, self.host_pass.conds_list)

    def predictions(self, output: Tensor) -> Predictions:
        """All predictions of this step; ``output`` is the host's own pass, conditional rows before unconditional."""
        host_pass, conds = self.host_pass, self.host_pass.conds
        x, sigma = torch.cat(host_pass.x), torch.cat(host_pass.sigma)
        uncond_evaluated = len(x) > conds

        def isolated(first: int, last: int) -> Tensor:
            rows = [host_pass.of(lora, first, last) for lora in self.plan.isolated]
            return torch.stack(rows) if rows else x.new_empty(0, last - first, *x.shape[1:])

        kept, gain = noise_scaling(self.denoiser.inner_model, x[:conds], sigma[:conds])
        cond = isolated(0, conds)
        return Predictions(
            host_cond=output[:conds],
            host_uncond=output[conds:] if uncond_evaluated else None,
            cond=cond,
            uncond=isolated(conds, len(x)) if self.plan.uncond and uncond_evaluated else None,
            eps_base=(output[:conds] - kept) / gain,
            eps=(cond - kept) / gain,
            image_of_row=host_pass.image_of_row,
            gain=gain[0],
        )


def token_count(text: Any) -> int:
    """Length of a conditioning, which is ``[rows, tokens, C]`` or, for SDXL, in a dict."""
    return (text["crossattn"] if isinstance(text, dict) else text).shape[1]


def write_rows(output: Tensor, composed: ComposedStep, conds_list: list) -> None:
    """Put composed rows where the host looks for them: in place.

    Where the host evaluated no unconditional rows it has filled them with each image's first conditional one.
    """
    conds = len(composed.cond)
    output[:conds] = composed.cond
    if composed.uncond is not None:
        output[conds:] = composed.uncond
    else:
        output[conds:] = composed.cond[[rows[0][0] for rows in conds_list]]


# --- entering ---------------------------------------------------------------------------------------------------------


def loaded_model() -> tuple[Any, Any]:
    """What is compared to notice that the host loaded another checkpoint (refiner), maybe into the same model."""
    return shared.sd_model, shared.sd_model.sd_checkpoint_info


def check_supported() -> None:
    """Raises `UnsupportedError` for models whose LoRAs cannot be isolated here."""
    if sd_unet.current_unet is not None:
        name = sd_unet.current_unet.option.label
        raise UnsupportedError(f"LoRAtorio: LoRAs cannot be isolated in the UNet {name!r}; set SD Unet to None")
    if shared.sd_model.cond_stage_key == "edit":
        raise UnsupportedError("LoRAtorio: InstructPix2Pix models guide by two conditions and are not supported")
    if getattr(shared.sd_model, "is_sd3", False):
        raise UnsupportedError("LoRAtorio: Stable Diffusion 3 models are not supported in this WebUI")


def open_sampling(generation: Generation) -> A1111Sampling | None:
    """Composition for the sampling pass that is about to begin, or None where there is nothing to compose."""
    if generation.settings.method == "merge":
        return None
    networks = lora_extension()
    active = list(dict.fromkeys(networks.loaded_networks))
    tell_of_loras(generation, [lora.name for lora in networks.loaded_networks])
    if active or generation.settings.pool:
        check_supported()
    loras = [*active, *load_pool(generation, networks, active)]
    if not loras:
        tell_of_none(generation)
        return None
    return A1111Sampling(generation, networks, loras)


def begin(p: Any, args: Sequence[Any]) -> None:
    """Take up a generation (see `Generation.begin`)."""
    Generation.begin(p, args, open_sampling, shared.state.interrupt)
