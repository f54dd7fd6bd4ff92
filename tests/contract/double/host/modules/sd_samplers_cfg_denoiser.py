"""Classifier-free guidance: one call of the model with the rows of all prompts, and what becomes of its output."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modules import prompt_parser, script_callbacks, shared
from modules.sd_samplers_common import InterruptedException


def catenate_conds(conds: Sequence) -> Any:
    if isinstance(conds[0], dict):
        return {key: torch.cat([cond[key] for cond in conds]) for key in conds[0]}
    return torch.cat(list(conds))


def change_tokens(cond: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The conditioning with its tokens' vectors changed; one of several tensors is, as in the host, changed itself."""
    if not isinstance(cond, dict):
        return change(cond)
    cond["crossattn"] = change(cond["crossattn"])
    return cond


def subscript_cond(cond: Any, a: int, b: int) -> Any:
    return {key: value[a:b] for key, value in cond.items()} if isinstance(cond, dict) else cond[a:b]


class CFGDenoiser(nn.Module):
    """``inner_model(x, sigma, cond=...)`` is the wrapped model; ``step`` counts the calls, of ``total_steps``."""

    mask_before_denoising = False

    def __init__(self, sampler: Any, inner_model: nn.Module):
        super().__init__()
        self.sampler, self.inner_model = sampler, inner_model
        self.p = self.mask = self.nmask = self.init_latent = self.total_steps = None
        self.step = 0
        self.cond_scale_miltiplier = 1.0
        self.last_noise_uncond = None
        self.padded_cond_uncond = self.padded_cond_uncond_v0 = False

    def pad_cond_uncond(self, cond: Any, uncond: Any) -> tuple[Any, Any]:
        """The shorter one is filled up with the empty prompt's vectors."""
        empty = shared.sd_model.cond_stage_model_empty_prompt
        missing = (cond.shape[1] - uncond.shape[1]) // empty.shape[1]
        self.padded_cond_uncond |= missing != 0

        def padded(text: Tensor, times: int) -> Tensor:
            return torch.cat([text, empty.repeat(len(text), max(times, 0), 1)], dim=1)

        return (
            change_tokens(cond, lambda text: padded(text, -missing)),
            change_tokens(uncond, lambda text: padded(text, missing)),
        )

    def pad_cond_uncond_v0(self, cond: Any, uncond: Any) -> tuple[Any, Any]:
        """The negative is cut, or filled up with its last vector."""
        length = cond.shape[1]
        self.padded_cond_uncond_v0 |= uncond.shape[1] != length

        def fitted(text: Tensor) -> Tensor:
            return torch.cat([text, text[:, -1:].repeat(1, max(length - text.shape[1], 0), 1)], dim=1)[:, :length]

        return cond, change_tokens(uncond, fitted)

    def blend(self, latent: Tensor) -> Tensor:
        """The masked part of the latents, in the original's."""
        return latent if self.mask is None else latent * self.nmask + self.init_latent * self.mask

    def predicted_x0(self, x: Tensor, output: Tensor, sigma: Tensor) -> Tensor:
        return output

    def skips_uncond(self, sigma: Tensor, s_min_uncond: float) -> bool:
        opts, params = shared.opts, self.p.extra_generation_params
        if opts.skip_early_cond != 0 and self.step / self.total_steps <= opts.skip_early_cond:
            params["Skip Early CFG"] = opts.skip_early_cond
            return True
        if (self.step % 2 or opts.s_min_uncond_all) and s_min_uncond > 0 and sigma[0] < s_min_uncond:
            params["NGMS"] = s_min_uncond
            if opts.s_min_uncond_all:
                params["NGMS all steps"] = True
            return True
        return False

    def forward(self, x, sigma, uncond, cond, cond_scale, s_min_uncond, image_cond):
        state, opts = shared.state, shared.opts
        if state.interrupted or state.skipped:
            raise InterruptedException
        conds_list, text = prompt_parser.reconstruct_multicond_batch(cond, self.step)
        uncond = prompt_parser.reconstruct_cond_batch(uncond, self.step)
        if self.mask_before_denoising:
            x = self.blend(x)

        images = [image for image, rows in enumerate(conds_list) for _ in rows] + list(range(len(conds_list)))
        params = script_callbacks.CFGDenoiserParams(
            x[images], image_cond[images], sigma[images], state.sampling_step, state.sampling_steps, text, uncond, self
        )
        script_callbacks.call("cfg_denoiser", params)
        x_in, image_cond, sigma_in = params.x, params.image_cond, params.sigma
        text, uncond = params.text_cond, params.text_uncond

        batch = len(conds_list)
        skip = self.skips_uncond(sigma, s_min_uncond)
        if skip:
            x_in, sigma_in = x_in[:-batch], sigma_in[:-batch]  # and, as in the host, not the image conditioning
        self.padded_cond_uncond = self.padded_cond_uncond_v0 = False
        if opts.pad_cond_uncond_v0:
            text, uncond = self.pad_cond_uncond_v0(text, uncond)
        elif opts.pad_cond_uncond:
            text, uncond = self.pad_cond_uncond(text, uncond)

        def evaluate(cond: Any, first: int, last: int, rows: int) -> Tensor:
            """The model's output for rows ``first`` to ``last``, with ``cond`` for them, so many ``rows`` a call."""
            outputs = []
            for start in range(first, last, rows):
                here = slice(start, min(start + rows, last))
                others = image_cond if rows == len(x_in) else image_cond[here]
                part = subscript_cond(cond, start - first, here.stop - first)
                part = part if isinstance(part, dict) else {"c_crossattn": [part]}
                outputs.append(self.inner_model(x_in[here], sigma_in[here], cond={**part, "c_concat": [others]}))
            return torch.cat(outputs)

        if skip or text.shape[1] == uncond.shape[1]:
            rows = text if skip else catenate_conds([text, uncond])
            output = evaluate(rows, 0, len(x_in), len(x_in) if opts.batch_cond_uncond else batch)
        else:
            conds = len(x_in) - batch
            output = evaluate(text, 0, conds, 2 * batch if opts.batch_cond_uncond else batch)
            output = torch.cat([output, evaluate(uncond, conds, len(x_in), batch)])
        first_rows = [rows[0][0] for rows in conds_list]
        if skip:
            output = torch.cat([output, output[first_rows]])

        script_callbacks.call(
            "cfg_denoised",
            script_callbacks.CFGDenoisedParams(output, state.sampling_step, state.sampling_steps, self.inner_model),
        )

        unguided = output[-batch:]
        self.last_noise_uncond = unguided.clone()
        denoised = unguided.clone()
        scale = 1.0 if skip else cond_scale * self.cond_scale_miltiplier
        for image, rows in enumerate(conds_list):
            for row, weight in rows:
                denoised[image] += (output[row] - unguided[image]) * (weight * scale)
        if not self.mask_before_denoising:
            denoised = self.blend(denoised)
        self.sampler.last_latent = self.predicted_x0(x_in[first_rows], output[first_rows], sigma)
        state.current_latent = self.sampler.last_latent

        after = script_callbacks.AfterCFGCallbackParams(denoised, state.sampling_step, state.sampling_steps)
        script_callbacks.call("cfg_after_cfg", after)
        self.step += 1
        return after.x
