"""GDFQ: a generator of images that the teacher takes for the class asked for, with its batch-norm statistics.

    loss = class_weight * CE(T(x), y) + statistics_weight * BNS(x)          x = G(z, y), z ~ N(0, I), y uniform
    BNS(x) = (1/L) sum_l [ MSE(m_l(x), mu_l) + MSE(v_l(x), var_l) ]         batch level, variances (algorithms 1.4)

The baseline of the whole family. Reference: Xu et al. 2020, arXiv:2003.03603, equations 3 to 5; constants of the released
code (algorithms 1.6): weights 1 and 0.1; batch 16 and 10,000 steps of warm-up for ImageNet, 200 and 800 for CIFAR-100;
width 128. The student's side (KL at temperature 20, cross-entropy) is `recovery/distillation.py`.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from reverie.errors import check_range
from reverie.synthesis._stream import GeneratorMethod, GeneratorStream


class GdfqStream(GeneratorStream):
    """GDFQ's loss."""

    settings: "Gdfq"

    def judge(self, inputs: Tensor, labels: Tensor, place: int, random: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        """Cross-entropy and batch-norm statistics."""
        logits, statistics = self.observed(inputs)
        return {
            "class": self.settings.class_weight * functional.cross_entropy(logits, labels),
            "statistics": self.statistics_term(statistics),
        }, logits


@dataclass(frozen=True, kw_only=True)
class Gdfq(GeneratorMethod):
    """A class-conditional generator trained by cross-entropy and batch-norm statistics.

    Args:
        class_weight: Of the cross-entropy to the class asked for.
    """

    class_weight: float = 1.0

    stream_type: ClassVar[type[GeneratorStream]] = GdfqStream

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, class_weight=(0, float("inf")))


METHOD = Gdfq
