"""Dead leaves: edges and flat regions at every scale, which noise with a photograph's spectrum has none of."""

import pytest
import torch
from torch.nn import functional as F

from reverie.synthesis._leaves import dead_leaves
from reverie.synthesis._photographs import natural_noise


def drawn(*shape, seed=0):
    random = torch.Generator().manual_seed(seed)
    return dead_leaves(torch.randn(shape, generator=random), random)


def kurtosis(x):
    x = x - x.mean()
    return (x.pow(4).mean() / x.square().mean().square()).item()


def contrasts(images):
    """Differences of neighbours in brightness, where a third of the pixels are away."""
    grey = images.mean(dim=1)
    return grey[..., 1:] - grey[..., :-1]


@pytest.mark.parametrize("shape", [(64, 3, 32, 32), (16, 1, 96, 64), (4, 3, 112, 112)])
def test_channels_have_mean_0_and_deviation_1(shape):
    images = drawn(*shape)
    assert images.shape == shape
    assert torch.allclose(images.mean(dim=(0, 2, 3)), torch.zeros(shape[1]), atol=1e-4)
    assert torch.allclose(images.std(dim=(0, 2, 3), correction=0), torch.ones(shape[1]), atol=1e-4)


def test_the_same_numbers_give_the_same_images():
    assert torch.equal(drawn(2, 3, 32, 32), drawn(2, 3, 32, 32))
    assert not torch.equal(drawn(2, 3, 32, 32), drawn(2, 3, 32, 32, seed=1))


def test_most_contrasts_are_none_and_few_are_edges_at_every_scale():
    images = drawn(32, 3, 128, 128)
    noise = natural_noise(torch.randn(32, 3, 128, 128, generator=torch.Generator().manual_seed(0)))
    for _ in range(3):
        # Of a normal distribution 3; of photographs 10 and more (Lee, Mumford, Huang 2001).
        assert kurtosis(contrasts(images)) > 6 and kurtosis(contrasts(noise)) < 3.5
        images, noise = F.avg_pool2d(images, 2), F.avg_pool2d(noise, 2)
