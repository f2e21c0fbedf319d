"""SQuant: rounding errors that cancel within each kernel and each output channel. Reads no image.

    minimise over the codes   sum |e_i|  ->  then per kernel |sum e|  ->  then per output channel |sum e|       e = code - weight / scale

Taking the second moments of a layer's inputs for a diagonal, plus a constant on each kernel's block, plus a constant on the
whole output channel (inputs that are alike nearby: their products have one sign), the quadratic error splits into these
three sums. They are made small one after the other, each by the fewest flips of a code to the weight's other neighbour:

    round to nearest                                                  |e| <= 1/2
    in each kernel, flip round(|sum e|) codes of the sum's sign, those with the largest |e| first          |sum e| <= 1/2
    in each output channel, flip round(|sum e|) of the kernels' candidates, those with the largest |e| first

A kernel's candidate is the one code whose flip keeps its sum within 1: where it flipped more than its sum asked for, the last
flipped (which flips back), else the next in line. Where nothing is clipped there are always enough, so afterwards (but for float64's rounding)

    every code is one of the two neighbours of its weight (|e| < 1);   |sum e| <= 1 in a kernel, <= 1/2 in an output channel

What the grid clips stays at the grid's end, with an error of any size that counts in both sums: the other weights make good for it, as far as
they can by one flip each that stays on the grid; a kernel's |sum e| is then at most 1 or what nearest rounding leaves. (Left out of
the sums, clipping cost twice the KL; docs/log.md.)

A linear layer, as a 1x1 convolution, has kernels of one weight: only the last stage does anything there. A depthwise one has one
kernel per channel.

Reference: Guo et al. 2022, arXiv:2202.07471, sections 3 and 4, algorithms 1 and 2.

    paper              here            meaning
    delta W, p         errors          perturbation, in steps
    SQuant-E, -K, -C   __call__        the three stages
    SQuantFlip         _flip()         which codes of a row flip

Not here: the paper's ranges of activations from batch-norm statistics (`observers` have them from images).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reverie.grid import Grid


@dataclass(frozen=True, kw_only=True)
class SQuant:
    """Has no settings."""

    needs: ClassVar[Literal["weights"]] = "weights"

    def __call__(
        self,
        weight: Float[Tensor, "out *rest"],
        scale: Float[Tensor, "out *ones"],
        zero_point: Int[Tensor, "out *ones"],
        grid: Grid,
    ) -> Float[Tensor, "out *rest"]:
        """The codes, in float."""
        # A linear layer's weight has no space: each is a kernel by itself.
        steps = (weight.double() / scale + zero_point).reshape(*weight.shape[:2], -1)
        codes = steps.round().clamp(grid.quant_min, grid.quant_max)
        codes, candidates = _flip(codes, steps, torch.ones_like(codes, dtype=torch.bool), grid)
        codes, _ = _flip(codes.flatten(1), steps.flatten(1), candidates.flatten(1), grid)
        return codes.reshape(weight.shape).to(weight.dtype)


def _flip(
    codes: Float[Tensor, "*rows size"],
    steps: Float[Tensor, "*rows size"],
    allowed: Bool[Tensor, "*rows size"],
    grid: Grid,
) -> tuple[Float[Tensor, "*rows size"], Bool[Tensor, "*rows size"]]:
    """The codes with as many flips as bring each row's sum of errors within 1/2, and each row's candidate for one more."""
    errors = codes - steps
    total = errors.sum(-1, keepdim=True)
    sign, wanted = total.sign(), total.abs()
    moved = codes - sign
    allowed = allowed & (errors * sign > 0) & (moved >= grid.quant_min) & (moved <= grid.quant_max)
    rank = torch.where(allowed, errors.abs(), 0.0).argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    flipped = allowed & (rank < wanted.round())
    count = flipped.sum(-1, keepdim=True)
    candidate = torch.where(count > wanted, rank == count - 1, allowed & (rank == count) & (count < wanted))
    return torch.where(flipped, moved, codes), candidate


METHOD = SQuant
