"""AUTOMATIC1111's WebUI 1.10: the host's own UNet pass, and the isolated rows in the same batch.

Between the two callbacks of a step (``on_cfg_denoiser`` before the UNet, ``on_cfg_denoised`` after it) the host's list
of LoRAs is empty, and calls of its denoiser are answered here: rows without a LoRA are the base model's. Outside of
that the host always sees its own list.

In company, where other extensions take part in the model's evaluation, nothing is known of what they make of a batch.
Then the host's calls are left exactly as they are, and once more made for each LoRA, with its text and its branches: as
if the host had been asked for this LoRA alone.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any

import torch
from modules import devices, extra_networks, script_callbacks, sd_unet, shared
from modules.sd_samplers_cfg_denoiser import catenate_conds, subscript_cond
from modules.sd_samplers_common import InterruptedException
from torch import Tensor, nn

from loratorio_ext.claims import Claim
from loratorio_ext.core import ComposedStep, Plan, Predictions, method_from
from loratorio_ext.costs import rows_by_step
from loratorio_ext.errors import UnsupportedError
from loratorio_ext.generation import Generation
from loratorio_ext.hosts.a1111_loras import (
    embeddings_of,
    entry_of,
    fits,
    how_often,
    labels,
    load_pool,
    loaded_model,
    not_finite,
    only,
    speaks_to_text_encoder,
    strength,
    undisturbed,
    unet_lora,
)
from loratorio_ext.hosts.neighbours import (
    TELLING,
    callers_of,
    keepers_of,
    meddlers_with_loras,
    named,
    taking_part,
    tensors_kept,
)
from loratorio_ext.hosts.progress import Progress
from loratorio_ext.hosts.webui import (
    attended,
    check_tags,
    check_texts,
    claimed,
    claims_on,
    clean_up,
    encode,
    forget_conditionings,
    interrupt,
    lora_extension,
    plan_step,
    pool_of,
    prompts_of_pass,
    sampled,
    stop_where_asked,
    tags_of_pass,
    tell_of_loras,
    tell_of_merge,
    tell_of_none,
    unless_stopped,
)
from loratorio_ext.hosts.webui_texts import (
    HOST,
    Affix,
    as_condition,
    is_finite_text,
    pad_to_each_other,
    same_text,
    text_and_others,
    text_at_step,
    token_count,
    tokens_of,
)
from loratorio_ext.isolation import ROWS_OF_A_POOL, CudaMemory, IsolatedCalls, Isolation, Row, Tally

__all__ = ["attended", "check", "clean_up", "forget_conditionings", "interrupt", "open_sampling", "sampled"]

logger = logging.getLogger("loratorio")

PROBES = 3
"""In so many steps of a pass the host's own calls are made once more in company: some remember only after the first."""

CONTROL_LORAS = "controlnet_control_loras"
"""Where ControlNet keeps, on ``p``, control models that it has made of the UNet's own layers."""


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


@dataclass(frozen=True)
class HostCall:
    """A call of the host's denoiser: rows ``x [R, C, H, W]`` from ``first`` on, ``sigma [R]``, their text and the other
    conditions; and the text that other extensions have put around the host's since we handed it over."""

    denoise: Callable[..., Tensor]
    x: Tensor
    sigma: Tensor
    first: int
    text: Any
    besides: dict[str, Tensor]
    affix: Affix

    @property
    def range(self) -> range:
        return range(self.first, self.first + len(self.x))


@dataclass
class HostPass:
    """One step as the host hands it to its denoiser, in one call or several: conditional rows, then unconditional ones.

    ``conds_list``: the host's rows of each image, with weights; ``texts``: this step's conditionings, positive and
    negative, for each of those whom the plan asks. ``predicted``: what the denoiser said, by LoRA and row.
    """

    plan: Plan
    conds_list: list
    texts: dict[int, tuple[Any, Any]]
    calls: list[HostCall] = field(default_factory=list)
    predicted: dict[Row, Tensor] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """How many rows the host has asked for so far."""
        return sum(len(call.x) for call in self.calls)

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


def random_states() -> tuple[Tensor, Tensor | None]:
    """Where PyTorch's own generators are, on the CPU and on the host's CUDA device."""
    cuda = devices.device.type == "cuda"
    return torch.get_rng_state(), torch.cuda.get_rng_state(devices.device) if cuda else None


def set_random_states(states: tuple[Tensor, Tensor | None]) -> None:
    """Set them back there."""
    torch.set_rng_state(states[0])
    if states[1] is not None:
        torch.cuda.set_rng_state(states[1], devices.device)


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


class A1111Sampling:
    """Composition in one sampling pass.

    Wherever a LoRA's index is asked for, `Plan.BASE` stands for none of them, `Plan.MERGED` for all of the prompt's at
    once, and `HOST` for what the host encodes by itself.
    """

    def __init__(
        self,
        generation: Generation,
        networks: ModuleType,
        loras: Sequence[Any],
        claims: Sequence[Claim],
        everywhere: Sequence[Any],
    ):
        self.generation, self.p, self.networks = generation, generation.p, networks
        self.loras, self.claims, self.everywhere = loras, claims, everywhere
        self.settings = generation.settings
        self.labels = labels(loras)
        self.method = method_from(self.settings)
        self.step = ExitStack()
        self.steps = 0
        self.probes = 0
        self.ran: dict[int, set[str]] = {}
        self.plan = Plan(host=Plan.MERGED)
        self.progress: Progress | None = None
        self.prepare()
        script_callbacks.on_cfg_denoiser(self.before_unet)
        script_callbacks.on_cfg_denoised(self.after_unet)
        come_first(self.after_unet, "cfg_denoised")

    @property
    def tally(self) -> Tally:
        return self.isolated.tally

    @property
    def pooled_in_every_pass(self) -> list[Any]:
        """Those that are in every pass and that the host has not loaded by itself."""
        return [lora for lora in self.everywhere if lora not in self.networks.loaded_networks]

    def close(self) -> None:
        self.step.close()
        if self.progress is not None:
            self.progress.close()
        script_callbacks.remove_callbacks_for_function(self.before_unet)
        script_callbacks.remove_callbacks_for_function(self.after_unet)

    def prepare(self) -> None:
        """Conditionings and branches for the model that is loaded now, made once for all batches that share them."""
        check_supported()
        self.model = loaded_model()
        # By what the host keeps its own conditionings by, so that they hold for as long as the host's do.
        second_pass, *_ = prompts = prompts_of_pass(self.p)
        key = (
            "texts",
            self.model,
            prompts,
            tags_of_pass(self.p),
            *labels(dict.fromkeys([*self.loras, *self.everywhere])),
        )
        self.texts, self.speaks = self.generation.once(key, self.encode_all)
        self.read_strengths()
        # Images of another size: another number of rows fits.
        self.isolated = self.generation.once(("calls", self.model, second_pass), self.calls)
        self.isolated.act_on(self.isolation)

    def read_strengths(self) -> None:
        """The LoRAs' branches at their present strengths, which other extensions change from step to step."""
        self.strengths = [strength(lora) for lora in self.loras]
        times = [how_often(self.networks, lora) for lora in self.loras]
        key = (self.model, *self.everywhere, *zip(self.loras, self.strengths, times))
        self.isolation, self.acts = self.generation.kept("isolation", key, self.isolate)

    def isolate(self) -> tuple[Isolation, list[bool]]:
        """The LoRAs' branches on the UNet's layers, and which of them add anything."""
        branches, acts = [], []
        for lora, name in zip(self.loras, self.labels):
            each = unet_lora(self.generation, self.networks, lora, self.everywhere)
            branches.append(each.branches)
            acts.append(each.acts)
            if each.misfits:
                self.generation.note(f"{name} does not fit {len(each.misfits)} layers of this model")
        # The last one, without a branch, makes `Plan.BASE` an index like any other.
        return Isolation(shared.sd_model.network_layer_mapping, [*branches, {}]), acts

    def calls(self) -> IsolatedCalls:
        """Model calls for one pass, as large as the host's options and the device's memory allow."""
        limits = [] if shared.opts.batch_cond_uncond else [self.p.batch_size]
        limits += [ROWS_OF_A_POOL] if self.settings.pool else []
        return IsolatedCalls(self.isolation, min(limits, default=None), CudaMemory.of(devices.device))

    def encode_all(self) -> tuple[list[Any], list[bool]]:
        """The prompts' schedules of conditionings: each LoRA's, then the host's own (`HOST`), that of a merged step
        (`Plan.MERGED`), and last the bare model's (`Plan.BASE`); and which LoRAs change the bare model's."""
        base = self.encode(self.everywhere)
        alone = [
            self.encode([*self.everywhere, *[lora] * how_often(self.networks, lora)])
            if speaks_to_text_encoder(lora)
            else base
            for lora in self.loras
        ]
        for lora, text in zip(self.loras, alone):
            if text is not base and not is_finite_text(text):
                raise not_finite(lora)
        active = list(self.networks.loaded_networks)
        audible = [lora for lora in active if speaks_to_text_encoder(lora)] or [None]
        known = dict(zip(self.loras, alone))
        hosts = self.encode(active) if len(audible) > 1 or self.everywhere else known.get(audible[0], base)
        pooled = self.pooled_in_every_pass
        merged = self.encode([*active, *pooled]) if any(map(speaks_to_text_encoder, pooled)) else hosts
        speaks = [text is not base and not all(map(same_text, text, base)) for text in alone]
        return [*alone, hosts, merged, base], speaks

    def encode(self, active: Sequence[Any]) -> tuple[Any, Any]:
        """Schedules of conditionings, positive and negative, with just the LoRAs ``active``."""
        others = [lora for lora in (*self.loras, *self.everywhere) if lora not in active]
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
            elif self.strengths != [strength(lora) for lora in self.loras]:
                self.read_strengths()
                self.isolated.act_on(self.isolation)
            self.steps += 1
            self.denoiser = denoiser
            acting = [index for index, effects in enumerate(zip(self.acts, self.speaks)) if any(effects)]
            self.plan = plan_step(self.generation, self.method, denoiser, self.claims, acting)
            self.tell_progress(acting)
            if self.plan.host == Plan.MERGED:
                self.merge(params)
                return
            check_texts(self.generation, self.speaks)
            self.meet_company()
            self.host_pass = self.handed_over(params)
            if self.company:
                self.randomness = random_states()
            self.step.enter_context(only(self.networks, self.everywhere))
            self.step.enter_context(undisturbed(self.networks, self.generation.fail))
            self.step.enter_context(answered(denoiser.inner_model, self.answer))

    def merge(self, params: script_callbacks.CFGDenoiserParams) -> None:
        """Let the host's pass be its own, with the pool's LoRAs that are in every pass."""
        if self.texts[Plan.MERGED] is not self.texts[HOST]:
            self.handed_over(params)
        if pooled := self.pooled_in_every_pass:
            self.step.enter_context(only(self.networks, [*self.networks.loaded_networks, *pooled]))

    def tell_progress(self, acting: Sequence[int]) -> None:
        """A step begins."""
        if self.progress is None:
            conds_list, *_ = text_at_step(self.texts[Plan.MERGED], self.denoiser.step)
            self.progress = Progress(
                rows_by_step(
                    self.settings,
                    [self.claims[index] for index in acting],
                    self.denoiser.total_steps,
                    sum(map(len, conds_list)),
                    len(conds_list),
                )
            )
        self.progress.begin(self.denoiser.step)

    def meet_company(self) -> None:
        """Look who else takes part in the model's evaluation."""
        meddlers = meddlers_with_loras()
        if meddlers:
            raise UnsupportedError(
                f"LoRAtorio: {named(meddlers)} decides by itself where the prompt's LoRAs act, so they cannot be "
                "composed; switch it off, or LoRAtorio"
            )
        if getattr(self.p, CONTROL_LORAS, None):
            raise UnsupportedError(
                "LoRAtorio: a control LoRA of ControlNet's reads the model's own weights with all LoRAs in them, and "
                "what it would be for a single one is not known; switch it off, or LoRAtorio"
            )
        model = shared.sd_model
        modules = (model, self.denoiser.inner_model, *model.model.modules())
        found = taking_part(modules, (model.apply_model, nn.functional.scaled_dot_product_attention))
        self.company, self.functions = list(found), [function for each in found.values() for function in each]
        if self.company:
            self.generation.note(
                f"beside {named(self.company)} one LoRA after the other was evaluated, which takes longer"
            )

    def handed_over(self, params: script_callbacks.CFGDenoiserParams) -> HostPass:
        """Give the host's pass the text of whom the plan asks, with all that other extensions have put around it."""
        denoiser, texts = self.denoiser, {}
        _, *own = text_at_step(self.texts[HOST], denoiser.step)
        affixes = [self.affix(*pair) for pair in zip(own, (params.text_cond, params.text_uncond))]
        for lora in dict.fromkeys((self.plan.host, *self.plan.isolated)):
            conds_list, *text = text_at_step(self.texts[lora], denoiser.step)
            text = [affix.around(each) for affix, each in zip(affixes, text)]
            if lora == self.plan.host:
                host_conds_list = conds_list
                params.text_cond, params.text_uncond = text
            texts[lora] = pad_to_each_other(denoiser, *text)
        return HostPass(self.plan, host_conds_list, texts)

    def affix(self, own: Any, given: Any) -> Affix:
        """What other extensions have put around a conditioning; raises `UnsupportedError` if they have changed it."""
        try:
            return Affix.between(own, given)
        except ValueError as error:
            with_loras = keepers_of(self.loras, extra_networks.extra_network_registry["lora"])
            suspects = named(dict.fromkeys([*self.company, *callers_of("cfg_denoiser"), *with_loras]))
            raise UnsupportedError(
                f"LoRAtorio: {suspects} changes the prompt's conditioning while the image is made, and what it would "
                "make of a single LoRA's is not known; switch it off, or LoRAtorio"
            ) from error

    def answer(self, denoise: Callable[..., Tensor], x: Tensor, sigma: Tensor, cond: dict[str, Any]) -> Tensor:
        """In place of a call of the host's denoiser: its rows, and beside them the isolated LoRAs'."""
        try:
            output = self.evaluate(denoise, x, sigma, cond)
            if self.generation.error is not None:  # somebody else has swallowed it
                raise self.generation.error
            return output
        except InterruptedException:
            self.step.close()  # a second pass may follow
            raise
        except Exception as error:
            self.generation.fail(error)
            raise self.generation.error from error

    def evaluate(self, denoise: Callable[..., Tensor], x: Tensor, sigma: Tensor, cond: dict[str, Any]) -> Tensor:
        """The predictions for rows ``x [R, C, H, W]``, the next ones of this step; those of isolated LoRAs are kept."""
        host_pass, host = self.host_pass, self.plan.host
        first = host_pass.rows
        text, besides = text_and_others(cond, like=host_pass.texts[host][0])
        handed = catenate_conds([host_pass.text_of((host, row)) for row in range(first, first + len(x))])
        call = HostCall(denoise, x, sigma, first, text, besides, self.affix(handed, text))
        host_pass.calls.append(call)
        if self.company:
            self.repeat(call, host)
        else:
            self.batch(call)
        return host_pass.of(host, first, call.range.stop)

    def batch(self, call: HostCall) -> None:
        """Evaluate a host's call and what the plan asks beside it, in as few model calls as can be."""
        host_pass = self.host_pass
        # The host's own rows keep the text it gives them.
        texts = {(self.plan.host, row): subscript_cond(call.text, at, at + 1) for at, row in enumerate(call.range)}
        texts |= {asked: self.text_for(call, asked) for asked in host_pass.wanted(call.range)}

        def model_call(batch: Sequence[Row]) -> Tensor:
            stop_where_asked()
            here = [row - call.first for _, row in batch]
            text = catenate_conds([texts[asked] for asked in batch])
            others = {name: value[here] for name, value in call.besides.items()}
            output = call.denoise(call.x[here], call.sigma[here], cond=as_condition(text, others))
            self.progress.evaluated(len(batch))
            return output

        # A word that one LoRA's file brings along can make the prompt longer for it than for the others; and without
        # padding the negative prompt may be of another length.
        for length in dict.fromkeys(map(token_count, texts.values())):
            batch = [asked for asked, text in texts.items() if token_count(text) == length]
            host_pass.predicted.update(zip(batch, self.isolated(batch, model_call)))

    def text_for(self, call: HostCall, asked: Row) -> Any:
        """The conditioning of one row of a call for whom it is asked, with what is around the host's."""
        at = asked[1] - call.first
        return call.affix.rows(at, at + 1).around(self.host_pass.text_of(asked))

    def repeat(self, call: HostCall, lora: int) -> None:
        """Make a host's call as it is, with another LoRA acting and its text in the place of the host's."""
        text = call.text
        if lora != self.plan.host:
            rows = [self.text_for(call, (lora, row)) for row in call.range]
            if len(set(map(token_count, rows))) > 1:
                raise UnsupportedError(
                    f"LoRAtorio: with {self.labels[lora]}'s own words prompt and negative prompt differ in length, "
                    f"which cannot be evaluated beside {named(self.company)}"
                )
            text = catenate_conds(rows)
        condition = as_condition(text, call.besides)
        stop_where_asked()
        with self.isolation.rows([lora]), self.reads_only(text):
            output = call.denoise(call.x, call.sigma, cond=condition)
        self.progress.evaluated(len(output))
        if not self.ran.setdefault(lora, self.isolation.ran) <= self.isolation.ran:
            raise UnsupportedError(
                f"LoRAtorio: {named(self.company)} leaves out parts of the model and takes what it knows from another "
                "call, which may have been another LoRA's; switch it off, or LoRAtorio"
            )
        self.host_pass.predicted.update(zip(((lora, row) for row in call.range), output))

    def repeat_all(self) -> None:
        """All of the host's calls of this step for one LoRA, then all of them for the next; who draws at random in them
        draws the same each time, and goes on as after the host's own."""
        host_pass, after = self.host_pass, random_states()
        try:
            # The host's own token merging draws its tokens by lot.
            if self.probes < PROBES and not self.p.get_token_merging_ratio():
                self.probe()
            for lora in self.plan.isolated:
                set_random_states(self.randomness)
                for call in host_pass.calls:
                    self.repeat(call, lora)
        finally:
            set_random_states(after)
        if self.generation.error is not None:  # somebody else has swallowed it
            raise self.generation.error

    def probe(self) -> None:
        """What the same rows make, and what is kept of them, must not depend on how often somebody was asked: raises
        `UnsupportedError` where it does."""
        self.probes += 1
        host_pass, host = self.host_pass, self.plan.host
        known, kept = host_pass.of(host, 0, host_pass.rows), tensors_kept(self.functions)
        set_random_states(self.randomness)
        for call in host_pass.calls:
            self.repeat(call, host)
        again = host_pass.of(host, 0, host_pass.rows)
        if (again - known).float().norm() > TELLING * known.float().norm() or tensors_kept(self.functions) != kept:
            raise UnsupportedError(
                f"LoRAtorio: {named(self.company)} makes something else of a step when it is asked again, or remembers "
                "how often it was, so LoRAs cannot be evaluated one after the other; switch it off, or LoRAtorio"
            )

    @contextmanager
    def reads_only(self, text: Any) -> Iterator[None]:
        """While entered, the UNet may be given no other text than rows of ``text``."""
        rows = tokens_of(text)

        def look(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            given = kwargs.get("context", args[2] if len(args) > 2 else None)
            known = None if given is None else rows.to(given)
            if given is not None and not (
                given.shape[1:] == known.shape[1:]
                and bool((given.unsqueeze(1) == known).flatten(2).all(dim=2).any(dim=1).all())
            ):
                self.generation.fail(
                    UnsupportedError(
                        f"LoRAtorio: {named(self.company)} gives the model prompts of its own for parts of the image, "
                        "and what a single LoRA's text encoder would make of them is not known; switch it off, or "
                        "LoRAtorio"
                    )
                )
                raise self.generation.error

        unet = shared.sd_model.model.diffusion_model
        handle = unet.register_forward_pre_hook(look, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def after_unet(self, params: script_callbacks.CFGDenoisedParams) -> None:
        """``on_cfg_denoised``: put the composed rows in the place of the host's."""
        try:
            if self.generation.error is not None or self.plan.host == Plan.MERGED:
                return
            if self.denoiser.inner_model is not params.inner_model:
                return
            with self.generation.guarded():
                if self.company:
                    self.repeat_all()
                predictions = self.predictions(params.x)
                composed = self.method.combine(predictions)
                names = [self.labels[member] for member in self.plan.members]
                self.generation.record(names, composed.weights, predictions.image_of_row)
                write_rows(params.x, composed, self.host_pass.conds_list)
        finally:
            self.step.close()

    def predictions(self, output: Tensor) -> Predictions:
        """All predictions of this step; ``output`` is the host's own pass, conditional rows before unconditional."""
        host_pass, conds = self.host_pass, self.host_pass.conds
        x, sigma = (torch.cat([getattr(call, name) for call in host_pass.calls]) for name in ("x", "sigma"))
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
            **claimed(self.plan, self.claims, x, host_pass.image_of_row),
        )


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


def come_first(callback: Callable, category: str) -> None:
    """Let a callback, the last one registered, run before all others: they see what it makes of a step."""
    registered = script_callbacks.callback_map[f"callbacks_{category}"]
    registered.insert(0, registered.pop())


def check_supported() -> None:
    """Raises `UnsupportedError` for models whose LoRAs cannot be isolated here."""
    unet = sd_unet.get_unet_option()
    if unet is not None:
        raise UnsupportedError(f"LoRAtorio: LoRAs cannot be isolated in the UNet {unet.label!r}; set SD Unet to None")
    if shared.sd_model.cond_stage_key == "edit":
        raise UnsupportedError("LoRAtorio: InstructPix2Pix models guide by two conditions and are not supported")
    if getattr(shared.sd_model, "is_sd3", False):
        raise UnsupportedError("LoRAtorio: Stable Diffusion 3 models are not supported in this WebUI")


def check(generation: Generation) -> None:
    """Raise what speaks against a composition before any script has acted: the pool's entries, the kind of model."""
    if generation.settings.method == "merge":
        return
    pool, tagged = pool_of(generation, ()), check_tags(generation.p)
    if pool or tagged:
        check_supported()


@unless_stopped
def open_sampling(generation: Generation) -> A1111Sampling | None:
    """Composition for the sampling pass that is about to begin, or None where there is nothing to compose."""
    if generation.settings.method == "merge":
        tell_of_merge(generation)
        return None
    networks = lora_extension()
    active = list(dict.fromkeys(networks.loaded_networks))
    names = [lora.mentioned_name for lora in networks.loaded_networks]
    tell_of_loras(generation, names, "at its last multiplier, so many times as it is named")
    pooled = load_pool(generation, networks, active)
    claims = dict(zip([*active, *pooled], claims_on(generation, [*map(entry_of, active), *map(entry_of, pooled)])))
    everywhere = [lora for lora in (*networks.loaded_networks, *pooled) if claims[lora].base]
    loras = [lora for lora in active if lora not in everywhere]
    loras += [lora for lora in pooled if lora not in everywhere and fits(generation, networks, lora, everywhere)]
    if not loras:
        tell_of_none(generation)
        return None
    return A1111Sampling(generation, networks, loras, [claims[lora] for lora in loras], everywhere)
