"""What Reverie raises when a request cannot be met.

    ReverieError
      ConfigError   the request is wrong: unknown name, value out of range   (also ValueError)
      ModelError    the request is fine, this network cannot satisfy it
      ExportError   the target format or runtime cannot express the result

A message has one form, `place: what must hold, got value; cure`: lower case, one line, no full stop. The place is added
by whoever knows it, with `at`, not by the thrower.
"""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class ReverieError(Exception):
    """Something the caller can mend; the command line shows it as one line."""


class ConfigError(ReverieError, ValueError):
    """The request itself is wrong: an unknown name, a value out of range, unusable files."""


class ModelError(ReverieError):
    """The request is fine; this network cannot satisfy it."""


class ExportError(ReverieError):
    """The target format or runtime cannot express the result, or disagrees with it."""


@contextmanager
def at(place: str) -> Iterator[None]:
    """Prefixes every `ReverieError` raised inside with `place: `."""
    try:
        yield
    except ReverieError as error:
        error.args = (f"{place}: {error}",)
        raise


def unknown(kind: str, name: str, choices: Iterable[str]) -> ConfigError:
    """The error for a name that is not among `choices`: lists them and suggests the nearest."""
    choices = sorted(choices)
    nearest = difflib.get_close_matches(name, choices, n=1)
    hint = f", or did you mean {nearest[0]!r}?" if nearest else ""
    return ConfigError(f"unknown {kind} {name!r}; choose one of {', '.join(choices)}{hint}")
