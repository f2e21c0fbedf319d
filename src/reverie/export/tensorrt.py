"""ONNX files for TensorRT (8 to 11): explicit quantization, symmetric everywhere. Not run on the device: see below.

    activations     QuantizeLinear to int8, zero point 0 -> DequantizeLinear, one scale for the tensor
    weights         INT8 initializer -> DequantizeLinear, zero point 0, one scale per output channel
    biases          float, the very values that the student's int32 codes stand for

What TensorRT's documentation demands ("Working with Quantized Types", "Explicit Quantization" and the class references of
IQuantizeLayer and IDequantizeLayer), and how it is met:

- Zero points are build-time constants that hold only zeros, and integers are signed. A student gives the same answers without
  zero points only if its codes, counted from its zero point, are within -128 to 127. Those of `quantization.symmetric = true`
  are, and so are all of at most 7 bits; others are refused, since another grid would be another model.
- Stored weights are int8, fp8, int4 or fp4 behind an IDequantizeLayer; convolutions take no int4. Narrow weights are
  therefore stored, and executed, in int8. IDequantizeLayer reads no int32, so biases are float: the layer adds them in its
  accumulator.
- Inputs of all weighted layers are quantized, and both operands of a residual sum, as "Q/DQ Layer-Placement Recommendations" asks;
  outputs that only a sum reads are too, which costs a fusion there and is what the student computes.
- Nothing is computed on codes: ReLU and Clip stand in front of QuantizeLinear, where TensorRT fuses them into the convolution.

Opset 21 for every file; the batch is free (an optimization profile says which). The ONNX checker, strict shape inference and a
comparison with ONNX Runtime on the CPU, tensor by tensor, check the file; TensorRT itself has not run it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from reverie.errors import at
from reverie.export._lowering import Form, lower
from reverie.export._onnx import name_layers, translate, write
from reverie.graph.quantized import QuantizedNetwork


@dataclass(frozen=True, kw_only=True)
class TensorRT:
    """Has no settings."""

    filename: ClassVar[str] = "network.tensorrt.onnx"
    runtime: ClassVar[str] = "onnxruntime"
    device: ClassVar[str | None] = "TensorRT"

    def __call__(
        self, quantized: QuantizedNetwork, shape: tuple[int, ...], path: Path, *, facts: dict[str, str] | None = None
    ) -> None:
        """Writes `path`; see `export.Exporter`."""
        with at("tensorrt"):
            lowered = lower(quantized, shape, Form(zero_points=False, bounded_codes=False, integer_biases=False))
            model = translate(lowered, shape, padded_codes=False)
        name_layers(model.graph, {f"{layer.weight}_codes": layer.name for layer in quantized.layers.values()})
        write(model, path, facts or {})


METHOD = TensorRT
