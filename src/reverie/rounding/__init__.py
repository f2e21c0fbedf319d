"""How one weight tensor becomes codes. Each file is one way, and says with `needs` what it decides from.

    needs              called with                                                answers
    "weights"          weight, scale, zero point, grid                            the codes
    "moments"          the same, and the second moments of the layer's inputs     the codes
    "reconstruction"   weight, scale, zero point, grid                            a `Rounder` (see `graph.quantizers`)

A `Rounder` learns: `forward()` gives the codes as they are, `penalty(progress)` what is added to the reconstruction loss,
`harden()` the final codes. What `harden()` answers is the nearest codes at the start.
"""

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from reverie.graph.quantizers import Rounder
from reverie.grid import Grid


@dataclass(frozen=True)
class Moments:
    """What a layer reads and what it should answer, averaged over calibration images and positions.

    x is what a group of output channels multiplies its weight with at one position of one image (`graph/patches.py`), in the
    student as quantized so far; y is the full-precision network's answer there, without the bias.

    Args:
        inputs: E[x x^T], in float64 like the others.
        answers: E[y x^T].
        power: E[y^2].
    """

    inputs: Float[Tensor, "groups size size"]
    answers: Float[Tensor, "groups out size"]
    power: Float[Tensor, "groups out"]

    def error(self, weight: Float[Tensor, "channels *rest"]) -> Float[Tensor, "groups out"]:
        """E[(y - weight x)^2] of every output channel."""
        rows = weight.reshape(self.answers.shape).to(self.answers.dtype)
        return self.power + ((rows @ self.inputs - 2 * self.answers) * rows).sum(-1)


@runtime_checkable
class FromWeights(Protocol):
    """Decides at once, from the weight alone."""

    @property
    def needs(self) -> Literal["weights"]: ...

    def __call__(
        self,
        weight: Float[Tensor, "out *rest"],
        scale: Float[Tensor, "out *ones"],
        zero_point: Int[Tensor, "out *ones"],
        grid: Grid,
    ) -> Float[Tensor, "out *rest"]:
        """The codes, in float."""
        ...


@runtime_checkable
class FromMoments(Protocol):
    """Decides at once, from the weight and what it is multiplied with."""

    @property
    def needs(self) -> Literal["moments"]: ...

    def __call__(
        self,
        weight: Float[Tensor, "channels *rest"],
        scale: Float[Tensor, "channels *ones"],
        zero_point: Int[Tensor, "channels *ones"],
        grid: Grid,
        moments: Moments,
    ) -> Float[Tensor, "channels *rest"]:
        """The codes, in float."""
        ...


@runtime_checkable
class Learned(Protocol):
    """Makes rounders, which reconstruction teaches."""

    @property
    def needs(self) -> Literal["reconstruction"]: ...

    def __call__(
        self,
        weight: Float[Tensor, "out *rest"],
        scale: Float[Tensor, "out *ones"],
        zero_point: Int[Tensor, "out *ones"],
        grid: Grid,
    ) -> Rounder:
        """A rounder for this weight on this grid."""
        ...


# The object is its own configuration.
Rounding = FromWeights | FromMoments | Learned
