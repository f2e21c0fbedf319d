"""Fixtures that several folders of tests share."""

import copy
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jaxtyping
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from reverie.images import Images
from reverie.models import InputContract, Network

# Steady when the machine is busy, and the same sums in the same order everywhere, in the processes that tests start too.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


# Folders whose tests call the functions that have shapes; the others execute whole runs, of which checks take a quarter of the time.
_CHECKED = {"graph", "grid", "images", "models", "observers", "recovery", "rounding", "synthesis"}


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Shapes and types are checked at every call, except in slow tests and in those of whole runs."""
    slow = item.get_closest_marker("slow") is not None
    jaxtyping.config.update("jaxtyping_disable", slow or item.path.parent.name not in _CHECKED)


TINY_INPUT = InputContract(channels=3, height=16, width=16, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
TINY_CLASSES = 3


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real networks and images: `../shared/assets`, or where `REVERIE_ASSETS` points."""
    beside = Path(__file__).parents[2] / "shared" / "assets"
    folder = Path(os.environ.get("REVERIE_ASSETS", beside))
    if not (folder / "MANIFEST.json").is_file():
        pytest.skip(f"no real networks and images in {folder}; set REVERIE_ASSETS to the folder that has them")
    return folder


@pytest.fixture(scope="session")
def tiny_cnn() -> Callable[[], Network]:
    """Makes copies of one trained small CNN (`nn.Sequential` with batch norm); its held-out set has 300 patterns."""
    module = _train_tiny_cnn()

    def make() -> Network:
        return Network(
            name="tiny",
            module=copy.deepcopy(module),
            input=TINY_INPUT,
            classes=TINY_CLASSES,
            held_out=partial(patterns, 300, seed=1),
        )

    return make


def patterns(count: int, *, seed: int) -> Images:
    """Noisy coloured stripes: horizontal, vertical or diagonal; the direction is the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(TINY_CLASSES, (count,), generator=generator)
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    phase = torch.stack([y, x, (x + y) / 2**0.5])[labels]
    frequency, offset = 0.6 + 0.6 * torch.rand(2, count, 1, 1, generator=generator)
    stripes = torch.sin(frequency * phase + 6 * offset).unsqueeze(1)
    colour = 0.1 + 0.2 * torch.rand(count, 3, 1, 1, generator=generator)
    noise = 0.15 * torch.randn(count, 3, 16, 16, generator=generator)
    pixels = (0.5 + colour * stripes + noise).clamp(0, 1)
    return Images(
        inputs=TINY_INPUT.normalize(pixels), labels=labels, sources=("pattern",) * count, provenance={"seed": str(seed)}
    )


def _train_tiny_cnn() -> nn.Sequential:
    images = patterns(1024, seed=0)
    assert images.labels is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(16, TINY_CLASSES),
        )
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        for chosen in torch.randperm(len(images), generator=generator).split(64):
            loss = F.cross_entropy(module(images.inputs[chosen]), images.labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return module.eval()
