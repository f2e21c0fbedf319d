"""Which classes a quantized network lost, and which it takes for one another more than before."""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

# With more classes only the worst are listed.
MOST_LISTED = 20
_PAIRS = 12


def describe(labels: Int[Tensor, " n"], full: Int[Tensor, " n"], ours: Int[Tensor, " n"], classes: int) -> dict[str, Any]:
    """What changed between two models' answers to the same labelled images.

    Args:
        full, ours: The classes that full precision and the quantized network give.
        classes: That they know.

    Returns:
        `classes`: of each, or of the at most `MOST_LISTED` that lost most, `class`, `images` and the shares that `full_precision` and `quantized`
        read right; `pairs`: what became more frequent, most first: `label`, `answer`, and how many images `full_precision` and `quantized` so
        answered; and for few classes `change`: a row a label, how many images more (or fewer) get each answer.
    """
    images = labels.bincount(minlength=classes)
    right = [labels[answers == labels].bincount(minlength=classes) for answers in (full, ours)]
    lost = torch.where(images > 0, (right[0] - right[1]) / images.clamp(min=1), -2.0)
    order = torch.arange(classes)
    if classes > MOST_LISTED:
        order = lost.argsort(descending=True, stable=True)[: min(MOST_LISTED, int((lost > 0).sum()))]
    before, after = (_pairs(labels, answers, classes) for answers in (full, ours))
    keys = torch.unique(torch.cat([before[0], after[0]]))
    more = [(_count(after, keys) - _count(before, keys)), _count(before, keys), _count(after, keys)]
    wrong = (keys // classes != keys % classes) & (more[0] > 0)
    worst = more[0].where(wrong, 0).argsort(descending=True, stable=True)[: min(_PAIRS, int(wrong.sum()))]
    found: dict[str, Any] = {
        "classes": [
            {
                "class": number,
                "images": int(images[number]),
                "full_precision": int(right[0][number]) / int(images[number]),
                "quantized": int(right[1][number]) / int(images[number]),
            }
            for number in order.tolist()
            if images[number]
        ],
        "pairs": [
            {
                "label": int(keys[place]) // classes,
                "answer": int(keys[place]) % classes,
                "full_precision": int(more[1][place]),
                "quantized": int(more[2][place]),
            }
            for place in worst.tolist()
        ],
        "lost": int((lost > 0).sum()),
        "gained": int(((lost < 0) & (images > 0)).sum()),
    }
    if classes <= MOST_LISTED:
        change = torch.zeros(classes * classes, dtype=torch.int64)
        change[keys] = more[0]
        found["change"] = change.view(classes, classes).tolist()
    return found


def _pairs(labels: Int[Tensor, " n"], answers: Int[Tensor, " n"], classes: int) -> tuple[Tensor, Tensor]:
    """The pairs of label and answer that occur, each as one number, ascending, and how often."""
    keys, counts = torch.unique(labels * classes + answers, return_counts=True)
    return keys, counts


def _count(found: tuple[Tensor, Tensor], keys: Int[Tensor, " keys"]) -> Int[Tensor, " keys"]:
    """How often each of `keys` occurs."""
    place = torch.searchsorted(found[0], keys).clamp(max=len(found[0]) - 1)
    return found[1][place].where(found[0][place] == keys, 0)
