"""ONNX Runtime on the CPU, with default options and all optimizations.

Which layers run as integers is read from the optimized model, which ONNX Runtime writes when asked: its kernels have the names
of the nodes they were made of.
"""

import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import onnxruntime  # type: ignore[import-untyped]
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as states  # type: ignore[import-untyped]

from reverie.errors import ExportError

# Kernels that multiply integers, each named after the node it was made of.
INTEGER_KERNELS = frozenset({"QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "ConvInteger"})

# Errors reach the user as exceptions; without this ONNX Runtime prints them, and warnings, as well.
_SILENT = 4
_FAILURES = (
    states.EPFail,
    states.Fail,
    states.InvalidArgument,
    states.InvalidGraph,
    states.InvalidProtobuf,
    states.NoSuchFile,
    states.NotImplemented,
    states.RuntimeException,
)
_LAYOUT_SUFFIX = re.compile(r"_token_\d+$")


@dataclass(frozen=True, kw_only=True)
class OnnxRuntime:
    """Has no settings."""

    library: ClassVar[str] = "onnxruntime"
    reads: ClassVar[frozenset[str]] = frozenset({".onnx"})

    def open(self, path: Path, *, threads: int = 1) -> "_Session":
        """See `Runtime.open`."""
        return _Session(_open(path, _options(threads)), ["logits"])

    def probe(self, path: Path, names: Sequence[str], *, threads: int = 1) -> "_Probe":
        """See `Runtime.probe`."""
        keys = [f"{name}_codes" for name in names]
        session = _open(_with_outputs(path, dict(zip(keys, names, strict=True))), _options(threads))
        return _Probe(_Session(session, ["logits", *keys]), tuple(names))

    def float_layers(self, path: Path, layers: Iterable[str]) -> list[str]:
        """See `Runtime.float_layers`."""
        integer = {
            _LAYOUT_SUFFIX.sub("", node.name or "") for node in _optimized(path).graph if node.op_type in INTEGER_KERNELS
        }
        return [layer for layer in layers if layer not in integer]

    def kernels(self, path: Path) -> Counter[str]:
        """How often each operator type occurs in what ONNX Runtime makes of the file."""
        return Counter(node.op_type for node in _optimized(path).graph)


METHOD = OnnxRuntime


@dataclass(frozen=True)
class _Session:
    session: onnxruntime.InferenceSession
    outputs: list[str]

    def __call__(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = self.run(images)[0]
        return logits

    def run(self, images: NDArray[np.float32]) -> list[NDArray[Any]]:
        (given,) = self.session.get_inputs()
        # A file may be made for so many images at a time.
        together = given.shape[0] if isinstance(given.shape[0], int) else max(len(images), 1)
        starts = range(0, len(images), together)
        with _reported("run", "the network"):
            parts = [self.session.run(self.outputs, {given.name: images[start : start + together]}) for start in starts]
        return [np.concatenate(answers) for answers in zip(*parts, strict=True)] if len(parts) > 1 else parts[0]


@dataclass(frozen=True)
class _Probe:
    session: _Session
    names: tuple[str, ...]
    # Every QuantizeLinear rounds, whatever it is merged with.
    unrounded: frozenset[str] = frozenset()

    def __call__(self, images: NDArray[np.float32]) -> tuple[NDArray[np.float32], dict[str, NDArray[Any]]]:
        logits, *codes = self.session.run(images)
        return logits, dict(zip(self.names, codes, strict=True))


def _options(threads: int) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = _SILENT
    return options


def _open(model: Path | bytes, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    with _reported("load", "the probe" if isinstance(model, bytes) else str(model)):
        return onnxruntime.InferenceSession(
            model if isinstance(model, bytes) else str(model), options, providers=["CPUExecutionProvider"]
        )


@contextmanager
def _reported(verb: str, what: str) -> Iterator[None]:
    try:
        yield
    except _FAILURES as error:
        reason = str(error).strip().splitlines()[0]
        raise ExportError(f"onnxruntime: it must {verb} {what}, got {reason!r}; try another version of onnxruntime") from error


def _optimized(path: Path) -> ir.Model:
    with tempfile.TemporaryDirectory() as folder:
        options = _options(1)
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        _open(path, options)
        return ir.load(options.optimized_model_filepath)


def _with_outputs(path: Path, tensors: dict[str, str]) -> bytes:
    """The file with the tensors as additional outputs; by what they are called in it, what they are called here."""
    model = ir.load(path)
    found = {value.name: value for node in model.graph for value in node.outputs}
    for key, name in tensors.items():
        value = found.get(key)
        if value is None:
            raise ExportError(
                f"{path}: must hold the tensor {name!r}, got none; compare a file with the network it was written from"
            )
        # What makes codes has a constant of their type at its end: a zero point, or a bound.
        quantizer = value.producer()
        assert quantizer is not None
        bound = quantizer.inputs[-1]
        assert bound is not None and bound.const_value is not None
        value.type = ir.TensorType(bound.const_value.dtype)
        model.graph.outputs.append(value)
    return bytes(ir.to_proto(model).SerializeToString())
