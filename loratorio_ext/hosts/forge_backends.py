"""Where the hosts of Forge's family differ: how LoRAs are stored and merged, how a step's evaluation is called and
replaced, what they keep besides."""

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from loratorio_ext.errors import UnsupportedError
from loratorio_ext.hosts.forge_patches import Patches

WRAPPER = "model_function_wrapper"
"""The option that holds a function around every call of the model."""

Evaluation = Callable[[Any, list, list | None, Tensor, Tensor, dict], tuple[Tensor, Tensor | None]]
"""``evaluation(model, cond, uncond, x, sigma, options)``: a step's x0, conditional and not, ``[B, C, H, W]`` each (for
models of videos ``[B, C, T, H, W]``)."""


class Backend(Protocol):
    """What a host of Forge's family does in its own way."""

    store: str
    """A patcher's attribute that holds its patches."""

    def check(self, p: Any) -> None:
        """Raises `UnsupportedError` for a model, or a use of it, whose LoRAs cannot be isolated here."""

    def read(self, networks: ModuleType, file: str) -> dict[str, Tensor]:
        """A LoRA's file, named as the host's loader expects it."""

    def load(
        self, networks: ModuleType, unet: Any, clip: Any, weights: dict, strengths: tuple[float, float], file: str
    ) -> tuple[Any, Any]:
        """Patchers of the UNet and the text encoders with one more LoRA at these ``(unet, text)`` strengths, to act as
        the host lets its own act: merged into the weights, or added in passing."""

    def patches(self, patcher: Any, before: Any) -> Patches:
        """The patches that one patcher holds and another, of the same model, does not."""

    def strip(self, patcher: Any, loaded: Any, original: Any, base: Any) -> None:
        """Take from a patcher of our own what ``loaded`` holds and ``original`` does not, the prompt's LoRAs, and give
        it what ``base`` holds beside ``original``, those that are in every pass."""

    def weight(self, layer: nn.Module, leaf: str) -> Tensor:
        """A layer's weight or bias as the layer uses it: as numbers, with the LoRAs that the host adds in passing. It
        may be the layer's own."""

    def merge(self, patches: list, weight: Tensor, name: str) -> Tensor:
        """The weight with patches merged in by the host, the given tensor left as it is."""

    def encoding(self, model: Any) -> Any:
        """A context in which prompts may be encoded once more, without the host's own conditionings losing anything."""

    def counts_rows(self) -> bool:
        """Whether the model goes by how many rows the host gives it (to each of them it adds an image that it refers
        to): then rows of several LoRAs cannot share a batch."""

    def evaluate(self, model: Any, cond: list, uncond: list | None, x: Tensor, sigma: Tensor, options: dict) -> None:
        """Run the model on these entries, in as many calls as the host thinks fit."""

    def replace_evaluation(self, unet: Any, evaluation: Evaluation) -> Callable[[], None]:
        """Let a patcher of our own use ``evaluation`` in every step; returns what undoes it."""


# --- what two of them have alike --------------------------------------------------------------------------------------


class Plain:
    """Nothing is known that cannot be isolated, files are as they are, LoRAs are merged, encoding a prompt leaves no
    trace, and a model does not care how many rows it is given."""

    def check(self, p: Any) -> None:
        pass

    def read(self, networks: ModuleType, file: str) -> dict[str, Tensor]:
        return networks.load_lora_state_dict(file)

    def load(
        self, networks: ModuleType, unet: Any, clip: Any, weights: dict, strengths: tuple[float, float], file: str
    ) -> tuple[Any, Any]:
        return networks.load_lora_for_models(unet, clip, weights, *strengths, filename=file)

    @contextmanager
    def encoding(self, model: Any) -> Iterator[None]:
        yield

    def counts_rows(self) -> bool:
        return False


class PatchesByParameter:
    """Patches lie by parameter, whosever they are; the host merges anew when the patcher's uuid is another. What is not
    merged for want of memory (or on the fly) is a function of the layer's."""

    store = "patches"

    @staticmethod
    def dense(weight: Tensor) -> Tensor:
        """A weight as numbers."""
        return weight

    def weight(self, layer: nn.Module, leaf: str) -> Tensor:
        weight = self.dense(getattr(layer, leaf))
        functions = getattr(layer, f"{leaf}_function", ())
        if functions:
            weight = weight.to(torch.float32, copy=True)  # they work in place
        for function in functions:
            weight = function(weight)
        return weight

    def patches(self, patcher: Any, before: Any) -> Patches:
        known = {id(patch) for patches in before.patches.values() for patch in patches}
        added = {
            key: [patch for patch in patches if id(patch) not in known] for key, patches in patcher.patches.items()
        }
        return {name: patches for name, patches in added.items() if patches}

    def strip(self, patcher: Any, loaded: Any, original: Any, base: Any) -> None:
        prompts = {id(patch) for patches in self.patches(loaded, original).values() for patch in patches}
        kept = {
            key: [patch for patch in patches if id(patch) not in prompts] for key, patches in patcher.patches.items()
        }
        kept = {name: patches for name, patches in kept.items() if patches}
        nobody_elses = {name: list(map(id, patches)) for name, patches in kept.items()} == {
            name: list(map(id, patches)) for name, patches in original.patches.items()
        }
        patcher.patches = kept
        for name, patches in self.patches(base, original).items():
            kept.setdefault(name, []).extend(patches)
        # These weights may be in place already: with a uuid of our own the whole model would be moved again.
        patcher.patches_uuid = base.patches_uuid if nobody_elses else uuid.uuid4()


class PreparedEvaluation:
    """A step's evaluation is prepared before the host's own, which then only passes it on."""

    def evaluate(self, model: Any, cond: list, uncond: list | None, x: Tensor, sigma: Tensor, options: dict) -> None:
        from backend.sampling.sampling_function import calc_cond_uncond_batch

        calc_cond_uncond_batch(model, cond, uncond, x, sigma, options)

    def replace_evaluation(self, unet: Any, evaluation: Evaluation) -> Callable[[], None]:
        def before_cfg(model, cond, uncond, x, sigma, options):
            functions = options["sampler_pre_cfg_function"]
            after = functions[functions.index(before_cfg) + 1 :]
            if after:
                from loratorio_ext.hosts.forge_company import name_of

                raise UnsupportedError(
                    f"LoRAtorio: {', '.join(map(name_of, after))} would change a step that is composed already; switch "
                    "it off, or LoRAtorio"
                )
            composed = evaluation(model, cond, uncond, x, sigma, options)
            predicted = {kind: rows for kind, rows in enumerate(composed) if rows is not None}
            others = options.get(WRAPPER)

            def hand_over(apply_model, args):
                """The evaluated rows, once; whoever evaluates the model beside the host gets the model."""
                kinds = args["cond_or_uncond"]
                if all(kind in predicted for kind in kinds):
                    return torch.cat([predicted.pop(kind) for kind in kinds])
                if others is not None:
                    return others(apply_model, args)
                return apply_model(args["input"], args["timestep"], **args["c"])

            # One entry a kind is enough, with the weight 1, and without a ControlNet, which would be run for nothing.
            cond = [{key: value for key, value in cond[0].items() if key != "control"} | {"strength": 1.0}]
            if uncond is not None:
                uncond = [{key: value for key, value in uncond[0].items() if key != "control"}]
            return model, cond, uncond, x, sigma, options | {WRAPPER: hand_over}

        unet.add_sampler_pre_cfg_function(before_cfg)
        return lambda: unet.model_options["sampler_pre_cfg_function"].remove(before_cfg)


# --- the hosts --------------------------------------------------------------------------------------------------------


class Forge(Plain, PreparedEvaluation):
    """Patches lie by file."""

    store = "lora_patches"

    def patches(self, patcher: Any, before: Any) -> Patches:
        found: Patches = {}
        for identifier, by_name in patcher.lora_patches.items():
            if identifier not in before.lora_patches:
                for name, patches in by_name.items():
                    found.setdefault(name, []).extend(patches)
        return found

    def strip(self, patcher: Any, loaded: Any, original: Any, base: Any) -> None:
        prompts = loaded.lora_patches.keys() - original.lora_patches.keys()
        kept = {key: value for key, value in patcher.lora_patches.items() if key not in prompts}
        patcher.lora_patches = kept | base.lora_patches

    @staticmethod
    def dense(weight: Tensor) -> Tensor:
        """A weight as numbers."""
        if hasattr(weight, "bnb_quantized"):
            from backend.operations_bnb import functional_dequantize_4bit

            return functional_dequantize_4bit(weight)
        if hasattr(weight, "gguf_cls"):
            from backend.operations_gguf import dequantize_tensor

            return dequantize_tensor(weight)
        return weight

    def weight(self, layer: nn.Module, leaf: str) -> Tensor:
        weight = self.dense(getattr(layer, leaf))
        scale = getattr(layer, "scale_weight", None) if leaf == "weight" else None
        if scale is not None:
            weight = weight.float() * scale.float()
        in_passing = (getattr(layer, "forge_online_loras", None) or {}).get(leaf)
        return self.merge(in_passing, weight.float(), leaf) if in_passing else weight

    def merge(self, patches: list, weight: Tensor, name: str) -> Tensor:
        from backend.patcher.lora import merge_lora_to_weight

        return merge_lora_to_weight(patches, weight, name, computation_dtype=torch.float32)


class Neo(Plain, PatchesByParameter, PreparedEvaluation):
    """The ``neo`` line of sd-webui-forge-classic: Forge's evaluation, and reForge's way to keep patches."""

    compiled = "_torch_compile_config"
    """What the host's own compilation leaves on a model."""

    def check(self, p: Any) -> None:
        from backend.args import dynamic_args

        if dynamic_args.nunchaku:
            raise UnsupportedError("LoRAtorio: LoRAs cannot be isolated in SVDQ (nunchaku) models")
        if dynamic_args.pid:
            raise UnsupportedError("LoRAtorio: PiD, which works on windows of the image, is not supported")
        if dynamic_args.wan and p.batch_size > 1:
            raise UnsupportedError(f"LoRAtorio: videos are not supported ({p.batch_size} frames were asked for)")
        compiled = hasattr(p.sd_model.forge_objects_original.unet.model, self.compiled)
        if compiled and not hasattr(torch.compiler, "set_stance"):
            raise UnsupportedError("LoRAtorio: torch.compile hides LoRAs before torch 2.6; switch it off, or LoRAtorio")

    @contextmanager
    def encoding(self, model: Any) -> Iterator[None]:
        """Edit models take up the images that they refer to when the host encodes the prompt, once; a text encoder that
        looks at them, too, cannot be asked again."""
        from backend.args import dynamic_args

        references = dynamic_args.ref_latents
        if references and hasattr(model, "get_learned_conditioning_with_image"):
            raise UnsupportedError(
                "LoRAtorio: the text encoder of this model reads the images to edit, so LoRAs that change it cannot be "
                "composed; set their text encoder weight to 0 (te=0)"
            )
        dynamic_args.ref_latents = list(references)
        try:
            yield
        finally:
            dynamic_args.ref_latents = references

    def counts_rows(self) -> bool:
        from backend.args import dynamic_args

        return bool(dynamic_args.ref_latents) or dynamic_args.concat_latent is not None

    def read(self, networks: ModuleType, file: str) -> dict[str, Tensor]:
        weights = networks.load_lora_state_dict(file)
        doubled, usual = "lora_unet__", "lora_unet_"
        return {usual + key[len(doubled) :] if key.startswith(doubled) else key: weights[key] for key in weights}

    def load(
        self, networks: ModuleType, unet: Any, clip: Any, weights: dict, strengths: tuple[float, float], file: str
    ) -> tuple[Any, Any]:
        """Into weights in GGUF the host cannot merge: they would be destroyed, for every image to come."""
        from backend.args import dynamic_args

        in_passing = bool(dynamic_args.online_lora)
        return networks.load_lora_for_models(unet, clip, weights, *strengths, filename=file, online_mode=in_passing)

    @staticmethod
    def dense(weight: Tensor) -> Tensor:
        """A weight as numbers."""
        if hasattr(weight, "dequantize") and hasattr(weight, "requantize_from_float"):
            return weight.dequantize()
        if hasattr(weight, "bnb_quantized"):
            from backend.operations_bnb import functional_dequantize_4bit

            return functional_dequantize_4bit(weight)
        if getattr(weight, "gguf_cls", None) is not None:
            from backend.operations_gguf import dequantize_tensor

            return dequantize_tensor(weight)
        return weight

    def merge(self, patches: list, weight: Tensor, name: str) -> Tensor:
        from backend.patcher.lora import merge_lora_to_weight

        return merge_lora_to_weight(patches, weight.to(torch.float32, copy=True), name)


class ReForge(Plain, PatchesByParameter):
    """The step's evaluation is replaceable as such."""

    evaluation = "sampler_calc_cond_batch_function"

    def merge(self, patches: list, weight: Tensor, name: str) -> Tensor:
        from ldm_patched.modules.lora import calculate_weight

        return calculate_weight(patches, weight.to(torch.float32, copy=True), name)

    def evaluate(self, model: Any, cond: list, uncond: list | None, x: Tensor, sigma: Tensor, options: dict) -> None:
        from ldm_patched.modules.samplers import calc_cond_batch

        others = options.get(self.evaluation)
        if others is None:
            calc_cond_batch(model, [cond, uncond], x, sigma, options)
        else:
            args = {"conds": [cond, uncond], "input": x, "sigma": sigma, "model": model, "model_options": options}
            others(args)

    def replace_evaluation(self, unet: Any, evaluation: Evaluation) -> Callable[[], None]:
        others = unet.model_options.get(self.evaluation)

        def calculate(args):
            options = {key: value for key, value in args["model_options"].items() if key != self.evaluation}
            if others is not None:
                options[self.evaluation] = others
            cond, uncond = evaluation(args["model"], *args["conds"], args["input"], args["sigma"], options)
            return [cond, torch.zeros_like(cond) if uncond is None else uncond]

        def undo():
            unet.model_options.pop(self.evaluation, None)
            if others is not None:
                unet.model_options[self.evaluation] = others

        unet.set_model_sampler_calc_cond_batch_function(calculate)
        return undo


def backend_of(unet: Any) -> Backend:
    """The way of the host that this UNet patcher belongs to: told by whose module it is, since patchers look alike, and
    offer what their hosts do not use."""
    packages = {kind.__module__.partition(".")[0] for kind in type(unet).__mro__}
    if "backend" in packages:
        return Forge() if hasattr(unet, "lora_patches") else Neo()
    if "ldm_patched" in packages and hasattr(unet, "set_model_sampler_calc_cond_batch_function"):
        return ReForge()
    raise UnsupportedError("LoRAtorio: this version of the WebUI offers no way to evaluate LoRAs one by one")
