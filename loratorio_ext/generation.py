"""The life of one composed generation in a WebUI: what was asked, what went wrong, and who hears of it.

WebUIs swallow exceptions of scripts and callbacks and go on. A `Generation` therefore brackets ``p.sample``, which is
not swallowed: errors raised meanwhile are kept, sampling is stopped, and the error is raised there, where it reaches
the user and the API.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from loratorio_ext.errors import LoRAtorioError
from loratorio_ext.record import PICKED_KEY, STEPS_KEY, Record, StepData, written_shares
from loratorio_ext.settings import INFOTEXT_PREFIX, OPTIONS, Settings

ATTRIBUTE = "loratorio"
"""Where a generation lives on the host's processing object, and goes with it."""

NOTE_KEY = f"{INFOTEXT_PREFIX} note"
INFOTEXT_KEYS = [*(option.infotext_key for option in OPTIONS), NOTE_KEY, PICKED_KEY, STEPS_KEY]


def add_pictures(processed: Any, records: Sequence[Record]) -> None:
    """Put pictures of the weights behind the result's images, each with its own image's infotext."""
    from loratorio_ext.heatmaps import pictures

    number = getattr(processed, "index_of_first_image", 0)
    for record in records:
        for image in range(record.images):
            for picture in pictures(record, image):
                processed.images.append(picture)
                processed.infotexts.append(processed.infotexts[min(number, len(processed.infotexts) - 1)])
            number += 1


class Sampling(Protocol):
    """One sampling pass of a host with composition in it."""

    def close(self) -> None:
        """Leave the host as it was before the pass; harmless when called again."""


class Generation:
    """One generation of the host's processing object ``p`` with composition switched on.

    ``open_sampling(generation)`` starts the composition of one sampling pass (txt2img's, hires fix's, img2img's) or
    returns None where there is nothing to compose; ``interrupt()`` makes the host stop sampling soon.
    """

    def __init__(self, p: Any, open_sampling: Callable[["Generation"], Sampling | None], interrupt: Callable[[], None]):
        self.p = p
        self.settings = Settings()
        self.error: LoRAtorioError | None = None
        self.prepared: dict[Hashable, Any] = {}
        """What one sampling pass has prepared and the next one of the same generation may use again."""
        self.records: list[Record] = []
        """What was picked, a record for each batch of images."""
        self._open_sampling = open_sampling
        self._interrupt = interrupt
        self._sampling: Sampling | None = None

    @classmethod
    def begin(cls, p: Any, args: Sequence[Any], open_sampling, interrupt) -> None:
        """Take up a generation from the values the host hands the script. Switched off, nothing at all is done."""
        cls.end(p)
        for key in INFOTEXT_KEYS:  # a copy of another p shares this dict with it
            p.extra_generation_params.pop(key, None)
        if args and args[0] is False:
            return
        generation = cls(p, open_sampling, interrupt)
        try:
            generation.settings = Settings.from_args(args)
        except Exception as error:
            generation.fail(error)
        if generation.error or generation.settings.enabled:
            generation._bracket_sampling()
            p.extra_generation_params.update(generation.settings.to_infotext())

    @classmethod
    def finish(cls, p: Any, processed: Any) -> None:
        """The images are there: add what was picked to the host's answer, and take everything of ours off ``p``."""
        generation = cls.of(p)
        cls.end(p)
        if generation is None or not any(record.steps for record in generation.records):
            return
        p.extra_generation_params[STEPS_KEY] = StepData.of(generation.records)
        if generation.settings.show_maps:
            add_pictures(processed, generation.records)

    @staticmethod
    def of(p: Any) -> "Generation | None":
        """The generation taken up for ``p``, if any."""
        generation = getattr(p, ATTRIBUTE, None)
        return generation if generation is not None and generation.p is p else None

    @staticmethod
    def end(p: Any) -> None:
        """Take everything of ours off ``p`` (which may be a copy of another one), so that it can be used again."""
        sample = vars(p).get("sample")
        if hasattr(sample, ATTRIBUTE):
            if sample.replaced is None:
                del p.sample
            else:
                p.sample = sample.replaced
        vars(p).pop(ATTRIBUTE, None)

    def start_sampling(self) -> None:
        """A sampling pass is about to begin."""
        with self.guarded():
            self.close()
            if self.records_weights and not getattr(self.p, "is_hr_pass", False):
                self.records.append(Record())
            self._sampling = self._open_sampling(self)

    def note(self, text: str) -> None:
        """Tell the user of something that went otherwise than asked, beside the image and in its infotext."""
        self.p.comment(f"LoRAtorio: {text}")
        notes = self.p.extra_generation_params.get(NOTE_KEY, "")
        if text not in notes:
            self.p.extra_generation_params[NOTE_KEY] = f"{notes}; {text}" if notes else text

    @property
    def records_weights(self) -> bool:
        """Whether anyone wants to know who was picked."""
        return bool(self.settings.pool or self.settings.top_k or self.settings.show_maps)

    def record(self, loras: Sequence[str], weights: Any, image_of_row: Sequence[int]) -> None:
        """Keep a step's patch weights ``[N, R, h, w]`` (a tensor, or None where the method has none), if wanted."""
        if weights is not None and self.records:
            self.records[-1].add(loras, weights.float().cpu().numpy(), image_of_row)

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What ``make()`` returns, made once in this generation for all that it depends on (``key``)."""
        if key not in self.prepared:
            self.prepared[key] = make()
        return self.prepared[key]

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
            self._interrupt()

    def close(self) -> None:
        """End the sampling pass under way, if any."""
        sampling, self._sampling = self._sampling, None
        if sampling is not None:
            sampling.close()
            if self.records and self.records[-1].steps:
                # A list: the host takes each image's own entry.
                self.p.extra_generation_params[PICKED_KEY] = [
                    written_shares(shares) for shares in self.records[-1].shares()
                ]

    def _bracket_sampling(self) -> None:
        original = self.p.sample

        def sample(*args, **kwargs):
            if self.error is not None:
                raise self.error
            try:
                samples = original(*args, **kwargs)
            except Exception as error:
                if self.error is not None:
                    raise self.error from error
                raise
            finally:
                self.close()
            if self.error is not None:
                raise self.error
            return samples

        sample.replaced = vars(self.p).get("sample")
        setattr(sample, ATTRIBUTE, self)
        setattr(self.p, ATTRIBUTE, self)
        self.p.sample = sample
