"""What all emitters of ONNX files share: translating a lowered graph, the passes that runtimes want, packing, writing.

Networks reach ONNX through `torch.onnx.export`, so an operator that it cannot translate cannot be exported.
"""

import copy
import logging
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common
import torch
from numpy.typing import NDArray
from onnxscript import opset21 as op
from onnxscript.optimizer import fold_constants
from onnxscript.rewriter import rewrite
from torch import fx

from reverie.errors import ExportError
from reverie.export._lowering import pool_means
from reverie.files import atomic_write

# The first with INT4, and with INT2; the second needs the IR version beside it.
OPSET = 21
INT2_OPSET, INT2_IR_VERSION = 25, 13
# As often as torch.onnx.export does: rewriting leaves constants to fold.
_SIMPLIFICATIONS = 2

_SIZES = ("height", "width")
_LAYERS = frozenset({"Conv", "Gemm", "MatMul"})

# What torch.export and torch.onnx.export (OnnxExporterError is a RuntimeError) raise for what they cannot translate.
_FAILURES = (RuntimeError, NotImplementedError, ValueError, TypeError)

# ONNX Runtime's QLinearGlobalAveragePool refuses, when it runs, a ratio of scales outside of this range (mlas, qlgavgpool).
_POOL_RATIOS = (2.0**-32, 256.0)


def export_float(graph: fx.GraphModule, shape: tuple[int, ...], path: Path, *, facts: dict[str, str] | None = None) -> None:
    """Writes a captured graph in full precision: what a quantized file is compared with.

    Args:
        graph: With batch norms folded, as a runtime's own optimizer would; unchanged.
        shape: Of one input, without the batch, which stays free.
        facts: As in `Exporter`.

    Raises:
        ExportError: An operator has no translation to ONNX.
    """
    graph = copy.deepcopy(graph).cpu()
    pool_means(graph, shape)
    model = translate(graph, shape)
    write(model, path, facts or {})


def _through_codes(x: Any, scale: Any, zero_point: Any, low: Any, high: Any, name: str) -> Any:
    codes = op.QuantizeLinear(x, scale, zero_point)
    if low is not None:
        codes = op.Max(codes, low)
    if high is not None:
        codes = op.Min(codes, high)
    if name:
        codes.name = f"{name}_codes"
    return op.DequantizeLinear(codes, scale, zero_point)


def _from_codes(codes: Any, scale: Any) -> Any:
    return op.DequantizeLinear(codes, scale, axis=0)


def translate(
    graph: fx.GraphModule,
    shape: tuple[int, ...],
    *,
    opset: int = OPSET,
    dynamic_size: bool = False,
    batch: int | None = None,
    padded_codes: bool = True,
) -> ir.Model:
    """The ONNX model of a graph, lowered or in float, after the passes that make room for integer kernels.

    Args:
        shape: Of one input, without the batch.
        opset: Of standard operators, at least 18.
        dynamic_size: Height and width stay free too.
        batch: How many images, always; None leaves it free.
        padded_codes: What pads a quantized tensor pads its codes, which ONNX Runtime wants; else its values.

    Raises:
        ExportError: An operator has no translation to ONNX, or computes for one size of images only where any is asked for.
    """
    # What strides and poolings demand, such as a multiple of 4, is no reason to refuse; a single size that is left is.
    free: dict[int, Any] = {axis + 2: torch.export.Dim.DYNAMIC for axis in range(len(_SIZES))} if dynamic_size else {}
    if batch is None:
        free[0] = torch.export.Dim("batch")
    example = torch.zeros(2 if batch is None else batch, *shape)
    with _quiet(), torch.no_grad():
        exported = _exported(graph, example, free, dynamic_size)
        try:
            program = torch.onnx.export(
                exported,
                dynamo=True,
                opset_version=opset,
                optimize=False,
                verbose=False,
                custom_translation_table={
                    torch.ops.reverie.through_codes.default: _through_codes,
                    torch.ops.reverie.from_codes.default: _from_codes,
                },
            )
        except _FAILURES as error:
            raise ExportError(
                f"onnx: every operator must have a translation to opset {opset}, got {_cause(error)}; "
                "replace the operator in the network"
            ) from error
    assert program is not None
    _simplify(program.model)
    _fold_pads(program.model.graph)
    if padded_codes:
        _pad_codes(program.model.graph)
    _pool_globally(program.model.graph)
    return program.model


def _exported(
    graph: fx.GraphModule, example: torch.Tensor, free: dict[int, Any], dynamic_size: bool
) -> torch.export.ExportedProgram:
    try:
        if dynamic_size:
            # A product of sizes that must be one number, as in front of a linear layer, is none of the export's business.
            batch, channels, *sizes = example.shape
            graph(example.new_zeros(batch, channels, *(2 * size for size in sizes)))
        return torch.export.export(graph, (example,), dynamic_shapes=(free,), strict=False)
    except _FAILURES as error:
        if not dynamic_size:
            raise ExportError(f"onnx: torch.export must follow the student, got {_cause(error)}; please report it") from error
        raise ExportError(
            f"onnx: the network must compute for any height and width, got one that is made for {tuple(example.shape[2:])}; "
            "leave out dynamic_size"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps torch from warning a user of things that are not the user's, such as a torchvision that need not be there."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _simplify(model: ir.Model) -> None:
    """Folds constants, in place: what `torch.onnx.export(optimize=True)` does, except that nothing equal becomes one.

    Merging equal initializers and nodes would leave layers that share a weight without codes and a node of their own.
    """
    ir.passes.common.InlinePass()(model)
    for _ in range(_SIMPLIFICATIONS):
        fold_constants(model)
        rewrite(model)
    ir.passes.common.RemoveUnusedNodesPass()(model)
    ir.passes.common.RemoveUnusedOpsetsPass()(model)
    ir.passes.common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    ir.passes.common.OutputFixPass()(model)
    ir.passes.common.NameFixPass()(model)


def _cause(error: BaseException) -> str:
    """The operator that the innermost error names, or what it says."""
    while error.__cause__ is not None:
        error = error.__cause__
    operator = re.search(r"OpOverload\(op='([\w.]+)'", str(error))
    return repr(operator[1] if operator else (str(error).strip() or type(error).__name__).splitlines()[0])


def _constant(node: ir.Node, position: int) -> NDArray[Any] | None:
    """The stored tensor that a node reads there, if it reads one."""
    value = node.inputs[position] if position < len(node.inputs) else None
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return None if tensor is None else tensor.numpy()


def _readers(node: ir.Node) -> list[ir.Node]:
    return [use.node for use in node.outputs[0].uses()]


def _pads_zeros(pad: ir.Node) -> bool:
    value = _constant(pad, 2)
    return pad.attributes.get_string("mode", "constant") == "constant" and (value is None or not value.any())


def _fold_pads(graph: ir.Graph) -> None:
    """Moves paddings of zeros over height and width into the convolutions that read them."""
    for pad in [node for node in graph if node.op_type == "Pad"]:
        amounts, readers = _constant(pad, 1), _readers(pad)
        if amounts is None or not _pads_zeros(pad) or not all(_takes_padding(reader, pad) for reader in readers):
            continue
        ends = amounts.reshape(2, -1)
        if ends[:, :2].any() or ends.min() < 0:
            continue
        for reader in readers:
            own = reader.attributes.get_ints("pads", [0] * (ends.size - 4))
            sums = [int(a) + int(b) for a, b in zip(own, ends[:, 2:].flat, strict=True)]
            reader.attributes["pads"] = ir.AttrInt64s("pads", sums)
            reader.replace_input_with(0, pad.inputs[0])
        graph.remove(pad, safe=True)


def _takes_padding(reader: ir.Node, pad: ir.Node) -> bool:
    explicit = reader.attributes.get_string("auto_pad", "NOTSET") == "NOTSET"
    return reader.op_type == "Conv" and explicit and reader.inputs[0] is pad.outputs[0]


def _pool_globally(graph: ir.Graph) -> None:
    """Means over height and width by the operator that has an integer kernel."""
    for mean in [node for node in graph if node.op_type == "ReduceMean"]:
        axes, source = _constant(mean, 1), mean.inputs[0]
        if axes is None or source is None or source.shape is None or mean.attributes.get_int("keepdims", 1) != 1:
            continue
        rank = len(source.shape)
        if rank == 4 and {int(axis) % rank for axis in axes.flat} == {2, 3} and _pools_as_integers(mean, source.shape[2:]):
            mean.op_type = "GlobalAveragePool"
            mean.attributes.clear()
            mean.resize_inputs(1)


def _pools_as_integers(mean: ir.Node, area: Sequence[object]) -> bool:
    """Whether the integer kernel would accept the scales around a mean; true where none of them is known."""
    before, behind = mean.inputs[0].producer() if mean.inputs[0] else None, _readers(mean)
    if before is None or before.op_type != "DequantizeLinear" or [node.op_type for node in behind] != ["QuantizeLinear"]:
        return True
    scales = [_constant(before, 1), _constant(behind[0], 1)]
    sizes = [size for size in area if isinstance(size, int)]
    if scales[0] is None or scales[1] is None or len(sizes) < len(area):
        return True
    low, high = _POOL_RATIOS
    return bool(low <= scales[0] / (scales[1] * math.prod(sizes)) < high)


def _pad_codes(graph: ir.Graph) -> None:
    """Moves other paddings of zeros from behind a DequantizeLinear to in front of it: runtimes pad floats otherwise."""
    for pad in [node for node in graph if node.op_type == "Pad"]:
        dequantize, readers = pad.inputs[0].producer() if pad.inputs[0] else None, _readers(pad)
        if dequantize is None or dequantize.op_type != "DequantizeLinear" or not _pads_zeros(pad):
            continue
        if [reader.op_type for reader in readers] != ["QuantizeLinear"] or readers[0].inputs[1:] != dequantize.inputs[1:]:
            continue
        (quantize,) = readers
        codes, _, zero_point = dequantize.inputs
        padded = ir.Node("", "Pad", [codes, pad.inputs[1], zero_point, *pad.inputs[3:]], pad.attributes.values(), name=pad.name)
        graph.insert_before(pad, padded)
        quantize.outputs[0].replace_all_uses_with(padded.outputs[0])
        graph.remove([quantize, pad], safe=True)


def name_layers(graph: ir.Graph, layers: dict[str, str]) -> None:
    """Names the node that multiplies with the stored codes `key` after the layer `layers[key]`."""
    for key, layer in layers.items():
        codes = graph.initializers[key]
        (dequantize,) = (use.node for use in codes.uses())
        reader = dequantize
        while reader.op_type not in _LAYERS:
            (reader,) = _readers(reader)
        reader.name = layer
        if reader.op_type != "Conv":
            # ONNX Runtime makes an integer kernel of a matrix product only if the weight's zero points are spelled out.
            assert codes.const_value is not None
            zeros = ir.Tensor(np.zeros(codes.const_value.numpy().shape[0], np.int8), name=f"{key}_zero_point")
            stored = ir.Value(name=zeros.name, shape=zeros.shape, type=ir.TensorType(zeros.dtype), const_value=zeros)
            graph.initializers.add(stored)
            dequantize.resize_inputs(3)
            dequantize.replace_input_with(2, stored)


def store(graph: ir.Graph, name: str, kind: ir.DataType, *, cast: bool) -> None:
    """Stores int8 codes in the narrower type `kind`, with a cast back to int8 behind them or not."""
    codes = graph.initializers[name]
    assert codes.const_value is not None
    readers = tuple(codes.uses())
    # DequantizeLinear wants zero points of the very type that it reads.
    zeros = [] if cast else [graph.initializers[f"{name}_zero_point"]] if f"{name}_zero_point" in graph.initializers else []
    for stored in (codes, *zeros):
        assert stored.const_value is not None
        stored.const_value = ir.Tensor(stored.const_value.numpy().astype(kind.numpy()), name=stored.name)
        stored.type = ir.TensorType(kind)
    if not cast:
        return
    back = ir.node("Cast", [codes], {"to": ir.DataType.INT8}, name=f"{name}_cast")
    graph.insert_before(readers[0].node, back)
    for reader, position in readers:
        reader.replace_input_with(position, back.outputs[0])


def write(model: ir.Model, path: Path, facts: dict[str, str]) -> None:
    """Writes `path`, whole or not at all, with `facts` as its metadata; input and output are `images` and `logits`."""
    atomic_write(path, as_bytes(model, facts))


def as_bytes(model: ir.Model, facts: dict[str, str]) -> bytes:
    """What `write` writes; `model` is changed."""
    graph = model.graph
    ir.passes.common.RemoveUnusedNodesPass()(model)
    ir.passes.common.ClearMetadataAndDocStringPass()(model)
    kept = {*graph.inputs, *graph.outputs}
    for node in graph:
        for value in node.outputs:
            if value not in kept:
                # Inferred again by whoever loads the file; as written by the exporter they name traced symbols.
                value.shape, value.type = None, None
    (images,), (logits,) = graph.inputs, graph.outputs
    for value, name in ((images, "images"), (logits, "logits")):
        value.name = name
    _name_sizes(images, logits)
    graph.name, graph.doc_string = "reverie", None
    model.producer_name, model.producer_version, model.doc_string = "reverie", metadata.version("reverie"), None
    model.metadata_props.clear()
    model.metadata_props.update(facts)
    return bytes(ir.to_proto(model).SerializeToString(deterministic=True))


def _name_sizes(images: ir.Value, logits: ir.Value) -> None:
    """Calls sizes that are free by their names, which as traced are those of symbols."""
    assert images.shape is not None and logits.shape is not None
    names = ("batch", "channels", *_SIZES)
    images.shape = ir.Shape([size if isinstance(size, int) else name for size, name in zip(images.shape, names, strict=False)])
    logits.shape = ir.Shape([images.shape[0], *logits.shape[1:]])
