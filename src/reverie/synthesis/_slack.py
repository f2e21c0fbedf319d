"""The three terms that make synthetic images of DSG diverse, as functions of tensors.

Slack distribution alignment (SDA): statistics of a layer may deviate, unpunished, as far as those of Gaussian noise do.

    delta_l, gamma_l = quantile over samples and channels of |m_l(noise) - mu_l|, |s_l(noise) - sigma_l|
    SDA_l = mean_c max(|m_l - mu_l| - delta_l, 0)^2 + mean_c max(|s_l - sigma_l| - gamma_l, 0)^2

Layerwise sample enhancement (LSE): image i, counted over the whole set, has layer i mod L weighted `factor` times.

Sample correlation inhibition (SCI): with phi the flattened images, each of norm 1, the spectrum of phi phi^T (values e_j,
vectors v_j, in ascending order) against that of Gaussian noise of the same shape.

    SCI = 1e-4 mean_j (e_j - e'_j)^2 + | sum_j w_j (-|<v_j, v'_j>|) |,   w = (e' - min e') / (max e' - min e')

Reference: Zhang et al. 2021, arXiv:2103.01049 (SDA, LSE); Qin et al. 2023, arXiv:2109.00212 (SCI); algorithms 4.2. What the
released code does that we do not:

- It reads delta and gamma from files that it does not ship; they are measured here.
- It doubles a deviation before squaring it, for 20 layers and the first 20 images only; the factor here is on the square,
  for any number of layers and images.
- Its SCI has no gradient (it wraps the value in a new variable), and the sign and order of its eigenvectors are arbitrary:
  here they are sorted, and compared by |cosine|.

The eigenvectors' part of SCI says next to nothing: those of fresh noise have no preferred direction, so on average it is the
same for images that are all different and for images that are almost one (2.12 and 2.17 for 32 images, single draws 0.33
around that), and its gradient is noise. The eigenvalues' part does tell them apart.

Squares are averaged over channels, where the paper adds them up: wide layers must not rule. With no slack the mean of SDA over
everything is then `matching_loss`. Nothing is written into an input, and all but the measured slack carries gradients to
images that were computed themselves (by a generator).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from reverie.graph.batch_norm import BatchNorm, Statistics

# Eigenvalues that differ by less are taken for equal. Their mean is 1, and those of noise lie about 1/100 apart.
RESOLUTION = 1e-3


@dataclass(frozen=True)
class Slack:
    """How far the statistics of each layer may deviate at no cost.

    Args:
        mean, deviation: Of means (delta) and of standard deviations (gamma), a number for each batch norm.
    """

    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    @staticmethod
    def none(layers: int) -> "Slack":
        """No deviation is free."""
        return Slack((0.0,) * layers, (0.0,) * layers)


@torch.no_grad()
def measure_slack(noise: Statistics, norms: list[BatchNorm], quantile: float, *, relative: bool = True) -> Slack:
    """The slack that leaves the share `quantile` of the deviations of `noise` free, layer by layer.

    Args:
        noise: Statistics of Gaussian images, as many as will be made together, at the level of those to be aligned.
        relative: Deviations in units of the running standard deviation; else absolute, as in the paper.
    """
    found = [[float(torch.quantile(gap.flatten(), quantile)) for gap in pair] for pair in _gaps(noise, norms, relative)]
    return Slack(tuple(mean for mean, _ in found), tuple(deviation for _, deviation in found))


def slack_alignment(
    statistics: Statistics, norms: list[BatchNorm], slack: Slack, *, relative: bool = True
) -> Float[Tensor, "*batch layers"]:
    """SDA of each layer: shape (batch, layers) for statistics of samples, (layers,) for those of a batch."""
    terms = []
    limits = zip(slack.mean, slack.deviation, strict=True)
    for (mean, deviation), (delta, gamma) in zip(_gaps(statistics, norms, relative), limits, strict=True):
        excess = functional.relu(mean - delta).square() + functional.relu(deviation - gamma).square()
        terms.append(excess.mean(dim=-1))
    return torch.stack(terms, dim=-1)


def _gaps(statistics: Statistics, norms: list[BatchNorm], relative: bool) -> list[tuple[Tensor, Tensor]]:
    """|m - mu| and |s - sigma| of each layer."""
    gaps = []
    for mean, variance, norm in zip(statistics.mean, statistics.variance, norms, strict=True):
        unit = norm.deviation
        # The square root has no slope at 0, where a constant channel sits, nor a useful one just above.
        deviation = (variance + 1e-6 * unit.square()).sqrt()
        pair = (mean - norm.mean).abs(), (deviation - unit).abs()
        gaps.append((pair[0] / unit, pair[1] / unit) if relative else pair)
    return gaps


def enhancement(images: int, layers: int, *, offset: int = 0, factor: float = 2.0) -> Float[Tensor, "images layers"]:
    """LSE: the weight of each layer for each image: `factor` for layer i mod L of image i, else 1.

    Args:
        offset: Images made before these; so batches smaller than L still cover all layers.
    """
    chosen = (torch.arange(images) + offset) % layers
    return 1 + (factor - 1) * functional.one_hot(chosen, layers).float()


def correlation(
    images: Float[Tensor, "count *shape"],
    noise: Float[Tensor, "count *shape"],
    *,
    spectrum_weight: float = 1e-4,
    direction_weight: float = 1.0,
) -> Float[Tensor, ""]:
    """SCI of `images` against Gaussian `noise` of the same shape; not yet divided by the number of layers.

    A single image correlates with nothing: 0.

    Args:
        spectrum_weight, direction_weight: Of the eigenvalues' part and of the eigenvectors'; the released code's by default.
    """
    values, vectors = _spectrum(images)
    with torch.no_grad():
        target_values, target_vectors = _spectrum(noise)
        spread = target_values.amax() - target_values.amin()
        weights = (target_values - target_values.amin()) / spread.clamp(min=torch.finfo(spread.dtype).eps)
    cosines = (vectors * target_vectors).sum(dim=0).abs()
    spectrum, directions = (values - target_values).square().mean(), (weights * -cosines).sum().abs()
    return (spectrum_weight * spectrum + direction_weight * directions).to(images.dtype)


def _spectrum(images: Tensor) -> tuple[Float[Tensor, " count"], Float[Tensor, "count count"]]:
    """Eigenvalues, ascending, and eigenvectors (columns) of the images' correlation matrix, with gradients that are finite.

    The gradient of an eigenvector holds 1/(e_j - e_k): it explodes where two eigenvalues meet, and there only the space that
    they share is determined, not the vectors in it. So first-order perturbation theory is written out around constants,

        dv_j = sum_k v_k (v_k^T dS v_j) d / (d^2 + RESOLUTION^2),   d = e_j - e_k

    which is exact for eigenvalues that are well apart, never larger than 1 / (2 RESOLUTION), and 0 where they are equal.
    """
    rows = functional.normalize(images.flatten(1), dim=1)
    # The matrix is small; in float64 its own rounding is far below RESOLUTION.
    matrix = (rows @ rows.T).double()
    if not bool(matrix.isfinite().all()):
        # `eigh` would raise in its own words; as a loss that is not a number it is told with the step and the terms.
        lost = matrix * torch.nan
        return lost.diagonal(), lost
    values, vectors = torch.linalg.eigh(matrix.detach())
    # Diagonal in value, but not in its gradient.
    rotated = vectors.T @ matrix @ vectors
    gaps = values - values[:, None]
    mixing = rotated * gaps / (gaps.square() + RESOLUTION**2)
    return rotated.diagonal(), vectors + vectors @ mixing
