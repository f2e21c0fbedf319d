"""Small images joined to whole ones, side by side and one below the other, such as four of half the side.

What a network computes near the border of an image is not what it computes inside, because of its padding: of the 4 x 4 positions that
MobileNetV2's last layers have at 112 px, 12 are at a border, of the 7 x 7 at 224 px 24. A mosaic has the borders of a whole image.
"""

import torch

from reverie.images import Images
from reverie.randomness import Seed

# How often every image is seen, each time beside others.
_TIMES = 2


def mosaic_count(images: int, tiles: int) -> int:
    """How many mosaics of `tiles` x `tiles` show each of `images` images twice; rounded up, where a few are seen once more."""
    return -(-_TIMES * images // tiles**2)


def join(images: Images, tiles: int, seed: Seed) -> Images:
    """Mosaics of `tiles` x `tiles` of the images, in random places, each mirrored or not.

    Args:
        images: At least one.
        tiles: Along either side.

    Returns:
        `mosaic_count` of them, `tiles` times as high and wide. They show several images each, so that they have no labels, and the
        teacher's answers to them are not known.
    """
    count, channels, height, width = images.inputs.shape
    mosaics, generator = mosaic_count(count, tiles), seed.generator()
    places = mosaics * tiles**2
    # Every round shows all images once, in an order of its own.
    order = torch.rand(-(-places // count), count, generator=generator).argsort(dim=1).flatten()[:places]
    mirrored = torch.rand(places, 1, 1, 1, generator=generator) < 0.5
    shown = images.inputs[order]
    grid = torch.where(mirrored, shown.flip(3), shown).view(mosaics, tiles, tiles, channels, height, width)
    joined = grid.permute(0, 3, 1, 4, 2, 5).reshape(mosaics, channels, tiles * height, tiles * width)
    return Images(inputs=joined, sources=images.sources[:1] * mosaics, provenance=images.provenance)
