"""How far the host says it is: by the rows that the model has evaluated, since a composition's steps differ in cost."""

from collections.abc import Callable, Sequence
from threading import get_ident

from modules import shared


def tell(share: Callable[[], float]) -> Callable[[], None]:
    """Let the host's count of steps be this share of all its steps, for who asks from another thread than this one.

    Requests that ask the host while it samples, the browser's and the API's, come in other threads. Scripts, and the
    host itself, run in the one that samples, and go by the host's own count. Returns what undoes it.
    """
    state, kind, sampling_thread = shared.state, type(shared.state), get_ident()

    class Told(kind):
        @property
        def sampling_step(self) -> int:
            own = vars(self).get("sampling_step", 0)
            return own if get_ident() == sampling_thread else int(share() * self.sampling_steps)

        @sampling_step.setter
        def sampling_step(self, step: int) -> None:
            vars(self)["sampling_step"] = step

    def undo() -> None:
        if type(state) is Told:
            state.__class__ = kind

    state.__class__ = Told
    return undo


class Progress:
    """Of one sampling pass, of whose model calls by the sampler each takes so many ``rows``."""

    def __init__(self, rows: Sequence[int]):
        self.rows = rows
        self.step = self.done = 0
        self.close = tell(lambda: self.share)

    def begin(self, step: int) -> None:
        """The sampler's model call ``step``, counted from 0, begins."""
        self.step, self.done = step, 0

    def evaluated(self, rows: int) -> None:
        """So many rows more are done in this step."""
        self.done += rows

    @property
    def share(self) -> float:
        """How much of all rows is done, from 0 to 1."""
        here = self.rows[self.step : self.step + 1]  # nothing where a sampler makes more steps than it says
        return (sum(self.rows[: self.step]) + min(self.done, sum(here))) / sum(self.rows)
