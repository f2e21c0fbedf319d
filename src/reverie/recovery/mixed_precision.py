"""Mixed precision: every tensor gets the bits that it needs, within what may be spent altogether.

    sensitivity of every tensor at every width (`sensitivity.py`)  ->  integer program (`allocation.py`)  ->  bits of every tensor

Three budgets, each a mean that bits must not exceed:

    effective_bits              over all weights, the first and last layer's included: the size of the packed network
    effective_activation_bits   over all values of quantized tensors of an image: the memory that it moves
    bit_operations              over all multiply-accumulates, bits of the weight x bits of what it is multiplied with: energy and
                                time of a device whose units have the widths

Scales, zero points and biases are not counted. Which weights the ends of the network have is for the program to say: a last
layer may be a third of all weights (MobileNetV2), and one that is sensitive gets its 8 bits anyway (docs/log.md).

Not here: a budget of measured time. ONNX Runtime, the runtime in which networks are proven, executes weights and activations of 2 to 8
bits alike, as bytes, so its time says nothing about bits.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, fx

from reverie.errors import ConfigError, check_range
from reverie.graph.placement import Bits, Student
from reverie.graph.taps import shapes
from reverie.grid import MAX_BITS, MIN_BITS
from reverie.observers import Observer
from reverie.progress import Progress
from reverie.randomness import Seed
from reverie.recovery.allocation import Budget, Term, allocate, check_reachable
from reverie.recovery.sensitivity import Sensitivity, measure

# What a tensor without a grid is computed in.
_FLOAT_BITS = 32


@dataclass(frozen=True, kw_only=True)
class MixedPrecision:
    """What may be spent; 0 for no such limit, and without any limit nothing is chosen.

    Args:
        effective_bits: Bits of a weight, mean over all weights, 2 to 8; then weights have the bits that the program chooses.
        effective_activation_bits: Likewise of an activation, mean over the values of one image on grids.
        bit_operations: Bits of the weight times bits of the activation, mean over multiply-accumulates, 4 to 64 (W4A8 has 32);
            then both weights and activations are chosen.
        widths: Bits that a tensor may get, 2 to 8 each. ONNX stores weights of up to 4 bits in 4 and others in 8, so [4, 8] makes
            the most of a small .onnx file; the packed network is dense.
        images: Calibration images on which sensitivity is measured.
        probes: Random directions of the answer looked into for each of them.
    """

    effective_bits: float = 0.0
    effective_activation_bits: float = 0.0
    bit_operations: float = 0.0
    widths: tuple[int, ...] = (2, 3, 4, 5, 6, 8)
    images: int = 64
    probes: int = 4

    def __post_init__(self) -> None:
        check_range(self, images=(2, math.inf), probes=(1, math.inf))
        if not self.widths or not all(MIN_BITS <= bits <= MAX_BITS for bits in self.widths):
            raise ConfigError(f"widths must be some of {MIN_BITS} to {MAX_BITS}, got {list(self.widths)}")
        for name, low, high in (
            ("effective_bits", MIN_BITS, MAX_BITS),
            ("effective_activation_bits", MIN_BITS, MAX_BITS),
            ("bit_operations", MIN_BITS**2, MAX_BITS**2),
        ):
            value = getattr(self, name)
            if value != 0 and not low <= value <= high:
                raise ConfigError(f"{name} must be {low} to {high}, or 0 for no limit, got {value:g}")

    @property
    def chooses(self) -> bool:
        """Whether there is a limit."""
        return self.chooses_weights or self.chooses_activations

    @property
    def chooses_weights(self) -> bool:
        """Whether the bits of weights are to be chosen."""
        return bool(self.effective_bits or self.bit_operations)

    @property
    def chooses_activations(self) -> bool:
        """Whether the bits of activations are to be chosen."""
        return bool(self.effective_activation_bits or self.bit_operations)


@dataclass(frozen=True)
class Tensors:
    """The tensors of a student that have bits: all weights, then all tensors on grids; and what counts in budgets.

    Args:
        names: Of layers and of tensors.
        weights: How many of them are weights.
        elements: Values of each, of an activation for one image.
        choices: The widths that each may have; one where nobody is to choose.
        operations: For each layer its place, that of the tensor that it reads (None if that is in float), and its
            multiply-accumulates for one image.
    """

    names: tuple[str, ...]
    weights: int
    elements: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]
    operations: tuple[tuple[int, int | None, int], ...]

    def budgets(self, settings: MixedPrecision) -> dict[str, Budget]:
        """Those that count something, by their setting, whether there is a limit or not.

        Raises:
            ConfigError: There is a limit where nothing counts.
        """
        sizes = tuple(Term((place,), count) for place, count in enumerate(self.elements))
        products = tuple(
            Term((place,), count * _FLOAT_BITS) if source is None else Term((place, source), count)
            for place, source, count in self.operations
        )
        parts = {
            "effective_bits": (sizes[: self.weights], sum(self.elements[: self.weights])),
            "effective_activation_bits": (sizes[self.weights :], sum(self.elements[self.weights :])),
            "bit_operations": (products, sum(count for *_, count in self.operations)),
        }
        for name, (_, counted) in parts.items():
            limit = getattr(settings, name)
            if limit and not counted:
                raise ConfigError(
                    f"mixed_precision.{name} must be 0 for a student that has no such tensors on a grid, got {limit:g}; leave it out"
                )
        return {
            name: Budget(f"mixed_precision.{name}", getattr(settings, name), terms, counted)
            for name, (terms, counted) in parts.items()
            if counted
        }


@dataclass(frozen=True)
class Decision:
    """The bits of every tensor, and why.

    Args:
        bits: Chosen or not.
        sensitivities: Of every tensor, in the order of `Tensors`.
        spent: What each budget's mean is, limited or not; none where nothing counts.
    """

    bits: Bits
    sensitivities: tuple[Sensitivity, ...]
    spent: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        chosen: dict[str, Mapping[str, int]] = {"weight": self.bits.weights, "activation": self.bits.activations}
        tensors = [
            {
                "name": part.name,
                "kind": part.kind,
                "elements": part.elements,
                "bits": chosen[part.kind][part.name],
                "divergence": {str(bits): value for bits, value in part.divergence.items()},
            }
            for part in self.sensitivities
        ]
        return {**self.spent, "tensors": tensors}

    @classmethod
    def from_dict(cls, told: dict[str, Any]) -> "Decision":
        """What `as_dict` gave."""
        bits: dict[str, dict[str, int]] = {"weight": {}, "activation": {}}
        sensitivities = []
        for part in told["tensors"]:
            bits[part["kind"]][part["name"]] = part["bits"]
            divergence = {int(width): value for width, value in part["divergence"].items()}
            sensitivities.append(Sensitivity(part["name"], part["kind"], part["elements"], divergence))
        spent = {name: value for name, value in told.items() if name != "tensors"}
        return cls(Bits(weights=bits["weight"], activations=bits["activation"]), tuple(sensitivities), spent)


def tensors_of(
    teacher: fx.GraphModule, student: Student, shape: tuple[int, ...], settings: MixedPrecision, fixed: Bits
) -> Tensors:
    """What there is to choose.

    Args:
        teacher: The graph that `student` was placed on.
        shape: Of one input, without the batch.
        fixed: Tensors whose bits are not to be chosen; those of the student are theirs.
    """
    device = next((tensor.device for tensor in teacher.buffers()), torch.device("cpu"))
    with torch.no_grad():
        sizes = {name: math.prod(size) for name, size in shapes(teacher, torch.zeros(1, *shape, device=device)).items()}
    weights, activations = list(student.layers), list(student.activations)
    stored = {name: student.graph.get_buffer(student.layers[name].weight) for name in weights}
    sources = [student.layers[name].source for name in weights]
    places = {name: len(weights) + number for number, name in enumerate(activations)}
    choices = [
        settings.widths if settings.chooses_weights and name not in fixed.weights else (student.weights[name].grid.bits,)
        for name in weights
    ] + [
        settings.widths
        if settings.chooses_activations and name not in fixed.activations
        else (student.activations[name].grid.bits,)
        for name in activations
    ]
    return Tensors(
        names=(*weights, *activations),
        weights=len(weights),
        elements=(
            *(stored[name].numel() for name in weights),
            *(sizes[name] for name in activations),
        ),
        choices=tuple(choices),
        operations=tuple(
            (place, None if source is None else places[source], sizes[name] * math.prod(stored[name].shape[1:]))
            for place, (name, source) in enumerate(zip(weights, sources, strict=True))
        ),
    )


def check_budgets(
    teacher: fx.GraphModule, student: Student, shape: tuple[int, ...], settings: MixedPrecision, fixed: Bits
) -> None:
    """Refuses a budget that not even the fewest bits meet; arguments as for `choose_bits`.

    Raises:
        ConfigError: Names the least that can be reached.
    """
    tensors = tensors_of(teacher, student, shape, settings, fixed)
    check_reachable(tensors.choices, [budget for budget in tensors.budgets(settings).values() if budget.limit])


def choose_bits(
    teacher: fx.GraphModule,
    student: Student,
    inputs: Float[Tensor, "count *shape"],
    settings: MixedPrecision,
    *,
    shape: tuple[int, ...],
    fixed: Bits,
    activations: Observer,
    weights: Observer,
    seed: Seed,
    progress: Progress,
) -> Decision:
    """The bits with the smallest sum of sensitivities within the budgets.

    Args:
        teacher: The graph that `student` was placed on.
        student: With the bits that tensors have where they are not chosen; not changed.
        inputs: Calibration images.
        shape: Of an input that the budgets are about, without the batch.
        fixed: Tensors whose bits are not to be chosen.
        activations, weights: Decide ranges.

    Raises:
        ConfigError: A budget cannot be met.
        ModelError: scipy is not installed, or a tensor takes a value that is not finite.
    """
    tensors = tensors_of(teacher, student, shape, settings, fixed)
    widths = sorted({*settings.widths, *(bits for choices in tensors.choices for bits in choices)})
    sensitivities = measure(
        teacher,
        student,
        inputs,
        widths,
        activations=activations,
        weights=weights,
        images=settings.images,
        probes=settings.probes,
        seed=seed,
        progress=progress,
    )
    # What an image of the network's own size has of them, whatever the size of those looked at.
    sensitivities = [replace(part, elements=count) for part, count in zip(sensitivities, tensors.elements, strict=True)]
    costs = [
        {bits: part.divergence[bits] for bits in choices} for part, choices in zip(sensitivities, tensors.choices, strict=True)
    ]
    budgets = tensors.budgets(settings)
    bits = allocate(costs, [budget for budget in budgets.values() if budget.limit], warn=progress.say)
    named = list(zip(tensors.names, bits, strict=True))
    chosen = Bits(weights=dict(named[: tensors.weights]), activations=dict(named[tensors.weights :]))
    return Decision(chosen, tuple(sensitivities), {name: budget.mean(bits) for name, budget in budgets.items()})
