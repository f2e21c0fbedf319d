"""Images are offered to the display as they are finished, and cost nothing where nobody looks."""

import numpy as np
import pytest
import torch

from reverie.checkpoints import Folder, Forgetful
from reverie.images.contract import InputContract
from reverie.images.store import thumbnails
from reverie.progress import Silent
from reverie.randomness import Seed
from reverie.stages import as_teacher
from reverie.synthesis.gdfq import Gdfq
from reverie.synthesis.zeroq import ZeroQ


class Watching(Silent):
    """Looks at every offer, or at none."""

    def __init__(self, looks=True):
        self.looks, self.offers, self.seen, self.notes = looks, 0, [], []

    def show(self, pictures):
        self.offers += 1
        if self.looks:
            self.seen.append(pictures())

    def advance(self, amount=1, note="", *, skipped=False):
        self.notes.append(note)


@pytest.fixture(scope="module")
def teacher(tiny_cnn):
    return as_teacher(tiny_cnn())


def test_every_finished_batch_is_offered_as_it_will_be_saved(teacher, tmp_path):
    method, watching = ZeroQ(steps=11, batch=6), Watching()
    images = method(teacher, 10, seed=Seed(0), checkpoints=Folder(tmp_path), progress=watching)
    assert [len(part) for part in watching.seen] == [6, 4]
    pixels = teacher.input.denormalize(images.inputs).clamp(0, 1)
    expected = (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(np.concatenate(watching.seen), expected)
    # The loss of every tenth step, of each batch.
    assert [index for index, note in enumerate(watching.notes) if note] == [0, 10, 11, 21]
    assert all(note.startswith("loss ") for note in watching.notes if note)
    # And again, of what a checkpoint held.
    again = Watching()
    method(teacher, 10, seed=Seed(0), checkpoints=Folder(tmp_path), progress=again)
    assert np.array_equal(np.concatenate(again.seen), expected)


def test_refined_images_of_a_generator_are_offered(teacher):
    watching = Watching()
    Gdfq(steps=2, batch=6, refine_steps=2)(teacher, 6, seed=Seed(0), checkpoints=Forgetful(), progress=watching)
    assert [part.shape for part in watching.seen] == [(6, 16, 16, 3)]


def test_who_does_not_look_gets_the_same_images(teacher):
    watching = Watching(looks=False)
    make = ZeroQ(steps=3, batch=8)
    images = make(teacher, 8, seed=Seed(0), checkpoints=Forgetful(), progress=watching)
    seen = make(teacher, 8, seed=Seed(0), checkpoints=Forgetful(), progress=Watching())
    assert watching.offers == 1 and torch.equal(images.inputs, seen.inputs)


def test_thumbnails_have_three_channels_and_a_limit():
    contract = InputContract(channels=1, height=2, width=3, mean=(0.0,), std=(1.0,))
    inputs = torch.linspace(-0.5, 1.5, 30).view(5, 1, 2, 3)
    shown = thumbnails(inputs, contract, limit=4)
    assert shown.shape == (4, 2, 3, 3) and shown.dtype == np.uint8
    expected = (inputs[:4, 0].clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    for channel in range(3):
        assert np.array_equal(shown[..., channel], expected)
