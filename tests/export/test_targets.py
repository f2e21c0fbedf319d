"""Files for runtimes that are not here: their form is what the runtime's documentation demands, their numbers are the student's."""

from collections import Counter

import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from reverie import export, plugins
from reverie.errors import ExportError
from reverie.export import _verify as verify
from reverie.export.onnx import Onnx
from reverie.export.portable import Portable
from reverie.export.qnn import Qnn
from reverie.export.tensorrt import TensorRT
from reverie.graph.capture import capture
from reverie.graph.placement import place
from reverie.graph.quantized import finish

SHAPE = (3, 16, 16)
W8A8, W4A4 = (8, 8, 8), (4, 4, 8)
TARGETS = plugins.names(export)
ONNX_TARGETS = {"onnx": Onnx, "portable": Portable, "tensorrt": TensorRT, "qnn": Qnn}


def sound(path):
    """The file, after the ONNX checker and strict shape inference."""
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)
    return proto


def stored(proto):
    return {tensor.name: tensor for tensor in proto.graph.initializer}


def kind(tensor):
    return onnx.TensorProto.DataType.Name(tensor.data_type)


def readers(proto, output):
    return [node for node in proto.graph.node if output in node.input]


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_says_what_its_file_is_called_and_what_proves_it(name):
    target = plugins.load(export, name)()
    assert isinstance(target, export.Exporter)
    assert target.filename.startswith("network.")
    assert target.device is None or target.device


def test_no_two_targets_write_the_same_file():
    assert max(Counter(plugins.load(export, name).filename for name in TARGETS).values()) == 1


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [W8A8, W4A4, (2, 2, 2), (5, 7, 6)], ids=str)
@pytest.mark.parametrize("target", ["onnx", "portable", "qnn", "tensorrt"])
def test_every_tensor_is_the_students_to_a_step(target, bits, symmetric, patterns, quantizer, images, tmp_path):
    if target == "tensorrt" and not symmetric and max(bits) == 8:
        pytest.skip("no such file: it is refused")
    network, path = quantizer(patterns, images, *bits, symmetric=symmetric), tmp_path / "network.onnx"
    ONNX_TARGETS[target]()(network, SHAPE, path)
    sound(path)
    parity = verify.measure_parity(network, path, images)
    verify.assert_parity(parity)
    assert parity.per_tensor.keys() == network.activations.keys()
    assert parity.differing_share < 1e-3
    assert parity.top1_agreement >= 0.98


@pytest.mark.parametrize("bits", [W8A8, W4A4], ids=str)
def test_portable_files_have_whole_bytes_and_operators_of_opset_13(bits, quantized, tmp_path):
    network, path = quantized(*bits), tmp_path / "network.onnx"
    Portable()(network, SHAPE, path)
    proto = sound(path)
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", 13)]
    assert proto.ir_version == 7
    tensors = stored(proto)
    for layer in network.layers.values():
        assert torch.equal(torch.tensor(onnx.numpy_helper.to_array(tensors[f"{layer.weight}_codes"])), layer.codes)
    assert {kind(tensor) for tensor in tensors.values()} <= {"INT8", "UINT8", "INT32", "FLOAT", "INT64"}
    for node in proto.graph.node:
        if node.op_type == "QuantizeLinear":
            assert [reader.op_type for reader in readers(proto, node.output[0])] == ["DequantizeLinear"]


class Newer(nn.Module):
    """Has what opset 13 lacks or spells otherwise: hard-swish, GELU, layer norm, batch norm, split, padding, a mean of channels."""

    def __init__(self):
        super().__init__()
        self.conv, self.mix, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Linear(8, 5)
        self.norm, self.batch = nn.LayerNorm(8), nn.BatchNorm2d(8)

    def forward(self, x):
        x = F.hardswish(self.batch(F.relu(self.conv(x))))
        left, right = self.mix(F.pad(x, (1, 1, 1, 1), mode="reflect")).split(4, dim=1)
        x = torch.cat([F.gelu(left), F.silu(right)], dim=1)
        x = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) + x.mean(1, keepdim=True)
        return self.head(x.mean((2, 3)))


def test_portable_files_say_newer_operators_in_older_ones(quantizer, images, tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        graph = capture(Newer().eval(), SHAPE)
    network, path = quantizer(graph, images, 8, 8, 8), tmp_path / "network.onnx"
    Portable()(network, SHAPE, path)
    found = {node.op_type for node in sound(path).graph.node}
    assert {"HardSigmoid", "Erf", "Sigmoid", "ReduceMean"} <= found
    assert not found & {"HardSwish", "Gelu", "LayerNormalization"}
    verify.assert_parity(verify.measure_parity(network, path, images))


class Attends(nn.Module):
    """Attention, whose sizes and scale are computed by operators that opset 13 lacks or spells otherwise."""

    def __init__(self):
        super().__init__()
        self.patches, self.qkv, self.head = nn.Conv2d(3, 16, 4, stride=4), nn.Linear(16, 48), nn.Linear(16, 5)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        batch, tokens, width = x.shape
        query, key, value = self.qkv(x).reshape(batch, tokens, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        return self.head(
            F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(batch, tokens, width).mean(1)
        )


def test_portable_files_say_attention_in_older_operators(quantizer, images, tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        graph = capture(Attends().eval(), SHAPE)
    network, path = quantizer(graph, images, 8, 8, 8), tmp_path / "network.onnx"
    Portable()(network, SHAPE, path)
    found = sound(path).graph.node
    assert "Softmax" in {node.op_type for node in found}
    assert "CastLike" not in {node.op_type for node in found}
    assert not any(node.attribute for node in found if node.op_type == "Shape")
    verify.assert_parity(verify.measure_parity(network, path, images))


class Grid(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)

    def forward(self, x):
        x = self.conv(x)
        grid = F.affine_grid(torch.eye(2, 3).expand(x.shape[0], 2, 3), [x.shape[0], 4, 14, 14], align_corners=False)
        return self.head(F.grid_sample(x, grid, align_corners=False).mean((2, 3)))


def test_an_operator_that_opset_13_lacks_is_named(quantizer, images, tmp_path):
    network = quantizer(capture(Grid(), SHAPE), images, 8, 8, 8)
    with pytest.raises(ExportError) as caught:
        Portable()(network, SHAPE, tmp_path / "network.onnx")
    assert str(caught.value) == "portable: every operator must be one of opset 13, got 'GridSample'; use the target onnx"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("bits", "clipping"), [(W8A8, "Relu"), (W4A4, "Clip")])
def test_tensorrt_files_are_signed_and_have_no_zero_points(bits, clipping, patterns, quantizer, images, tmp_path):
    network, path = quantizer(patterns, images, *bits, symmetric=True), tmp_path / "network.onnx"
    TensorRT()(network, SHAPE, path)
    proto = sound(path)
    tensors = stored(proto)
    both = [node for node in proto.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert len(both) > 2 * len(network.layers)
    for node in both:
        zeros = [onnx.numpy_helper.to_array(tensors[name]) for name in node.input[2:] if name]
        assert all(zero.dtype == "int8" and not zero.any() for zero in zeros)
        assert node.op_type == "DequantizeLinear" or zeros
    for layer in network.layers.values():
        assert kind(tensors[f"{layer.weight}_codes"]) == "INT8"
    assert "INT32" not in {kind(tensor) for tensor in tensors.values()}
    # ReLU is in front of the quantization, where it is fused into the layer; nothing is computed on codes.
    assert clipping in {node.op_type for node in proto.graph.node}
    for node in proto.graph.node:
        if node.op_type == "QuantizeLinear":
            assert [reader.op_type for reader in readers(proto, node.output[0])] == ["DequantizeLinear"]


def test_biases_of_tensorrt_files_are_what_the_integers_stand_for(patterns, quantizer, images, tmp_path):
    network, path = quantizer(patterns, images, *W8A8, symmetric=True), tmp_path / "network.onnx"
    TensorRT()(network, SHAPE, path)
    tensors = stored(onnx.load(path))
    for layer in network.layers.values():
        bias = torch.tensor(onnx.numpy_helper.to_array(tensors[layer.bias]))
        assert torch.equal(bias, network.graph.get_buffer(layer.bias))
        assert torch.equal(
            (bias / network.activations[layer.source].scale / layer.scale.flatten()).round(), layer.bias_codes.float()
        )


def test_a_grid_that_needs_a_zero_point_is_refused_where_there_are_none(quantized, tmp_path):
    network = quantized(*W8A8)
    first = next(iter(network.activations.values()))
    first.set_qparams(torch.tensor(0.02), torch.tensor(130, dtype=torch.int32))
    with pytest.raises(ExportError) as caught:
        TensorRT()(network, SHAPE, tmp_path / "network.onnx")
    assert str(caught.value) == (
        "tensorrt: x: codes must be within -128 to 127 where there are no zero points, got -130 to 125; quantize with "
        "--set quantization.symmetric=true, or with activations of at most 7 bits (end_bits, stem_bits and sum_bits too)"
    )
    assert not list(tmp_path.iterdir())


def test_qnn_files_hold_four_bits_straight_behind_the_layers_and_one_image(patterns, quantizer, images, tmp_path):
    network, path = quantizer(patterns, images, 4, 8, 4), tmp_path / "network.onnx"
    Qnn()(network, SHAPE, path)
    proto = sound(path)
    tensors = stored(proto)
    ends = [*proto.graph.input, *proto.graph.output]
    assert [value.type.tensor_type.shape.dim[0].dim_value for value in ends] == [1, 1]
    for layer in network.layers.values():
        assert kind(tensors[f"{layer.weight}_codes"]) == "INT4"
        (reader,) = readers(proto, f"{layer.weight}_codes")
        assert reader.op_type == "DequantizeLinear"
        assert all(kind(tensors[name]) == "INT4" for name in reader.input[2:] if name)
    assert "Cast" not in {node.op_type for node in proto.graph.node}
    for node in proto.graph.node:
        if node.op_type == "QuantizeLinear":
            assert [reader.op_type for reader in readers(proto, node.output[0])] == ["DequantizeLinear"]


@pytest.mark.parametrize("target", [Portable, TensorRT, Qnn])
def test_the_literature_placement_is_refused_by_name(target, patterns, tmp_path):
    student = place(patterns, "literature", weight_bits=4, activation_bits=4)
    for quantizer in student.activations.values():
        quantizer.set_qparams(torch.tensor(0.1), torch.tensor(0, dtype=torch.int32))
    with pytest.raises(ExportError) as caught:
        target()(finish(student), SHAPE, tmp_path / "network.onnx")
    assert str(caught.value) == (
        f"{target.__name__.lower()}: export: the placement must be 'integer', got 'literature'; "
        "quantize again with placement 'integer', which is what integer runtimes execute"
    )
