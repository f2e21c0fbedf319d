"""Errors of tensors are those of students in which really only that tensor, or all but it, is on a grid."""

import math

import pytest
import torch
from tests.conftest import patterns
from torch import nn

from reverie import stages
from reverie.graph.capture import capture
from reverie.graph.placement import place
from reverie.graph.quantized import finish
from reverie.observers.minmax import MinMax
from reverie.progress import Silent
from reverie.recovery.ranges import calibrate_activations, calibrate_weights
from reverie.report.metrics import score
from reverie.report.tensor_errors import decibels, divergences, measure


@pytest.fixture(scope="module")
def case(tiny_cnn):
    """Graph, student at W3A3 and images."""
    graph = stages.as_teacher(tiny_cnn()).graph
    reference, _ = stages.student_of(graph, stages.Quantization())
    student = place(reference, "integer", weight_bits=3, activation_bits=3)
    images = patterns(80, seed=3)
    calibrate_activations(reference, student, images.inputs, MinMax(), batch=64, progress=Silent())
    calibrate_weights(student, MinMax())
    return reference, student, images, measure(reference, finish(student), images.inputs, progress=Silent())


def test_divergences_are_those_of_the_report(case):
    reference, student, images, errors = case
    scored = score({"full_precision": reference, "quantized": student.graph}, images)
    assert errors.divergence == pytest.approx(scored["divergence"]["quantized"], rel=1e-4)
    assert errors.agreement == scored["agreement"]["quantized"]
    assert errors.images == 80


def in_full_precision_(graph, reference, layer):
    """The finished student with a layer as it was."""
    for name in (layer.weight, layer.bias):
        graph.get_buffer(name).copy_(reference.get_buffer(name))


@pytest.mark.parametrize(
    ("kind", "name"), [("weight", "_3"), ("weight", "_11"), ("activation", "_5_relu"), ("activation", "input_1")]
)
@pytest.mark.parametrize("alone", [True, False])
def test_a_tensor_alone_and_all_but_it(case, kind, name, alone):
    reference, student, images, errors = case
    (found,) = [tensor for tensor in errors.tensors if (tensor.kind, tensor.name) == (kind, name)]
    quantized = finish(student)
    with torch.no_grad():
        for key, layer in quantized.layers.items():
            if ((kind, name) == ("weight", key)) != alone:
                in_full_precision_(quantized.graph, reference, layer)
        for key, quantizer in quantized.activations.items():
            quantizer.calibrated = ((kind, name) == ("activation", key)) == alone
        expected = divergences(quantized.graph(images.inputs), reference(images.inputs)).mean()
    assert float(expected) > 1e-6
    assert (found.alone if alone else found.without) == pytest.approx(float(expected), rel=1e-4)


def test_every_weight_and_tensor_is_told_once(case):
    _, student, _, errors = case
    told = [(tensor.kind, tensor.name, tensor.bits) for tensor in errors.tensors]
    weights = [("weight", name, 3) for name in student.weights]
    assert told == [*weights, *(("activation", name, 3) for name in student.activations)]


def test_signal_to_noise_of_a_tensor_is_that_of_its_values(case):
    reference, student, images, errors = case
    (first, second) = [
        next(t for t in errors.tensors if t.name == name and t.kind == "activation") for name in ("input_1", "_2_relu")
    ]
    quantizer = student.activations["input_1"]
    with torch.no_grad():
        noise = (quantizer(images.inputs) - images.inputs).square().sum()
    expected = 10 * math.log10(float(images.inputs.square().sum() / noise))
    # The input has no noise of what comes before it.
    assert first.sqnr == pytest.approx(expected, abs=1e-3) == first.student_sqnr
    assert second.student_sqnr < second.sqnr
    weight = next(tensor for tensor in errors.tensors if tensor.name == "_3")
    stored = reference.get_buffer(student.layers["_3"].weight)
    noise = (student.weights["_3"](stored) - stored).square().sum()
    assert weight.sqnr == pytest.approx(10 * math.log10(float(stored.square().sum() / noise)), abs=1e-3)


class Grouped(nn.Module):
    """A convolution of two groups, then one behind which channels are last."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1, groups=2), nn.Linear(8, 6)

    def forward(self, x):
        y = torch.relu(self.second(torch.relu(self.first(x)))).permute(0, 2, 3, 1)
        return torch.relu(self.third(y) + self.third(y).flip(0)).mean((1, 2))


def test_channels_are_those_of_the_whole_tensor_wherever_they_are():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = Grouped()
        with torch.no_grad():
            # The third input of the second group; and the fifth channel of what comes last.
            module.second.weight[4:, 2] *= 50
            module.third.weight[4] *= 50
            module.third.bias[4] *= 50
        reference = capture(module, (3, 8, 8))
    student = place(reference, "integer", weight_bits=8, activation_bits=8)
    inputs = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    calibrate_activations(reference, student, inputs, MinMax(), batch=8, progress=Silent())
    calibrate_weights(student, MinMax())
    errors = measure(reference, finish(student), inputs, progress=Silent())
    weight = next(tensor for tensor in errors.tensors if (tensor.kind, tensor.name) == ("weight", "second"))
    assert weight.channel == 6 and weight.channel_ratio > 20
    wide = [tensor for tensor in errors.tensors if tensor.kind == "activation" and tensor.name.startswith(("third", "relu_2"))]
    assert wide and all(tensor.channel == 4 and tensor.channel_ratio > 10 for tensor in wide)


def test_decibels_are_finite():
    assert decibels(100.0, 1.0) == 20
    assert (decibels(1.0, 0.0), decibels(0.0, 0.0), decibels(0.0, 1.0)) == (99, 99, -99)
