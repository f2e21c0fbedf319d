"""The smallest and the largest value ever seen: no clipping error, the largest rounding error."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from reverie.grid import Grid
from reverie.observers import widen


@dataclass(frozen=True, kw_only=True)
class MinMax:
    """Has no settings."""

    def watch(self) -> "MinMaxWatch":
        """A fresh memory for one tensor."""
        return MinMaxWatch()


class MinMaxWatch:
    """Running ends of the range."""

    def __init__(self) -> None:
        self._ends: tuple[Tensor, Tensor] | None = None

    def update(self, values: Float[Tensor, "groups values"]) -> None:
        """Takes in the values of one more batch."""
        self._ends = widen(self._ends, values)

    def range(self, grid: Grid, *, symmetric: bool) -> tuple[Float[Tensor, " groups"], Float[Tensor, " groups"]]:
        """Low and high end for each group."""
        assert self._ends is not None
        return self._ends


METHOD = MinMax
