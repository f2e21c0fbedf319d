"""Terms of synthesis losses that several methods share. Each is a scalar, unweighted."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from reverie.graph.batch_norm import BatchNorm, Statistics


def matching_loss(statistics: Statistics, norms: list[BatchNorm]) -> Float[Tensor, ""]:
    """Squared deviation from the running mean and standard deviation in units of the latter, averaged over everything."""
    terms = []
    for mean, variance, norm in zip(statistics.mean, statistics.variance, norms, strict=True):
        # The square root has no slope at 0, where a constant channel sits, nor a useful one just above.
        deviation = (variance + 1e-6 * norm.deviation.square()).sqrt()
        terms.append((((mean - norm.mean) / norm.deviation).square() + (deviation / norm.deviation - 1).square()).mean())
    return torch.stack(terms).mean()


def standard_distance(statistics: Statistics, norms: list[BatchNorm]) -> Float[Tensor, ""]:
    """Sum over layers of MSE(m, running mean) + MSE(s, running standard deviation), in the network's own units: Genie's form."""
    terms = []
    for mean, variance, norm in zip(statistics.mean, statistics.variance, norms, strict=True):
        # The square root has no slope at 0, where a constant channel sits.
        gap = (variance + 1e-6).sqrt() - (norm.variance + 1e-6).sqrt()
        terms.append((mean - norm.mean).square().mean() + gap.square().mean())
    return torch.stack(terms).sum()


def total_variation(pixels: Float[Tensor, "batch channels height width"]) -> Float[Tensor, ""]:
    """Mean absolute difference of neighbouring pixels, both directions."""
    vertical = (pixels[..., 1:, :] - pixels[..., :-1, :]).abs().mean()
    return vertical + (pixels[..., 1:] - pixels[..., :-1]).abs().mean()


def pooled(statistics: Statistics) -> Statistics:
    """Batch-level statistics from per-sample ones: the mean of means, and the law of total variance."""
    variances = zip(statistics.mean, statistics.variance, strict=True)
    return Statistics(
        tuple(mean.mean(dim=0) for mean in statistics.mean),
        tuple(variance.mean(dim=0) + mean.var(dim=0, correction=0) for mean, variance in variances),
    )


def deep_layers(count: int) -> range:
    """Which of `count` batch norms are deep: from int((count + 1) / 2) - 2 on (algorithms 2.2, FDDA and ClusterQ)."""
    return range(max((count + 1) // 2 - 2, 0), count)


def statistics_distance(
    statistics: Statistics,
    means: Sequence[Float[Tensor, "..."]],
    variances: Sequence[Float[Tensor, "..."]],
    layers: range,
) -> Float[Tensor, ""]:
    """Mean over `layers` of MSE(m, target mean) + MSE(v, target variance): the loss of the GDFQ family (algorithms 1.4).

    Args:
        means, variances: Targets for all layers; their shapes broadcast against those of the statistics.
    """
    terms = []
    for layer in layers:
        mean = (statistics.mean[layer] - means[layer]).square().mean()
        terms.append(mean + (statistics.variance[layer] - variances[layer]).square().mean())
    return torch.stack(terms).mean()


def running(norms: list[BatchNorm]) -> tuple[list[Float[Tensor, " channels"]], list[Float[Tensor, " channels"]]]:
    """Means and variances that the batch norms remember: the targets of the batch-norm-statistics loss."""
    return [norm.mean for norm in norms], [norm.variance for norm in norms]
