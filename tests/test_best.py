"""What `best` chooses, why, and that it says so."""

import dataclasses
import json
import re

import pytest
import torch
from torch import nn

from reverie import best
from reverie.best import Choice, choose
from reverie.budget import Schedule
from reverie.errors import BudgetError, ConfigError
from reverie.images import Images
from reverie.models import InputContract, Network
from reverie.observers.percentile import Percentile
from reverie.plugins import name_of
from reverie.recipes import read
from reverie.stages import as_teacher
from reverie.synthesis._capsule import capsule_of
from reverie.synthesis.gdfq import Gdfq


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
    if preset == "qdrop":
        assert recipe.reconstruction.drop == (0.5 if activations < 8 else 0)
        assert choice.reasons[0].endswith("half of all values unquantized") == (activations < 8)


def test_without_bits_it_is_eight(tiny_cnn):
    assert choose(tiny_cnn()).preset == "zeroq"


def test_ranges_of_two_bits_are_those_of_the_smallest_error(tiny_cnn):
    coarse, fine = (choose(tiny_cnn(), bits(2, number)).recipe() for number in (2, 4))
    assert type(coarse.activations).__name__ == "Mse"
    assert (fine.activations.percentile, fine.reconstruction.range_rate) == (99.9, 3e-3)
    assert coarse.reconstruction.range_rate == 1e-2


def sized(side, module):
    """A network for images of this side."""
    contract = InputContract(channels=3, height=side, width=side, mean=(0.5,) * 3, std=(0.25,) * 3)
    return Network(name="sized", module=module.eval(), input=contract, classes=3)


def pooled():
    layers = (nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(4, 3))


def test_of_large_images_more_are_made_in_half_the_size_and_no_class_is_asked_for():
    choice = choose(sized(128, pooled()), bits(4, 4))
    recipe = choice.recipe()
    assert (recipe.images, recipe.image_scale, recipe.synthesis.steps) == (1024, 0.5, 50)
    assert choice.name == "qdrop" and recipe.distillation.steps == 0
    assert recipe.synthesis.class_weight == 0
    assert LEAVED in choice.reasons
    assert (recipe.synthesis.start, recipe.synthesis.learning_rate) == ("leaves", 0.05)


MADE = "images: 256 of 64 x 64 by zeroq in 100 steps from natural noise, no class asked for, four of which cost what a whole one does"
LEAVED = "images: 1024 of 64 x 64 by zeroq in 50 steps from dead leaves, no class asked for, four of which cost what a whole one does"
BLOCKS = "qdrop: at W4A4 codes and ranges are learned together, block by block"
DISTILLED = "distillation: then the whole network at once, on images that are"
JOINED = "mosaics: learned from joined 2 x 2, each twice, as few bits would be fitted to borders that whole images do not have"


@pytest.mark.parametrize(("weights", "activations", "joined"), [(4, 4, True), (8, 7, True), (2, 8, False), (4, 8, False)])
def test_halved_images_are_joined_to_whole_ones_where_activations_have_few_bits(weights, activations, joined):
    choice = choose(sized(128, pooled()), bits(weights, activations))
    recipe = choice.recipe()
    assert (recipe.image_scale, recipe.mosaic) == (0.5, joined)
    assert choice.reasons[-2:] == (LEAVED, JOINED) if joined else choice.reasons[-1] == MADE


def test_images_are_joined_as_the_user_wants_and_where_they_can_be():
    even, odd = sized(128, pooled()), sized(129, pooled())
    real = Images(inputs=torch.zeros(1).expand(1024, 3, 128, 128))
    for network, wanted, calibration, scale, mosaic in (
        (even, {"mosaic": False}, None, 0.5, False),
        (even, bits(4, 8) | {"mosaic": True}, None, 0.5, True),
        (even, {"image_scale": 1.0}, None, 1.0, False),
        (even, {}, real, 0.5, True),
        (even, {"mosaic": False}, real, 0.5, False),
        (odd, {}, None, 0.5, False),
    ):
        settings = bits(4, 4) | wanted
        choice = choose(network, settings, calibration=calibration)
        recipe = choice.recipe(settings)
        assert (recipe.image_scale, recipe.mosaic) == (scale, mosaic)
        assert (JOINED in choice.reasons) == mosaic


@pytest.mark.parametrize(
    ("side", "activations", "window", "drop", "said"),
    [
        (64, 4, 0, 0.5, ", half of all values unquantized"),
        (128, 4, 10, 0.2, ", a fifth of all values unquantized"),
        (128, 8, 10, 0.0, ""),
    ],
)
def test_above_64_pixels_steps_look_at_windows_of_many_images(side, activations, window, drop, said):
    choice = choose(sized(side, pooled()), bits(2, activations))
    settings = choice.recipe().reconstruction
    assert (settings.window, settings.drop, settings.batch) == (window, drop, 32)
    assert choice.reasons[0] == f"qdrop: at W2A{activations} codes and ranges are learned together, block by block{said}"


def test_images_keep_their_size_where_they_are_small_or_the_network_takes_no_other(tiny_cnn):
    fixed = nn.Sequential(nn.Conv2d(3, 4, 3, stride=32), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 3))
    for network, count in ((tiny_cnn(), 1024), (sized(96, pooled()), 256), (sized(128, fixed), 64)):
        recipe = choose(network, bits(4, 4)).recipe()
        assert (recipe.image_scale, recipe.images, recipe.synthesis.steps) == (1, count, 50)


def test_images_keep_their_size_where_the_user_or_a_generator_wants_it():
    for wanted in ({"image_scale": 1.0}, {"synthesis.method": "gdfq"}):
        choice = choose(sized(128, pooled()), bits(4, 4) | wanted)
        assert choice.recipe(bits(4, 4) | wanted).image_scale == 1
        assert " x " not in choice.reasons[-1]


def test_a_network_with_depthwise_layers_is_told_to_share_its_bits_out():
    told = "bits: as asked, 4 for every weight; its depthwise layers want more: --effective-bits 4 loses less in as many bytes"
    depthwise = nn.Sequential(
        nn.Conv2d(3, 6, 3, groups=3, padding=1), nn.BatchNorm2d(6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)
    )
    assert choose(sized(32, depthwise), bits(4, 8)).reasons[-1] == told
    for network, wanted in (
        (sized(32, depthwise), bits(8, 8)),
        (sized(32, depthwise), {"mixed_precision.effective_bits": 4.0}),
        (sized(32, pooled()), bits(4, 8)),
    ):
        assert told not in choose(network, wanted).reasons


def test_real_images_alone_are_halved_too_and_it_says_so():
    real = Images(inputs=torch.zeros(1024, 3, 128, 128), sources=("real",) * 1024)
    choice = choose(sized(128, pooled()), bits(4, 8), calibration=real)
    assert choice.recipe().image_scale == 0.5
    assert choice.reasons[-1] == "images: the 1024 real ones alone, scaled down to 64 x 64"


@pytest.mark.parametrize(
    ("real", "wanted", "apart"),
    [
        (400, {}, True),
        (3000, {}, True),
        (399, {}, False),
        (400, {"real_share": 0.5}, False),
        (400, {"distillation.steps": 0}, False),
        (400, {"distillation.after": "calibration"}, False),
        (400, {"distillation.after": "rounding"}, True),
        (400, {"real_share": 0.0}, True),
        (400, {"real_apart": False}, False),
        (10, {"real_apart": True}, True),
        (400, {"mosaic": False}, False),
        (400, {"images": 0}, False),
        (400, bits(4, 8), False),
    ],
)
def test_where_mosaics_are_rounded_on_many_real_images_are_kept_for_distillation(real, wanted, apart):
    images = Images(inputs=torch.zeros(1).expand(real, 3, 128, 128), sources=("real",) * real)
    settings = bits(4, 4) | wanted
    choice = choose(sized(128, pooled()), settings, calibration=images)
    recipe = choice.recipe(settings)
    assert recipe.real_apart == apart
    assert (recipe.distillation.steps, recipe.distillation.learned_weights) == ((150, False) if apart else (0, True))
    told = "distillation: biases and scales of the whole network, on the real images alone"
    assert (told in choice.reasons) == apart
    if apart:
        assert recipe.images == 1024
        assert choice.reasons[2].endswith(
            f"no class asked for, four of which cost what a whole one does, beside {real} real ones"
        )


def test_how_long_is_distilled_on_real_images_is_the_users_to_say():
    images = Images(inputs=torch.zeros(1).expand(400, 3, 128, 128), sources=("real",) * 400)
    settings = bits(4, 4) | {"distillation.steps": 20}
    recipe = choose(sized(128, pooled()), settings, calibration=images).recipe(settings)
    assert (recipe.real_apart, recipe.distillation.steps, recipe.distillation.learned_weights) == (True, 20, False)


def test_real_images_in_place_of_mosaics_are_whole_and_told_so():
    images = Images(inputs=torch.zeros(1).expand(400, 3, 128, 128), sources=("real",) * 400)
    settings = bits(4, 4) | {"images": 0}
    choice = choose(sized(128, pooled()), settings, calibration=images)
    recipe = choice.recipe(settings)
    assert (recipe.images, recipe.image_scale, recipe.mosaic) == (0, 1, False)
    assert choice.reasons[1:] == ("images: the 400 real ones alone",)


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
    ("wanted", "made"),
    [
        ({"synthesis.method": "noise"}, "images: 1024 by noise"),
        ({"synthesis.method": "gdfq"}, f"images: 1024 by gdfq in {Gdfq().steps} steps"),
        ({"activations.method": "minmax"}, "images: 1024 by zeroq in 50 steps from natural noise, no class asked for"),
    ],
)
@pytest.mark.parametrize("number", [bits(4, 4), bits(2, 2), bits(2, 8)])
def test_settings_of_methods_in_whose_place_the_user_wants_others_are_left_out(tiny_cnn, number, wanted, made):
    choice = choose(tiny_cnn(), number | wanted)
    recipe = choice.recipe(number | wanted)
    assert {name_of(recipe.synthesis), name_of(recipe.activations)} >= set(wanted.values())
    assert made in choice.reasons


@pytest.mark.parametrize(
    ("side", "wanted", "told", "silent"),
    [
        (16, {"images": 64, "synthesis.steps": 7}, "images: 64 by zeroq in 7 steps from natural noise, no class asked for", ""),
        (
            16,
            {"distillation.steps": 0},
            "images: 1024 by zeroq in 50 steps from natural noise, no class asked for",
            "distillation",
        ),
        (16, {"distillation.cut_mix": 0.0, "distillation.colour": 0.0}, f"{DISTILLED} cropped and mirrored anew", "mixed"),
        (16, {"rounding.method": "nearest"}, "nearest: as asked", "qdrop"),
        (
            16,
            {"reconstruction.drop": 0.0, "reconstruction.learned_ranges": False},
            "adaround: at W4A4 codes are learned, block by block",
            "qdrop",
        ),
        (16, {"reconstruction.drop": 0.3}, f"{BLOCKS}, 30% of all values unquantized", ""),
        (128, {"synthesis.start": "natural"}, LEAVED.replace("dead leaves", "natural noise"), "dead"),
    ],
)
def test_what_is_told_is_what_runs(side, wanted, told, silent):
    choice = choose(sized(side, pooled()), bits(4, 4) | wanted)
    assert told in choice.reasons
    assert not silent or not any(silent in reason for reason in choice.reasons)


@pytest.mark.parametrize(
    ("side", "wanted"),
    [
        (16, {"distillation.class_weight": 1.0}),
        (128, {"distillation.class_weight": 1.0}),
        (128, {"quantization.bias_correction": True}),
        (128, {"quantization.batch_norm_adaptation": True}),
    ],
)
def test_nothing_is_chosen_that_what_the_user_wants_forbids(side, wanted):
    real = Images(inputs=torch.zeros(1).expand(500, 3, side, side), sources=("real",) * 500)
    recipe = choose(sized(side, pooled()), bits(4, 4) | wanted, calibration=real).recipe(bits(4, 4) | wanted)
    if "distillation.class_weight" in wanted:
        # Without, images would have no labels to learn from.
        assert recipe.synthesis.class_weight > 0
    if side == 16:
        assert (recipe.distillation.steps, recipe.distillation.cut_mix) == (600, 0)
    elif "distillation.class_weight" in wanted:
        assert not recipe.mosaic
    else:
        assert recipe.real_apart == ("quantization.bias_correction" not in wanted)


def test_a_budget_for_a_method_that_reads_real_images_wants_some(tiny_cnn):
    with pytest.raises(
        ConfigError, match=r"^tiny: fdda needs labelled real images, one for each class, got none; give --calib"
    ):
        choose(tiny_cnn(), bits(4, 4) | {"synthesis.method": "fdda"}, minutes=5.0)


def test_real_images_that_are_to_be_kept_apart_are_so_however_short_the_time(monkeypatch):
    monkeypatch.setattr(best, "fit", lambda *arguments, **settings: Schedule(1.0, 0.1, {}))
    images = Images(inputs=torch.zeros(1).expand(400, 3, 128, 128), sources=("real",) * 400)
    settings = bits(4, 4) | {"real_apart": True}
    assert choose(sized(128, pooled()), settings, calibration=images, minutes=1.0).recipe(settings).real_apart


def test_where_bits_are_chosen_the_recipe_has_about_as_many(tiny_cnn):
    for limits, expected in (({"effective_activation_bits": 4.5}, (8, 4)), ({"bit_operations": 9.5}, (3, 3))):
        wanted = {f"mixed_precision.{name}": limit for name, limit in limits.items()}
        found = choose(tiny_cnn(), wanted).recipe(wanted).quantization
        assert (found.weight_bits, found.activation_bits) == expected


def test_percentiles_that_the_user_names_are_those_of_two_bits_too(tiny_cnn):
    wanted = bits(2, 2) | {"activations.percentile": 99.5}
    assert choose(tiny_cnn(), wanted).recipe(wanted).activations == Percentile(percentile=99.5)


@pytest.mark.parametrize("with_capsule", [False, True])
def test_a_budget_knows_what_real_images_tell(tiny_cnn, monkeypatch, with_capsule):
    seen = []

    def fit(recipe, teacher, real, minutes, *, progress):
        seen.append(teacher.capsule is not None)
        return Schedule(minutes, 1.0, {})

    monkeypatch.setattr(best, "fit", fit)
    few = tiny_cnn().held_out()
    known = {"capsule": capsule_of(as_teacher(tiny_cnn()), few)} if with_capsule else {"calibration": few}
    choice = choose(tiny_cnn(), bits(4, 4) | {"synthesis.method": "fdda"}, minutes=5.0, **known)
    assert seen == [True] and choice.reasons[-1] == "budget: qdrop and distillation fit 5 min"


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
            raise BudgetError("budget must be at least 9 min, got 5; give it more")
        return Schedule(minutes, factor, {})

    monkeypatch.setattr(best, "fit", fit)
    choice = choose(tiny_cnn(), bits(4, 4), minutes=5.0)
    assert choice.preset == preset
    assert list(choice.reasons[-len(told) :]) == told
    assert (choice.recipe().distillation.steps > 0) == (len(told) == 1)


QUICK = {"images": 16, "calibration_images": 16, "synthesis.batch": 16}


def test_minutes_are_those_that_a_trial_measures(tiny_cnn):
    wanted = bits(4, 4) | QUICK
    assert choose(tiny_cnn(), wanted, minutes=1000.0).reasons[-1] == "budget: qdrop and distillation fit 1000 min"
    few = choose(tiny_cnn(), wanted, minutes=1e-6)
    assert few.preset == "gptq"
    passed, fits = few.reasons[-2:]
    assert re.fullmatch(
        r"budget: qdrop: budget must be at least 0\.\d min for this network and recipe here, got 1e-06, so not that", passed
    )
    assert re.fullmatch(
        r"budget: gptq: budget must be at least 0\.\d min for this network and recipe here, got 1e-06, and nothing is quicker",
        fits,
    )


@pytest.mark.parametrize(
    ("limits", "preset", "method"),
    [
        ({"bit_operations": 9.5}, "qdrop", "W3A3"),
        ({"bit_operations": 64.0}, "zeroq", None),
        ({"bit_operations": 5.0}, "qdrop", "W2A2"),
        # What is left for the other kind.
        ({"bit_operations": 24.0, "effective_bits": 3.0}, "gptq", None),
        ({"bit_operations": 12.0, "effective_activation_bits": 4.0}, "qdrop", "W3A4"),
        ({"effective_bits": 3.9}, "gptq", None),
        ({"effective_activation_bits": 4.5}, "qdrop", "W8A4"),
    ],
)
def test_means_of_bits_decide_as_bits_do(tiny_cnn, limits, preset, method):
    choice = choose(tiny_cnn(), {f"mixed_precision.{name}": limit for name, limit in limits.items()})
    assert choice.preset == preset
    assert method is None or f"at {method} " in choice.reasons[0]


def test_single_tensors_with_fewer_bits_decide_the_method_and_not_the_others_bits(tiny_cnn):
    wanted = {"bits.weights": {"_3": 2}}
    choice = choose(tiny_cnn(), wanted)
    assert choice.preset == "qdrop"
    recipe = choice.recipe(wanted)
    assert (recipe.quantization.weight_bits, recipe.bits.weights) == (8, {"_3": 2})


@pytest.mark.parametrize(
    ("wanted", "settings", "expected"),
    [
        (
            {"synthesis.nonsense": 3},
            {"minutes": 5.0},
            "recipe qdrop: [synthesis]: unknown key 'nonsense'; choose one of ",
        ),
        ({}, {"minutes": -1.0}, "budget must be a number of minutes above 0, got -1; leave it out for the recipe's own steps"),
        ({}, {"device": "nowhere"}, "device must be one that PyTorch can use here, got 'nowhere'; use 'cpu'"),
        ({"bits.weights": {"_3": 9}}, {}, "recipe zeroq: [bits]: bits.weights must be 2 to 8, got 9 for '_3'"),
    ],
)
def test_what_is_wrong_is_refused_and_not_taken_for_too_few_minutes(tiny_cnn, wanted, settings, expected):
    with pytest.raises(ConfigError) as caught:
        choose(tiny_cnn(), bits(4, 4) | wanted, **settings)
    told = str(caught.value)
    assert told.startswith(expected) if expected.endswith(" ") else told == expected


def test_a_run_goes_on_with_what_was_chosen_for_it(tmp_path):
    assert best.chosen_in(tmp_path) is None
    record = {"reverie": "1", "identity": {}, "versions": {}, "earlier_versions": [], "stages": {}, "complete": False}
    noted = {"preset": "qdrop", "settings": {"images": 5}, "reasons": ["because"]}
    (tmp_path / "run.json").write_text(json.dumps(record | {"facts": {"choice": noted}}))
    assert best.chosen_in(tmp_path) == Choice("qdrop", {"images": 5}, ("because",))


def test_best_by_itself_is_no_recipe():
    with pytest.raises(ConfigError) as caught:
        read("best")
    assert str(caught.value) == (
        "recipe best must be chosen for a network, got none; use `reverie quantize NETWORK --recipe best`, or reverie.choose_recipe"
    )
