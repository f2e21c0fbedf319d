"""Remedies that help are kept, others are not, and the recipe that comes of it reads back."""

from dataclasses import replace

import pytest
import torch
from tests.conftest import patterns
from tests.report.test_diagnosis import network_of, plant_channel_

from reverie import recipe as recipes
from reverie import remedies, stages
from reverie.errors import ConfigError
from reverie.images import Images
from reverie.progress import Silent
from reverie.report import diagnosis
from reverie.report.tensor_errors import measure

SETTINGS = {"images": 64, "synthesis.steps": 5}


def treated(module, images, recipe):
    teacher = stages.as_teacher(network_of(module))
    reference, quantized = remedies.calibrated(recipe, teacher, images, Silent())
    errors = measure(reference, quantized, images.evenly(32).inputs, progress=Silent())
    findings = diagnosis.find(errors, reference, recipe)
    tried = remedies.remedies(recipe, teacher, findings, more_images=False)
    return remedies.treat(recipe, teacher, images, patterns(64, seed=9).inputs, tried, progress=Silent())


def test_equalization_mends_an_outlier_channel(tiny_cnn, tmp_path):
    found = treated(plant_channel_(tiny_cnn().module), patterns(64, seed=2), recipes.read("zeroq", SETTINGS))
    first = found.trials[0]
    assert first.remedy.name == "cross-layer equalization" and first.kept
    assert first.after < first.before / 20
    assert found.recipe.quantization.equalize
    (tmp_path / "fixed.toml").write_text(recipes.to_toml(found.recipe))
    assert recipes.read(str(tmp_path / "fixed.toml")) == found.recipe


def test_a_percentile_mends_an_outlier_value(tiny_cnn):
    images = patterns(64, seed=2)
    inputs = images.inputs.clone()
    inputs[0, 0, 3, 3] = 300.0
    found = treated(
        tiny_cnn().module, replace(images, inputs=inputs), recipes.read("zeroq", SETTINGS | {"activations.method": "minmax"})
    )
    first = found.trials[0]
    assert first.remedy.name == "activations: 99.9 % ranges" and first.kept
    assert found.after < found.before / 20


def test_what_does_not_help_is_not_kept(tiny_cnn):
    recipe = recipes.read("zeroq", SETTINGS | {"quantization.activation_bits": 4, "activations.method": "mse"})
    teacher = stages.as_teacher(tiny_cnn())
    bad = remedies.Remedy("half", {"activations.method": "percentile", "activations.percentile": 50.0})
    found = remedies.treat(recipe, teacher, patterns(64, seed=2), patterns(64, seed=9).inputs, [bad], progress=Silent())
    (trial,) = found.trials
    assert not trial.kept and trial.after > trial.before
    assert found.recipe == recipe and found.after == found.before


def test_each_trial_starts_from_what_was_kept_before(tiny_cnn):
    recipe = recipes.read("zeroq", SETTINGS | {"quantization.activation_bits": 3, "activations.percentile": 60.0})
    teacher = stages.as_teacher(tiny_cnn())
    steps = [
        remedies.Remedy("wider", {"activations.percentile": 90.0}),
        remedies.Remedy("narrow", {"activations.percentile": 55.0}),
        remedies.Remedy("fewer bits", {"quantization.weight_bits": 2}),
    ]
    found = remedies.treat(recipe, teacher, patterns(64, seed=2), patterns(64, seed=9).inputs, steps, progress=Silent())
    wider, narrow, fewer = found.trials
    assert wider.kept and wider.bytes == 0
    assert narrow.before == wider.after == fewer.before and not narrow.kept
    assert fewer.bytes < -500
    assert found.recipe == recipes.read("zeroq", SETTINGS | {"quantization.activation_bits": 3, "activations.percentile": 90.0})


def test_more_images_are_added_to_those_there_are(tiny_cnn):
    recipe = recipes.read("zeroq", SETTINGS)
    asked = []

    def more(count):
        asked.append(count)
        return Images(inputs=patterns(count, seed=4).inputs)

    tried = [remedies.Remedy("twice the images", {"images": 128, "calibration_images": 256})]
    teacher = stages.as_teacher(tiny_cnn())
    found = remedies.treat(
        recipe, teacher, patterns(64, seed=2), patterns(64, seed=9).inputs, tried, more=more, progress=Silent()
    )
    assert asked == [64] and len(found.trials) == 1


def test_the_costliest_findings_decide_what_is_tried_first(tiny_cnn):
    teacher = stages.as_teacher(tiny_cnn())
    recipe = recipes.read("zeroq")

    def names(*findings, recipe=recipe):
        return [remedy.name for remedy in remedies.remedies(recipe, teacher, findings, more_images=True)]

    def finding(fault, kind, cost):
        return diagnosis.Finding(fault, "t", kind, cost, "", "", ())

    assert names() == [
        "cross-layer equalization",
        "activations: 99.9 % ranges",
        "activations: mse ranges",
        "activations: ranges of all values",
        "weights: ranges of all values",
        "batch-norm adaptation",
        "twice the images",
    ]
    assert names(finding("saturation", "activation", 1.0), finding("outlier channel", "weight", 0.1))[:3] == [
        "activations: mse ranges",
        "activations: ranges of all values",
        "cross-layer equalization",
    ]
    # What is learned afterwards gives the means back by itself.
    learned = names(recipe=recipes.read("adaround"))
    assert "batch-norm adaptation" not in learned and "bias correction" not in learned
    assert "cross-layer equalization" not in names(recipe=recipes.read("zeroq", {"quantization.placement": "literature"}))


def test_images_to_judge_on_are_others_than_those_of_runs(tiny_cnn):
    recipe = recipes.read("zeroq", SETTINGS)
    teacher = stages.as_teacher(tiny_cnn())
    first, again, other = (remedies.dream(recipe, teacher, 4, place, Silent()).inputs for place in ("a", "a", "b"))
    assert torch.equal(first, again) and not torch.allclose(first, other)


def test_one_image_judges_nothing(tiny_cnn):
    recipe, teacher = recipes.read("zeroq", SETTINGS), stages.as_teacher(tiny_cnn())
    with pytest.raises(ConfigError) as caught:
        remedies.treat(recipe, teacher, patterns(8, seed=2), patterns(1, seed=9).inputs, [], progress=Silent())
    assert str(caught.value) == "remedies must be judged on at least 2 images, got 1; give more"
