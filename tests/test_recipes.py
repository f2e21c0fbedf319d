"""Every recipe the whole way, and what real images, capsules, mixtures and kills do to the result."""

import dataclasses
import json
import re
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from reverie import pipeline
from reverie.checkpoints import Folder
from reverie.cli import main
from reverie.errors import ConfigError, DivergenceError
from reverie.export._packed import read_packed
from reverie.images import Images
from reverie.images.store import load_images, save_images
from reverie.models.embedded import digits_images, load
from reverie.pipeline import run, run_synthesis
from reverie.progress import Silent
from reverie.recipes import presets, read
from reverie.recovery.ranges import calibrate_activations
from reverie.report import outcome
from reverie.request import check
from reverie.stages import as_teacher
from reverie.synthesis._capsule import capsule_of, load_capsule

QUICK = {"images": 16, "held_out": 8}
SYNTHESIS = {"steps": 6, "refine_steps": 2, "batch": 16, "width": 8, "latent": 8, "class_batch": 8}
ALONE = {"export.method": "none"}
LITERATURE = ALONE | {"quantization.placement": "literature"}


def quick(preset, more=None):
    """The preset with so few steps that it takes a second."""
    recipe = read(preset)
    known = {item.name for item in dataclasses.fields(recipe.synthesis)}
    settings = QUICK | {f"synthesis.{key}": value for key, value in SYNTHESIS.items() if key in known}
    if recipe.distillation.steps:
        settings |= {"distillation.steps": 4, "distillation.batch": 16}
    if recipe.rounding.needs == "reconstruction":
        settings["reconstruction.iterations"] = 5
    return read(preset, settings | (more or {}))


class Watched(Silent):
    """Keeps the stages that were planned, and those that began."""

    def __init__(self):
        self.planned, self.begun = [], []

    def plan(self, stages):
        self.planned = list(stages)

    def start(self, stage, total, done=0):
        self.begun.append(stage)


def chosen(images, labels):
    """The first image of each of `labels`."""
    picked = []
    for label in labels:
        picked.append(next(int(place) for place in (images.labels == label).nonzero() if int(place) not in picked))
    return Images(inputs=images.inputs[picked], labels=images.labels[picked])


def scales(path):
    """The scales of activations in a run's packed network."""
    tensors, header = read_packed(path / "network.safetensors")
    return {name: tensors[f"{name}.scale"] for name in header["tensors"]}


def text_of(path):
    """What a reader of a run's report reads, spaces evened."""
    return " ".join(re.sub(r"<[^>]+>", " ", (path / "report.html").read_text()).replace("\u00a0", " ").split())


@pytest.fixture(scope="module")
def network(tiny_cnn):
    return tiny_cnn()


@pytest.fixture(scope="module")
def real(network):
    """Twelve labelled images, four of each class."""
    return chosen(network.held_out(), [0, 1, 2] * 4)


@pytest.fixture(scope="module")
def partial_set(real):
    """No image of class 2, and all that is called class 1 shows class 2."""
    show = chosen(real, [0, 0, 2, 2])
    return replace(show, labels=torch.tensor([0, 0, 1, 1]))


@pytest.fixture(scope="module")
def mixed(network, partial_set, tmp_path_factory):
    """fdda on images that leave classes out, a quarter of each step real; nothing exported."""
    recipe = quick("fdda", ALONE | {"real_share": 0.25})
    return run(recipe, network, output=tmp_path_factory.mktemp("mixed") / "run", calibration=partial_set)


@pytest.mark.slow
@pytest.mark.parametrize("preset", presets())
def test_a_preset_ends_with_a_file_that_onnx_runtime_computes_as_it_should(preset, network, real, tmp_path):
    recipe, watched = quick(preset), Watched()
    done = run(
        recipe,
        network,
        output=tmp_path / "run",
        calibration=real if recipe.synthesis.needs_capsule else None,
        evaluation=network.held_out(),
        progress=watched,
    )
    metrics = done.metrics
    assert watched.begun == watched.planned
    learns = {"round"} if recipe.rounding.needs == "reconstruction" else set()
    learns |= {"distil"} if recipe.distillation.steps else set()
    assert learns <= json.loads((done.path / "details.json").read_text())["losses"].keys()
    assert done.onnx.is_file()
    assert metrics["parity"]["max_code_difference"] <= 1 and metrics["parity"]["top1_agreement"] == 1.0
    assert abs(metrics["exported"]["top1"] - metrics["quantized"]["top1"]) <= 1e-3
    assert metrics["bytes"]["packed"] < metrics["bytes"]["fp32"]
    assert metrics["images"]["source"] == {preset_method(recipe): 16} | ({"real": 12} if preset == "fdda" else {})


@pytest.mark.slow
@pytest.mark.parametrize("preset", presets())
def test_a_preset_runs_in_the_literatures_placement(preset, network, real, tmp_path):
    recipe = quick(preset, LITERATURE)
    calibration = real if recipe.synthesis.needs_capsule else None
    done = run(recipe, network, output=tmp_path / "run", calibration=calibration, evaluation=network.held_out())
    assert done.metrics["quantized"]["images"] == 300 and done.metrics["exported"] == {"top1": None}
    assert done.metrics["quantized"]["top1"] > 0.9
    assert not done.onnx.exists() and (done.path / "network.safetensors").is_file()
    header = read_packed(done.path / "network.safetensors")[1]
    bits = recipe.quantization
    assert header["placement"] == "literature"
    assert {layer["bits"] for layer in header["layers"].values()} == {bits.weight_bits}
    assert set(header["tensors"].values()) == {bits.activation_bits}


def preset_method(recipe):
    """The name of the recipe's synthesis method."""
    return type(recipe.synthesis).__module__.rpartition(".")[2]


def test_a_capsule_makes_the_images_that_its_own_images_make(mixed, network, partial_set, tmp_path):
    stored = load_capsule(mixed.path / "capsule.safetensors")
    alone = run(quick("fdda", ALONE | {"real_share": 0.25}), network, output=tmp_path / "alone", capsule=stored)
    assert (alone.path / "images.safetensors").read_bytes() == (mixed.path / "images.safetensors").read_bytes()
    assert (alone.path / "capsule.safetensors").read_bytes() == (mixed.path / "capsule.safetensors").read_bytes()
    assert alone.metrics["images"]["source"] == {"fdda": 16}
    assert alone.metrics["distillation"]["images_of_a_step"] == {"fdda": 16}
    others = capsule_of(as_teacher(network), chosen(network.held_out(), [0, 1, 2]))
    other = run_synthesis(quick("fdda"), network, output=tmp_path / "other", capsule=others)
    inputs = [load_images(done.path / "images.safetensors").inputs for done in (mixed, other)]
    assert not torch.equal(*inputs)


@pytest.mark.slow
def test_a_capsule_beside_real_images_needs_no_labels_of_them(network, real, tmp_path):
    recipe = quick("fdda", ALONE)
    bare, capsule = replace(real, labels=None), capsule_of(as_teacher(network), real)
    done = run(recipe, network, output=tmp_path / "run", calibration=bare, capsule=capsule)
    assert done.metrics["images"]["source"] == {"fdda": 16, "real": 12}
    assert done.metrics["distillation"]["images_of_a_step"] == {"fdda": 16, "real": 9}


def test_classes_that_the_capsule_does_not_tell_are_named_on_the_terminal_and_in_the_report(mixed):
    assert mixed.metrics["images"]["capsule"] == {"classes": 3, "missing": [2], "misclassified": [1]}
    line = "capsule: 1 of 3 classes missing (2); 1 misclassified (1)"
    assert line in outcome.notes(mixed.metrics)
    assert line in text_of(mixed.path)


@pytest.mark.parametrize(
    ("missing", "misclassified", "expected"),
    [
        ([2, 5, 7], [4], ["capsule: 3 of 10 classes missing (2, 5, 7); 1 misclassified (4)"]),
        ([], [4, 8], ["capsule: 2 of 10 classes misclassified (4, 8)"]),
        ([3], [], ["capsule: 1 of 10 classes missing (3)"]),
        (list(range(12)), [], ["capsule: 12 of 10 classes missing (0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more)"]),
        ([], [], []),
    ],
)
def test_a_capsules_note_names_at_most_ten_classes_and_is_there_only_if_there_are_any(missing, misclassified, expected):
    capsule = {"classes": 10, "missing": missing, "misclassified": misclassified}
    assert outcome.learning_notes({"images": {"capsule": capsule}}) == expected


def test_a_refused_capsule_leaves_the_folder_free_for_a_right_one(network, real, tmp_path):
    recipe, output = quick("fdda", ALONE), tmp_path / "run"
    with pytest.raises(ConfigError) as caught:
        run(recipe, network, output=output, calibration=replace(real, labels=None))
    assert str(caught.value) == (
        "calibration images: tiny: images must have labels 0 to 2, got none; give the true class of each"
    )
    capsule = capsule_of(as_teacher(network), real)
    for work in (run, run_synthesis):
        with pytest.raises(ConfigError) as caught:
            work(recipe, network, output=output, capsule=replace(capsule, fingerprint="another"))
        assert str(caught.value) == (
            f"capsule: must be of tiny with these very weights ({network.fingerprint}), got a capsule of others (another); "
            "make one with `reverie capsule`"
        )
    assert run_synthesis(recipe, network, output=output, capsule=capsule).metrics["images"]["count"] == 16


def test_fdda_with_neither_is_refused_before_anything_is_made(network, tmp_path):
    with pytest.raises(ConfigError) as caught:
        run(quick("fdda"), network, output=tmp_path / "run")
    assert str(caught.value) == (
        "tiny: fdda needs labelled real images, one for each class, got none; give --calibration with a folder of them "
        "(one sub-folder a class) or --capsule with a file that `reverie capsule` wrote"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_quarter_of_each_step_is_real_and_the_report_says_so(mixed):
    # 16 * 0.25 / 0.75 = 5.3.
    assert mixed.metrics["distillation"]["images_of_a_step"] == {"fdda": 16, "real": 5}
    assert mixed.metrics["images"]["source"] == {"fdda": 16, "real": 4}
    notes = outcome.notes(mixed.metrics)
    assert notes[0].startswith("images: 20 (16 fdda, 4 real), ")
    line = "distillation: 4 steps, each on 16 fdda and 5 real images"
    assert line in notes
    shown = text_of(mixed.path)
    assert line in shown and "20 (16 fdda, 4 real), " in shown


def test_a_capsule_that_the_method_does_not_read_is_refused(network, mixed, tmp_path):
    capsule = load_capsule(mixed.path / "capsule.safetensors")
    for work in (run, run_synthesis):
        with pytest.raises(ConfigError) as caught:
            work(quick("gdfq"), network, output=tmp_path / "run", capsule=capsule)
        assert str(caught.value) == "gdfq reads no capsule, got one; leave it out, or use --recipe fdda"
    assert list(tmp_path.iterdir()) == []


def test_smaller_images_say_which_size_the_network_has(network, tmp_path):
    done = run_synthesis(quick("zeroq", {"image_scale": 0.5}), network, output=tmp_path / "run")
    images = load_images(done.path / "images.safetensors")
    assert images.inputs.shape[2:] == (8, 8)
    assert images.provenance["input_size"] == "16 x 16"


def test_a_capsule_tells_a_folded_network_what_it_forgot_whatever_other_buffers_it_has(network):
    layers = [layer for width in (3, 8, 8, 8) for layer in (nn.Conv2d(width, 8, 3, padding=1), nn.ReLU())]
    module = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    module.register_buffer("scale", torch.ones(1))
    folded = replace(network, module=module)
    check(quick("gdfq"), folded, calibrated=False, device="cpu", capsule=True)
    with pytest.raises(ConfigError, match="reads no capsule"):
        check(quick("gdfq"), network, calibrated=False, device="cpu", capsule=True)


def test_a_share_of_one_teaches_with_real_images_alone(network, real, tmp_path):
    done = run(quick("gdfq", ALONE | {"real_share": 1.0}), network, output=tmp_path / "run", calibration=real)
    assert done.metrics["images"]["source"] == {"gdfq": 16, "real": 12}
    assert done.metrics["distillation"]["images_of_a_step"] == {"real": 16}


def test_real_images_kept_apart_are_distilled_on_alone_and_decide_no_range(network, real, tmp_path):
    settings = {
        "real_apart": True,
        "distillation.steps": 3,
        "distillation.after": "rounding",
        "distillation.learned_weights": False,
        "distillation.batch": 16,
        "quantization.bias_correction": False,
    }
    done = run(quick("gptq", settings), network, output=tmp_path / "run", calibration=real)
    assert done.metrics["images"]["source"]["real"] == 12
    assert set(done.metrics["calibration"]) == {"zeroq"}
    assert done.metrics["distillation"]["images_of_a_step"] == {"real": 16}
    told = "distillation: 3 steps, each on 16 real images; weights were kept, biases, norms and scales learned"
    assert told in outcome.learning_notes(done.metrics)
    without = run(quick("gptq", settings | {"images": 0}), network, output=tmp_path / "alone", calibration=real)
    assert without.metrics["calibration"] == {"real": 12}


def test_what_was_learned_on_real_images_kept_apart_is_not_corrected_on_others():
    with pytest.raises(ConfigError) as error:
        read("zeroq", {"real_apart": True, "distillation.steps": 4})
    assert str(error.value) == (
        "recipe zeroq: quantization.bias_correction must be false with real_apart, got true; it would correct on synthetic images what was "
        "learned on real ones: use --set quantization.bias_correction=false"
    )


@pytest.mark.parametrize("more", [{"distillation.steps": 0}, {"real_share": 0.5}])
def test_real_images_are_kept_apart_only_for_a_distillation_on_them_alone(more):
    share, steps = more.get("real_share", 0), more.get("distillation.steps", 4)
    with pytest.raises(ConfigError) as error:
        read("zeroq", {"real_apart": True, "distillation.steps": 4} | more)
    assert str(error.value) == (
        f"recipe zeroq: real_apart must be false with real_share = {share:g} and distillation.steps = {steps}, got true; "
        "it distils on real images alone: use --set real_share=0 and at least one step, or --set real_apart=false"
    )


def test_distillation_goes_on_from_rounding(network, tmp_path):
    three = {"quantization.weight_bits": 3, "distillation.after": "rounding"}
    recipes = {steps: quick("gptq", three | {"distillation.steps": steps}) for steps in (0, 4)}
    watched = Watched()
    rounded, done = (run(recipe, network, output=tmp_path / str(steps), progress=watched) for steps, recipe in recipes.items())
    assert watched.begun[-len(watched.planned) :] == watched.planned
    assert done.metrics["distillation"]["after"] == "rounding" and "distillation" not in rounded.metrics
    before, codes = (read_packed(part.path / "network.safetensors")[0] for part in (rounded, done))
    assert codes.keys() == before.keys() and any(not torch.equal(codes[name], before[name]) for name in codes)


@pytest.mark.parametrize("more", [{}, LITERATURE], ids=["integer", "literature"])
def test_learned_rounding_goes_on_from_distillation(more, network, tmp_path):
    blocks = {"reconstruction.unit": "block", "reconstruction.learned_ranges": True, "reconstruction.drop": 0.5}
    settings = blocks | {"rounding.method": "adaround", "reconstruction.iterations": 5} | more
    done = run(quick("gdfq", settings), network, output=tmp_path / "run")
    assert done.metrics["rounding_errors"] and done.metrics["distillation"]["steps"] == 4
    assert done.onnx.is_file() == (not more)


def test_a_share_of_nought_is_in_proportion(network, real, tmp_path):
    done = run(quick("gdfq", ALONE), network, output=tmp_path / "run", calibration=real)
    assert done.metrics["distillation"]["images_of_a_step"] == {"gdfq": 16, "real": 12}


def test_too_few_real_images_for_one_a_step_are_seen_by_calibration_alone(network, real, tmp_path):
    settings = ALONE | {"images": 64, "distillation.batch": 4, "distillation.steps": 1}
    done = run(quick("gdfq", settings), network, output=tmp_path / "run", calibration=chosen(real, [1]))
    assert done.metrics["images"]["source"] == {"gdfq": 64, "real": 1}
    assert done.metrics["distillation"]["images_of_a_step"] == {"gdfq": 4}
    assert "distillation: 1 step, each on 4 gdfq images" in outcome.notes(done.metrics)


@pytest.mark.parametrize(
    ("synthetic", "seen"),
    [
        ("kept", {"gdfq": 8, "real": 8}),
        ("fresh", {"fresh gdfq": 16, "real": 16}),
        ("both", {"fresh gdfq": 16, "gdfq": 8, "real": 24}),
    ],
)
def test_the_student_sees_images_that_are_kept_or_fresh_ones_or_both(network, real, tmp_path, synthetic, seen):
    settings = {"distillation.synthetic": synthetic, "distillation.batch": 8, "real_share": 0.5}
    done = run(quick("gdfq", ALONE | settings), network, output=tmp_path / "run", calibration=real)
    assert done.metrics["distillation"]["images_of_a_step"] == seen
    assert f"each on {' and '.join(f'{count} {kind}' for kind, count in seen.items())} images" in text_of(done.path)


def test_ranges_are_decided_by_so_many_images_of_each_kind(network, real, tmp_path, monkeypatch):
    seen = []

    def watched(reference, student, inputs, *rest, **more):
        seen.append(len(inputs))
        calibrate_activations(reference, student, inputs, *rest, **more)

    monkeypatch.setattr(pipeline, "calibrate_activations", watched)
    done = run(quick("gdfq", ALONE | {"calibration_images": 5}), network, output=tmp_path / "run", calibration=real)
    assert seen == [5 + 5]
    assert done.metrics["images"]["source"] == {"gdfq": 16, "real": 12}
    assert done.metrics["calibration"] == {"gdfq": 5, "real": 5}
    assert "ranges and rounding: decided on 5 gdfq, 5 real of them" in outcome.notes(done.metrics)


def test_fresh_images_are_refused_where_there_is_no_generator(network, tmp_path):
    recipe = read("zeroq", {"distillation.steps": 5, "distillation.synthetic": "fresh"})
    with pytest.raises(ConfigError) as caught:
        run(recipe, network, output=tmp_path / "run")
    assert str(caught.value) == (
        "distillation.synthetic must be 'kept' with zeroq, which has no generator, got 'fresh'; leave it out, or use --recipe gdfq"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("method", "cure"), [("zeroq", "--set synthesis.class_weight=0.1"), ("noise", "--recipe gdfq")])
def test_labels_that_no_image_has_are_not_learned_from(network, tmp_path, method, cure):
    settings = {"synthesis.method": method, "distillation.steps": 5, "distillation.class_weight": 0.5}
    recipe = read("zeroq", settings | ({"synthesis.class_weight": 0.0} if method == "zeroq" else {}))
    with pytest.raises(ConfigError) as caught:
        run(recipe, network, output=tmp_path / "run")
    assert str(caught.value) == (
        f"distillation.class_weight must be 0 for images that {method} made without labels, got 0.5; leave it out, or use {cure}"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("preset", ["gdfq", "fdda"])
def test_real_images_alone_teach_and_need_no_labels(preset, network, real, tmp_path):
    recipe = quick(preset, ALONE | {"images": 0, "held_out": 0})
    done = run(recipe, network, output=tmp_path / "run", calibration=replace(real, labels=None))
    assert done.metrics["images"]["source"] == {"real": 12} and set(done.metrics["agreement"]) == {"calibration"}
    assert done.metrics["distillation"]["images_of_a_step"] == {"real": 16}
    assert not (done.path / "images.safetensors").exists() and not (done.path / "capsule.safetensors").exists()


@pytest.mark.slow
def test_a_share_decides_what_learned_rounding_draws(network, real, tmp_path):
    packed = {}
    for share in (0, 0.9, 1):
        recipe = quick("adaround", {"real_share": share, "reconstruction.iterations": 40})
        done = run(recipe, network, output=tmp_path / f"{share}", calibration=real)
        assert done.metrics["images"]["source"] == {"zeroq": 16, "real": 12}
        assert done.metrics["parity"]["max_code_difference"] <= 1
        tensors, header = read_packed(done.path / "network.safetensors")
        packed[share] = torch.cat([tensors[f"{layer['weight']}.codes"].flatten() for layer in header["layers"].values()])
    assert all(not torch.equal(packed[one], packed[other]) for one, other in pairwise(packed))


class Killed(BaseException):
    pass


def kill_after(patch, part, times):
    """Ends the run right after its checkpoint `part` was written `times` times."""
    honest, written = Folder.save, []

    def save(self, name, tensors):
        honest(self, name, tensors)
        written.append(name)
        if written.count(part) == times:
            raise Killed

    patch.setattr(Folder, "save", save)


def assert_kills_change_nothing(recipe, network, real, tmp_path, monkeypatch, kills):
    """That runs which are killed there, one after the other in one folder, end with the bytes of an undisturbed one."""
    # Every part is kept, also those that took no second to make.
    monkeypatch.setattr("reverie.attempt.SECONDS", 0.0)
    monkeypatch.setattr("reverie.attempt.SHARE", 1.0)
    whole = run(recipe, network, output=tmp_path / "whole", calibration=real)
    output = tmp_path / "killed"
    for part, times in kills:
        with monkeypatch.context() as patch:
            kill_after(patch, part, times)
            with pytest.raises(Killed):
                run(recipe, network, output=output, calibration=real)
        assert not (output / "metrics.json").exists() and list((output / "checkpoints").rglob(f"{part}.safetensors"))
    again = run(recipe, network, output=output, calibration=real)
    for file in ("images.safetensors", "network.safetensors"):
        assert (again.path / file).read_bytes() == (whole.path / file).read_bytes(), file
    assert {**again.metrics, "seconds": 0, "peak_memory_bytes": 0} == {**whole.metrics, "seconds": 0, "peak_memory_bytes": 0}
    assert not (output / "checkpoints").exists()


@pytest.mark.slow
def test_a_run_killed_in_its_warm_up_and_in_its_distillation_ends_with_the_same_bytes(network, real, tmp_path, monkeypatch):
    # Twice in the distillation: what is saved by a resumed one must be as good.
    kills = (("generator", 3), ("refined-0", 1), ("distillation", 1), ("distillation", 2), ("codes-1", 1))
    assert_kills_change_nothing(quick("fdda", ALONE), network, real, tmp_path, monkeypatch, kills)


CROPPED = LITERATURE | {"distillation.smallest_crop": 0.5}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "mixing", "more"),
    [
        ("gdfq", False, ALONE),
        ("gdfq", True, CROPPED),
        ("clusterq", False, CROPPED),
        ("clusterq", True, ALONE),
        ("dsg_generator", False, ALONE),
        ("fdda", True, CROPPED),
    ],
)
def test_a_killed_run_of_any_generator_ends_with_the_same_bytes(preset, mixing, more, network, real, tmp_path, monkeypatch):
    # Long enough for ClusterQ's centroids and for all four quarters of the learning rate.
    kind = "both" if mixing else "fresh"
    recipe = quick(preset, more | {"synthesis.steps": 30, "distillation.steps": 12, "distillation.synthetic": kind})
    if preset == "clusterq":
        recipe = replace(recipe, synthesis=replace(recipe.synthesis, refresh=3))
    calibration = real if mixing else None
    # The numbers count from the kill before; the last one comes when all steps are done.
    kills = (("generator", 2), ("generator", 7), ("distillation", 6), ("distillation", 6), ("codes-1", 1))
    assert_kills_change_nothing(recipe, network, calibration, tmp_path, monkeypatch, kills)


@pytest.mark.slow
def test_a_run_killed_with_exciting_images_and_learned_rounding_ends_with_the_same_bytes(network, real, tmp_path, monkeypatch):
    more = {"clipping.images": 6, "clipping.steps": 3, "clipping.batch": 3, "real_share": 0.5}
    kills = (("images-0", 1), ("excited-0", 1), ("codes-1", 1))
    assert_kills_change_nothing(quick("adaround", ALONE | more), network, real, tmp_path, monkeypatch, kills)


@pytest.mark.slow
def test_the_seed_decides_images_and_weights(network, tmp_path):
    bytes_of = {}
    for name, seed in (("first", 0), ("second", 0), ("other", 1)):
        path = run(quick("gdfq", LITERATURE | {"seed": seed}), network, output=tmp_path / name).path
        bytes_of[name] = [(path / file).read_bytes() for file in ("images.safetensors", "network.safetensors")]
    assert bytes_of["first"] == bytes_of["second"]
    assert all(one != other for one, other in zip(bytes_of["first"], bytes_of["other"], strict=True))


@pytest.mark.slow
def test_exciting_images_set_the_ranges(network, tmp_path):
    found = {}
    for count in (0, 6):
        recipe = quick("zeroq", ALONE | {"clipping.images": count, "clipping.steps": 20})
        watched = Watched()
        found[count] = scales(run(recipe, network, output=tmp_path / f"{count}", progress=watched).path)
        assert watched.begun == watched.planned
    # Images that the network is sure of reach further than those that match its statistics.
    last = list(found[0])[-1]
    assert found[6].keys() == found[0].keys() and found[6][last] > found[0][last]


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, LITERATURE], ids=["integer", "literature"])
def test_batch_norms_are_adapted_in_both_placements(more, network, tmp_path):
    bits = {"quantization.weight_bits": 3, "quantization.activation_bits": 4, "quantization.bias_correction": False}
    packed = []
    for adapted in (False, True):
        recipe = quick("zeroq", more | bits | {"quantization.batch_norm_adaptation": adapted})
        done = run(recipe, network, output=tmp_path / f"{adapted}", evaluation=network.held_out())
        packed.append((done.path / "network.safetensors").read_bytes())
        assert done.metrics["quantization"]["batch_norm_adaptation"] is adapted
        assert f"batch_norm_adaptation = {str(adapted).lower()}" in text_of(done.path)
        assert done.metrics["quantized"]["top1"] > 0.8
        if not more:
            assert done.metrics["parity"]["max_code_difference"] <= 1
    assert packed[0] != packed[1]


def test_a_run_that_diverges_leaves_its_folder_to_go_on_in(network, tmp_path, monkeypatch):
    monkeypatch.setattr("reverie.attempt.SECONDS", 0.0)
    monkeypatch.setattr("reverie.attempt.SHARE", 1.0)
    recipe, output = quick("gdfq", ALONE | {"distillation.learning_rate": 1e12}), tmp_path / "run"
    messages = []
    for _ in range(2):
        with pytest.raises(DivergenceError) as caught:
            run(recipe, network, output=output)
        messages.append(str(caught.value))
        assert json.loads((output / "run.json").read_text())["complete"] is False
        assert (output / "checkpoints/images/generator.safetensors").is_file()
        assert (output / "checkpoints/distillation/distillation.safetensors").is_file()
        assert not (output / "metrics.json").exists() and not (output / "network.safetensors").exists()
    assert messages[0] == messages[1]
    assert re.fullmatch(
        r"distillation: the loss must stay (finite|below 1000 times where it began), got \S+ at step 1 \(KL \S+\); "
        r"try --set distillation\.learning_rate=2\.5e\+11 with another --output",
        messages[0],
    )


def test_what_was_not_exported_is_not_spoken_of(network, tmp_path):
    recipe = quick("gdfq", LITERATURE)
    metrics = run(recipe, network, output=tmp_path / "run", evaluation=network.held_out()).metrics
    difference = metrics["difference"]["quantized"]
    assert outcome.headline(metrics) == (
        f"tiny at W4A4 reads {outcome.percent(metrics['quantized']['top1'])} of 300 labelled images right, full precision "
        f"{outcome.percent(metrics['full_precision']['top1'])}: {100 * difference['difference']:+.2f} "
        f"({100 * difference['low']:+.2f} to {100 * difference['high']:+.2f}) points. "
        "Nothing was exported, so nothing was timed."
    )
    assert [row[0] for row in outcome.table(metrics)[1]] == ["full precision", "fake-quantized"]
    assert [line.partition(":")[0] for line in outcome.notes(metrics)] == ["images", "distillation", "seconds"]
    shown = text_of(tmp_path / "run")
    assert "Full precision, simulated " in shown and "simulated, exported" not in shown
    assert "This is the literature's placement" in shown.replace("&#39;", "'")
    assert (
        "exported" not in shown.lower()
        and "Nothing was run in a real runtime, so the numbers are those of the simulation" in shown
    )


TINY = ["--images", "8", "--set", "held_out=4", "--set", "synthesis.steps=3", "--set", "synthesis.batch=8"]
TINY += ["--set", "synthesis.width=8", "--set", "synthesis.latent=8", "--set", "synthesis.class_batch=4"]
STUDENT = ["--set", "distillation.steps=2", "--set", "distillation.batch=8", "--set", "reconstruction.iterations=2"]


@pytest.fixture
def digits(tmp_path):
    """A file with an image of each digit but the seven."""
    path = tmp_path / "digits.safetensors"
    save_images(chosen(digits_images("train"), [0, 1, 2, 3, 4, 5, 6, 8, 9]), path)
    return path


def said(capsys, *arguments):
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.slow
def test_the_command_line_goes_from_images_to_a_capsule_to_a_network(capsys, digits, tmp_path):
    command = ["quantize", "embedded:digits", "--recipe", "fdda", *TINY, *STUDENT]
    first, second = tmp_path / "first", tmp_path / "second"
    shown = said(capsys, *command, "--calibration", digits, "--output", first)
    assert "capsule: 1 of 10 classes missing (7)" in shown
    assert "distillation: 2 steps, each on 8 fdda and 4 real images" in shown
    assert "capsule.safetensors" in shown[-3] and "network.onnx" in shown[-3]
    own = ["--capsule", first / "capsule.safetensors"]
    shown = said(capsys, *command, *own, "--placement", "literature", "--output", second)
    assert "capsule: 1 of 10 classes missing (7)" in shown
    assert "distillation: 2 steps, each on 8 fdda images" in shown
    assert "network.safetensors" in shown[-3] and "network.onnx" not in shown[-3]
    metrics = json.loads((second / "metrics.json").read_text())
    assert metrics["quantization"]["placement"] == "literature" and metrics["exported"] == {"top1": None}
    inputs = [load_images(path / "images.safetensors").inputs for path in (first, second)]
    assert torch.equal(*inputs)
    shown = said(capsys, "synthesize", "embedded:digits", "--recipe", "fdda", *TINY, *own, "--output", tmp_path / "dreams")
    assert [line.partition(":")[0] for line in shown] == ["images", "capsule", "seconds", "files", "next"]
    # The method and its seed are the same, so are the images.
    assert torch.equal(load_images(tmp_path / "dreams/images.safetensors").inputs, inputs[0])


@pytest.mark.slow
def test_the_command_line_says_in_one_line_that_a_run_diverged(capsys, tmp_path):
    command = ["quantize", "embedded:digits", "--recipe", "gdfq", *TINY[:-2], *STUDENT, "--output", tmp_path / "run"]
    assert main([*map(str, command), "--set", "distillation.learning_rate=1e12"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("reverie: distillation: the loss must stay ")
    assert last.endswith("; try --set distillation.learning_rate=2.5e+11 with another --output")
    assert json.loads((tmp_path / "run/run.json").read_text())["complete"] is False


@pytest.mark.parametrize("command", ["quantize", "synthesize"])
def test_the_command_line_refuses_unlabelled_images_for_fdda(capsys, tmp_path, command):
    np.savez(tmp_path / "bare.npz", images=np.zeros((3, 32, 32, 1), np.uint8))
    arguments = [command, "embedded:digits", "--recipe", "fdda", "--calibration", f"{tmp_path}/bare.npz"]
    assert main([*arguments, "--output", f"{tmp_path}/run"]) == 1
    assert capsys.readouterr().err == (
        f"reverie: --calibration: {tmp_path}/bare.npz: must have labels 0 to 9, got none; add an array 'labels' to the file\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["bare.npz"]


def test_the_command_line_refuses_a_capsule_of_another_network(capsys, network, mixed, tmp_path):
    arguments = ["synthesize", "embedded:digits", "--recipe", "fdda", "--capsule", str(mixed.path / "capsule.safetensors")]
    assert main([*arguments, "--output", str(tmp_path / "run")]) == 1
    assert capsys.readouterr().err == (
        f"reverie: capsule: must be of embedded:digits with these very weights ({load('digits').fingerprint}), "
        f"got a capsule of others ({network.fingerprint}); make one with `reverie capsule`\n"
    )


def test_symmetric_activations_are_those_of_the_integer_placement():
    with pytest.raises(ConfigError) as caught:
        read("gdfq", {"quantization.placement": "literature", "quantization.symmetric": True})
    assert str(caught.value) == (
        "recipe gdfq: [quantization]: symmetric must be false with the literature placement, got true; it is for targets without "
        "zero points: use --placement integer"
    )
