"""Random resized crop and horizontal flip, each image of a batch its own, as one sampling of the batch.

What torchvision's `RandomResizedCrop` and `RandomHorizontalFlip` draw for one image (area uniform in `scale`, aspect
ratio log-uniform in 3/4 to 4/3, place uniform), for all images at once, differentiable, bilinear. A crop that would not
fit gets the nearest ratio that does, where torchvision draws again. Ratios are those of the image: 1 is its own shape.
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
    """

    smallest: float
    flip: bool = True


def augment(
    inputs: Float[Tensor, "batch channels height width"], settings: Augmentation, generator: torch.Generator
) -> Float[Tensor, "batch channels height width"]:
    """Every image of `inputs` cropped, resized to the full size and flipped by itself."""
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
