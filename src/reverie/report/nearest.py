"""How near synthetic images come to real ones: whether any of them is a copy of what was read.

For a synthetic image x, the real image y with the least distance, in two spaces:

    pixels      sqrt(mean over values of (x - y)^2) of network inputs, behind the network's preprocessing
    features    |f(x) - f(y)|, with f what the last layer reads

A distance says little by itself, so beside it stands the same from each real image to its nearest other real one (`among_real`). A
synthetic image much nearer to a real one than real ones are to each other deserves a look; the nearest pairs are shown.

Not here: a proof. An image may tell about a person without being near any photograph in these two spaces.
"""

import math
import statistics
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reverie.graph.operators import arguments, layers
from reverie.graph.taps import tap
from reverie.images import Images
from reverie.images.contract import InputContract
from reverie.images.store import contact_sheet
from reverie.synthesis import Teacher

SPACES = ("pixels", "features")
# Of each set at most so many images, and so many values, evenly spaced.
_MOST, _MOST_VALUES = 1024, 2**26
# Distances held at once: 16 MB.
_PAIRS = 2**22
_SHOWN = 8


def describe(teacher: Teacher, synthetic: Images, real: Images) -> dict[str, Any]:
    """The nearest real image of each synthetic one, by their numbers in the two sets, and how far it is.

    Args:
        synthetic, real: In the size of the teacher's contract.

    Returns:
        How many of each set were `compared`, and for each space `nearest` (a list of [number of the synthetic image, number of the real
        one, distance], nearest first), their `median`, and `among_real`, the median and the least of the distances from a real image to
        its nearest other one; None for a single real image.
    """
    chosen = [_few(images) for images in (synthetic, real)]
    found: dict[str, Any] = {
        "compared": {"synthetic": len(chosen[0]), "real": len(chosen[1])},
        "of": {"synthetic": len(synthetic), "real": len(real)},
    }
    sets = [images.inputs[rows] for images, rows in zip((synthetic, real), chosen, strict=True)]
    for space in SPACES:
        ours, theirs = ((_pixels if space == "pixels" else _features)(teacher, inputs) for inputs in sets)
        rows, distances = _nearest(ours, theirs)
        pairs = [
            [int(chosen[0][index]), int(chosen[1][rows[index]]), float(distances[index])]
            for index in distances.argsort(stable=True).tolist()
        ]
        among = _nearest(theirs, theirs, others=True)[1] if len(theirs) > 1 else None
        found[space] = {
            "nearest": pairs,
            "median": statistics.median(pair[2] for pair in pairs),
            "among_real": None if among is None else {"median": float(among.median()), "least": float(among.min())},
        }
    return found


def show(path: Path, found: dict[str, Any], synthetic: Images, real: Images, contract: InputContract) -> None:
    """Writes the nearest pairs as the PNG `path`: each synthetic image with its real one to the right of it.

    The first two rows are the nearest pairs of pixels, the last two those of features.
    """
    pairs = [pair for space in SPACES for pair in found[space]["nearest"][:_SHOWN]]
    pictures = torch.stack([part for first, second, _ in pairs for part in (synthetic.inputs[first], real.inputs[second])])
    contact_sheet(Images(inputs=pictures), contract, path, columns=8)


def _few(images: Images) -> Int[Tensor, " chosen"]:
    """The numbers of the images that are compared."""
    most = max(1, min(len(images), _MOST, _MOST_VALUES // images.inputs[0].numel()))
    return torch.arange(most) * len(images) // most


def _pixels(teacher: Teacher, inputs: Tensor) -> Float[Tensor, "count values"]:
    return inputs.flatten(1) / math.sqrt(inputs[0].numel())


@torch.no_grad()
def _features(teacher: Teacher, inputs: Tensor, batch: int = 64) -> Float[Tensor, "count width"]:
    last = arguments(layers(teacher.graph)[-1])["input"].name
    read = tap(teacher.graph, [last])
    found: list[Tensor] = [read(part.to(teacher.device))[last].flatten(1).cpu() for part in torch.split(inputs, batch)]
    return torch.cat(found)


def _nearest(
    first: Float[Tensor, "count width"], second: Float[Tensor, "others width"], *, others: bool = False
) -> tuple[Int[Tensor, " count"], Float[Tensor, " count"]]:
    """For each row of `first` the number of the nearest row of `second` (with `others`: not itself), and its distance."""
    size, found = max(1, _PAIRS // len(second)), []
    for start, part in zip(range(0, len(first), size), torch.split(first, size), strict=True):
        distances = torch.cdist(part, second)
        if others:
            distances.diagonal(start).fill_(torch.inf)
        found.append(distances.argmin(dim=1))
    rows = torch.cat(found)
    # Distances of many rows come from products, which are not exact for what is near.
    exact: Tensor = (first - second[rows]).norm(dim=1)
    return rows, exact
