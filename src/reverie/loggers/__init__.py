"""Where a run's curves and figures go besides its own directory. Each file is one tool.

    losses of each stage        loss/STAGE by step, while the stage runs; the second time that a stage of a name runs, loss/STAGE-2
    the figures at the end      accuracy, differences, agreement, sizes, times, as `metrics.json` has them, by their place in it
    pictures and files          the contact sheet, the recipe, the report

A logger only listens: it is told what `Progress` is told, and changes no byte of the result. A resumed run is logged from where it goes on.
"""

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import reverie.loggers
from reverie import plugins
from reverie.errors import ConfigError
from reverie.progress import Forwarding, Progress, loss_of

# Of `metrics.json`, what is a figure of the result.
_FIGURES = (
    "full_precision",
    "quantized",
    "exported",
    "difference",
    "agreement",
    "divergence",
    "estimate",
    "bytes",
    "latency_ms",
    "seconds",
    "peak_memory_bytes",
)


@runtime_checkable
class Log(Protocol):
    """An open log of one run."""

    def loss(self, name: str, step: int, value: float) -> None:
        """The loss of a stage after `step` steps."""
        ...

    def result(self, figures: Mapping[str, float], settings: Mapping[str, str], run: Path) -> None:
        """What came out.

        Args:
            figures: Numbers by dotted name.
            settings: Of the recipe, by dotted name.
            run: The complete run directory.
        """
        ...

    def close(self, *, failed: bool) -> None:
        """Nothing more will come; `failed` if that is because of an error."""
        ...


@runtime_checkable
class Logger(Protocol):
    """Opens logs; the object is its own configuration."""

    library: ClassVar[str]
    """The module that it needs."""

    def open(self, run: Path, name: str) -> Log:
        """A log of the run in the directory `run`, which exists; `name` says which network it is."""
        ...


def load(name: str) -> Logger:
    """The logger `name`.

    Raises:
        ConfigError: No such logger, or its library is not installed; the message names the choices, or the extra.
    """
    logger: Logger = plugins.load(reverie.loggers, name)()
    if importlib.util.find_spec(logger.library) is None:
        raise ConfigError(
            f"logger {name!r}: must be installed, got no module {logger.library!r}; pip install 'reverie[{name}]'"
        )
    return logger


class Logged(Forwarding):
    """Passes on to `shown` what it is told, and the losses to logs.

    Args:
        used: The loggers. Their logs are opened with the first event, when the run directory is there and ours.
        run, name: As for `Logger.open`.
    """

    def __init__(self, shown: Progress, used: Sequence[Logger], run: Path, name: str) -> None:
        super().__init__(shown)
        self._used, self._run, self._name = used, run, name
        self._logs: list[Log] | None = None
        self._times: dict[str, int] = {}

    def plan(self, stages: dict[str, float]) -> None:
        self._open()
        super().plan(stages)

    def start(self, stage: str, total: int, done: int = 0) -> None:
        times = self._times[stage] = self._times.get(stage, 0) + 1
        self._stage, self._done = f"loss/{stage}" if times == 1 else f"loss/{stage}-{times}", done
        super().start(stage, total, done)

    def advance(self, amount: int = 1, note: str = "", *, skipped: bool = False) -> None:
        self._done += amount
        value = None if skipped else loss_of(note)
        if value is not None:
            for log in self._open():
                log.loss(self._stage, self._done, value)
        super().advance(amount, note, skipped=skipped)

    def result(self, metrics: Mapping[str, Any], recipe: Mapping[str, Any]) -> None:
        """The run is complete.

        Args:
            metrics: As in `metrics.json`.
            recipe: The resolved recipe as nested dictionaries.
        """
        figures = {
            name: float(value) for name, value in _flat({key: metrics.get(key) for key in _FIGURES}) if _is_number(value)
        }
        settings = {name: str(value) for name, value in _flat(recipe)}
        for log in self._open():
            log.result(figures, settings, self._run)

    def close(self, *, failed: bool) -> None:
        """Closes the logs that are open."""
        for log in self._logs or ():
            log.close(failed=failed)

    def _open(self) -> list[Log]:
        if self._logs is None:
            self._logs = [logger.open(self._run, self._name) for logger in self._used]
        return self._logs


@contextmanager
def logged(shown: Progress, used: Sequence[Logger], run: Path, name: str) -> Iterator[Logged]:
    """A `Logged` whose logs are closed in any case; arguments as there."""
    progress = Logged(shown, used, run, name)
    with ExitStack() as stack:
        stack.callback(progress.close, failed=True)
        yield progress
        stack.pop_all()
    progress.close(failed=False)


def _flat(tables: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested dictionaries, by dotted name."""
    for name, value in tables.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
