"""Which tensors lose the accuracy, by which fault of their grids, and what mends it.

A fault is reported where it costs something: KL of the answer with only that tensor on its grid. Thresholds are factors with a
meaning on a grid and were not tuned on networks: a quarter of a range is two bits, ten times a median is three.

    finding                sign
    dead grid              the values span less than a quarter of the grid's range
    saturation             half a percent of the values or more are clipped, and most of the error's energy is theirs
    unbalanced operands    an operand of a sum or concatenation is ten times smaller than another, and less than two steps large
    outlier channel        a channel is ten times as large as the median one
    outliers               99.9 % of the values lie in a quarter of the range; or half of a weight's ranges have half the error
    few bits               none of these, and it costs a tenth of all, and a hundredth of a nat

Cross-layer equalization cures outlier channels where two layers share them (Nagel et al. 2019, arXiv:1906.04721, section 4.1).

Not here: trying cures (`remedies.py`), and errors that tensors only make together.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import fx

from reverie.graph.equalize import find_pairs
from reverie.grid import MAX_BITS
from reverie.observers.minmax import MinMax
from reverie.observers.mse import Mse
from reverie.observers.percentile import Percentile
from reverie.recipe import Recipe
from reverie.report.tensor_errors import Errors, TensorError, TensorKind
from reverie.rounding.nearest import Nearest

Fault = Literal["dead grid", "saturation", "unbalanced operands", "outlier channel", "outliers", "few bits"]

# A tensor costs something from this share of what all cost together, and from so many nats, on.
_SHARE, _NATS = 0.02, 1e-4
_FILLED = 0.25
_CLIPPED, _CLIPPING = 0.005, 0.8
_TIMES = 10.0
_STEPS = 2.0
_BULK = 0.25
_NARROWER, _GAIN_DB = 0.5, 3.0
_FEW_BITS_SHARE, _FEW_BITS_NATS = 0.1, 1e-2


@dataclass(frozen=True)
class Finding:
    """A fault of a tensor's grid.

    Args:
        fault: Which.
        tensor, kind: As in `TensorError`.
        cost: KL in nats with only this tensor on its grid.
        cause: In words.
        cure: In words.
        settings: The same as KEY=VALUE for `--set`; empty where no setting does it.
    """

    fault: Fault
    tensor: str
    kind: TensorKind
    cost: float
    cause: str
    cure: str
    settings: tuple[str, ...]


def find(errors: Errors, reference: fx.GraphModule, recipe: Recipe) -> list[Finding]:
    """The faults, those that cost most first.

    Args:
        errors: What was measured.
        reference: The graph it was measured against.
        recipe: What made the student: a cure is not what it does already.
    """
    total = sum(tensor.alone for tensor in errors.tensors)
    cures = _Cures(reference, recipe)
    found: list[Finding] = []
    for tensor in costly(errors):
        faults = list(_faults(tensor))
        if not faults and tensor.alone >= max(_FEW_BITS_SHARE * total, _FEW_BITS_NATS):
            faults = [("few bits", f"{tensor.bits} bits are few for it: signal to noise {tensor.sqnr:.1f} dB")]
        for fault, cause in faults:
            cure, settings = cures.of(fault, tensor)
            found.append(Finding(fault, tensor.name, tensor.kind, tensor.alone, cause, cure, settings))
    return sorted(found, key=lambda finding: -finding.cost)


def costly(errors: Errors) -> list[TensorError]:
    """The tensors that cost something, in execution order."""
    total = sum(tensor.alone for tensor in errors.tensors)
    return [tensor for tensor in errors.tensors if tensor.alone >= max(_SHARE * total, _NATS)]


def next_bits(bits: int) -> int:
    """How many bits a tensor is to have that should have more: twice as many, at most 8."""
    return min(2 * bits, MAX_BITS)


def _faults(tensor: TensorError) -> Iterable[tuple[Fault, str]]:
    if tensor.filled < _FILLED:
        yield (
            "dead grid",
            f"its values span {tensor.filled:.1%} of the range, {tensor.codes} of {2**tensor.bits} codes are used",
        )
        return
    if tensor.clipped >= _CLIPPED and tensor.clipping >= _CLIPPING:
        yield "saturation", f"{tensor.clipped:.1%} of its values are clipped, which is {tensor.clipping:.0%} of its error"
    unbalanced = tensor.operand_steps is not None and tensor.operand_ratio >= _TIMES and tensor.operand_steps < _STEPS
    if tensor.operands is not None and unbalanced:
        small, large = tensor.operands
        yield (
            "unbalanced operands",
            f"{large} is {_times(tensor.operand_ratio)} as large as {small}, which is {tensor.operand_steps:.2g} steps of the grid",
        )
    # The channels of a large operand are outliers too.
    if tensor.channel is not None and tensor.channel_ratio >= _TIMES and not unbalanced:
        which = "channel" if tensor.kind == "activation" else "input channel"
        yield "outlier channel", f"{which} {tensor.channel} is {_times(tensor.channel_ratio)} as large as the median one"
    elif tensor.bulk < _BULK and not unbalanced:
        yield "outliers", f"99.9 % of its values lie in {tensor.bulk:.1%} of the range"
    elif tensor.narrower <= _NARROWER and tensor.narrower_gain >= _GAIN_DB:
        yield "outliers", f"{tensor.narrower:.0%} of its ranges have {tensor.narrower_gain:.1f} dB less error"


def _times(ratio: float) -> str:
    return f"{ratio:.3g} times" if ratio < 1000 else f"{ratio:,.0f} times"


class _Cures:
    """What to do about each fault that the recipe does not do yet."""

    def __init__(self, reference: fx.GraphModule, recipe: Recipe) -> None:
        self._recipe = recipe
        pairs = [] if recipe.quantization.equalize or recipe.quantization.placement != "integer" else find_pairs(reference)
        self._between = {name for pair in pairs for name in (pair.first, *pair.between)}
        self._second = {pair.second for pair in pairs}

    def of(self, fault: Fault, tensor: TensorError) -> tuple[str, tuple[str, ...]]:
        """In words and as settings."""
        if fault == "outlier channel":
            if tensor.name in (self._between if tensor.kind == "activation" else self._second):
                return "equalize its layers", ("quantization.equalize=true",)
            return self._more_bits(tensor)
        if fault in ("unbalanced operands", "few bits"):
            return self._more_bits(tensor)
        return self._ranges(tensor, wider=fault == "saturation")

    def _ranges(self, tensor: TensorError, *, wider: bool) -> tuple[str, tuple[str, ...]]:
        """Another range, in the direction that helps."""
        table = "activations" if tensor.kind == "activation" else "weights"
        observer = getattr(self._recipe, table)
        if table == "activations" and self._recipe.clipping.images:
            return "take ranges from the images themselves", ("clipping.images=0",)
        if wider:
            if isinstance(observer, Percentile) and observer.percentile < 99.99:
                return "wider ranges", (f"{table}.percentile=99.99",)
            if not isinstance(observer, MinMax):
                return "ranges that hold every value", (f"{table}.method=minmax",)
            return "images with larger values: more of them", (f"images={max(2 * self._recipe.images, 64)}",)
        # One extreme value weighs as much as thousands of small ones in a squared error, so a percentile and not mse.
        if table == "activations" and not (isinstance(observer, Percentile) and observer.percentile <= 99.9):
            return "narrower ranges", ("activations.method=percentile", "activations.percentile=99.9")
        if not isinstance(observer, Mse):
            return "ranges with the least error", (f"{table}.method=mse",)
        return self._more_bits(tensor)

    def _more_bits(self, tensor: TensorError) -> tuple[str, tuple[str, ...]]:
        if tensor.bits == MAX_BITS:
            return f"it has {MAX_BITS} bits already; keep this layer in full precision outside of the network", ()
        if tensor.kind == "weight" and isinstance(self._recipe.rounding, Nearest):
            return "learned rounding", ("rounding.method=adaround",)
        key = "activations" if tensor.kind == "activation" else "weights"
        # The setting is one table of all tensors with bits of their own.
        bits = {**getattr(self._recipe.bits, key), tensor.name: next_bits(tensor.bits)}
        table = ",".join(f"{name}={count}" for name, count in bits.items())
        return f"{next_bits(tensor.bits)} bits for this tensor", (f"bits.{key}={{{table}}}",)
