"""The one recovery loop: unit by unit, fit the quantized network's output to the full-precision one's.

    minimise over what the rounders learn:  mean over batch, space of sum over channels (student - teacher)^2 + penalty

The student's unit reads what the quantized network before it really produces, the teacher's the full-precision values
(asymmetric reconstruction: 68.37 against 66.56 for ResNet-18 in the paper). Units are taken in execution order, and each
is hardened before the next. With unit "layer" and `rounding/adaround.py` this is AdaRound (Nagel et al. 2020, section
3.3; algorithms section 5), its activation function inside the loss. With unit "block" it is BRECQ (Li et al. 2021, section 3.2)
without its Fisher weights; with `learned_ranges` and `drop` 0.5 as well it is QDrop (Wei et al. 2022, section 3.3), which leaves each
value unquantized with that probability: both the unit's inputs, which are then the teacher's, and the tensors on grids inside. A
unit's learned scales are those of the tensors it reads and of those inside; what it writes is on the grid of whoever reads it. A
scale that something was computed with already (by an earlier unit, or by a pooling between two) stays as it is.

Not here: BRECQ's Fisher weights, early stopping.

The dials: the unit, the images, the rounding method, and the numbers of `Reconstruction`. AdaRound's paper takes 10,000
to 20,000 iterations at learning rate 1e-3; ten times the rate reaches the same rounding in a twentieth of them, because a
logit only has to cross zero.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, fx

from reverie.checkpoints import Checkpoints
from reverie.descent import Descent
from reverie.errors import check_range
from reverie.graph.extract import extract
from reverie.graph.operators import LINEARS, layers
from reverie.graph.placement import Student
from reverie.graph.quantizers import Rounder, mixed
from reverie.graph.units import Unit, UnitKind, find_units
from reverie.graph.walk import Walk
from reverie.progress import Progress
from reverie.randomness import Seed
from reverie.recovery.closed_form import round_at_once
from reverie.recovery.ranges import keep_biases_in_range
from reverie.rounding import Learned, Rounding

# Beside the layers' codes in a checkpoint; no node of a graph is called so.
_ERRORS = "errors before, after"


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """How long and how the loop runs.

    Args:
        unit: "layer", "block" or "network".
        iterations: Adam steps for each unit.
        batch: Images for each step, drawn with replacement.
        learning_rate: Of what the rounding method learns; constant.
        learned_ranges: Whether the scales of activations inside and at the entry of the unit are learned too (LSQ).
        range_rate: Learning rate of those scales at the first step, relative to themselves; it falls to 0 by half a cosine.
        drop: Probability with which a value is left unquantized while the unit learns, drawn anew at each step for the
            unit's inputs (which are then the teacher's) and for every tensor on a grid (QDrop; 0.5 there).
    """

    unit: UnitKind = "layer"
    iterations: int = 500
    batch: int = 32
    learning_rate: float = 1e-2
    learned_ranges: bool = False
    range_rate: float = 1e-3
    drop: float = 0.0

    def __post_init__(self) -> None:
        check_range(
            self,
            iterations=(1, math.inf),
            batch=(1, math.inf),
            learning_rate=(1e-9, math.inf),
            range_rate=(0, math.inf),
            drop=(0, 1),
        )


def round_weights(
    teacher: fx.GraphModule,
    student: Student,
    inputs: Float[Tensor, "count *shape"],
    rounding: Rounding,
    settings: Reconstruction,
    *,
    weights: Float[Tensor, " count"] | None = None,
    seed: Seed,
    checkpoints: Checkpoints,
    progress: Progress,
) -> dict[str, tuple[float, float]]:
    """Decides every weight's code, in place.

    Args:
        teacher: The graph that `student` was placed on.
        student: Calibrated.
        inputs: Calibration images.
        weights: How often each of them is to be drawn, in proportion; None for all alike.

    Returns:
        For each unit (each layer, where the rounding needs moments) its mean squared error on the calibration images before (at the
        nearest codes) and after. Empty for a rounding that looks at weights alone.
    """
    if rounding.needs != "reconstruction":
        return round_at_once(teacher, student, inputs, rounding, weights=weights, seed=seed, progress=progress)
    units = find_units(teacher, settings.unit)
    linear = {node.name for node in layers(teacher) if node.target in LINEARS}
    walks = _PairedWalk(teacher, student.graph, inputs, units, with_entry=settings.learned_ranges or settings.drop > 0)
    owned = walks.ranges(student, units) if settings.learned_ranges else {}
    errors: dict[str, tuple[float, float]] = {}
    with progress.stage("round", total=settings.iterations * len(units)) as step:
        for number, unit in enumerate(units):
            part, ranges = checkpoints.load(f"codes-{number}"), owned.get(unit.name, [])
            if part is None:
                before, after = _learn(
                    student, unit, walks.at(unit), ranges, rounding, settings, linear, weights, seed.at(unit.name), step
                )
                part = {name: student.weights[name].final_codes(_weight(student, name)) for name in unit.layers}
                part |= {f"scale of {name}": student.activations[name].scale for name in ranges}
                part[_ERRORS] = torch.tensor([before, after], dtype=torch.float64)
                checkpoints.save(f"codes-{number}", part)
            else:
                for name in unit.layers:
                    student.weights[name].set_codes(part[name].to(student.weights[name].scale))
                for name in ranges:
                    student.activations[name].scale.copy_(part[f"scale of {name}"])
                keep_biases_in_range(student)
                step(settings.iterations, skipped=True)
            before, after = part[_ERRORS].tolist()
            errors[unit.name] = (before, after)
            walks.passed(unit)
    return errors


@dataclass(frozen=True)
class _Data:
    """What a unit sees, for all images.

    Args:
        sources: What it reads in the student.
        clean: What it reads in the teacher; empty where nobody asks.
        target: What it should answer.
    """

    sources: list[Tensor]
    clean: list[Tensor]
    target: Tensor


class _PairedWalk:
    """Teacher and student walking through the same images side by side.

    Args:
        with_entry: Whether the quantizers of a unit's inputs belong to it, and the teacher's inputs are wanted too.
    """

    def __init__(
        self, teacher: fx.GraphModule, student: fx.GraphModule, inputs: Tensor, units: list[Unit], *, with_entry: bool
    ) -> None:
        self._student, self._with_entry = student, with_entry
        self._sources = {unit.name: extract(student, unit, with_entry=with_entry)[1] for unit in units}
        clean = [source for sources in self._sources.values() for source in sources] if with_entry else []
        self._teacher_walk = Walk(teacher, inputs, batch=64, keep=[*clean, *(unit.output for unit in units)])
        self._order = {node.name: index for index, node in enumerate(student.graph.nodes)}
        self._readers: dict[str, int] = {}
        for sources in self._sources.values():
            for source in sources:
                self._readers[source] = self._readers.get(source, 0) + 1
        self._student_walk = Walk(student, inputs, batch=64, keep=self._readers)

    def at(self, unit: Unit) -> _Data:
        """What the unit reads, and what it should answer."""
        sources = self._sources[unit.name]
        self._student_walk.to(max(sources, key=self._order.__getitem__))
        self._teacher_walk.to(unit.output)
        return _Data(
            sources=[self._student_walk.value(source) for source in sources],
            clean=[self._teacher_walk.value(source) for source in sources] if self._with_entry else [],
            target=self._teacher_walk.value(unit.output),
        )

    def ranges(self, student: Student, units: list[Unit]) -> dict[str, list[str]]:
        """For each unit, the tensors whose scales it may learn: those it reads and those inside, if nothing was computed with them yet."""
        found: dict[str, list[str]] = {}
        taken: set[str] = set()
        reached = -1
        for unit in units:
            # The student has walked to the last of these tensors by then, and not through the quantizer behind it.
            reached = max(reached, *(self._order[source] for source in self._sources[unit.name]))
            names = [*unit.inputs, *(name for name in unit.nodes if name != unit.output)]
            fresh = [name for name in names if name in student.activations and self._order[name] >= reached]
            found[unit.name] = [name for name in fresh if name not in taken]
            taken.update(found[unit.name])
        return found

    def passed(self, unit: Unit) -> None:
        """The unit is hardened; what only it needed can go."""
        if not self._readers.get(unit.output):
            self._teacher_walk.release(unit.output)
        for source in self._sources[unit.name]:
            self._readers[source] -= 1
            if not self._readers[source]:
                self._student_walk.release(source)
                self._teacher_walk.release(source)


def _weight(student: Student, name: str) -> Tensor:
    return student.graph.get_buffer(student.layers[name].weight)


def _rounder(student: Student, name: str, rounding: Learned) -> Rounder:
    quantizer = student.weights[name]
    return rounding(_weight(student, name), quantizer.scale, quantizer.zero_point, quantizer.grid)


def _learn(
    student: Student,
    unit: Unit,
    data: _Data,
    ranges: list[str],
    rounding: Learned,
    settings: Reconstruction,
    linear: set[str],
    weights: Tensor | None,
    seed: Seed,
    step: Callable[..., None],
) -> tuple[float, float]:
    module, _ = extract(student.graph, unit, with_entry=bool(data.clean))
    target = data.target
    before = _error(module, data.sources, target)
    rounders = {name: _rounder(student, name, rounding) for name in unit.layers}
    for name, rounder in rounders.items():
        student.weights[name].rounder = rounder
    generator, noise = seed.generator(), seed.at("drop").generator(target.device)
    learned = [student.activations[name] for name in ranges]
    groups = [{"params": [p for rounder in rounders.values() for p in rounder.parameters()], "lr": settings.learning_rate}]
    if learned:
        groups.append({"params": [quantizer.learn_scale() for quantizer in learned], "lr": settings.range_rate})
    if settings.drop:
        for name in (*unit.inputs, *unit.nodes):
            if name in student.activations:
                student.activations[name].drop(settings.drop, noise)
    optimizer = torch.optim.Adam(groups)
    descent = Descent(
        optimizer,
        place=f"reconstruction of {unit.name}",
        cure=f"try --set reconstruction.learning_rate={settings.learning_rate / 4:g} with another --output",
    )
    count = target.shape[0]
    # What a linear layer writes has its channels last, whatever stands before them.
    channel = -1 if unit.layers[-1] in linear else 1
    for iteration in range(settings.iterations):
        progress = iteration / settings.iterations
        if learned:
            optimizer.param_groups[1]["lr"] = settings.range_rate * (1 + math.cos(math.pi * progress)) / 2
        if weights is None:
            picked = torch.randint(count, (settings.batch,), generator=generator).to(target.device)
        else:
            picked = torch.multinomial(weights, settings.batch, replacement=True, generator=generator).to(target.device)
        inputs = [source[picked] for source in data.sources]
        if settings.drop:
            inputs = [
                mixed(clean[picked], source, settings.drop, noise) for clean, source in zip(data.clean, inputs, strict=True)
            ]
        output = module(*inputs)
        distance = (output - target[picked]).square().sum(dim=channel).mean()
        penalties = {f"penalty of {name}": rounder.penalty(progress) for name, rounder in rounders.items()}
        descent.step(iteration, {"distance": distance, **penalties})
        step()
    for name, rounder in rounders.items():
        student.weights[name].set_codes(rounder.harden())
    for name in (*unit.inputs, *unit.nodes):
        if name in student.activations:
            student.activations[name].settle()
    keep_biases_in_range(student)
    return before, _error(module, data.sources, target)


@torch.no_grad()
def _error(module: fx.GraphModule, sources: list[Tensor], target: Tensor, batch: int = 64) -> float:
    """Mean squared error of a unit over all calibration images."""
    total = 0.0
    for start in range(0, target.shape[0], batch):
        output = module(*(source[start : start + batch] for source in sources))
        total += float((output - target[start : start + batch]).square().sum())
    return total / target.numel()
