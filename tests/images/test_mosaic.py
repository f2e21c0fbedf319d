"""Small images joined to whole ones, from which the student learns."""

import json
from dataclasses import replace

import pytest
import torch

from reverie import budget, pipeline, remedies, stages
from reverie.cli import main
from reverie.errors import ConfigError
from reverie.images import Images
from reverie.images.contract import InputContract
from reverie.images.mosaic import join, mosaic_count
from reverie.images.store import load_images
from reverie.pipeline import run
from reverie.progress import Silent
from reverie.randomness import Seed
from reverie.recipes import read
from reverie.report import outcome
from reverie.request import check
from reverie.stages import as_teacher

JOINED = {"image_scale": 0.5, "mosaic": True}
QUICK = JOINED | {"images": 16, "held_out": 8, "estimate_images": 0, "synthesis.steps": 10, "synthesis.batch": 8}
ALONE = {"export.method": "none"}


def numbered(count, height=4, width=6):
    """Images of which no pixel is like another."""
    inputs = torch.arange(float(count * 3 * height * width)).view(count, 3, height, width)
    return Images(
        inputs=inputs, labels=torch.zeros(count, dtype=torch.long), logits=torch.zeros(count, 5), sources=("zeroq",) * count
    )


def shown(mosaics, images, tiles):
    """Which image each place shows, row by row, and whether it is mirrored; fails where it shows none."""
    height, width = images.inputs.shape[2:]
    found = []
    for mosaic in mosaics.inputs:
        for row in range(tiles):
            for column in range(tiles):
                tile = mosaic[:, row * height : (row + 1) * height, column * width : (column + 1) * width]
                same = [(i, False) for i, image in enumerate(images.inputs) if torch.equal(tile, image)]
                turned = [(i, True) for i, image in enumerate(images.inputs) if torch.equal(tile.flip(2), image)]
                found += [(same + turned)[0]]
    return found


@pytest.mark.parametrize(("count", "tiles"), [(16, 2), (18, 3), (32, 4)])
def test_every_image_is_shown_twice_as_it_is_or_mirrored(count, tiles):
    images = numbered(count)
    mosaics = join(images, tiles, Seed(0))
    assert mosaics.inputs.shape == (2 * count // tiles**2, 3, 4 * tiles, 6 * tiles)
    found = shown(mosaics, images, tiles)
    assert torch.tensor([image for image, _ in found]).bincount().tolist() == [2] * count
    # Of fair coins: five deviations.
    assert abs(sum(turned for _, turned in found) - count) < 5 * (count / 2) ** 0.5
    # Neighbours differ from one time to the next.
    first, second = found[:count], found[count:]
    assert [image for image, _ in first] != [image for image, _ in second]
    assert mosaics.sources == ("zeroq",) * len(mosaics)
    assert mosaics.labels is None and mosaics.logits is None


@pytest.mark.parametrize(("count", "tiles", "mosaics"), [(256, 2, 128), (18, 3, 4), (5, 2, 3), (1, 2, 1), (1, 3, 1)])
def test_what_does_not_come_out_even_is_shown_once_more(count, tiles, mosaics):
    assert mosaic_count(count, tiles) == mosaics
    images = numbered(count)
    times = torch.tensor([image for image, _ in shown(join(images, tiles, Seed(3)), images, tiles)]).bincount()
    assert int(times.min()) >= 2 and int(times.max() - times.min()) <= 1


def test_mosaics_depend_on_the_seed_alone():
    images = numbered(16)
    first, again, other = (join(images, 2, Seed(seed)).inputs for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            {"mosaic": True},
            "mosaic must be false with image_scale = 1, which is not 1/n of a whole n above 1, got true; use --set image_scale=0.5, or "
            "--set mosaic=false",
        ),
        (
            {"mosaic": True, "image_scale": 0.3},
            "mosaic must be false with image_scale = 0.3, which is not 1/n of a whole n above 1, got true; use --set image_scale=0.5, or "
            "--set mosaic=false",
        ),
        (
            JOINED | {"distillation.class_weight": 0.5},
            "distillation.class_weight must be 0 with mosaic, got 0.5; an image joined of several has no one label: use --set mosaic=false",
        ),
    ],
)
def test_what_cannot_be_joined_is_refused(settings, told):
    with pytest.raises(ConfigError) as error:
        read("zeroq", settings)
    assert str(error.value) == f"recipe zeroq: {told}"


def test_a_third_need_not_be_exact():
    assert read("zeroq", {"image_scale": 0.333, "mosaic": True}).tiles == 3


def test_sides_that_small_ones_do_not_fill_are_refused_before_the_network_is_looked_at(tiny_cnn):
    odd = InputContract(channels=3, height=16, width=15, mean=(0.5,) * 3, std=(0.25,) * 3)
    with pytest.raises(ConfigError) as error:
        check(read("zeroq", JOINED), replace(tiny_cnn(), input=odd), calibrated=False, device="cpu")
    assert str(error.value) == (
        "mosaic must be false for tiny, whose images of 16 x 15 are not 2 x 2 of 8 x 8, got true; use --set mosaic=false"
    )


@pytest.fixture
def learned(monkeypatch):
    """What reached the stages that learn, by name."""
    seen = {}
    original = pipeline.quantize

    def spy(recipe, teacher, images, *rest):
        seen.update(images)
        return original(recipe, teacher, images, *rest)

    monkeypatch.setattr(pipeline, "quantize", spy)
    return seen


def test_a_student_learns_from_mosaics_and_from_whole_real_images(tiny_cnn, tmp_path, learned):
    network = tiny_cnn()
    real = network.held_out().evenly(8)
    few = {"reconstruction.iterations": 20, "quantization.weight_bits": 4, "quantization.activation_bits": 4}
    distilled = {"distillation.steps": 3, "distillation.after": "rounding", "distillation.batch": 6}
    recipe = read("qdrop", QUICK | few | distilled)
    done = run(recipe, network, output=tmp_path / "run", calibration=real, evaluation=network.held_out())
    made = load_images(done.path / "images.safetensors")
    assert made.inputs.shape == (16, 3, 8, 8)
    mosaics = learned["zeroq"]
    assert mosaics.inputs.shape == (8, 3, 16, 16)
    assert sorted(image for image, _ in shown(mosaics, made, 2)) == sorted([*range(16)] * 2)
    assert torch.equal(mosaics.logits, as_teacher(network).logits(mosaics.inputs))
    assert torch.equal(learned["real"].inputs, real.inputs)
    told = done.metrics
    assert (told["images"]["source"], told["images"]["mosaics"]) == ({"zeroq": 16, "real": 8}, {"zeroq": 8})
    assert told["calibration"] == {"zeroq": 8, "real": 8}
    assert set(told["images"]["separation"]) == {"zeroq", "real"}
    assert told["distillation"]["images_of_a_step"] == {"zeroq": 6, "real": 6}
    notes = outcome.learning_notes(told)
    assert "mosaics: 16 zeroq joined to 8 whole images" in notes
    assert not any("decided on" in note for note in notes)
    assert told["exported"]["top1"] > 0.9
    assert told["parity"]["max_code_difference"] <= 1


def test_real_images_alone_stay_whole(tiny_cnn, tmp_path, learned):
    real = tiny_cnn().held_out().evenly(16)
    done = run(
        read("zeroq", QUICK | ALONE | {"images": 0, "held_out": 0}), tiny_cnn(), output=tmp_path / "run", calibration=real
    )
    assert learned.keys() == {"real"} and torch.equal(learned["real"].inputs, real.inputs)
    assert done.metrics["images"]["mosaics"] == {}


def test_a_run_that_stopped_goes_on_with_the_same_mosaics(tiny_cnn, tmp_path, monkeypatch):
    recipe = read("qdrop", QUICK | ALONE | {"reconstruction.iterations": 5})
    whole = run(recipe, tiny_cnn(), output=tmp_path / "whole").path
    original = pipeline.calibrate_weights

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "calibrate_weights", stop)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tiny_cnn(), output=tmp_path / "stopped")
    monkeypatch.setattr(pipeline, "calibrate_weights", original)
    resumed = run(recipe, tiny_cnn(), output=tmp_path / "stopped").path
    for file in ("images.safetensors", "network.safetensors"):
        assert (resumed / file).read_bytes() == (whole / file).read_bytes()


def test_a_step_of_synthesis_is_timed_on_small_images_and_one_of_the_student_on_whole_ones(tiny_cnn, monkeypatch):
    sizes = {}
    for name in ("_synthesis", "_reconstruction", "_distillation"):
        monkeypatch.setattr(budget, name, lambda *given, name=name: sizes.setdefault(name, given[1:]) and 1.0)
    recipe, real = (
        read("qdrop", QUICK | {"distillation.steps": 5, "distillation.after": "rounding"}),
        tiny_cnn().held_out().evenly(2),
    )
    budget.step_costs(recipe, as_teacher(tiny_cnn()), real, progress=Silent())
    assert [seen.input.height for seen in sizes["_synthesis"]] == [16, 8]
    assert sizes["_reconstruction"][0].input.height == 16
    learning, share = sizes["_distillation"]
    # Two real images beside eight mosaics.
    assert (learning.input.height, share) == (16, 0.2)


def test_diagnosis_looks_at_mosaics_and_makes_more_of_them(tmp_path, monkeypatch, capsys):
    seen = {}
    treat, measure = remedies.treat, stages.learned_from

    def spy(recipe, teacher, images, *rest, **more):
        seen["images"], seen["more"] = images.inputs.shape, more["more"](4).inputs.shape
        return treat(recipe, teacher, images, *rest, **more)

    def joins(*given):
        joined = measure(*given)
        seen.setdefault("joined", []).append(len(joined))
        return joined

    monkeypatch.setattr(remedies, "treat", spy)
    monkeypatch.setattr(stages, "learned_from", joins)
    monkeypatch.chdir(tmp_path)
    small = [
        "--set",
        "image_scale=0.5",
        "--set",
        "mosaic=true",
        "--set",
        "images=16",
        "--images",
        "16",
        "--set",
        "synthesis.steps=2",
    ]
    found = main(["diagnose", "embedded:digits", "--recipe", "zeroq", "--weight-bits", "3", "--fix", "--json", *small])
    assert found == 0
    assert (seen["images"], seen["more"]) == ((8, 1, 32, 32), (2, 1, 32, 32))
    document = json.loads(capsys.readouterr().out)
    # Twice the images are 16 more, and 8 more mosaics.
    assert "twice the images" in [trial["remedy"] for trial in document["fix"]["trials"]]
    assert seen["joined"] == [8, 2, 8]
