import importlib.util
import math

import onnx
import pytest
import torch
from torch import nn

from reverie.errors import ExportError
from reverie.export import _verify as verify
from reverie.export._onnx import export_float
from reverie.export._packed import stored_bits, write_packed
from reverie.export.onnx import Onnx
from reverie.graph.capture import capture
from reverie.graph.fold import fold_batch_norms
from reverie.graph.placement import Bits, place
from reverie.graph.quantized import finish
from reverie.runtimes.onnxruntime import OnnxRuntime

SHAPE = (3, 16, 16)
W4A8, W4A4 = (4, 8, 8), (4, 4, 8)
BITS = [(8, 8, 8), (4, 8, 8), (4, 4, 8), (3, 5, 6), (2, 2, 2), (7, 6, None)]


def stored(model):
    return {tensor.name: tensor for tensor in model.graph.initializer}


@pytest.mark.parametrize("bits", BITS, ids=str)
def test_onnxruntime_computes_every_tensor_to_a_step_of_the_student_and_all_in_integers(bits, written, images):
    network, path = written(*bits)
    parity = verify.measure_parity(network, path, images)
    verify.assert_parity(parity)
    assert parity.per_tensor.keys() == network.activations.keys()
    assert parity.images == len(images)
    assert parity.differing_share < 1e-3
    verify.assert_integer(path, network)
    found = OnnxRuntime().kernels(path)
    assert found["QuantizeLinear"] == 1, "the input, and nothing else, is quantized at run time"
    assert not found.keys() & {"DequantizeLinear", "Conv", "Gemm", "Add", "Concat", "Relu", "Clip", "GlobalAveragePool"}


def test_a_network_whose_tensors_all_have_bits_of_their_own_is_exported_exactly(patterns, quantizer, images, tmp_path):
    uniform = quantizer(patterns, images, 4, 4, 8)
    names = (list(uniform.layers), list(uniform.activations))
    weights, activations = ({name: 2 + number % 7 for number, name in enumerate(part)} for part in names)
    assert set(weights.values()) == set(activations.values()) == set(range(2, 9))
    network = quantizer(patterns, images, 4, 4, 8, Bits(weights=weights, activations=activations))
    path = tmp_path / "network.onnx"
    Onnx()(network, SHAPE, path)
    verify.assert_parity(verify.measure_parity(network, path, images))
    verify.assert_integer(path, network)
    tensors = stored(onnx.load(path))
    for name, bits in weights.items():
        layer = network.layers[name]
        tensor = tensors[f"{layer.weight}_codes"]
        assert onnx.TensorProto.DataType.Name(tensor.data_type) == ("INT4" if bits <= 4 else "INT8")
        assert -(2 ** (bits - 1)) <= int(layer.codes.min()) and int(layer.codes.max()) < 2 ** (bits - 1)
    write_packed(network, tmp_path / "network.safetensors")
    assert stored_bits(tmp_path / "network.safetensors") == Bits(weights=weights, activations=activations)


@pytest.mark.slow
def test_resnet20_runs_as_integers_and_loses_nothing_on_the_way_to_the_file(assets, quantizer, tmp_path):
    spec = importlib.util.spec_from_file_location("export_asset_models", assets / "models.py")
    helpers = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(helpers)
    pixels, labels = helpers.cifar10("test")
    inputs = helpers.normalize(pixels[:100], *helpers.CIFAR_PREP["resnet20"])
    graph = fold_batch_norms(capture(helpers.cifar_net("resnet20"), (3, 32, 32)))
    network, path, float_path = quantizer(graph, inputs, 4, 8, 8), tmp_path / "network.onnx", tmp_path / "float.onnx"
    Onnx()(network, (3, 32, 32), path)
    export_float(graph, (3, 32, 32), float_path)
    parity = verify.measure_parity(network, path, inputs)
    verify.assert_parity(parity)
    verify.assert_integer(path, network)
    with torch.no_grad():
        expected, student = graph(inputs), network.graph(inputs)
    assert torch.allclose(verify.predict(OnnxRuntime().open(float_path), inputs), expected, atol=1e-4)
    right = (verify.predict(OnnxRuntime().open(path), inputs).argmax(1) == labels[:100]).sum()
    assert abs(int(right - (student.argmax(1) == labels[:100]).sum())) <= 1
    assert path.stat().st_size < 0.2 * float_path.stat().st_size


class Twice(nn.Module):
    """Applies one convolution twice; `side_by_side` to the same tensor, else to its own result."""

    def __init__(self, side_by_side):
        super().__init__()
        self.stem, self.shared = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)
        self.side_by_side = side_by_side

    def forward(self, x):
        x = torch.relu(self.stem(x))
        first = torch.relu(self.shared(x))
        second = torch.relu(self.shared(x if self.side_by_side else first))
        return self.head((first + second if self.side_by_side else second).mean((2, 3)))


@pytest.mark.parametrize("bits", [(8, 8, 8), W4A8], ids=str)
@pytest.mark.parametrize("side_by_side", [False, True])
def test_a_convolution_that_is_applied_twice_is_two_integer_layers(bits, side_by_side, quantizer, images, tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        graph = capture(Twice(side_by_side).eval(), SHAPE)
    network, path = quantizer(graph, images, *bits), tmp_path / "network.onnx"
    Onnx()(network, SHAPE, path)
    assert len(network.layers) == 4
    verify.assert_integer(path, network)
    assert OnnxRuntime().kernels(path)["QLinearConv"] == 3
    verify.assert_parity(verify.measure_parity(network, path, images))


@pytest.mark.parametrize(
    ("bits", "kind", "per_byte"), [(BITS[4], "INT4", 2), (W4A8, "INT4", 2), (BITS[5], "INT8", 1), (BITS[0], "INT8", 1)]
)
def test_weights_take_half_a_byte_up_to_four_bits_and_a_byte_above(bits, kind, per_byte, written):
    network, path = written(*bits)
    tensors = stored(onnx.load(path))
    inner = [layer for layer in network.layers.values() if layer.grid.bits == bits[0]]
    assert len(inner) >= 5
    for layer in inner:
        tensor = tensors[f"{layer.weight}_codes"]
        assert onnx.TensorProto.DataType.Name(tensor.data_type) == kind
        assert len(tensor.raw_data) == math.ceil(layer.codes.numel() / per_byte)
        assert torch.equal(torch.from_numpy(onnx.numpy_helper.to_array(tensor).astype("int8")), layer.codes)


@pytest.mark.parametrize("bits", [(2, 8, 8), (2, 4, 2)], ids=str)
def test_two_bits_are_stored_four_in_a_byte_where_that_is_asked_for(bits, written, images, tmp_path):
    network, wider = written(*bits)
    path = tmp_path / "network.onnx"
    Onnx(packing="int2")(network, SHAPE, path)
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    assert ([(entry.domain, entry.version) for entry in proto.opset_import], proto.ir_version) == ([("", 25)], 13)
    tensors = stored(proto)
    for layer in network.layers.values():
        tensor = tensors[f"{layer.weight}_codes"]
        assert onnx.TensorProto.DataType.Name(tensor.data_type) == ("INT2" if layer.grid.bits == 2 else "INT8")
        assert len(tensor.raw_data) == math.ceil(layer.codes.numel() / (4 if layer.grid.bits == 2 else 1))
        assert torch.equal(torch.from_numpy(onnx.numpy_helper.to_array(tensor).astype("int8")), layer.codes)
    verify.assert_integer(path, network)
    assert OnnxRuntime().kernels(path) == OnnxRuntime().kernels(wider)
    answers = [verify.predict(OnnxRuntime().open(file), images) for file in (path, wider)]
    assert torch.equal(*answers)


def test_a_file_without_two_bits_stays_at_the_opset_that_more_runtimes_read(written, tmp_path):
    network, path = written(*W4A8)
    Onnx(packing="int2")(network, SHAPE, tmp_path / "network.onnx", facts={"bits": str(W4A8), "about": "a test"})
    assert (tmp_path / "network.onnx").read_bytes() == path.read_bytes()


class Wide(nn.Module):
    """Its weights are nearly all of its file, as those of real networks are."""

    def __init__(self):
        super().__init__()
        self.stem, self.convs = nn.Conv2d(3, 256, 3), nn.Sequential(*(nn.Conv2d(256, 256, 3, padding=1) for _ in range(3)))
        self.head = nn.Linear(256, 10)

    def forward(self, x):
        return self.head(self.convs(self.stem(x)).mean((2, 3)))


def test_files_of_two_and_four_bits_are_a_quarter_and_half_of_one_of_eight(quantizer, images, tmp_path):
    graph, sizes = capture(Wide().eval(), SHAPE), {}
    for bits in (8, 4, 2):
        path = tmp_path / f"{bits}.onnx"
        Onnx(packing="int2")(quantizer(graph, images[:4], bits, 8, 8), SHAPE, path)
        sizes[bits] = path.stat().st_size
    assert sizes[4] <= 0.52 * sizes[8]
    assert sizes[2] <= 0.28 * sizes[8]


@pytest.mark.parametrize("shape", [(3, 24, 40), (3, 16, 16), (3, 12, 20)])
def test_a_file_for_any_size_computes_what_the_student_does_at_another(shape, quantized, tmp_path):
    network, path = quantized(4, 5, 8), tmp_path / "network.onnx"
    Onnx(dynamic_size=True)(network, SHAPE, path)
    (given,) = onnx.load(path).graph.input
    assert [size.dim_param or size.dim_value for size in given.type.tensor_type.shape.dim] == ["batch", 3, "height", "width"]
    others = torch.randn(20, *shape, generator=torch.Generator().manual_seed(2))
    verify.assert_integer(path, network)
    verify.assert_parity(verify.measure_parity(network, path, others))


class OneSize(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 2, 3, padding=1), nn.Linear(512, 3)

    def forward(self, x):
        return self.head(self.conv(x).flatten(1))


def test_a_network_that_is_made_for_one_size_is_refused_any_other(quantizer, images, tmp_path):
    network = quantizer(capture(OneSize().eval(), SHAPE), images, 8, 8, 8)
    with pytest.raises(ExportError) as caught:
        Onnx(dynamic_size=True)(network, SHAPE, tmp_path / "network.onnx")
    assert str(caught.value) == (
        "onnx: the network must compute for any height and width, got one that is made for (16, 16); leave out dynamic_size"
    )
    Onnx()(network, SHAPE, tmp_path / "network.onnx")


def test_biases_are_int32_on_the_scale_of_the_accumulator(written):
    network, path = written(*W4A8)
    tensors = stored(onnx.load(path))
    for layer in network.layers.values():
        codes, scale = (onnx.numpy_helper.to_array(tensors[f"{layer.bias}_{part}"]) for part in ("codes", "scale"))
        assert codes.dtype == "int32"
        assert torch.equal(torch.tensor(codes), layer.bias_codes)
        assert torch.equal(torch.tensor(scale), network.activations[layer.source].scale * layer.scale.flatten())


def test_a_file_is_valid_standard_onnx_and_says_what_it_is(written):
    proto = onnx.load(written(*W4A4)[1])
    onnx.checker.check_model(proto, full_check=True)
    assert {(entry.domain, entry.version) for entry in proto.opset_import} == {("", 21)}
    assert {node.domain for node in proto.graph.node} == {""}
    assert {entry.key: entry.value for entry in proto.metadata_props} == {"bits": "(4, 4, 8)", "about": "a test"}
    ends = [*proto.graph.input, *proto.graph.output]
    assert [value.name for value in ends] == ["images", "logits"]
    assert [value.type.tensor_type.shape.dim[0].dim_param for value in ends] == ["batch", "batch"]
    assert not any(node.doc_string or node.metadata_props for node in proto.graph.node)


def test_the_same_model_gives_the_same_bytes(written, quantized, tmp_path):
    _, path = written(*W4A4)
    Onnx()(quantized(*W4A4), SHAPE, tmp_path / "again.onnx", facts={"bits": str(W4A4), "about": "a test"})
    assert (tmp_path / "again.onnx").read_bytes() == path.read_bytes()


def test_activations_are_bounded_on_their_codes_where_the_grid_or_a_clamp_ends_before_uint8(written):
    proto = onnx.load(written(*W4A8)[1])
    tensors = stored(proto)
    (bounded,) = [node for node in proto.graph.node if node.op_type == "Min"]
    assert bounded.output[0] == "clamp_codes"
    bounds = onnx.numpy_helper.to_array(tensors[bounded.input[1]])
    assert bounds.shape == (1, 16, 1, 1)
    assert bounds.max() == 255
    network, path = written(*W4A4)
    low_bit = {node.output[0] for node in onnx.load(path).graph.node if node.op_type == "Min"}
    assert low_bit == {f"{name}_codes" for name, quantizer in network.activations.items() if quantizer.grid.bits == 4}


def test_an_export_leaves_the_model_as_it_was(quantized, images, tmp_path):
    network = quantized(*W4A8)
    code, before = network.graph.code, network.graph(images)
    state = {name: value.clone() for name, value in network.graph.state_dict().items()}
    Onnx()(network, SHAPE, tmp_path / "network.onnx")
    assert network.graph.code == code
    assert torch.equal(network.graph(images), before)
    assert all(torch.equal(value, network.graph.state_dict()[name]) for name, value in state.items())


def test_the_float_file_computes_what_the_captured_graph_does(patterns, images, float_file):
    answers = verify.predict(OnnxRuntime().open(float_file), images, batch=7)
    assert torch.allclose(answers, patterns(images), atol=1e-5)
    assert "GlobalAveragePool" in {node.op_type for node in onnx.load(float_file).graph.node}


def test_the_literature_placement_is_refused(patterns, tmp_path):
    student = place(patterns, "literature", weight_bits=4, activation_bits=4)
    for quantizer in student.activations.values():
        quantizer.set_qparams(torch.tensor(0.1), torch.tensor(0, dtype=torch.int32))
    with pytest.raises(ExportError) as caught:
        Onnx()(finish(student), SHAPE, tmp_path / "network.onnx")
    assert str(caught.value) == (
        "export: the placement must be 'integer', got 'literature'; "
        "quantize again with placement 'integer', which is what integer runtimes execute"
    )
    assert not (tmp_path / "network.onnx").exists()


def test_weights_with_zero_points_are_refused(quantized, tmp_path):
    network = quantized(*W4A8)
    network.layers["depthwise"].zero_point[3] = 5
    with pytest.raises(ExportError) as caught:
        Onnx()(network, SHAPE, tmp_path / "network.onnx")
    assert str(caught.value) == (
        "depthwise: the weight must be on a symmetric signed grid, got zero points 0 to 5; use symmetric weight ranges"
    )


class Bessel(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.special.bessel_j0(self.conv(x)).mean((2, 3)))


def test_an_operator_without_a_translation_is_named(quantizer, images, tmp_path):
    graph = capture(Bessel(), SHAPE)
    for write in (
        lambda path: Onnx()(quantizer(graph, images, 8, 8, 8), SHAPE, path),
        lambda path: export_float(graph, SHAPE, path),
    ):
        with pytest.raises(ExportError) as caught:
            write(tmp_path / "network.onnx")
        assert str(caught.value) == (
            "onnx: every operator must have a translation to opset 21, got 'prims.bessel_j0'; "
            "replace the operator in the network"
        )
