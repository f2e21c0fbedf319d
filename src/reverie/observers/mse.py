"""The range with the smallest quantization error: clipping error traded against rounding error.

    minimise over r in (0, 1]:  sum |x - fake_quantize(x; r * low, r * high)|^power

Both ends shrink by the same factor, over `candidates` steps (algorithms section 5: 80 to 100 steps of one percent,
power 2.4, as in BRECQ, QDrop and Genie).
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from reverie.errors import check_range
from reverie.grid import Grid, affine_qparams, fake_quantize, symmetric_qparams
from reverie.observers._sample import Sample


@dataclass(frozen=True, kw_only=True)
class Mse:
    """Search for the best shrinking of the exact range.

    Args:
        power: Exponent of the error; above 2 it spares outliers.
        candidates: Shrinking factors tried, evenly spaced from `smallest` to 1.
        smallest: The smallest factor.
        capacity: Values kept of each batch.
    """

    power: float = 2.4
    candidates: int = 80
    smallest: float = 0.2
    capacity: int = 32_768

    def __post_init__(self) -> None:
        check_range(self, power=(1e-3, math.inf), candidates=(1, math.inf), smallest=(1e-3, 1), capacity=(1, math.inf))

    def watch(self) -> "MseWatch":
        """A fresh memory for one tensor."""
        return MseWatch(self)


class MseWatch(Sample):
    """A sample of the values, and the range that codes them best."""

    def __init__(self, settings: Mse) -> None:
        super().__init__(settings.capacity)
        self._settings = settings

    @torch.no_grad()
    def range(self, grid: Grid, *, symmetric: bool) -> tuple[Float[Tensor, " groups"], Float[Tensor, " groups"]]:
        """Low and high end for each group."""
        values, (low, high) = self.values(), self.ends()
        best = torch.full_like(low, torch.inf)
        best_low, best_high = low.clone(), high.clone()
        for shrink in torch.linspace(1.0, self._settings.smallest, self._settings.candidates).tolist():
            qparams = symmetric_qparams if symmetric else affine_qparams
            scale, zero_point = qparams(low * shrink, high * shrink, grid)
            error = fake_quantize(values, scale[:, None], zero_point[:, None], grid).sub_(values).abs_()
            total = error.pow_(self._settings.power).sum(dim=1)
            better = total < best
            best = torch.where(better, total, best)
            best_low = torch.where(better, low * shrink, best_low)
            best_high = torch.where(better, high * shrink, best_high)
        return best_low, best_high


METHOD = Mse
