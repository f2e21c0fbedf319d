"""The fake-quantize modules that a student graph calls: on tensors, weights and biases."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from reverie.grid import Grid, dequantize, fake_quantize, quantize


class ActivationQuantizer(nn.Module):
    """Puts a tensor on a per-tensor grid. Until `set_qparams` is called it passes values through unchanged."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        self.calibrated = False
        self.log_gain: nn.Parameter | None = None
        self._dropping: Dropping | None = None
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("zero_point", torch.zeros((), dtype=torch.int32))

    def set_qparams(self, scale: Float[Tensor, ""], zero_point: Int[Tensor, ""]) -> None:
        """Fixes the grid; from now on values are quantized."""
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)
        self.calibrated = True

    def learn_scale(self) -> nn.Parameter:
        """From now on the scale is learned, as a factor exp(parameter) on what it is; gives the parameter."""
        self.log_gain = nn.Parameter(torch.zeros_like(self.scale))
        return self.log_gain

    def drop(self, dropping: "Dropping | None") -> "Dropping | None":
        """From now on some of the values, others at each call, pass unquantized, or (None) none; gives what was set before."""
        before, self._dropping = self._dropping, dropping
        return before

    @torch.no_grad()
    def settle(self) -> None:
        """The scale is what has been learned, and nothing is dropped any more."""
        self._dropping = None
        if self.log_gain is not None:
            self.scale.mul_(self.log_gain.exp())
            self.log_gain = None

    def current_scale(self) -> Float[Tensor, ""]:
        """The scale as far as it has been learned."""
        return self.scale if self.log_gain is None else self.scale * self.log_gain.exp()

    def forward(self, x: Tensor) -> Tensor:
        if not self.calibrated:
            return x
        keep = None if self._dropping is None else self._dropping.keep(x)
        return fake_quantize(x, self.current_scale(), self.zero_point, self.grid, keep)


class Dropping:
    """Leaves a share of the values unquantized, others at each call (QDrop).

    Args:
        share: Probability with which a value passes as it is.
        random: On the CPU.
    """

    # So many places where a window into the draws may begin.
    _PLACES = 1 << 16

    def __init__(self, share: float, random: torch.Generator) -> None:
        self._share, self._random = share, random
        self._draws = torch.empty(0)

    def keep(self, like: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """1 where a value is quantized, else 0, in the layout of `like`."""
        # Drawing a million numbers costs as much as quantizing them: a call sees a window, at a random place, of numbers that are
        # drawn once. And a mask in floats: torch.lerp is one pass each way, a boolean mask several.
        needed = like.numel() + self._PLACES
        if len(self._draws) < needed:
            self._draws = (torch.rand(needed, generator=self._random) >= self._share).to(like)
        begin = int(torch.randint(self._PLACES, (), generator=self._random))
        window = self._draws[begin : begin + like.numel()]
        if like.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last):
            rows, channels, height, width = like.shape
            return window.view(rows, height, width, channels).permute(0, 3, 1, 2)
        return window.view(like.shape)

    def state(self) -> dict[str, Tensor]:
        """What `restore` needs to go on from here."""
        return {"draws": self._draws.to(torch.uint8), "random": self._random.get_state()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Goes back to where `state` was taken."""
        self._draws = state["draws"].to(torch.float32)
        self._random.set_state(state["random"])

    def mix(self, whole: Float[Tensor, "*shape"], quantized: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Each value of `whole` with the probability, else that of `quantized`."""
        return torch.lerp(whole, quantized, self.keep(quantized))


class Rounder(nn.Module):
    """How one weight tensor becomes codes: what every rounding method makes.

    A method subclasses it. `forward` and `harden` agree once learning is over.
    """

    def forward(self) -> Float[Tensor, "*shape"]:
        """Codes as they are now, in float; whole numbers unless a method relaxes them while learning."""
        raise NotImplementedError

    def penalty(self, progress: float) -> Float[Tensor, ""]:
        """What is added to the reconstruction loss; `progress` runs from 0 to 1 over the learning."""
        raise NotImplementedError

    def harden(self) -> Float[Tensor, "*shape"]:
        """The final codes: whole numbers on the grid."""
        raise NotImplementedError


class WeightQuantizer(nn.Module):
    """Puts a layer's weight on a per-output-channel grid.

    In order of its life: passes the weight through; with `set_qparams`, rounds to nearest at every call with
    straight-through gradients; with a `rounder`, asks it; with `set_codes`, answers the stored result, until `release`
    makes it round again. While a weight itself is learned, `follow` makes its range go along with it, or `learn_scale` makes
    the scale learned too; `settle` ends either.
    """

    scale: Tensor
    zero_point: Tensor
    codes: Tensor | None

    def __init__(self, grid: Grid, weight: Tensor) -> None:
        super().__init__()
        self.grid = grid
        self.calibrated = False
        self.rounder: Rounder | None = None
        self.log_gain: nn.Parameter | None = None
        self._range: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
        column = (weight.shape[0], *[1] * (weight.dim() - 1))
        self.register_buffer("scale", weight.new_ones(column))
        self.register_buffer("zero_point", torch.zeros(column, dtype=torch.int32, device=weight.device))
        self.register_buffer("codes", None)

    def set_qparams(self, scale: Float[Tensor, "out *ones"], zero_point: Int[Tensor, "out *ones"]) -> None:
        """Fixes the grid."""
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)
        self.calibrated = True

    def set_codes(self, codes: Float[Tensor, "out *rest"]) -> None:
        """Fixes the result; the rounder, if any, is dropped."""
        self.codes = codes.detach()
        self.rounder = None

    @torch.no_grad()
    def release(self, weight: Float[Tensor, "out *rest"]) -> None:
        """Makes `weight` what its codes stand for, in place, and rounds it to nearest again from now on: to the same codes, at first."""
        if self.codes is not None:
            weight.copy_(dequantize(self.codes, self.scale, self.zero_point))
            self.codes = None

    def final_codes(self, weight: Tensor) -> Tensor:
        """The codes that an integer runtime stores, int8 (signed grid) or uint8."""
        codes = quantize(weight, self.scale, self.zero_point, self.grid) if self.codes is None else self.codes
        return codes.to(torch.int8 if self.grid.signed else torch.uint8)

    def follow(self, qparams: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        """From now on scale and zero point are those that `qparams` gives for the weight as it is at each call."""
        self._range = qparams

    def learn_scale(self) -> nn.Parameter:
        """From now on the scale is learned, as factors exp(parameter) on what it is; gives the parameter."""
        self.log_gain = nn.Parameter(torch.zeros_like(self.scale))
        return self.log_gain

    @torch.no_grad()
    def settle(self, weight: Tensor) -> None:
        """Scale and zero point are what `weight` ends with, or what has been learned."""
        if self._range is not None:
            self.set_qparams(*self._range(weight))
            self._range = None
        if self.log_gain is not None:
            self.scale.mul_(self.log_gain.exp())
            self.log_gain = None

    def current_scale(self) -> Float[Tensor, "out *ones"]:
        """The scale as far as it has been learned."""
        return self.scale if self.log_gain is None else self.scale * self.log_gain.exp()

    def forward(self, weight: Tensor) -> Tensor:
        if self.codes is not None:
            return dequantize(self.codes, self.current_scale(), self.zero_point)
        if self.rounder is not None:
            return dequantize(self.rounder(), self.current_scale(), self.zero_point)
        if self._range is not None:
            with torch.no_grad():
                self.set_qparams(*self._range(weight))
        return fake_quantize(weight, self.current_scale(), self.zero_point, self.grid) if self.calibrated else weight


class BiasQuantizer(nn.Module):
    """Puts a bias on the int32 grid of the accumulator, whose scale is that of the input times that of the weight."""

    def __init__(self, source: ActivationQuantizer, weight: WeightQuantizer) -> None:
        super().__init__()
        # In a tuple, so that they are not registered (and saved) a second time below this module.
        self._quantizers = (source, weight)

    def scale(self) -> Float[Tensor, " out"]:
        """Real width of one step of each output channel's accumulator."""
        source, weight = self._quantizers
        return source.current_scale() * weight.current_scale().flatten()

    def final_codes(self, bias: Float[Tensor, " out"]) -> Int[Tensor, " out"]:
        """The int32 codes that an integer runtime stores."""
        return torch.round(bias / self.scale()).to(torch.int32)

    def forward(self, bias: Tensor) -> Tensor:
        source, weight = self._quantizers
        if not (source.calibrated and weight.calibrated):
            return bias
        scale = self.scale()
        # Straight-through: the step is far below anything a gradient could tell.
        return bias + (torch.round(bias / scale) * scale - bias).detach()
