"""FDDA: the generator's deep statistics are aligned with those of one real image of each class.

    loss = class_weight * CE_A + statistics_weight * BNS(A)                     A: mixed classes
         + class_weight * CE_B + distorted_weight * D(B) + centred_weight * C(B)     B: all of one class k

    C = mean over deep l of [ MSE(m_l, M_l^k)                       + MSE(v_l, V_l^k) ]
    D = mean over deep l of [ MSE(m_l, M_l^k + mean_noise * e1)     + MSE(v_l, V_l^k + variance_noise * e2) ],  e ~ N(0, I)

BNS is `gdfq`'s, relative or absolute; C and D are absolute.

M_l^k, V_l^k are the centres of class k: the capsule, made of real images (`_capsule.py`). "Centred" and "distorted" are
the paper's batch-norm-centralized and batch-norm-distorted losses. e1, e2 are drawn anew each step, layer and channel, so
E[D] = C + mean_noise^2 + variance_noise^2: the noise is gradient noise of a known size, and the mean gradient of D is
that of C.

Reference: Zhong et al. 2022, arXiv:2109.04186, section 3; constants of the released code (algorithms 2.3): 0.5, 0.2, 0.9,
0.01, noise 0.5 and 1, 16 images in A and in B, 10,000 steps before the student. Its configuration is followed where the
trainer's own defaults differ. Classes, as in the code:

- those whose images the teacher gets wrong take part in the first `early` of the warm-up only, and aim at pure noise
  there: D = 2 mean over all l of [ MSE(m_l, e1) + MSE(v_l, e2) ], C = 0;
- those without an image are never drawn for B; A knows them.

What the released code does that we do not: it counts layers by the name of the network. The student's side (real and
synthetic images in each batch, real ones with a crop and flip each, synthetic ones only where `smallest_crop` asks for it) is
`recovery/distillation.py`; the released cosine
of 20,000 steps, stepped 70,000 times, swings up and down again, ours falls once.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from reverie.errors import ConfigError, check_range
from reverie.graph.batch_norm import Statistics
from reverie.images.source import Batch
from reverie.randomness import Seed
from reverie.synthesis import Teacher, lacks_capsule
from reverie.synthesis._losses import deep_layers, statistics_distance
from reverie.synthesis._stream import GeneratorMethod, GeneratorStream


class FddaStream(GeneratorStream):
    """FDDA's loss, and the classes it may draw."""

    settings: "Fdda"

    def __init__(self, settings: "Fdda", teacher: Teacher, seed: Seed) -> None:
        if teacher.capsule is None:
            raise lacks_capsule(teacher.name, "fdda")
        super().__init__(settings, teacher, seed)
        self.means = [mean.to(self.device) for mean in teacher.capsule.mean]
        self.variances = [variance.to(self.device) for variance in teacher.capsule.variance]
        self.present = teacher.capsule.count > 0
        self.correct = self.present & teacher.capsule.correct
        if not bool(self.correct.any()):
            raise ConfigError(
                f"{teacher.name}: fdda needs a class whose images the network gets right, got none of "
                f"{int(self.present.sum())}; check the labels, and mean and deviation of the input"
            )

    def draw_class(self, number: int, random: torch.Generator) -> int:
        """The class of batch B at step `number`."""
        allowed = self.present if number < self.settings.early * self.settings.steps else self.correct
        choices = allowed.nonzero().flatten()
        return int(choices[torch.randint(len(choices), (), generator=random)])

    def terms(self, number: int, random: torch.Generator) -> tuple[dict[str, Tensor], Batch]:
        """All five terms: two on the mixed batch, three on the batch of one class."""
        settings = self.settings
        labels = self.random_labels(settings.batch, random)
        inputs = self.make(labels, random)
        logits, statistics = self.observed(inputs)

        one = self.draw_class(number, random)
        ones = torch.full((settings.class_batch,), one, device=self.device)
        logits_of_one, of_one = self.observed(self.make(ones, random))
        if bool(self.correct[one]):
            deep = deep_layers(len(self.norms))
            means, variances = [mean[one] for mean in self.means], [variance[one] for variance in self.variances]
            centred = statistics_distance(of_one, means, variances, deep)
            distorted = distorted_distance(of_one, means, variances, deep, settings.mean_noise, settings.variance_noise, random)
        else:
            zeros = [torch.zeros_like(mean) for mean in of_one.mean]
            centred = logits.new_zeros(())
            distorted = 2 * distorted_distance(of_one, zeros, zeros, range(len(self.norms)), 1.0, 1.0, random)
        return self.common_terms(labels, logits, statistics) | {
            "one class": settings.class_weight * functional.cross_entropy(logits_of_one, ones),
            "centred": settings.centred_weight * centred,
            "distorted": settings.distorted_weight * distorted,
        }, Batch(inputs.detach(), labels, logits.detach())


def distorted_distance(
    statistics: Statistics,
    means: list[Tensor],
    variances: list[Tensor],
    layers: range,
    mean_noise: float,
    variance_noise: float,
    random: torch.Generator,
) -> Float[Tensor, ""]:
    """`statistics_distance` to targets with Gaussian noise on them: equation for D above."""
    noisy = ([_noisy(part, mean_noise, random) for part in means], [_noisy(part, variance_noise, random) for part in variances])
    return statistics_distance(statistics, *noisy, layers)


def _noisy(values: Tensor, deviation: float, random: torch.Generator) -> Tensor:
    return values + deviation * torch.randn(values.shape, generator=random).to(values)


@dataclass(frozen=True, kw_only=True)
class Fdda(GeneratorMethod):
    """A generator aligned with per-class centres of real images.

    Args:
        class_batch: Images of batch B.
        distorted_weight, centred_weight: Of D and C. The released weights are 0.9 and 0.01.
        mean_noise, variance_noise: Deviations of the noise in D.
        early: Share of the warm-up in which misclassified classes take part (5 of 50 epochs).
    """

    class_batch: int = 32
    class_weight: float = 0.5
    distorted_weight: float = 0.9
    centred_weight: float = 0.01
    mean_noise: float = 0.5
    variance_noise: float = 1.0
    early: float = 0.1

    needs_capsule: ClassVar[bool] = True
    stream_type: ClassVar[type[GeneratorStream]] = FddaStream

    def __post_init__(self) -> None:
        super().__post_init__()
        weights = ("distorted_weight", "centred_weight", "mean_noise", "variance_noise")
        check_range(self, class_batch=(2, math.inf), early=(0, 1), **dict.fromkeys(weights, (0, math.inf)))


METHOD = Fdda
