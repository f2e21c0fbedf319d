"""Batch norms put back behind folded convolutions: they change nothing, go away without a trace, and give synthesis what it lost."""

import pytest
import torch
from torch import nn

from reverie.checkpoints import Forgetful
from reverie.graph.batch_norm import Observed, batch_norms
from reverie.graph.capture import capture
from reverie.graph.fold import fold_batch_norms
from reverie.graph.unfold import count_folded, folded_convolutions, unfold
from reverie.progress import Silent
from reverie.randomness import Seed
from reverie.stages import with_capsule
from reverie.synthesis import Teacher
from reverie.synthesis._capsule import capsule_of
from reverie.synthesis.zeroq import ZeroQ


@pytest.fixture(scope="module")
def network(tiny_cnn):
    return tiny_cnn()


@pytest.fixture(scope="module")
def folded(network):
    """The small trained network as an exporter leaves it."""
    return fold_batch_norms(capture(network.module, network.input.shape))


@pytest.fixture(scope="module")
def teacher(network, folded):
    return Teacher(folded, network.input, network.classes, "folded", "fingerprint")


def test_what_is_put_back_changes_nothing_and_goes_away_without_a_trace(network, folded):
    generator = torch.Generator().manual_seed(0)
    channels = [8, 16, 16]
    told = (
        [torch.randn(n, generator=generator) for n in channels],
        [torch.rand(n, generator=generator) + 0.1 for n in channels],
    )
    x = network.held_out().inputs[:20]
    for statistics in (None, told):
        unfolded = unfold(folded, statistics)
        assert [norm.tensor for norm in batch_norms(unfolded)] == [node.name for node in folded_convolutions(folded)]
        torch.testing.assert_close(unfolded(x), folded(x), rtol=1e-5, atol=1e-5)
        again = fold_batch_norms(unfolded)
        assert again.code == folded.code
        assert torch.equal(again(x), folded(x))
    remembered = batch_norms(unfolded)
    assert all(torch.equal(norm.mean, mean) for norm, mean in zip(remembered, told[0], strict=True))
    assert all(torch.equal(norm.variance, variance) for norm, variance in zip(remembered, told[1], strict=True))
    assert not batch_norms(folded)


@pytest.mark.parametrize(
    ("module", "count"),
    [
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3)), 2),
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3, bias=False)), 0),
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.PReLU(2), nn.Conv2d(2, 2, 3)), 2),
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 3)), 0),
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2), nn.Conv2d(2, 2, 3)), 0),
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.LayerNorm((2, 6, 6)), nn.Conv2d(2, 2, 3)), 0),
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(2), nn.LayerNorm(36)), 0),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), 0),
    ],
)
def test_folded_convolutions_are_those_with_a_bias_where_nothing_normalizes(module, count):
    assert count_folded(module) == count
    assert len(folded_convolutions(capture(module, (1, 8, 8)))) == count


def test_a_capsule_tells_what_the_outputs_of_the_convolutions_are_like(network, folded, teacher):
    images = network.held_out()
    # As many of each class, so that its weight is that of each image.
    chosen = torch.cat([(images.labels == label).nonzero()[:50, 0] for label in range(3)])
    few = type(images)(inputs=images.inputs[chosen], labels=images.labels[chosen])
    means, variances = capsule_of(teacher, few).overall()
    _, measured = Observed(unfold(folded))(few.inputs)
    for ours, theirs in zip((*means, *variances), (*measured.mean, *measured.variance), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_images_match_what_the_capsule_tells(network, teacher):
    """With the statistics back, ZeroQ's images come closer to the real ones' than its start is, and than to another's."""
    import reverie

    recipe = reverie.read_recipe("zeroq", {"images": 16})
    told = with_capsule(teacher, recipe, None, capsule_of(teacher, network.held_out()))
    made = {}
    for steps in (1, 60):
        method = ZeroQ(steps=steps)
        images = method(told, 16, seed=Seed(0), checkpoints=Forgetful(), progress=Silent())
        _, seen = Observed(told.graph)(images.inputs)
        made[steps] = sum(
            float((((mean - norm.mean) / norm.deviation) ** 2).mean())
            for mean, norm in zip(seen.mean, told.batch_norms, strict=True)
        )
    assert made[60] < 0.3 * made[1]
