"""ZeroQ does what its paper claims: the images' statistics are those of the training data."""

import pytest
import torch
from torch import nn

from reverie.checkpoints import Forgetful
from reverie.errors import ModelError
from reverie.graph.batch_norm import BatchNorm, Observed, Statistics, batch_norms
from reverie.graph.capture import capture
from reverie.models import InputContract
from reverie.progress import Silent
from reverie.randomness import Seed
from reverie.report.fidelity import describe
from reverie.synthesis import Teacher
from reverie.synthesis._losses import matching_loss, total_variation
from reverie.synthesis.noise import Noise
from reverie.synthesis.zeroq import ZeroQ


@pytest.fixture
def teacher(tiny_cnn):
    network = tiny_cnn()
    return Teacher(capture(network.module, network.input.shape), network.input, network.classes, network.name)


def made(method, teacher, count=48, seed=0):
    return method(teacher, count, seed=Seed(seed), checkpoints=Forgetful(), progress=Silent())


@pytest.mark.parametrize("level", ["batch", "sample"])
@pytest.mark.parametrize("seed", [0, 1])
def test_its_images_are_much_nearer_to_the_training_statistics_than_noise(teacher, level, seed):
    ours = describe(teacher, made(ZeroQ(steps=60, level=level), teacher, seed=seed))
    noise = describe(teacher, made(Noise(), teacher, seed=seed))
    assert ours["batch_norm_distance"] < 0.25 * noise["batch_norm_distance"]


def test_real_images_have_a_small_distance(teacher, tiny_cnn):
    real = tiny_cnn().held_out()
    noise = made(Noise(), teacher)
    assert describe(teacher, real)["batch_norm_distance"] < 0.05 * describe(teacher, noise)["batch_norm_distance"]


def test_the_class_term_makes_the_teacher_see_the_class_asked_for(teacher):
    images = made(ZeroQ(steps=60, class_weight=1.0), teacher)
    assert images.labels is not None
    assert (teacher.logits(images.inputs).argmax(1) == images.labels).float().mean() > 0.9
    assert made(ZeroQ(steps=2), teacher).labels is None


def test_the_variation_term_smooths(teacher):
    rough = total_variation(made(ZeroQ(steps=40), teacher).inputs)
    smooth = total_variation(made(ZeroQ(steps=40, variation_weight=1.0), teacher).inputs)
    assert smooth < 0.8 * rough


def test_the_matching_loss_by_hand():
    # One batch norm with mean (0, 1) and variance (1, 4); the batch has mean (1, 1) and variance (1, 1):
    # ((1-0)/1)^2 + 0 and 0 + (1/2 - 1)^2, averaged over two channels: (1 + 0.25) / 2.
    remembered = BatchNorm("norm", "x", torch.tensor([0.0, 1.0]), torch.tensor([1.0, 4.0]))
    statistics = Statistics((torch.tensor([1.0, 1.0]),), (torch.tensor([1.0, 1.0]),))
    assert matching_loss(statistics, [remembered]).item() == pytest.approx(0.625, abs=1e-5)


def test_the_matching_loss_is_zero_where_the_statistics_match_and_has_a_gradient_elsewhere(tiny_cnn):
    network = tiny_cnn()
    inputs = network.held_out().inputs
    # In training mode each batch norm normalizes by its batch, so one pass with momentum 1 would remember other inputs
    # than evaluation sees; taking them one at a time, in order, all agree.
    norms = [part for part in network.module.modules() if isinstance(part, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
        network.module(inputs)
        norm.eval()
    graph = capture(network.module, network.input.shape)
    pixels = inputs.clone().requires_grad_()
    _, statistics = Observed(graph)(pixels)
    loss = matching_loss(statistics, batch_norms(graph))
    # Running variances are unbiased, ours biased: over 300 images the two differ by less than 1e-3.
    assert loss.item() < 1e-5
    other = (pixels.detach() + 1).requires_grad_()
    (gradient,) = torch.autograd.grad(matching_loss(Observed(graph)(other)[1], batch_norms(graph)), other)
    assert gradient.abs().max() > 0


def test_a_network_without_batch_norm_is_refused():
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 14 * 14, 3))
    contract = InputContract(channels=3, height=16, width=16, mean=(0.5,) * 3, std=(0.25,) * 3)
    teacher = Teacher(capture(module, contract.shape), contract, 3, "plain")
    with pytest.raises(ModelError) as caught:
        made(ZeroQ(), teacher)
    assert str(caught.value) == (
        "plain: zeroq needs a batch norm with running statistics, got none in the network; use --calibration with a folder of "
        "images and --images 0 --set held_out=0, or --set synthesis.method=noise as a baseline"
    )
