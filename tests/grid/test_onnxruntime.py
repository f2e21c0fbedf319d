"""ONNX Runtime is the truth for integer codes."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from reverie.grid import Grid, dequantize, fake_quantize, quantize


def runtime_codes(x, scale, zero_point, grid):
    """What ONNX Runtime's own QuantizeLinear and DequantizeLinear make of `x`, run one after the other."""
    kind = np.int8 if grid.signed else np.uint8
    given = ir.Value(name="x", shape=ir.Shape([None]), type=ir.TensorType(ir.DataType.FLOAT))
    stored = [
        ir.Value(name=name, const_value=ir.Tensor(value, name=name))
        for name, value in (("scale", scale.numpy()), ("zero_point", zero_point.numpy().astype(kind)))
    ]
    quantize_node = ir.node("QuantizeLinear", [given, *stored])
    dequantize_node = ir.node("DequantizeLinear", [quantize_node.outputs[0], *stored])
    codes, values = quantize_node.outputs[0], dequantize_node.outputs[0]
    codes.name, codes.type = "codes", ir.TensorType(ir.DataType.INT8 if grid.signed else ir.DataType.UINT8)
    values.name, values.type = "values", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        [given], [codes, values], nodes=[quantize_node, dequantize_node], initializers=stored, opset_imports={"": 21}
    )
    model = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(result) for result in session.run(["codes", "values"], {"x": x.numpy()})]


def ties_and_noise(scale):
    """Every exact half step in and around the range, its float32 neighbours, and noise."""
    ties = (torch.arange(-600, 600) / 2) * scale
    near = [torch.nextafter(ties, torch.tensor(sign * torch.inf)) for sign in (-1, 1)]
    noise = torch.randn(2000, generator=torch.Generator().manual_seed(0)) * 100 * scale
    return torch.cat([ties, *near, noise])


@pytest.mark.parametrize(("signed", "zero_point"), [(True, 0), (True, -3), (True, 17), (False, 0), (False, 1), (False, 128)])
@pytest.mark.parametrize("scale", [0.0371, 2.0**-7, 1 / 3, 3e-6, 41.7])
def test_codes_and_values_equal_onnxruntime_bit_for_bit(scale, signed, zero_point):
    grid, scale, zero_point = Grid(8, signed), torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int32)
    x = ties_and_noise(scale)
    codes, values = runtime_codes(x, scale, zero_point, grid)
    assert torch.equal(quantize(x, scale, zero_point, grid), codes.float())
    assert torch.equal(dequantize(codes.float(), scale, zero_point), values)
    assert torch.equal(fake_quantize(x, scale, zero_point, grid), values)
