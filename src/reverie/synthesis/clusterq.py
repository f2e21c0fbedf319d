"""ClusterQ: deep statistics of each image are pulled to the centroid of its class, which is learned from the images.

    loss = class_weight * CE + statistics_weight * BNS + cluster_weight * K
    K = mean over images i, deep l of [ MSE(m_l^i, mu_l^y + u1) + MSE(v_l^i, s_l^y + u2) ],      y the class asked for
    u1 ~ U(-mean_noise, mean_noise), u2 ~ U(-variance_noise, variance_noise), anew for each image, layer, channel

m_l^i, v_l^i are the statistics of image i alone, BNS is the batch's (`gdfq`'s, relative or absolute). K is absolute.
The centroids mu_l^c, s_l^c are those of
images that the generator makes of class c and the teacher takes for c: set when the first such image comes, from
`centroid_start` of the warm-up on, and moved every `refresh` steps, new = keep * old + (1 - keep) * fresh. A class without a
centroid yet has no part in K. The noise on the centroid is the diversity that keeps a class from shrinking to a point.

Reference: Gao et al. 2022, arXiv:2205.00179. The paper's body was not available; this is the method of its abstract with the
constants of the released code (algorithms 3.2, 3.3): weights 1, 0.1 and 0.9, keep 0.8, noise 0.03 and 0.05, one image a class, a
refresh every 200 steps, crops of 0.8 to 1 and flips for every second batch. What the released code does that we do not
(algorithms 3.4): its centroids are references to the batch norms' buffers, the same for all classes; its noise term has no
gradient; its sum over layers forgets all but the last. So its loss holds no class information; this one's gradient
changes with the label and vanishes at the centroid without noise.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reverie.descent import below, under
from reverie.errors import check_range
from reverie.graph.batch_norm import Level, Statistics
from reverie.images.augment import Augmentation, augment
from reverie.images.source import Batch
from reverie.randomness import Seed
from reverie.synthesis import Teacher
from reverie.synthesis._losses import deep_layers
from reverie.synthesis._stream import GeneratorMethod, GeneratorStream


class Centroids:
    """Mean and variance of every deep layer for every class that has been seen.

    Args:
        classes: How many.
        channels: Of each deep layer.
        keep: Share of the old centroid in the new one.
    """

    def __init__(self, classes: int, channels: list[int], keep: float, device: torch.device) -> None:
        self.seen: Bool[Tensor, " classes"] = torch.zeros(classes, dtype=torch.bool, device=device)
        self.means = [torch.zeros(classes, width, device=device) for width in channels]
        self.variances = [torch.zeros(classes, width, device=device) for width in channels]
        self._keep = keep

    @torch.no_grad()
    def refresh(self, statistics: Statistics, labels: Int[Tensor, " batch"]) -> None:
        """Takes in the per-sample statistics of the deep layers of images whose classes are `labels`."""
        counts = torch.bincount(labels, minlength=len(self.seen)).unsqueeze(1)
        fresh = counts.flatten() > 0
        keep = torch.where(self.seen, self._keep, 0.0)[fresh].unsqueeze(1)
        pairs = ((self.means, statistics.mean), (self.variances, statistics.variance))
        for centre, values in ((a, b) for kept, given in pairs for a, b in zip(kept, given, strict=True)):
            average = torch.zeros_like(centre).index_add_(0, labels, values) / counts.clamp(min=1)
            centre[fresh] = keep * centre[fresh] + (1 - keep) * average[fresh]
        self.seen |= fresh

    def state(self) -> dict[str, Tensor]:
        """A copy of all of it, by name."""
        return {name: value.clone() for name, value in self._named().items()}

    def _named(self) -> dict[str, Tensor]:
        named = {f"mean{index}": value for index, value in enumerate(self.means)}
        named |= {f"variance{index}": value for index, value in enumerate(self.variances)}
        return named | {"seen": self.seen}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Puts `state` back."""
        for name, value in self._named().items():
            value.copy_(state[name])


def cluster_distance(
    statistics: Statistics,
    labels: Int[Tensor, " batch"],
    centroids: Centroids,
    mean_noise: float,
    variance_noise: float,
    random: torch.Generator,
) -> Float[Tensor, ""]:
    """K above, of the per-sample statistics of the deep layers; 0 if no class of the batch has a centroid."""
    known = centroids.seen[labels].float()
    share = known / known.sum().clamp(min=1)
    terms = []
    pairs = ((statistics.mean, centroids.means, mean_noise), (statistics.variance, centroids.variances, variance_noise))
    for values, centres, noise in pairs:
        for value, centre in zip(values, centres, strict=True):
            shift = noise * (2 * torch.rand(value.shape, generator=random) - 1)
            distance = (value - centre[labels] - shift.to(value)).square().mean(dim=1)
            terms.append((share * distance).sum())
    return torch.stack(terms).sum() / len(centroids.means)


class ClusterqStream(GeneratorStream):
    """ClusterQ's loss, and its centroids."""

    settings: "Clusterq"
    level: ClassVar[Level] = "sample"

    def __init__(self, settings: "Clusterq", teacher: Teacher, seed: Seed) -> None:
        super().__init__(settings, teacher, seed)
        self.deep = deep_layers(len(self.norms))
        channels = [len(self.norms[layer].mean) for layer in self.deep]
        self.centroids = Centroids(teacher.classes, channels, settings.keep, self.device)
        self._augmentation = Augmentation(settings.smallest_crop, settings.flip)

    def terms(self, number: int, random: torch.Generator) -> tuple[dict[str, Tensor], Batch]:
        """Cross-entropy, batch-norm statistics, and the distance to the centroids, which move first if it is time."""
        settings = self.settings
        start = int(settings.centroid_start * settings.steps)
        if number >= start and (number - start) % settings.refresh == 0:
            self._refresh(number)
        labels = self.random_labels(settings.batch, random)
        inputs = self._augmented(self.make(labels, random), random)
        logits, statistics = self.observed(inputs)
        cluster = cluster_distance(
            self._of_deep(statistics), labels, self.centroids, settings.mean_noise, settings.variance_noise, random
        )
        terms = self.common_terms(labels, logits, statistics) | {"cluster": settings.cluster_weight * cluster}
        return terms, Batch(inputs.detach(), labels, logits.detach())

    def _augmented(self, inputs: Tensor, random: torch.Generator) -> Tensor:
        chosen = float(torch.rand((), generator=random)) < self.settings.augmented
        return augment(inputs, self._augmentation, random) if chosen else inputs

    @torch.no_grad()
    def _refresh(self, number: int) -> None:
        """Moves the centroids to images that the generator makes now and the teacher agrees with."""
        random = self.seed.at("centroids", number).generator()
        every = torch.arange(self.classes).repeat(self.settings.centroid_images)
        every = every[torch.randperm(len(every), generator=random)].to(self.device)
        means, variances, classes = [], [], []
        # As many at a time as in a training batch, in mixed order: the generator's norms read the batch.
        for labels in torch.split(every, self.settings.batch):
            logits, statistics = self.observed(self._augmented(self.make(labels, random), random))
            agreed = logits.argmax(dim=1) == labels
            deep = self._of_deep(statistics)
            means.append([part[agreed] for part in deep.mean])
            variances.append([part[agreed] for part in deep.variance])
            classes.append(labels[agreed])
        joined = (tuple(torch.cat(parts) for parts in zip(*batches, strict=True)) for batches in (means, variances))
        self.centroids.refresh(Statistics(*joined), torch.cat(classes))

    def _of_deep(self, statistics: Statistics) -> Statistics:
        means, variances = statistics.mean, statistics.variance
        return Statistics(tuple(means[layer] for layer in self.deep), tuple(variances[layer] for layer in self.deep))

    def state(self) -> dict[str, Tensor]:
        """The generator's, and the centroids."""
        return super().state() | below("centroids", self.centroids.state())

    def restore(self, state: dict[str, Tensor]) -> None:
        """Goes back to where `state` was taken."""
        super().restore(state)
        self.centroids.restore(under("centroids", state))


@dataclass(frozen=True, kw_only=True)
class Clusterq(GeneratorMethod):
    """A generator whose images cluster by class in deep statistics.

    Args:
        cluster_weight: Of the distance to the class's centroid; 0.9 in the released code, where it holds no class.
        mean_noise, variance_noise: Half-widths of the noise on the centroid.
        centroid_start: Share of the warm-up after which centroids are made; the released code makes them when the student begins.
        centroid_images: Images a class for each refresh.
        refresh: Steps between two; 200 in the released code, whose schedule has 80,000.
        keep: Share of the old centroid in the new one.
        augmented: Share of the batches that are cropped and flipped.
        smallest_crop: Least share of the area that a crop shows.
        flip: Whether such batches are flipped; off for digits, signs and the like.
    """

    cluster_weight: float = 0.3
    mean_noise: float = 0.03
    variance_noise: float = 0.05
    centroid_start: float = 0.25
    centroid_images: int = 1
    refresh: int = 20
    keep: float = 0.8
    augmented: float = 0.5
    smallest_crop: float = 0.8
    flip: bool = True

    stream_type: ClassVar[type[GeneratorStream]] = ClusterqStream

    def __post_init__(self) -> None:
        super().__post_init__()
        weights = ("cluster_weight", "mean_noise", "variance_noise")
        shares = ("centroid_start", "keep", "augmented")
        check_range(
            self,
            centroid_images=(1, math.inf),
            refresh=(1, math.inf),
            smallest_crop=(0.01, 1),
            **dict.fromkeys(shares, (0, 1)),
            **dict.fromkeys(weights, (0, math.inf)),
        )


METHOD = Clusterq
