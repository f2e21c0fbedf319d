"""Small pictures of images in one file, and what the network takes each for, for the report's contact sheet."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor
from torch.nn import functional

from reverie.files import atomic_write
from reverie.images import Images
from reverie.images.contract import InputContract
from reverie.report.separation import REAL
from reverie.synthesis import Teacher

# With more classes there is no room for a row each.
_MOST_ROWS = 20
_OF_A_CLASS = 8
_OF_ALL = 72
_LARGEST = 112
_COLUMNS = 12
# Noise that is compressed without loss takes three bytes a pixel.
_LARGEST_LOSSLESS = 64
_ANSWERS = 3


def draw(teacher: Teacher, sets: Mapping[str, Images], folder: Path) -> dict[str, Any]:
    """Writes one picture with a thumbnail of each image shown into `folder`, and gives what is known of each.

    Args:
        sets: In the size of the teacher's contract; of each as many images are shown. The one called "real" comes last.

    Returns:
        `file`, `size` (width and height of a thumbnail, pixels), `columns`, `rows`, `by_class` (whether classes have a row each), and `items`, in the
        order of the picture: `set`, `class` (that was asked for, or that a real image has; None without labels) and `top` (pairs of class
        and probability, the network's first answers).
    """
    by_class = teacher.classes <= _MOST_ROWS
    pictures, items = [], []
    for name in sorted(sets, key=lambda name: name == REAL):
        images = sets[name]
        known = images.logits.argmax(dim=1) if images.logits is not None and images.labels is None else images.labels
        if known is None:
            known = teacher.logits(images.inputs).argmax(dim=1)
        chosen = _first_of_each(known, _OF_A_CLASS) if by_class else _evenly_sorted(known, _OF_ALL)
        inputs = images.inputs[chosen]
        logits = teacher.logits(inputs) if images.logits is None else images.logits[chosen]
        likely = logits.softmax(dim=1).topk(min(_ANSWERS, teacher.classes), dim=1)
        pictures.append(_small(inputs, teacher.input))
        for index, (classes, shares) in enumerate(zip(likely.indices.tolist(), likely.values.tolist(), strict=True)):
            label = None if images.labels is None else int(images.labels[chosen[index]])
            top = [[number, round(share, 4)] for number, share in zip(classes, shares, strict=True)]
            items.append({"set": name, "class": label, "top": top})
    sheet = _sheet(torch.cat(pictures))
    height, width = pictures[0].shape[2:]
    lossless = max(height, width) <= _LARGEST_LOSSLESS
    file = folder / ("thumbnails.png" if lossless else "thumbnails.jpg")
    buffer = io.BytesIO()
    Image.fromarray(sheet.numpy()).save(buffer, *(("png",) if lossless else ("jpeg",)), quality=85)
    atomic_write(file, buffer.getvalue())
    columns, rows = min(_COLUMNS, len(items)), -(-len(items) // _COLUMNS)
    return {"file": file.name, "size": [width, height], "columns": columns, "rows": rows, "by_class": by_class, "items": items}


def _first_of_each(classes: Int[Tensor, " count"], most: int) -> Int[Tensor, " chosen"]:
    """The first `most` images of each class, by class."""
    order = classes.argsort(stable=True)
    ranked = classes[order]
    # The place within a class: how far behind the first of it.
    place = torch.arange(len(ranked)) - torch.searchsorted(ranked, ranked)
    return order[place < most]


def _evenly_sorted(classes: Int[Tensor, " count"], most: int) -> Int[Tensor, " chosen"]:
    """At most so many images, evenly spaced over the classes."""
    order = classes.argsort(stable=True)
    return order[torch.linspace(0, len(order) - 1, min(len(order), most)).round().long()]


def _small(inputs: Float[Tensor, "count channels height width"], contract: InputContract) -> Float[Tensor, "count 3 high wide"]:
    """Pixels, 0 to 1, in colour, no larger than a thumbnail."""
    pixels = contract.denormalize(inputs.detach().cpu()).clamp(0, 1)
    colours = pixels if pixels.shape[1] == 3 else pixels[:, :1].expand(-1, 3, -1, -1)
    scale = _LARGEST / max(colours.shape[2:])
    if scale >= 1:
        return colours
    size = tuple(max(1, round(side * scale)) for side in colours.shape[2:])
    return functional.interpolate(colours, size, mode="bilinear", antialias=True).clamp(0, 1)


def _sheet(pictures: Float[Tensor, "count 3 height width"]) -> Tensor:
    """All side by side, row by row: bytes, (rows * height, columns * width, 3)."""
    count, _, height, width = pictures.shape
    columns, rows = min(_COLUMNS, count), -(-count // _COLUMNS)
    padded = functional.pad(pictures, (0, 0, 0, 0, 0, 0, 0, rows * columns - count))
    grid = padded.view(rows, columns, 3, height, width).permute(0, 3, 1, 4, 2)
    return (grid.reshape(rows * height, columns * width, 3) * 255).round().to(torch.uint8)
