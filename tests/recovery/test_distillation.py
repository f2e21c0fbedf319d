"""Distillation brings the student's answers closer to the teacher's, the same way every time, and cleans up behind itself."""

import dataclasses
import itertools
import math
import re

import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from reverie.checkpoints import Folder, Forgetful
from reverie.errors import ConfigError, DivergenceError
from reverie.export import _verify as verify
from reverie.export.onnx import Onnx
from reverie.graph.capture import capture
from reverie.graph.fold import fold_batch_norms
from reverie.graph.placement import place
from reverie.graph.quantized import finish
from reverie.images import Images
from reverie.images.augment import Augmentation
from reverie.images.source import Mixed, Shuffled
from reverie.observers.minmax import MinMax
from reverie.observers.mse import Mse
from reverie.progress import Silent
from reverie.randomness import Seed
from reverie.recovery.distillation import Distillation, check_learns, distil, divergence
from reverie.recovery.ranges import calibrate_activations, calibrate_weights

KINDS = ("literature", "integer")
CPU = torch.device("cpu")
# The literature's student: ranges of weights follow them, those of activations are frozen.
PAPER = {"optimizer": "sgd", "weight_decay": 1e-4, "weight_ranges": "minmax", "learned_ranges": False}


@pytest.fixture(scope="module")
def teachers(tiny_cnn):
    network = tiny_cnn()
    graph = capture(network.module, network.input.shape)
    return {"literature": graph, "integer": fold_batch_norms(graph)}


@pytest.fixture(scope="module")
def images(tiny_cnn):
    """The first 200 are for distilling, the others for judging."""
    return tiny_cnn().held_out()


@pytest.fixture(scope="module")
def hard(images):
    """Pairs of the other images laid over each other, and those images under noise: the teacher itself wavers."""
    others = images.inputs[200:]
    noise = torch.randn(others.shape, generator=torch.Generator().manual_seed(0))
    return torch.cat([(others[:50] + others[50:]) / 2, (others[:33] + others[33:66]) / 2, others + noise])


def calibrated(teacher, kind, images, bits=3, end_bits=None):
    student = place(teacher, kind, weight_bits=bits, activation_bits=bits, end_bits=end_bits)
    calibrate_activations(teacher, student, images.inputs[:200], MinMax(), batch=64, progress=Silent())
    calibrate_weights(student, Mse())
    return student


def shuffled(images, seed=0, batch=32, augmentation=None):
    few = Images(
        inputs=images.inputs[:200],
        labels=images.labels[:200],
        logits=None if images.logits is None else images.logits[:200],
    )
    return Shuffled(few, batch, seed=Seed(seed), device=CPU, augmentation=augmentation)


def distilled(teacher, student, source, checkpoints=None, **settings):
    recipe = Distillation(**{"steps": 8} | settings)
    distil(teacher, student, source, recipe, checkpoints=checkpoints or Forgetful(), progress=Silent())


def kl(known, answers, temperature=1.0):
    """Of softmaxes, for each image; in double precision and with nothing of the library's."""

    def log_softmax(logits):
        scaled = logits.detach().double().numpy() / temperature
        shifted = scaled - scaled.max(axis=1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))

    theirs, ours = log_softmax(known), log_softmax(answers)
    return (np.exp(theirs) * (theirs - ours)).sum(axis=1)


def logits(seed, classes=7):
    return 4 * torch.randn(5, classes, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
def test_divergence_is_that_of_the_softmaxes_times_the_squared_temperature_averaged_over_the_batch(temperature):
    answers, known = logits(0), logits(1)
    expected = temperature**2 * kl(known, answers, temperature).mean()
    assert float(divergence(answers, known, temperature)) == pytest.approx(expected, rel=1e-4)
    assert float(divergence(known, known, temperature)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("classes", [3, 7])
def test_at_a_high_temperature_it_is_half_the_squared_distance_of_centred_logits_per_class(classes):
    answers, known = logits(0, classes).double(), logits(1, classes).double()
    gap = (answers - known).numpy()
    centred = gap - gap.mean(axis=1, keepdims=True)
    expected = (centred**2).sum(axis=1).mean() / (2 * classes)
    # The next term of the series is smaller by logits / temperature.
    assert float(divergence(answers, known, 1e5)) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_distilling_brings_answers_on_other_images_closer_to_the_teachers(teachers, images, hard, kind, seed):
    teacher = teachers[kind]
    student = calibrated(teacher, kind, images)

    def judged():
        with torch.no_grad():
            known, answers = teacher(hard), student.graph(hard)
        return kl(known, answers).mean(), float((known.argmax(1) == answers.argmax(1)).double().mean())

    before = judged()
    distilled(teacher, student, shuffled(images, seed), steps=60)
    after = judged()
    assert after[0] < 0.75 * before[0]
    assert after[1] > before[1]


@pytest.mark.parametrize("kind", KINDS)
def test_it_goes_on_from_codes_that_are_decided(teachers, images, kind):
    student = calibrated(teachers[kind], kind, images)
    decided = {}
    for name, layer in student.layers.items():
        quantizer = student.weights[name]
        # One further than the nearest, where the grid goes on.
        nearest = quantizer.final_codes(student.graph.get_buffer(layer.weight)).float()
        decided[name] = (nearest + 1).clamp(max=quantizer.grid.quant_max)
        quantizer.set_codes(decided[name])
    with torch.no_grad():
        before = student.graph(images.inputs[200:])
    distilled(teachers[kind], student, shuffled(images), steps=1, learning_rate=1e-12, scale_rate=0.0)
    with torch.no_grad():
        assert torch.allclose(student.graph(images.inputs[200:]), before, atol=1e-5)
    for name, codes in decided.items():
        assert torch.equal(
            student.weights[name].final_codes(student.graph.get_buffer(student.layers[name].weight)).float(), codes
        )
    distilled(teachers[kind], student, shuffled(images), steps=20, learning_rate=1e-2)
    moved = (
        student.weights[name].final_codes(student.graph.get_buffer(student.layers[name].weight)).float() != codes
        for name, codes in decided.items()
    )
    assert all(bool(part.any()) for part in moved)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weight_ranges", ["minmax", "fixed", "learned"])
def test_nothing_but_what_is_learned_changes_and_nothing_stays_in_training(teachers, images, kind, weight_ranges):
    teacher = teachers[kind]
    student = calibrated(teacher, kind, images)
    theirs = {name: value.clone() for name, value in teacher.state_dict().items()}
    before = {name: value.clone() for name, value in student.graph.state_dict().items()}
    distilled(teacher, student, shuffled(images), weight_ranges=weight_ranges)
    after = student.graph.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert not list(student.graph.parameters())
    for name, value in after.items():
        assert not value.requires_grad and value.grad is None, name
        fixed = "running" in name or "num_batches" in name or ("activation_quantizers" in name and "zero_point" in name)
        if fixed or ("zero_point" in name and (kind == "integer" or weight_ranges != "minmax")):
            assert torch.equal(value, before[name]), name
        elif "quantizers" not in name:
            assert not torch.equal(value, before[name]), name
    assert all(quantizer.log_gain is None for quantizer in (*student.weights.values(), *student.activations.values()))
    for name, value in teacher.state_dict(keep_vars=True).items():
        assert not value.requires_grad and value.grad is None and torch.equal(value, theirs[name]), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("decided", [False, True])
def test_biases_and_scales_alone_bring_answers_closer_while_weights_stay_what_they_are(teachers, images, hard, kind, decided):
    teacher = teachers[kind]
    student = calibrated(teacher, kind, images)
    weights = {name: student.graph.get_buffer(layer.weight).clone() for name, layer in student.layers.items()}
    codes = {name: student.weights[name].final_codes(weight).float() for name, weight in weights.items()}
    if decided:
        for name, quantizer in student.weights.items():
            quantizer.set_codes(codes[name])

    def judged():
        with torch.no_grad():
            return kl(teacher(hard), student.graph(hard)).mean()

    before = judged()
    distilled(teacher, student, shuffled(images), steps=60, learned_weights=False, weight_ranges="fixed", learning_rate=2e-3)
    assert judged() < 0.9 * before
    for name, layer in student.layers.items():
        assert torch.equal(student.weights[name].final_codes(student.graph.get_buffer(layer.weight)).float(), codes[name]), name
        if not decided:
            assert torch.equal(student.graph.get_buffer(layer.weight), weights[name]), name


def test_where_there_is_nothing_to_learn_it_says_so():
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, bias=False), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(4, 2, bias=False)
    )
    teacher = fold_batch_norms(capture(module.eval(), (3, 3, 3)))
    images = Images(inputs=torch.randn(200, 3, 3, 3), labels=torch.zeros(200, dtype=torch.long))
    student = calibrated(teacher, "integer", images)
    with pytest.raises(ConfigError) as error:
        distilled(teacher, student, shuffled(images), learned_weights=False, weight_ranges="fixed", learned_ranges=False)
    assert str(error.value) == (
        "distillation.learned_weights must be true for a network without biases where no scale is learned, got false; leave it out, "
        "or use --set distillation.weight_ranges=learned"
    )
    distilled(teacher, student, shuffled(images), learned_weights=False, weight_ranges="learned", learned_ranges=False)


def test_ranges_of_activations_are_nothing_to_learn_where_there_are_none():
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(27, 2, bias=False))
    teacher = fold_batch_norms(capture(module.eval(), (3, 3, 3)))
    student = calibrated(teacher, "literature", Images(inputs=torch.randn(20, 3, 3, 3)))
    student = dataclasses.replace(student, activations={})
    with pytest.raises(ConfigError, match=r"^distillation\.learned_weights must be true "):
        check_learns(student, Distillation(steps=1, learned_weights=False, weight_ranges="fixed"))
    check_learns(student, Distillation(steps=1, learned_weights=False))


@pytest.mark.parametrize("kind", KINDS)
def test_ranges_that_follow_the_weights_end_at_their_smallest_and_largest(teachers, images, kind):
    student = calibrated(teachers[kind], kind, images)
    distilled(teachers[kind], student, shuffled(images), weight_ranges="minmax", learning_rate=1e-2)
    for name, layer in student.layers.items():
        quantizer = student.weights[name]
        weight = student.graph.get_buffer(layer.weight).flatten(1).double().numpy()
        low, high = weight.min(axis=1), weight.max(axis=1)
        if kind == "integer":
            scale, zero_point = np.maximum(high / 3, low / -4), np.zeros(len(weight))
        else:
            scale = (high - low) / 7
            zero_point = -4 - np.round(low / scale)
        np.testing.assert_allclose(quantizer.scale.flatten(), scale, rtol=1e-6)
        np.testing.assert_array_equal(quantizer.zero_point.flatten(), zero_point)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("learned_ranges", [True, False])
@pytest.mark.parametrize("weight_ranges", ["fixed", "learned"])
def test_scales_change_where_they_are_learned_and_stay_to_the_bit_where_not(
    teachers, images, kind, weight_ranges, learned_ranges
):
    student = calibrated(teachers[kind], kind, images)
    weights, activations = (
        {name: quantizer.scale.clone() for name, quantizer in part.items()} for part in (student.weights, student.activations)
    )
    distilled(teachers[kind], student, shuffled(images), steps=2, weight_ranges=weight_ranges, learned_ranges=learned_ranges)
    for part, old, learned in (
        (student.weights, weights, weight_ranges == "learned"),
        (student.activations, activations, learned_ranges),
    ):
        for name, quantizer in part.items():
            assert torch.equal(quantizer.scale, old[name]) != learned, name
            # Two steps of Adam change a logarithm by at most twice the rate.
            torch.testing.assert_close(quantizer.scale, old[name], rtol=2.1e-3, atol=0)


def test_the_papers_settings_descend_with_nesterov_momentum_and_decay(teachers, images):
    teacher, seen = teachers["literature"], []
    student = calibrated(teacher, "literature", images, bits=4)
    handle = register_optimizer_step_pre_hook(lambda optimizer, *_: seen.append(optimizer))
    others = images.inputs[200:]
    with torch.no_grad():
        before = kl(teacher(others), student.graph(others), 20.0).mean()
    try:
        distilled(teacher, student, shuffled(images), steps=30, learning_rate=1e-3, **PAPER)
    finally:
        handle.remove()
    (group,) = seen[-1].param_groups
    assert isinstance(seen[-1], torch.optim.SGD)
    assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.9, True, 1e-4)
    with torch.no_grad():
        assert kl(teacher(others), student.graph(others), 20.0).mean() < before


def test_learning_rates_fall_by_one_half_cosine(teachers, images):
    seen = []
    handle = register_optimizer_step_pre_hook(
        lambda optimizer, *_: seen.append([group["lr"] for group in optimizer.param_groups])
    )
    student = calibrated(teachers["integer"], "integer", images)
    try:
        distilled(teachers["integer"], student, shuffled(images, batch=2), steps=20, learning_rate=1e-6, scale_rate=1e-3)
    finally:
        handle.remove()
    assert len(seen) == 20
    last = (1 - math.cos(math.pi / 20)) / 2
    assert last < 0.01
    for rates, share in ((seen[0], 1), (seen[10], 0.5), (seen[19], last)):
        assert rates == pytest.approx([share * 1e-6, share * 1e-3])
    assert all(later[0] < earlier[0] for earlier, later in itertools.pairwise(seen))


class Killed(Exception):
    pass


class Dying(Folder):
    """Dies behind its third part."""

    saved = 0

    def save(self, name, part):
        super().save(name, part)
        self.saved += 1
        if self.saved == 3:
            raise Killed


SOURCES = {
    "shuffled": lambda images: shuffled(images, augmentation=Augmentation(smallest=0.5)),
    "mixed": lambda images: Mixed(shuffled(images, 1, 12), shuffled(images, 2, 20)),
}


@pytest.mark.parametrize(("source", "settings"), [("shuffled", {}), ("mixed", {"learning_rate": 1e-3} | PAPER)])
def test_a_killed_distillation_goes_on_to_the_same_bytes(teachers, images, tmp_path, source, settings):
    teacher = teachers["integer"]
    whole, broken, resumed, again = (calibrated(teacher, "integer", images) for _ in range(4))
    settings = {"steps": 20, "class_weight": 0.1} | settings
    distilled(teacher, whole, SOURCES[source](images), **settings)
    with pytest.raises(Killed):
        distilled(teacher, broken, SOURCES[source](images), Dying(tmp_path), **settings)
    assert int(Folder(tmp_path).load("distillation")["done"]) == 3
    # The second time there is nothing left to do.
    for student in (resumed, again):
        distilled(teacher, student, SOURCES[source](images), Folder(tmp_path), **settings)
        for name, value in whole.graph.state_dict().items():
            assert torch.equal(student.graph.state_dict()[name], value), name


NUMBER = r"-?(\d+(\.\d+)?(e[+-]\d+)?|inf|nan)"


def test_a_loss_that_is_lost_stops_it(teachers, images, tmp_path):
    # The second time from the checkpoint, to the same end.
    for _ in range(2):
        student = calibrated(teachers["literature"], "literature", images)
        with pytest.raises(DivergenceError) as stopped:
            distilled(
                teachers["literature"],
                student,
                shuffled(images),
                Folder(tmp_path),
                learning_rate=1e20,
                class_weight=0.5,
                weight_ranges="minmax",
            )
        assert re.fullmatch(
            rf"distillation: the loss must stay (finite|below 1000 times where it began), got {NUMBER} at step \d "
            rf"\(KL {NUMBER}, class {NUMBER}\); "
            r"try --set distillation\.learning_rate=2\.5e\+19 with another --output",
            str(stopped.value),
        )


class Flash(Shuffled):
    """One batch is out of all bounds."""

    def draw(self, number, progress):
        batch = super().draw(number, progress)
        return dataclasses.replace(batch, inputs=1e6 * batch.inputs) if number == 30 else batch


def test_a_loss_that_explodes_stops_it_and_leaves_the_last_checkpoint_to_go_on_from(teachers, images, tmp_path):
    teacher = teachers["literature"]
    whole, broken, resumed = (calibrated(teacher, "literature", images) for _ in range(3))
    settings = {"steps": 40, "learning_rate": 2e-3, "class_weight": 0.5}
    flash = Flash(images, 32, seed=Seed(0), device=CPU)
    with pytest.raises(DivergenceError) as stopped:
        distilled(teacher, broken, flash, Folder(tmp_path), **settings)
    assert re.fullmatch(
        rf"distillation: the loss must stay below 1000 times where it began, got {NUMBER} at step 30 "
        rf"\(KL {NUMBER}, class {NUMBER}\); try --set distillation\.learning_rate=0\.0005 with another --output",
        str(stopped.value),
    )
    assert int(Folder(tmp_path).load("distillation")["done"]) == 30
    distilled(teacher, whole, Shuffled(images, 32, seed=Seed(0), device=CPU), **settings)
    distilled(teacher, resumed, Shuffled(images, 32, seed=Seed(0), device=CPU), Folder(tmp_path), **settings)
    for name, value in whole.graph.state_dict().items():
        assert torch.equal(resumed.graph.state_dict()[name], value), name


@pytest.mark.parametrize("augmented", [False, True])
def test_the_teacher_is_asked_only_where_a_batch_does_not_bring_its_answers(teachers, images, augmented):
    teacher, calls = teachers["integer"], []
    student = calibrated(teacher, "integer", images)
    with torch.no_grad():
        known = Images(inputs=images.inputs, labels=images.labels, logits=teacher(images.inputs))
    source = shuffled(known, augmentation=Augmentation(smallest=0.5) if augmented else None)
    handle = teacher.register_forward_hook(lambda *_: calls.append(1))
    try:
        distilled(teacher, student, source, steps=3)
    finally:
        handle.remove()
    assert len(calls) == (3 if augmented else 0)


def test_known_answers_and_the_teachers_teach_the_same(teachers, images):
    teacher = teachers["integer"]
    asked, told = (calibrated(teacher, "integer", images) for _ in range(2))
    with torch.no_grad():
        known = Images(inputs=images.inputs, labels=images.labels, logits=teacher(images.inputs))
    distilled(teacher, asked, shuffled(images))
    distilled(teacher, told, shuffled(known))
    for name, value in asked.graph.state_dict().items():
        torch.testing.assert_close(told.graph.state_dict()[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("bits", "settings"), [((3, 8), {}), ((2, None), {}), ((2, None), {"weight_ranges": "minmax"})])
def test_the_exported_network_computes_what_the_distilled_student_computes(teachers, images, tmp_path, bits, settings):
    student = calibrated(teachers["integer"], "integer", images, *bits)
    distilled(teachers["integer"], student, shuffled(images), **settings)
    quantized, path = finish(student), tmp_path / "network.onnx"
    with torch.no_grad():
        torch.testing.assert_close(quantized.graph(images.inputs), student.graph(images.inputs), rtol=0, atol=1e-5)
    Onnx()(quantized, (3, 16, 16), path, facts={})
    verify.assert_integer(path, quantized)
    verify.assert_parity(verify.measure_parity(quantized, path, images.inputs[200:]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": -1}, "steps must be at least 0, got -1"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be at least 1e-12, got 0.0"),
        ({"temperature": 0.0}, "temperature must be at least 0.001, got 0.0"),
        ({"smallest_crop": 0.0}, "smallest_crop must be 0.01 to 1, got 0.0"),
        ({"colour": 2.0}, "colour must be 0 to 1, got 2.0"),
        (
            {"cut_mix": 0.5, "class_weight": 1.0},
            "cut_mix must be 0 with a class_weight, got 0.5 and 1; an image with a patch of another has no one label: use --set "
            "distillation.cut_mix=0",
        ),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError) as refused:
        Distillation(**settings)
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("after", "after must be one of calibration, rounding, got 'typo'"),
        ("optimizer", "optimizer must be one of adam, sgd, got 'typo'"),
        ("weight_ranges", "weight_ranges must be one of minmax, fixed, learned, got 'typo'"),
    ],
)
def test_words_that_are_none_of_the_choices_are_refused(name, message):
    settings = Distillation()
    # The tests' type checks would stop the constructor before it comes to its own.
    object.__setattr__(settings, name, "typo")
    with pytest.raises(ConfigError) as refused:
        settings.__post_init__()
    assert str(refused.value) == message
