"""Files that somebody else may have written: what they may be before anything looks inside.

A reader asks here first, so that a pipe does not keep it waiting, a small file does not become gigabytes, and a text does not nest until
Python gives up. What remains for a reader is its own format. Nothing in this package executes what a file holds: pickles are read for
tensors alone (`models/_weights.py`), and programs of PyTorch once nothing in them is code (`runtimes/_program.py`).

Every limit is far above what is in use, and its reason stands beside it.
"""

import math
import stat
import zipfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json, to_json

from reverie.errors import ConfigError

# A `run.json` names every real image: a million names of 60 letters.
MOST_TEXT_BYTES = 2**26
# A recipe with every setting has 2 kB; one that fixes the bits of a thousand tensors 50 kB.
MOST_RECIPE_BYTES = 2**20
# 8192 x 8192, which is 0.2 GB when decoded. Pillow warns from 89 million on and refuses twice that.
MOST_PIXELS = 2**26
# Photographs shrink by a few percent in an archive, drawings to a twentieth; DEFLATE can reach a thousandth.
MOST_EXPANSION = 20
# What any machine that quantizes networks has to spare, whatever it was made of.
FREE_BYTES = 2**28


def check_file(path: Path) -> None:
    """Refuses what is no ordinary file: opening a pipe would wait for a writer, reading a device might never end.

    Raises:
        ConfigError: Nothing there, a folder, or something else; without the place, which callers know.
    """
    try:
        mode = path.stat().st_mode
    except OSError:
        raise ConfigError("must be a file, got nothing that can be read; check the path") from None
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        raise ConfigError(f"must be a file, got {kinds.get(stat.S_IFMT(mode), 'a device')}; check the path")


def read_bytes(path: Path, most: int = MOST_TEXT_BYTES) -> bytes:
    """The content of an ordinary file of at most so many bytes.

    Raises:
        ConfigError: No ordinary file, too large, or not readable; without the place.
    """
    check_file(path)
    try:
        with path.open("rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        raise ConfigError(f"must be readable, got {error.strerror!r}; check its permissions") from error
    if len(content) > most:
        raise ConfigError(f"must have at most {most} bytes, got more; check that it is the right file")
    return content


def parse_json(text: bytes | str, kind: Any, cure: str) -> Any:
    """What a JSON text says, in dictionaries and lists, once it has the structure of `kind`.

    Args:
        kind: A type, such as a dataclass; keys beside its own are let through, so that a later version may add some.
        cure: What to do about a text that is refused.

    Raises:
        ConfigError: No JSON (which has no NaN), nested beyond 200, or of another structure; without the place.
    """
    try:
        found = from_json(text, allow_inf_nan=False)
    except ValueError as error:
        raise ConfigError(f"must be JSON, got {str(error)!r}; {cure}") from None
    try:
        TypeAdapter(kind).validate_json(text, strict=True)
    except ValidationError as error:
        raise _structure_error(error, cure) from None
    return found


def check_structure(value: object, kind: Any, cure: str) -> None:
    """Refuses what JSON said if it has not the structure of `kind`; arguments and errors as for `parse_json`."""
    try:
        TypeAdapter(kind).validate_json(to_json(value), strict=True)
    except ValidationError as error:
        raise _structure_error(error, cure) from None


def _structure_error(error: ValidationError, cure: str) -> ConfigError:
    first = error.errors(include_url=False)[0]
    missing = first["type"] == "missing"
    place = ".".join(str(part) for part in first["loc"]) or "it"
    wanted = "there" if missing else first["msg"].removeprefix("Input should be ").lower()
    return ConfigError(f"{place} must be {wanted}, got {'nothing' if missing else repr(first['input'])[:100]}; {cure}")


def check_archive(archive: zipfile.ZipFile, size: int) -> None:
    """Refuses an archive that would become far more than it is, or that two readers might take for different ones.

    Args:
        size: Of the file, bytes.

    Raises:
        ConfigError: Encrypted or exotically compressed members, two of one name, members that overlap, or too large ones; without the place.
    """
    members = archive.infolist()
    if any(member.flag_bits & 1 for member in members):
        raise ConfigError("must be an archive without encryption, got encrypted members; decrypt it first")
    if any(member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for member in members):
        raise ConfigError("must be an archive that is stored or deflated, got another compression; pack it again")
    twice = [name for name, count in Counter(member.filename for member in members).items() if count > 1]
    if twice:
        raise ConfigError(f"must be an archive with one member of each name, got several of {twice[0]!r}; pack it again")
    if sum(member.compress_size for member in members) > size:
        raise ConfigError("must be an archive whose members lie side by side, got some that overlap; pack it again")
    expanded = sum(member.file_size for member in members)
    if expanded > max(FREE_BYTES, MOST_EXPANSION * size):
        raise ConfigError(
            f"must become at most {MOST_EXPANSION} times its {size} bytes when it is unpacked, or {FREE_BYTES}, got {expanded}; "
            "is it a decompression bomb? Pack it without compression if not"
        )


def check_inside(name: str, kind: str) -> None:
    """Refuses a name that leads out of the folder it is read against.

    Raises:
        ConfigError: An absolute path, or one with `..`; `kind` says of what. Without the place.
    """
    if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
        raise ConfigError(f"{kind} must lie in the folder itself, got {name!r}; move it there")


def holds(shape: Iterable[int], item_bytes: int, stored_bytes: int) -> bool:
    """Whether an array of that shape takes exactly the bytes that are stored for it; no negative size fits."""
    sizes = list(shape)
    return min(sizes, default=0) >= 0 and math.prod(sizes) * item_bytes == stored_bytes
