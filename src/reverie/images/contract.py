"""What a network expects of an image: shape, size arithmetic and normalization.

Pixels are scaled to 0..1, then `input = (pixel - mean) / std` per channel.
"""

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from reverie.errors import ConfigError

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]


@dataclass(frozen=True, kw_only=True)
class InputContract:
    """What the network expects of an image: its shape, and how pixels become inputs.

    Pixels are scaled to 0..1 first, then `(pixel - mean) / std` per channel. A network that takes raw 0..255 pixels has
    mean 0 and std 1/255. Images from files are resized so that their shorter side is `resize`, then centre-cropped.

    Args:
        channels, height, width: Shape of one input.
        mean, std: Per channel, of pixels in 0..1.
        resize: Shorter side in pixels before the centre crop; None means `max(height, width)` (no margin).
        interpolation: How an image file is resized.
    """

    channels: int
    height: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: int | None = None
    interpolation: Interpolation = "bilinear"

    def __post_init__(self) -> None:
        for name in ("channels", "height", "width"):
            if getattr(self, name) < 1:
                raise ConfigError(f"InputContract.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("mean", "std"):
            if len(getattr(self, name)) != self.channels:
                raise ConfigError(
                    f"InputContract.{name} must have one value per channel ({self.channels}), got {len(getattr(self, name))}"
                )
        if self.interpolation not in get_args(Interpolation):
            choices = ", ".join(get_args(Interpolation))
            raise ConfigError(f"InputContract.interpolation must be one of {choices}, got {self.interpolation!r}")
        if self.resize is not None and self.resize < 1:
            raise ConfigError(f"InputContract.resize must be at least 1, got {self.resize}")
        # Of pixels in 0..1; those of 0..255 are the usual slip, and would make a network that sees nothing.
        if max(self.mean) > 2:
            raise ConfigError(
                f"InputContract.mean must be of pixels in 0..1, got {max(self.mean):g}; divide mean and std by 255"
            )
        if min(self.std) <= 0:
            raise ConfigError(f"InputContract.std must be positive, got {min(self.std)}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return self.channels, self.height, self.width

    def scaled(self, factor: float) -> "InputContract":
        """The same for images with `factor` times the height and width, in whole pixels."""
        sides = {name: max(round(getattr(self, name) * factor), 1) for name in ("height", "width")}
        return replace(self, **sides, resize=None if self.resize is None else max(round(self.resize * factor), 1))

    def normalize(self, pixels: Float[Tensor, "*batch channels height width"]) -> Float[Tensor, "*batch channels height width"]:
        """Network inputs from pixels in 0..1."""
        return (pixels - self._column(self.mean, pixels)) / self._column(self.std, pixels)

    def denormalize(
        self, inputs: Float[Tensor, "*batch channels height width"]
    ) -> Float[Tensor, "*batch channels height width"]:
        """Pixels, 0..1 where the inputs are valid images; not clamped."""
        return inputs * self._column(self.std, inputs) + self._column(self.mean, inputs)

    def bounds(self, like: Tensor) -> tuple[Float[Tensor, "channels 1 1"], Float[Tensor, "channels 1 1"]]:
        """The inputs that black (0) and white (1) pixels become, per channel, on the device of `like`."""
        mean, std = self._column(self.mean, like), self._column(self.std, like)
        return -mean / std, (1 - mean) / std

    @staticmethod
    def _column(values: tuple[float, ...], like: Tensor) -> Float[Tensor, "channels 1 1"]:
        return torch.tensor(values, dtype=like.dtype, device=like.device).view(-1, 1, 1)
