"""Events of a running command, shown as bars on a terminal (`_bars.py`), as plain lines in a log, or as JSON lines.

    progress.plan({"synthesize": 6.0, "quantize": 2.0})    optional: the stages to come and their relative cost
    with progress.stage("synthesize", total=500) as step:
        ...
        step()

The time left of a stage is its time so far x steps left / steps done; the time left overall is the same in units of the
plan, over the stages that really ran here (stages that a resumed run skips count neither way). Steps that a resumed stage
need not do again are told as `done` at its start or with `step(k, skipped=True)`: neither they nor the time that skipping
them took count as work.
"""

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from reverie import interrupts

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import UInt8

# Gives images as the eye sees them; whoever does not show them never asks.
Pictures = Callable[[], "UInt8[np.ndarray, 'count height width 3']"]

SECONDS_BETWEEN_LINES = 5.0
# After so many steps a log says how long the stage will take; a stage with fewer has no estimate.
FIRST_STEPS = 20


@runtime_checkable
class Stream(Protocol):
    """What we need of a text stream, such as `sys.stderr`."""

    def write(self, text: str, /) -> object: ...

    def flush(self) -> None: ...

    def isatty(self) -> bool: ...


@runtime_checkable
class Progress(Protocol):
    """Is told what happens; one stage at a time."""

    def plan(self, stages: dict[str, float]) -> None:
        """The stages to come, in order, with their relative costs."""
        ...

    def say(self, text: str) -> None:
        """A line of information, during a stage or between two."""
        ...

    def show(self, pictures: Pictures) -> None:
        """Images that are finished, a few of a batch."""
        ...

    def start(self, stage: str, total: int, done: int = 0) -> None:
        """`stage` begins and has `total` steps, `done` of which an earlier process did."""
        ...

    def advance(self, amount: int = 1, note: str = "", *, skipped: bool = False) -> None:
        """`amount` steps are done; `note` is a short word on how it goes, such as the loss.

        Args:
            skipped: They were done by an earlier process.
        """
        ...

    def finish(self) -> None:
        """The stage is over, also when it ends with an error before its last step."""
        ...

    @contextmanager
    def stage(self, name: str, total: int, done: int = 0) -> Iterator[Callable[..., None]]:
        """Starts the stage, gives `advance`, which also heeds signals, and finishes it in any case."""

        def step(amount: int = 1, note: str = "", *, skipped: bool = False) -> None:
            self.advance(amount, note, skipped=skipped)
            interrupts.stop_if_asked()

        self.start(name, total, done)
        try:
            yield step
        finally:
            self.finish()


class Silent(Progress):
    """Shows nothing."""

    def plan(self, stages: dict[str, float]) -> None:
        pass

    def say(self, text: str) -> None:
        pass

    def show(self, pictures: Pictures) -> None:
        pass

    def start(self, stage: str, total: int, done: int = 0) -> None:
        pass

    def advance(self, amount: int = 1, note: str = "", *, skipped: bool = False) -> None:
        pass

    def finish(self) -> None:
        pass


class Forwarding(Progress):
    """Passes on to `shown` what it is told; those who listen add what they do with it."""

    def __init__(self, shown: Progress) -> None:
        self._shown = shown

    def plan(self, stages: dict[str, float]) -> None:
        self._shown.plan(stages)

    def say(self, text: str) -> None:
        self._shown.say(text)

    def show(self, pictures: Pictures) -> None:
        self._shown.show(pictures)

    def start(self, stage: str, total: int, done: int = 0) -> None:
        self._shown.start(stage, total, done)

    def advance(self, amount: int = 1, note: str = "", *, skipped: bool = False) -> None:
        self._shown.advance(amount, note, skipped=skipped)

    def finish(self) -> None:
        self._shown.finish()


class Renamed(Forwarding):
    """Gives stages other names, where the same code runs for another purpose.

    Args:
        names: The other name of a stage; stages that are not in it keep theirs.
    """

    def __init__(self, shown: Progress, names: Mapping[str, str]) -> None:
        super().__init__(shown)
        self._names = names

    def start(self, stage: str, total: int, done: int = 0) -> None:
        super().start(self._names.get(stage, stage), total, done)


class Timed(Progress):
    """Keeps count and time; those who show something say how in `_show`, which gets `start`, `advance` or `finish`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._plan: dict[str, float] = {}
        self._worked = self._seconds_worked = 0.0

    def plan(self, stages: dict[str, float]) -> None:
        self._plan = dict(stages)

    def show(self, pictures: Pictures) -> None:
        """Nothing, unless the display has a place for pictures."""

    def start(self, stage: str, total: int, done: int = 0) -> None:
        self.name, self.total, self.done, self.note = stage, total, done, ""
        self.skipped, self._seconds_skipping = done, 0.0
        self._began = self._latest = self._clock()
        self._show("start")

    def advance(self, amount: int = 1, note: str = "", *, skipped: bool = False) -> None:
        now = self._clock()
        if skipped:
            self.skipped += amount
            self._seconds_skipping += now - self._latest
        self._latest = now
        self.done, self.note = self.done + amount, note
        self._show("advance")

    def finish(self) -> None:
        self._show("finish")
        if self.name in self._plan:
            self._worked += self._plan[self.name] * self.fraction_worked
            self._seconds_worked += self.seconds_working

    @property
    def fraction(self) -> float:
        return min(self.done / self.total, 1.0) if self.total else 1.0

    @property
    def fraction_worked(self) -> float:
        """What of `fraction` was done here, and not skipped."""
        return min((self.done - self.skipped) / self.total, 1.0) if self.total else 1.0

    @property
    def seconds(self) -> float:
        return self._clock() - self._began

    @property
    def seconds_working(self) -> float:
        """What of `seconds` did not go into skipping."""
        return self.seconds - self._seconds_skipping

    @property
    def seconds_left(self) -> float | None:
        """Of the stage; None before its first step."""
        if self.fraction == 1:
            return 0.0
        return self.seconds_working * (1 - self.fraction) / self.fraction_worked if self.fraction_worked else None

    @property
    def seconds_left_overall(self) -> float | None:
        """Of the whole plan; None without a plan, for a stage that is not in it, and before the first step."""
        stages = list(self._plan)
        if self.name not in stages:
            return None
        weight = self._plan[self.name]
        worked = self._worked + weight * self.fraction_worked
        if not worked:
            return None
        rate = (self._seconds_worked + self.seconds_working) / worked
        # What the stage itself tells is better known than what the plan says of it; the whole is never shorter than its part.
        own = self.seconds_left
        here = rate * weight * (1 - self.fraction) if own is None else own
        return here + rate * sum(self._plan[name] for name in stages[stages.index(self.name) + 1 :])

    @property
    def seconds_overall(self) -> float:
        """What the stages of the plan have taken here so far."""
        return self._seconds_worked + self.seconds_working

    @property
    def plan_of_stages(self) -> tuple[str, ...]:
        """The names of the plan's stages, in order."""
        return tuple(self._plan)

    def _left_text(self) -> str:
        """Such as `12 s left, 3 min overall, loss 0.4`; empty before the first step."""
        times = ((self.seconds_left, "left"), (self.seconds_left_overall, "overall"))
        parts = [f"{duration_text(seconds)} {word}" for seconds, word in times if seconds is not None]
        return ", ".join([*parts, self.note] if self.note else parts)

    def _show(self, event: str) -> None:
        raise NotImplementedError


class Lines(Timed):
    """Plain lines: one at the start, what it will take after the first steps, one every five seconds at most, one at the end."""

    def __init__(self, stream: Stream, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(clock)
        self._stream = stream

    def say(self, text: str) -> None:
        self._write(text)

    def _show(self, event: str) -> None:
        if event == "start":
            self._estimated = False
            steps = f", {self.total} steps" if self.total >= FIRST_STEPS else ""
            self._write(f"{self.name}: started{steps}{f', {self.done} of them done before' if self.done else ''}")
        elif event == "finish":
            outcome = "done" if self.done >= self.total else f"stopped at {self.done} of {self.total}"
            self._write(f"{self.name}: {outcome} after {duration_text(self.seconds)}")
        elif not self._estimated and self.done - self.skipped >= FIRST_STEPS:
            self._estimated = True
            self._estimate()
        elif self._clock() - self._written >= SECONDS_BETWEEN_LINES and self.done < self.total:
            self._write(f"{self.name}: {self.fraction:.0%}, {self._left_text()}")

    def _estimate(self) -> None:
        """Says what the stage takes in all, unless it is as good as over."""
        so_far, left = self.seconds_working, self.seconds_left
        if left is not None and left > SECONDS_BETWEEN_LINES:
            steps = f"{self.done - self.skipped} of {self.total - self.skipped} steps"
            self._write(f"{self.name}: {steps} took {duration_text(so_far)}, so about {_about_text(so_far + left)} in all")

    def _write(self, line: str) -> None:
        self._written = self._clock()
        self._stream.write(f"{line}\n")
        self._stream.flush()


class JsonLines(Timed):
    """One JSON object a line for every event, for programs."""

    def __init__(self, stream: Stream, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(clock)
        self._stream = stream

    def say(self, text: str) -> None:
        self._write({"event": "note", "text": text})

    def _show(self, event: str) -> None:
        facts: dict[str, str | float | None] = {"event": event, "stage": self.name, "done": self.done, "total": self.total}
        facts |= {"seconds": _rounded(self.seconds), "seconds_left": _rounded(self.seconds_left)}
        facts |= {"seconds_left_overall": _rounded(self.seconds_left_overall), "note": self.note}
        self._write(facts)

    def _write(self, facts: Mapping[str, str | float | None]) -> None:
        self._stream.write(json.dumps(facts) + "\n")
        self._stream.flush()


def choose(stream: Stream, json: bool) -> Progress:
    """JSON lines if asked for, bars if `stream` is a terminal, plain lines otherwise."""
    if json:
        return JsonLines(stream)
    if not stream.isatty():
        return Lines(stream)
    from reverie.progress._bars import Bars

    return Bars()


def duration_text(seconds: float) -> str:
    """Such as `0.4 s`, `12 s`, `3 min 20 s` or `2 h 5 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def loss_note(loss: float) -> str:
    """The note of a step that says its loss, such as `loss 0.4172`."""
    return f"loss {loss:.4g}"


def loss_of(note: str) -> float | None:
    """The loss that a note says, if it says one."""
    found = re.search(r"\bloss (\S+)", note)
    return float(found[1]) if found else None


def _about_text(seconds: float) -> str:
    """`duration_text` without seconds from two minutes on."""
    return f"{round(seconds / 60)} min" if 119.5 <= seconds < 3570 else duration_text(seconds)


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)
