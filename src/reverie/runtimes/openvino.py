"""OpenVINO on the CPU, with its default optimizations and float32 for what is in float.

Where the processor has bfloat16, OpenVINO computes floats in it unless told otherwise, full-precision networks and logits
included. Eight bits of mantissa are no proof of anything, so `INFERENCE_PRECISION_HINT` is f32 here.

Which layers run as integers is what the compiled model says of itself: the precision of each kernel and the names of the
nodes that were merged into it. The same names tell what is not rounded: where a sum (or another grid) is merged into the
convolution in front of it, OpenVINO goes on with the convolution's result before it is put on its grid of 8 bits. The
result is nearer to full precision than what was asked for, by up to half a step of that grid, and no option prevents it.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import openvino  # type: ignore[import-untyped]
from numpy.typing import NDArray

from reverie.errors import ExportError
from reverie.runtimes._signals import signal_stack_kept

_INTEGERS = frozenset({"u8", "i8"})
_LAYERS = frozenset({"Convolution", "FullyConnected", "MatMul"})


@dataclass(frozen=True, kw_only=True)
class OpenVino:
    """Has no settings."""

    library: ClassVar[str] = "openvino"
    reads: ClassVar[frozenset[str]] = frozenset({".onnx", ".xml"})

    def open(self, path: Path, *, threads: int = 1) -> "_Session":
        """See `Runtime.open`."""
        return _Session(_compiled(_read(path), path, threads))

    def probe(self, path: Path, names: Sequence[str], *, threads: int = 1) -> "_Probe":
        """See `Runtime.probe`."""
        model = _read(path)
        tensors = {tensor: output for node in model.get_ops() for output in node.outputs() for tensor in output.get_names()}
        grids = {name: _grid(tensors, path, name) for name in names}
        # The same for all probes of a file, of which there may be dozens.
        written = path.stat()
        parts = _merged(path, written.st_mtime_ns, written.st_size, threads)
        seen = {name: grid for name, grid in grids.items() if not any(grid.is_left_unrounded(part) for part in parts)}
        with _reported("load", "the probe"):
            model.add_outputs([grid.tensor for grid in seen.values()])
        return _Probe(_Session(_compiled(model, path, threads)), seen, frozenset(grids.keys() - seen.keys()))

    def float_layers(self, path: Path, layers: Iterable[str]) -> list[str]:
        """See `Runtime.float_layers`."""
        parts = _parts(_compiled(_read(path), path, 1))
        integer = {name for part in parts if part.kind in _LAYERS and part.precision in _INTEGERS for name in part.names}
        return [layer for layer in layers if layer not in integer]


METHOD = OpenVino


@dataclass(frozen=True)
class _Session:
    compiled: openvino.CompiledModel

    def __call__(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        (logits,) = self.run(images, ["logits"])
        return logits

    def run(self, images: NDArray[np.float32], outputs: Sequence[str]) -> list[NDArray[Any]]:
        batch = self.compiled.input(0).get_partial_shape()[0]
        # A file may be made for so many images at a time.
        together = batch.get_length() if batch.is_static else max(len(images), 1)
        parts = []
        for start in range(0, len(images), together):
            with _reported("run", "the network"):
                found = self.compiled(np.ascontiguousarray(images[start : start + together]))
            parts.append([found[name] for name in outputs])
        return [np.concatenate(answers) for answers in zip(*parts, strict=True)] if len(parts) > 1 else parts[0]


@dataclass(frozen=True)
class _Grid:
    """Where a quantized tensor is found.

    Args:
        tensor: The name of its codes.
        rounding: What rounds, by any of the names that passes give it.
        bounds: What bounds the codes behind it.
    """

    tensor: str
    rounding: frozenset[str]
    bounds: frozenset[str]

    def is_left_unrounded(self, merged: Sequence[str]) -> bool:
        """Whether a kernel made of the nodes `merged` goes on computing behind the grid."""
        own = [position for position, name in enumerate(merged) if name in self.rounding | self.bounds]
        return not self.rounding.isdisjoint(merged) and own[-1] < len(merged) - 1


@dataclass(frozen=True)
class _Probe:
    session: _Session
    grids: dict[str, _Grid]
    unrounded: frozenset[str]

    def __call__(self, images: NDArray[np.float32]) -> tuple[NDArray[np.float32], dict[str, NDArray[Any]]]:
        logits, *found = self.session.run(images, ["logits", *(grid.tensor for grid in self.grids.values())])
        return logits, dict(zip(self.grids, found, strict=True))


@dataclass(frozen=True)
class _Part:
    """A kernel of a compiled model, its precision, and the nodes that it was made of, in their order."""

    kind: str
    precision: str
    names: tuple[str, ...]


def _read(path: Path) -> openvino.Model:
    with _reported("load", str(path)):
        return openvino.Core().read_model(path)


def _compiled(model: openvino.Model, path: Path, threads: int) -> openvino.CompiledModel:
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    with _reported("load", str(path)), signal_stack_kept():
        return openvino.Core().compile_model(model, "CPU", settings)


@lru_cache(maxsize=4)
def _merged(path: Path, modified: int, size: int, threads: int) -> list[tuple[str, ...]]:
    """The nodes that each kernel is made of where nobody asks for codes, of the file as it was written at `modified` (ns)."""
    return [part.names for part in _parts(_compiled(_read(path), path, threads))]


def _parts(compiled: openvino.CompiledModel) -> list[_Part]:
    found = []
    for node in compiled.get_runtime_model().get_ops():
        about = node.get_rt_info()
        kind, precision, names = (about[key].astype(str) for key in ("layerType", "runtimePrecision", "originalLayersNames"))
        # Passes append what they did to a name, behind a slash.
        found.append(_Part(kind, precision, tuple(name.partition("/")[0] for name in names.split(","))))
    return found


def _grid(tensors: dict[str, openvino.Output], path: Path, name: str) -> _Grid:
    """The grid of a tensor, found among all of the model's."""
    if f"{name}_codes" not in tensors:
        raise ExportError(
            f"{path}: must hold the tensor {name!r}, got none; compare a file with the network it was written from"
        )
    node = tensors[f"{name}_codes"].get_node()
    bounds = set()
    while node.get_type_name() != "Convert":
        bounds.add(node.get_friendly_name())
        node = node.input_value(0).get_node()
    # Passes merge the rounding with the conversion to the type of codes, and name it after either.
    rounding = {node.get_friendly_name(), node.input_value(0).get_node().get_friendly_name()}
    return _Grid(f"{name}_codes", frozenset(rounding), frozenset(bounds))


@contextmanager
def _reported(verb: str, what: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        reason = [line for line in str(error).splitlines() if line.strip()][-1].strip()
        raise ExportError(f"openvino: it must {verb} {what}, got {reason!r}; try another version of openvino") from error
