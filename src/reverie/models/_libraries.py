"""What the sources that stand on another library share: asking for the library, and for a name it does not know."""

import difflib
import importlib
from collections.abc import Collection
from types import ModuleType

from reverie.errors import ConfigError, ModelError
from reverie.plugins import with_extra


def require(module: str, *, extra: str, distribution: str) -> ModuleType:
    """The imported library.

    Raises:
        ModelError: It is not installed; the message names `extra`.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise ModelError(f"{distribution} must be installed, got no module {error.name!r}; {with_extra(extra)}") from None


def unknown_network(source: str, name: str, choices: Collection[str], *, listing: str) -> ConfigError:
    """The error for a name that a library does not know.

    A library has hundreds of networks: names only the close ones and says, with `listing`, how to see all.
    """
    close = difflib.get_close_matches(name.lower(), choices, n=5)
    cure = f"did you mean one of {', '.join(close)}?" if close else f"{listing} lists all {len(choices)}"
    return ConfigError(f"unknown {source} network {name!r}; {cure}")
