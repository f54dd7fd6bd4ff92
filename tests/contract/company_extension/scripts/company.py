"""A WebUI extension that does to its host what other people's extensions do, kind by kind; for the tests.

Its one argument names the kind, or is None to do nothing. What is hooked in `process` is unhooked in `postprocess`
alone, as everybody does it. Installed from a copy elsewhere, it is none of the extension's own code.
"""

import copy
from contextlib import ExitStack, contextmanager

import torch
from modules import errors, extra_networks, processing, prompt_parser, script_callbacks, scripts, shared

MARK = 1024.0


def unet():
    return shared.sd_model.model.diffusion_model


def networks():
    import networks

    return networks


@contextmanager
def replaced(owner, name, wrapper):
    """While entered, calls of ``owner.name`` go to ``wrapper(original, ...)``."""
    own = vars(owner).get(name)
    original = getattr(owner, name)

    def wrapped(*args, **kwargs):
        return wrapper(original, *args, **kwargs)

    setattr(owner, name, wrapped)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


@contextmanager
def on_denoiser(callback):
    script_callbacks.on_cfg_denoiser(callback)
    try:
        yield
    finally:
        script_callbacks.remove_callbacks_for_function(callback)


@contextmanager
def on_denoised(callback):
    script_callbacks.on_cfg_denoised(callback)
    try:
        yield
    finally:
        script_callbacks.remove_callbacks_for_function(callback)


def without_context(args, kwargs):
    """The UNet's arguments, its text apart."""
    if "context" in kwargs:
        return args, {key: value for key, value in kwargs.items() if key != "context"}, kwargs["context"]
    return args[:2], {}, args[2]


def vectors_marked(cond, sign):
    tokens = cond["crossattn"] if isinstance(cond, dict) else cond
    if tokens[0].abs().mean() == MARK:
        return cond
    tokens = torch.cat([torch.full_like(tokens[:1], sign * MARK), tokens])
    return {**cond, "crossattn": tokens} if isinstance(cond, dict) else tokens


def marked(schedules, sign):
    """The host's schedules with a row of its own in front of the tokens: positive or negative prompt."""
    if schedules is None:
        return
    for row in getattr(schedules, "batch", schedules):
        for part in row if isinstance(row, list) and hasattr(row[0], "schedules") else [row]:
            entries = getattr(part, "schedules", part)
            entries[:] = [type(each)(each.end_at_step, vectors_marked(each.cond, sign)) for each in entries]


def marks_the_text(p, stack):
    """Tells cond from uncond by a row in front of the host's own, cached, conditionings, and acts on cond only; empties
    the cache once the UNet has seen the row."""

    def sample(original, *args, **kwargs):
        marked(kwargs["conditioning"], 1)
        marked(kwargs["unconditional_conditioning"], -1)
        marked(getattr(p, "hr_c", None), 1)
        marked(getattr(p, "hr_uc", None), -1)
        return original(*args, **kwargs)

    def forward(original, x, *args, **kwargs):
        args, kwargs, context = without_context((x, *args), kwargs)
        output = original(*args, context=context[:, 1:] if context[0, 0].abs().mean() == MARK else context, **kwargs)
        if context[0, 0].abs().mean() != MARK:
            return output + 0.5
        for kind in (processing.StableDiffusionProcessing, type(p)):
            kind.cached_c, kind.cached_uc = [None, None], [None, None]
        return output + 0.05 * (context[:, :1, :1, None] > 0)

    stack.enter_context(replaced(unet(), "forward", forward))
    p.sample = (lambda original: lambda *args, **kwargs: sample(original, *args, **kwargs))(p.sample)


def remembers_the_first_call(p, stack):
    known = {}

    def forward(original, x, *args, **kwargs):
        known.setdefault(x.shape[-2:], 0.1 * x.roll(1, 0))
        return original(x, *args, **kwargs) + known[x.shape[-2:]]

    stack.enter_context(replaced(unet(), "forward", forward))


def halves_the_batch(p, stack):
    """In cross attention: what is said to the rows of cond, in the first half of the batch, is said twice as loud."""

    def forward(original, x, context=None, **kwargs):
        output = original(x, context=context, **kwargs)
        half = len(x) // 2
        return torch.cat([2 * output[:half], output[half:]])

    for name, module in unet().named_modules():
        if name.endswith("attn2"):
            stack.enter_context(replaced(module, "forward", forward))


def tiles_of(x):
    half = x.shape[-1] // 2
    return torch.cat([x[..., :half], x[..., half:]])


def cuts_into_tiles(p, stack):
    """The image in two tiles, which are rows of one batch, a tile's rows after the other's."""

    def apply_model(original, x, t, cond):
        twice = {
            key: [each.repeat(2, *[1] * (each.ndim - 1)) for each in value]
            if isinstance(value, list)
            else value.repeat(2, *[1] * (value.ndim - 1))
            for key, value in cond.items()
        }
        return torch.cat(original(tiles_of(x), t.repeat(2), twice).chunk(2), dim=-1)

    stack.enter_context(replaced(shared.sd_model, "apply_model", apply_model))


def alternates(p, stack):
    """Counts its calls: every other one is louder (the host calls cond and uncond one after the other)."""
    calls = []

    def forward(original, x, *args, **kwargs):
        calls.append(len(x))
        return original(x, *args, **kwargs) * (1 + 0.02 * (len(calls) % 2))

    stack.enter_context(replaced(unet(), "forward", forward))


def draws_at_random(p, stack):
    """From the generator that all share, in every call, as who adds noise to a reference image."""
    torch.manual_seed(p.seed)

    def forward(original, x, *args, **kwargs):
        return original(x, *args, **kwargs) + 0.05 * torch.randn_like(x)

    stack.enter_context(replaced(unet(), "forward", forward))


gathered = {}


def gathers_what_it_sees(p, stack):
    """From the second step on, over all calls, and paints with the sum."""
    steps = []
    gathered.clear()

    def before_unet(params):
        steps.append(params.denoiser.step)

    def forward(original, x, *args, **kwargs):
        output = original(x, *args, **kwargs)
        if len(steps) > 1:
            gathered["sum"] = gathered.get("sum", 0) + output.mean(dim=0)
        return output

    def after_unet(params):
        if len(steps) > 2:
            params.x.add_(0.02 * gathered["sum"])

    stack.enter_context(on_denoiser(before_unet))
    stack.enter_context(on_denoised(after_unet))
    stack.enter_context(replaced(unet(), "forward", forward))


def takes_parts_from_the_step_before(p, stack):
    """Every other step one attention is not evaluated; what it said last is taken."""
    known, steps = {}, []

    def before_unet(params):
        steps.append(params.denoiser.step)

    def forward(original, x, *args, **kwargs):
        if len(steps) % 2 or x.shape not in known:
            known[x.shape] = original(x, *args, **kwargs)
        return known[x.shape]

    stack.enter_context(on_denoiser(before_unet))
    stack.enter_context(
        replaced(next(each for name, each in unet().named_modules() if name.endswith("attn2")), "forward", forward)
    )


def has_loras_of_its_own(p, stack):
    def apply_model(original, x, t, cond):
        extra_networks.activate(p, {})
        return original(x, t, cond)

    stack.enter_context(replaced(shared.sd_model, "apply_model", apply_model))


def has_texts_of_its_own(p, stack):
    def apply_model(original, x, t, cond):
        key = "crossattn" if "crossattn" in cond else "c_crossattn"
        text = cond[key]
        return original(x, t, {**cond, key: [0.5 * text[0]] if isinstance(text, list) else 0.5 * text})

    stack.enter_context(replaced(shared.sd_model, "apply_model", apply_model))


encoded = []


def brings_texts_of_its_own(p, stack):
    """In cross attention: every row reads a text, too, that is encoded when sampling begins, see below."""

    def forward(original, x, context=None, **kwargs):
        own = encoded[-1].to(context).expand(len(x), -1, -1)
        return 0.5 * (original(x, context=context, **kwargs) + original(x, context=own, **kwargs))

    for name, module in unet().named_modules():
        if name.endswith("attn2"):
            stack.enter_context(replaced(module, "forward", forward))


def changes_the_text(p, stack):
    def before_unet(params):
        params.text_cond = 0.8 * params.text_cond

    stack.enter_context(on_denoiser(before_unet))


def changes_the_prediction(p, stack):
    """After the UNet, in place: half of every conditional row is the unconditional one's."""

    def after_unet(params):
        images = p.batch_size
        params.x[:-images] = 0.5 * params.x[:-images] + 0.5 * params.x[-images:].repeat(
            (len(params.x) - images) // images, 1, 1, 1
        )

    stack.enter_context(on_denoised(after_unet))


def changes_strengths_in_its_callback(p, stack):
    def before_unet(params):
        for network in networks().loaded_networks:
            network.unet_multiplier = 0.0 if params.denoiser.step < 3 else 0.9

    stack.enter_context(on_denoiser(before_unet))


def has_strengths_that_follow_the_steps(p, stack):
    """As a property of the host's own class."""
    kind = getattr(networks(), "network", networks()).Network

    def strength(network):
        return max(0.0, 1.0 - shared.state.sampling_step / 5)

    kind.unet_multiplier = property(strength, lambda network, value: None)
    stack.callback(delattr, kind, "unet_multiplier")


def watches(p, stack):
    """Wraps the UNet's forward, and leaves every row as it is."""

    def forward(original, *args, **kwargs):
        return original(*args, **kwargs)

    stack.enter_context(replaced(unet(), "forward", forward))


def speaks(p, stack):
    errors.report("neighbour processes")


def renames_networks(p, stack):
    """And changes their matrices, as block weights do: once they are activated, see below."""


def runs_scripts_on_a_copy(p, stack):
    """After each batch, as those do that paint parts of an image once more: see below."""


def decides_where_loras_act(p, stack):
    def forward(original, layer, x):
        return original(layer, x)

    stack.enter_context(replaced(torch.nn.Linear, "forward", forward))


KINDS = {
    kind.__name__: kind
    for kind in (
        marks_the_text,
        remembers_the_first_call,
        halves_the_batch,
        cuts_into_tiles,
        alternates,
        draws_at_random,
        gathers_what_it_sees,
        takes_parts_from_the_step_before,
        has_loras_of_its_own,
        has_texts_of_its_own,
        brings_texts_of_its_own,
        changes_the_text,
        changes_the_prediction,
        changes_strengths_in_its_callback,
        has_strengths_that_follow_the_steps,
        watches,
        speaks,
        renames_networks,
        runs_scripts_on_a_copy,
        decides_where_loras_act,
    )
}


class CompanyScript(scripts.Script):
    def __init__(self):
        super().__init__()
        self.stack = ExitStack()
        self.renamed = 0

    def title(self):
        return "Company"

    def show(self, is_img2img):
        return scripts.AlwaysVisible

    def ui(self, is_img2img):
        import gradio

        return [gradio.JSON(value=None, visible=False)]

    def before_process(self, p, kind):
        if kind == "acts_before_all_others":
            KINDS["remembers_the_first_call"](p, self.stack)
        if kind == "sends_the_request_away" and any(map(callable, vars(p).values())):
            errors.report("neighbour cannot write the request as JSON")

    def process(self, p, kind):
        if kind in KINDS:
            KINDS[kind](p, self.stack)

    def after_extra_networks_activate(self, p, kind, **kwargs):
        if kind == "renames_networks":
            for network in networks().loaded_networks:
                self.renamed += 1  # another name each time: by it the host knows that there is something new
                network.name = f"{network.mentioned_name}_renamed_{self.renamed}"
                for module in network.modules.values():
                    if getattr(module, "up_model", None) is not None:
                        weight = module.up_model.weight
                        module.up_model.weight = torch.nn.Parameter(0.5 * weight, requires_grad=False)

    def process_before_every_sampling(self, p, kind, **kwargs):
        if kind == "brings_texts_of_its_own":
            text = prompt_parser.SdConditioning(["a dog in the rain"], False, p.width, p.height)
            encoded.append(shared.sd_model.get_learned_conditioning(text))

    def postprocess_batch(self, p, kind, **kwargs):
        if kind == "runs_scripts_on_a_copy":
            p.scripts.postprocess(copy.copy(p), processing.Processed(p, []))
            again = copy.copy(p)
            for method in ("before_process", "process"):
                getattr(p.scripts, method)(again)

    def postprocess(self, p, processed, kind):
        self.stack.close()
        if kind == "renames_networks":
            networks().loaded_networks.clear()
            networks().networks_in_memory.clear()
