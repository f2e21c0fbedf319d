"""The network that ships in the package, and its held-out images."""

import sys

import pytest
import torch

from reverie import models
from reverie.errors import ModelError
from reverie.models.embedded import DIGITS_WEIGHTS, digits_images


def test_digits_is_small_and_in_evaluation_mode():
    network = models.load("embedded:digits")
    assert sum(parameter.numel() for parameter in network.module.parameters()) == 43_654
    assert DIGITS_WEIGHTS.stat().st_size < 200_000
    assert not any(module.training for module in network.module.modules())


def test_digits_reads_597_of_599_held_out_images():
    network = models.load("embedded:digits")
    assert network.held_out is not None
    images = network.held_out()
    with torch.no_grad():
        right = network.module(images.inputs).argmax(1) == images.labels
    assert len(images) == 599
    # One image may sit on the fence between two processors' roundings.
    assert abs(int(right.sum()) - 597) <= 1


def test_the_two_parts_share_no_image_and_have_every_class():
    train, held_out = digits_images("train"), digits_images("held out")
    assert len(train) + len(held_out) == len({*train.sources, *held_out.sources}) == 1797
    assert held_out.labels is not None
    assert held_out.labels.unique().tolist() == list(range(10))


def test_images_are_normalized_pixels():
    contract = models.load("embedded:digits").input
    pixels = contract.denormalize(digits_images("train").inputs)
    assert pixels.shape[1:] == (1, 32, 32)
    assert -1e-6 <= float(pixels.min()) < 1e-3
    assert 1 - 1e-3 < float(pixels.max()) <= 1 + 1e-6


def test_a_missing_scikit_learn_names_the_extra(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "sklearn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Absent("sklearn"), *sys.meta_path])
    with pytest.raises(ModelError) as caught:
        digits_images("held out")
    assert str(caught.value) == (
        "embedded:digits: images: scikit-learn must be installed, got no module 'sklearn'; "
        "install Reverie with its extra 'digits': pip install -e '.[digits]' in its folder"
    )


class Absent:
    """A finder that acts as if one package were not installed."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=self.package)
