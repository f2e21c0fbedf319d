"""ONNX files whose integers stock runtimes execute as integers: no custom operators, any bit width from 2 to 8.

    activations     QuantizeLinear to uint8 -> [Max, Min on the codes] -> DequantizeLinear
    weights         up to 4 bits: INT4 initializer, two in a byte -> Cast(INT8) -> DequantizeLinear, one scale per channel
                    up to 2 bits with packing = "int2": INT2 initializer, four in a byte -> Cast(INT8) -> DequantizeLinear
                    5 to 8 bits: INT8 initializer -> DequantizeLinear
    biases          INT32 initializer -> DequantizeLinear at the accumulator's scale

The Cast is what makes files of few bits fast: runtimes fold it when they load the file and then see an int8 convolution.
Straight behind an INT4 initializer, DequantizeLinear runs in float at every call (ResNet-18 in ONNX Runtime: 42.9 ms
against 3.9 ms). Min and Max on the codes give activations below 8 bits exactly and leave both fusions around them alone.

Weights of 3, 5, 6 and 7 bits take the next wider type, because ONNX has none of their own; `network.safetensors` is dense.
Opset 21 is the first with INT4. INT2 needs opset 25 and IR version 13, which few runtimes read (OpenVINO 2026.4 does not), so
it is asked for; a file without weights of at most 2 bits stays at opset 21.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import onnx_ir as ir

from reverie.export._lowering import Form, lower
from reverie.export._onnx import INT2_IR_VERSION, INT2_OPSET, name_layers, store, translate, write
from reverie.graph.quantized import QuantizedNetwork

Packing = Literal["int4", "int2"]


@dataclass(frozen=True, kw_only=True)
class Onnx:
    """Configuration.

    Args:
        packing: The narrowest type that weights are stored in: "int4", or "int2" for those of at most 2 bits.
        dynamic_size: Images of any height and width, if the network computes for any.
    """

    filename: ClassVar[str] = "network.onnx"
    runtime: ClassVar[str] = "onnxruntime"
    device: ClassVar[str | None] = None

    packing: Packing = "int4"
    dynamic_size: bool = False

    def __call__(
        self, quantized: QuantizedNetwork, shape: tuple[int, ...], path: Path, *, facts: dict[str, str] | None = None
    ) -> None:
        """Writes `path`; see `export.Exporter`."""
        model = translate(lower(quantized, shape, Form()), shape, dynamic_size=self.dynamic_size)
        name_layers(model.graph, {f"{layer.weight}_codes": layer.name for layer in quantized.layers.values()})
        for layer in quantized.layers.values():
            if layer.grid.bits <= 2 and self.packing == "int2":
                store(model.graph, f"{layer.weight}_codes", ir.DataType.INT2, cast=True)
                model.opset_imports[""], model.ir_version = INT2_OPSET, INT2_IR_VERSION
            elif layer.grid.bits <= 4:
                store(model.graph, f"{layer.weight}_codes", ir.DataType.INT4, cast=True)
        write(model, path, facts or {})


METHOD = Onnx
