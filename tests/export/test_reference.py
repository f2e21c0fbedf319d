"""The integer-only interpreter: right by hand, and ONNX Runtime's codes to the last bit."""

import importlib.util

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from reverie.errors import ExportError
from reverie.export import _verify as verify
from reverie.export._packed import restore, write_packed
from reverie.export._reference import Reference, _convolved
from reverie.export.onnx import Onnx
from reverie.graph.capture import capture
from reverie.graph.fold import fold_batch_norms
from reverie.graph.integer import as_integers
from reverie.graph.placement import place
from reverie.graph.quantized import finish
from reverie.runtimes.onnxruntime import OnnxRuntime

BITS = [(8, 8, 8), (4, 8, 8), (4, 4, 8), (3, 5, 6), (2, 2, None)]


def codes_of(path, names, images):
    """ONNX Runtime's codes, by tensor."""
    _, found = OnnxRuntime().probe(path, list(names))(images.numpy())
    return {name: torch.from_numpy(codes) for name, codes in found.items()}


def differences(ours, theirs):
    """By tensor, the largest difference of a code and the share of values that differ."""
    found = {}
    for name, codes in ours.items():
        apart = (codes.int() - theirs[name].int().reshape(codes.shape)).abs()
        found[name] = int(apart.max()), float((apart > 0).double().mean())
    return found


def test_a_convolution_worked_by_hand():
    graph = capture(nn.Sequential(nn.Conv2d(1, 1, 2), nn.Flatten()).eval(), (1, 2, 2))
    student = place(graph, "integer", weight_bits=4, activation_bits=8)
    (layer,) = student.layers.values()
    read, written = student.activations.values()
    read.set_qparams(torch.tensor(0.5), torch.tensor(2))
    written.set_qparams(torch.tensor(0.4), torch.tensor(1))
    weight = student.weights[layer.name]
    weight.set_qparams(torch.full((1, 1, 1, 1), 0.25), torch.zeros(1, 1, 1, 1, dtype=torch.int32))
    weight.set_codes(torch.tensor([[[[1.0, 2.0], [3.0, -1.0]]]]))
    student.graph.get_buffer(str(layer.bias)).fill_(0.375)

    answer = Reference(finish(student))(torch.tensor([[[[0.5, -0.5], [1.0, 0.0]]]]))

    first, second = answer.codes.values()
    assert first.flatten().tolist() == [3, 1, 4, 2]
    # 1*1 - 1*2 + 2*3 + 0*-1 = 5, and 0.375 is 3 steps of 0.5 * 0.25: 8. Times 0.5 * 0.25 / 0.4 it is 2.5, which is even as 2.
    assert second.flatten().tolist() == [2 + 1]
    assert answer.logits.flatten().tolist() == pytest.approx([0.8])
    assert answer.float_nodes == ()


@pytest.mark.parametrize("bits", BITS, ids=str)
def test_every_code_is_onnxruntimes(bits, written, images):
    network, path = written(*bits)
    answer = Reference(network)(images, batch=20)
    theirs = codes_of(path, network.activations, images)
    assert answer.codes.keys() == network.activations.keys()
    assert set(differences(answer.codes, theirs).values()) == {(0, 0.0)}
    logits = verify.predict(OnnxRuntime().open(path), images)
    assert (answer.logits - logits).abs().max() <= 1e-6 * logits.abs().max()
    # The clamp by a bound for each channel, and everything else, is integers.
    assert answer.float_nodes == ()


def test_it_agrees_with_the_student_on_codes(written, images):
    network, _ = written(4, 4, 8)
    with torch.no_grad():
        student = as_integers(network)(images)
    assert (Reference(network)(images).logits - student).abs().max() <= 1e-6 * student.abs().max()


def test_a_checkpoint_gives_the_same_answers(patterns, written, images, tmp_path):
    network, _ = written(4, 4, 8)
    write_packed(network, tmp_path / "network.safetensors")
    student = place(patterns, "integer", weight_bits=4, activation_bits=4, end_bits=8)
    again = Reference(restore(student, tmp_path / "network.safetensors"))(images)
    first = Reference(network)(images)
    assert torch.equal(again.logits, first.logits)
    assert all(torch.equal(codes, first.codes[name]) for name, codes in again.codes.items())


class Tails(nn.Module):
    """Has what integers do and what they do not: both averages, a product, a difference, dilation, groups, softmax, hard-swish."""

    def __init__(self):
        super().__init__()
        self.stem, self.wide = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=2)
        self.gate, self.side, self.head = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, (1, 3), padding="same"), nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = F.hardswish(self.wide(x)) + x
        x = F.avg_pool2d(x, 2)
        x = x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        x = torch.relu(self.side(x) - x)
        return self.head(torch.softmax(x.mean((2, 3)), 1))


def test_what_has_no_integer_form_is_computed_in_float_and_named(quantizer, images, tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        graph = capture(Tails().eval(), (3, 16, 16))
    network, path = quantizer(graph, images, 4, 8, 8), tmp_path / "network.onnx"
    Onnx()(network, (3, 16, 16), path)
    answer = Reference(network)(images)
    apart = differences(answer.codes, codes_of(path, network.activations, images))
    assert max(worst for worst, _ in apart.values()) <= 1
    assert max(share for _, share in apart.values()) <= 0.01
    # Before the first tensor that float computed, nothing differs.
    assert apart["x"] == apart["relu"] == apart["wide"] == (0, 0.0)
    assert answer.float_nodes == ("hardswish", "sigmoid", "sub", "relu_2", "softmax")
    logits = verify.predict(OnnxRuntime().open(path), images)
    assert (answer.logits - logits).abs().max() <= 0.05 * logits.abs().max()


@given(
    groups=st.sampled_from([1, 2, 4]),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.sampled_from([(0, 0), (2, 1), (3, 3)]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=40, deadline=None)
def test_convolutions_of_any_shape_are_sums_of_products(groups, kernel, stride, dilation, padding, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-255, 256, (2, 4, 7, 8), generator=generator, dtype=torch.int32)
    weight = torch.randint(-128, 128, (8, 4 // groups, *kernel), generator=generator, dtype=torch.int32)
    named = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    ours = _convolved(x, weight, named)
    assert ours.dtype is torch.int32
    assert torch.equal(ours.double(), F.conv2d(x.double(), weight.double(), **named))


def test_sums_that_leave_32_bits_are_refused():
    graph = capture(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval(), (1, 2, 2))
    student = place(graph, "integer", weight_bits=8, activation_bits=8)
    (layer,) = student.layers.values()
    for quantizer in student.activations.values():
        quantizer.set_qparams(torch.tensor(1.0), torch.tensor(0))
    weight = student.weights[layer.name]
    weight.set_qparams(torch.ones_like(weight.scale), torch.zeros_like(weight.zero_point))
    weight.set_codes(torch.full((2, 4), 127.0))
    student.graph.get_buffer(str(layer.bias)).fill_(2147483520.0)
    network = finish(student)
    # With few products the largest sum that could be is too large, and the sum that is fits.
    small = Reference(network)(torch.zeros(1, 1, 2, 2))
    assert small.logits.tolist() == [[2147483520.0] * 2]
    with pytest.raises(ExportError) as caught:
        Reference(network)(torch.full((1, 1, 2, 2), 255.0))
    assert str(caught.value) == (
        "1: the sum of products must fit an int32 accumulator, got 2147613060; use fewer bits for its weights"
    )


def test_the_literature_placement_is_refused(patterns):
    student = place(patterns, "literature", weight_bits=4, activation_bits=4)
    for quantizer in student.activations.values():
        quantizer.set_qparams(torch.tensor(0.1), torch.tensor(0, dtype=torch.int32))
    with pytest.raises(ExportError) as caught:
        Reference(finish(student))
    assert str(caught.value) == (
        "reference: the placement must be 'integer', got 'literature'; "
        "quantize again with placement 'integer', which is what integer runtimes execute"
    )


@pytest.mark.slow
def test_resnet20_on_photographs_is_onnxruntimes_to_the_last_code(assets, quantizer, tmp_path):
    spec = importlib.util.spec_from_file_location("reference_asset_models", assets / "models.py")
    helpers = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(helpers)
    pixels, _ = helpers.cifar10("test")
    inputs = helpers.normalize(pixels[:200], *helpers.CIFAR_PREP["resnet20"])
    graph = fold_batch_norms(capture(helpers.cifar_net("resnet20"), (3, 32, 32)))
    network, path = quantizer(graph, inputs[:50], 4, 4, 8), tmp_path / "network.onnx"
    Onnx()(network, (3, 32, 32), path)
    answer = Reference(network)(inputs)
    assert set(differences(answer.codes, codes_of(path, network.activations, inputs)).values()) == {(0, 0.0)}
    assert torch.equal(answer.logits.argmax(1), verify.predict(OnnxRuntime().open(path), inputs).argmax(1))
