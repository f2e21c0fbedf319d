"""AdaRound: learn, weight by weight, whether to round down or up.

    codes = clamp(floor(W / scale) + h(V) + zero_point, quant_min, quant_max)
    h(V)  = clamp(sigmoid(V) * (ZETA - GAMMA) + GAMMA, 0, 1)
    penalty = weight * sum(1 - |2 h(V) - 1|^beta)

Reference: Nagel et al. 2020, arXiv:2004.10568, section 3 (algorithms section 5).

    paper         here             meaning
    V             logits           one free number per weight; h starts at the fraction of W / scale
    h(V)          _up()            how far up, 0 to 1
    zeta, gamma   ZETA, GAMMA      stretch that lets the sigmoid reach 0 and 1 exactly
    beta          _sharpness()     annealed from `start` to `end`: high early, so that rounding stays free
    lambda        penalty_weight

The constants stand with the iterations of the method that owns the loop (`recovery`). Not here: activation rounding,
learned scales.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from reverie.errors import check_range
from reverie.graph.quantizers import Rounder
from reverie.grid import Grid

ZETA, GAMMA = 1.1, -0.1


@dataclass(frozen=True, kw_only=True)
class AdaRound:
    """Learned rounding.

    Args:
        penalty_weight: lambda of the regulariser that drives h to 0 or 1.
        warm_start: Share of the iterations without the regulariser.
        start, end: beta at the end of the warm start and at the end of learning, half a cosine between.
    """

    penalty_weight: float = 0.01
    warm_start: float = 0.2
    start: float = 20.0
    end: float = 2.0

    needs: ClassVar[Literal["reconstruction"]] = "reconstruction"

    def __post_init__(self) -> None:
        check_range(self, penalty_weight=(0, math.inf), warm_start=(0, 1), start=(1e-3, math.inf), end=(1e-3, math.inf))

    def __call__(
        self,
        weight: Float[Tensor, "out *rest"],
        scale: Float[Tensor, "out *ones"],
        zero_point: Int[Tensor, "out *ones"],
        grid: Grid,
    ) -> "AdaRounder":
        """A rounder for this weight on this grid; `h` starts at the fraction, so the soft weight starts at the weight."""
        return AdaRounder(weight.detach(), scale, zero_point, grid, self)


class AdaRounder(Rounder):
    """One free number per weight."""

    floor: Tensor

    def __init__(self, weight: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid, settings: AdaRound) -> None:
        super().__init__()
        steps = weight / scale
        self.register_buffer("floor", torch.floor(steps) + zero_point)
        fraction = steps - torch.floor(steps)
        self.logits = nn.Parameter(-torch.log((ZETA - GAMMA) / (fraction - GAMMA) - 1))
        self._grid = grid
        self._settings = settings

    def _up(self) -> Float[Tensor, "*shape"]:
        return (torch.sigmoid(self.logits) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def forward(self) -> Float[Tensor, "*shape"]:
        """Soft codes, with gradients to the logits."""
        return (self.floor + self._up()).clamp(self._grid.quant_min, self._grid.quant_max)

    def penalty(self, progress: float) -> Float[Tensor, ""]:
        """What it costs that `h` is neither 0 nor 1; zero during the warm start."""
        settings = self._settings
        if progress < settings.warm_start:
            return torch.zeros((), device=self.floor.device)
        return settings.penalty_weight * (1 - (2 * self._up() - 1).abs().pow(self._sharpness(progress))).sum()

    def _sharpness(self, progress: float) -> float:
        settings = self._settings
        part = (progress - settings.warm_start) / (1 - settings.warm_start)
        return settings.end + 0.5 * (settings.start - settings.end) * (1 + math.cos(math.pi * part))

    def harden(self) -> Float[Tensor, "*shape"]:
        """Final codes: up where the logit is not negative, which is where h is at least one half."""
        up = (self.logits >= 0).to(self.floor.dtype)
        return (self.floor + up).clamp(self._grid.quant_min, self._grid.quant_max).detach()


METHOD = AdaRound
