"""Moving average of each batch's smallest and largest value: rare extremes are clipped.

    r <- momentum * r + (1 - momentum) * current,  started at the first batch's value

The plain average (algorithms 1.3, FDDA's variant) without its start at zero, which would need 44 batches to forget. The
iterated bias correction of the GDFQ family, which overshoots a thousandfold on the way, is not offered.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from reverie.errors import check_range
from reverie.grid import Grid


@dataclass(frozen=True, kw_only=True)
class Ema:
    """Args: momentum: Weight of the past at each batch, 0 to 1 (0.9 in all repositories of the family)."""

    momentum: float = 0.9

    def __post_init__(self) -> None:
        check_range(self, momentum=(0, 1))

    def watch(self) -> "EmaWatch":
        """A fresh memory for one tensor."""
        return EmaWatch(self.momentum)


class EmaWatch:
    """Averaged ends of the range."""

    def __init__(self, momentum: float) -> None:
        self._momentum = momentum
        self._ends: tuple[Tensor, Tensor] | None = None

    def update(self, values: Float[Tensor, "groups values"]) -> None:
        """Takes in the values of one more batch."""
        low, high = torch.aminmax(values, dim=1)
        if self._ends is not None:
            low, high = self._ends[0].lerp(low, 1 - self._momentum), self._ends[1].lerp(high, 1 - self._momentum)
        self._ends = (low, high)

    def range(self, grid: Grid, *, symmetric: bool) -> tuple[Float[Tensor, " groups"], Float[Tensor, " groups"]]:
        """Low and high end for each group."""
        assert self._ends is not None
        return self._ends


METHOD = Ema
