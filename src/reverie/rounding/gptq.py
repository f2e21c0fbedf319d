"""GPTQ: second-order rounding, where each weight makes good the error of those rounded before it.

    minimise over the codes   E|y - Wq x|^2  =  (V - Wq) H (V - Wq)^T + what no code changes        for each output channel
    V = W + (Y - W H) (H + lambda I)^-1                       the best weight off the grid, held to W where H says little
    H + lambda I = R R^T,  R upper triangular                 so the error is sum over k of ((e R)_k)^2,  e = V - Wq
    wq_k = round(v_k + sum over j < k of e_j R_jk / R_kk)     which makes (e R)_k as small as a step allows, column by column

This is GPTQ's algorithm 1: its compensation of all later columns by the Cholesky factor of the inverse is this feedback of all
earlier ones (Chee et al. 2023, arXiv:2307.13304, theorem 6), which needs no inverse and is stabler. Columns in a block are fed
back one by one, blocks by one product ("lazy batch updates"). Columns with large moments come first, while there is freedom to make good for
them ("act-order"). V in place of W is what makes y the full-precision network's answer to its own input (the student's
is another): GPTAQ's end (Li et al. 2025, arXiv:2504.02692), by the normal equations.

What is greedy can be mended: afterwards each column in turn moves to its best code while all others stay, which can only lower the
error (Behdin et al. 2023, arXiv:2309.01885, eq. 6), from GPTQ's codes or the nearest ones, whichever are better for that channel. So no
channel's error is ever above that of rounding to nearest, up to lambda's share.

Reference: Frantar et al. 2022, arXiv:2210.17323, section 3.

    paper             here              meaning
    H = 2 X X^T       moments.inputs    second moments; the factor changes nothing
    lambda            damping           in shares of H's mean diagonal
    B                 _BLOCK            columns of a block

Groups of a convolution have moments of their own and are rounded in parallel. Not here: grids of groups of columns; a code may be any
number of steps from its weight.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reverie.errors import ModelError, check_range
from reverie.grid import Grid
from reverie.rounding import Moments

_BLOCK = 128


@dataclass(frozen=True, kw_only=True)
class GPTQ:
    """Second-order rounding.

    Args:
        damping: lambda, in shares of the moments' mean diagonal: how far few images are to be believed.
        sweeps: Times that all columns are gone through again, each moving to its best code; fewer where none moves any more.
    """

    damping: float = 0.1
    sweeps: int = 4

    needs: ClassVar[Literal["moments"]] = "moments"

    def __post_init__(self) -> None:
        # Moments are sums of products in float32: below this their own rounding could make them indefinite.
        check_range(self, damping=(1e-3, math.inf), sweeps=(0, math.inf))

    def __call__(
        self,
        weight: Float[Tensor, "channels *rest"],
        scale: Float[Tensor, "channels *ones"],
        zero_point: Int[Tensor, "channels *ones"],
        grid: Grid,
        moments: Moments,
    ) -> Float[Tensor, "channels *rest"]:
        """The codes, in float.

        Raises:
            ModelError: The moments are not finite.
        """
        for moment in (moments.inputs, moments.answers):
            if not bool(torch.isfinite(moment).all()):
                raise ModelError("second moments of inputs must be finite, got some that are not; check the weights and images")
        groups, size, _ = moments.inputs.shape
        diagonal = moments.inputs.diagonal(dim1=1, dim2=2)
        # Where a group reads nothing but zeros, any lambda does.
        damping = (self.damping * diagonal.mean(dim=1)).where(diagonal.sum(dim=1) > 0, 1.0)
        quadratic = moments.inputs + torch.diag_embed(damping.unsqueeze(1).expand(groups, size))
        rows = weight.reshape(groups, -1, size).double()
        order = diagonal.argsort(dim=1, descending=True, stable=True).unsqueeze(1)
        across = order.expand_as(rows)
        quadratic = quadratic.gather(1, order.mT.expand_as(quadratic)).gather(2, order.expand_as(quadratic))
        residual = (moments.answers - rows @ moments.inputs).gather(2, across)
        # Reversed before and after, the lower factor of Cholesky is an upper one: quadratic = factor factor^T.
        lower = torch.linalg.cholesky(quadratic.flip(1, 2))
        change = torch.cholesky_solve(residual.mT.flip(1), lower).flip(1).mT

        # In steps from here on, so that a channel's scale is but a factor of its error.
        scale, zero = scale.reshape(groups, -1, 1).double(), zero_point.reshape(groups, -1, 1)
        ends = (grid.quant_min - zero, grid.quant_max - zero)
        rows = (rows / scale).gather(2, across)
        target, nearest = rows + change / scale, _rounded(rows, ends)
        codes = _fed_back(target, lower.flip(1, 2), ends)
        slope, other = (target - codes) @ quadratic, (target - nearest) @ quadratic
        better = (slope * (target - codes)).sum(-1, keepdim=True) < (other * (target - nearest)).sum(-1, keepdim=True)
        codes, slope = torch.where(better, codes, nearest), torch.where(better, slope, other)
        for _ in range(self.sweeps):
            if not _sweep_(codes, slope, quadratic, ends):
                break
        codes = torch.empty_like(codes).scatter_(2, across, codes) + zero
        return codes.reshape(weight.shape).to(weight.dtype)


Ends = tuple[Tensor, Tensor]


def _rounded(steps: Tensor, ends: Ends) -> Tensor:
    return steps.round().clamp(*ends)


def _fed_back(
    target: Float[Tensor, "groups out size"], factor: Float[Tensor, "groups size size"], ends: Ends
) -> Float[Tensor, "groups out size"]:
    """Codes of all columns in order, each making good the errors of those before it."""
    feedback = factor / factor.diagonal(dim1=1, dim2=2).unsqueeze(1)
    codes, errors = torch.empty_like(target), torch.empty_like(target)
    for first in range(0, target.shape[-1], _BLOCK):
        block = slice(first, first + _BLOCK)
        due = target[..., block] + errors[..., :first] @ feedback[:, :first, block]
        within = feedback[:, block, block]
        for column in range(due.shape[-1]):
            codes[..., first + column] = _rounded(due[..., column, None], ends)[..., 0]
            errors[..., first + column] = target[..., first + column] - codes[..., first + column]
            due[..., column + 1 :] += errors[..., first + column, None] * within[:, column, None, column + 1 :]
    return codes


def _sweep_(
    codes: Float[Tensor, "groups out size"],
    slope: Float[Tensor, "groups out size"],
    quadratic: Float[Tensor, "groups size size"],
    ends: Ends,
) -> bool:
    """Moves each column in turn to its best code, in place; whether any moved.

    Args:
        slope: (target - codes) @ quadratic, kept so.
    """
    diagonal = quadratic.diagonal(dim1=1, dim2=2).unsqueeze(1)
    any_moved = False
    for first in range(0, codes.shape[-1], _BLOCK):
        block = slice(first, first + _BLOCK)
        before, steepness = codes[..., block].clone(), slope[..., block].clone()
        within, curvature = quadratic[:, block, block], diagonal[..., block]
        for column in range(before.shape[-1]):
            best = before[..., column] + steepness[..., column] / curvature[..., column]
            codes[..., first + column] = _rounded(best.unsqueeze(-1), ends)[..., 0]
            moved = codes[..., first + column] - before[..., column]
            # Nothing reads again what this does to the columns before.
            steepness[..., column + 1 :] -= moved.unsqueeze(-1) * within[:, column, None, column + 1 :]
        moved = codes[..., block] - before
        if bool(moved.any()):
            any_moved = True
            slope -= moved @ quadratic[:, block]
    return any_moved


METHOD = GPTQ
