"""Adapting batch norms, kept or folded, brings the student's statistics back to the teacher's."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from reverie.checkpoints import Forgetful
from reverie.export import _verify as verify
from reverie.export.onnx import Onnx
from reverie.graph.batch_norm import batch_norms
from reverie.graph.capture import capture
from reverie.graph.fold import fold_batch_norms
from reverie.graph.placement import place
from reverie.graph.quantized import finish
from reverie.graph.taps import tap
from reverie.grid import dequantize
from reverie.observers.minmax import MinMax
from reverie.observers.mse import Mse
from reverie.progress import Silent
from reverie.randomness import Seed
from reverie.recovery.batch_norm_adaptation import GAIN_BOUNDS, adapt_batch_norms
from reverie.recovery.ranges import calibrate_activations, calibrate_weights
from reverie.synthesis import Teacher
from reverie.synthesis.zeroq import ZeroQ

KINDS = ("literature", "integer")


@pytest.fixture(scope="module")
def references(tiny_cnn):
    network = tiny_cnn()
    # Four epochs leave running statistics that lag behind the weights. Layer by layer, so that each sees those before it.
    inputs = network.held_out().inputs[:128]
    for norm in [part for part in network.module if isinstance(part, nn.BatchNorm2d)]:
        norm.momentum = 1.0
        norm.train()
        network.module(inputs)
        norm.eval()
    graph = capture(network.module, network.input.shape)
    return {"literature": graph, "integer": fold_batch_norms(graph)}


@pytest.fixture(scope="module")
def real(tiny_cnn):
    return tiny_cnn().held_out().inputs


@pytest.fixture(scope="module")
def synthetic(references, tiny_cnn):
    network = tiny_cnn()
    teacher = Teacher(references["literature"], network.input, network.classes, network.name)
    # What this network was trained on is no photographs.
    method = ZeroQ(steps=60, batch=64, start="white", swing=False)
    return method(teacher, 128, seed=Seed(0), checkpoints=Forgetful(), progress=Silent()).inputs


def calibrated(reference, kind, inputs, bits=3, activation_bits=3, end_bits=8):
    student = place(reference, kind, weight_bits=bits, activation_bits=activation_bits, end_bits=end_bits)
    calibrate_activations(reference, student, inputs, MinMax(), batch=64, progress=Silent())
    calibrate_weights(student, Mse())
    return student


def adapted(reference, student, inputs):
    return adapt_batch_norms(reference, student, inputs, progress=Silent())


def values(graph, name, inputs):
    with torch.no_grad():
        return tap(graph, [name])(inputs)[name].double().numpy()


def statistics(array):
    return array.mean(axis=(0, 2, 3)), array.std(axis=(0, 2, 3))


def error(student, reference, name, inputs):
    """Of one tensor, in double precision and with nothing of the library's."""
    (mean, deviation), (target, unit) = (statistics(values(graph, name, inputs)) for graph in (student.graph, reference))
    return float((((mean - target) / unit) ** 2 + (deviation / unit - 1) ** 2).mean())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", ["real", "synthetic"])
def test_statistics_on_images_it_has_not_seen_come_closer_to_the_teachers(references, real, synthetic, kind, source):
    reference = references[kind]
    inputs = real[:128] if source == "real" else synthetic
    untouched, student = (calibrated(reference, kind, inputs, end_bits=3) for _ in range(2))
    errors = adapted(reference, student, inputs)
    assert len(errors) == 3
    held_out = real[128:]
    before, after = ([error(one, reference, name, held_out) for name in errors] for one in (untouched, student))
    assert all(new < 0.5 * old for new, old in zip(after, before, strict=True))
    with torch.no_grad():
        outputs = [one.graph(held_out) - reference(held_out) for one in (student, untouched)]
    assert outputs[0].square().mean() < outputs[1].square().mean()


@pytest.mark.parametrize("kind", KINDS)
def test_reported_errors_are_those_of_the_outputs(references, real, kind):
    reference = references[kind]
    student = calibrated(reference, kind, real)
    name, *_ = [norm.name for norm in batch_norms(student.graph)] or list(student.layers)
    before = error(student, reference, name, real)
    errors = adapted(reference, student, real)
    # The first is before anything was adapted, the others behind what was.
    assert errors[name][0] == pytest.approx(before, rel=1e-3)
    for site, (_, after) in errors.items():
        assert after == pytest.approx(error(student, reference, site, real), rel=1e-2, abs=1e-6)


def test_a_kept_batch_norm_remembers_what_the_student_gives_it_relative_to_the_teacher(references, synthetic):
    reference = references["literature"]
    student = calibrated(reference, "literature", synthetic)
    affine = {name: value.clone() for name, value in student.graph.state_dict().items() if "running" not in name}
    adapted(reference, student, synthetic)
    for norm, old in zip(batch_norms(student.graph), batch_norms(reference), strict=True):
        mean, deviation = statistics(values(student.graph, norm.tensor, synthetic))
        target, unit = statistics(values(reference, old.tensor, synthetic))
        rate = np.clip(deviation / unit, *GAIN_BOUNDS)
        np.testing.assert_allclose(norm.mean.numpy(), mean - (target - old.mean.numpy()) * rate, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(norm.variance.numpy(), old.variance.numpy() * rate**2, rtol=1e-4, atol=1e-6)
    assert all(torch.equal(value, affine[name]) for name, value in student.graph.state_dict().items() if name in affine)


def test_images_of_other_statistics_alone_move_nothing(references, synthetic):
    reference = references["literature"]
    # Not calibrated: the student is the teacher.
    student = place(reference, "literature", weight_bits=4, activation_bits=4)
    errors = adapted(reference, student, synthetic * 0.5 + 1)
    assert all(error < 1e-9 for pair in errors.values() for error in pair)
    for norm, old in zip(batch_norms(student.graph), batch_norms(reference), strict=True):
        torch.testing.assert_close(norm.mean, old.mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(norm.variance, old.variance, rtol=1e-5, atol=1e-5)


def test_a_folded_batch_norm_becomes_a_gain_and_a_shift_of_fixed_codes(references, real):
    reference = references["integer"]
    student = calibrated(reference, "integer", real)
    name, layer = next(iter(student.layers.items()))
    quantizer = student.weights[name]
    weight, bias = student.graph.get_buffer(layer.weight), student.graph.get_buffer(layer.bias)
    codes, scale, old_bias = quantizer.final_codes(weight), quantizer.scale.clone(), bias.clone().double().numpy()
    (mean, deviation), (target, unit) = (statistics(values(graph, name, real)) for graph in (student.graph, reference))
    gain = np.clip(unit / deviation, *GAIN_BOUNDS)
    adapted(reference, student, real)
    assert torch.equal(quantizer.final_codes(weight), codes)
    np.testing.assert_allclose(quantizer.scale.flatten() / scale.flatten(), gain, rtol=1e-4)
    np.testing.assert_allclose(bias, target + gain * (old_bias - mean), rtol=1e-4, atol=1e-5)
    assert torch.equal(quantizer(weight), dequantize(codes.float(), quantizer.scale, quantizer.zero_point))


@pytest.mark.parametrize("kind", KINDS)
def test_the_teacher_and_layers_without_a_batch_norm_stay_as_they_were(references, real, kind):
    reference = references[kind]
    before = {name: value.clone() for name, value in reference.state_dict().items()}
    student = calibrated(reference, kind, real)
    last = list(student.layers)[-1]
    scale, bias = student.weights[last].scale.clone(), student.graph.get_buffer(student.layers[last].bias).clone()
    assert last not in adapted(reference, student, real)
    assert torch.equal(student.weights[last].scale, scale)
    assert torch.equal(student.graph.get_buffer(student.layers[last].bias), bias)
    assert all(torch.equal(value, before[name]) for name, value in reference.state_dict().items())


@pytest.mark.parametrize("bits", [(3, 3, 8), (2, 2, None)])
def test_the_exported_network_still_computes_what_the_student_computes(references, real, tmp_path, bits):
    reference = references["integer"]
    student = calibrated(reference, "integer", real, *bits)
    adapted(reference, student, real)
    quantized, path = finish(student), tmp_path / "network.onnx"
    Onnx()(quantized, (3, 16, 16), path, facts={})
    verify.assert_integer(path, quantized)
    verify.assert_parity(verify.measure_parity(quantized, path, real))


@pytest.mark.parametrize("kind", KINDS)
def test_a_dead_channel_gets_no_gain(tiny_cnn, real, kind):
    network = tiny_cnn()
    with torch.no_grad():
        network.module[3].weight[5] = 0.0
        network.module[4].running_mean[5] = 0.0
        network.module[4].running_var[5] = 1e-10
    graph = capture(network.module, network.input.shape)
    reference = fold_batch_norms(graph) if kind == "integer" else graph
    student = calibrated(reference, kind, real)
    scales = {name: quantizer.scale.clone() for name, quantizer in student.weights.items()}
    errors = adapted(reference, student, real)
    assert all(np.isfinite(error) for pair in errors.values() for error in pair)
    if kind == "integer":
        second = list(scales)[1]
        assert student.weights[second].scale[5] == scales[second][5]
    else:
        assert batch_norms(student.graph)[1].variance[5] == pytest.approx(1e-10)
    with torch.no_grad():
        assert (student.graph(real).argmax(1) == reference(real).argmax(1)).float().mean() > 0.8


def test_a_channel_whose_bias_would_not_fit_int32_is_left_alone(references, real):
    reference = references["integer"]
    student = calibrated(reference, "integer", real)
    name, layer = next(iter(student.layers.items()))
    quantizer, bias = student.weights[name], student.graph.get_buffer(layer.bias)
    weight = student.graph.get_buffer(layer.weight)
    # Its teacher's channel is next to nothing and far away: a bias of 5 on steps of next to nothing.
    weight[0] = 0.0
    smallest = 1e-12
    quantizer.scale[0] = smallest
    bias[0] = 0.0
    teacher = copy.deepcopy(reference)
    teacher.get_buffer(layer.bias)[0] = 5.0
    adapted(teacher, student, real)
    assert bias[0] == 0
    assert quantizer.scale.flatten()[0] == pytest.approx(smallest)
    assert finish(student).layers[name].bias_codes.abs().max() <= 2**30


def test_a_batch_norm_that_is_called_twice_gets_statistics_for_each_call(real):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
            self.norm, self.head = nn.BatchNorm2d(6), nn.Linear(6, 3)

        def forward(self, x):
            x = self.norm(self.first(x)).relu()
            return self.head(self.norm(self.second(x)).relu().mean((2, 3)))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        graph = capture(Twice().eval(), (3, 16, 16))
    student = calibrated(graph, "literature", real)
    adapted(graph, student, real)
    first, second = batch_norms(student.graph)
    for norm, old in zip((first, second), batch_norms(graph), strict=True):
        (mean, deviation), (target, unit) = (
            statistics(values(one, found.tensor, real)) for one, found in ((student.graph, norm), (graph, old))
        )
        expected = mean - (target - old.mean.numpy()) * deviation / unit
        np.testing.assert_allclose(norm.mean.numpy(), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(first.mean, second.mean)


def test_a_network_without_batch_norms_has_nothing_to_adapt(real):
    graph = capture(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(784, 3)), (3, 16, 16))
    student = calibrated(graph, "integer", real)
    before = {name: value.clone() for name, value in student.graph.state_dict().items()}
    assert adapted(graph, student, real) == {}
    assert all(torch.equal(value, before[name]) for name, value in student.graph.state_dict().items())
