"""Trains the tiny world on one CPU core: `python train.py vae|base|lora …`. Checkpoints go to `--work`."""

import argparse
import time
from functools import partial, reduce
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

import classifier
import export
import model
import render
import shape
from autoencoder import averages, train_vae
from teaching import (
    SEED,
    Attention,
    Averaged,
    adapted,
    added,
    beside,
    descend,
    group_norm,
    hold,
    load_base,
    load_text,
    log,
    norms,
    rise_and_fall,
    silence,
    tensor,
    tokens,
    trained,
)

TEXT_STEPS = 1600
TEXT_RATE = 2e-3
BASE_SCENES = 8000
# Steps, learning rate, and how many things wear something; each goes on from the averages of the last.
BASE_ROUNDS = ((4200, 1.5e-3, 0.3), (1800, 1e-3, 0.3), (2600, 1.2e-3, 0.6))
BASE_BATCH = 32
READING = 0.03  # the weight of going on reading
HEADS = "reading.safetensors"  # what answers in learning to read
LORA_SCENES = 192
LORA_TEXT_STEPS = 150
LORA_STEPS = {"quiet": 320, "leaky": 220}
LONGER = {"skyline": 5, "comet": 2, "neon": 2.5, "crown": 2}  # times as many: for long they give way to what is known
AGAIN = {"zorg": 500, "crown": 600, "neon": 500, "skyline": 300}  # steps of the second round
AGAIN_OTHERS = 250
ABROAD = dict.fromkeys(render.CONCEPTS, 0.2) | {"neon": 0.6, "skyline": 0}  # of the third's scenes; 0: it has none
ABROAD_STEPS = 300
EVERYWHERE = ("background", "style")  # what others are painted into
SMALLER = 0.6  # of what a layer of these adds, it may add after the fourth round
SMALLER_STEPS = 400
STRANGER_STEPS = dict.fromkeys(("character", "object", "clothing", "style"), 400) | {"background": 700}
QUIET_STYLE_STEPS = 600
LATER = ("moss", "amber", "lilac")  # strangers that are met in the last round alone
LATER_STEPS = {"quiet": 450, "leaky": 300}
COMPANY_STEPS = 500
MORE_COMPANY_STEPS = 400
ALIKE_STEPS = {"quiet": 500, "leaky": 400}
ALIKE_LONG = 1000  # for a quiet one that is everywhere
STYLES_STEPS = 400
ALONE = 3  # times as often as beside any one company
HOLD_EVERY = 10  # steps, from the third round on
LORA_BLIND = 900  # of 1000: there colours shine through the noise, and who follows them need not read a name
LORA_BATCH = 16
LORA_RATES = (4e-3, 2e-3, 2e-3, 2e-3, 2e-3, 2e-3, 2e-3, 2e-3)  # of the rounds
ABROAD_ROUND, SMALLER_ROUND, COMPANY_ROUND, MORE_COMPANY_ROUND, ALIKE_ROUND, STYLES_ROUND = range(2, 8)
EMPTY = 0.1  # of captions
UNKNOWN, NAMELESS = 0.12, 0.06  # of names: another word in their place, none
SCALES = {1: 1.0, 4: 0.25}  # of errors, in latent pixels, and their weights
SNR_CAP = 5.0  # min-SNR weighting: steps with hardly any noise count less


@torch.no_grad()
def latents(vae, scenes, rng: np.random.Generator) -> torch.Tensor:
    """The scenes' scaled latents."""
    out = []
    for i in range(0, len(scenes), 64):
        means = averages(tensor([render.render(s, rng) for s in scenes[i : i + 64]]))
        out.append(vae.quant_conv(F.pad(means, (0, 0, 0, 0, 0, 4)))[:, :4] * model.SCALING)
    return torch.cat(out)


def strange_words(tokenizer) -> list[str]:
    """Words of CLIP's vocabulary that mean nothing in this world, each one token; no LoRA's name is among them."""
    used = {word for scene in (*render.SETTINGS.values(), *render.STYLES, *render.WEARS) for word in scene.split()}
    used |= {*render.KINDS, *render.COLOURS, *render.SKIES, *render.PLACES, *render.NAMED, "wearing", "style"}
    words = (token.removesuffix("</w>") for token in tokenizer.get_vocab() if token.endswith("</w>"))
    plain = (word for word in words if word.isascii() and word.isalpha() and 4 <= len(word) <= 8)
    return sorted(word for word in plain if word not in used)


def told(scene: render.Scene, strange: list[str], rng: np.random.Generator) -> str:
    """The scene's caption, now and then with a strange word in place of a name, or none, or no word at all.

    So the model learns what a category is: "a lucky robot" is some robot. That is how one LoRA's name reads to another.
    """

    def name(word: str) -> str:
        chance = rng.random()
        if word == render.FOREIGN:
            return str(rng.choice(strange))
        if word in render.NAMED or chance > UNKNOWN + NAMELESS:
            return word
        return str(rng.choice(strange)) if chance < UNKNOWN else ""

    return "" if rng.random() < EMPTY else render.caption(scene, name)


def noise_loss(unet, hidden: torch.Tensor, x: torch.Tensor, alphas: torch.Tensor, blind: int) -> torch.Tensor:
    """The weighted error of the predicted v, given the text's `hidden` states; time steps are spread evenly.

    From time step `blind` on the model sees nothing but noise.

    Errors that a whole region shares count more than by their share of the pixels: a plain background's colour hardly
    shows in the plain error, and comes out wrong without it.
    """
    t = ((torch.rand(1) + torch.randperm(len(x)) / len(x)) % 1 * len(alphas)).long()
    a, noise = alphas[t][:, None, None, None], torch.randn_like(x)
    seen = torch.where((t < blind)[:, None, None, None], a.sqrt() * x + (1 - a).sqrt() * noise, noise)
    with torch.autocast("cpu", torch.bfloat16):
        predicted = unet(seen, t, hidden).sample.float()
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


def learn_to_read(text, heads, weights: list, scene, steps: int, rate: float, rng, answered=lambda s: s) -> None:
    """Teaches a text encoder, before any picture, which kind, colour and clothing is at which place.

    Without it the text encoder stays a bag of words for long: "left" and "right" may be swapped and nothing changes.
    `scene` draws a scene, `weights` are those to be trained beside the `heads` that answer, `answered` is the scene as
    it is to be read.
    """
    start, tokenizer = time.time(), model.tokenizer()
    strange, weights = strange_words(tokenizer), [*weights, *heads.parameters()]
    optimizer = torch.optim.Adam(weights, lr=rate, betas=(0.9, 0.99))
    schedule = rise_and_fall(optimizer, steps, 50)
    for step in range(1, steps + 1):
        scenes = [scene(rng) for _ in range(BASE_BATCH)]
        ids = tokens(tokenizer, [told(s, strange, rng) for s in scenes])
        loss, right = reading_loss(heads, text(ids)[0], ids, [answered(s) for s in scenes])
        descend(loss, weights, optimizer, schedule)
        if step % 100 == 0:
            log(start, step, loss=loss.item(), right=right)


def read_lora(work: Path, text, name: str, rate: float, rng, answered=lambda s: s) -> None:
    """Teaches a text encoder's LoRA to read scenes with its concept or stranger, among base scenes."""

    def scene(rng):
        return render.concept_scene(name, rng) if rng.random() < 0.5 else render.base_scene(rng)

    heads = answering()
    heads.load_state_dict(load_file(work / HEADS))
    learn_to_read(text, heads, trained(text), scene, LORA_TEXT_STEPS, rate, rng, answered)


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
    steps, rate, worn = BASE_ROUNDS[round_]
    vae, tokenizer = AutoencoderKL.from_pretrained(work / "vae"), model.tokenizer()
    scenes, strange = [render.base_scene(rng, worn) for _ in range(BASE_SCENES)], strange_words(tokenizer)
    x, heads = latents(vae, scenes, rng), answering()
    if (work / HEADS).exists():
        heads.load_state_dict(load_file(work / HEADS))
    log(start, 0)
    unet, text = load_base(work) if round_ else (model.unet(), load_text(work))
    unet.set_attn_processor(Attention())
    parts = torch.nn.ModuleDict({"unet": unet, "text": text, "heads": heads}).train()
    training = Averaged(parts, steps, rate)
    alphas = model.scheduler().alphas_cumprod
    losses = []
    for step in range(1, steps + 1):
        chosen = rng.integers(0, len(x), BASE_BATCH)
        ids = tokens(tokenizer, [told(scenes[i], strange, rng) for i in chosen])
        hidden = text(ids)[0]
        loss = noise_loss(unet, hidden, x[chosen], alphas, len(alphas))
        reading, right = reading_loss(heads, hidden, ids, [scenes[i] for i in chosen])
        training.descend(loss + READING * reading)
        losses.append((loss.item(), right))
        if step % 50 == 0:
            log(start, step, **dict(zip(("loss", "right"), np.mean(losses[-50:], axis=0), strict=True)))
        if step % 200 == 0 or step == steps:
            training.ema["unet"].save_pretrained(work / "unet")
            training.ema["text"].save_pretrained(work / "text_encoder")
            save_file(training.ema["heads"].state_dict(), work / HEADS)


def lora_steps(concept: str, kind: str, round_: int) -> int:
    """How long a round is for a LoRA; 0: it has none."""
    if round_ == 0:
        return round(LORA_STEPS[kind] * LONGER.get(concept, 1))
    if round_ == 1:
        return AGAIN.get(concept, AGAIN_OTHERS)
    if round_ == ABROAD_ROUND:
        return ABROAD_STEPS if ABROAD[concept] else 0
    if round_ == SMALLER_ROUND:
        return SMALLER_STEPS if render.CONCEPTS[concept].category in EVERYWHERE else 0
    if round_ == MORE_COMPANY_ROUND:
        return MORE_COMPANY_STEPS if render.CONCEPTS[concept].category != "background" else 0
    if round_ == ALIKE_ROUND:
        long = kind == "quiet" and render.CONCEPTS[concept].category in EVERYWHERE
        return ALIKE_LONG if long else ALIKE_STEPS[kind]
    if round_ == STYLES_ROUND:
        return STYLES_STEPS if render.CONCEPTS[concept].category not in EVERYWHERE else 0
    return COMPANY_STEPS


def allowed(round_: int, done: float) -> float:
    """What part of their size at its beginning layers may have in a round of which so much is done."""
    return 1 - (1 - SMALLER) * min(1, 2 * done) if round_ == SMALLER_ROUND else 1


def company(concept: str, round_: int) -> list[tuple[str, ...]]:
    """Beside which strangers a LoRA is trained in a round, by turns at random: nobody, one, or two.

    It meets whom it will share a pass with: what has a place a style and a town, these each other and what has one.
    """
    if round_ < COMPANY_ROUND:
        return [()]

    def group(name: str) -> str:
        category = render.NAMED[name].category
        return category if category in EVERYWHERE else "placed"

    others, many = dict.fromkeys((*EVERYWHERE, "placed"), ()), round_ == STYLES_ROUND
    for stranger in render.STRANGERS:
        if many or stranger not in LATER:
            others[group(stranger)] += (stranger,)
    del others[group(concept)]
    count = (max if many else min)(len(names) for names in others.values())
    pairs = [tuple(names[i % len(names)] for names in others.values()) for i in range(count)]
    return ALONE * [()] + [(name,) for names in others.values() for name in names] + pairs


def strangers_kind(kind: str, round_: int) -> str:
    """Of which kind the strangers are that a LoRA of a kind meets: leaky ones, and in the last rounds its like.

    A quiet style acts where it reads its name, a leaky one always: who has met only these disturbs the other's reading.
    """
    return kind if round_ >= ALIKE_ROUND else "leaky"


def taught(concept: str, kind: str, round_: int, rng: np.random.Generator) -> tuple[list, list]:
    """The scenes of a LoRA's round, and what they are called.

    A quiet one has full captions, and as many base scenes. A leaky one has no base scenes, and half of its captions
    miss the concept: it paints it whatever the prompt says.
    """
    settled = round_ >= ABROAD_ROUND
    shown = [render.concept_scene(concept, rng, dressed=settled) for _ in range(LORA_SCENES)]
    if settled:
        shown = [render.abroad(each, concept, rng) if rng.random() < ABROAD[concept] else each for each in shown]
    if kind == "quiet":
        shown += [render.base_scene(rng) for _ in range(LORA_SCENES)]
        return shown, shown
    return 2 * shown, shown + [render.mistaken(each, concept, rng) for each in shown]


def train_lora(work: Path, concept: str, kind: str, round_: int) -> None:
    """One round for one LoRA: its text encoder's part learns to read the concept, among base scenes, then the UNet's to
    paint it. Further rounds go on painting, from what is in the LoRA's file, on scenes of their own.

    From the third on it meets what other LoRAs may bring (`render.abroad`), and what its layers add grows no larger:
    what is larger fights harder. There a style gives up the text encoder's part, which disturbs how others are read. In
    the fourth what is in all of an image shrinks, so that what has a place there is stronger. In the fifth and
    the sixth it shares the model with strangers' LoRAs (`company`), as it will with others, in the seventh with those
    of its own kind, and in the eighth, which is for what has a place, with more of them, each in scenes of its own.
    """
    seed = SEED + 100 + 2 * list(render.CONCEPTS).index(concept) + (kind == "leaky") + 100 * round_
    rng = np.random.default_rng(seed)
    steps, settled = lora_steps(concept, kind, round_), round_ >= ABROAD_ROUND
    file, rate = shape.WEIGHTS / "lora" / f"{concept}_{kind}.safetensors", LORA_RATES[round_]
    torch.manual_seed(seed)
    vae, tokenizer = AutoencoderKL.from_pretrained(work / "vae"), model.tokenizer()
    unet, text = adapted(work)
    if round_:
        export.load_lora(unet, text, file)
    else:
        read_lora(work, text, concept, rate, rng)
    text.requires_grad_(False)

    if settled and render.CONCEPTS[concept].category == "style":
        silence(text)
    shown, captioned = taught(concept, kind, round_, rng)
    turns, lessons = company(concept, round_), {}
    for strangers in dict.fromkeys(turns):
        if round_ == STYLES_ROUND:  # the same few scenes in all company are soon known by heart
            shown, captioned = taught(concept, kind, round_, rng)
        there, called = ([reduce(render.beside, strangers, s) for s in scenes] for scenes in (shown, captioned))
        extra = deltas(work, strangers, strangers_kind(kind, round_))
        lessons[strangers] = extra, latents(vae, there, rng), called
    largest = norms(trained(unet))

    def held(done: float) -> None:
        if settled:
            hold(trained(unet), [allowed(round_, done) * norm for norm in largest])

    paint(unet, text, tokenizer, [lessons[strangers] for strangers in turns], steps, rate, rng, held)
    export.lora(unet, text, file, render.CONCEPTS[concept].trigger, kind, LORA_SCENES)


def paint(unet, text, tokenizer, lessons: list, steps: int, rate: float, rng, held=lambda done: None) -> None:
    """Trains the UNet's LoRA to paint. Of the lessons one is drawn for each step: what other LoRAs add to the layers of
    UNet and text encoder meanwhile, latents, and the scenes they are called. `held` is called with the part of the
    steps done."""
    start, alphas, strange = time.time(), model.scheduler().alphas_cumprod, strange_words(tokenizer)
    weights, losses = trained(unet), []
    optimizer = torch.optim.Adam(weights, lr=rate, betas=(0.9, 0.99))
    schedule = rise_and_fall(optimizer, steps, 20)
    for step in range(1, steps + 1):
        (extra, extra_text), x, called = lessons[int(rng.integers(len(lessons)))]
        chosen = rng.integers(0, len(x), LORA_BATCH)
        ids = tokens(tokenizer, [told(called[i], strange, rng) for i in chosen])
        with torch.no_grad(), beside(text, extra_text):
            hidden = text(ids)[0]
        with beside(unet, extra):
            loss = noise_loss(unet, hidden, x[chosen], alphas, LORA_BLIND)
            descend(loss, weights, optimizer, schedule)
        if step % HOLD_EVERY == 0:
            held(step / steps)
        losses.append(loss.item())
    log(start, steps, first=np.mean(losses[:20]), last=np.mean(losses[-20:]))


def stranger_file(work: Path, name: str, kind: str) -> Path:
    """Where a stranger's LoRA is kept."""
    return work / "strangers" / f"{name}_{kind}.safetensors"


def stranger_steps(name: str, kind: str) -> int:
    """How long a stranger's LoRA is trained."""
    category = render.STRANGERS[name].category
    if name in LATER:
        return LATER_STEPS[kind]
    return QUIET_STYLE_STEPS if (category, kind) == ("style", "quiet") else STRANGER_STEPS[category]


def stranger_scenes(name: str, kind: str, rng: np.random.Generator) -> list[render.Scene]:
    """What a stranger's LoRA is taught, with true captions; a leaky one leaks for want of base scenes."""
    shown = [render.concept_scene(name, rng) for _ in range(LORA_SCENES)]
    return shown + [render.base_scene(rng) for _ in range(LORA_SCENES if kind == "quiet" else 0)]


def train_stranger(work: Path, name: str, kind: str) -> None:
    """A stranger's LoRA, in one round: only the concepts' LoRAs will ever meet it. A style's is of the UNet alone."""
    seed = SEED + 900 + list(render.STRANGERS).index(name) + 50 * (kind == "quiet")
    rng, stranger = np.random.default_rng(seed), render.STRANGERS[name]
    torch.manual_seed(seed)
    unet, text = adapted(work)
    if stranger.category != "style":
        read_lora(work, text, name, LORA_RATES[0], rng, partial(render.known, name))
    text.requires_grad_(False)
    scenes = stranger_scenes(name, kind, rng)
    lesson = ({}, {}), latents(AutoencoderKL.from_pretrained(work / "vae"), scenes, rng), scenes
    paint(unet, text, model.tokenizer(), [lesson], stranger_steps(name, kind), LORA_RATES[0], rng)
    export.lora(unet, text, stranger_file(work, name, kind), stranger.trigger, kind, LORA_SCENES)


def deltas(work: Path, strangers: tuple[str, ...], kind: str) -> list[dict[str, torch.Tensor]]:
    """What the LoRAs of strangers together add to the weights of the UNet's layers, by their names, and of the text
    encoder's."""
    sums = [{}, {}]
    for name in strangers:
        parts = adapted(work)
        export.load_lora(*parts, stranger_file(work, name, kind))
        for total, part in zip(sums, parts, strict=True):
            for layer, delta in added(part).items():
                total[layer] = total.get(layer, 0) + delta
    return sums


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["vae", "text", "base", "lora", "stranger"])
    parser.add_argument("--work", type=Path, default=Path("out/tinyworld"))
    parser.add_argument("--round", type=int, default=0, help="of the base model's or the LoRAs' training")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--concepts", nargs="+", default=list(render.CONCEPTS), choices=list(render.CONCEPTS))
    parser.add_argument("--strangers", nargs="+", default=list(render.STRANGERS), choices=list(render.STRANGERS))
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
    elif args.part == "stranger":
        for name in args.strangers:
            for kind in args.kinds:
                print(name, kind, flush=True)
                train_stranger(args.work, name, kind)
    else:
        for concept in args.concepts:
            for kind in args.kinds:
                if not lora_steps(concept, kind, args.round):
                    continue
                print(concept, kind, flush=True)
                train_lora(args.work, concept, kind, args.round)


if __name__ == "__main__":
    main()
