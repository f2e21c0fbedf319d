"""Round to nearest, half to even: the baseline, with nothing to learn."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reverie.graph.quantizers import Rounder
from reverie.grid import Grid, quantize


@dataclass(frozen=True, kw_only=True)
class Nearest:
    """Has no settings."""

    learned: ClassVar[bool] = False

    def __call__(
        self,
        weight: Float[Tensor, "out *rest"],
        scale: Float[Tensor, "out *ones"],
        zero_point: Int[Tensor, "out *ones"],
        grid: Grid,
    ) -> "NearestRounder":
        """A rounder for this weight on this grid."""
        return NearestRounder(quantize(weight.detach(), scale, zero_point, grid))


class NearestRounder(Rounder):
    """Holds the codes."""

    codes: Tensor

    def __init__(self, codes: Float[Tensor, "*shape"]) -> None:
        super().__init__()
        self.register_buffer("codes", codes)

    def forward(self) -> Float[Tensor, "*shape"]:
        """The nearest codes."""
        return self.codes

    def penalty(self, progress: float) -> Float[Tensor, ""]:
        """Zero."""
        return torch.zeros((), device=self.codes.device)

    def harden(self) -> Float[Tensor, "*shape"]:
        """The nearest codes."""
        return self.codes


METHOD = Nearest
