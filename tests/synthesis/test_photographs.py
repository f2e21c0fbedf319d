"""Noise with the spectrum and the colours of photographs."""

import pytest
import torch
from torch import nn

from reverie.checkpoints import Forgetful
from reverie.errors import ConfigError
from reverie.graph.capture import capture
from reverie.models import InputContract
from reverie.progress import Silent
from reverie.randomness import Seed
from reverie.report.fidelity import describe
from reverie.synthesis import Streaming, Teacher
from reverie.synthesis._photographs import natural_noise, to_inputs
from reverie.synthesis.dsg import Dsg
from reverie.synthesis.dsg_generator import DsgGenerator
from reverie.synthesis.gdfq import Gdfq
from reverie.synthesis.genie import Genie
from reverie.synthesis.zeroq import ZeroQ


def white(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("down", "right"), [(1, 0), (0, 1), (1, 1)])
@pytest.mark.parametrize("channels", [1, 3])
def test_amplitude_is_the_inverse_of_frequency(down, right, channels):
    amplitude = torch.fft.fft2(natural_noise(white(400, channels, 48, 32))).abs().square().mean(dim=(0, 1)).sqrt()
    # 2 and 12 cycles in 16 pixels along an axis that is read, so a sixth.
    low, high = (amplitude[3 * cycles * down, 2 * cycles * right] for cycles in (1, 6))
    assert (low / high).item() == pytest.approx(6, rel=0.15)


def test_channels_nearly_agree_and_have_mean_0_and_deviation_1():
    images = natural_noise(white(64, 3, 32, 32))
    assert torch.allclose(images.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(images.std(dim=(0, 2, 3), correction=0), torch.ones(3), atol=1e-4)
    correlation = torch.corrcoef(images.transpose(0, 1).flatten(1))
    assert correlation[0, 1].item() == pytest.approx(0.87, abs=0.02)


def test_images_differ_in_brightness_as_photographs_do():
    # The mean of an image of white noise is always next to zero: 1 / sqrt(32 * 32).
    assert natural_noise(white(64, 1, 32, 32)).mean(dim=(1, 2, 3)).std() > 5 / 32


@pytest.mark.parametrize(
    ("mean", "std", "gain", "offset"),
    [
        # Constants that come from data stay; others give a mean of 0.45 and a deviation of 0.25 in pixels.
        (0.4, 0.2, 1, 0),
        (0.5, 0.5, 0.5, -0.1),
        (0.0, 1 / 255, 63.75, 114.75),
    ],
)
def test_to_inputs_by_hand(mean, std, gain, offset):
    found = to_inputs(InputContract(channels=1, height=4, width=4, mean=(mean,), std=(std,)))
    assert [part.item() for part in found] == pytest.approx([gain, offset], rel=1e-5)


def test_a_natural_start_matches_sooner_than_a_white_one(tiny_cnn):
    network = tiny_cnn()
    teacher = Teacher(capture(network.module, network.input.shape), network.input, network.classes, network.name)
    distances = {}
    for start in ("natural", "white"):
        method = ZeroQ(steps=15, start=start)
        sets = (method(teacher, 32, seed=Seed(seed), checkpoints=Forgetful(), progress=Silent()) for seed in range(2))
        distances[start] = sum(describe(teacher, images)["batch_norm_distance"] for images in sets)
    assert distances["natural"] < 0.7 * distances["white"]


def test_an_unknown_start_is_refused():
    method = ZeroQ()
    # The type checker of these tests would catch it first.
    object.__setattr__(method, "start", "grey")
    with pytest.raises(ConfigError) as caught:
        method.__post_init__()
    assert str(caught.value) == "start must be one of natural, white, leaves, got 'grey'"


class Raw(nn.Module):
    """A network that takes pixels of 0 to 255 and normalizes them itself."""

    def __init__(self, module, mean, deviation):
        super().__init__()
        self.module, self.mean, self.deviation = module, mean, deviation

    def forward(self, x):
        return self.module((x / 255 - self.mean) / self.deviation)


METHODS = {
    "zeroq": ZeroQ(steps=8, batch=16, class_weight=0.1, variation_weight=0.1),
    "zeroq, white": ZeroQ(steps=8, batch=16, start="white"),
    "zeroq, leaves": ZeroQ(steps=8, batch=16, start="leaves"),
    "dsg": Dsg(steps=8, batch=16),
    "genie": Genie(steps=4, batch=16),
    "gdfq": Gdfq(steps=2, batch=16, refine_steps=4, latent=8, width=8),
    "dsg_generator": DsgGenerator(steps=2, batch=16, refine_steps=4, latent=8, width=8),
}


@pytest.mark.parametrize("name", METHODS)
def test_the_units_of_the_inputs_do_not_matter(tiny_cnn, name):
    network = tiny_cnn()
    data, raw = (
        InputContract(channels=3, height=16, width=16, mean=(mean,) * 3, std=(std,) * 3)
        for mean, std in ((0.45, 0.25), (0.0, 1 / 255))
    )
    pixels = {}
    for contract, module in ((data, network.module), (raw, Raw(network.module, 0.45, 0.25).eval())):
        teacher = Teacher(capture(module, contract.shape), contract, network.classes, network.name)
        kept = {"checkpoints": Forgetful(), "progress": Silent()}
        method = METHODS[name]
        if isinstance(method, Streaming):
            images = method.stream(teacher, seed=Seed(0), **kept).sample(16, Seed(1), **kept)
        else:
            images = method(teacher, 16, seed=Seed(0), **kept)
        pixels[contract] = contract.denormalize(images.inputs)
    # A step of Adam may fall to the other side where a gradient is next to nothing.
    far = (pixels[data] - pixels[raw]).abs()
    assert far.mean() < 1e-3 and (far < 1e-2).float().mean() > 0.97
    assert pixels[raw].std() > 0.1
