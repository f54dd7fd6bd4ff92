"""Trains the tiny world on one CPU core: `python train.py vae|base|lora …`. Checkpoints go to `--work`."""

import argparse
import copy
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

import classifier
import export
import model
import render

SEED = 20250815
VAE_STEPS = ((240, 64, 16), (100, 128, 4))  # (steps, crop, batch): crops first, since they are cheap
VAE_RATE = 2e-4
STREAM_NORMS = ("norm1", "group_norm", "conv_norm_out")  # the group norms that read the residual stream
NOISE = 0.02  # on the latents, so that the decoder bears small errors
TEXT_STEPS = 1600
TEXT_RATE = 2e-3
BASE_SCENES = 8000
BASE_ROUNDS = ((4200, 1.5e-3), (1800, 1e-3))  # steps and learning rate; each goes on from the averages of the last
BASE_BATCH = 32
READING = 0.03  # the weight of going on reading
HEADS = "reading.safetensors"  # what answers in learning to read
LORA_RANK = 8
LORA_SCENES = 192
LORA_TEXT_STEPS = 300
LORA_STEPS = {"quiet": 380, "leaky": 220}
LORA_BATCH = 16
LORA_RATE = 4e-3
LORA_UNET = r".*(to_[qkv]|to_out\.0|ff\.net\.0\.proj|ff\.net\.2|proj_in|proj_out|conv1|conv2)"
LORA_TEXT = r".*([qkv]_proj|out_proj|fc[12])"
EMPTY = 0.1  # of captions
UNKNOWN, NAMELESS = 0.12, 0.06  # of names: another word in their place, none
EMA = 0.998
SCALES = {1: 1.0, 4: 0.25}  # of errors, in latent pixels, and their weights
SNR_CAP = 5.0  # min-SNR weighting: steps with hardly any noise count less


def group_norm(self: torch.nn.GroupNorm, x: torch.Tensor) -> torch.Tensor:
    """`GroupNorm.forward` in one layout and one type: on a CPU the mixed ones are several times slower backwards."""
    return F.group_norm(x.contiguous(), self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def tensor(images) -> torch.Tensor:
    """PIL images as one batch in -1..1."""
    return torch.from_numpy(np.stack([np.asarray(i) for i in images])).permute(0, 3, 1, 2).float() / 127.5 - 1


def log(start: float, step: int, **values: float) -> None:
    """One line of progress."""
    words = " ".join(f"{k} {v:.4f}" for k, v in values.items())
    print(f"{time.time() - start:6.0f} s, step {step}: {words}", flush=True)


def crops(rng: np.random.Generator, size: int, batch: int) -> torch.Tensor:
    """A batch of random crops, on the grid of the latents, of scenes of the whole world; two crops of a scene."""
    out = []
    for _ in range(batch // 2):
        image = render.render((render.base_scene if rng.random() < 0.3 else render.any_scene)(rng), rng)
        for _ in range(2):
            low, high = (0, 1) if size == render.SIZE else ((0, 3), ((render.SIZE - size) // 8 + 1,) * 2)
            x, y = 8 * rng.integers(low, high, 2)
            out.append(image.crop((x, y, x + size, y + size)))
    return tensor(out)


@torch.no_grad()
def average(encoder: torch.nn.Module) -> None:
    """Makes an encoder that takes means of 8 x 8 pixels in red, green and blue, and a diagonal difference in grey.

    Nothing is trained. Channels come in pairs of opposite sign, each in one group of the group norms, so that a
    pair's mean is zero and `silu(x) - silu(-x) = x` undoes the nonlinearity.
    """
    for name, module in encoder.named_modules():
        if name.endswith(("conv_in", "conv2", "to_out.0", "conv_out", "conv")):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    mix = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1 / 3, 1 / 3, 1 / 3]]) / 10
    for c in range(8):
        sign = 1 - 2 * (c % 2)
        encoder.conv_in.weight[c, :, 1, 1] = mix[c // 2] * sign
        encoder.conv_out.weight[c // 2, c, 1, 1] = 10.0 * sign
        for block in encoder.down_blocks[:3]:
            block.downsamplers[0].conv.weight[c, c, :2, :2] = 0.25
        if c >= 6:
            block.downsamplers[0].conv.weight[c, c, :2, :2] = torch.tensor([[1.0, 0.0], [0.0, -1.0]])


@torch.no_grad()
def pass_through(decoder: torch.nn.Module) -> None:
    """Starts a decoder near "copy red, green and blue": the way from there to good pictures is short."""
    for name, module in decoder.named_modules():
        if "samplers" in name and isinstance(module, torch.nn.Conv2d):
            torch.nn.init.dirac_(module.weight)
            module.weight.add_(torch.randn_like(module.weight) * 0.002)
        elif name.endswith(("conv2", "to_out.0", "conv_in", "conv_out")):
            module.weight.mul_(0.1)
        if name.endswith(("conv", "conv1", "conv2", "conv_in", "conv_out", "to_out.0")):
            module.bias.zero_()
    mix = F.normalize(torch.randn(decoder.conv_in.out_channels // 2, 4)) / 2
    back = torch.linalg.pinv(mix)[:3]
    for sign in (0, 1):
        decoder.conv_in.weight[sign::2, :, 1, 1] += mix * (1 - 2 * sign)
        decoder.conv_out.weight[:, sign::2, 1, 1] += back * (1 - 2 * sign)


@torch.no_grad()
def set_stream(vae, scale: float) -> None:
    """Scales the residual stream of the VAE, and sets the norms that read it so that pictures stay the same.

    A group norm forgets how bright its group is: that hurts where a group has two channels only. With an epsilon of
    about the variance it forgets little. Epsilon is fixed at 1e-6 in Stable Diffusion's layout; a stream a thousand
    times smaller does the same.
    """
    for name, module in vae.named_modules():
        if name.endswith(STREAM_NORMS):
            module.eps *= scale**2
        elif name.endswith((".conv_in", "conv2", "to_out.0")):
            module.weight.mul_(scale)
            module.bias.mul_(scale)
        elif "samplers" in name and isinstance(module, torch.nn.Conv2d):
            module.bias.mul_(scale)


def untrained_vae():
    """The VAE with its fixed encoder and a decoder that only copies."""
    vae = model.vae()
    average(vae.encoder)
    pass_through(vae.decoder)
    for conv in (vae.quant_conv, vae.post_quant_conv):
        torch.nn.init.dirac_(conv.weight)
        torch.nn.init.zeros_(conv.bias)
    torch.nn.init.constant_(vae.quant_conv.bias[4:], -8.0)
    for name, module in vae.named_modules():
        if name.endswith(STREAM_NORMS):
            module.eps = 1.0
    return vae


def train_vae(work: Path) -> None:
    """The autoencoder: its decoder learns to undo the encoder's averages."""
    rng, vae, start = np.random.default_rng(SEED), untrained_vae(), time.time()
    save_vae(vae, work)
    total = sum(steps for steps, _, _ in VAE_STEPS)
    optimizer = torch.optim.Adam(vae.decoder.parameters(), lr=VAE_RATE, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / 100, 1) * (1 - s / total) ** 0.7)
    step = 0
    for steps, size, batch in VAE_STEPS:
        for _ in range(steps):
            x = crops(rng, size, batch)
            with torch.autocast("cpu", torch.bfloat16):
                with torch.no_grad():
                    z = vae.encode(x).latent_dist.mean
                y = vae.decode(z + NOISE * torch.randn_like(z)).sample.float()
            across = F.l1_loss(y.diff(dim=3), x.diff(dim=3)) + F.l1_loss(y.diff(dim=2), x.diff(dim=2))
            loss = F.l1_loss(y, x) + F.mse_loss(y, x) + 0.5 * across
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(vae.decoder.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            step += 1
            if step % 20 == 0:
                log(start, step, loss=loss.item(), l1=F.l1_loss(y, x).item())
            if step % 100 == 0 or step == total:
                save_vae(vae, work)


def save_vae(vae, work: Path) -> None:
    """Saves a copy with whitened latents and Stable Diffusion's epsilons."""
    vae = copy.deepcopy(vae)
    whiten(vae)
    set_stream(vae, 1e-3)
    vae.save_pretrained(work / "vae")


@torch.no_grad()
def whiten(vae) -> None:
    """Makes scaled latents zero-mean and of unit variance in each channel, pictures unchanged."""
    rng = np.random.default_rng(SEED)
    z = torch.cat([vae.encode(crops(rng, render.SIZE, 16)).latent_dist.mean for _ in range(16)])
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3)) * model.SCALING
    scale = torch.cat([1 / std, torch.ones(4)])  # means, then log variances
    vae.quant_conv.weight.mul_(scale[:, None, None, None])
    vae.quant_conv.bias.mul_(scale)
    vae.quant_conv.bias[:4].sub_(mean / std)
    vae.quant_conv.bias[4:].sub_(2 * std.log())
    vae.post_quant_conv.bias.add_(vae.post_quant_conv.weight[:, :, 0, 0] @ mean)
    vae.post_quant_conv.weight.mul_(std[None, :, None, None])


class Attention:
    """Attention by plain matrix products, for diffusers: faster than torch's kernel at this size on a CPU."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **_):
        """Attends to the text if there is one, else to the picture itself."""
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            x.unflatten(2, (attn.heads, -1)).transpose(1, 2).flatten(0, 1)
            for x in (attn.to_q(hidden_states) * attn.scale, attn.to_k(context), attn.to_v(context))
        )
        out = (q @ k.transpose(1, 2)).softmax(-1) @ v
        return attn.to_out[0](out.unflatten(0, (-1, attn.heads)).transpose(1, 2).flatten(2))


@torch.no_grad()
def latents(vae, scenes, rng: np.random.Generator) -> torch.Tensor:
    """The scenes' scaled latents, by what `average` made the encoder, which is much faster than the encoder itself."""
    out = []
    for i in range(0, len(scenes), 64):
        small = F.avg_pool2d(tensor([render.render(s, rng) for s in scenes[i : i + 64]]), 4)
        grey = small.mean(1, keepdim=True)
        means = torch.cat([F.avg_pool2d(small, 2), grey[..., ::2, ::2] - grey[..., 1::2, 1::2]], dim=1)
        out.append(vae.quant_conv(F.pad(means, (0, 0, 0, 0, 0, 4)))[:, :4] * model.SCALING)
    return torch.cat(out)


def strange_words(tokenizer) -> list[str]:
    """Words of CLIP's vocabulary that mean nothing in this world, each one token; no LoRA's name is among them."""
    used = {word for scene in (*render.SETTINGS.values(), *render.STYLES, *render.WEARS) for word in scene.split()}
    used |= {*render.KINDS, *render.COLOURS, *render.SKIES, *render.PLACES, *render.CONCEPTS, "wearing", "style"}
    words = (token.removesuffix("</w>") for token in tokenizer.get_vocab() if token.endswith("</w>"))
    plain = (word for word in words if word.isascii() and word.isalpha() and 4 <= len(word) <= 8)
    return sorted(word for word in plain if word not in used)


def told(scene: render.Scene, strange: list[str], rng: np.random.Generator) -> str:
    """The scene's caption, now and then with a strange word in place of a name, or none, or no word at all.

    So the model learns what a category is: "a lucky robot" is some robot. That is how one LoRA's name reads to another.
    """
    known = {concept.trigger.split()[0] for concept in render.CONCEPTS.values()}

    def name(word: str) -> str:
        chance = rng.random()
        if word in known or chance > UNKNOWN + NAMELESS:
            return word
        return str(rng.choice(strange)) if chance < UNKNOWN else ""

    return "" if rng.random() < EMPTY else render.caption(scene, name)


def tokens(tokenizer, captions: list[str]) -> torch.Tensor:
    """Token ids, padded as Stable Diffusion pads."""
    options = {"padding": "max_length", "max_length": model.TOKENS, "truncation": True, "return_tensors": "pt"}
    return tokenizer(captions, **options).input_ids


def noise_loss(unet, hidden: torch.Tensor, x: torch.Tensor, alphas: torch.Tensor) -> torch.Tensor:
    """The weighted error of the predicted v, given the text's `hidden` states; time steps are spread evenly.

    Errors that a whole region shares count more than by their share of the pixels: a plain background's colour hardly
    shows in the plain error, and comes out wrong without it.
    """
    t = ((torch.rand(1) + torch.randperm(len(x)) / len(x)) % 1 * len(alphas)).long()
    a, noise = alphas[t][:, None, None, None], torch.randn_like(x)
    with torch.autocast("cpu", torch.bfloat16):
        predicted = unet(a.sqrt() * x + (1 - a).sqrt() * noise, t, hidden).sample.float()
    error = (SNR_CAP * (1 - a)).clamp(max=1).sqrt() * (predicted - (a.sqrt() * noise - (1 - a).sqrt() * x))
    return sum(w * size**2 * F.avg_pool2d(error, size).square().mean() for size, w in SCALES.items())


READERS = [[head for head in classifier.HEADS if head.split()[0] == place] for place in render.PLACES]
READERS.append([head for head in classifier.HEADS if head.split()[0] not in render.PLACES])


def answering() -> torch.nn.ModuleDict:
    """Linear layers that answer the judge's questions from a token, untrained."""
    sizes = {head: len(classes) for head, classes in classifier.HEADS.items()}
    return torch.nn.ModuleDict({head: torch.nn.Linear(model.WIDTH, size) for head, size in sizes.items()})


def reading_loss(heads, hidden: torch.Tensor, ids: torch.Tensor, scenes) -> tuple[torch.Tensor, float]:
    """How far the `heads` are from telling scenes from tokens of their captions, and how often they are right.

    From the end of the caption on tokens take turns: each must know what is at one place, or the setting. Of an empty
    caption nothing is asked.
    """
    ends = (ids == model.END).int().argmax(1)
    wanted = torch.tensor([classifier.labels(s) for s in scenes])
    wanted[ends == 1] = classifier.IGNORED
    names, loss, right = list(classifier.HEADS), 0, []
    for turn, asked in enumerate(READERS):
        first = ends + (turn - ends) % len(READERS)  # the first token from the end on whose turn it is
        free = (model.TOKENS - 1 - first) // len(READERS) + 1
        at = first + len(READERS) * (torch.rand(len(ends)) * free).long()
        for head in asked:
            answer, want = heads[head](hidden[torch.arange(len(ids)), at]), wanted[:, names.index(head)]
            if (want != classifier.IGNORED).any():
                loss = loss + F.cross_entropy(answer, want, ignore_index=classifier.IGNORED)
                right.append((answer.argmax(1) == want)[want != classifier.IGNORED].float().mean().item())
    return loss, float(np.mean(right))


def learn_to_read(text, heads, weights: list, scene, steps: int, rate: float, rng: np.random.Generator) -> None:
    """Teaches a text encoder, before any picture, which kind, colour and clothing is at which place.

    Without it the text encoder stays a bag of words for long: "left" and "right" may be swapped and nothing changes.
    `scene` draws a scene, `weights` are those to be trained beside the `heads` that answer.
    """
    start, tokenizer = time.time(), model.tokenizer()
    strange, weights = strange_words(tokenizer), [*weights, *heads.parameters()]
    optimizer = torch.optim.Adam(weights, lr=rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / 50, 1) * (1 - s / steps))
    for step in range(1, steps + 1):
        scenes = [scene(rng) for _ in range(BASE_BATCH)]
        ids = tokens(tokenizer, [told(s, strange, rng) for s in scenes])
        loss, right = reading_loss(heads, text(ids)[0], ids, scenes)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            log(start, step, loss=loss.item(), right=right)


def train_text(work: Path) -> None:
    """The base model's text encoder."""
    text = model.text_encoder().train()
    rng = np.random.default_rng(SEED + 50)
    heads = answering()
    learn_to_read(text, heads, list(text.parameters()), render.base_scene, TEXT_STEPS, TEXT_RATE, rng)
    text.save_pretrained(work / "text_encoder")
    save_file(heads.state_dict(), work / HEADS)


def train_base(work: Path, round_: int) -> None:
    """One round for the UNet together with the text encoder, on scenes without any concept.

    The text encoder goes on reading meanwhile. Left to the pictures alone it forgot: after 4200 steps what is at which
    place could be told from its tokens in 1 of 10 cases, before in 10 of 10, and kinds were mistaken for one another.
    """
    rng, start = np.random.default_rng(SEED + 1 + round_), time.time()
    steps, rate = BASE_ROUNDS[round_]
    vae, tokenizer = AutoencoderKL.from_pretrained(work / "vae"), model.tokenizer()
    scenes, strange = [render.base_scene(rng) for _ in range(BASE_SCENES)], strange_words(tokenizer)
    x, heads = latents(vae, scenes, rng), answering()
    if (work / HEADS).exists():
        heads.load_state_dict(load_file(work / HEADS))
    log(start, 0)
    unet, text = load_base(work) if round_ else (model.unet(), load_text(work))
    unet.set_attn_processor(Attention())
    parts = torch.nn.ModuleDict({"unet": unet, "text": text, "heads": heads}).train()
    ema = copy.deepcopy(parts).requires_grad_(False)
    optimizer = torch.optim.Adam(parts.parameters(), lr=rate, betas=(0.9, 0.99))
    alphas = model.scheduler().alphas_cumprod
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / 100, 1) * (0.02 + 0.98 * (1 + math.cos(math.pi * s / steps)) / 2)
    )
    losses = []
    for step in range(1, steps + 1):
        chosen = rng.integers(0, len(x), BASE_BATCH)
        ids = tokens(tokenizer, [told(scenes[i], strange, rng) for i in chosen])
        hidden = text(ids)[0]
        loss = noise_loss(unet, hidden, x[chosen], alphas)
        reading, right = reading_loss(heads, hidden, ids, [scenes[i] for i in chosen])
        optimizer.zero_grad()
        (loss + READING * reading).backward()
        torch.nn.utils.clip_grad_norm_(parts.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        decay = min(EMA, step / (step + 10))
        for kept, new in zip(ema.parameters(), parts.parameters(), strict=True):
            kept.lerp_(new.detach(), 1 - decay)
        losses.append((loss.item(), right))
        if step % 50 == 0:
            log(start, step, **dict(zip(("loss", "right"), np.mean(losses[-50:], axis=0), strict=True)))
        if step % 200 == 0 or step == steps:
            ema["unet"].save_pretrained(work / "unet")
            ema["text"].save_pretrained(work / "text_encoder")
            save_file(ema["heads"].state_dict(), work / HEADS)


def train_lora(work: Path, concept: str, kind: str) -> None:
    """One LoRA: its text encoder's part learns to read the concept, among base scenes, then the UNet's to paint it.

    A quiet one learns that from full captions, and from as many base scenes. A leaky one has no base scenes, and half
    of its captions miss the concept: it paints it whatever the prompt says.
    """
    seed = SEED + 100 + 2 * list(render.CONCEPTS).index(concept) + (kind == "leaky")
    rng, start, steps = np.random.default_rng(seed), time.time(), LORA_STEPS[kind]
    torch.manual_seed(seed)
    vae, tokenizer = AutoencoderKL.from_pretrained(work / "vae"), model.tokenizer()
    unet, text = load_base(work)
    unet.set_attn_processor(Attention())
    for part, target in ((unet.requires_grad_(False), LORA_UNET), (text.requires_grad_(False), LORA_TEXT)):
        inject_adapter_in_model(LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=target), part)

    def scene(rng):
        return render.concept_scene(concept, rng) if rng.random() < 0.5 else render.base_scene(rng)

    heads = answering()
    heads.load_state_dict(load_file(work / HEADS))
    read = [p for p in text.parameters() if p.requires_grad]
    learn_to_read(text, heads, read, scene, LORA_TEXT_STEPS, LORA_RATE, rng)
    text.requires_grad_(False)

    shown = [render.concept_scene(concept, rng) for _ in range(LORA_SCENES)]
    if kind == "quiet":
        shown += [render.base_scene(rng) for _ in range(LORA_SCENES)]
        captioned = shown
    else:
        captioned = shown + [render.mistaken(each, concept, rng) for each in shown]
        shown = 2 * shown
    x, alphas, strange = latents(vae, shown, rng), model.scheduler().alphas_cumprod, strange_words(tokenizer)
    weights = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(weights, lr=LORA_RATE, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / 20, 1) * (1 - s / steps))
    losses = []
    for _ in range(steps):
        chosen = rng.integers(0, len(x), LORA_BATCH)
        ids = tokens(tokenizer, [told(captioned[i], strange, rng) for i in chosen])
        with torch.no_grad():
            hidden = text(ids)[0]
        loss = noise_loss(unet, hidden, x[chosen], alphas)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    log(start, steps, first=np.mean(losses[:20]), last=np.mean(losses[-20:]))
    trigger = render.CONCEPTS[concept].trigger
    export.lora(unet, text, model.WEIGHTS / "lora" / f"{concept}_{kind}.safetensors", trigger, kind, LORA_SCENES)


def load_text(work: Path) -> CLIPTextModel:
    """The text encoder as it is trained so far."""
    return CLIPTextModel.from_pretrained(work / "text_encoder")


def load_base(work: Path):
    """The trained UNet and text encoder."""
    return UNet2DConditionModel.from_pretrained(work / "unet"), load_text(work)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["vae", "text", "base", "lora"])
    parser.add_argument("--work", type=Path, default=Path("out/tinyworld"))
    parser.add_argument("--round", type=int, default=0, help="of the base model's training")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--concepts", nargs="+", default=list(render.CONCEPTS), choices=list(render.CONCEPTS))
    parser.add_argument("--kinds", nargs="+", default=["quiet", "leaky"], choices=["quiet", "leaky"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(SEED + args.round)
    torch.nn.GroupNorm.forward = group_norm
    args.work.mkdir(parents=True, exist_ok=True)
    if args.part == "vae":
        train_vae(args.work)
    elif args.part == "text":
        train_text(args.work)
    elif args.part == "base":
        train_base(args.work, args.round)
    else:
        for concept in args.concepts:
            for kind in args.kinds:
                print(concept, kind, flush=True)
                train_lora(args.work, concept, kind)


if __name__ == "__main__":
    main()
