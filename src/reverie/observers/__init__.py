"""From the values of a tensor to the range of its grid. Each file is one way.

An observer is configured once (`METHOD`, a frozen dataclass) and watches many tensors: `watch()` gives a fresh memory for
one of them. Values come as rows, one per group that shares a scale: one row for a whole tensor, a row per output channel
of a weight.
"""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reverie.grid import Grid, affine_qparams, symmetric_qparams


@runtime_checkable
class Watch(Protocol):
    """What has been seen of one tensor."""

    def update(self, values: Float[Tensor, "groups values"]) -> None:
        """Takes in the values of one more batch."""
        ...

    def range(self, grid: Grid, *, symmetric: bool) -> tuple[Float[Tensor, " groups"], Float[Tensor, " groups"]]:
        """Low and high end for each group."""
        ...


@runtime_checkable
class Observer(Protocol):
    """Makes watches; the object is its own configuration."""

    def watch(self) -> Watch:
        """A fresh memory for one tensor."""
        ...


def tensor_qparams(watch: Watch, grid: Grid) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """Per-tensor scale and zero point from what was seen; 0.0 is on the grid, and in its middle where that is signed."""
    low, high = watch.range(grid, symmetric=grid.signed)
    scale, zero_point = symmetric_qparams(low, high, grid) if grid.signed else affine_qparams(low, high, grid)
    return scale[0], zero_point[0]


def weight_qparams(
    weight: Float[Tensor, "out *rest"], observer: Observer, grid: Grid, *, symmetric: bool
) -> tuple[Float[Tensor, "out *ones"], Int[Tensor, "out *ones"]]:
    """Per-output-channel scale and zero point of a weight, shape (out, 1, ...).

    Args:
        symmetric: Zero point 0 (the `integer` placement); else affine over the bare range (the `literature` placement).
    """
    watch = observer.watch()
    watch.update(weight.detach().flatten(1))
    low, high = watch.range(grid, symmetric=symmetric)
    scale, zero_point = symmetric_qparams(low, high, grid) if symmetric else affine_qparams(low, high, grid, include_zero=False)
    column = (weight.shape[0], *[1] * (weight.dim() - 1))
    return scale.view(column), zero_point.view(column)


def rows(tensor: Tensor) -> Float[Tensor, "1 values"]:
    """A whole tensor as the single row of a per-tensor watch."""
    return tensor.detach().reshape(1, -1)


def widen(
    old: tuple[Tensor, Tensor] | None, values: Float[Tensor, "groups values"]
) -> tuple[Float[Tensor, " groups"], Float[Tensor, " groups"]]:
    """The running minimum and maximum with one more batch taken in."""
    low, high = torch.aminmax(values, dim=1)
    return (low, high) if old is None else (torch.minimum(old[0], low), torch.maximum(old[1], high))
