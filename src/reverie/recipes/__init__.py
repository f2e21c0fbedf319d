"""Recipes as TOML files: those that come with Reverie, which stand beside this file, and the user's.

A recipe is a file of flat tables. A table with a `method` key chooses a plug-in, and its other keys are that method's own
settings.

    seed = 0
    images = 64

    [synthesis]                    [quantization]              [rounding]
    method = "zeroq"               weight_bits = 4             method = "adaround"
    steps = 200                    activation_bits = 8
"""

import dataclasses
import hashlib
import math
import tomllib
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

from pydantic import TypeAdapter, ValidationError

from reverie import export, observers, plugins, received, rounding, synthesis
from reverie.errors import ConfigError, at, nearest, unknown
from reverie.export import Exporter
from reverie.graph.placement import Bits
from reverie.recipe import Quantization, Recipe
from reverie.recovery.clipping import Clipping
from reverie.recovery.distillation import Distillation
from reverie.recovery.mixed_precision import MixedPrecision
from reverie.recovery.reconstruction import Reconstruction

# Which plug-in package a table's `method` is looked up in.
_PACKAGES: dict[str, ModuleType] = {
    "synthesis": synthesis,
    "activations": observers,
    "weights": observers,
    "rounding": rounding,
    "export": export,
}
_TABLES: dict[str, type[Any]] = {
    "quantization": Quantization,
    "bits": Bits,
    "mixed_precision": MixedPrecision,
    "reconstruction": Reconstruction,
    "clipping": Clipping,
    "distillation": Distillation,
}


def presets() -> list[str]:
    """Names of the recipes that come with Reverie."""
    files = resources.files(__name__).iterdir()
    return sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml"))


def about(preset: str) -> str:
    """What a preset is for: the comment at the top of its file."""
    first = (resources.files(__name__) / f"{preset}.toml").read_text().partition("\n")[0]
    return first.removeprefix("#").strip()


def read(name_or_file: str, overrides: dict[str, Any] | None = None) -> Recipe:
    """A preset by its name, or a recipe file by its path.

    Args:
        overrides: Values by dotted key, such as `{"quantization.weight_bits": 4}`; they win over the file. A new
            `X.method` drops the other settings of table X, which belonged to another method.

    Raises:
        ConfigError: No such recipe; or an unknown key, method or value in it, named together with the choices.
    """
    path = Path(name_or_file)
    if name_or_file == "best":
        raise ConfigError(
            "recipe best must be chosen for a network, got none; use `reverie quantize NETWORK --recipe best`, or reverie.choose_recipe"
        )
    if path.suffix == ".toml":
        if not path.is_file():
            raise ConfigError(
                f"{path}: a recipe file must exist, got none; `reverie recipe {presets()[0]}` prints one to start from"
            )
        with at(str(path)):
            text = _utf8(received.read_bytes(path, received.MOST_RECIPE_BYTES))
    elif name_or_file in presets():
        text = (resources.files(__name__) / f"{name_or_file}.toml").read_text()
    else:
        raise unknown("recipe", name_or_file, [*presets(), "best"])
    with at(str(path) if path.suffix == ".toml" else f"recipe {name_or_file}"):
        try:
            tables = tomllib.loads(text)
        except (ValueError, RecursionError) as error:
            # Besides its own error: integers of thousands of digits, and brackets in brackets in brackets.
            raise ConfigError(f"must be TOML, got {str(error)!r}") from None
        return from_tables(tables, overrides)


def _utf8(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise ConfigError("must be TOML in UTF-8, got other bytes") from None


def from_tables(tables: dict[str, Any], overrides: dict[str, Any] | None = None) -> Recipe:
    """A recipe from the nested dictionaries of a TOML file; arguments and errors as for `read`."""
    tables = {key: dict(value) if isinstance(value, dict) else value for key, value in tables.items()}
    # Methods first, since a new one drops the settings that stand in its table.
    for key, value in sorted((overrides or {}).items(), key=lambda item: not item[0].endswith(".method")):
        table, dot, leaf = key.partition(".")
        if not dot:
            tables[table] = value
        elif not isinstance(tables.get(table, {}), dict):
            raise ConfigError(f"{key} must be a key of a table, got the single value {table!r}; leave out {'.' + leaf!r}")
        elif leaf == "method" and tables.get(table, {}).get("method") != value:
            tables[table] = {"method": value}
        else:
            tables.setdefault(table, {})[leaf] = value
    names = [item.name for item in dataclasses.fields(Recipe)]
    resolved: dict[str, Any] = {}
    for key, value in tables.items():
        if key not in names:
            raise unknown("key", key, names, elsewhere=_settings(tables))
        if key in _PACKAGES or key in _TABLES:
            if not isinstance(value, dict):
                raise ConfigError(f"[{key}] must be a table, got {value!r}")
            with at(f"[{key}]"):
                resolved[key] = _table(key, value)
        else:
            resolved[key] = _valid(_hint(Recipe, key), value, key)
    return Recipe(**resolved)


def _settings(tables: dict[str, Any]) -> list[str]:
    """The dotted keys of all tables, with the methods that `tables` chooses."""
    chosen = {key: tables[key].get("method") for key in _PACKAGES if isinstance(tables.get(key), dict)}
    known = {key: name for key, name in chosen.items() if name in plugins.names(_PACKAGES[key])}
    kinds = _TABLES | {key: plugins.load(_PACKAGES[key], name) for key, name in known.items()}
    return [f"{table}.{item.name}" for table, kind in kinds.items() for item in dataclasses.fields(kind)]


def exporter(target: str, settings: dict[str, Any]) -> Exporter:
    """The exporter `target` with these settings, checked as those of a recipe's `[export]` are.

    Raises:
        ConfigError: No such target, or an unknown setting or value; names the choices.
    """
    kind = plugins.load(export, target)
    with at(f"target {target}"):
        found: Exporter = configure(kind, settings)
    return found


def _table(key: str, value: dict[str, Any]) -> Any:
    settings = dict(value)
    if key in _TABLES:
        kind = _TABLES[key]
    else:
        method = settings.pop("method", None)
        choices = plugins.names(_PACKAGES[key])
        if method is None:
            raise ConfigError(f"missing key 'method'; choose one of {', '.join(choices)}")
        if key == "export" and method == "none":
            return None
        kind = plugins.load(_PACKAGES[key], str(method))
    return configure(kind, settings)


def configure(kind: type[Any], settings: dict[str, Any]) -> Any:
    """The dataclass `kind` with the settings that a file or a command line gives.

    Raises:
        ConfigError: A setting that it does not have, or a value that is none.
    """
    names = [item.name for item in dataclasses.fields(kind)]
    for name in settings:
        if name not in names:
            if not names:
                raise ConfigError(f"unknown key {name!r}; {kind.__name__} has no settings")
            raise unknown("key", name, names)
    checked = {name: _valid(_hint(kind, name), setting, name) for name, setting in settings.items()}
    return kind(**checked)


def _hint(kind: type[Any], name: str) -> Any:
    return {item.name: item.type for item in dataclasses.fields(kind)}[name]


def _valid(hint: Any, value: Any, key: str) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key} must be finite, got {value!r}")
    if isinstance(value, list):
        # TOML has no tuples.
        value = tuple(value)
    try:
        return TypeAdapter(hint).validate_python(value, strict=not isinstance(value, int) or isinstance(value, bool))
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Input should be ").lower()
        near = nearest(str(value), (choice for choice in get_args(hint) if isinstance(choice, str)))
        raise ConfigError(f"{key} must be {reason}, got {value!r}{f'; did you mean {near!r}?' if near else ''}") from None


def tables(recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe as nested dictionaries: every setting of every method is there."""
    found: dict[str, Any] = {}
    for item in dataclasses.fields(Recipe):
        value = getattr(recipe, item.name)
        if value is None:
            found[item.name] = {"method": "none"}
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            method = {"method": plugins.name_of(value)} if item.name in _PACKAGES else {}
            found[item.name] = method | dataclasses.asdict(value)
        else:
            found[item.name] = value
    return found


def to_toml(recipe: Recipe) -> str:
    """The resolved recipe as TOML; reading it gives the same recipe."""
    resolved = tables(recipe)
    lines = [f"{key} = {_literal(value)}" for key, value in resolved.items() if not isinstance(value, dict)]
    for key, value in resolved.items():
        if isinstance(value, dict):
            lines += ["", f"[{key}]", *(f"{name} = {_literal(setting)}" for name, setting in value.items())]
    return "\n".join(lines) + "\n"


def fingerprint(recipe: Recipe) -> str:
    """SHA-256 of the resolved recipe, 16 hex digits."""
    return hashlib.sha256(to_toml(recipe).encode()).hexdigest()[:16]


def _literal(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_literal(item) for item in value) + "]"
    return repr(value)
