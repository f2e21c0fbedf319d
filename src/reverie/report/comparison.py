"""Runs side by side: their figures, who is ahead in each, and what differs in their recipes and versions.

A figure is compared only where it means the same: accuracy, measured drop and agreement on the same images, an estimated drop
with estimated ones, latency in the same versions and threads. Who is ahead is marked by the number alone; whether the difference
is more than chance, the intervals tell.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any

from reverie.errors import ConfigError
from reverie.progress import duration_text
from reverie.report.outcome import NONE, memory_text, percent, size_text
from reverie.report.overview import Overview

MARK = "*"
# By this a page of ours is known again, and may be replaced.
GENERATOR = "reverie compare"


@dataclass(frozen=True)
class Column:
    """A figure of every run.

    Args:
        name: At the head of the column.
        texts: A cell for each run.
        best: The runs that are ahead; empty where all are alike, or cannot be compared.
        why_not: Why nobody is marked, if the figures cannot be compared.
    """

    name: str
    texts: tuple[str, ...]
    best: frozenset[int]
    why_not: str | None = None


@dataclass(frozen=True)
class Comparison:
    """Runs side by side.

    Args:
        runs: As they were given.
        columns: Their figures.
        recipe: By dotted key the setting of each run, for the keys in which they differ; None where a run has no such key.
        versions: By library (or fact of the machine) the version of each run, for all; `changed` names those that differ.
        notes: What to keep in mind.
    """

    runs: tuple[Overview, ...]
    columns: tuple[Column, ...]
    recipe: dict[str, tuple[Any, ...]]
    versions: dict[str, tuple[Any, ...]]
    notes: tuple[str, ...]

    @property
    def changed(self) -> tuple[str, ...]:
        """The versions that differ."""
        return tuple(name for name, values in self.versions.items() if len(set(values)) > 1)

    @property
    def names(self) -> list[str]:
        """What the runs are called: their folders, or, where two folders are called the same, the whole paths."""
        last = [run.path.rstrip("/").rpartition("/")[2] for run in self.runs]
        return last if len(set(last)) == len(last) else [run.path for run in self.runs]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "runs": [asdict(run) for run in self.runs],
            "best": {column.name: sorted(column.best) for column in self.columns},
            "recipe": {key: list(values) for key, values in self.recipe.items()},
            "versions": {key: list(values) for key, values in self.versions.items()},
            "notes": list(self.notes),
        }


def compare(runs: Sequence[Overview], *, any_network: bool = False) -> Comparison:
    """The runs side by side.

    Args:
        any_network: Whether they may be of different networks.

    Raises:
        ConfigError: Fewer than two, one that is not complete or has no network, or different networks and not `any_network`.
    """
    if len(runs) < 2:
        raise ConfigError(f"compare must be given at least two runs, got {len(runs)}")
    for run in runs:
        if run.state != "complete":
            raise ConfigError(
                f"{run.path}: must be a complete run, got one that is {run.state}; leave it out, or run it to its end"
            )
        if run.only_images:
            raise ConfigError(f"{run.path}: must be a run of `reverie quantize`, got images alone; leave it out")
    networks = {run.fingerprint: run.network for run in runs}
    notes = []
    if len(networks) > 1:
        told = ", ".join(f"{name} ({fingerprint})" for fingerprint, name in networks.items())
        if not any_network:
            raise ConfigError(f"all runs must be of one network, got {told}; compare those of one, or add --any-network")
        notes.append(f"these are different networks: {told}; what is lost can be compared, what is left says little")
    columns = _columns(runs, one_network=len(networks) == 1)
    notes += [f"{column.name}: {column.why_not}" for column in columns if column.why_not]
    return Comparison(tuple(runs), columns, _settings(runs), _versions(runs), tuple(notes))


def _columns(runs: Sequence[Overview], *, one_network: bool) -> tuple[Column, ...]:
    networks = None if one_network else "measured on different networks"
    bases = [None if run.accuracy is None else _set(run, "evaluation") for run in runs]
    labelled = networks or _differing(bases, "measured on different images")
    drops = _differing(
        [None if run.drop is None else "estimate" if run.estimated else _set(run, "evaluation") for run in runs],
        "some are estimated, or measured on different images",
    )
    # Each run makes images of its own.
    answered = [None if run.agreement is None else run.agreement[2] + _set(run, run.agreement[2]) for run in runs]
    synthetic = any(run.agreement is not None and run.agreement[2] == "synthetic" for run in runs)
    agreeing = "on each run's own synthetic images" if synthetic else _differing(answered, "on different images")
    timed = networks or _differing(
        [None if run.latency_ms is None else str(sorted((run.versions or {}).items())) for run in runs],
        "timed with different versions or threads",
    )
    seconds = _differing([str((run.versions or {}).get("threads")) for run in runs], "with different numbers of threads")
    full = [run.full_precision for run in runs]
    columns = [
        Column("bits", tuple(run.bits or NONE for run in runs), frozenset()),
        Column("methods", tuple(run.recipe or NONE for run in runs), frozenset()),
        _column(runs, "accuracy", accuracy_text, lambda run: None if run.accuracy is None else -run.accuracy, labelled),
        Column("full precision", tuple(percent(value) for value in full), frozenset()),
        _column(runs, "drop, points", drop_text, lambda run: None if run.drop is None else run.drop[0], drops),
        _column(runs, "agreement", _agreement, lambda run: None if run.agreement is None else -run.agreement[0], agreeing),
        _column(runs, "size", _size, lambda run: run.bytes, networks),
        _column(runs, "latency", _latency, lambda run: run.latency_ms, timed),
        _column(
            runs,
            "time",
            lambda run: NONE if run.seconds is None else duration_text(run.seconds),
            lambda run: run.seconds,
            seconds,
        ),
        _column(
            runs,
            "memory",
            lambda run: NONE if run.memory_bytes is None else memory_text(run.memory_bytes),
            lambda run: run.memory_bytes,
            None,
        ),
    ]
    return tuple(column for column in columns if any(text != NONE for text in column.texts))


def _column(
    runs: Sequence[Overview],
    name: str,
    text: Callable[[Overview], str],
    figure: Callable[[Overview], float | None],
    why_not: str | None,
) -> Column:
    """Where less is better."""
    figures = [figure(run) for run in runs]
    known = [value for value in figures if value is not None]
    alike = len(set(known)) < 2
    best = frozenset() if alike or why_not else frozenset(index for index, value in enumerate(figures) if value == min(known))
    return Column(name, tuple(map(text, runs)), best, why_not if len(known) > 1 else None)


def _differing(bases: Sequence[str | None], why: str) -> str | None:
    """`why`, if the figures that there are rest on different things."""
    return why if len({basis for basis in bases if basis is not None}) > 1 else None


def _set(run: Overview, name: str) -> str:
    return (run.sets or {}).get(name, "none")


def _settings(runs: Sequence[Overview]) -> dict[str, tuple[Any, ...]]:
    """The settings that differ, in the order of the recipes."""
    keys = list(dict.fromkeys(key for run in runs for key in run.settings or {}))
    every = {key: tuple((run.settings or {}).get(key) for run in runs) for key in keys}
    return {key: values for key, values in every.items() if any(value != values[0] for value in values)}


def _versions(runs: Sequence[Overview]) -> dict[str, tuple[Any, ...]]:
    keys = list(dict.fromkeys(key for run in runs for key in run.versions or {}))
    return {key: tuple((run.versions or {}).get(key) for run in runs) for key in keys}


def accuracy_text(run: Overview) -> str:
    """Such as `99.67 %`."""
    return percent(run.accuracy)


def drop_text(run: Overview) -> str:
    """Points with their interval: `0.11 (-0.29 to 0.63)`, `about 1.8 (0.6 to 4.1)` where it is estimated, `above 12.0`."""
    if run.drop is None:
        return NONE
    drop, low, high = run.drop
    if drop is None:
        return f"above {100 * low:.1f}"
    # Without a minus before a zero.
    value, low, high = (100 * part + 0.0 for part in (drop, low, high))
    return f"about {value:.1f} ({low:.1f} to {high:.1f})" if run.estimated else f"{value:.2f} ({low:.2f} to {high:.2f})"


def _agreement(run: Overview) -> str:
    return NONE if run.agreement is None else f"{percent(run.agreement[0])} of {run.agreement[1]}"


def _size(run: Overview) -> str:
    if run.bytes is None:
        return NONE
    smaller = "" if run.full_precision_bytes is None else f" ({run.full_precision_bytes / run.bytes:.1f} x smaller)"
    return f"{size_text(run.bytes)}{smaller}"


def _latency(run: Overview) -> str:
    return NONE if run.latency_ms is None or run.speed is None else f"{run.latency_ms:.3g} ms ({run.speed:.2f} x)"


def setting_text(value: object) -> str:
    """As in a recipe, without quotes."""
    if value is None:
        return NONE
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def page(found: Comparison) -> str:
    """The comparison as one HTML file that needs nothing else."""
    import jinja2

    template = (resources.files("reverie.report") / "comparison.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    networks = list(dict.fromkeys(run.network for run in found.runs))
    return environment.from_string(template).render(
        generator=GENERATOR,
        networks=networks,
        names=found.names,
        columns=found.columns,
        bars=_bars(found),
        estimated=any(run.estimated for run in found.runs),
        recipe={key: [setting_text(value) for value in values] for key, values in found.recipe.items()},
        versions={key: [setting_text(value) for value in values] for key, values in found.versions.items()},
        changed=found.changed,
        notes=found.notes,
        paths=[run.path for run in found.runs],
    )


@dataclass(frozen=True)
class Interval:
    """A drop on a line, in percent of its length.

    Args:
        low, high, value: Where the interval ends, and what was found; `value` is None beyond what the estimate was calibrated on.
    """

    name: str
    text: str
    low: float
    high: float
    value: float | None


def _bars(found: Comparison) -> tuple[list[Interval], float]:
    """The drops on one line, and where 0 is on it."""
    drops = [(name, run) for name, run in zip(found.names, found.runs, strict=True) if run.drop is not None]
    ends = [end for _, run in drops for end in (run.drop or (0, 0, 0))[1:]]
    low, high = min([0.0, *ends]), max([0.0, *ends])
    reach = (high - low) or 1.0

    def place(value: float) -> float:
        return 100 * (value - low) / reach

    bars = []
    for name, run in drops:
        assert run.drop is not None
        value, first, last = run.drop
        bars.append(Interval(name, drop_text(run), place(first), place(last), None if value is None else place(value)))
    return bars, place(0.0)
