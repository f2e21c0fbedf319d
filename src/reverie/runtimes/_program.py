"""A `.pt2` file before PyTorch reads it: nothing in it may be code.

`torch.export.load` trusts its files. Of torch 2.13: it unpickles sample inputs, and weights and constants that a flag says are pickled; it
loads shared libraries from `data/aotinductor`; sizes are evaluated as Python by SymPy; guards and names become source text that is executed; a
node may call anything that is reachable from `torch`, such as `torch.os.system`; and structures of arguments name modules to import.

So what is loaded is a copy, made of the members that Reverie writes and of nothing else:

    sample inputs      left out, so that there is no pickle
    weights            raw bytes alone, as many as their shapes say
    strings            words, but for those of known form: operators of arithmetic, sizes, structures of tuples
    guards, metadata, objects, subgraphs        none

A program that `torch.export.save` made of anything else than Reverie's lowering may therefore be refused.
"""

import io
import math
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reverie import received
from reverie.errors import ConfigError

_MODEL = "models/model.json"
_WEIGHTS = "data/weights/model_weights_config.json"
_CONSTANTS = "data/constants/model_constants_config.json"
_INPUTS = "data/sample_inputs/model.pt"
_MEMBER = re.compile(
    r"data/weights/weight_\d+|data/constants/tensor_\d+|archive_format|archive_version|byteorder|\.data/version|\.data/serialization_id|extra/.*"
)
_AGAIN = "export it again"

# What strings may be, by the key that they stand under; all others are words.
_WORDS = re.compile(r"[\w.+-]*")
_NAME = re.compile(r"\w*")
_OPERATOR = re.compile(
    r"torch\.ops\.(aten|quantized_decomposed)\._?[a-z]\w*\.[A-Za-z]\w*|_operator\.(getitem|add|sub|mul|floordiv|mod|neg)"
)
_SIZE = re.compile(
    r"(?:(?:Symbol|Integer|Add|Mul|FloorDiv|Mod|Max|Min)\(|'[su]\d+'|(?:positive|integer|nonnegative)=True|-?\d{1,12}|[, )])*"
)
_STRUCTURE = re.compile(r'(?:"(?:type|context|children_spec|builtins\.(?:tuple|list|dict)|null|\[\])"|null|1|[\[\]{}:, ])*')
_FORMS = {
    "target": _OPERATOR,
    "expr_str": _SIZE,
    "in_spec": _STRUCTURE,
    "out_spec": _STRUCTURE,
    "name": _NAME,
    "as_name": _NAME,
}
# Names of modes of padding and interpolation, which some operators take; a file's name would be a string too.
_TEXTS = frozenset({"constant", "reflect", "replicate", "circular", "none", "tanh", "zeros", "valid", "same"})
# Keys whose values have to be empty, or whose objects torch calls.
_EMPTY = frozenset({"guards_code", "metadata", "treespec_namedtuple_fields", "custom_obj_values"})
_NEVER = frozenset({"as_graph", "as_custom_obj", "as_operator", "as_complex", "as_string_to_argument", "custom_obj"})


def inert(path: Path) -> io.BytesIO:
    """A copy of the program in `path` for `torch.export.load`, with nothing in it that could be executed.

    Raises:
        ConfigError: No whole program, or one that holds what Reverie does not write; without the place.
    """
    root, members = _members(path)
    for name in (_MODEL, _WEIGHTS, _CONSTANTS):
        if name not in members:
            raise ConfigError(f"must be a torch.export program, got no {name}; {_AGAIN}")
    members[_INPUTS] = b""
    for name in members:
        if name not in (_MODEL, _WEIGHTS, _CONSTANTS, _INPUTS) and not _MEMBER.fullmatch(name):
            raise ConfigError(f"must hold only what Reverie writes, got {name!r}, which torch might execute; {_AGAIN}")
    for folder, name in (("data/weights", _WEIGHTS), ("data/constants", _CONSTANTS)):
        for payload in received.parse_json(members[name], dict[str, dict[str, Any]], _AGAIN).get("config", {}).values():
            _check_payload(payload, folder, members)
    for key, value in _walk(received.parse_json(members[_MODEL], dict[str, Any], _AGAIN)):
        _check_value(key, value)
    copy = io.BytesIO()
    with zipfile.ZipFile(copy, "w") as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(f"{root}/{name}"), data)
    copy.seek(0)
    return copy


def _members(path: Path) -> tuple[str, dict[str, bytes]]:
    """The folder that everything in the archive is in, and the contents by name."""
    received.check_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            received.check_archive(archive, path.stat().st_size)
            found = {name: archive.read(name) for name in archive.namelist()}
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, UnicodeDecodeError) as error:
        raise ConfigError(f"must be a whole archive, got {str(error)!r}; {_AGAIN}") from error
    roots = {name.partition("/")[0] for name in found}
    if len(roots) != 1:
        raise ConfigError(f"must be an archive with one folder, got {len(roots)}; {_AGAIN}")
    return roots.pop(), {name.partition("/")[2]: data for name, data in found.items()}


def _check_payload(payload: Any, folder: str, members: dict[str, bytes]) -> None:
    """Refuses a weight that is pickled, or that is not as large as its shape says."""
    stated = payload if isinstance(payload, dict) else {}
    name, tensor = stated.get("path_name"), stated.get("tensor_meta")
    if stated.get("use_pickle") is not False or not isinstance(tensor, dict):
        raise ConfigError(f"must hold its weights as plain numbers, got {name!r} pickled; {_AGAIN}")
    sizes: list[Any] = [size.get("as_int") if isinstance(size, dict) else None for size in tensor.get("sizes", ())]
    data = members.get(f"{folder}/{name}")
    if data is None or not all(isinstance(size, int) and size >= 0 for size in sizes) or math.prod(sizes) > len(data):
        got = "no such member" if data is None else f"{len(data)} bytes"
        raise ConfigError(f"must hold {sizes} numbers in {name!r}, got {got}; {_AGAIN}")


def _walk(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Everything in a JSON document, with the key that it stands under; keys themselves as values of none."""
    if key:
        yield key, value
    if isinstance(value, dict):
        for name, inner in value.items():
            yield "", name
            yield from _walk(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from _walk(inner, key)


def _check_value(key: str, value: Any) -> None:
    if key in _NEVER or (key in _EMPTY and value):
        raise ConfigError(f"must be a graph of plain operators, got {key}, which torch might execute; {_AGAIN}")
    if not isinstance(value, str):
        return
    known = value in _TEXTS if key == "as_string" else _FORMS.get(key, _WORDS).fullmatch(value)
    if not known:
        raise ConfigError(f"must hold only what Reverie writes, got {key} {value[:60]!r}, which torch might execute; {_AGAIN}")
