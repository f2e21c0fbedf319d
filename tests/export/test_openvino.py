"""OpenVINO's own format: packed weights, integer kernels, and every code where the student has it."""

import copy
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from reverie.errors import ExportError
from reverie.export import _verify as verify
from reverie.export._metadata import read_facts
from reverie.graph.placement import Bits
from reverie.runtimes.onnxruntime import OnnxRuntime

pytest.importorskip("openvino", reason="the extra `openvino` is not installed")

import openvino

from reverie.export.openvino import OpenVino, _packed
from reverie.runtimes.openvino import OpenVino as Runtime

SHAPE = (3, 16, 16)


@pytest.fixture(scope="session")
def exported(quantized, tmp_path_factory):
    """An integer model of `Patterns` with 2-bit weights and 4-bit activations, and its files; leave both as they are."""
    network, path = quantized(2, 4, 8), tmp_path_factory.mktemp("openvino") / "network.xml"
    OpenVino()(network, SHAPE, path, facts={"reverie.network": "patterns", "reverie.recipe": "abc"})
    return network, path


@pytest.mark.parametrize("bits", [(8, 8, 8), (2, 4, 8), (2, 2, 2), (3, 5, 6)], ids=str)
def test_openvino_computes_every_tensor_to_a_step_of_the_student_and_all_in_integers(bits, quantized, images, tmp_path):
    network, path = quantized(*bits), tmp_path / "network.xml"
    OpenVino()(network, SHAPE, path)
    parity = verify.measure_parity(network, path, images, runtime=Runtime())
    verify.assert_parity(parity)
    assert parity.runtime == "openvino"
    assert parity.unrounded == ()
    assert parity.per_tensor.keys() == network.activations.keys()
    assert parity.differing_share < 1e-3
    assert parity.top1_agreement == 1
    verify.assert_integer(path, network, runtime=Runtime())


def test_so_it_does_where_sums_are_apart(patterns, quantizer, images, tmp_path):
    network, path = quantizer(patterns, images, 4, 4, 8, sums=8), tmp_path / "network.xml"
    OpenVino()(network, SHAPE, path)
    parity = verify.measure_parity(network, path, images, runtime=Runtime())
    verify.assert_parity(parity)
    assert parity.unrounded == ()
    verify.assert_integer(path, network, runtime=Runtime())


def test_openvino_does_not_round_in_an_onnx_file_what_a_sum_in_the_same_kernel_reads(written, images):
    network, path = written(8, 8, 8)
    parity = verify.measure_parity(network, path, images, runtime=Runtime())
    assert parity.unrounded == ("expand",)
    verify.assert_parity(parity)
    freely = [runtime.probe(path, ["relu_2"])(images.numpy())[1]["relu_2"] for runtime in (Runtime(), OnnxRuntime())]
    assert (freely[0] != freely[1]).mean() > 0.05


# Below 8 bits the bounds on codes stand in between anyway.
@pytest.mark.parametrize(("bits", "unrounded"), [((8, 8, 8), ("expand",)), ((4, 4, 8), ())], ids=["8 bits", "4 bits"])
def test_its_own_format_leaves_to_openvino_what_to_round_if_asked(bits, unrounded, quantized, images, tmp_path):
    network, path = quantized(*bits), tmp_path / "network.xml"
    OpenVino(exact=False)(network, SHAPE, path)
    parity = verify.measure_parity(network, path, images, runtime=Runtime())
    assert parity.unrounded == unrounded
    verify.assert_parity(parity)
    verify.assert_integer(path, network, runtime=Runtime())


def test_weights_take_a_quarter_a_half_or_a_whole_byte(patterns, quantizer, images, tmp_path):
    uniform = quantizer(patterns, images, 8, 8, 8)
    widths = dict(zip(uniform.layers, (2, 3, 4, 5, 6, 7, 8), strict=True))
    network = quantizer(patterns, images, 8, 8, 8, Bits(weights=widths, activations=dict.fromkeys(uniform.activations, 8)))
    path = tmp_path / "network.xml"
    OpenVino()(network, SHAPE, path)
    model = openvino.Core().read_model(path)
    stored = {}
    for node in model.get_ops():
        if node.get_type_name() == "Convolution" or node.get_type_name() in ("GroupConvolution", "MatMul"):
            operand = node.input_value(1).get_node()
            while operand.get_type_name() != "Constant":
                operand = operand.input_value(0).get_node()
            stored[node.get_friendly_name().partition("/")[0]] = operand.get_element_type().get_type_name()
    names = {2: "u2", 3: "i4", 4: "i4"}
    assert stored == {name: names.get(bits, "i8") for name, bits in widths.items()}
    verify.assert_parity(verify.measure_parity(network, path, images, runtime=Runtime()))


@pytest.mark.parametrize(("bits", "per_byte"), [(2, 4), (4, 2)])
@pytest.mark.parametrize("count", [8, 9, 11])
def test_packed_codes_come_back_as_they_were(bits, per_byte, count):
    half = 2 ** (bits - 1)
    codes = (np.arange(count) % (2 * half) - half).astype(np.int8)
    node = _packed(codes, bits)
    stored = node
    while stored.get_type_name() != "Constant":
        stored = stored.input_value(0).get_node()
    assert openvino.Tensor(stored.get_element_type(), stored.output(0).get_shape()).byte_size == -(-count // per_byte)
    compiled = openvino.Core().compile_model(openvino.Model([node], [], "codes"), "CPU")
    assert np.array_equal(compiled([])[0], codes)


def test_the_files_say_what_they_are(exported):
    _, path = exported
    assert read_facts(path)["reverie.network"] == "patterns"
    assert openvino.Core().read_model(path).get_rt_info(["reverie", "recipe"]).astype(str) == "abc"
    model = openvino.Core().read_model(path)
    assert model.input().get_any_name() == "images"
    assert model.output().get_any_name() == "logits"
    assert model.input().get_partial_shape()[0].is_dynamic


def test_the_same_model_gives_the_same_bytes(exported, quantized, tmp_path):
    _, path = exported
    again = tmp_path / "network.xml"
    OpenVino()(quantized(2, 4, 8), SHAPE, again, facts={"reverie.network": "patterns", "reverie.recipe": "abc"})
    for suffix in (".xml", ".bin"):
        assert again.with_suffix(suffix).read_bytes() == path.with_suffix(suffix).read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["network.bin", "network.xml"]


def test_a_damaged_file_is_caught(exported, images, tmp_path):
    network, path = exported
    root = ElementTree.parse(path).getroot()
    weights = bytearray(path.with_suffix(".bin").read_bytes())
    (place,) = [
        layer.find("data")
        for layer in root.iter("layer")
        if layer.get("name") == "relu_grid.scale" and layer.get("type") == "Const"
    ]
    begin = int(place.get("offset"))
    weights[begin : begin + 4] = (2 * np.frombuffer(weights[begin : begin + 4], np.float32)).tobytes()
    (tmp_path / "network.xml").write_bytes(path.read_bytes())
    (tmp_path / "network.bin").write_bytes(weights)
    with pytest.raises(ExportError, match=r"codes in openvino and in the student must be at most 1 step apart"):
        verify.assert_parity(verify.measure_parity(network, tmp_path / "network.xml", images, runtime=Runtime()))


def test_an_export_leaves_the_model_as_it_was(quantized, images, tmp_path):
    network = quantized(4, 8, 8)
    state = copy.deepcopy(network.graph.state_dict())
    OpenVino()(network, SHAPE, tmp_path / "network.xml")
    assert all(torch.equal(value, network.graph.state_dict()[name]) for name, value in state.items())
