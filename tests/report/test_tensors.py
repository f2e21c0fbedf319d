"""Figures and histograms of tensors are those of their values and grids, computed apart."""

import numpy as np
import pytest
import torch

from reverie.graph.quantized import finish
from reverie.graph.taps import tap
from reverie.observers.percentile import Percentile
from reverie.progress import Silent
from reverie.recovery.ranges import calibrate_activations, calibrate_weights
from reverie.report import tensors
from reverie.stages import as_teacher, student_of


@pytest.fixture(scope="module")
def made(tiny_cnn):
    from reverie.recipe import Quantization

    network = tiny_cnn()
    teacher, images = as_teacher(network), network.held_out()
    reference, student = student_of(teacher.graph, Quantization(weight_bits=3, activation_bits=4, bias_correction=False))
    calibrate_activations(reference, student, images.inputs[:64], Percentile(percentile=98.0), batch=64, progress=Silent())
    calibrate_weights(student, Percentile(percentile=95.0))
    quantized = finish(student)
    inputs = images.inputs[:20]
    return reference, quantized, inputs, tensors.describe(reference, quantized, inputs)


def test_there_is_an_entry_for_every_weight_and_then_every_activation(made):
    _, quantized, _, found = made
    weights = [part["name"] for part in found if part["kind"] == "weight"]
    assert weights == list(quantized.layers)
    assert [part["name"] for part in found][len(weights) :] == list(quantized.activations)


def test_figures_of_an_activation_are_those_of_numpy(made):
    reference, quantized, inputs, found = made
    for part in (part for part in found if part["kind"] == "activation"):
        quantizer = quantized.activations[part["name"]]
        scale, zero = float(quantizer.scale), int(quantizer.zero_point)
        low, high = quantizer.grid.quant_min, quantizer.grid.quant_max
        with torch.no_grad():
            x = tap(reference, [part["name"]])(inputs)[part["name"]].double().numpy()
        on_grid = (np.clip(np.rint(x / scale) + zero, low, high) - zero) * scale
        assert part["bits"] == quantizer.grid.bits
        assert part["sqnr"] == pytest.approx(10 * np.log10((x**2).sum() / ((x - on_grid) ** 2).sum()), abs=0.01)
        assert part["max_error"] == pytest.approx(np.abs(x - on_grid).max() / scale, rel=1e-3)
        beyond = (x < (low - zero - 0.5) * scale) | (x > (high - zero + 0.5) * scale)
        assert part["clipped"] == pytest.approx(beyond.mean(), abs=1e-4)
        assert (part["low"], part["high"]) == pytest.approx(((low - zero) * scale, (high - zero) * scale))
        assert sum(part["counts"]) == x.size


def test_some_values_are_clipped_and_clipping_makes_the_largest_error(made):
    *_, found = made
    clipped = [part for part in found if part["clipped"] > 0]
    assert {part["kind"] for part in clipped} == {"weight", "activation"}
    for part in found:
        assert (part["max_error"] > 0.5 + 1e-3) == (part["clipped"] > 0), part["name"]


def test_a_weights_histogram_is_in_codes_of_its_channels(made):
    reference, quantized, _, found = made
    part, (name, layer) = found[0], next(iter(quantized.layers.items()))
    assert part["name"] == name
    weight = dict(reference.named_buffers())[layer.weight].double().numpy()
    places = weight / layer.scale.double().numpy() + layer.zero_point.numpy()
    counts, _ = np.histogram(places, bins=len(part["counts"]), range=(part["from"], part["to"]))
    assert np.abs(counts - part["counts"]).sum() <= 4  # values at the border of two bins
    assert (part["low"], part["high"], part["step"]) == (layer.grid.quant_min, layer.grid.quant_max, 1.0)
    assert part["scale"] == pytest.approx([float(layer.scale.min()), float(layer.scale.max())])


def test_noise_from_before_only_lowers_what_the_student_has(made):
    *_, found = made
    first = next(part for part in found if part["kind"] == "activation")
    assert first["student_sqnr"] == pytest.approx(first["sqnr"])
    later = [part for part in found if part["kind"] == "activation"][1:]
    assert sum(part["student_sqnr"] < part["sqnr"] for part in later) >= len(later) - 1
