"""How good a set of synthetic images is, measured: fidelity to what the network remembers, and diversity.

batch_norm_distance   mean over batch norms and channels of ((m - mu)/sigma)^2 + (s/sigma - 1)^2 over the whole set: 0 is a
                      perfect match, real training images are near 0, noise is not
class_histogram       how many images the teacher takes for each class
class_coverage        entropy of that histogram over its largest possible value, 0 to 1
confidence            mean largest softmax value
entropy               mean entropy of the teacher's answer, in nats
feature_similarity    mean cosine of pairs of images in what the last layer reads, centred on the set: near 0 is diverse
"""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from reverie.graph.batch_norm import Observed, Statistics
from reverie.graph.operators import arguments, layers
from reverie.graph.taps import tap
from reverie.images import Images
from reverie.synthesis import Teacher
from reverie.synthesis._losses import matching_loss


@torch.no_grad()
def describe(teacher: Teacher, images: Images, batch: int = 64) -> dict[str, Any]:
    """The measures of this module for `images`; `batch_norm_distance` is None for a network without batch norms."""
    norms = teacher.batch_norms
    observed, last = Observed(teacher.graph, "batch"), arguments(layers(teacher.graph)[-1])["input"].name
    features = tap(teacher.graph, [last])
    answers, read, sizes, parts = [], [], [], []
    for part in torch.split(images.inputs.to(teacher.device), batch):
        logits, statistics = observed(part)
        answers.append(logits.cpu())
        parts.append(statistics)
        sizes.append(len(part))
        read.append(features(part)[last].flatten(1).cpu())
    probabilities = torch.cat(answers).softmax(dim=1)
    histogram = probabilities.argmax(dim=1).bincount(minlength=teacher.classes)
    return {
        "batch_norm_distance": float(matching_loss(_pooled(parts, sizes), norms)) if norms else None,
        "class_histogram": histogram.tolist(),
        "class_coverage": float(_entropy(histogram / len(images))) / math.log(min(len(images), teacher.classes))
        if min(len(images), teacher.classes) > 1
        else 1.0,
        "confidence": float(probabilities.amax(dim=1).mean()),
        "entropy": float(_entropy(probabilities).mean()),
        "feature_similarity": _similarity(torch.cat(read)),
    }


def _pooled(parts: list[Statistics], sizes: list[int]) -> Statistics:
    """Statistics of the whole set from those of its batches: mean of means, law of total variance."""
    weight = torch.tensor(sizes, dtype=torch.float64) / sum(sizes)
    means, variances = [], []
    for index in range(len(parts[0].mean)):
        mean = torch.stack([part.mean[index].double() for part in parts])
        variance = torch.stack([part.variance[index].double() for part in parts])
        column = weight.to(mean.device)[:, None]
        pooled = (column * mean).sum(0)
        means.append(pooled.float())
        variances.append((column * (variance + (mean - pooled).square())).sum(0).float())
    return Statistics(tuple(means), tuple(variances))


def _entropy(probabilities: Float[Tensor, "*shape classes"]) -> Float[Tensor, "*shape"]:
    found: Tensor = torch.special.entr(probabilities).sum(dim=-1)
    return found


def _similarity(features: Float[Tensor, "count width"]) -> float | None:
    """Mean cosine over all pairs; None for a single image."""
    count = features.shape[0]
    if count < 2:
        return None
    # Not centred on the set: centred vectors add up to zero, so their mean cosine would be -1/(count - 1) for every set.
    unit = functional.normalize(features, dim=1)
    total = float(unit.sum(dim=0).square().sum() - unit.square().sum())
    return total / (count * (count - 1))
