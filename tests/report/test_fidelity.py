"""The measures of an image set tell a good set from a bad one."""

import math

import pytest
import torch
from torch.nn import functional

from reverie.graph.batch_norm import Statistics
from reverie.graph.operators import arguments, layers
from reverie.graph.taps import tap
from reverie.images import Images
from reverie.report.fidelity import _pooled, describe
from reverie.stages import as_teacher


@pytest.fixture
def teacher(tiny_cnn):
    return as_teacher(tiny_cnn())


def test_one_image_many_times_is_similar_and_covers_one_class(teacher, tiny_cnn):
    real = tiny_cnn().held_out()
    one = Images(inputs=real.inputs[:1].expand(40, -1, -1, -1).contiguous(), sources=("x",) * 40)
    collapsed, diverse = describe(teacher, one), describe(teacher, real)
    assert collapsed["feature_similarity"] == pytest.approx(1.0, abs=1e-4)
    assert diverse["feature_similarity"] < 0.95
    assert collapsed["class_coverage"] == 0.0 and diverse["class_coverage"] > 0.95
    assert max(collapsed["class_histogram"]) == 40 and sum(diverse["class_histogram"]) == 300


def test_similarity_is_the_mean_cosine_over_pairs(teacher, tiny_cnn):
    inputs = tiny_cnn().held_out().inputs[:12]
    name = arguments(layers(teacher.graph)[-1])["input"].name
    with torch.no_grad():
        unit = functional.normalize(tap(teacher.graph, [name])(inputs)[name].flatten(1), dim=1)
    pairs = [float(unit[i] @ unit[j]) for i in range(12) for j in range(12) if i != j]
    measured = describe(teacher, Images(inputs=inputs, sources=("x",) * 12))["feature_similarity"]
    assert measured == pytest.approx(sum(pairs) / len(pairs), abs=1e-5)


def test_entropy_and_confidence_are_the_teachers(teacher, tiny_cnn):
    inputs = tiny_cnn().held_out().inputs[:50]
    measured = describe(teacher, Images(inputs=inputs, sources=("x",) * 50))
    probabilities = teacher.logits(inputs).softmax(1)
    assert measured["confidence"] == pytest.approx(float(probabilities.amax(1).mean()), abs=1e-5)
    assert measured["entropy"] == pytest.approx(float(-(probabilities * probabilities.log()).sum(1).mean()), abs=1e-4)
    assert 0 <= measured["entropy"] <= math.log(3)


def test_statistics_of_a_set_are_those_of_its_batches_pooled():
    values = torch.randn(30, 4, generator=torch.Generator().manual_seed(0)) * 3 + 1
    parts = [Statistics((part.mean(0),), (part.var(0, correction=0),)) for part in (values[:7], values[7:20], values[20:])]
    pooled = _pooled(parts, [7, 13, 10])
    assert torch.allclose(pooled.mean[0], values.mean(0), atol=1e-5)
    assert torch.allclose(pooled.variance[0], values.var(0, correction=0), atol=1e-5)
