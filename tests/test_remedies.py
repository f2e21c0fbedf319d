"""Remedies that help are kept, others are not, and the recipe that comes of it reads back."""

from dataclasses import replace

import pytest
import torch
from tests.conftest import patterns
from tests.report.test_diagnosis import network_of, plant_channel_

from reverie import recipes, remedies, stages
from reverie.errors import ConfigError
from reverie.export._packed import read_packed
from reverie.images import Images
from reverie.images.store import load_images
from reverie.pipeline import run
from reverie.progress import Silent
from reverie.report import diagnosis
from reverie.report.tensor_errors import Errors, TensorError, measure

SETTINGS = {"images": 64, "synthesis.steps": 5}


def treated(module, images, recipe):
    teacher = stages.as_teacher(network_of(module))
    reference, quantized = remedies.calibrated(recipe, teacher, images, Silent())
    errors = measure(reference, quantized, images.evenly(32).inputs, progress=Silent())
    findings = diagnosis.find(errors, reference, recipe)
    tried = remedies.remedies(recipe, teacher, errors, findings, more_images=False)
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
        nothing = Errors((), 0.0, 1.0, 64)
        return [remedy.name for remedy in remedies.remedies(recipe, teacher, nothing, findings, more_images=True)]

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


@pytest.mark.parametrize(
    "settings",
    [
        {"rounding.method": "gptq"},
        {"rounding.method": "squant", "bits.weights": {"_3": 3}, "bits.activations": {"_2_relu": 5}},
        {"mixed_precision.effective_bits": 4.0, "bits.weights": {"_3": 3}},
    ],
)
def test_the_student_looked_at_is_the_one_that_a_run_of_the_recipe_makes(tiny_cnn, settings, tmp_path):
    weights = {"quantization.weight_bits": 3, "held_out": 0, "export.method": "none"}
    recipe, network = recipes.read("zeroq", SETTINGS | weights | settings), tiny_cnn()
    made = run(recipe, network, output=tmp_path / "run")
    teacher, images = stages.as_teacher(network), load_images(made.path / "images.safetensors")
    bits = remedies.bits_of(recipe, teacher, images, Silent())
    _, quantized = remedies.calibrated(recipe, teacher, images, Silent(), bits=bits)
    tensors, header = read_packed(made.path / "network.safetensors")
    for name, layer in quantized.layers.items():
        assert layer.grid.bits == header["layers"][name]["bits"]
        assert torch.equal(layer.codes, tensors[f"{layer.weight}.codes"])
    assert {name: tensor.grid.bits for name, tensor in quantized.activations.items()} == header["tensors"]


def tensor_of(name, kind, bits, alone):
    facts = {"without": 0.3, "sqnr": 15.0, "student_sqnr": 14.0, "clipped": 0.0, "clipping": 0.0, "codes": 16}
    return TensorError(name=name, kind=kind, bits=bits, alone=alone, **facts)


def test_more_bits_are_for_the_costliest_tensors_and_come_last(tiny_cnn):
    teacher = stages.as_teacher(tiny_cnn())
    costs = (
        tensor_of("_0", "weight", 8, 0.5),
        tensor_of("_3", "weight", 3, 0.2),
        tensor_of("_6", "weight", 4, 0.1),
        tensor_of("_2_relu", "activation", 5, 0.3),
        tensor_of("_5_relu", "activation", 4, 0.05),
    )
    errors = Errors(costs, 1.0, 0.9, 64)

    def more(**settings):
        recipe = recipes.read("zeroq", {key.replace("__", "."): value for key, value in settings.items()})
        found = remedies.remedies(recipe, teacher, errors, [], more_images=True)
        singles = [remedy for remedy in found if any(key.startswith("bits.") for key in remedy.settings)]
        assert found[len(found) - len(singles) :] == singles
        return [(remedy.name, remedy.settings) for remedy in singles]

    activation = ("A8 for _2_relu", {"bits.activations": {"_2_relu": 8}})
    weights = [("W6 for _3", {"bits.weights": {"_3": 6}}), ("W8 for _6", {"bits.weights": {"_6": 8}})]
    assert more() == [activation, *weights]
    # A budget of bits is spent by the program.
    assert more(mixed_precision__effective_activation_bits=6.0) == weights
    assert more(mixed_precision__bit_operations=32.0) == []


def test_bits_of_one_tensor_are_added_to_those_of_others(tiny_cnn):
    recipe = recipes.read("zeroq", SETTINGS | {"quantization.weight_bits": 2, "bits.weights": {"_0": 7}})
    teacher = stages.as_teacher(tiny_cnn())
    tried = [remedies.Remedy(f"W8 for {name}", {"bits.weights": {name: 8}}) for name in ("_3", "_6")]
    found = remedies.treat(recipe, teacher, patterns(64, seed=2), patterns(64, seed=9).inputs, tried, progress=Silent())
    assert [trial.kept for trial in found.trials] == [True, True]
    assert found.recipe.bits.weights == {"_0": 7, "_3": 8, "_6": 8}
    # Six bits more for each of 8 x 16 x 9 and of 16 x 16 x 9 weights; a header has another length.
    assert [trial.bytes for trial in found.trials] == pytest.approx([864, 1728], abs=16)
    assert found.after < found.before / 2


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
