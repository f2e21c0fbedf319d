"""What every synthesis method must do."""

import copy
from dataclasses import replace

import pytest
import torch

from reverie import plugins, synthesis
from reverie.checkpoints import Folder, Forgetful
from reverie.graph.capture import capture
from reverie.progress import Silent
from reverie.randomness import Seed
from reverie.synthesis import Streaming, Teacher
from reverie.synthesis._capsule import capsule_of
from reverie.synthesis._pixels import BatchMethod

NAMES = plugins.names(synthesis)
# Settings that make a method quick; a method without them is quick by itself.
QUICK = {"steps": 3, "refine_steps": 2, "batch": 4, "class_batch": 4, "latent": 8, "width": 8}


@pytest.fixture(params=NAMES)
def method(request):
    kind = plugins.load(synthesis, request.param)
    return kind(**{name: value for name, value in QUICK.items() if name in kind.__dataclass_fields__})


@pytest.fixture(scope="module")
def teacher(tiny_cnn):
    network = tiny_cnn()
    alone = Teacher(capture(network.module, network.input.shape), network.input, network.classes, network.name)
    # For the methods that need one; the others do not look at it.
    return replace(alone, capsule=capsule_of(alone, network.held_out()))


def made(method, teacher, seed=0, count=6, checkpoints=None):
    return method(teacher, count, seed=Seed(seed), checkpoints=checkpoints or Forgetful(), progress=Silent())


def test_images_have_the_networks_shape_and_are_valid(method, teacher):
    images = made(method, teacher)
    assert images.inputs.shape == (6, *teacher.input.shape) and images.inputs.dtype == torch.float32
    low, high = teacher.input.bounds(images.inputs)
    assert torch.isfinite(images.inputs).all()
    assert (images.inputs >= low).all() and (images.inputs <= high).all()
    assert len(images.sources) == 6


def test_the_same_seed_gives_the_same_images_and_another_seed_others(method, teacher):
    assert torch.equal(made(method, teacher).inputs, made(method, teacher).inputs)
    assert not torch.equal(made(method, teacher).inputs, made(method, teacher, seed=1).inputs)


def test_images_of_one_set_differ_from_each_other(method, teacher):
    flat = made(method, teacher).inputs.flatten(1)
    assert (torch.cdist(flat, flat) + torch.eye(6) > 0).all()


def test_the_teacher_is_left_as_it_was(method, teacher):
    before, capsule = copy.deepcopy(teacher.graph.state_dict()), copy.deepcopy(teacher.capsule)
    made(method, teacher)
    after = teacher.graph.state_dict()
    pairs = ((capsule.mean, teacher.capsule.mean), (capsule.variance, teacher.capsule.variance))
    assert all(torch.equal(old, new) for olds, news in pairs for old, new in zip(olds, news, strict=True))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not teacher.graph.training
    assert not any(tensor.requires_grad for tensor in after.values())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in teacher.graph.modules())


def test_no_global_random_number_is_drawn(method, teacher):
    before = torch.random.get_rng_state()
    made(method, teacher)
    assert torch.equal(before, torch.random.get_rng_state())


def test_an_interrupted_run_goes_on_to_the_same_images(method, teacher, tmp_path):
    class Interrupted(Exception):
        pass

    class Impatient(Folder):
        def save(self, name, part):
            super().save(name, part)
            raise Interrupted

    whole, interruptions, resumed = made(method, teacher), 0, None
    # Again and again, after each state that is kept, which is each step.
    while resumed is None:
        try:
            resumed = made(method, teacher, checkpoints=Impatient(tmp_path))
        except Interrupted:
            interruptions += 1
    assert torch.equal(whole.inputs, resumed.inputs)
    assert interruptions >= (
        2 * QUICK["steps"] if isinstance(method, BatchMethod) else 1 if isinstance(method, Streaming) else 0
    )
