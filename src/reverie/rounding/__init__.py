"""How one weight tensor becomes codes. Each file is one way.

`METHOD(...)(weight, scale, zero_point, grid)` makes a `Rounder` (see `graph.quantizers`): `forward()` the codes as they
are, `penalty(progress)` what is added to the reconstruction loss, `harden()` the final codes. What `harden()`
answers is the nearest codes at the start, and never further than one step from the weight.
"""

from typing import Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from reverie.graph.quantizers import Rounder
from reverie.grid import Grid


@runtime_checkable
class Rounding(Protocol):
    """Makes rounders; the object is its own configuration."""

    @property
    def learned(self) -> bool:
        """Whether its rounders have parameters that reconstruction learns."""
        ...

    def __call__(
        self,
        weight: Float[Tensor, "out *rest"],
        scale: Float[Tensor, "out *ones"],
        zero_point: Int[Tensor, "out *ones"],
        grid: Grid,
    ) -> Rounder:
        """A rounder for this weight on this grid."""
        ...
