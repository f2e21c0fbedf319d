"""The student on codes is the exported file, to the last bit of every layer."""

import importlib.util

import pytest
import torch

from reverie.export import _verify as verify
from reverie.export.onnx import Onnx
from reverie.graph.capture import capture
from reverie.graph.fold import fold_batch_norms
from reverie.graph.integer import as_integers


@pytest.mark.parametrize("bits", [(8, 8, 8), (4, 8, 8), (4, 4, 8), (3, 5, 8), (2, 2, None)])
def test_on_codes_the_student_answers_what_onnxruntime_answers(written, images, bits):
    quantized, path = written(*bits)
    theirs = verify.predict(verify.open_session(path), images)
    with torch.no_grad():
        ours, fake = as_integers(quantized)(images), quantized.graph(images)
    scale = theirs.abs().max()
    assert torch.equal(ours.argmax(1), theirs.argmax(1))
    assert (ours - theirs).abs().max() <= 1e-5 * scale
    # And it is the same model: the fake-quantized graph differs by tipped roundings only.
    assert (ours - fake).abs().mean() <= 0.05 * scale


@pytest.mark.parametrize("bits", [4, 2])
def test_so_it_does_where_sums_are_apart(patterns, quantizer, images, tmp_path, bits):
    quantized = quantizer(patterns, images, 4, bits, 8, sums=8)
    grids = {name: activation.grid.bits for name, activation in quantized.activations.items()}
    apart = {name for name in grids if name.endswith("_for_layers")}
    assert len(apart) == 2
    assert all(grids[name] == bits and grids[name.removesuffix("_for_layers")] == 8 for name in apart)
    Onnx()(quantized, (3, 16, 16), tmp_path / "network.onnx")
    theirs = verify.predict(verify.open_session(tmp_path / "network.onnx"), images)
    with torch.no_grad():
        ours = as_integers(quantized)(images)
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    parity = verify.measure_parity(quantized, tmp_path / "network.onnx", images)
    assert apart <= set(parity.per_tensor)
    verify.assert_parity(parity)


def test_every_layer_between_quantized_tensors_computes_on_codes(written):
    quantized, _ = written(8, 8, 8)
    graph = as_integers(quantized)
    for name, layer in quantized.layers.items():
        (node,) = [node for node in graph.graph.nodes if node.name == name]
        weight = graph.get_buffer(str(node.args[1].target))
        # The last layer's logits are on no grid, so it computes in real numbers.
        assert torch.equal(weight, weight.round()) == (name != "head"), layer.path


def test_the_quantized_network_is_left_as_it_was(written, images):
    quantized, _ = written(4, 4, 8)
    with torch.no_grad():
        before = quantized.graph(images)
        as_integers(quantized)(images)
        assert torch.equal(before, quantized.graph(images))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet20", "mlperf_tiny_resnet8"])
def test_it_holds_on_real_networks_and_images(assets, quantizer, tmp_path, name):
    spec = importlib.util.spec_from_file_location("assets_models", assets / "models.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    pixels, _ = module.cifar10("test")
    inputs = module.normalize(pixels[:200], *module.CIFAR_PREP[name])
    quantized = quantizer(fold_batch_norms(capture(module.cifar_net(name), (3, 32, 32))), inputs[:50], 4, 8, 8)
    Onnx()(quantized, (3, 32, 32), tmp_path / "network.onnx")
    theirs = verify.predict(verify.open_session(tmp_path / "network.onnx"), inputs)
    with torch.no_grad():
        ours = as_integers(quantized)(inputs)
    assert torch.equal(ours.argmax(1), theirs.argmax(1))
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()
