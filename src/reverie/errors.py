"""What Reverie raises when a request cannot be met.

    ReverieError
      ConfigError   the request is wrong: unknown name, value out of range   (also ValueError)
        BudgetError     too few minutes for what is asked
      ModelError    the request is fine, this network cannot satisfy it
      ExportError   the target format or runtime cannot express the result
      DivergenceError   training went out of hand with these settings

A message has one form, `place: what must hold, got value; cure`: lower case, one line, no full stop. The place is added
by whoever knows it, with `at`, not by the thrower.
"""

import difflib
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class ReverieError(Exception):
    """Something the caller can mend; the command line shows it as one line."""


class ConfigError(ReverieError, ValueError):
    """The request itself is wrong: an unknown name, a value out of range, unusable files."""


class BudgetError(ConfigError):
    """The request is fine, but for the minutes that it may take."""


class ModelError(ReverieError):
    """The request is fine; this network cannot satisfy it."""


class ExportError(ReverieError):
    """The target format or runtime cannot express the result, or disagrees with it."""


class DivergenceError(ReverieError):
    """Training went out of hand: a loss became infinite or undefined, or exploded."""


@contextmanager
def at(place: str) -> Iterator[None]:
    """Prefixes every `ReverieError` raised inside with `place: `."""
    try:
        yield
    except ReverieError as error:
        error.args = (f"{place}: {error}",)
        raise


def check_range(settings: object, **ranges: tuple[int | float, int | float]) -> None:
    """Refuses the first attribute of `settings` that is not within its (smallest, largest) value, both allowed.

    Raises:
        ConfigError: Names the attribute and what it may be. Not a number is outside every range.
    """
    for name, (low, high) in ranges.items():
        value = getattr(settings, name)
        if not low <= value <= high:
            allowed = f"at least {low:g}" if high == math.inf else f"{low:g} to {high:g}"
            raise ConfigError(f"{name} must be {allowed}, got {value!r}")


def unknown(kind: str, name: str, choices: Iterable[str], *, elsewhere: Iterable[str] = ()) -> ConfigError:
    """The error for a name that is not among `choices`: lists them and suggests the nearest.

    Args:
        elsewhere: Names that would do in another place, to be suggested and not listed.
    """
    choices = sorted(choices)
    near = nearest(name, (*choices, *elsewhere))
    hint = f", or did you mean {near!r}?" if near else ""
    return ConfigError(f"unknown {kind} {name!r}; choose one of {', '.join(choices)}{hint}")


def nearest(name: str, choices: Iterable[str]) -> str | None:
    """The choice that `name` was probably meant for, if there is one.

    A choice that has all words of `name` (`bits` of `weight-bits`) comes before one that is only spelled alike; case does not count.
    """
    known = {choice.lower(): choice for choice in sorted(choices)}
    wanted = _words(name)
    alike = [low for low in known if wanted and wanted <= _words(low)]
    found = difflib.get_close_matches(name.lower(), alike, n=1, cutoff=0) or difflib.get_close_matches(name.lower(), known, n=1)
    return known[found[0]] if found else None


def _words(name: str) -> set[str]:
    return set(re.findall("[a-z0-9]+", name.lower()))
