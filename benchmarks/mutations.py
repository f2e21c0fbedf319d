"""Ways to damage a file: bytes at random, and edits that know what a file of its kind is made of.

A mutation is a function of a file's bytes, of those of another file and of a `random.Random`; the same three give the same bytes. The
edits that know a format go further into a reader than damage can: a header is whole and its checksum right, and what it says is wrong.
"""

import contextlib
import io
import json
import random
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import onnx

Mutation = Callable[[bytes, bytes, random.Random], bytes]

_EXTREMES = (0, 1, -1, 2, 127, 128, 255, 256, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, -(2**31), -(2**63))
_TEXTS = (
    "",
    "\0",
    "../../etc/passwd",
    "/etc/passwd",
    '"><script>alert(1)</script>',
    "\n",
    "x" * 5000,
    "é\u202e",
    "{{7*7}}",
    "%s%n",
    "nan",
)
_KEYS = ("x", "a.b", "''", "method", "\u00e9")
# A megabyte of zeros that a kilobyte stands for.
_BOMB = zlib.compress(bytes(1 << 20), 9)


def flip(data: bytes, _: bytes, chance: random.Random) -> bytes:
    """One to eight bits."""
    changed = bytearray(data)
    for _ in range(chance.randint(1, 8) if data else 0):
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def flip_early(data: bytes, other: bytes, chance: random.Random) -> bytes:
    """Bits of the first 512 bytes, where headers are."""
    return flip(data[:512], other, chance) + data[512:]


def truncate(data: bytes, _: bytes, chance: random.Random) -> bytes:
    """Breaks off."""
    return data[: chance.randrange(len(data) + 1)]


def extend(data: bytes, other: bytes, chance: random.Random) -> bytes:
    """Goes on with another file, or with noise."""
    return data + (other if chance.random() < 0.5 else chance.randbytes(chance.randint(1, 4096)))


def cut(data: bytes, _: bytes, chance: random.Random) -> bytes:
    """Lacks a piece in the middle."""
    begin = chance.randrange(len(data) + 1)
    return data[:begin] + data[begin + chance.randint(1, 64) :]


def splice(data: bytes, other: bytes, chance: random.Random) -> bytes:
    """The beginning of one and the end of another."""
    return data[: chance.randrange(len(data) + 1)] + other[chance.randrange(len(other) + 1) :]


def length_field(data: bytes, _: bytes, chance: random.Random) -> bytes:
    """Two, four or eight bytes become an extreme number."""
    size, order = chance.choice((2, 4, 8)), chance.choice(("little", "big"))
    begin = chance.randrange(max(len(data) - size, 1))
    number = chance.choice(_EXTREMES) % (1 << 8 * size)
    return data[:begin] + number.to_bytes(size, order) + data[begin + size :]


def number(data: bytes, _: bytes, chance: random.Random) -> bytes:
    """A number that stands there in digits becomes an extreme one."""
    found = list(re.finditer(rb"\d+", data[: 1 << 18]))
    if not found:
        return data + b"1"
    chosen = chance.choice(found)
    return data[: chosen.start()] + str(chance.choice(_EXTREMES)).encode() + data[chosen.end() :]


BYTES: tuple[Mutation, ...] = (flip, flip_early, truncate, extend, cut, splice, length_field, number)


def any_value(chance: random.Random, depth: int = 0) -> Any:
    """Something that JSON can say."""
    kinds: list[Callable[[], Any]] = [
        lambda: chance.choice(_EXTREMES),
        lambda: chance.choice(_TEXTS),
        lambda: chance.choice((None, True, False, 0.5, -1e308, float("nan"), float("inf"), [], {})),
        lambda: 10 ** chance.choice((30, 400)),
    ]
    if depth < 2:
        kinds.append(lambda: [any_value(chance, depth + 1) for _ in range(chance.randint(0, 3))])
        kinds.append(lambda: {chance.choice(_TEXTS): any_value(chance, depth + 1)})
    return chance.choice(kinds)()


def changed(value: Any, chance: random.Random) -> Any:
    """A JSON value with one thing in it changed, taken away, doubled or put in."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key, way = chance.choice(list(value)), chance.random()
        if way < 0.12:
            return {name: inner for name, inner in value.items() if name != key}
        if way < 0.2:
            return value | {chance.choice(_TEXTS): any_value(chance)}
        if way < 0.26:
            return {(chance.choice(_TEXTS) if name == key else name): inner for name, inner in value.items()}
        return value | {key: changed(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.8:
        place = chance.randrange(len(value))
        return value[:place] + [changed(value[place], chance)] * chance.choice((0, 1, 1, 2)) + value[place + 1 :]
    if isinstance(value, str) and value[:1] in ("{", "[") and chance.random() < 0.9:
        # JSON in JSON: the metadata of safetensors, a certificate.
        with contextlib.suppress(ValueError):
            return json.dumps(changed(json.loads(value), chance))
    return any_value(chance)


def json_edit(data: bytes, _: bytes, chance: random.Random) -> bytes:
    """One to three edits of a JSON document; or a nest of brackets."""
    if chance.random() < 0.03:
        depth = chance.choice((100, 300, 2000, 100000))
        return b"[" * depth + b"]" * depth
    value = json.loads(data)
    for _ in range(chance.randint(1, 3)):
        value = changed(value, chance)
    return json.dumps(value).encode()


def safetensors_edit(data: bytes, _: bytes, chance: random.Random) -> bytes:
    """An edit of the header, whose length is right again; or of the length."""
    (length,) = struct.unpack("<Q", data[:8])
    if chance.random() < 0.05:
        return struct.pack("<Q", chance.choice(_EXTREMES) % (1 << 64)) + data[8:]
    header = json.loads(data[8 : 8 + length])
    # Half of the edits go where Reverie's own header is, which is a small part of all.
    if chance.random() < 0.5 and "__metadata__" in header:
        header["__metadata__"] = changed(header["__metadata__"], chance)
    else:
        header = changed(header, chance)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def toml_edit(data: bytes, _: bytes, chance: random.Random) -> bytes:
    """Edits of keys, values, tables and nesting."""
    lines = data.decode().split("\n")
    for _ in range(chance.randint(1, 3)):
        place = chance.randrange(len(lines))
        key, equals, _rest = lines[place].partition("=")
        way = chance.random()
        if equals and way < 0.6:
            lines[place] = f"{key}= {_toml_value(chance)}"
        elif equals and way < 0.7:
            lines[place] = f"{chance.choice((*_KEYS, key.strip() + 's'))} = {_rest}"
        elif way < 0.8:
            lines.insert(place, lines[chance.randrange(len(lines))])
        elif way < 0.9:
            lines.insert(place, f"[{chance.choice(('synthesis', 'rounding', 'x', 'a.b.c', 'bits.weights', '', '[x]'))}]")
        else:
            del lines[place]
            lines = lines or [""]
    return "\n".join(lines).encode()


def _toml_value(chance: random.Random) -> str:
    depth = chance.choice((1, 50, 500, 20000))
    return chance.choice(
        (
            str(chance.choice(_EXTREMES)),
            json.dumps(chance.choice(_TEXTS)),
            f"{chance.choice((0.0, -1.5, 1e308, 1e-320))!r}",
            *("nan", "inf", "-inf", "true", "1979-05-27T07:32:00Z", "[1, 'a']", "{a = 1}", "9" * 5000, "0x" + "f" * 30),
            "[" * depth + "]" * depth,
            "{a = " * depth + "1" + "}" * depth,
            '"nearest"',
        )
    )


def zip_edit(data: bytes, other: bytes, chance: random.Random) -> bytes:
    """The archive packed anew with one member changed, renamed, doubled, compressed otherwise, or blown up."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    place = chance.randrange(len(members))
    name, content = members[place]
    way = chance.randrange(6)
    if way == 0:
        content = chance.choice(BYTES)(content, other, chance)
    elif way == 1:
        name = chance.choice(("../../out", "/etc/out", "", "a\\b", "\0", "x" * 300, name + "/"))
    elif way == 2:
        content = (
            json_edit(content, b"", chance) if content[:1] in (b"{", b"[") else chance.choice(BYTES)(content, other, chance)
        )
    elif way == 3:
        content = content + bytes(1 << 22)
    target = io.BytesIO()
    packing = chance.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2))
    with warnings.catch_warnings(), zipfile.ZipFile(target, "w", packing) as archive:
        # Two members of one name are what is wanted.
        warnings.simplefilter("ignore")
        for index, (own, inside) in enumerate(members):
            if index == place:
                archive.writestr(zipfile.ZipInfo(name or "_"), content)
            elif not (way == 4 and chance.random() < 0.5):
                archive.writestr(own, inside)
        if way == 5:
            archive.writestr(zipfile.ZipInfo(name + "2"), content)
    packed = target.getvalue()
    # The central directory is at the end: sizes there are what readers believe.
    return length_field_at_end(packed, chance) if chance.random() < 0.2 else packed


def length_field_at_end(data: bytes, chance: random.Random) -> bytes:
    """As `length_field`, in the last kilobyte."""
    return data[:-1024] + length_field(data[-1024:], b"", chance)


def npz_edit(data: bytes, other: bytes, chance: random.Random) -> bytes:
    """A header that says another shape or type, or nonsense of the same length."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = chance.choice(list(members))
    header = chance.choice(
        (
            f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({chance.choice(_EXTREMES)}, 32, 32, 1), }}",
            f"{{'descr': '<i8', 'fortran_order': False, 'shape': ({chance.choice(_EXTREMES)},), }}",
            f"{{'descr': '{chance.choice(('|O', '|V0', '<U0', '|S1', 'x', '<M8[s]', '<f16'))}', 'fortran_order': False, 'shape': (4,), }}",
            "{'descr': [('a', '|O')], 'fortran_order': False, 'shape': (4,), }",
            "(" * chance.choice((50, 5000)),
            "__import__('os').getcwd()",
            "{'descr': '|u1', 'fortran_order': False, 'shape': (4, 8, 8, 1), 'x': 1}",
            "{'descr': '|u1",
        )
    ).encode()
    body = members[name][10 + int.from_bytes(members[name][8:10], "little") :]
    members[name] = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + body
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", chance.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        for own, inside in members.items():
            archive.writestr(own, inside)
    return target.getvalue()


def png_edit(data: bytes, _: bytes, chance: random.Random) -> bytes:
    """A chunk changed or put in, its checksum right: sizes, palettes, and text and profiles that blow up."""
    chunks, at = [], 8
    while at + 8 <= len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += length + 12
    way = chance.randrange(5)
    if way == 0:
        sizes = struct.pack(">II", *(chance.choice((0, 1, 7, 8193, 20000, 2**31 - 1, 2**32 - 1)) for _ in range(2)))
        chunks[0] = (
            b"IHDR",
            sizes + bytes(chance.choice((0, 1, 2, 3, 4, 6, 8, 16, 255)) for _ in range(2)) + chunks[0][1][10:],
        )
    elif way == 1:
        chunks.insert(1, (chance.choice((b"zTXt", b"iCCP")), b"name\0\0" + _BOMB * chance.choice((1, 100))))
    elif way == 2:
        chunks.insert(1, (b"iTXt", b"name\0\1\0\0\0" + _BOMB))
    elif way == 3:
        chunks.insert(
            chance.randrange(len(chunks)),
            (chance.choice((b"PLTE", b"tRNS", b"acTL", b"fcTL", b"eXIf", b"IDAT")), chance.randbytes(26)),
        )
    else:
        place = chance.randrange(len(chunks))
        chunks[place] = (chunks[place][0], chance.choice(BYTES)(chunks[place][1], b"", chance))
    return data[:8] + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


def onnx_edit(data: bytes, _: bytes, chance: random.Random) -> bytes:
    """One to three edits of nodes, attributes, stored tensors, inputs and functions."""
    model = onnx.ModelProto.FromString(data)
    for _ in range(chance.randint(1, 3)):
        chance.choice((_edit_node, _edit_attribute, _edit_tensor, _edit_input, _edit_wires, _edit_function))(model, chance)
    return bytes(model.SerializeToString())


def _edit_node(model: Any, chance: random.Random) -> None:
    node = chance.choice(model.graph.node)
    node.op_type = chance.choice(
        (*(other.op_type for other in model.graph.node), "Loop", "If", "Expand", "Pad", "Concat", "MatMul", "Gather", "")
    )
    if chance.random() < 0.3:
        node.domain = chance.choice(("", "ai.onnx", "com.microsoft", "é"))


def _edit_attribute(model: Any, chance: random.Random) -> None:
    having = [node for node in model.graph.node if node.attribute]
    if not having:
        return
    attribute = chance.choice(chance.choice(having).attribute)
    way = chance.randrange(4)
    if way == 0 and attribute.ints:
        attribute.ints[chance.randrange(len(attribute.ints))] = max(min(chance.choice(_EXTREMES), 2**63 - 1), -(2**63))
    elif way == 1:
        attribute.i = max(min(chance.choice(_EXTREMES), 2**63 - 1), -(2**63))
    elif way == 2:
        attribute.type = chance.randrange(15)
    else:
        attribute.name = chance.choice(("axis", "pads", "group", "kernel_shape", "value", "", "to"))


def _edit_tensor(model: Any, chance: random.Random) -> None:
    if not model.graph.initializer:
        return
    tensor = chance.choice(model.graph.initializer)
    way = chance.randrange(5)
    if way == 0 and tensor.dims:
        tensor.dims[chance.randrange(len(tensor.dims))] = max(min(chance.choice(_EXTREMES), 2**63 - 1), -(2**63))
    elif way == 1:
        tensor.data_type = chance.randrange(24)
    elif way == 2:
        tensor.data_location = onnx.TensorProto.EXTERNAL
        place = chance.choice(("../../etc/passwd", "/etc/passwd", "network.onnx", "", "nowhere", "."))
        for key, value in (
            ("location", place),
            ("length", str(chance.choice(_EXTREMES))),
            ("offset", str(chance.choice(_EXTREMES))),
        ):
            tensor.external_data.add(key=key, value=value)
    elif way == 3:
        tensor.name = chance.choice(("", "x" * 1000, *(other.name for other in model.graph.initializer)))
    else:
        tensor.raw_data = chance.choice(BYTES)(tensor.raw_data, b"", chance)


def _edit_input(model: Any, chance: random.Random) -> None:
    value = chance.choice((*model.graph.input, *model.graph.output))
    dims = value.type.tensor_type.shape.dim
    if dims and chance.random() < 0.7:
        dims[chance.randrange(len(dims))].dim_value = max(min(chance.choice(_EXTREMES), 2**63 - 1), -(2**63))
    else:
        value.type.tensor_type.elem_type = chance.randrange(24)


def _edit_wires(model: Any, chance: random.Random) -> None:
    one, two = chance.choice(model.graph.node), chance.choice(model.graph.node)
    if one.input and two.output:
        one.input[chance.randrange(len(one.input))] = two.output[0]


def _edit_function(model: Any, chance: random.Random) -> None:
    """Functions of functions: so many nodes that nobody can write them down."""
    depth, fan = chance.choice((1, 5, 40, 400)), chance.choice((1, 2, 10))
    for level in range(depth):
        function = model.functions.add(name=f"f{level}", domain="local")
        function.input.append("x")
        function.output.append("y0")
        function.opset_import.add(domain="", version=17)
        function.opset_import.add(domain="local", version=1)
        inner = "Identity" if level == 0 else f"f{level - 1}"
        for copy in range(fan):
            function.node.add(op_type=inner, domain="" if level == 0 else "local", input=["x"], output=[f"y{copy}"])
    model.opset_import.add(domain="local", version=1)
    node = chance.choice(model.graph.node)
    if node.input and node.output:
        made = node.output[0]
        node.output[0] = f"{made}_before"
        model.graph.node.add(op_type=f"f{depth - 1}", domain="local", input=[f"{made}_before"], output=[made])
