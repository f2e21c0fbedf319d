"""Round to nearest, half to even: the baseline, with nothing to learn."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Float, Int
from torch import Tensor

from reverie.grid import Grid, quantize


@dataclass(frozen=True, kw_only=True)
class Nearest:
    """Has no settings."""

    needs: ClassVar[Literal["weights"]] = "weights"

    def __call__(
        self,
        weight: Float[Tensor, "out *rest"],
        scale: Float[Tensor, "out *ones"],
        zero_point: Int[Tensor, "out *ones"],
        grid: Grid,
    ) -> Float[Tensor, "out *rest"]:
        """The nearest codes."""
        return quantize(weight, scale, zero_point, grid)


METHOD = Nearest
