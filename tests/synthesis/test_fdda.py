"""FDDA's terms are the paper's, and its classes are drawn as in the released code."""

from dataclasses import replace

import pytest
import torch

from reverie.checkpoints import Forgetful
from reverie.errors import ConfigError
from reverie.graph.batch_norm import Statistics
from reverie.graph.capture import capture
from reverie.progress import Silent
from reverie.randomness import Seed
from reverie.synthesis import Teacher, fdda
from reverie.synthesis._capsule import capsule_of
from reverie.synthesis._losses import statistics_distance
from reverie.synthesis.fdda import Fdda, FddaStream, distorted_distance

QUICK = {"steps": 40, "batch": 6, "class_batch": 5, "latent": 8, "width": 8}


@pytest.fixture(scope="module")
def teacher(tiny_cnn):
    network = tiny_cnn()
    alone = Teacher(capture(network.module, network.input.shape), network.input, network.classes, network.name)
    return replace(alone, capsule=capsule_of(alone, network.held_out()))


def stream_of(teacher, **settings):
    return FddaStream(Fdda(**QUICK | settings), teacher, Seed(0))


def changed(teacher, **parts):
    return replace(teacher, capsule=replace(teacher.capsule, **parts))


def flags(*values):
    return torch.tensor(values)


def some_statistics(layers, channels, seed):
    random = torch.Generator().manual_seed(seed)
    means = tuple(3 * torch.randn(channels, generator=random) for _ in range(layers))
    return Statistics(means, tuple(4 * torch.rand(channels, generator=random) for _ in range(layers)))


def test_distortion_adds_the_variance_of_its_noise_and_nothing_else_on_average():
    ours, centre = some_statistics(3, 40, 0), some_statistics(3, 40, 1)
    for part in (*ours.mean, *ours.variance):
        part.requires_grad_()
    parts, layers = [*ours.mean[1:], *ours.variance[1:]], range(1, 3)
    centred = statistics_distance(ours, centre.mean, centre.variance, layers)
    expected = torch.cat(torch.autograd.grad(centred, parts))
    random, values, slopes = torch.Generator().manual_seed(2), [], []
    for _ in range(800):
        distorted = distorted_distance(ours, list(centre.mean), list(centre.variance), layers, 0.5, 1.0, random)
        values.append(distorted.detach())
        slopes.append(torch.cat(torch.autograd.grad(distorted, parts)))
    values, slopes = torch.stack(values), torch.stack(slopes)
    # Four standard errors of a mean; five for the largest of 160 slopes.
    assert values.mean().item() - centred.item() == pytest.approx(1.25, abs=4 * values.std().item() / 800**0.5)
    assert values.std() > 0.05
    assert ((slopes.mean(dim=0) - expected).abs() <= 5 * slopes.std(dim=0) / 800**0.5).all()


def test_distortion_is_drawn_anew_for_each_layer_channel_and_step():
    zeros, random = [torch.zeros(4), torch.zeros(4)], torch.Generator().manual_seed(0)
    statistics = Statistics((torch.zeros(4, requires_grad=True),) * 2, tuple(zeros))
    # The slope by a mean that all layers share is a sum: by one layer at a time it is that layer's noise.
    drawn = set()
    for _ in range(3):
        for layer in range(2):
            distance = distorted_distance(statistics, zeros, zeros, range(layer, layer + 1), 0.5, 1.0, random)
            drawn |= set(torch.autograd.grad(distance, statistics.mean[0])[0].tolist())
    assert len(drawn) == 3 * 2 * 4


def test_without_noise_the_distorted_term_is_the_centred_one(teacher):
    stream = stream_of(teacher, mean_noise=0.0, variance_noise=0.0, distorted_weight=1.0, centred_weight=1.0)
    terms, _ = stream.terms(0, torch.Generator().manual_seed(0))
    assert terms["centred"] > 0
    torch.testing.assert_close(terms["distorted"], terms["centred"])


def test_misclassified_classes_are_drawn_early_and_missing_ones_never(teacher):
    # Class 0 is right, class 1 wrong, class 2 has no image.
    stream = stream_of(
        changed(teacher, count=flags(3, 2, 0), correct=flags(True, False, False)),
        steps=100,
        early=0.3,
    )
    random = torch.Generator().manual_seed(0)
    drawn = [stream.draw_class(number, random) for number in range(200)]
    assert set(drawn[:30]) == {0, 1}
    assert set(drawn[30:]) == {0}


def test_all_correct_classes_are_drawn_all_the_time(teacher):
    stream = stream_of(teacher)
    random = torch.Generator().manual_seed(0)
    early = torch.tensor([stream.draw_class(0, random) for _ in range(300)]).bincount(minlength=3)
    late = torch.tensor([stream.draw_class(10**6, random) for _ in range(300)]).bincount(minlength=3)
    # 100 each are expected, with a deviation of 8.
    assert (early > 60).all() and (late > 60).all()


def test_a_missing_class_is_not_correct_whatever_the_capsule_says(teacher):
    stream = stream_of(changed(teacher, count=flags(1, 0, 1), correct=flags(True, True, True)))
    random = torch.Generator().manual_seed(0)
    assert {stream.draw_class(10**6, random) for _ in range(50)} == {0, 2}


def watched(monkeypatch):
    """The arguments and answers of every call of `distorted_distance`."""
    calls = []

    def watch(*arguments):
        answer = distorted_distance(*arguments)
        calls.append((arguments, answer))
        return answer

    monkeypatch.setattr(fdda, "distorted_distance", watch)
    return calls


def test_a_misclassified_class_aims_at_noise_in_all_layers(teacher, monkeypatch):
    # Class 1 is the only wrong one, so the others are drawn from elsewhere.
    stream = stream_of(changed(teacher, correct=flags(True, False, True)), early=1.0)
    monkeypatch.setattr(stream, "draw_class", lambda number, random: 1)
    calls = watched(monkeypatch)
    terms, _ = stream.terms(0, torch.Generator().manual_seed(0))
    (((_, means, variances, layers, *noises, _), answer),) = calls
    assert not any(part.any() for part in (*means, *variances))
    assert [part.shape for part in means] == [(8,), (16,), (16,)]
    assert layers == range(3) and noises == [1.0, 1.0]
    assert terms["centred"].item() == 0
    assert terms["distorted"].item() == pytest.approx(0.9 * 2 * answer.item())


def test_a_correct_class_aims_at_its_centre_in_deep_layers(teacher, monkeypatch):
    deep = replace(teacher, capsule=teacher.capsule)
    stream = stream_of(deep, mean_noise=0.1, variance_noise=0.2)
    monkeypatch.setattr(stream, "draw_class", lambda number, random: 2)
    monkeypatch.setattr(fdda, "deep_layers", lambda count: range(count - 2, count))
    calls = watched(monkeypatch)
    terms, _ = stream.terms(0, torch.Generator().manual_seed(0))
    (((of_one, means, variances, layers, *noises, _), answer),) = calls
    assert all(torch.equal(mean, centre[2]) for mean, centre in zip(means, teacher.capsule.mean, strict=True))
    assert all(torch.equal(mean, centre[2]) for mean, centre in zip(variances, teacher.capsule.variance, strict=True))
    assert layers == range(1, 3) and noises == [0.1, 0.2]
    assert terms["distorted"].item() == pytest.approx(0.9 * answer.item())
    centred = statistics_distance(of_one, means, variances, range(1, 3))
    assert terms["centred"].item() == pytest.approx(0.01 * centred.item())


def slope(stream, term):
    """How `term` of a fixed step changes with the generator."""
    terms, _ = stream.terms(0, torch.Generator().manual_seed(0))
    parts = torch.autograd.grad(terms[term], list(stream.generator.parameters()), allow_unused=True)
    return torch.cat([part.flatten() for part in parts if part is not None])


@pytest.mark.parametrize("term", ["centred", "distorted"])
def test_the_class_drawn_changes_the_gradient_by_its_centre(teacher, term):
    only = flags(True, False, False)
    kept, capsule = flags(1, 0, 0), teacher.capsule
    # The same class is asked for, and the same noise drawn; only the centre is another class's.
    order = [1, 0, 2]
    swapped = {"mean": tuple(m[order] for m in capsule.mean), "variance": tuple(v[order] for v in capsule.variance)}
    own = slope(stream_of(changed(teacher, correct=only, count=kept)), term)
    other = slope(stream_of(changed(teacher, correct=only, count=kept, **swapped)), term)
    assert torch.equal(own, slope(stream_of(changed(teacher, correct=only, count=kept)), term))
    assert (own - other).norm() > 0.1 * own.norm() > 0


def test_all_five_terms_have_their_weights(teacher):
    plain, _ = stream_of(teacher).terms(0, torch.Generator().manual_seed(0))
    assert list(plain) == ["class", "statistics", "one class", "centred", "distorted"]
    weights = ("class_weight", "statistics_weight", "distorted_weight", "centred_weight")
    doubled = {name: 2 * getattr(Fdda(), name) for name in weights}
    terms, _ = stream_of(teacher, **doubled).terms(0, torch.Generator().manual_seed(0))
    for name in plain:
        torch.testing.assert_close(terms[name], 2 * plain[name])


def refused(teacher):
    with pytest.raises(ConfigError) as caught:
        Fdda(**QUICK)(teacher, 4, seed=Seed(0), checkpoints=Forgetful(), progress=Silent())
    return str(caught.value)


def test_a_run_without_a_capsule_is_refused(teacher):
    assert refused(replace(teacher, capsule=None)) == (
        "tiny: fdda needs labelled real images, one for each class, got none; give --calibration with a folder of them "
        "(one sub-folder a class) or --capsule with a file that `reverie capsule` wrote"
    )


@pytest.mark.parametrize(("count", "correct", "present"), [((2, 1, 1), (False,) * 3, 3), ((2, 1, 0), (False, False, True), 2)])
def test_a_capsule_whose_images_the_network_gets_all_wrong_is_refused(teacher, count, correct, present):
    assert refused(changed(teacher, count=flags(*count), correct=flags(*correct))) == (
        f"tiny: fdda needs a class whose images the network gets right, got none of {present}; "
        "check the labels, and mean and deviation of the input"
    )
