"""The range that holds a given share of the values: clips a fixed share of outliers."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from reverie.errors import check_range
from reverie.grid import Grid
from reverie.observers._sample import Sample


@dataclass(frozen=True, kw_only=True)
class Percentile:
    """The central `percentile` percent of the values.

    Args:
        percentile: 50 to 100. Behind a ReLU, where more than the tail is zero, the low end is zero.
        capacity: Values kept of each batch.
    """

    percentile: float = 99.99
    capacity: int = 32_768

    def __post_init__(self) -> None:
        check_range(self, percentile=(50, 100), capacity=(1, math.inf))

    def watch(self) -> "PercentileWatch":
        """A fresh memory for one tensor."""
        return PercentileWatch(self)


class PercentileWatch(Sample):
    """A sample of the values, and its percentiles."""

    def __init__(self, settings: Percentile) -> None:
        super().__init__(settings.capacity)
        self._settings = settings

    def range(self, grid: Grid, *, symmetric: bool) -> tuple[Float[Tensor, " groups"], Float[Tensor, " groups"]]:
        """Low and high end for each group."""
        ordered = self.values().sort(dim=1).values
        tail = (1 - self._settings.percentile / 100) / 2
        last = ordered.shape[1] - 1
        places = torch.tensor([tail * last, (1 - tail) * last], device=ordered.device)
        below, part = places.floor().long(), places.frac()
        picked = torch.lerp(ordered[:, below], ordered[:, (below + 1).clamp(max=last)], part.to(ordered.dtype))
        return picked[:, 0], picked[:, 1]


METHOD = Percentile
