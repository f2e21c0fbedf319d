"""Dead leaves: things of all sizes, each before others, each of one colour and texture. What photographs have beyond their spectrum.

Leaves fall one on the other until the ground is covered. Their radii r have the density r^-3, under which a picture looks alike at every
scale; they are ellipses and rectangles, shaded from side to side. Hence edges, flat regions and occlusions, which noise with the spectrum
of a photograph has none of, and which channels of the first layers agree about: that they do is what rounding is fitted to.

Reference: Lee, Mumford, Huang 2001, "Occlusion models for natural images", IJCV 41. No image is read here. Numbers were chosen so that
moments at the inputs of MobileNetV2's first batch norms resemble those of photographs (docs/log.md).
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from reverie.synthesis._photographs import natural_noise

# Radii, in pixels and in shares of the longer side.
_SMALLEST, _SMALLEST_SHARE, _LARGEST_SHARE = 8.0, 1 / 8, 0.6
# Leaves for each square of the smallest radius.
_DENSITY = 0.2
_RECTANGLES = 0.4
# Deviation of the logarithm of a leaf's height to its width, from the square root.
_ASPECT = 0.5
# Variance of colours that is one of images; deviations: of colour from grey, of brightness from one end of a leaf to its middle.
_PALETTE, _CHROMA, _SHADE = 0.3, 0.25, 0.5
# Of the texture: mean and deviation of the logarithm of its amplitude.
_TEXTURE, _ROUGHNESS = 0.25, 0.8
# Deviation of the logarithm of an image's contrast.
_CONTRAST = 0.3


def dead_leaves(
    noise: Float[Tensor, "count channels height width"], random: torch.Generator
) -> Float[Tensor, "count channels height width"]:
    """Images in which leaves lie on each other; each channel has mean 0 and deviation 1 over all of them.

    Args:
        noise: White; becomes the texture.
        random: On the CPU; everything else is drawn from it.
    """
    count, channels, height, width = noise.shape
    side = max(height, width)
    smallest = min(_SMALLEST, _SMALLEST_SHARE * side)
    leaves = math.ceil(_DENSITY * height * width / smallest**2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(count, *shape, generator=random).to(noise)

    def uniform() -> Tensor:
        return torch.rand(count, leaves, generator=random).to(noise)

    def coloured(*shape: int) -> Tensor:
        return normal(*shape, 1) + _CHROMA * normal(*shape, channels)

    colours = math.sqrt(_PALETTE) * coloured(1) + math.sqrt(1 - _PALETTE) * coloured(leaves)
    ends = smallest**-2, (_LARGEST_SHARE * side) ** -2
    radius = (ends[0] - uniform() * (ends[0] - ends[1])).rsqrt()
    # The first one is the ground.
    radius[:, 0] = math.inf
    middle = torch.stack([uniform() * height, uniform() * width])
    angle, aspect, rectangle = math.pi * uniform(), torch.exp(_ASPECT * normal(leaves)), uniform() < _RECTANGLES
    # A pixel's place along the two axes of a leaf, in radii, is linear in its row and column.
    axes = (
        torch.stack([angle.sin(), angle.cos()]) / (radius * aspect),
        torch.stack([angle.cos(), -angle.sin()]) * aspect / radius,
    )
    rows = torch.arange(height, device=noise.device, dtype=noise.dtype)[:, None]
    columns = torch.arange(width, device=noise.device, dtype=noise.dtype)

    def place(slope: Tensor, leaf: int) -> Tensor:
        down, right = (part[:, leaf, None, None] for part in slope)
        placed: Tensor = down * (rows - middle[0, :, leaf, None, None]) + right * (columns - middle[1, :, leaf, None, None])
        return placed

    top = torch.zeros(count, height, width, dtype=torch.int64, device=noise.device)
    for leaf in range(1, leaves):
        first, second = (place(slope, leaf).square_() for slope in axes)
        distance = torch.where(rectangle[:, leaf, None, None], torch.maximum(first, second), first + second)
        top.masked_fill_(distance < 1, leaf)

    def seen(values: Float[Tensor, "count leaves"]) -> Float[Tensor, "count height width"]:
        return values.gather(1, top.flatten(1)).view(count, height, width)

    slopes = _SHADE * torch.stack([normal(leaves), normal(leaves)]) / radius
    offset = (slopes * middle).sum(dim=0)
    shade = seen(slopes[0]) * rows + seen(slopes[1]) * columns - seen(offset)
    bare = (
        torch.stack([seen(colours[..., channel]) for channel in range(channels)], dim=1)
        + shade.clamp(-3 * _SHADE, 3 * _SHADE)[:, None]
    )
    # A lens blurs edges a little.
    bare = functional.avg_pool2d(functional.pad(bare, (1, 1, 1, 1), mode="replicate"), 2, stride=1)
    bare = functional.avg_pool2d(bare, 2, stride=1)
    amplitude = seen(_TEXTURE * torch.exp(_ROUGHNESS * normal(leaves)))
    images = (bare + amplitude[:, None] * natural_noise(noise)) * torch.exp(_CONTRAST * normal(1, 1, 1))
    deviation, mean = torch.std_mean(images, dim=(0, 2, 3), keepdim=True, correction=0)
    leaved: Tensor = (images - mean) / deviation
    return leaved
