"""Random resized crop and horizontal flip, change of colours, and patches of other images; each image of a batch its own.

Crops and flips are one sampling of the batch: what torchvision's `RandomResizedCrop` and `RandomHorizontalFlip` draw for one image
(area uniform in `scale`, aspect ratio log-uniform in 3/4 to 4/3, place uniform), for all images at once, differentiable,
bilinear. A crop that would not fit gets the nearest ratio that does, where torchvision draws again. Ratios are those of the
image: 1 is its own shape.

Colours change by a gain of the whole image and a shift of each channel, in units of what the batch deviates by, so that
it does not matter what the network's inputs are scaled to. Patches are CutMix's (Yun et al. 2019) without its labels, which are
not needed where a teacher answers: a rectangle of a quarter to three quarters of either side shows another image of the batch.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Augmentation:
    """How strong.

    Args:
        smallest: The smallest share of the image's area that a crop may show, up to 1; 1 crops nothing.
        flip: Whether half of the images are mirrored.
        colour: Gains are 1 - colour to 1 + colour, shifts at most colour deviations.
        cut_mix: The share of images with a patch.
    """

    smallest: float
    flip: bool = True
    colour: float = 0.0
    cut_mix: float = 0.0


def augment(
    inputs: Float[Tensor, "batch channels height width"], settings: Augmentation, generator: torch.Generator
) -> Float[Tensor, "batch channels height width"]:
    """Every image of `inputs` changed by itself, in the order of the settings."""
    outputs = _crop(inputs, settings, generator)
    if settings.colour:
        outputs = _recolour(outputs, settings.colour, generator)
    return _cut_mix(outputs, settings.cut_mix, generator) if settings.cut_mix else outputs


def _crop(inputs: Tensor, settings: Augmentation, generator: torch.Generator) -> Tensor:
    count = inputs.shape[0]
    area, ratio, across, down, mirror = torch.rand(5, count, generator=generator)
    area = settings.smallest + (1 - settings.smallest) * area
    # Beyond these bounds a crop of this area is longer than the image; at area 1 only ratio 1 is left.
    ratio = torch.exp((2 * ratio - 1) * math.log(4 / 3)).clamp(area, 1 / area)
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    sign = torch.where(mirror < 0.5, -1.0, 1.0) if settings.flip else torch.ones(count)
    zero = torch.zeros(count)
    # In coordinates from -1 to 1: a window of half-width `width` around a centre that keeps it inside.
    rows = [sign * width, zero, (2 * across - 1) * (1 - width), zero, height, (2 * down - 1) * (1 - height)]
    transform = torch.stack(rows, dim=1).view(count, 2, 3).to(inputs)
    grid = functional.affine_grid(transform, list(inputs.shape), align_corners=False)
    return functional.grid_sample(inputs, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _recolour(inputs: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    count, channels = inputs.shape[:2]
    gain, shift = (
        strength * (2 * torch.rand(size, generator=generator).to(inputs) - 1)
        for size in ((count, 1, 1, 1), (count, channels, 1, 1))
    )
    means, deviations = inputs.mean(dim=(2, 3), keepdim=True), inputs.std(dim=(0, 2, 3), keepdim=True)
    return inputs + gain * (inputs - means) + shift * deviations


def _cut_mix(inputs: Tensor, share: float, generator: torch.Generator) -> Tensor:
    count, _, height, width = inputs.shape
    chosen, tall, wide, down, across = torch.rand(5, count, 1, 1, generator=generator).to(inputs.device)
    # Sides of a quarter to three quarters, the patch inside.
    tall, wide = 0.25 + 0.5 * tall, 0.25 + 0.5 * wide
    top, left = down * (1 - tall), across * (1 - wide)
    rows = (torch.arange(height, device=inputs.device).view(-1, 1) + 0.5) / height
    columns = (torch.arange(width, device=inputs.device) + 0.5) / width
    inside = (rows >= top) & (rows < top + tall) & (columns >= left) & (columns < left + wide) & (chosen < share)
    return torch.where(inside.unsqueeze(1), inputs.roll(1, dims=0), inputs)
