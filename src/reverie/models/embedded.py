"""Networks that ship with Reverie: `embedded:digits` works offline, in seconds, with nothing to download.

`digits` reads handwritten digits (scikit-learn's `load_digits`, 8x8 pixels, upsampled to 32x32). It is a small residual
network with the three kinds of block that vision networks are made of: a plain residual block, inverted residual blocks
with a depthwise convolution and ReLU6, and a residual block with a strided projection. It has 43,654 parameters and reads
99.67 % of the 599 held-out digits (597); `tools/train_digits.py` makes it.

It is narrow on purpose, so that low bit widths hurt. Batch norm folded, nearest rounding per channel, activations per
tensor between their extremes, first and last layer at 8 bits: W4A4 keeps 99.33 %, W3A3 87.0 %.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reverie.errors import at, unknown
from reverie.images import Images
from reverie.models import InputContract, Network, _libraries, _weights

DIGITS_WEIGHTS = Path(__file__).with_name("digits.safetensors")
DIGITS_INPUT = InputContract(channels=1, height=32, width=32, mean=(0.3053,), std=(0.3760,))
DIGITS_CLASSES = 10


def load(name: str) -> Network:
    """The network `name` with its trained weights.

    Raises:
        ConfigError: No such network; the message lists the choices.
    """
    if name not in _NETWORKS:
        raise unknown("embedded network", name, _NETWORKS)
    return _NETWORKS[name]()


def names() -> list[str]:
    """All of them."""
    return list(_NETWORKS)


def digits_images(part: Literal["train", "held out"]) -> Images:
    """One part of scikit-learn's digits as inputs of `embedded:digits`, with labels.

    The held-out third is stratified and the same everywhere (seed 0); the weights have never seen it.

    Raises:
        ModelError: scikit-learn is not installed; the message names the extra.
    """
    with at("embedded:digits: images"):
        datasets = _libraries.require("sklearn.datasets", extra="digits", distribution="scikit-learn")
        selection = _libraries.require("sklearn.model_selection", extra="digits", distribution="scikit-learn")
    digits = datasets.load_digits()
    indices = torch.arange(len(digits.target)).numpy()
    train, held_out = selection.train_test_split(indices, test_size=1 / 3, stratify=digits.target, random_state=0)
    chosen = torch.from_numpy(train if part == "train" else held_out)
    pixels = torch.from_numpy(digits.images)[chosen].float().unsqueeze(1) / 16
    size = (DIGITS_INPUT.height, DIGITS_INPUT.width)
    return Images(
        inputs=DIGITS_INPUT.normalize(F.interpolate(pixels, size, mode="bilinear")),
        labels=torch.from_numpy(digits.target)[chosen].long(),
        sources=tuple(f"sklearn digits {index}" for index in chosen.tolist()),
        provenance={"method": "sklearn digits", "part": part},
    )


class DigitsNet(nn.Sequential):
    """The architecture of `embedded:digits`: (n, 1, 32, 32) inputs to (n, 10) logits."""

    def __init__(self) -> None:
        super().__init__(
            _conv_norm(1, 12, kernel=3, stride=2),
            nn.ReLU(),
            _Residual(12, 12, stride=1),
            _InvertedResidual(12, 16, expansion=6, stride=2),
            _InvertedResidual(16, 16, expansion=6, stride=1),
            _InvertedResidual(16, 16, expansion=6, stride=1),
            _Residual(16, 48, stride=2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(48, DIGITS_CLASSES),
        )


class _Residual(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a projection where the shape changes."""

    def __init__(self, inputs: int, outputs: int, *, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _conv_norm(inputs, outputs, kernel=3, stride=stride),
            nn.ReLU(),
            _conv_norm(outputs, outputs, kernel=3),
        )
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else _conv_norm(inputs, outputs, kernel=1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


class _InvertedResidual(nn.Module):
    """MobileNetV2's block: widen, filter each channel alone, narrow again without an activation."""

    def __init__(self, inputs: int, outputs: int, *, expansion: int, stride: int) -> None:
        super().__init__()
        width = inputs * expansion
        self.body = nn.Sequential(
            _conv_norm(inputs, width, kernel=1),
            nn.ReLU6(),
            _conv_norm(width, width, kernel=3, stride=stride, groups=width),
            nn.ReLU6(),
            _conv_norm(width, outputs, kernel=1),
        )
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return x + y if self.residual else y


def _conv_norm(inputs: int, outputs: int, *, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    )


def _digits() -> Network:
    module = DigitsNet()
    _weights.fit_(module, _weights.read(DIGITS_WEIGHTS))
    return Network(
        name="embedded:digits",
        module=module.eval(),
        input=DIGITS_INPUT,
        classes=DIGITS_CLASSES,
        held_out=partial(digits_images, "held out"),
    )


_NETWORKS: dict[str, Callable[[], Network]] = {"digits": _digits}
