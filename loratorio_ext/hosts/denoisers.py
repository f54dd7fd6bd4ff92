"""How diffusers' pipelines speak to their denoisers, UNets and transformers alike, in one path.

What differs between models is read off the call itself, and verified there:

- **Which rows are whose.** A row is conditional if its text is what ``encode_prompt`` returned first, the prompt's;
  unconditional if it is another text that it returned. So guidance may come as rows of one call in either order, as
  two calls one after the other, or not at all (distilled models).
- **How latents lie.** ``[R, C, H, W]``; one frame of a video, ``[R, C, 1, H, W]``; a list of such; tokens of 2 x 2
  pixels, ``[R, h * w, C * 4]``, whose places are among the arguments. Patches are those of ``[R, C, H, W]`` in all.
- **What is predicted.** The scheduler knows: noise, v, the image, or a flow's velocity (`predicted_noise`).

A call that is none of these is refused. The little that a call does not show is in two tables, `TOKENS_OF_2X2` and
`ROWS_APART`.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loratorio_ext.errors import UnsupportedError

TOKENS_OF_2X2 = frozenset(
    {
        "ChromaTransformer2DModel",
        "Flux2Transformer2DModel",
        "FluxTransformer2DModel",
        "LongCatImageTransformer2DModel",
        "OvisImageTransformer2DModel",
        "QwenImageTransformer2DModel",
    }
)
"""Denoisers of tokens, each of which holds 2 x 2 latent pixels, channel by channel."""

ROWS_APART = frozenset(
    {
        "AuraFlowTransformer2DModel",
        "ChromaTransformer2DModel",
        "CogView4Transformer2DModel",
        "Flux2Transformer2DModel",
        "FluxTransformer2DModel",
        "Lumina2Transformer2DModel",
        "PixArtTransformer2DModel",
        "QwenImageTransformer2DModel",
        "SD3Transformer2DModel",
        "SanaTransformer2DModel",
        "UNet2DConditionModel",
    }
)
"""Denoisers in all of whose layers the first dimension is the batch's, so that a batch may hold rows of several LoRAs.

Others are evaluated one LoRA at a time: Z-Image runs its layers over the tokens of all rows in one line, and mixtures
of experts over those of them that an expert is given.
"""

PLACES = ("txt_ids", "img_ids")
"""Arguments that have no rows where they have two dimensions: the places of tokens, the same for all rows."""


# --- one call ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """One call of a denoiser: its ``arguments`` by name, of which ``latents`` names the noisy latents."""

    arguments: Mapping[str, Any]
    latents: str

    @classmethod
    def of(cls, denoiser: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> "Call":
        names = list(inspect.signature(type(denoiser).forward).parameters)[1:]
        arguments = {**dict(zip(names, args)), **kwargs}
        for name, value in arguments.items():
            if name.endswith("attention_kwargs") and isinstance(value, Mapping) and value.get("scale", 1) != 1:
                raise UnsupportedError(f"LoRAtorio: {name} has a scale for LoRAs; give it where each of them is loaded")
        return cls(arguments, names[0])

    @property
    def x(self) -> Tensor:
        """The noisy latents, ``[R, ...]``."""
        return stacked(self.arguments[self.latents])

    @property
    def count(self) -> int:
        """How many rows the call has."""
        return len(self.arguments[self.latents])

    @property
    def in_lists(self) -> bool:
        """Whether rows are the items of lists, here and in the other arguments."""
        return isinstance(self.arguments[self.latents], list)

    @property
    def timestep(self) -> Tensor:
        return torch.as_tensor(
            next(self.arguments[name] for name in ("timestep", "t", "timesteps") if name in self.arguments)
        )

    def rows_of(self, name: str, value: Any) -> Sequence[Tensor] | None:
        """The value as rows of this call, or None where it has none."""
        if isinstance(value, Tensor):
            has_rows = value.ndim > 0 and len(value) == self.count and not (name in PLACES and value.ndim == 2)
        else:
            has_rows = self.in_lists and isinstance(value, list) and len(value) == self.count
        return value if has_rows else None

    def take(self, sources: Sequence[Mapping[str, Any]], rows: Sequence[int]) -> dict[str, Any]:
        """Arguments for another batch: for each of its rows, the one with this index in this call, from these sources,
        which are this call's arguments or such that differ in rows only."""

        def taken(name: str, values: Sequence[Any]) -> Any:
            first = values[0]
            if self.rows_of(name, first) is not None:
                if isinstance(first, list):
                    return [value[row] for value, row in zip(values, rows)]
                if all(value is first for value in values):
                    return first[list(rows)]
                return torch.stack([value[row] for value, row in zip(values, rows)])
            if isinstance(first, Mapping):
                return {key: taken(key, [value[key] for value in values]) for key in first}
            if isinstance(first, (list, tuple)):
                return type(first)(taken(name, items) for items in zip(*values))
            return first

        return {name: taken(name, [source[name] for source in sources]) for name in self.arguments}


def stacked(rows: Tensor | Sequence[Tensor]) -> Tensor:
    """A list of rows as one tensor."""
    return rows if isinstance(rows, Tensor) else torch.stack(list(rows))


# --- which rows are whose ---------------------------------------------------------------------------------------------


class Encoded:
    """What models made of the texts: under no LoRA, and under those that change it. Rows of it are known again wherever
    they turn up."""

    def __init__(self):
        self.outputs: list[Tensor | list[Tensor]] = []
        self.under: dict[int, list[Tensor | list[Tensor]]] = {}
        self._found: dict[str, tuple[Any, list[set[tuple[int, int]]]]] = {}

    def add(self, outputs: Sequence[Any], under: Mapping[int, Sequence[Any]]) -> None:
        """The outputs of one call of a model: each is rows in a tensor or a list, or none."""
        kept = [index for index, output in enumerate(outputs) if isinstance(output, (Tensor, list))]
        self.outputs += [outputs[index] for index in kept]
        for whom, changed in under.items():
            self.under.setdefault(whom, []).extend(changed[index] for index in kept)

    def find(self, row: Tensor) -> set[tuple[int, int]]:
        """Where this row is among the outputs: (output, row) of each place."""
        if not isinstance(row, Tensor) or not row.is_floating_point():
            return set()
        return {
            (index, number)
            for index, output in enumerate(self.outputs)
            for number, each in enumerate(output)
            if each.shape == row.shape and each.is_floating_point() and torch.equal(each.to(row), row)
        }

    def found(self, name: str, rows: Sequence[Tensor]) -> list[set[tuple[int, int]]]:
        """`find` for each row of an argument; most arguments are the same in every call."""
        known = self._found.get(name)
        if known is None or known[0] is not rows:
            self._found[name] = known = (rows, [self.find(row) for row in rows])
        return known[1]

    def arguments(self, call: Call, whom: int) -> Mapping[str, Any]:
        """The call's arguments with these rows as they are under ``whom``."""
        if whom not in self.under:
            return call.arguments

        def changed(name: str, value: Any) -> Any:
            rows = call.rows_of(name, value)
            if rows is not None:
                places = self.found(name, rows)
                if not any(places):
                    return value
                under = [
                    self.under[whom][min(place)[0]][min(place)[1]].to(row) if place else row
                    for row, place in zip(rows, places)
                ]
                return under if isinstance(value, list) else torch.stack(under)
            if isinstance(value, Mapping):
                return {key: changed(key, each) for key, each in value.items()}
            if isinstance(value, (list, tuple)):
                return type(value)(changed(f"{name}.{index}", each) for index, each in enumerate(value))
            return value

        return {name: changed(name, value) for name, value in call.arguments.items()}


class Texts(Encoded):
    """What ``encode_prompt`` returned in one call of a pipeline, the prompt's text first."""

    def possible_sides(self, call: Call) -> list[set[bool]]:
        """For each row, whether it may be unconditional (True), conditional (False), or either, by its text: that
        argument all of whose rows are texts, ``[L, D]`` each."""
        for name, value in call.arguments.items():
            rows = call.rows_of(name, value)
            if rows is None or not all(isinstance(row, Tensor) and row.ndim == 2 for row in rows):
                continue
            places = self.found(name, rows)
            if all(places):
                return [{index != 0 for index, _ in place} for place in places]
        return []

    def sides(self, call: Call, second: bool) -> tuple[list[int], list[int]]:
        """The conditional rows of a call, and the unconditional ones, in the order of the images.

        Where texts do not tell, because the negative prompt is the prompt: the ``second`` call for one noise is the
        unconditional one; of the rows of one call these are the first half, and the second half of a list.
        """
        count, half = call.count, call.count // 2
        images = len(self.outputs[0]) if self.outputs else 0
        one_side, two_sides = [[second] * count, [not second] * count], []
        if count % 2 == 0:
            two_sides = [[True] * half + [False] * half, [False] * half + [True] * half]
        if call.in_lists:
            guided = count % 2 == 0 and torch.equal(call.x[:half], call.x[half:])
            layouts = [*two_sides[::-1], *one_side] if guided else [*one_side, *two_sides[::-1]]
            layouts = layouts if images and count % images == 0 else []
        else:
            layouts = {images: one_side, 2 * images: two_sides}.get(count, [])
        possible = self.possible_sides(call)
        for layout in layouts:
            if possible and all(side in each for side, each in zip(layout, possible)):
                return [row for row in range(count) if not layout[row]], [row for row in range(count) if layout[row]]
        raise UnsupportedError(
            f"LoRAtorio: the denoiser is called with {count} rows for {images} images: neither guidance by a negative"
            " prompt nor none, or another text than encode_prompt returned"
        )


# --- how latents lie --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """How a call's latents and predictions lie: in ``(h, w)`` ``tokens`` of 2 x 2 pixels, or in a grid (None)."""

    tokens: tuple[int, int] | None = None

    @classmethod
    def of(cls, denoiser: nn.Module, call: Call) -> "Layout":
        x, kind = call.x, type(denoiser).__name__
        if x.ndim == 4:
            return cls()
        if x.ndim == 5 and x.shape[2] == 1:
            return cls()
        if x.ndim == 5:
            raise UnsupportedError(f"LoRAtorio: {kind} is given {x.shape[2]} frames: videos are not composed")
        if x.ndim == 3 and kind in TOKENS_OF_2X2:
            return cls(places_of_tokens(call.arguments))
        raise UnsupportedError(f"LoRAtorio: how the latents {tuple(x.shape)} of {kind} lie in the image is not known")

    def to_grid(self, value: Tensor) -> Tensor:
        """``[R, C, H, W]`` of latents or predictions; tokens beyond the image's (a reference image's) are left out."""
        if self.tokens is None:
            return value.squeeze(2) if value.ndim == 5 else value
        h, w = self.tokens
        return (
            value[:, : h * w]
            .unflatten(2, (-1, 2, 2))
            .unflatten(1, self.tokens)
            .permute(0, 3, 1, 4, 2, 5)
            .flatten(4, 5)
            .flatten(2, 3)
        )

    def into(self, output: Tensor, grid: Tensor) -> Tensor:
        """The output with ``grid [R, C, H, W]`` in place of its first C channels."""
        whole = torch.cat([grid, self.to_grid(output)[:, grid.shape[1] :]], dim=1)
        if self.tokens is None:
            return whole.view(output.shape)
        h, w = self.tokens
        tokens = whole.unflatten(3, (w, 2)).unflatten(2, (h, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return torch.cat([tokens, output[:, h * w :]], dim=1)


def places_of_tokens(arguments: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns of an image's tokens, from the arguments that give the places or the size of those."""
    shapes, ids = arguments.get("img_shapes"), arguments.get("img_ids")
    if shapes is not None:
        size = shapes[0]  # of the first row, or of its images
        frames, h, w = size[0] if isinstance(size[0], (list, tuple)) else size
        if frames == 1:
            return h, w
    elif ids is not None:
        ids = ids[0] if ids.ndim == 3 else ids
        mine = ids[ids[:, 0] == ids[0, 0]]
        h, w = len(mine[:, 1].unique()), len(mine[:, 2].unique())
        if h * w == len(mine):
            return h, w
    raise UnsupportedError("LoRAtorio: the places of the denoiser's tokens make no image")


# --- what is predicted ------------------------------------------------------------------------------------------------


def parameterisation(scheduler: Any) -> str:
    """What the model predicts, by the scheduler: ``epsilon``, ``v_prediction``, ``sample`` or ``flow_prediction``."""
    kind = scheduler.config.get("prediction_type")
    if kind is None and type(scheduler).__name__.startswith("FlowMatch"):
        kind = "flow_prediction"
    preconditioned = "sigma_data" in scheduler.config
    if preconditioned or kind not in ("epsilon", "v_prediction", "sample", "flow_prediction"):
        raise UnsupportedError(
            f"LoRAtorio: models that predict {kind!r} for {type(scheduler).__name__} are not supported"
        )
    return kind


def signal_share(scheduler: Any, timestep: Tensor) -> Tensor:
    """The squared share of the image in the denoiser's input (DDPM's alpha-bar) in the call under way.

    Schedulers that keep sigmas know the noise of this very call, which may lie between two timesteps of training.
    """
    if hasattr(scheduler, "sigmas") and hasattr(scheduler, "index_for_timestep"):
        index = scheduler.step_index
        sigma = scheduler.sigmas[scheduler.index_for_timestep(timestep) if index is None else index]
        return 1 / (1 + sigma**2)
    return scheduler.alphas_cumprod[torch.as_tensor(timestep).cpu().long()]


def predicted_noise(scheduler: Any, output: Tensor, x: Tensor, timestep: Tensor) -> Tensor:
    """The noise that the denoiser's ``output [R, C, H, W]`` for its input ``x`` means; a flow's velocity stays one.

    Whatever the scheduler's own scale, it has brought ``x`` to ``sqrt(a) * image + sqrt(1 - a) * noise`` before.
    """
    kind = parameterisation(scheduler)
    if kind in ("epsilon", "flow_prediction"):
        return output
    share = signal_share(scheduler, timestep.flatten()[0]).to(output.device, torch.float32)
    x, output = x[:, : output.shape[1]].float(), output.float()  # an inpainting model's input has more channels
    if kind == "v_prediction":
        return share.sqrt() * output + (1 - share).sqrt() * x
    return (x - share.sqrt() * output) / (1 - share).sqrt()


def noise_gain(scheduler: Any, timestep: Tensor) -> float:
    """How the denoiser's output moves with what `predicted_noise` makes of it."""
    kind = parameterisation(scheduler)
    if kind in ("epsilon", "flow_prediction"):
        return 1.0
    share = float(signal_share(scheduler, timestep.flatten()[0]).clamp(min=1e-8))  # 0 at zero terminal SNR
    return share**-0.5 if kind == "v_prediction" else -(((1 - share) / share) ** 0.5)
