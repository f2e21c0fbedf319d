"""The folder is the registry: a file in a plug-in package is a method, and its name is the method's name.

A plug-in file defines `METHOD`, a frozen dataclass that is its own configuration and can be called. Files whose name
begins with an underscore are not plug-ins.
"""

import importlib
import pkgutil
from types import ModuleType
from typing import Any

from reverie.errors import ConfigError, unknown

# What a user calls the methods of a package, where it is not the package's name.
_KINDS = {"export": "target", "formats": "target", "runtimes": "runtime", "loggers": "logger"}
# The extra that brings a module, where it has another name.
_EXTRAS = {"onnxruntime": "onnx", "onnx_ir": "onnx", "onnxscript": "onnx", "ml_dtypes": "onnx"}


def names(package: ModuleType) -> list[str]:
    """Names of the methods in `package`, sorted; imports none of them."""
    found = (module.name for module in pkgutil.iter_modules(package.__path__))
    return sorted(name for name in found if not name.startswith("_"))


def load(package: ModuleType, name: str) -> Any:
    """The `METHOD` of the file `name` in `package`.

    Raises:
        ConfigError: No such method; the message lists the choices and suggests the nearest. Or a library that it needs is not
            installed, for which the message names the extra that brings it, or broken.
    """
    short = package.__name__.rpartition(".")[2]
    kind = _KINDS.get(short, f"{short} method")
    if name not in names(package):
        raise unknown(kind, name, names(package))
    try:
        return importlib.import_module(f"{package.__name__}.{name}").METHOD
    except ModuleNotFoundError as error:
        missing = str(error.name).partition(".")[0]
        if missing == "reverie":
            raise
        extra = _EXTRAS.get(missing, missing)
        raise ConfigError(f"{kind} {name!r}: must be installed, got no module {missing!r}; {with_extra(extra)}") from None
    except (ImportError, OSError) as error:
        if str(getattr(error, "name", None)).startswith("reverie"):
            raise
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{kind} {name!r}: its library must be importable, got {reason!r}; install that again") from error


def with_extra(extra: str) -> str:
    """The cure for something missing that Reverie's `extra` brings; Reverie is on no registry."""
    return f"install Reverie with its extra {extra!r}: pip install -e '.[{extra}]' in its folder"


def name_of(method: object) -> str:
    """The name of the method that `method` is: its file's."""
    return type(method).__module__.rpartition(".")[2]
