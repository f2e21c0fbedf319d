"""GDFQ's loss, and what every generator in training does as a source of images."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from reverie import plugins, synthesis
from reverie.checkpoints import Folder, Forgetful
from reverie.errors import ConfigError, DivergenceError, ModelError
from reverie.graph.capture import capture
from reverie.models import InputContract
from reverie.progress import Silent
from reverie.randomness import Seed
from reverie.synthesis import ImageStream, Streaming, Teacher
from reverie.synthesis._capsule import capsule_of
from reverie.synthesis._losses import matching_loss, running, statistics_distance
from reverie.synthesis.gdfq import Gdfq

QUICK = {"steps": 4, "batch": 6, "latent": 8, "width": 8, "refine_steps": 0}
QUIET = {"checkpoints": Forgetful(), "progress": Silent()}
# What lets the parts of a method show within a few steps.
EAGER = {"class_batch": 4, "early": 0.5, "refresh": 2, "centroid_images": 4}


def quick(kind):
    return kind(**QUICK, **{name: value for name, value in EAGER.items() if name in kind.__dataclass_fields__})


KINDS = [plugins.load(synthesis, name) for name in plugins.names(synthesis)]
METHODS = [quick(kind) for kind in KINDS if isinstance(kind(), Streaming)]


@pytest.fixture(scope="module")
def teacher(tiny_cnn):
    network = tiny_cnn()
    alone = Teacher(capture(network.module, network.input.shape), network.input, network.classes, network.name)
    return replace(alone, capsule=capsule_of(alone, network.held_out()))


def name_of(method):
    return type(method).__module__.rpartition(".")[2]


@pytest.fixture(params=METHODS, ids=name_of)
def method(request):
    return request.param


def stream_of(method, teacher, checkpoints=None, seed=0):
    return method.stream(teacher, seed=Seed(seed), checkpoints=checkpoints or Forgetful(), progress=Silent())


def untrained(method, teacher):
    return method.stream_type(method, teacher, Seed(0))


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_all_methods_with_a_generator_are_tested_here():
    assert {"clusterq", "fdda", "gdfq"} <= set(map(name_of, METHODS))


@pytest.mark.parametrize("relative", [False, True])
def test_the_terms_are_those_of_the_paper_in_its_units_or_in_the_networks(teacher, relative):
    stream = untrained(Gdfq(**QUICK, class_weight=0.7, statistics_weight=0.3, relative=relative), teacher)
    terms, batch = stream.terms(0, torch.Generator().manual_seed(0))
    logits, statistics = stream.observed(batch.inputs)
    assert list(terms) == ["class", "statistics"]
    torch.testing.assert_close(terms["class"].detach(), 0.7 * functional.cross_entropy(logits, batch.labels))
    absolute = statistics_distance(statistics, *running(teacher.batch_norms), range(3))
    distance = matching_loss(statistics, teacher.batch_norms) if relative else absolute
    torch.testing.assert_close(terms["statistics"].detach(), 0.3 * distance)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_loss_falls(teacher, seed):
    stream = Gdfq(**QUICK | {"batch": 32}).stream_type(Gdfq(**QUICK | {"batch": 32}), teacher, Seed(seed))
    losses = [stream.train_step(3e-3)[1] for _ in range(80)]
    # From about 1.7 to 0.3 and below.
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])


def test_it_makes_images_of_the_class_asked_for(teacher):
    images = Gdfq(**QUICK | {"steps": 120, "batch": 32}, learning_rate=5e-3)(
        teacher, 60, seed=Seed(0), checkpoints=Forgetful(), progress=Silent()
    )
    assert images.labels.tolist() == [0, 1, 2] * 20
    assert images.sources == ("gdfq",) * 60
    assert (teacher.logits(images.inputs).argmax(dim=1) == images.labels).float().mean() > 0.7


def test_a_draw_is_what_the_generator_was_trained_on_with_the_teachers_own_answers(method, teacher):
    stream = stream_of(method, teacher)
    assert isinstance(stream, ImageStream)
    before = {name: value.clone() for name, value in stream.generator.state_dict().items()}
    batch = stream.draw(0, 0.0)
    assert batch.inputs.shape == (6, *teacher.input.shape) and batch.labels.shape == (6,)
    torch.testing.assert_close(batch.logits, teacher.graph(batch.inputs), rtol=1e-4, atol=1e-4)
    assert not any(part.requires_grad for part in (batch.inputs, batch.logits))
    after = stream.generator.state_dict()
    assert stream.trained == QUICK["steps"] + 1
    assert all(
        not torch.equal(before[name], after[name]) for name, _ in stream.generator.named_parameters() if "linear" in name
    )


def test_two_draws_differ(method, teacher):
    stream = stream_of(method, teacher)
    assert not torch.equal(stream.draw(0, 0.0).inputs, stream.draw(1, 0.0).inputs)


@pytest.mark.parametrize(
    ("progress", "rate"), [(0.0, 0.1), (0.249, 0.1), (0.25, 0.01), (0.5, 1e-3), (0.74, 1e-3), (0.75, 1e-4), (0.999, 1e-4)]
)
def test_the_learning_rate_falls_tenfold_after_each_quarter_of_the_student(teacher, progress, rate):
    stream = untrained(Gdfq(**QUICK, learning_rate=0.1), teacher)
    before = stream.generator.linear.weight.detach().clone()
    stream.draw(0, progress)
    # The first step of Adam is as long as the rate, in every weight that has a gradient.
    assert (stream.generator.linear.weight.detach() - before).abs().max().item() == pytest.approx(rate, rel=1e-2)


def test_sampling_leaves_no_trace(method, teacher):
    stream, undisturbed = stream_of(method, teacher), stream_of(method, teacher)
    before = stream.state()
    images = stream.sample(5, Seed(3), **QUIET)
    assert same(before, stream.state())
    assert torch.equal(images.inputs, stream.sample(5, Seed(3), **QUIET).inputs)
    assert not torch.equal(images.inputs, stream.sample(5, Seed(4), **QUIET).inputs)
    assert torch.equal(stream.draw(0, 0.0).inputs, undisturbed.draw(0, 0.0).inputs)


@pytest.mark.parametrize("refine_steps", [0, 1])
@pytest.mark.parametrize("count", [1, 5, 6, 7, 20])
def test_any_number_of_images_can_be_sampled(teacher, count, refine_steps):
    images = untrained(Gdfq(**QUICK | {"refine_steps": refine_steps}), teacher).sample(count, Seed(0), **QUIET)
    assert images.inputs.shape == (count, *teacher.input.shape)
    assert images.labels.tolist() == [index % 3 for index in range(count)]
    assert images.inputs.is_contiguous()
    assert len(images.inputs.flatten(1).unique(dim=0)) == count


def test_a_sampled_image_shows_the_class_of_its_label(teacher):
    stream = untrained(Gdfq(**QUICK, conditioning="norms"), teacher)
    made = []
    make = stream.make
    stream.make = lambda labels, random: made.append((labels, images := make(labels, random))) or images
    images = stream.sample(8, Seed(0), **QUIET)
    labels, inputs = torch.cat([part for part, _ in made]), torch.cat([part for _, part in made])
    for image, label in zip(images.inputs, images.labels, strict=True):
        (place,) = [index for index, other in enumerate(inputs) if torch.equal(image, other)]
        assert labels[place] == label


def loss_of(stream, images):
    with torch.no_grad():
        return sum(stream.judge(images.inputs, images.labels, 0, torch.Generator().manual_seed(0))[0].values()).item()


@pytest.mark.parametrize("seed", [0, 1])
def test_refined_images_are_better_by_what_refinement_asks_for_and_leave_the_generator_alone(method, teacher, seed):
    plain, refined = (replace(method, refine_steps=steps) for steps in (0, 30))
    stream, same_stream = stream_of(plain, teacher, seed=seed), stream_of(refined, teacher, seed=seed)
    before, images = same_stream.state(), same_stream.sample(6, Seed(3), **QUIET)
    assert same(before, same_stream.state())
    assert loss_of(same_stream, images) < 0.8 * loss_of(stream, stream.sample(6, Seed(3), **QUIET))
    low, high = teacher.input.bounds(images.inputs)
    assert bool(((images.inputs >= low) & (images.inputs <= high)).all())
    assert torch.equal(images.inputs, same_stream.sample(6, Seed(3), **QUIET).inputs)


@pytest.mark.parametrize(
    ("count", "expected"),
    [(13, [(5, 0), (4, 5), (4, 9)]), (6, [(6, 0)]), (7, [(4, 0), (3, 4)])],
)
def test_batches_that_are_refined_together_are_as_even_as_can_be(teacher, count, expected):
    stream, sizes = untrained(Gdfq(**QUICK | {"refine_steps": 1}), teacher), []
    judge = stream.judge
    stream.judge = lambda inputs, *rest: sizes.append((len(inputs), rest[1])) or judge(inputs, *rest)
    stream.sample(count, Seed(0), **QUIET)
    assert sizes == expected


def test_a_restored_stream_goes_on_with_identical_batches(method, teacher):
    stream = stream_of(method, teacher)
    stream.draw(0, 0.0)
    state = stream.state()
    # A copy: what comes now does not change it.
    batches = [stream.draw(number, number / 8) for number in range(1, 5)]
    for _ in range(2):
        fresh = untrained(method, teacher)
        fresh.restore(state)
        for number, batch in enumerate(batches, 1):
            again = fresh.draw(number, number / 8)
            for name in ("inputs", "labels", "logits"):
                assert torch.equal(getattr(batch, name), getattr(again, name))
        assert same(stream.state(), fresh.state())


def test_an_interrupted_warm_up_goes_on_to_the_same_bytes(method, teacher, tmp_path):
    class Interrupted(Exception):
        pass

    class Impatient(Folder):
        def save(self, name, part):
            super().save(name, part)
            if part["trained"] == 2:
                raise Interrupted

    whole = stream_of(method, teacher, Folder(tmp_path / "whole"))
    with pytest.raises(Interrupted):
        stream_of(method, teacher, Impatient(tmp_path / "parts"))
    resumed = stream_of(method, teacher, Folder(tmp_path / "parts"))
    assert same(whole.state(), resumed.state())
    files = [(tmp_path / name / "generator.safetensors").read_bytes() for name in ("whole", "parts")]
    assert files[0] == files[1]


def test_a_finished_warm_up_is_not_trained_again(method, teacher, tmp_path):
    first = stream_of(method, teacher, Folder(tmp_path))
    again = stream_of(method, teacher, Folder(tmp_path))
    assert again.trained == QUICK["steps"] and same(first.state(), again.state())


def test_a_warm_up_that_diverges_says_so_and_leaves_the_last_good_checkpoint(method, teacher, tmp_path):
    diverging = replace(method, learning_rate=1e30)
    with pytest.raises(DivergenceError) as caught:
        stream_of(diverging, teacher, Folder(tmp_path))
    terms = untrained(diverging, teacher).terms(0, torch.Generator().manual_seed(0))[0]
    nans = ", ".join(f"{term} nan" for term in terms)
    # The first step is taken with weights as they were made, the second is lost.
    assert str(caught.value) == (
        f"{name_of(method)}: generator: the loss must stay finite, got nan at step 1 ({nans}); "
        "try --set synthesis.learning_rate=2.5e+29 with another --output"
    )
    saved = Folder(tmp_path).load("generator")
    assert saved["trained"].item() == 1
    assert all(torch.isfinite(value).all() for value in saved.values())


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch": 1}, "batch must be at least 2, got 1"),
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be at least 1e-09, got 0.0"),
        ({"class_weight": -1.0}, "class_weight must be at least 0, got -1.0"),
    ],
)
def test_a_setting_out_of_range_is_refused(settings, expected):
    with pytest.raises(ConfigError) as caught:
        Gdfq(**settings)
    assert str(caught.value) == expected


def test_an_unknown_conditioning_is_refused():
    method = Gdfq()
    # The type checker of these tests would catch it first.
    object.__setattr__(method, "conditioning", "norm")
    with pytest.raises(ConfigError) as caught:
        method.__post_init__()
    assert str(caught.value) == "conditioning must be one of auto, norms, embedding, got 'norm'"


def test_a_network_without_batch_norm_is_refused(method):
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4 * 14 * 14, 3))
    contract = InputContract(channels=3, height=16, width=16, mean=(0.5,) * 3, std=(0.25,) * 3)
    with pytest.raises(ModelError) as caught:
        stream_of(method, Teacher(capture(module, contract.shape), contract, 3, "plain"))
    assert str(caught.value).startswith(f"plain: {name_of(method)} needs a batch norm with running statistics")
