"""OpenVINO's own format, network.xml and its weights in network.bin, with 2- and 4-bit weights packed and int8 kernels.

    activations     FakeQuantize of 256 levels -> Convert(u8) -> [Maximum, Minimum on the codes] -> Convert(f32) -> Subtract -> Multiply
    weights         up to 2 bits: u2 constant -> Convert(i8) -> Subtract(2) \\
                    up to 4 bits: i4 constant -> Convert(i8)                 } -> Convert(f32) -> Multiply, one scale per channel
                    5 to 8 bits:  i8 constant                               /
    biases          i32 constant -> Convert(f32) -> Multiply at the accumulator's scale

The nodes are those that OpenVINO makes of our ONNX file's; what differs is the storage of weights and one more bound. OpenVINO folds
the conversion to i8 when it loads the file. Without it (or with a FakeQuantize of 16 levels on the weight) the convolution runs in
float. Where a sum or another grid reads the codes, a bound of 255, which changes nothing, keeps OpenVINO from merging what follows into
the convolution before the codes are rounded. That costs time (docs/benchmarks.md); `exact=false` leaves this bound out, so that sums are
merged and what they read of a convolution stays finer than its grid.

Not here: what OpenVINO makes of it, sums that are not rounded among it (`runtimes/openvino.py`).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from xml.etree import ElementTree

import numpy as np
import openvino  # type: ignore[import-untyped]
from numpy.typing import NDArray
from openvino import opset15 as op

from reverie.export._lowering import Form, lower
from reverie.export._onnx import as_bytes, name_layers, translate
from reverie.files import atomic_write
from reverie.graph.quantized import QuantizedNetwork

_LAST_CODE = 255
_MERGED = frozenset({"Add", "FakeQuantize"})
_DEQUANTIZATION = frozenset({"Convert", "Subtract", "Multiply"})


@dataclass(frozen=True, kw_only=True)
class OpenVino:
    """The object is its own configuration.

    Args:
        exact: Every tensor is rounded to its codes. False lets OpenVINO merge a sum or another grid into the convolution before it
            where that has 8-bit codes, which is faster, and leaves what was merged unrounded.
    """

    exact: bool = True

    filename: ClassVar[str] = "network.xml"
    runtime: ClassVar[str] = "openvino"
    device: ClassVar[str | None] = None

    def __call__(
        self, quantized: QuantizedNetwork, shape: tuple[int, ...], path: Path, *, facts: dict[str, str] | None = None
    ) -> None:
        """Writes `path`, and its weights beside it with the suffix `.bin`; see `export.Exporter`."""
        onnx = translate(lower(quantized, shape, Form()), shape)
        name_layers(onnx.graph, {f"{layer.weight}_codes": layer.name for layer in quantized.layers.values()})
        model = openvino.Core().read_model(as_bytes(onnx, {}))
        bits = {f"{layer.weight}_codes": layer.grid.bits for layer in quantized.layers.values()}
        for node in model.get_ordered_ops():
            if bits.get(node.get_friendly_name(), 8) <= 4:
                _replace(node, _packed(node.get_data(), bits[node.get_friendly_name()]))
            elif self.exact and node.get_type_name() == "FakeQuantize":
                _keep_rounding(node)
        model.validate_nodes_and_infer_types()
        _settle_shapes(model)
        _name_nodes(model)
        for key, value in (facts or {}).items():
            model.set_rt_info(value, key.split("."))
        atomic_write(path, lambda aside: _save(model, aside), beside=(".bin",))


METHOD = OpenVino


def _replace(node: openvino.Node, new: openvino.Node) -> None:
    """Makes all who read `node` read `new`, under the same names; all but `new` itself."""
    new.output(0).set_names(node.output(0).get_names())
    node.output(0).set_names(set())
    for reader in node.output(0).get_target_inputs():
        if reader.get_node().get_name() != new.get_name():
            reader.replace_source_output(new.output(0))


def _packed(codes: NDArray[np.int8], bits: int) -> openvino.Node:
    """Stored codes of up to 4 bits, converted back to i8; the first code of a byte is in its lowest bits."""
    width = 2 if bits <= 2 else 4
    # 2-bit codes are stored without a sign, as there is no i2.
    shift = 2 if width == 2 else 0
    whole = (codes.reshape(-1).astype(np.int16) + shift).astype(np.uint8) & (2**width - 1)
    parts = np.pad(whole, (0, -whole.size % (8 // width))).reshape(-1, 8 // width)
    packed = np.bitwise_or.reduce(parts << np.arange(0, 8, width, dtype=np.uint8), axis=1)
    # Memory of its own: a constant made of an array would go on reading it after it is gone.
    tensor = openvino.Tensor(openvino.Type.u2 if width == 2 else openvino.Type.i4, openvino.Shape(codes.shape))
    tensor.data[:] = packed.view(tensor.data.dtype)
    stored = op.constant(tensor)
    whole_again = op.convert(stored, "i8")
    return op.subtract(whole_again, op.constant(np.int8(shift))) if shift else whole_again


def _keep_rounding(grid: openvino.Node) -> None:
    """Bounds the codes of a grid by their own end where sums or other grids read them, which OpenVINO does not merge."""
    (convert,) = (reader.get_node() for reader in grid.output(0).get_target_inputs())
    readers = [reader.get_node() for reader in convert.output(0).get_target_inputs()]
    if not any(node.get_type_name() in _MERGED for reader in readers for node in _behind_dequantization(reader)):
        return
    bounded = op.minimum(convert, op.constant(np.uint8(_LAST_CODE)))
    _replace(convert, bounded)


def _behind_dequantization(node: openvino.Node) -> list[openvino.Node]:
    """What reads the values of codes that `node` is the first to read."""
    nodes = [node]
    while nodes and all(found.get_type_name() in _DEQUANTIZATION for found in nodes):
        nodes = [reader.get_node() for found in nodes for reader in found.output(0).get_target_inputs()]
    return nodes


def _settle_shapes(model: openvino.Model) -> None:
    """Shapes that are known are stored, and constants in the shape that is read: the graphs that compute both are a third of the XML."""
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Reshape" or node.get_output_partial_shape(0).is_dynamic:
            continue
        shape, source = list(node.get_output_shape(0)), node.input_value(0).get_node()
        # Memory of their own, as for `_packed`.
        if source.get_type_name() == "Constant":
            values = openvino.Tensor(source.get_element_type(), openvino.Shape(shape))
            values.data[:] = source.get_data().reshape(shape)
            stored = op.constant(values)
            stored.set_friendly_name(source.get_friendly_name())
            _replace(node, stored)
        else:
            known = openvino.Tensor(openvino.Type.i64, openvino.Shape([len(shape)]))
            known.data[:] = shape
            node.input(1).replace_source_output(op.constant(known).output(0))


def _save(model: openvino.Model, path: Path) -> None:
    """Writes the XML without the white space between its elements, a sixth of it."""
    openvino.save_model(model, path, compress_to_fp16=False)
    document = ElementTree.parse(path)
    for element in document.iter():
        if element.text is not None and not element.text.strip():
            element.text = None
        element.tail = None
    document.write(path, encoding="utf-8", xml_declaration=True)


def _name_nodes(model: openvino.Model) -> None:
    """Names that OpenVINO made up count every node of the process; these count those of the model, so that its bytes repeat."""
    for number, node in enumerate(model.get_ordered_ops()):
        if node.get_friendly_name() == node.get_name():
            node.set_friendly_name(f"{node.get_type_name()}_{number}")
