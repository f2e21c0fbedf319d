"""The folder is the registry: a file in a plug-in package is a method, and its name is the method's name.

A plug-in file defines `METHOD`, a frozen dataclass that is its own configuration and can be called. Files whose name
begins with an underscore are not plug-ins.
"""

import importlib
import pkgutil
from types import ModuleType
from typing import Any

from reverie.errors import unknown


def names(package: ModuleType) -> list[str]:
    """Names of the methods in `package`, sorted; imports none of them."""
    found = (module.name for module in pkgutil.iter_modules(package.__path__))
    return sorted(name for name in found if not name.startswith("_"))


def load(package: ModuleType, name: str) -> Any:
    """The `METHOD` of the file `name` in `package`.

    Raises:
        ConfigError: No such method; the message lists the choices and suggests the nearest.
    """
    if name not in names(package):
        raise unknown(f"{package.__name__.rpartition('.')[2]} method", name, names(package))
    return importlib.import_module(f"{package.__name__}.{name}").METHOD


def name_of(method: object) -> str:
    """The name of the method that `method` is: its file's."""
    return type(method).__module__.rpartition(".")[2]
