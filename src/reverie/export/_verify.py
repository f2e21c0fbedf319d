"""Proof that ONNX Runtime executes a file as integers, and that it computes what the student computes.

What is proven is the session that users get: default options, all optimizations. Two notions of parity:

*Local*: every quantized tensor, one at a time. The student computes it from ONNX Runtime's own preceding codes, so what
differs is this one step's arithmetic and not what came before. Float and fixed-point rounding of one accumulator part
company by at most one step of the grid, and rarely; more is a wrong scale, a wrong bound or a wrong kernel. What stays
below that passes: at W8A8 a bias can be some tens of the accumulator's steps off, which are hundredths of one code.

The logits, which stay in float, are compared in the same way and must be equal up to the rounding of float32.

*End to end*: the logits of both, run freely on the same images, the student on codes (`graph.integer`). Convolutions and
linear layers are then equal to the last bit; what other operators round differently can spread through a network (through
4-bit activations visibly). What must agree is the class. An image whose two best logits are closer to each other than any
logit differs between the two is a tie: neither answer is wrong, so a disagreement there does not count as a failure. It
does count in `top1_agreement`, which is what is reported.

To see inside, a probe gives the codes out as well. Asking for them must not change how the network runs, so the probe's
logits have to equal the default session's bit for bit.

Not here: accuracy on labelled images and latency (`report.measure`), and runtimes other than ONNX Runtime.
"""

import copy
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime  # type: ignore[import-untyped]
import torch
from jaxtyping import Float
from onnxruntime.capi import onnxruntime_pybind11_state as runtime  # type: ignore[import-untyped]
from torch import Tensor, fx

from reverie.errors import ExportError
from reverie.graph.integer import as_integers
from reverie.graph.quantized import QuantizedNetwork
from reverie.graph.quantizers import ActivationQuantizer
from reverie.grid import dequantize, quantize

# Kernels of ONNX Runtime that multiply integers, each named after the node it was made of.
INTEGER_KERNELS = frozenset({"QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "ConvInteger"})
MAX_CODE_DIFFERENCE = 1
# Rounding tips 0.007 % of a tensor's values at most (resnet20, MLPerf Tiny's resnet8); a bias that is three steps of the
# accumulator off, 5 % at W4A4. Of fewer values than so many, a single one would be too large a share.
MAX_DIFFERING_SHARE = 0.01
_MIN_VALUES = 1000
# A sum of 2^13 float32 products, rounded as badly as can be, is wrong by 2^-11 of the sum of their sizes; logits are sums
# of fewer, and of the other sign too.
MAX_LOGIT_ERROR = 2.0**-10
MAX_UNTIED_SHARE = 0.05

# Errors of a runtime reach the user as exceptions; without this it prints them, and warnings, as well.
_SILENT = 4
_REPORT = "the file does not say what was quantized, please report it"
_FAILURES = (
    runtime.EPFail,
    runtime.Fail,
    runtime.InvalidArgument,
    runtime.InvalidGraph,
    runtime.InvalidProtobuf,
    runtime.NoSuchFile,
    runtime.NotImplemented,
    runtime.RuntimeException,
)
_LAYOUT_SUFFIX = re.compile(r"_token_\d+$")


@dataclass(frozen=True)
class TensorParity:
    """How one tensor's codes compare.

    Args:
        max_code_difference: In steps of its grid.
        differing_share: Of all its values, 0 to 1.
        values: How many were compared.
    """

    max_code_difference: int
    differing_share: float
    values: int


@dataclass(frozen=True)
class Parity:
    """What ONNX Runtime and the student say on the same images.

    Args:
        max_code_difference: The largest of any tensor, in steps of its grid, computed locally.
        differing_share: Of all values of all quantized tensors, 0 to 1.
        logit_error: Largest difference of a logit computed locally, relative to the largest logit.
        top1_agreement: Share of images with the same class, run freely.
        untied_disagreements: Images with another class that are not ties.
        max_logit_difference: Run freely.
        images: How many.
        per_tensor: By the name of the tensor.
    """

    max_code_difference: int
    differing_share: float
    logit_error: float
    top1_agreement: float
    untied_disagreements: int
    max_logit_difference: float
    images: int
    per_tensor: dict[str, TensorParity]


def open_session(model: Path | bytes, *, threads: int = 1) -> onnxruntime.InferenceSession:
    """A session on the CPU with default optimizations.

    Raises:
        ExportError: ONNX Runtime cannot load the model.
    """
    return _open(model, _options(threads))


def predict(
    session: onnxruntime.InferenceSession, images: Float[Tensor, "n *shape"], *, batch: int = 64
) -> Float[Tensor, "n classes"]:
    """The logits for all images."""
    chunks = [_run(session, ["logits"], part)[0] for part in torch.split(images.cpu(), batch)]
    return torch.from_numpy(np.concatenate(chunks))


def kernels(model: Path | bytes) -> Counter[str]:
    """How often each operator type occurs in what ONNX Runtime makes of the model."""
    return Counter(node.op_type for node in _optimized(model).graph)


def float_layers(model: Path | bytes, layers: Iterable[str]) -> list[str]:
    """Those of the `layers` (by the names of their nodes) that ONNX Runtime does not execute as integers."""
    integer = {_LAYOUT_SUFFIX.sub("", node.name or "") for node in _optimized(model).graph if node.op_type in INTEGER_KERNELS}
    return [layer for layer in layers if layer not in integer]


def assert_integer(model: Path | bytes, quantized: QuantizedNetwork) -> None:
    """Checks that every layer became an integer kernel.

    Raises:
        ExportError: Some did not; the message names them.
    """
    left = float_layers(model, quantized.layers)
    if left:
        named = ", ".join(quantized.layers[name].path for name in left)
        raise ExportError(
            f"onnxruntime: all {len(quantized.layers)} layers must run as integers, got {len(left)} in float: {named}; "
            "the file is right but slow, another version of onnxruntime may fuse them"
        )


def measure_parity(
    quantized: QuantizedNetwork, path: Path, images: Float[Tensor, "n *shape"], *, batch: int = 64, threads: int = 1
) -> Parity:
    """Runs both on the images and compares every quantized tensor and the logits.

    Args:
        path: A file written from `quantized`.
        images: In the network's own input units.
        batch: Images at a time.

    Raises:
        ExportError: The file lacks a quantized tensor, or probing changes what ONNX Runtime computes.
    """
    names = list(quantized.activations)
    session = open_session(path, threads=threads)
    probe = open_session(_probe(path, names), threads=threads)
    worst: Counter[str] = Counter()
    differing: Counter[str] = Counter()
    values: Counter[str] = Counter()
    student, exact = copy.deepcopy(quantized.graph).cpu(), as_integers(quantized).cpu()
    ours, theirs, local = [], [], []
    with torch.no_grad():
        for part in torch.split(images.cpu(), batch):
            logits, *codes = _run(probe, ["logits", *(f"{name}_codes" for name in names)], part)
            (free,) = _run(session, ["logits"], part)
            if not np.array_equal(logits, free):
                raise ExportError(
                    f"{path}: reading the codes must not change the logits, got a difference of {np.abs(logits - free).max()!r}; "
                    "this version of onnxruntime optimizes the probed model differently, try another"
                )
            comparison = _LocalComparison(student, dict(zip(names, codes, strict=True)))
            local.append(comparison.run(part))
            for name, (largest, unequal, count) in comparison.differences.items():
                worst[name] = max(worst[name], largest)
                differing[name] += unequal
                values[name] += count
            ours.append(exact(part))
            theirs.append(torch.from_numpy(free))
    expected, actual = torch.cat(ours), torch.cat(theirs)
    logit_difference = float((expected - actual).abs().max())
    logit_error = float((torch.cat(local) - actual).abs().max() / actual.abs().max().clamp(min=1e-30))
    best = expected.topk(min(2, expected.shape[1]), dim=1)
    disagree = best.indices[:, 0] != actual.argmax(dim=1)
    tied = best.values[:, 0] - best.values[:, -1] <= logit_difference
    return Parity(
        max_code_difference=max(worst.values(), default=0),
        differing_share=sum(differing.values()) / max(1, sum(values.values())),
        logit_error=logit_error,
        top1_agreement=1 - float(disagree.double().mean()),
        untied_disagreements=int((disagree & ~tied).sum()),
        max_logit_difference=logit_difference,
        images=len(images),
        per_tensor={name: TensorParity(worst[name], differing[name] / max(1, values[name]), values[name]) for name in values},
    )


class _LocalComparison(fx.Interpreter):
    """Runs the student; at every quantizer, compares its codes with the runtime's and goes on with the runtime's."""

    def __init__(self, graph: fx.GraphModule, codes: dict[str, Any]) -> None:
        super().__init__(graph)
        self._codes = codes
        # Of each tensor: the largest, how many are not zero, of how many. The tensors themselves would fill the memory.
        self.differences: dict[str, tuple[int, int, int]] = {}

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        quantizer = self.fetch_attr(str(target))
        if not isinstance(quantizer, ActivationQuantizer):
            return super().call_module(target, args, kwargs)
        name = str(target).rpartition(".")[2]
        ours = quantize(args[0], quantizer.scale, quantizer.zero_point, quantizer.grid)
        # A pooling that the file keeps four-dimensional has the same values in the same order.
        theirs = torch.from_numpy(self._codes[name]).to(ours.dtype).reshape(ours.shape)
        difference = (ours - theirs).abs()
        self.differences[name] = int(difference.max()), int(difference.count_nonzero()), difference.numel()
        return dequantize(theirs, quantizer.scale, quantizer.zero_point)


def assert_parity(parity: Parity) -> None:
    """Checks that the differences are those of rounding.

    Raises:
        ExportError: Some tensor is more than a step apart, or too often, the logits do not follow from the last codes, or too many
            classes differ.
    """
    if parity.max_code_difference > MAX_CODE_DIFFERENCE:
        name, worst = max(parity.per_tensor.items(), key=lambda item: item[1].max_code_difference)
        raise ExportError(
            f"{name}: codes in onnxruntime and in the student must be at most {MAX_CODE_DIFFERENCE} step apart, got "
            f"{worst.max_code_difference} steps, {worst.differing_share:.2%} of the values differ; {_REPORT}"
        )
    counted = {name: tensor for name, tensor in parity.per_tensor.items() if tensor.values >= _MIN_VALUES}
    for name, tensor in counted.items():
        if tensor.differing_share > MAX_DIFFERING_SHARE:
            raise ExportError(
                f"{name}: at most {MAX_DIFFERING_SHARE:.0%} of the codes in onnxruntime and in the student must differ, got "
                f"{tensor.differing_share:.2%}; {_REPORT}"
            )
    # Not a number is an error too.
    if not parity.logit_error <= MAX_LOGIT_ERROR:
        raise ExportError(
            f"logits: onnxruntime must compute them from the last codes to {MAX_LOGIT_ERROR:.1e} of the largest, got "
            f"{parity.logit_error:.1e}; {_REPORT}"
        )
    if parity.untied_disagreements > max(1.0, MAX_UNTIED_SHARE * parity.images):
        raise ExportError(
            f"logits: onnxruntime and the student must give the same class on {1 - MAX_UNTIED_SHARE:.0%} of the images, "
            f"ties not counted, got {parity.untied_disagreements} other classes on {parity.images} images; {_REPORT}"
        )


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


def _run(session: onnxruntime.InferenceSession, outputs: list[str], images: Tensor) -> list[Any]:
    (given,) = session.get_inputs()
    with _reported("run", "the network"):
        return list(session.run(outputs, {given.name: images.numpy()}))


@contextmanager
def _reported(verb: str, what: str) -> Iterator[None]:
    try:
        yield
    except _FAILURES as error:
        reason = str(error).strip().splitlines()[0]
        raise ExportError(f"onnxruntime: it must {verb} {what}, got {reason!r}; try another version of onnxruntime") from error


def _optimized(model: Path | bytes) -> ir.Model:
    with tempfile.TemporaryDirectory() as folder:
        options = _options(1)
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        _open(model, options)
        return ir.load(options.optimized_model_filepath)


def _probe(path: Path, names: list[str]) -> bytes:
    """The file with the codes of the tensors named as additional outputs."""
    model = ir.load(path)
    found = {value.name: value for node in model.graph for value in node.outputs}
    for name in names:
        value = found.get(f"{name}_codes")
        if value is None:
            raise ExportError(
                f"{path}: must hold the tensor {name!r}, got none; compare a file with the network it was written from"
            )
        value.type = ir.TensorType(ir.DataType.UINT8)
        model.graph.outputs.append(value)
    return bytes(ir.to_proto(model).SerializeToString())
