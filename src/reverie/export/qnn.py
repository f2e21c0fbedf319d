"""ONNX files for Qualcomm's NPUs, through ONNX Runtime's QNN execution provider. Not run on the device: see below.

    activations     QuantizeLinear to uint8 -> DequantizeLinear, any zero point, one scale for the tensor
    weights         up to 4 bits: INT4 initializer -> DequantizeLinear; else INT8; zero point 0, one scale per output channel
    biases          INT32 initializer -> DequantizeLinear at the accumulator's scale

What the documentation demands ("QNN Execution Provider" of ONNX Runtime, and the HTP op definition supplement of Qualcomm's AI
Engine Direct SDK), and how it is met:

- Shapes are fixed, the batch too: it is 1.
- Each layer stands between DequantizeLinear and QuantizeLinear, and nothing else: no Cast behind INT4 weights, no minimum or
  maximum on codes. Clip in front of QuantizeLinear gives activations below 8 bits exactly.
- Activations are unsigned and may be asymmetric; weights with scales per channel must be symmetric, 4-bit weights always.
- HTP multiplies with 4-bit weights in convolutions and fully connected layers (ONNX Runtime's pull request 21171); of which it
  gets faster is the device's own (Qualcomm names 1 x 1 convolutions of more than 32 channels).

The ONNX checker, strict shape inference and a comparison with ONNX Runtime on the CPU, tensor by tensor, check the file (there
4-bit weights run in float, since nothing folds them); no NPU has run it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir

from reverie.errors import at
from reverie.export._lowering import Form, lower
from reverie.export._onnx import name_layers, store, translate, write
from reverie.graph.quantized import QuantizedNetwork


@dataclass(frozen=True, kw_only=True)
class Qnn:
    """Has no settings."""

    filename: ClassVar[str] = "network.qnn.onnx"
    runtime: ClassVar[str] = "onnxruntime"
    device: ClassVar[str | None] = "QNN"

    def __call__(
        self, quantized: QuantizedNetwork, shape: tuple[int, ...], path: Path, *, facts: dict[str, str] | None = None
    ) -> None:
        """Writes `path`, for one image at a time; see `export.Exporter`."""
        with at("qnn"):
            model = translate(lower(quantized, shape, Form(bounded_codes=False)), shape, batch=1, padded_codes=False)
        name_layers(model.graph, {f"{layer.weight}_codes": layer.name for layer in quantized.layers.values()})
        for layer in quantized.layers.values():
            if layer.grid.bits <= 4:
                store(model.graph, f"{layer.weight}_codes", ir.DataType.INT4, cast=False)
        write(model, path, facts or {})


METHOD = Qnn
