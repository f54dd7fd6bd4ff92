"""The life of one composed generation in a WebUI: what was asked, what went wrong, and who hears of it.

WebUIs swallow exceptions of scripts and callbacks and go on. A `Generation` therefore brackets two calls of the host's
whose exceptions are not swallowed. ``p.scripts.process`` comes after the request's own options are set, and before any
script has processed it: what can be refused is refused there. (Until then nothing of ours is on ``p``, which some
extensions send to other machines as it is.)
``p.sample`` is all of a batch's sampling: errors raised meanwhile are kept, sampling is stopped, the other scripts are
told that the generation is over (hosts do not tell them after an error), and the error is raised there, where it
reaches the user and the API.
"""

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Protocol

from loratorio_ext.errors import LoRAtorioError, UnsupportedError
from loratorio_ext.record import PICKED_KEY, STEPS_KEY, Record, StepData, TextOfEach, reach, written_shares
from loratorio_ext.settings import INFOTEXT_PREFIX, OPTIONS, VERSION_KEY, Settings
from loratorio_ext.summary import step_line, summary

ATTRIBUTE = "loratorio"
"""Where a generation lives on the host's processing object, and goes with it."""

NOTE_KEY = f"{INFOTEXT_PREFIX} note"
INFOTEXT_KEYS = [*(option.infotext_key for option in OPTIONS), VERSION_KEY, NOTE_KEY, PICKED_KEY, STEPS_KEY]


class Sampling(Protocol):
    """One sampling pass of a host with composition in it."""

    steps: int
    """How many model calls of the pass went through here so far."""
    tally: Any
    """What its model calls cost (`isolation.Tally`), or None."""

    def close(self) -> None:
        """Leave the host as it was before the pass; harmless when called again."""


class Host(Protocol):
    """What a generation asks of the host's adapter."""

    def check(self, generation: "Generation") -> None:
        """Raise what speaks against a composition, as far as it is known before any script has acted."""

    def open_sampling(self, generation: "Generation") -> Sampling | None:
        """Start the composition of one sampling pass (txt2img's, hires fix's, img2img's); None: nothing to compose."""

    def attended(self, generation: "Generation") -> AbstractContextManager:
        """A context around all of a batch's sampling, for what an adapter must see and no pass of its own tells it."""

    def interrupt(self) -> None:
        """Make the host stop sampling soon."""

    def sampled(self, p: Any) -> bool:
        """Whether the host has called its model in the pass at hand."""

    def clean_up(self, p: Any, early: bool = False) -> None:
        """After an error: let every script put back what it has hooked into the host; ``early``: those that may have
        done so already when a generation is only about to be processed."""

    def forget_conditionings(self, p: Any) -> None:
        """Empty the host's caches of conditionings."""


class Generation:
    """One generation of the host's processing object ``p`` with composition switched on."""

    def __init__(self, p: Any, host: Host):
        self.p = p
        self.host = host
        self.log_steps = False
        self.settings = Settings()
        self.error: LoRAtorioError | None = None
        self.prepared: dict[Hashable, Any] = {}
        """What one sampling pass has prepared and the next one of the same generation may use again."""
        self.records: list[Record] = []
        """What was picked, a record for each batch of images."""
        self.images: dict[tuple[int, int], Any] = {}
        """The finished images by batch and place in it, where somebody wants to know who painted them."""
        self.loras: dict[str, None] = {}
        """Every LoRA that took part so far, in order."""
        self.everywhere: dict[str, None] = {}
        """Those in every pass, in the batch at hand."""
        self.encoders: dict[str, None] = {}
        """The neighbours that have had texts of their own encoded while a batch was sampled."""
        self.tallies: list[Any] = []
        self.seconds = 0.0
        """What model calls cost, and how long all sampling took."""
        self._sampling: Sampling | None = None
        self._second_pass = False
        self._over = False

    @classmethod
    def begin(cls, p: Any, args: Sequence[Any], host: Host, log_steps: bool = False) -> None:
        """Take up a generation from the values the host hands the script. Switched off, nothing at all is done.

        ``log_steps``: tell each step's shares as it goes.
        """
        cls.end(p)
        said = p.extra_generation_params
        if not said.keys().isdisjoint(
            INFOTEXT_KEYS
        ):  # in a dict of its own, since a copy of another p shares that one's
            p.extra_generation_params = {key: value for key, value in said.items() if key not in INFOTEXT_KEYS}
        if args and args[0] is False:
            return
        generation = cls(p, host)
        generation.log_steps = log_steps
        try:
            generation.settings = Settings.from_args(args)
        except Exception as error:
            generation.fail(error)
        if generation.error or generation.settings.enabled:
            generation._replace(p.scripts, "process", generation._checked)

    @classmethod
    def finish(cls, p: Any) -> "Generation | None":
        """The images are there: add what was picked to the host's answer, take everything of ours off ``p``, and hand
        back the generation."""
        generation = cls.of(p)
        cls.end(p)
        if generation is None:
            return None
        generation.host.forget_conditionings(p)
        if any(record.steps for record in generation.records) and generation.tells_weights:
            maps = generation.settings.show_maps
            p.extra_generation_params[STEPS_KEY] = StepData.of(generation.records, maps=maps)
        return generation

    @property
    def summary(self) -> str:
        """The generation in one line."""
        return summary(self.settings.method, self.loras, self.tallies, self.seconds)

    def keep_image(self, image: Any) -> None:
        """One of the batch's images is finished."""
        if self.settings.show_maps:
            self.images[len(self.records) - 1, self.p.batch_index] = image

    @staticmethod
    def of(p: Any) -> "Generation | None":
        """The generation taken up for ``p``, if any."""
        generation = getattr(p, ATTRIBUTE, None)
        return generation if generation is not None and generation.p is p else None

    @staticmethod
    def end(p: Any) -> None:
        """Take everything of ours off ``p`` (which may be a copy of another one), so that it can be used again."""
        generation = Generation.of(p)
        if generation is not None:
            generation._over = True
        for owner, name in ((p, "sample"), (p.scripts, "process")):
            ours = vars(owner).get(name) if owner is not None else None
            if hasattr(ours, ATTRIBUTE):
                delattr(owner, name)
                if ours.replaced is not None:
                    setattr(owner, name, ours.replaced)
        vars(p).pop(ATTRIBUTE, None)

    def start_sampling(self) -> None:
        """A sampling pass is about to begin."""
        with self.guarded():
            second_pass = getattr(self.p, "is_hr_pass", False)
            if second_pass != self._second_pass:  # a host may announce one pass more than once
                self.confirm()
            self.close()
            self._second_pass = second_pass
            if (self.tells_weights or self.log_steps) and not second_pass:
                self.records.append(Record(len(self.p.prompts)))
            self._sampling = self.host.open_sampling(self)

    def note(self, text: str) -> None:
        """Tell the user of something that went otherwise than asked, beside the image and in its infotext."""
        self.p.comment(f"LoRAtorio: {text}")
        notes = self.p.extra_generation_params.get(NOTE_KEY, "")
        if text not in notes:
            self.p.extra_generation_params[NOTE_KEY] = f"{notes}; {text}" if notes else text

    @property
    def tells_weights(self) -> bool:
        """Whether anyone wants to know who was picked."""
        return bool(self.settings.pool or self.settings.top_k or self.settings.show_maps)

    def record(self, loras: Sequence[str], weights: Any, image_of_row: Sequence[int]) -> None:
        """Keep a step's patch weights ``[N, R, h, w]`` (a tensor, or None where the method has none), if wanted."""
        self.loras.update(dict.fromkeys(loras))
        if weights is not None and self.records:
            patches = reach(weights.shape[-2:], self.settings.patch_size, self.latent_size)
            self.records[-1].add(loras, weights.float().cpu().numpy(), image_of_row, patches, self.everywhere)
            if self.log_steps:
                steps = self.records[-1].steps
                print(step_line(len(steps), loras, steps[-1].weights.mean(axis=(2, 3)).T))

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width of the pass at hand's latents, in all models that WebUIs sample so far."""
        p = self.p
        width, height = (p.hr_upscale_to_x, p.hr_upscale_to_y) if self._second_pass else (p.width, p.height)
        return height // 8, width // 8

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What ``make()`` returns, made once in this generation for all that it depends on (``key``)."""
        if key not in self.prepared:
            self.prepared[key] = make()
        return self.prepared[key]

    def kept(self, what: Hashable, key: Hashable, make: Callable[[], Any]) -> Any:
        """As `once`, of each ``what`` only the latest."""
        known, value = self.prepared.get(what, (None, None))
        if known != key:
            self.prepared.pop(what, None)  # before there are two of them
            value = make()
            self.prepared[what] = key, value
        return value

    def fail(self, error: Exception) -> None:
        """Keep the first error, in the form that reaches the user."""
        if self.error is None:
            if not isinstance(error, LoRAtorioError):
                wrapped = LoRAtorioError(f"LoRAtorio: composition failed: {type(error).__name__}: {error}")
                wrapped.__cause__ = error
                error = wrapped
            self.error = error

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Around everything that runs in a callback: an exception stops sampling and is raised after it.

        The pass is closed there, too: a host may be going through its list of callbacks now.
        """
        try:
            yield
        except Exception as error:
            self.fail(error)
            self.host.interrupt()

    def confirm(self) -> None:
        """Fail where the pass under way went by without us."""
        if self._sampling is not None and not self._sampling.steps and self.host.sampled(self.p):
            self.fail(UnsupportedError("LoRAtorio: the WebUI sampled without ever asking for the composition"))

    def close(self) -> None:
        """End the sampling pass under way, if any."""
        sampling, self._sampling = self._sampling, None
        if sampling is not None:
            sampling.close()
            if sampling.tally is not None and sampling.tally not in self.tallies:
                self.tallies.append(sampling.tally)
            if self.tells_weights and self.records and self.records[-1].steps:
                texts = map(written_shares, self.records[-1].shares())
                self.p.extra_generation_params[PICKED_KEY] = TextOfEach(texts)
            else:  # not even the batch before's, where this one was skipped before its first step
                self.p.extra_generation_params.pop(PICKED_KEY, None)

    def _replace(self, owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
        """Let ``wrapper(original, *args, **kwargs)`` answer calls of a method of the host's."""
        method = partial(wrapper, getattr(owner, name))
        method.replaced = vars(owner).get(name)
        setattr(method, ATTRIBUTE, self)
        setattr(owner, name, method)

    def _checked(self, process: Callable[[Any], None], p: Any) -> None:
        """``p.scripts.process``: refuse what can be refused, and take up the rest."""
        self.end(self.p)
        if p is self.p:  # and no request that came in between
            self._check()
        process(p)

    def _check(self) -> None:
        """Raise what speaks against the composition; else be there when sampling begins."""
        try:
            if self.error is not None:
                raise self.error
            self.host.check(self)
        except Exception as error:
            self.fail(error)
            self.host.clean_up(self.p, early=True)
            raise self.error from error.__cause__
        # They are kept by prompt, and may have been made with other LoRAs or by other extensions.
        self.host.forget_conditionings(self.p)
        self._replace(self.p, "sample", self._bracketed)
        setattr(self.p, ATTRIBUTE, self)
        self.p.extra_generation_params.update(self.settings.to_infotext())

    def _bracketed(self, sample: Callable[..., Any], *args, **kwargs) -> Any:
        """``p.sample``: whatever goes wrong meanwhile is raised here, with everything put back."""
        if self._over:  # another extension has wrapped it, and ``p`` is used once more
            return sample(*args, **kwargs)
        start = time.perf_counter()
        try:
            try:
                with self.host.attended(self):
                    samples = sample(*args, **kwargs)
                self.confirm()
            finally:
                self.close()
                self.seconds += time.perf_counter() - start
            if self.error is not None:
                raise self.error
            return samples
        except Exception as error:
            self.host.clean_up(self.p)
            self.host.forget_conditionings(self.p)
            if self.error is not None and error is not self.error:
                raise self.error from error
            raise
