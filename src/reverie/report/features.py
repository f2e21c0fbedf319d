"""How images differ from real ones where the network looks: a plane of deep features, and deviations by layer.

    plane         x_i is what the last layer reads of image i. The plane is spanned by the two directions in which all sets
                  together vary most, each set weighing the same: the eigenvectors of
                  mean over sets of (mean over its images of (x_i - o)(x_i - o)^T), o the mean of the sets' means,
                  each turned so that its largest entry is positive.
    deviations    (m_l^i - mu_l)/sigma_l for every image i and channel of a batch norm l: how far the mean over an
                  image alone is from the one remembered, in running standard deviations. Images optimized one by
                  one towards the statistics pile up at 0; real ones spread.
    off, spread   of deviations: mean over channels of |their mean over images|, and of their standard deviation over images

Reference: Zhang et al. 2021, arXiv:2103.01049 (DSG), for homogenization, which the deviations show.

Not here: t-SNE, whose picture depends on its settings; what the pictures look like (`plots.py`, `charts.py`).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from reverie.graph.batch_norm import Observed
from reverie.graph.operators import arguments, layers
from reverie.graph.taps import tap
from reverie.images import Images, evenly
from reverie.synthesis import Teacher

_BATCH = 64
# More points hide each other, and every one costs a pass through the network.
_MOST_IMAGES = 1000
_MOST_LAYERS = 12
BINS = 60

# By set and by batch norm: the deviation of every image and channel.
Deviations = Mapping[str, Mapping[str, Float[Tensor, "count _"]]]


@dataclass(frozen=True)
class Plane:
    """Sets of images on one plane.

    Args:
        points: By set.
        classes: Of the images: their labels, or what the network takes them for.
        shares: Of the variance, along the first axis and the second.
    """

    points: dict[str, Float[Tensor, "_ 2"]]
    classes: dict[str, Int[Tensor, " _"]]
    shares: tuple[float, float]


def plane(teacher: Teacher, sets: Mapping[str, Images]) -> Plane:
    """The deep features of all sets on the plane where they vary most; of large sets of a thousand images, evenly spaced.

    Args:
        sets: By name, not empty each.
    """
    read = {name: _features(teacher, images) for name, images in sets.items()}
    projected, shares = principal_plane([features for features, _ in read.values()])
    return Plane(dict(zip(read, projected, strict=True)), {name: classes for name, (_, classes) in read.items()}, shares)


def principal_plane(sets: list[Float[Tensor, "_ width"]]) -> tuple[list[Float[Tensor, "_ 2"]], tuple[float, float]]:
    """Every set on the plane where all together vary most, each weighing the same, and the shares of variance of its axes."""
    origin = torch.stack([features.mean(dim=0) for features in sets]).mean(dim=0)
    centred = [features - origin for features in sets]
    _, scales, directions = torch.linalg.svd(torch.cat([rows / len(rows) ** 0.5 for rows in centred]), full_matrices=False)
    # One image, or one feature, has one direction: nothing varies along the other.
    lacking = max(0, 2 - len(directions))
    plane, scales = F.pad(directions[:2], (0, 0, 0, lacking)), F.pad(scales, (0, lacking))
    # The sign of a direction is arbitrary.
    plane = plane * plane.gather(1, plane.abs().argmax(dim=1, keepdim=True)).sign()
    shares = scales.square() / scales.square().sum().clamp(min=1e-30)
    return [rows @ plane.T for rows in centred], (float(shares[0]), float(shares[1]))


def deviations(teacher: Teacher, sets: Mapping[str, Images]) -> dict[str, dict[str, Float[Tensor, "count _"]]]:
    """By set and batch norm, in execution order: (m - mu)/sigma of every image (of at most a thousand) and channel; empty without batch norms."""
    norms = teacher.batch_norms
    found: dict[str, dict[str, Tensor]] = {}
    if not norms:
        return found
    observed = Observed(teacher.graph, "sample")
    for name, images in sets.items():
        parts: dict[str, list[Tensor]] = {norm.name: [] for norm in norms}
        with torch.no_grad():
            for part in torch.split(images.evenly(_MOST_IMAGES).inputs, _BATCH):
                means = observed(part.to(teacher.device))[1].mean
                for norm, mean in zip(norms, means, strict=True):
                    parts[norm.name].append(((mean - norm.mean) / norm.deviation).cpu())
        found[name] = {norm: torch.cat(rows) for norm, rows in parts.items()}
    return found


def off_and_spread(part: Float[Tensor, "count _"]) -> tuple[float, float]:
    """How far the whole set is from 0 and its images from each other, averaged over the channels of a layer.

    Noise is alike from image to image and yet off; its histogram is wide because every channel is off by something else.
    """
    return float(part.mean(dim=0).abs().mean()), float(part.std(dim=0, correction=0).mean())


def shown_layers(found: Deviations) -> list[str]:
    """The batch norms whose histograms are drawn: at most twelve, spread over the depth."""
    names = list(next(iter(found.values()), {}))
    return [names[index] for index in evenly(len(names), _MOST_LAYERS).tolist()] if names else []


def histograms(found: Deviations, norm: str) -> tuple[float, dict[str, Float[Tensor, " bins"]]]:
    """Of one batch norm: the end of the bins, which begin at its negative, and each set's shares; what lies outside is in the outermost bins."""
    parts = {name: layers[norm].flatten() for name, layers in found.items()}
    # quantile takes no more than 16 million values; so many evenly spaced tell as much.
    reach = max(1e-6, *(float(part[:: max(1, len(part) // 2**20)].abs().quantile(0.99)) for part in parts.values()))
    edges = torch.linspace(-reach, reach, BINS + 1)
    counts = {name: torch.histogram(part.clamp(-reach, reach), edges).hist for name, part in parts.items()}
    return reach, {name: count / count.sum() for name, count in counts.items()}


def _features(teacher: Teacher, images: Images) -> tuple[Float[Tensor, "count width"], Int[Tensor, " count"]]:
    """What the last layer reads of the images shown, and their classes: the labels, or what the teacher takes them for."""
    last = arguments(layers(teacher.graph)[-1])["input"].name
    logits = next(node for node in teacher.graph.graph.nodes if node.op == "output").args[0].name
    tapped = tap(teacher.graph, [last, logits])
    shown, rows, classes = images.evenly(_MOST_IMAGES), [], []
    with torch.no_grad():
        for part in torch.split(shown.inputs, _BATCH):
            values = tapped(part.to(teacher.device))
            rows.append(values[last].flatten(1).cpu())
            classes.append(values[logits].argmax(dim=1).cpu())
    return torch.cat(rows), torch.cat(classes) if shown.labels is None else shown.labels.cpu()
