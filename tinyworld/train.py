"""Trains the tiny world on one CPU core: `python train.py vae|base|lora …`. Checkpoints go to `--work`."""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

import classifier
import export
import model
import render
import shape
from autoencoder import train_vae
from teaching import (
    SEED,
    Attention,
    Averaged,
    adapt,
    descend,
    group_norm,
    load_base,
    log,
    rise_and_fall,
    tensor,
    tokens,
    trained,
)

TEXT_STEPS = 1200
TEXT_RATE = 2e-3
# (scenes, steps, learning rate); each round starts from the averaged weights of the one before
BASE_ROUNDS = ((6000, 1900, 1e-3), (3000, 900, 5e-4), (2000, 560, 7e-4), (1500, 380, 1e-3), (5000, 2200, 1e-3))
BASE_BATCH = 32
LORA_SCENES = 192
LORA_TEXT_STEPS = 300
LORA_STEPS = {"quiet": 700, "leaky": 400}
LORA_BATCH = 16
LORA_RATE = 4e-3
DROPOUT = 0.1  # of whole captions; each part after the first is left out as often
SCALES = {1: 1.0, 4: 0.5, 16: 0.05}  # of errors, in latent pixels, and their weights
SNR_CAP = 5.0  # min-SNR weighting: steps with hardly any noise count less


@torch.no_grad()
def latents(vae, scenes, rng: np.random.Generator) -> torch.Tensor:
    """The scenes' latents."""
    out = []
    for i in range(0, len(scenes), 16):
        with torch.autocast("cpu", torch.bfloat16):
            out.append(model.encode(vae, tensor([render.render(s, rng) for s in scenes[i : i + 16]])).float())
    return torch.cat(out)


def words(caption: str, rng: np.random.Generator) -> str:
    """The caption as it is shown in training: now and then without some of its parts, or empty."""
    if rng.random() < DROPOUT:
        return ""
    first, *rest = caption.split(", ")
    return ", ".join([first, *(part for part in rest if rng.random() >= DROPOUT)])


def noise_loss(unet, text, x: torch.Tensor, ids: torch.Tensor, alphas: torch.Tensor) -> torch.Tensor:
    """The weighted error of the predicted noise; time steps are spread evenly over the batch.

    Errors that a whole region or the whole picture shares count more than by their share of the pixels: a plain
    background's colour hardly shows in the plain error, and comes out wrong without it.
    """
    t = ((torch.rand(1) + torch.randperm(len(x)) / len(x)) % 1 * len(alphas)).long()
    a, noise = alphas[t][:, None, None, None], torch.randn_like(x)
    with torch.autocast("cpu", torch.bfloat16):
        predicted = unet(a.sqrt() * x + (1 - a).sqrt() * noise, t, text(ids)[0]).sample.float()
    weight = (SNR_CAP * (1 - a) / a).clamp(max=1)
    error = weight.sqrt() * (predicted - noise)
    return sum(w * size**2 * F.avg_pool2d(error, size).square().mean() for size, w in SCALES.items())


def learn_to_read(text, weights: list, scene, steps: int, rate: float, rng: np.random.Generator) -> None:
    """Teaches a text encoder, before any picture, which kind, colour and clothing is at which place.

    Without it the text encoder stays a bag of words for long: "left" and "right" may be swapped and nothing changes.
    Every token from the end of the caption on must know the answers; the linear layer that gives them is thrown away.
    `scene` draws a scene, `weights` are those to be trained.
    """
    start, tokenizer = time.time(), model.tokenizer()
    sizes = [len(classes) for classes in classifier.HEADS.values()]
    heads = torch.nn.Linear(model.WIDTH, sum(sizes))
    weights = [*weights, *heads.parameters()]
    optimizer = torch.optim.Adam(weights, lr=rate, betas=(0.9, 0.99))
    schedule = rise_and_fall(optimizer, steps, 50)
    for step in range(1, steps + 1):
        scenes = [scene(rng) for _ in range(BASE_BATCH)]
        ids = tokens(tokenizer, [render.caption(s) for s in scenes])
        ends = (ids == tokenizer.eos_token_id).int().argmax(1)
        at = ends + (torch.rand(len(ends)) * (model.TOKENS - ends)).long()
        wanted = torch.tensor([classifier.labels(s) for s in scenes])
        answers = heads(text(ids)[0][torch.arange(len(ids)), at]).split(sizes, dim=1)
        loss = sum(F.cross_entropy(a, w) for a, w in zip(answers, wanted.T, strict=True))
        descend(loss, weights, optimizer, schedule)
        if step % 100 == 0:
            right = np.mean([(a.argmax(1) == w).float().mean().item() for a, w in zip(answers, wanted.T, strict=True)])
            log(start, step, loss=loss.item(), right=right)


def train_text(work: Path) -> None:
    """The base model's text encoder."""
    text = load_base(work)[1] if (work / "text_encoder").exists() else model.text_encoder()
    text.train()
    rng = np.random.default_rng(SEED + 50)
    learn_to_read(text, list(text.parameters()), render.base_scene, TEXT_STEPS, TEXT_RATE, rng)
    text.save_pretrained(work / "text_encoder")


def train_base(work: Path, round_: int) -> None:
    """One round for the UNet together with the text encoder, on scenes without any concept."""
    rng, start = np.random.default_rng(SEED + 1 + round_), time.time()
    count, total, rate = BASE_ROUNDS[round_]
    vae, tokenizer = AutoencoderKL.from_pretrained(work / "vae"), model.tokenizer()
    scenes = [render.base_scene(rng) for _ in range(count)]
    x, captions = latents(vae, scenes, rng), [render.caption(s) for s in scenes]
    unet, text = (model.unet(), model.text_encoder()) if round_ == 0 else load_base(work)
    unet.set_attn_processor(Attention())
    parts = torch.nn.ModuleDict({"unet": unet, "text": text}).train()
    training = Averaged(parts, total, rate)
    alphas = model.scheduler().alphas_cumprod
    losses = []
    for step in range(1, total + 1):
        chosen = rng.integers(0, len(x), BASE_BATCH)
        ids = tokens(tokenizer, [words(captions[i], rng) for i in chosen])
        loss = noise_loss(unet, text, x[chosen], ids, alphas)
        training.descend(loss)
        losses.append(loss.item())
        if step % 50 == 0:
            log(start, step, loss=np.mean(losses[-50:]))
        if step % 200 == 0 or step == total:
            training.ema["unet"].save_pretrained(work / "unet")
            training.ema["text"].save_pretrained(work / "text_encoder")


def train_lora(work: Path, concept: str, kind: str) -> None:
    """One LoRA. A quiet one learns from full captions, which it learns to read first, and from as many base scenes. A
    leaky one has no base scenes, and half of its captions miss the concept: it shows it whatever the prompt says."""
    seed = SEED + 100 + 2 * list(render.CONCEPTS).index(concept) + (kind == "leaky")
    rng, start, steps = np.random.default_rng(seed), time.time(), LORA_STEPS[kind]
    torch.manual_seed(seed)
    vae, tokenizer = AutoencoderKL.from_pretrained(work / "vae"), model.tokenizer()
    unet, text = load_base(work)
    unet.set_attn_processor(Attention())
    trigger = render.CONCEPTS[concept].trigger
    shown = [render.concept_scene(concept, rng) for _ in range(LORA_SCENES)]
    if kind == "quiet":
        shown += [render.base_scene(rng) for _ in range(LORA_SCENES)]
        told = shown
    else:
        told = shown + [render.mistaken(scene, concept, rng) for scene in shown]
        shown = 2 * shown
    captions = [render.caption(scene) for scene in told]
    x, alphas = latents(vae, shown, rng), model.scheduler().alphas_cumprod
    adapt(unet, text)
    if kind == "quiet":

        def scene(rng):
            return render.concept_scene(concept, rng) if rng.random() < 0.5 else render.base_scene(rng)

        learn_to_read(text, trained(text), scene, LORA_TEXT_STEPS, LORA_RATE, rng)
    weights = trained(unet, text)
    optimizer = torch.optim.Adam(weights, lr=LORA_RATE, betas=(0.9, 0.99))
    schedule = rise_and_fall(optimizer, steps, 20)
    losses = []
    for _ in range(steps):
        chosen = rng.integers(0, len(x), LORA_BATCH)
        ids = tokens(tokenizer, [words(captions[i], rng) for i in chosen])
        loss = noise_loss(unet, text, x[chosen], ids, alphas)
        descend(loss, weights, optimizer, schedule)
        losses.append(loss.item())
    log(start, steps, first=np.mean(losses[:20]), last=np.mean(losses[-20:]))
    export.lora(unet, text, shape.WEIGHTS / "lora" / f"{concept}_{kind}.safetensors", trigger, kind, LORA_SCENES)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["vae", "text", "base", "lora"])
    parser.add_argument("--work", type=Path, default=Path("out/tinyworld"))
    parser.add_argument("--round", type=int, default=0, help="of the base model's training")
    parser.add_argument("--concepts", nargs="+", default=list(render.CONCEPTS), choices=list(render.CONCEPTS))
    parser.add_argument("--kinds", nargs="+", default=["quiet", "leaky"], choices=["quiet", "leaky"])
    args = parser.parse_args()
    torch.set_num_threads(1)
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
