"""The arithmetic of integer grids: what quantize, dequantize and fake-quantize mean here, and nothing else.

    codes = clamp(round(x / scale) + zero_point, quant_min, quant_max)        value = (codes - zero_point) * scale

`scale` is the real width of one step, `round` is half to even, the division is a true division: this is ONNX's
QuantizeLinear, and ONNX Runtime is the truth our tests compare with, ties included. Gradients are straight-through
inside the range and zero outside (as `torch.fake_quantize_*`), and for `scale` those of LSQ (Esser et al. 2020,
arXiv:1902.08153, eq. 3), without its gradient scaling.

Not here: where quantizers sit (`graph`), how ranges are found (`observers`), how weights are rounded (`rounding`).
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reverie.errors import ConfigError

MIN_BITS, MAX_BITS = 2, 8


@dataclass(frozen=True)
class Grid:
    """The codes allowed.

    Args:
        bits: 2 to 8.
        signed: Codes are -2^(bits-1) .. 2^(bits-1)-1, else 0 .. 2^bits-1.
    """

    bits: int = 8
    signed: bool = True

    def __post_init__(self) -> None:
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise ConfigError(f"Grid.bits must be {MIN_BITS} to {MAX_BITS}, got {self.bits}")

    @property
    def quant_min(self) -> int:
        """The smallest code."""
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def quant_max(self) -> int:
        """The largest code."""
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1


def affine_qparams(
    low: Float[Tensor, "*shape"], high: Float[Tensor, "*shape"], grid: Grid, *, include_zero: bool = True
) -> tuple[Float[Tensor, "*shape"], Int[Tensor, "*shape"]]:
    """Scale and zero point whose grid spans `low` to `high`.

    Args:
        low, high: Ends of the range, `low <= high`.
        grid: The codes to spread over it.
        include_zero: Widen the range to hold 0.0, so that padding and ReLU's zero are exact. Without it the zero point
            may lie outside the grid (the literature's quantizer, algorithms 1.2).
    """
    if include_zero:
        low, high = low.clamp(max=0), high.clamp(min=0)
    scale = _positive((high - low) / (grid.quant_max - grid.quant_min))
    zero_point = grid.quant_min - torch.round(low / scale)
    if include_zero:
        zero_point = zero_point.clamp(grid.quant_min, grid.quant_max)
    return scale, zero_point.to(torch.int32)


def symmetric_qparams(
    low: Float[Tensor, "*shape"], high: Float[Tensor, "*shape"], grid: Grid
) -> tuple[Float[Tensor, "*shape"], Int[Tensor, "*shape"]]:
    """Scale of the grid centred on 0.0 that covers `low` to `high`, and a zero point of 0.

    The smallest code has no mirror image, so a range with a longer negative side may use it.
    """
    scale = _positive(torch.maximum(high / grid.quant_max, low / min(grid.quant_min, -1)))
    return scale, torch.zeros_like(scale, dtype=torch.int32)


def _positive(scale: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    # An all-zero channel has no width; any step codes it exactly. Below this, scale_x * scale_w would leave float32's
    # normal range, where runtimes flush to zero.
    return torch.where(scale > 1e-12, scale, torch.ones_like(scale))


def quantize(
    x: Float[Tensor, "*shape"], scale: Float[Tensor, "*#shape"], zero_point: Int[Tensor, "*#shape"], grid: Grid
) -> Float[Tensor, "*shape"]:
    """The integer code of every value, kept in float.

    Args:
        x: Values.
        scale: Real width of one step, > 0. Broadcasts against `x`: `(out, 1, 1, 1)` for a per-channel conv weight, `()`
            per tensor.
        zero_point: The code of 0.0, same shape as `scale`.
        grid: The codes allowed.
    """
    return (torch.round(x / scale) + zero_point).clamp(grid.quant_min, grid.quant_max)


def dequantize(
    codes: Float[Tensor, "*shape"], scale: Float[Tensor, "*#shape"], zero_point: Int[Tensor, "*#shape"]
) -> Float[Tensor, "*shape"]:
    """The real value of every code."""
    return (codes - zero_point) * scale


def fake_quantize(
    x: Float[Tensor, "*shape"],
    scale: Float[Tensor, "*#shape"],
    zero_point: Int[Tensor, "*#shape"],
    grid: Grid,
    keep: Float[Tensor, "*shape"] | None = None,
) -> Float[Tensor, "*shape"]:
    """`dequantize(quantize(x))` with gradients for `x` and `scale`; arguments as in `quantize`.

    Args:
        keep: 1 where a value is quantized and 0 where it passes as it is; None quantizes all.
    """
    if not torch.is_grad_enabled() or not (x.requires_grad or scale.requires_grad):
        codes = torch.div(x, scale).round_()
        levels = codes.add_(zero_point).clamp_(grid.quant_min, grid.quant_max).sub_(zero_point).mul_(scale)
        return levels if keep is None else torch.lerp(x, levels, keep)
    return _FakeQuantize.apply(x, scale, zero_point, grid, keep)  # type: ignore[no-any-return, no-untyped-call]


class _FakeQuantize(torch.autograd.Function):
    # Written for memory traffic: no boolean tensor, whose every use costs several passes over floats.
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid, keep: Tensor | None) -> Tensor:
        codes = torch.div(x, scale).round_().add_(zero_point)
        levels = torch.clamp(codes, grid.quant_min, grid.quant_max).sub_(zero_point).mul_(scale)
        ctx.grid = grid
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(codes, keep, x, levels, scale)
        else:
            ctx.save_for_backward(codes, keep)
        return levels if keep is None else torch.lerp(x, levels, keep)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        (gradient,) = gradients
        codes, keep, *kept = ctx.saved_tensors
        through = gradient if keep is None else gradient * keep
        # Codes are whole numbers, so half a step outside tells the last one inside from the first outside.
        inside = torch.ops.aten.hardtanh_backward(through, codes, ctx.grid.quant_min - 0.5, ctx.grid.quant_max + 0.5)
        for_x = for_scale = None
        if ctx.needs_input_grad[0]:
            for_x = inside if keep is None else torch.sub(gradient, through).add_(inside)
        if kept:
            x, levels, scale = kept
            # LSQ: (levels - x) / scale inside, levels / scale outside, summed over what shares a scale.
            if scale.numel() == 1:
                for_scale = (_dot(through, levels) - _dot(inside, x)).view(scale.shape) / scale
            else:
                for_scale = torch.addcmul(through * levels, inside, x, value=-1).sum_to_size(scale.shape) / scale
        return for_x, for_scale, None, None, None


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """The sum of products, without a tensor of them where both lie in memory alike."""
    if left.stride() == right.stride() and (left.is_contiguous() or left.is_contiguous(memory_format=torch.channels_last)):
        flat = ((left.numel(),), (1,))
        return torch.dot(left.as_strided(*flat), right.as_strided(*flat))
    return torch.sum(left * right)
