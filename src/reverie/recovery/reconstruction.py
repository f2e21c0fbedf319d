"""The one recovery loop: unit by unit, fit the quantized network's output to the full-precision one's.

    minimise over what is learned:  mean over batch, space of sum over channels w (student - teacher)^2 + penalty

The student's unit reads what the quantized network before it really produces, the teacher's the full-precision values
(asymmetric reconstruction: 68.37 against 66.56 for ResNet-18 in the paper). Units are taken in execution order, and each
is hardened before the next. The methods are settings of this loop:

    unit      learned                              more                                      method
    layer     rounding                                                                       AdaRound (Nagel et al. 2020, section 3.3)
    block     rounding, then scales of tensors     w from `fisher.py`, tensors in float      BRECQ (Li et al. 2021, section 3.2)
                                                   while weights are rounded
    block     rounding and scales of tensors       half of all values unquantized            QDrop (Wei et al. 2022, section 3.3)
    block     the same and the weights' scales     the same                                  Genie-M (Jeon et al. 2023, section 3.3)

(algorithms sections 5 and 9.2). What QDrop leaves unquantized is drawn for each value: for the unit's inputs, which are then the
teacher's, and for the tensors on grids inside. A unit's learned scales are those of the tensors it reads and of those inside; what it
writes is on the grid of whoever reads it. A scale that something was computed with already (by an earlier unit, or by a pooling
between two) stays as it is.

A unit stops early when the error of its hardened state, on every eighth image, which it does not learn from, has stopped
falling; it ends with the best such state.

The dials: the unit, the images, the rounding method, and the numbers of `Reconstruction`. The papers take 10,000 to 20,000
iterations at learning rate 1e-3; ten times the rate reaches the same rounding in a twentieth of them, because a logit only
has to cross zero.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, fx
from torch.nn import functional

from reverie.allocator import give_back
from reverie.checkpoints import Checkpoints, Unfinished
from reverie.descent import Descent, under
from reverie.errors import ConfigError, check_range
from reverie.graph.cache import Cache
from reverie.graph.channels import channel_axes
from reverie.graph.extract import extract
from reverie.graph.placement import Student
from reverie.graph.quantizers import Dropping, Rounder
from reverie.graph.units import Unit, UnitKind, find_units
from reverie.progress import Progress, loss_note
from reverie.randomness import Seed
from reverie.recovery.best_state import Best
from reverie.recovery.bias_correction import activations_in_float
from reverie.recovery.border import Borders, all_rows, check_isolated
from reverie.recovery.closed_form import round_at_once
from reverie.recovery.fisher import Fisher
from reverie.recovery.ranges import keep_biases_in_range
from reverie.recovery.window import Window, Windows
from reverie.rounding import Learned, Rounding

# Beside the layers' codes in a checkpoint; no node of a graph is called so.
_ERRORS = "errors before, after"
# One image of so many is held out of learning, and so many times its error is looked at.
_HELD_OUT, _CHECKS = 8, 10
# Rows on which it is found what a window's border reaches.
_PROBED = 2


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """How long and how the loop runs.

    Args:
        unit: "layer", "block" or "network".
        iterations: Adam steps for each unit, at most.
        patience: A unit ends when its held-out error was not at its lowest for so many tenths of its iterations; 0 means that it
            never ends early, and learns from all images.
        batch: Images for each step, drawn with replacement.
        learning_rate: Of what the rounding method learns; constant.
        fisher: Whether errors count by how much the answer depends on them (BRECQ).
        learned_ranges: Whether the scales of activations inside and at the entry of the unit are learned too (LSQ).
        weights_first: Round all weights with activations in float before any range is learned, in a quarter of the iterations
            (BRECQ); else together.
        range_rate: Learning rate of those scales at the first step, relative to themselves; it falls to 0 by half a cosine.
        learned_steps: Whether the scales of weights are learned together with their rounding (Genie-M).
        step_rate: Learning rate of those, likewise.
        drop: Probability with which a value is left unquantized while the unit learns, drawn anew at each step for the
            unit's inputs (which are then the teacher's) and for every tensor on a grid (QDrop; 0.5 there).
        window: Side of the part of each image that a step looks at, in positions of what the unit writes (`window.py`); 0 for the whole.
        cache_gib: What units read and should answer is held in so much memory; more of it goes to a file.
    """

    unit: UnitKind = "layer"
    iterations: int = 500
    patience: int = 0
    batch: int = 32
    learning_rate: float = 1e-2
    fisher: bool = False
    learned_ranges: bool = False
    weights_first: bool = False
    range_rate: float = 1e-3
    learned_steps: bool = False
    step_rate: float = 1e-3
    drop: float = 0.0
    window: int = 0
    cache_gib: float = 4.0

    def __post_init__(self) -> None:
        check_range(
            self,
            iterations=(1, math.inf),
            patience=(0, _CHECKS),
            batch=(1, math.inf),
            learning_rate=(1e-9, math.inf),
            range_rate=(0, math.inf),
            step_rate=(0, math.inf),
            drop=(0, 1),
            window=(0, math.inf),
            cache_gib=(0, math.inf),
        )
        if self.weights_first and not self.learned_ranges:
            raise ConfigError(
                "reconstruction.weights_first must be false without learned_ranges, got true; use --set reconstruction.learned_ranges=true"
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
        nearest codes) and after, both in the network that the units before have become. Empty for a rounding that looks at weights alone.
    """
    if rounding.needs != "reconstruction":
        return round_at_once(teacher, student, inputs, rounding, weights=weights, seed=seed, progress=progress)
    passes = [("", settings, False)]
    if settings.weights_first:
        together = replace(settings, weights_first=False)
        first = replace(together, learned_ranges=False, drop=0.0)
        later = replace(together, learned_steps=False, iterations=max(settings.iterations // 4, 1))
        passes = [("", first, True), ("ranges-", later, False)]
    units = find_units(teacher, settings.unit)
    check_isolated(teacher, student.graph, units, settings.unit, inputs[:2])
    cache = Cache(int(settings.cache_gib * 2**30), checkpoints.folder, progress.say)
    errors: dict[str, tuple[float, float]] = {}
    with progress.stage("round", total=sum(part.iterations for _, part, _ in passes) * len(units)) as step:
        for prefix, part, in_float in passes:
            give_back()
            loop = _Loop(teacher, student, inputs, units, rounding, part, weights, cache, seed.at(prefix) if prefix else seed)
            with activations_in_float(student) if in_float else nullcontext():
                for number, unit in enumerate(units):
                    # The last pass tells: before it, activations were in float.
                    errors[unit.name] = loop.unit(unit, checkpoints, f"{prefix}codes-{number}", step)
                    # The next unit's tensors have other sizes.
                    give_back()
    return errors


class _Loop:
    """One pass over all units.

    Args:
        rounding: Learned wherever codes are not decided yet.
        weights: How often an image is to be drawn, in proportion.
    """

    def __init__(
        self,
        teacher: fx.GraphModule,
        student: Student,
        inputs: Tensor,
        units: list[Unit],
        rounding: Learned,
        settings: Reconstruction,
        weights: Tensor | None,
        cache: Cache,
        seed: Seed,
    ) -> None:
        self._teacher, self._student, self._rounding, self._settings = teacher, student, rounding, settings
        self._weights, self._seed = weights, seed
        self._device, self._images = inputs.device, len(inputs)
        self._channels = channel_axes(teacher, inputs[:1])
        self._with_entry = settings.learned_ranges or settings.drop > 0
        inputs = inputs.contiguous(memory_format=torch.channels_last) if inputs.dim() == 4 else inputs
        self._borders = Borders(teacher, student.graph, inputs, units, with_entry=self._with_entry, cache=cache)
        self._ranges = self._borders.ranges(student, units) if settings.learned_ranges else {}
        outputs = [unit.output for unit in units]
        self._fisher = Fisher(teacher, inputs, outputs, seed=seed.at("fisher"), cache=cache) if settings.fisher else None

    def unit(self, unit: Unit, checkpoints: Checkpoints, name: str, step: Callable[..., None]) -> tuple[float, float]:
        """Learns the unit, or takes what a checkpoint kept of it; its errors before and after."""
        student, ranges = self._student, self._ranges.get(unit.name, [])
        part = checkpoints.load(name)
        if part is None:
            errors = self._learn(unit, ranges, step, Unfinished(checkpoints, name))
            part = {layer: student.weights[layer].final_codes(_weight(student, layer)) for layer in unit.layers}
            part |= {f"step of {layer}": student.weights[layer].scale for layer in unit.layers}
            part |= {f"scale of {tensor}": student.activations[tensor].scale for tensor in ranges}
            part[_ERRORS] = torch.tensor(errors, dtype=torch.float64)
            if checkpoints.due():
                checkpoints.save(name, part)
        else:
            for layer in unit.layers:
                student.weights[layer].scale.copy_(part[f"step of {layer}"])
                student.weights[layer].set_codes(part[layer].to(student.weights[layer].scale))
            for tensor in ranges:
                student.activations[tensor].scale.copy_(part[f"scale of {tensor}"])
            keep_biases_in_range(student)
            step(self._settings.iterations, skipped=True)
        self._borders.leave(unit)
        if self._fisher is not None:
            self._fisher.release(unit.output)
        before, after = part[_ERRORS].tolist()
        return before, after

    def _learn(self, unit: Unit, ranges: list[str], step: Callable[..., None], unfinished: Unfinished) -> tuple[float, float]:
        student, settings, borders, seed = self._student, self._settings, self._borders, self._seed.at(unit.name)
        borders.reach(unit)
        count = borders.count(unit)
        module, _ = extract(student.graph, unit, with_entry=self._with_entry)
        few = borders.rows(unit, torch.arange(min(count, _PROBED)))
        windows = Windows(extract(self._teacher, unit)[0], few.sources, settings.window)
        with _nearest(student, unit):
            before = self._error(module, unit, all_rows(count))
        open_ = [name for name in unit.layers if student.weights[name].codes is None]
        rounders = {name: _rounder(student, name, self._rounding) for name in open_}
        for name, rounder in rounders.items():
            student.weights[name].rounder = rounder
        groups = [
            ([p for rounder in rounders.values() for p in rounder.parameters()], settings.learning_rate, False),
            ([student.activations[name].learn_scale() for name in ranges], settings.range_rate, True),
            ([student.weights[name].learn_scale() for name in open_ if settings.learned_steps], settings.step_rate, True),
        ]
        groups = [group for group in groups if group[0]]
        if not groups:
            step(settings.iterations, skipped=True)
            return before, self._error(module, unit, all_rows(count))
        optimizer = torch.optim.Adam([{"params": parameters, "lr": rate} for parameters, rate, _ in groups])
        generator, dropping = seed.generator(), Dropping(settings.drop, seed.at("drop").generator())
        if settings.drop:
            for name in (*unit.inputs, *unit.nodes):
                if name in student.activations:
                    student.activations[name].drop(dropping)
        told = {
            "place": f"reconstruction of {unit.name}",
            "cure": f"try --set reconstruction.learning_rate={settings.learning_rate / 4:g} with another --output",
        }
        descent, best = Descent(optimizer, **told), Best(student, unit, rounders, ranges, **told)
        learned, watched = _parted(count, settings.patience)
        odds = None if self._weights is None else self._weights.repeat_interleave(count // self._images)[learned]
        unfinished.draws_from(generator)
        free = [parameter for parameters, _, _ in groups for parameter in parameters]

        def state() -> dict[str, Tensor]:
            values = {f"learned.{number}": parameter.detach().clone() for number, parameter in enumerate(free)}
            parts = {"descent": descent.state(), "dropping": dropping.state(), "best": best.state()}
            values["done"] = torch.tensor(done)
            return values | {f"{name}.{key}": value for name, part in parts.items() for key, value in part.items()}

        done, saved = 0, unfinished.load()
        if saved is not None:
            done = int(saved["done"])
            with torch.no_grad():
                for number, parameter in enumerate(free):
                    parameter.copy_(saved[f"learned.{number}"])
            descent.restore(under("descent", saved))
            dropping.restore(under("dropping", saved))
            best.resume(under("best", saved))
            step(done, skipped=True)
        for iteration in range(done, settings.iterations):
            if len(watched) and best.since >= settings.patience:
                step(settings.iterations - iteration, skipped=True)
                break
            progress = iteration / settings.iterations
            for group, (_, rate, falls) in zip(optimizer.param_groups, groups, strict=True):
                group["lr"] = rate * (1 + math.cos(math.pi * progress)) / 2 if falls else rate
            if odds is None:
                drawn = torch.randint(len(learned), (settings.batch,), generator=generator)
            else:
                drawn = torch.multinomial(odds, settings.batch, replacement=True, generator=generator)
            distance = self._distance(module, unit, learned[drawn], windows.draw(generator), dropping)
            penalties = {f"penalty of {name}": rounder.penalty(progress) for name, rounder in rounders.items()}
            loss = descent.step(iteration, {"distance": distance, **penalties})
            if len(watched) and (iteration + 1) % max(settings.iterations // _CHECKS, 1) == 0:
                with best.hardened():
                    error = self._error(module, unit, torch.split(watched, 64))
                best.look(error)
            done = iteration + 1
            unfinished.keep(state)
            step(note=loss_note(loss))
        if len(watched):
            best.restore()
        for name, rounder in rounders.items():
            student.weights[name].set_codes(rounder.harden())
            student.weights[name].settle(_weight(student, name))
        for name in (*unit.inputs, *unit.nodes):
            if name in student.activations:
                student.activations[name].settle()
        keep_biases_in_range(student)
        return before, self._error(module, unit, all_rows(count))

    def _distance(
        self, module: fx.GraphModule, unit: Unit, picked: Int[Tensor, " rows"], window: Window | None, dropping: Dropping
    ) -> Tensor:
        """The squared error of a batch, summed over channels."""
        rows = self._borders.rows(unit, picked, window)
        inputs = rows.sources
        if self._settings.drop:
            inputs = [dropping.mix(clean, source) for clean, source in zip(rows.clean, inputs, strict=True)]
        output: Tensor = module(*inputs)
        target = rows.target
        importance = None if self._fisher is None else self._fisher.rows(unit.output, picked)
        if window is not None:
            output, target = window.valid.of(output), window.valid.of(target)
            importance = None if importance is None else window.valid.of(window.target.of(importance))
        channels = math.prod(output.shape[axis] for axis in self._channels[unit.output])
        return _squared_error(output, target, importance) * (channels / output.numel())

    @torch.no_grad()
    def _error(self, module: fx.GraphModule, unit: Unit, batches: list[Tensor] | tuple[Tensor, ...]) -> float:
        """Mean squared error of a unit over these rows."""
        total, count = 0.0, 0
        for picked in batches:
            rows = self._borders.rows(unit, picked)
            total += float(functional.mse_loss(module(*rows.sources), rows.target, reduction="sum"))
            count += rows.target.numel()
        return total / count


def _squared_error(output: Tensor, target: Tensor, importance: Tensor | None) -> Tensor:
    """Summed over everything."""
    if importance is None:
        return functional.mse_loss(output, target, reduction="sum")
    return ((output - target).square() * importance).sum()


@contextmanager
def _nearest(student: Student, unit: Unit) -> Iterator[None]:
    """The unit's weights are at the nearest codes until the block ends, whatever has been decided."""
    decided = {name: student.weights[name].codes for name in unit.layers}
    try:
        for name in decided:
            student.weights[name].codes = None
        yield
    finally:
        for name, codes in decided.items():
            student.weights[name].codes = codes


def _weight(student: Student, name: str) -> Tensor:
    return student.graph.get_buffer(student.layers[name].weight)


def _rounder(student: Student, name: str, rounding: Learned) -> Rounder:
    quantizer = student.weights[name]
    return rounding(_weight(student, name), quantizer.scale, quantizer.zero_point, quantizer.grid)


def _parted(count: int, patience: int) -> tuple[Tensor, Tensor]:
    """The numbers of the rows that are learned from, and of those that are held out."""
    rows = torch.arange(count)
    held_out = rows % _HELD_OUT == _HELD_OUT - 1 if patience else torch.zeros(count, dtype=torch.bool)
    return rows[~held_out], rows[held_out]
