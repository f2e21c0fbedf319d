"""Terms of synthesis losses that several methods share. Each is a scalar, unweighted."""

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


def total_variation(pixels: Float[Tensor, "batch channels height width"]) -> Float[Tensor, ""]:
    """Mean absolute difference of neighbouring pixels, both directions."""
    vertical = (pixels[..., 1:, :] - pixels[..., :-1, :]).abs().mean()
    return vertical + (pixels[..., 1:] - pixels[..., :-1]).abs().mean()
