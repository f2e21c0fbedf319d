"""How far apart a set of images keeps its classes, and how far it spreads within them, measured where the network looks.

An image i is its own statistics at the inputs of the deep batch norms l = start..L-1, start = max(0, int((L+1)/2) - 2), in
units of what these remember: with c_l channels and D deep batch norms it is the vector

    x_i = [ (m_l^i - mu_l)/sigma_l,  s_l^i/sigma_l - 1 ]_l,   each part divided by sqrt(D c_l)

so that a squared distance is a mean over deep batch norms of means over channels, and wide layers do not rule. With n_k
images of class k and their mean C_k:

    inter_class_separation    mean over pairs of classes of |C_k - C_j|^2
    intra_class_spread        sum over i of |x_i - C_k(i)|^2  /  sum over k of (n_k - 1)
    separation_ratio          the first over the second
    centre_distance_to_real   mean over classes that both have of |C_k - C_k^real|^2
    coverage                  share of real images with a synthetic one no farther than their own k-th nearest real one

References: deep batch norms and class centres from Zhong et al. 2022, arXiv:2109.04186 (FDDA); coverage from Naeem et al.
2020, arXiv:2002.09797, with its k = 5.

Not here: a correction for small sets. The centre of n images is off by spread/n, so classes drawn at random still have a
`separation_ratio` of about 2/n: compare sets with about as many images of each class.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reverie.graph.batch_norm import Observed
from reverie.images import Images
from reverie.synthesis import Teacher
from reverie.synthesis._losses import deep_layers

REAL = "real"
MEASURES = ("inter_class_separation", "intra_class_spread", "separation_ratio", "centre_distance_to_real", "coverage")
_NEIGHBOURS = 5
# Distances held at once: 16 MB.
_PAIRS = 2**22


def describe(teacher: Teacher, sets: dict[str, Images], batch: int = 64) -> dict[str, dict[str, float | None]]:
    """The measures of this module for each set, by its name; None where one is not defined.

    Args:
        sets: Not empty each. The one called "real", if any, is what the others are compared with.
        batch: Images that the network sees at once.
    """
    if not teacher.batch_norms:
        return {name: dict.fromkeys(MEASURES) for name in sets}
    reference = deep_statistics(teacher, sets[REAL], batch) if REAL in sets else None
    described = {}
    for name, images in sets.items():
        if reference is not None and name == REAL:
            described[name] = _measures(*reference) | {"centre_distance_to_real": None, "coverage": None}
            continue
        features, labels = deep_statistics(teacher, images, batch)
        found = _measures(features, labels) | {"centre_distance_to_real": None, "coverage": None}
        if reference is not None:
            found["coverage"] = coverage(reference[0], features)
            if sets[REAL].labels is not None:
                found["centre_distance_to_real"] = centre_distance(features, labels, *reference)
        described[name] = found
    return described


@torch.no_grad()
def deep_statistics(
    teacher: Teacher, images: Images, batch: int = 64
) -> tuple[Float[Tensor, "count features"], Int[Tensor, " count"]]:
    """The vector x_i of every image, and its class: the label, or what the teacher takes it for. Both on the CPU."""
    start = deep_layers(len(teacher.batch_norms)).start
    deep = teacher.batch_norms[start:]
    observed = Observed(teacher.graph, "sample")
    rows, classes = [], []
    for part in torch.split(images.inputs, batch):
        logits, statistics = observed(part.to(teacher.device))
        columns = []
        for norm, mean, variance in zip(deep, statistics.mean[start:], statistics.variance[start:], strict=True):
            weight = (len(deep) * len(norm.mean)) ** -0.5
            columns += [weight * (mean - norm.mean) / norm.deviation, weight * (variance.sqrt() / norm.deviation - 1)]
        rows.append(torch.cat(columns, dim=1).cpu())
        classes.append(logits.argmax(dim=1).cpu())
    return torch.cat(rows), torch.cat(classes) if images.labels is None else images.labels.cpu()


def class_centres(
    features: Float[Tensor, "count features"], labels: Int[Tensor, " count"]
) -> tuple[Int[Tensor, " classes"], Float[Tensor, "classes features"]]:
    """The classes that occur, ascending, and the mean of each."""
    classes, index, counts = torch.unique(labels, return_inverse=True, return_counts=True)
    sums = features.new_zeros(len(classes), features.shape[1]).index_add_(0, index, features)
    return classes, sums / counts[:, None]


def inter_class_separation(features: Float[Tensor, "count features"], labels: Int[Tensor, " count"]) -> float | None:
    """Mean squared distance of the centres of two different classes; None for fewer than two classes."""
    classes, centres = class_centres(features, labels)
    if len(classes) < 2:
        return None
    # The mean over pairs, without the pairs: twice the unbiased variance.
    return 2 * float((centres - centres.mean(dim=0)).square().sum()) / (len(classes) - 1)


def intra_class_spread(features: Float[Tensor, "count features"], labels: Int[Tensor, " count"]) -> float | None:
    """Mean squared distance of images to their class's centre, unbiased; None if no class has two images."""
    classes, centres = class_centres(features, labels)
    free = len(labels) - len(classes)
    if free == 0:
        return None
    return float((features - centres[torch.searchsorted(classes, labels)]).square().sum()) / free


def centre_distance(
    features: Float[Tensor, "count features"],
    labels: Int[Tensor, " count"],
    real: Float[Tensor, "others features"],
    real_labels: Int[Tensor, " others"],
) -> float | None:
    """Mean squared distance of a class's centre to that of its real images; None if no class is in both sets."""
    classes, centres = class_centres(features, labels)
    real_classes, real_centres = class_centres(real, real_labels)
    here, there = torch.isin(classes, real_classes), torch.isin(real_classes, classes)
    if not here.any():
        return None
    return float((centres[here] - real_centres[there]).square().sum(dim=1).mean())


def coverage(
    real: Float[Tensor, "others features"], synthetic: Float[Tensor, "count features"], neighbours: int = _NEIGHBOURS
) -> float | None:
    """Share of real images whose nearest synthetic one is no farther than their own k-th nearest real one; None if only one.

    Args:
        neighbours: k; one less than there are real images, if these are fewer.
    """
    if len(real) < 2:
        return None
    # The distances come from products, which are exact only near the origin.
    origin = real.mean(dim=0)
    real, synthetic = real - origin, synthetic - origin
    covered = 0
    for part in torch.split(real, max(1, _PAIRS // max(len(real), len(synthetic)))):
        # One more, for an image is its own nearest.
        radius = torch.cdist(part, real).kthvalue(min(neighbours, len(real) - 1) + 1, dim=1).values
        covered += int((torch.cdist(part, synthetic).amin(dim=1) <= radius).sum())
    return covered / len(real)


def _measures(features: Float[Tensor, "count features"], labels: Int[Tensor, " count"]) -> dict[str, float | None]:
    """What a set says without another to compare it with."""
    separation, spread = inter_class_separation(features, labels), intra_class_spread(features, labels)
    return {
        "inter_class_separation": separation,
        "intra_class_spread": spread,
        "separation_ratio": separation / spread if separation is not None and spread else None,
    }
