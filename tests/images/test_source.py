"""Sources give batches by their number: every image in turn, and what is known about it."""

import pytest
import torch

from reverie.images import Images
from reverie.images.augment import Augmentation, augment
from reverie.images.source import Augmented, Batch, Mixed, Shuffled, Source
from reverie.randomness import Seed

CPU = torch.device("cpu")


def numbered(count, *, labels=True, logits=True):
    """Image i is full of the number i, has label i mod 3 and logits i, i, i."""
    numbers = torch.arange(count, dtype=torch.float32)
    return Images(
        inputs=numbers.view(-1, 1, 1, 1).expand(count, 1, 2, 2).contiguous(),
        labels=torch.arange(count) % 3 if labels else None,
        logits=numbers.view(-1, 1).expand(count, 3).contiguous() if logits else None,
    )


def shuffled(images, batch=4, seed=0, **settings):
    return Shuffled(images, batch, seed=Seed(seed), device=CPU, **settings)


def shown(batch):
    return batch.inputs[:, 0, 0, 0].long().tolist()


@pytest.mark.parametrize(("count", "batch"), [(10, 4), (12, 4), (3, 7), (1, 5), (7, 7), (5, 1)])
def test_every_image_comes_once_before_any_comes_again(count, batch):
    source = shuffled(numbered(count), batch)
    batches = [shown(source.draw(number, 0.0)) for number in range(40)]
    assert all(len(part) == batch for part in batches)
    stream = [image for part in batches for image in part]
    for start in range(0, len(stream) - count + 1, count):
        assert sorted(stream[start : start + count]) == list(range(count))


def test_each_round_has_an_order_of_its_own():
    source = shuffled(numbered(20), 20)
    orders = {tuple(shown(source.draw(number, 0.0))) for number in range(10)}
    assert len(orders) == 10


@pytest.mark.parametrize("augmentation", [None, Augmentation(0.3)])
def test_a_batch_depends_on_its_number_and_the_seed_alone(augmentation):
    images = Images(inputs=torch.randn(10, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    first, second = (shuffled(images, augmentation=augmentation) for _ in range(2))
    for number in range(5):
        first.draw(number, 0.0)
    assert torch.equal(first.draw(7, 0.9).inputs, second.draw(7, 0.1).inputs)
    assert torch.equal(first.draw(2, 0.0).inputs, second.draw(2, 0.0).inputs)
    assert not torch.equal(second.draw(2, 0.0).inputs, shuffled(images, seed=1, augmentation=augmentation).draw(2, 0.0).inputs)


def test_what_is_known_of_an_image_comes_with_it():
    batch = shuffled(numbered(10)).draw(3, 0.0)
    numbers = torch.tensor(shown(batch))
    assert torch.equal(batch.labels, numbers % 3)
    assert torch.equal(batch.logits[:, 0], numbers.float())
    bare = shuffled(numbered(10, labels=False, logits=False)).draw(3, 0.0)
    assert bare.labels is None and bare.logits is None


def test_an_augmented_image_keeps_its_label_but_not_its_logits():
    batch = shuffled(numbered(10), augmentation=Augmentation(0.5)).draw(3, 0.0)
    # A crop of an image of one colour is of that colour.
    assert torch.equal(batch.labels, batch.inputs[:, 0, 0, 0].round().long() % 3)
    assert batch.logits is None


def test_an_image_is_augmented_anew_each_time():
    images = Images(inputs=torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    source = shuffled(images, 3, augmentation=Augmentation(0.3))
    seen = torch.cat([source.draw(number, 0.0).inputs for number in range(3)])
    assert len(seen.flatten(1).unique(dim=0)) == 9


def test_an_augmented_source_gives_the_batches_of_its_source_each_image_augmented():
    images = Images(inputs=torch.randn(10, 1, 8, 8, generator=torch.Generator().manual_seed(0)), labels=torch.arange(10))
    plain, settings = shuffled(images), Augmentation(0.3)
    source = Augmented(plain, settings, seed=Seed(1))
    for number in (0, 5):
        expected, batch = plain.draw(number, 0.0), source.draw(number, 0.0)
        assert torch.equal(batch.labels, expected.labels) and batch.logits is None
        assert torch.equal(batch.inputs, augment(expected.inputs, settings, Seed(1).at(number).generator()))


def test_an_augmented_sources_state_is_that_of_its_source():
    source, other = (Augmented(Counter(), Augmentation(1.0, flip=False), seed=Seed(0)) for _ in range(2))
    source.draw(0, 0.0)
    other.restore(source.state())
    assert other.state() == {"drawn": torch.tensor(1)}


def test_a_mixed_batch_is_both_sources_behind_each_other():
    first, second = shuffled(numbered(5)), shuffled(numbered(9), 2, seed=1)
    both = Mixed(first, second).draw(3, 0.0)
    assert shown(both) == shown(first.draw(3, 0.0)) + shown(second.draw(3, 0.0))
    assert torch.equal(both.labels, both.inputs[:, 0, 0, 0].long() % 3)
    assert torch.equal(both.logits[:, 0], both.inputs[:, 0, 0, 0])


@pytest.mark.parametrize("known", [(True, False), (False, True), (False, False), (True, True)])
@pytest.mark.parametrize("what", ["labels", "logits"])
def test_a_mixed_batch_knows_what_both_sources_know(known, what):
    parts = [shuffled(numbered(5, **{what: value})) for value in known]
    batch = Mixed(*parts).draw(0, 0.0)
    assert (getattr(batch, what) is not None) == all(known)
    assert getattr(batch, "logits" if what == "labels" else "labels") is not None


class Counter:
    """A source with a state: its batches show how many came before."""

    def __init__(self):
        self.drawn = 0

    def draw(self, number, progress):
        self.drawn += 1
        return Batch(torch.full((1, 1, 2, 2), float(self.drawn)), None, None)

    def state(self):
        return {"drawn": torch.tensor(self.drawn)}

    def restore(self, state):
        self.drawn = int(state["drawn"])


def test_the_state_of_a_mixed_source_is_that_of_both():
    def mixed():
        return Mixed(Counter(), Mixed(shuffled(numbered(3), 1), Counter()))

    source = mixed()
    source.draw(0, 0.0)
    state = source.state()
    assert set(state) == {"0.drawn", "1.1.drawn"}
    expected = source.draw(1, 0.0).inputs
    other = mixed()
    other.restore(state)
    assert torch.equal(other.draw(1, 0.0).inputs, expected)
    # Both counters have drawn once before.
    assert expected[:, 0, 0, 0].tolist()[::2] == [2, 2]


def test_all_of_them_are_sources():
    assert isinstance(shuffled(numbered(3)), Source)
    assert isinstance(Augmented(Counter(), Augmentation(0.5), seed=Seed(0)), Source)
    assert isinstance(Mixed(shuffled(numbered(3)), Counter()), Source)
