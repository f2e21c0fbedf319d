"""ONNX files for runtimes that know little: opset 13, whole bytes, nothing packed, no custom operators.

    activations     [ReLU, Clip] -> QuantizeLinear to uint8 -> DequantizeLinear
    weights         INT8 initializer -> DequantizeLinear, one scale per channel, whatever their bits
    biases          INT32 initializer -> DequantizeLinear at the accumulator's scale

Opset 13 (2021) is the first whose DequantizeLinear has scales per channel. Networks are translated at opset 18, the oldest that
`torch.onnx.export` writes; what differs is rewritten here, each operator by those that it is defined by in the ONNX
specification. The rest is the same in both versions, as far as the ONNX schemas can tell.

Below 8 bits, the clipping keeps ONNX Runtime from integer kernels, as it computes bounds of codes alone on the way: there, `onnx`
is the target that is fast.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common
from numpy.typing import NDArray

from reverie.errors import ExportError, at
from reverie.export._lowering import Form, lower
from reverie.export._onnx import name_layers, translate, write
from reverie.graph.quantized import QuantizedNetwork

_OPSET = 13
_WRITTEN = 18


@dataclass(frozen=True, kw_only=True)
class Portable:
    """Has no settings."""

    filename: ClassVar[str] = "network.portable.onnx"
    runtime: ClassVar[str] = "onnxruntime"
    device: ClassVar[str | None] = "runtimes of opset 13"

    def __call__(
        self, quantized: QuantizedNetwork, shape: tuple[int, ...], path: Path, *, facts: dict[str, str] | None = None
    ) -> None:
        """Writes `path`; see `export.Exporter`."""
        with at("portable"):
            model = translate(lower(quantized, shape, Form(bounded_codes=False)), shape, opset=_WRITTEN, padded_codes=False)
            _downgrade(model)
        name_layers(model.graph, {f"{layer.weight}_codes": layer.name for layer in quantized.layers.values()})
        write(model, path, facts or {})


def _downgrade(model: ir.Model) -> None:
    """Rewrites what opset 13 lacks or spells otherwise, in place.

    Raises:
        ExportError: An operator has no form there.
    """
    # Some rewrites depend on types and ranks, which the passes before have not kept everywhere.
    ir.passes.common.ShapeInferencePass()(model)
    for node in list(model.graph):
        rewrite = _REWRITES.get(node.op_type)
        if rewrite is not None:
            rewrite(model.graph, node)
    for node in model.graph:
        try:
            known = onnx.defs.get_schema(node.op_type, _OPSET, node.domain)
        except onnx.defs.SchemaError:
            known = None
        left = [] if known is None else sorted(set(node.attributes) - set(known.attributes))
        if known is None or left or len(node.inputs) > known.max_input:
            what = repr(node.op_type) + (f" with {', '.join(left)}" if left else "")
            raise ExportError(f"every operator must be one of opset {_OPSET}, got {what}; use the target onnx")
    model.opset_imports[""] = _OPSET
    model.ir_version = 7


def _axes_as_attribute(graph: ir.Graph, node: ir.Node) -> None:
    axes = node.inputs[1] if len(node.inputs) > 1 else None
    if node.attributes.pop("noop_with_empty_axes", None) is not None and axes is None:
        return
    if axes is not None:
        assert axes.const_value is not None
        node.attributes["axes"] = ir.AttrInt64s("axes", [int(axis) for axis in axes.const_value.numpy().flat])
    node.resize_inputs(1)


def _without(*names: str) -> Callable[[ir.Graph, ir.Node], None]:
    """Drops attributes whose default is what opset 13 does always."""

    def drop(graph: ir.Graph, node: ir.Node) -> None:
        for name in names:
            node.attributes.pop(name, None)

    return drop


def _sizes_of_parts(graph: ir.Graph, node: ir.Node) -> None:
    # Without sizes opset 13 splits evenly, too, where the parts are equal; `num_outputs` only says how many there are.
    node.attributes.pop("num_outputs", None)


def _replace(graph: ir.Graph, node: ir.Node, *new: ir.Node) -> None:
    """Puts `new`, whose last one computes it, in the place of `node`."""
    graph.insert_before(node, new)
    last = new[-1].outputs[0]
    last.name = node.outputs[0].name
    ir.convenience.replace_all_uses_with(node.outputs[0], last, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _stored(graph: ir.Graph, name: str, value: NDArray[Any]) -> ir.Value:
    tensor = ir.Tensor(value, name=name)
    stored = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.initializers.add(stored)
    return stored


def _cast_like(graph: ir.Graph, node: ir.Node) -> None:
    kind = node.inputs[1].dtype if node.inputs[1] is not None else None
    if kind is not None:
        _replace(graph, node, ir.node("Cast", node.inputs[:1], {"to": kind}))


def _scatter(graph: ir.Graph, node: ir.Node) -> None:
    if node.attributes.get_string("reduction", "none") == "none":
        node.attributes.pop("reduction", None)


def _shape_of_some_axes(graph: ir.Graph, node: ir.Node) -> None:
    first, last = node.attributes.get_int("start", 0), node.attributes.get_int("end", np.iinfo(np.int64).max)
    name = node.outputs[0].name
    ends = [_stored(graph, f"{name}_{key}", np.array([end], np.int64)) for key, end in (("first", first), ("last", last))]
    whole = ir.node("Shape", node.inputs)
    _replace(graph, node, whole, ir.node("Slice", [whole.outputs[0], *ends]))


def _hard_swish(graph: ir.Graph, node: ir.Node) -> None:
    gate = ir.node("HardSigmoid", node.inputs, {"alpha": 1 / 6, "beta": 0.5})
    _replace(graph, node, gate, ir.node("Mul", [node.inputs[0], gate.outputs[0]]))


def _layer_norm(graph: ir.Graph, node: ir.Node) -> None:
    x, scale, *bias = node.inputs
    first, epsilon = node.attributes.get_int("axis", -1), node.attributes.get_float("epsilon", 1e-5)
    rank = len(x.shape) if x is not None and x.shape is not None else 0
    over: dict[str, Any] = {"axes": list(range(first if first < 0 else first - rank, 0))}
    name = node.outputs[0].name
    mean = ir.node("ReduceMean", [x], over)
    centred = ir.node("Sub", [x, mean.outputs[0]])
    squares = ir.node("Mul", [centred.outputs[0], centred.outputs[0]])
    variance = ir.node("ReduceMean", squares.outputs, over)
    shifted = ir.node("Add", [variance.outputs[0], _stored(graph, f"{name}_epsilon", np.array(epsilon, np.float32))])
    deviation = ir.node("Sqrt", shifted.outputs)
    normal = ir.node("Div", [centred.outputs[0], deviation.outputs[0]])
    scaled = ir.node("Mul", [normal.outputs[0], scale])
    new = [mean, centred, squares, variance, shifted, deviation, normal, scaled]
    if bias and bias[0] is not None:
        new.append(ir.node("Add", [scaled.outputs[0], bias[0]]))
    _replace(graph, node, *new)


_REWRITES: dict[str, Callable[[ir.Graph, ir.Node], None]] = {
    **dict.fromkeys(("ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL2", "ReduceSumSquare"), _axes_as_attribute),
    "Reshape": _without("allowzero"),
    "BatchNormalization": _without("training_mode"),
    "AveragePool": _without("dilations"),
    "QuantizeLinear": _without("saturate", "block_size", "output_dtype", "precision"),
    "DequantizeLinear": _without("block_size", "output_dtype"),
    "Cast": _without("saturate", "round_mode"),
    "Split": _sizes_of_parts,
    "CastLike": _cast_like,
    "ScatterND": _scatter,
    "Shape": _shape_of_some_axes,
    "HardSwish": _hard_swish,
    "LayerNormalization": _layer_norm,
}

METHOD = Portable
