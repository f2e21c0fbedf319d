"""The student on codes is the exported file, to the last bit of every layer."""

import importlib.util

import pytest
import torch
from torch import nn

from reverie.export import _verify as verify
from reverie.export.onnx import Onnx
from reverie.graph.capture import capture
from reverie.graph.fold import fold_batch_norms
from reverie.graph.integer import as_integers
from reverie.runtimes.onnxruntime import OnnxRuntime


@pytest.mark.parametrize("bits", [(8, 8, 8), (4, 8, 8), (4, 4, 8), (3, 5, 8), (2, 2, None)])
def test_on_codes_the_student_answers_what_onnxruntime_answers(written, images, bits):
    quantized, path = written(*bits)
    theirs = verify.predict(OnnxRuntime().open(path), images)
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
    theirs = verify.predict(OnnxRuntime().open(tmp_path / "network.onnx"), images)
    with torch.no_grad():
        ours = as_integers(quantized)(images)
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    parity = verify.measure_parity(quantized, tmp_path / "network.onnx", images)
    assert apart <= set(parity.per_tensor)
    verify.assert_parity(parity)


def test_a_convolution_along_one_axis_has_a_scale_for_each_channel(quantizer, tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = nn.Sequential(
            nn.Conv1d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv1d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 14, 5)
        ).eval()
        signals = torch.randn(20, 3, 16)
        # Channels of very different sizes, so that one scale for another shows.
        module[0].weight.data *= torch.logspace(-2, 1, 8).view(-1, 1, 1)
    quantized = quantizer(capture(module, (3, 16)), signals, 8, 8, 8)
    Onnx()(quantized, (3, 16), tmp_path / "network.onnx")
    theirs = verify.predict(OnnxRuntime().open(tmp_path / "network.onnx"), signals)
    with torch.no_grad():
        ours = as_integers(quantized)(signals)
    assert ours.shape == theirs.shape == (20, 5)
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    verify.assert_parity(verify.measure_parity(quantized, tmp_path / "network.onnx", signals))


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
    theirs = verify.predict(OnnxRuntime().open(tmp_path / "network.onnx"), inputs)
    with torch.no_grad():
        ours = as_integers(quantized)(inputs)
    assert torch.equal(ours.argmax(1), theirs.argmax(1))
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


class Halves(nn.Module):
    """A sum, a product and a mean of tensors that two convolutions write."""

    def __init__(self, combine):
        super().__init__()
        self.left, self.right, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 1)
        self._combine = combine

    def forward(self, x):
        return self.head(self._combine(self.left(x), self.right(x)).mean((2, 3), keepdim=True)).flatten(1)


@pytest.mark.parametrize(("combine", "name"), [(torch.add, "add"), (torch.mul, "mul")])
def test_values_half_way_between_two_codes_go_where_onnxruntime_puts_them(combine, name, quantizer, images, tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        graph = capture(Halves(combine).eval(), (3, 16, 16))
    quantized = quantizer(graph, images, 8, 8, 8)
    left, right, combined = (quantized.activations[key] for key in ("left", "right", name))
    # Steps of the operands that are halves of a step of the result, on a grid with an odd zero point.
    for operand in (left, right):
        operand.set_qparams(torch.tensor(0.0137 if name == "add" else 0.5), torch.tensor(128, dtype=torch.int32))
    combined.set_qparams(torch.tensor(0.0274 if name == "add" else 0.5), torch.tensor(127, dtype=torch.int32))
    Onnx()(quantized, (3, 16, 16), tmp_path / "network.onnx")
    theirs = verify.predict(OnnxRuntime().open(tmp_path / "network.onnx"), images)
    with torch.no_grad():
        ours, fake = as_integers(quantized)(images), quantized.graph(images)
    tolerance = 1e-6 * theirs.abs().max()
    assert (ours - theirs).abs().max() <= tolerance
    assert (fake - theirs).abs().max() > 100 * tolerance, "nothing lies half-way, so the test shows nothing"
