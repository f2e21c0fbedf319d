"""What `best` chooses, why, and that it says so."""

import dataclasses

import pytest
import torch

from reverie import best
from reverie.best import Choice, choose
from reverie.budget import Schedule
from reverie.errors import ConfigError
from reverie.images import Images
from reverie.recipe import read


def bits(weights, activations):
    return {"quantization.weight_bits": weights, "quantization.activation_bits": activations}


@pytest.mark.parametrize(
    ("weights", "activations", "preset"),
    [(8, 8, "zeroq"), (4, 8, "gptq"), (3, 8, "gptq"), (2, 8, "qdrop"), (4, 4, "qdrop"), (2, 2, "qdrop"), (8, 4, "qdrop")],
)
def test_bits_decide_the_rounding(tiny_cnn, weights, activations, preset):
    choice = choose(tiny_cnn(), bits(weights, activations))
    recipe = choice.recipe(bits(weights, activations))
    assert choice.preset == preset
    assert (recipe.quantization.weight_bits, recipe.quantization.activation_bits) == (weights, activations)
    assert recipe.export is not None
    assert len(choice.reasons) == (3 if preset == "qdrop" else 2)
    assert recipe.distils_after("rounding") == (preset == "qdrop")


def test_without_bits_it_is_eight(tiny_cnn):
    assert choose(tiny_cnn()).preset == "zeroq"


def test_ranges_of_two_bits_are_those_of_the_smallest_error(tiny_cnn):
    coarse, fine = (choose(tiny_cnn(), bits(2, number)).recipe() for number in (2, 4))
    assert type(coarse.activations).__name__ == "Mse"
    assert (fine.activations.percentile, fine.reconstruction.range_rate) == (99.9, 3e-3)
    assert coarse.reconstruction.range_rate == 1e-2


def test_many_classes_are_asked_for_and_few_are_not(tiny_cnn):
    few = tiny_cnn()
    many = dataclasses.replace(few, classes=2000)
    assert choose(few, bits(4, 4)).recipe().synthesis.class_weight == 0
    assert choose(many, bits(4, 4)).recipe().synthesis.class_weight == 0.1


@pytest.mark.parametrize(("real", "synthetic"), [(10, 1024), (1024, 0), (3000, 0)])
def test_enough_real_images_stand_alone(tiny_cnn, real, synthetic):
    network = tiny_cnn()
    shape = (network.input.channels, network.input.height, network.input.width)
    images = Images(inputs=torch.zeros(real, *shape), labels=None, sources=("real",) * real)
    recipe = choose(network, bits(4, 4), calibration=images).recipe()
    assert recipe.images == synthetic
    assert recipe.calibration_images == 1024


def test_where_there_is_nothing_to_dream_from_real_images_stand_alone(tiny_cnn):
    network = dataclasses.replace(tiny_cnn(), module=torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 10)))
    shape = (network.input.channels, network.input.height, network.input.width)
    choice = choose(network, bits(4, 4), calibration=Images(inputs=torch.zeros(3, *shape), labels=None))
    recipe = choice.recipe()
    assert (recipe.images, recipe.held_out) == (0, 0)
    assert choice.reasons[-1] == "images: the 3 real ones alone, as the network has no batch norm to make any from"


def test_what_the_user_wants_wins(tiny_cnn):
    wanted = bits(4, 4) | {"images": 7, "reconstruction.iterations": 3}
    recipe = choose(tiny_cnn(), wanted).recipe(wanted)
    assert (recipe.images, recipe.reconstruction.iterations) == (7, 3)


@pytest.mark.parametrize(
    ("factors", "preset", "told"),
    [
        ({"whole": 1.0}, "qdrop", ["budget: qdrop and distillation fit 5 min"]),
        ({"whole": 0.5}, "qdrop", ["budget: qdrop and distillation fit 5 min"]),
        (
            {"whole": 0.25, "qdrop": 0.5},
            "qdrop",
            ["budget: qdrop and distillation would take about 20 min 0 s, so not that", "budget: qdrop fits 5 min"],
        ),
        (
            {"whole": None, "qdrop": None, "gptq": 0.1},
            "gptq",
            [
                "budget: qdrop and distillation: budget must be at least 9 min, got 5, so not that",
                "budget: qdrop: budget must be at least 9 min, got 5, so not that",
                "budget: gptq would take about 50 min 0 s, and nothing is quicker",
            ],
        ),
    ],
)
def test_a_budget_takes_the_first_that_fits(tiny_cnn, monkeypatch, factors, preset, told):
    def fit(recipe, teacher, real, minutes, *, progress):
        name = "whole" if recipe.distillation.steps else "gptq" if recipe.rounding.needs == "moments" else "qdrop"
        factor = factors[name]
        if factor is None:
            raise ConfigError("budget must be at least 9 min, got 5; give it more")
        return Schedule(minutes, factor, {})

    monkeypatch.setattr(best, "fit", fit)
    choice = choose(tiny_cnn(), bits(4, 4), minutes=5.0)
    assert choice.preset == preset
    assert list(choice.reasons[-len(told) :]) == told
    assert (choice.recipe().distillation.steps > 0) == (len(told) == 1)


def test_a_run_goes_on_with_what_was_chosen_for_it(tmp_path):
    assert best.chosen_in(tmp_path) is None
    (tmp_path / "run.json").write_text(
        '{"reverie": "1", "facts": {"choice": {"preset": "qdrop", "settings": {"images": 5}, "reasons": ["because"]}}}'
    )
    assert best.chosen_in(tmp_path) == Choice("qdrop", {"images": 5}, ("because",))


def test_best_by_itself_is_no_recipe():
    with pytest.raises(ConfigError) as caught:
        read("best")
    assert str(caught.value) == (
        "recipe best must be chosen for a network, got none; use `reverie quantize NETWORK --recipe best`, or reverie.choose_recipe"
    )
