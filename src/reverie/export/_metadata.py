"""What an exported file says of itself: facts, as text by name, and the hash of everything else.

A file cannot hold its own hash. What is hashed is its content without the facts, so that a certificate in the file can name the
very content that it was issued for:

    .onnx   the fields of the ModelProto in their order, without `metadata_props` (field 14)
    .xml    the XML in its canonical form without the model's `rt_info`, and then the .bin beside it
    .pt2    the members of the archive by name, without those below `extra/`

Nothing but the standard library reads and writes here, so a certificate can be checked where no runtime is installed.
"""

import hashlib
import io
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from reverie import received
from reverie.errors import ConfigError, ExportError
from reverie.files import atomic_write

_EXTRA = "extra/"
_METADATA_PROPS = 14
_KEY, _VALUE = 1, 2
_NO_TEXT = bytes([_VALUE << 3 | 2, 0])
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def content_hash(path: Path) -> str:
    """SHA-256 of the content, in hexadecimal.

    Raises:
        ExportError: The file is not whole, or of another kind.
    """
    if path.suffix == ".xml":
        root = _parsed(path)
        for metadata in root.findall("rt_info"):
            root.remove(metadata)
        text = ElementTree.canonicalize(ElementTree.tostring(root, "unicode"), strip_text=True)
        return hashlib.sha256(text.encode() + _read(path.with_suffix(".bin"))).hexdigest()
    if path.suffix == ".pt2":
        named = sorted((name, data) for name, data in _members(path)[1].items() if not name.startswith(_EXTRA))
        return hashlib.sha256(b"".join(f"{name} {len(data)}\n".encode() + data for name, data in named)).hexdigest()
    kept = (field for number, field in _fields(path, _read(path)) if number != _METADATA_PROPS)
    return hashlib.sha256(b"".join(kept)).hexdigest()


def read_facts(path: Path) -> dict[str, str]:
    """The facts by name; errors as for `content_hash`."""
    if path.suffix == ".xml":
        return dict(_named(_parsed(path).find("rt_info")))
    if path.suffix == ".pt2":
        extra = {name: data for name, data in _members(path)[1].items() if name.startswith(_EXTRA)}
        return {name.removeprefix(_EXTRA): _text(path, data) for name, data in extra.items()}
    found = {}
    for number, field in _fields(path, _read(path)):
        if number == _METADATA_PROPS:
            parts = dict(_fields(path, _payload(path, field)))
            key, value = (_text(path, _payload(path, parts.get(part, _NO_TEXT))) for part in (_KEY, _VALUE))
            found[key] = value
    return found


def add_facts(path: Path, facts: dict[str, str]) -> None:
    """Stores facts in a file, in place of those of the same names; its other content stays as it is. Errors as for `content_hash`."""
    facts = read_facts(path) | facts
    if path.suffix == ".xml":
        root = _parsed(path)
        for metadata in root.findall("rt_info"):
            root.remove(metadata)
        place = ElementTree.SubElement(root, "rt_info")
        for name, value in facts.items():
            node = place
            for part in name.split("."):
                child = node.find(part)
                node = ElementTree.SubElement(node, part) if child is None else child
            node.set("value", value)
        atomic_write(path, ElementTree.tostring(root, encoding="utf-8", xml_declaration=True))
        return
    if path.suffix == ".pt2":
        folder, members = _members(path)
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w") as file:
            for name, data in (members | {f"{_EXTRA}{name}": value.encode() for name, value in facts.items()}).items():
                # `ZipInfo` has a date of its own, so that the same facts give the same bytes.
                file.writestr(zipfile.ZipInfo(f"{folder}/{name}"), data)
        atomic_write(path, archive.getvalue())
        return
    kept = [field for number, field in _fields(path, _read(path)) if number != _METADATA_PROPS]
    pairs = (_field(_KEY, name.encode()) + _field(_VALUE, value.encode()) for name, value in facts.items())
    atomic_write(path, b"".join([*kept, *(_field(_METADATA_PROPS, pair) for pair in pairs)]))


def _read(path: Path) -> bytes:
    try:
        if path.exists():
            received.check_file(path)
        return path.read_bytes()
    except ConfigError as error:
        raise ExportError(f"{path}: {error}") from None
    except OSError as error:
        raise ExportError(f"{path}: must be a file, got {error.strerror!r}; export it again") from None


def _parsed(path: Path) -> ElementTree.Element:
    try:
        return ElementTree.fromstring(_read(path))
    except ElementTree.ParseError as error:
        raise ExportError(f"{path}: must be a whole file, got {str(error)!r}; export it again") from None


def _members(path: Path) -> tuple[str, dict[str, bytes]]:
    """The folder that all members of an archive are in, and their contents by their names in it, in their order."""
    content = _read(path)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            received.check_archive(archive, len(content))
            found = {name: archive.read(name) for name in archive.namelist()}
    except ConfigError as error:
        raise ExportError(f"{path}: {error}") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, ValueError) as error:
        raise ExportError(f"{path}: must be a whole file, got {str(error)!r}; export it again") from None
    roots = {name.partition("/")[0] for name in found}
    if len(roots) != 1:
        raise ExportError(f"{path}: must be an archive with one folder, got {len(roots)}; export it again")
    return roots.pop(), {name.partition("/")[2]: data for name, data in found.items()}


def _text(path: Path, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ExportError(f"{path}: must say what it is in UTF-8, got {error.reason!r}; export it again") from None


def _named(node: ElementTree.Element | None, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The values below a node, by the dotted names of the nodes on the way."""
    for child in node if node is not None else ():
        name = f"{prefix}{child.tag}"
        if "value" in child.attrib:
            yield name, child.attrib["value"]
        yield from _named(child, f"{name}.")


def _fields(path: Path, message: bytes) -> Iterator[tuple[int, bytes]]:
    """The fields of a protocol buffer in their order: number, and bytes with the tag."""
    at = 0
    while at < len(message):
        begin = at
        tag, at = _varint(path, message, at)
        kind = tag & 7
        if kind == _VARINT:
            _, at = _varint(path, message, at)
        elif kind == _BYTES:
            size, at = _varint(path, message, at)
            at += size
        elif kind in (_FIXED32, _FIXED64):
            at += 4 if kind == _FIXED32 else 8
        if at > len(message) or kind not in (_VARINT, _BYTES, _FIXED32, _FIXED64):
            raise ExportError(f"{path}: must be a whole file, got one that breaks off or is damaged; export it again")
        yield tag >> 3, message[begin:at]


def _varint(path: Path, message: bytes, at: int) -> tuple[int, int]:
    """The number that begins there, and where it ends."""
    found = re.compile(rb"[\x80-\xff]{0,9}[\x00-\x7f]").match(message, at)
    if found is None:
        raise ExportError(f"{path}: must be a whole file, got one that breaks off or is damaged; export it again")
    return sum((byte & 0x7F) << 7 * place for place, byte in enumerate(found[0])), found.end()


def _payload(path: Path, field: bytes) -> bytes:
    """What a field of bytes holds."""
    tag, at = _varint(path, field, 0)
    if tag & 7 != _BYTES:
        raise ExportError(f"{path}: must be a whole file, got a number in place of a text; export it again")
    _, at = _varint(path, field, at)
    return field[at:]


def _field(number: int, payload: bytes) -> bytes:
    size, length = len(payload), b""
    while size > 0x7F:
        length += bytes([size & 0x7F | 0x80])
        size >>= 7
    return bytes([number << 3 | _BYTES]) + length + bytes([size]) + payload
