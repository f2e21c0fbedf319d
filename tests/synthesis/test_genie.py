"""Genie does what its paper claims: a fresh generator and its latents, learned together, match the statistics of the training data."""

import pytest
import torch

from reverie.checkpoints import Forgetful
from reverie.errors import ConfigError, DivergenceError, ModelError
from reverie.graph.batch_norm import BatchNorm, Observed, Statistics
from reverie.graph.capture import capture
from reverie.graph.swing import swing
from reverie.models import InputContract
from reverie.progress import Silent
from reverie.randomness import Seed
from reverie.report.fidelity import describe
from reverie.synthesis import Teacher
from reverie.synthesis._losses import matching_loss, standard_distance
from reverie.synthesis.genie import Genie
from reverie.synthesis.noise import Noise
from reverie.synthesis.zeroq import ZeroQ


@pytest.fixture(scope="module")
def teacher(tiny_cnn):
    network = tiny_cnn()
    return Teacher(capture(network.module, network.input.shape), network.input, network.classes, network.name)


def made(method, teacher, count=32, seed=0):
    return method(teacher, count, seed=Seed(seed), checkpoints=Forgetful(), progress=Silent())


def quick(**settings):
    return Genie(**{"batch": 32, "steps": 60, "width": 16, "latent": 32} | settings)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("relative", [True, False])
def test_its_images_are_much_nearer_to_the_training_statistics_than_noise(teacher, seed, relative):
    ours = describe(teacher, made(quick(relative=relative), teacher, seed=seed))
    noise = describe(teacher, made(Noise(), teacher, seed=seed))
    assert ours["batch_norm_distance"] < 0.25 * noise["batch_norm_distance"]


def test_generator_and_latents_both_learn(teacher):
    def distance(**rates):
        return describe(teacher, made(quick(swing=False, **rates), teacher))["batch_norm_distance"]

    latents_alone, neither = distance(generator_rate=1e-9), distance(generator_rate=1e-9, latent_rate=1e-9)
    assert distance() < 0.5 * latents_alone < 0.4 * neither


def test_each_batch_has_a_generator_of_its_own(teacher):
    # Two batches of one seed are those of two runs, whatever came before.
    both = made(quick(batch=8, steps=3), teacher, count=16)
    alone = made(quick(batch=8, steps=3), teacher, count=8)
    assert torch.equal(both.inputs[:8], alone.inputs) and not torch.equal(both.inputs[8:], alone.inputs)


def test_swing_makes_images_that_fit_shifted_lattices_too(teacher):
    # The statistics of images made with swing suffer less when the lattice is shifted.
    def distance(images, *, shifted):
        graph = swing(teacher.graph, torch.Generator().manual_seed(5)) if shifted else teacher.graph
        observed = Observed(graph)
        with torch.no_grad():
            losses = [matching_loss(observed(images.inputs)[1], teacher.batch_norms) for _ in range(9 if shifted else 1)]
        return float(torch.stack(losses).mean())

    for method in (quick, ZeroQ):
        swung = made(method(batch=32, steps=60, swing=True), teacher)
        plain = made(method(batch=32, steps=60, swing=False), teacher)
        assert distance(swung, shifted=True) < 0.8 * distance(plain, shifted=True)


def test_the_class_term_makes_the_teacher_see_the_class_asked_for(teacher):
    images = made(quick(class_weight=1.0), teacher)
    assert (teacher.logits(images.inputs).argmax(1) == images.labels).float().mean() > 0.9
    assert made(quick(steps=2), teacher).labels is None


def test_the_absolute_distance_by_hand():
    # Two layers. The first: mean (1, 1) for (0, 1), deviation (1, 1) for (1, 2): 1/2 + 1/2. The second: mean 3 for 1: 4.
    one = BatchNorm("one", "x", torch.tensor([0.0, 1.0]), torch.tensor([1.0, 4.0]))
    two = BatchNorm("two", "y", torch.tensor([1.0]), torch.tensor([9.0]))
    statistics = Statistics((torch.tensor([1.0, 1.0]), torch.tensor([3.0])), (torch.tensor([1.0, 1.0]), torch.tensor([9.0])))
    assert standard_distance(statistics, [one, two]).item() == pytest.approx(5.0, abs=1e-5)


def test_a_rate_that_is_too_high_is_told(teacher):
    with pytest.raises(DivergenceError) as caught:
        made(quick(generator_rate=1e30, steps=30), teacher)
    assert str(caught.value).startswith("genie: the loss must stay ")
    assert str(caught.value).endswith("; try --set synthesis.generator_rate=2.5e+29 with another --output")


def test_bad_settings_are_refused():
    with pytest.raises(ConfigError) as caught:
        Genie(latent=0)
    assert str(caught.value) == "latent must be at least 1, got 0"


def test_a_network_without_batch_norm_is_refused():
    contract = InputContract(channels=3, height=16, width=16, mean=(0.5,) * 3, std=(0.25,) * 3)
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4 * 14 * 14, 3))
    with pytest.raises(ModelError) as caught:
        made(Genie(), Teacher(capture(module, contract.shape), contract, 3, "plain"))
    assert str(caught.value) == (
        "plain: genie needs a batch norm with running statistics, got none in the network; use --calibration with a folder of "
        "images and --images 0 --set held_out=0, or --set synthesis.method=noise as a baseline"
    )
