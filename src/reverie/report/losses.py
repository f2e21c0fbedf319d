"""The loss of every stage that learns, over its steps, for the report.

Stages tell their losses to `Progress` as they go, so a curve is what passes by, thinned. It is on the disk every few seconds and
at the end of a stage, and a run that was killed goes on in it: points behind the step it goes on from are made again.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reverie import received
from reverie.errors import ConfigError
from reverie.files import atomic_json
from reverie.progress import Forwarding, Progress, loss_of

# Of a curve, and seconds between two writings of them.
_POINTS = 200
_SECONDS = 5.0
_STAGES = frozenset({"synthesize", "refine", "excite", "round", "distil"})


class Recorder(Forwarding):
    """Passes on to `shown` what it is told, and keeps the losses.

    Args:
        file: Where they are kept; its folder exists.
        clock: Seconds, not those of the day.
    """

    def __init__(self, file: Path, shown: Progress, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(shown)
        self._file, self._clock = file, clock
        self._curves: dict[str, Any] = read(file)
        self._written = clock()

    def start(self, stage: str, total: int, done: int = 0) -> None:
        self._stage, self._done, self._every = stage, done, max(1, -(-total // _POINTS))
        super().start(stage, total, done)

    def advance(self, amount: int = 1, note: str = "", *, skipped: bool = False) -> None:
        loss = None if skipped or self._stage not in _STAGES else loss_of(note)
        if loss is not None:
            self._keep(self._done, loss)
        self._done += amount
        super().advance(amount, note, skipped=skipped)

    def finish(self) -> None:
        super().finish()
        if self._stage in self._curves:
            self._write()

    def _keep(self, step: int, loss: float) -> None:
        curve = self._curves.setdefault(self._stage, {"steps": [], "losses": []})
        while curve["steps"] and curve["steps"][-1] >= step:
            del curve["steps"][-1], curve["losses"][-1]
        if not curve["steps"] or step - curve["steps"][-1] >= self._every:
            curve["steps"].append(step)
            curve["losses"].append(float(f"{loss:.4g}"))
        if self._clock() - self._written >= _SECONDS:
            self._write()

    def _write(self) -> None:
        atomic_json(self._file, self._curves)
        self._written = self._clock()


def read(file: Path) -> dict[str, Any]:
    """The curves kept in `file`, by stage: `steps`, counted from 0, and `losses`; none where it is missing or damaged."""
    try:
        found: dict[str, Any] = received.parse_json(
            received.read_bytes(file), dict[str, dict[str, list[float]]], "delete it; it is for the report alone"
        )
    except ConfigError:
        return {}
    return found
