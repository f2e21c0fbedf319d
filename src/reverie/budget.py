"""A budget of minutes for the stages that learn: what does not fit is shortened, all of it by one factor as far as that leaves enough.

    seconds = sum over stages that learn of  steps x (what one more step costs here, measured)
    factor  = min(1, budget / seconds)
    steps  -> factor x steps, rounded; at least 10, or all if there are fewer, for which the other stages give more

Every schedule (half cosines, quarters, annealing) is defined over shares of its steps and keeps its shape; only ClusterQ's
`refresh` counts steps and stays. Nothing is ever lengthened. The stages that learn, and what one more step of each means:

    synthesis.steps              pixels: one for each batch of images and of held-out images; a generator: one, for all of them
    synthesis.refine_steps       one for each batch of images and of held-out images
    clipping.steps               one for each batch of exciting images
    distillation.steps           one of the student, and one of the generator where that goes on training
    reconstruction.iterations    one for each unit

What a step costs is measured on noise, with the stage's own code, on copies that are thrown away: neither the teacher nor any
random number of the run is touched. What is measured differs from one day to the next, so whoever resumes a run keeps the
`Schedule` that was found first.

Not covered by the budget: loading, capture, the measurement itself (a few steps of each stage), calibration, rounding in closed form,
sensitivities and bits of mixed precision, bias correction, what
reconstruction computes between its steps (each unit's inputs and outputs), ClusterQ's refreshes, export, and measuring the result.
"""

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx

from reverie.checkpoints import Forgetful
from reverie.errors import BudgetError, ConfigError
from reverie.graph.placement import Student
from reverie.images import Images
from reverie.images.source import Augmented, Batch, Source
from reverie.observers.minmax import MinMax
from reverie.progress import Progress, Silent, duration_text
from reverie.randomness import Seed
from reverie.recipe import Recipe
from reverie.recovery.clipping import excite
from reverie.recovery.distillation import distil
from reverie.recovery.ranges import calibrate_activations, calibrate_weights
from reverie.recovery.reconstruction import round_weights
from reverie.stages import composition, student_of, synthesizes, views
from reverie.synthesis import Streaming, Teacher, batches, even_batches

# Steps of a trial: until caches and memory are warm, and those that are timed.
_WARM_UP, _TIMED = 2, 3
_TRIAL = _WARM_UP + _TIMED
# A budget that leaves less than so many steps to each stage is refused.
_LEAST = 10
# What a stage is called that is not the only one of its table.
_NAMES = {"synthesis.refine_steps": "refinement"}
# Nothing that a trial draws shows anywhere, but it draws the same each time.
_SEED = Seed(0, ("budget",))
_IMAGES = 8


@dataclass(frozen=True)
class Schedule:
    """What a budget makes of a recipe.

    Args:
        minutes: The budget.
        factor: The share of the recipe's time that there is; 1 where it fits.
        steps: By the recipe's key, such as `synthesis.steps`; those that the recipe has where the factor is 1.
    """

    minutes: float
    factor: float
    steps: dict[str, int]

    def shorten(self, recipe: Recipe) -> Recipe:
        """The recipe with these steps."""
        for key, number in self.steps.items():
            table, _, name = key.partition(".")
            if not hasattr(getattr(recipe, table, None), name):
                raise ConfigError(
                    f"budget: steps must be those of the recipe, got {key!r}; put back the run.json that the run wrote"
                )
            # A table is another dataclass for every method, which the type checker cannot follow.
            shorter: Any = replace(getattr(recipe, table), **{name: number})
            recipe = replace(recipe, **{table: shorter})
        return recipe

    def told(self, recipe: Recipe) -> str:
        """One line on what happens to `recipe`."""
        if self.factor == 1:
            return f"budget {self.minutes:g} min: the recipe's own steps fit"
        own = learning_steps(recipe)
        first = next(iter(self.steps))
        changes = (
            f"{own[key]} -> {number} {'steps ' if key == first else ''}of {_NAMES.get(key, key.partition('.')[0])}"
            for key, number in self.steps.items()
        )
        whole = duration_text(60 * self.minutes / self.factor)
        return f"budget {self.minutes:g} min: {', '.join(changes)} (the recipe's own would take about {whole})"


def check_budget(minutes: float) -> None:
    """Refuses what is no number of minutes above 0."""
    if not 0 < minutes < math.inf:
        raise ConfigError(
            f"budget must be a number of minutes above 0, got {minutes:g}; leave it out for the recipe's own steps"
        )


def learning_steps(recipe: Recipe) -> dict[str, int]:
    """The steps of the stages of `recipe` that learn, by key."""
    found: dict[str, int] = {}
    for name in ("steps", "refine_steps"):
        # Not every method goes in steps, or refines.
        number = getattr(recipe.synthesis, name, 0)
        if number and synthesizes(recipe):
            found[f"synthesis.{name}"] = number
    if recipe.clipping.images:
        found["clipping.steps"] = recipe.clipping.steps
    if recipe.distillation.steps:
        found["distillation.steps"] = recipe.distillation.steps
    if recipe.rounding.needs == "reconstruction":
        found["reconstruction.iterations"] = recipe.reconstruction.iterations
    return found


def fit(recipe: Recipe, teacher: Teacher, real: Images | None, minutes: float, *, progress: Progress) -> Schedule:
    """How `recipe` is to be shortened so that the stages that learn take `minutes` on this machine, if they would take more.

    Args:
        teacher: With the capsule, if the recipe's method reads one.
        real: The user's calibration images.

    Raises:
        ConfigError: `minutes` is no number above 0.
        BudgetError: It is too few for 10 steps of each stage.
    """
    check_budget(minutes)
    return schedule(recipe, step_costs(recipe, teacher, real, progress=progress), minutes)


def schedule(recipe: Recipe, costs: Mapping[str, float], minutes: float) -> Schedule:
    """Likewise, where `step_costs` has measured the steps already."""
    own = learning_steps(recipe)
    seconds = sum(number * costs[key] for key, number in own.items())
    if seconds <= 60 * minutes:
        return Schedule(minutes, 1.0, own)
    least = sum(min(number, _LEAST) * costs[key] for key, number in own.items()) / 60
    if minutes < least:
        raise BudgetError(
            f"budget must be at least {math.ceil(10 * least) / 10:g} min for this network and recipe here, got {minutes:g}; "
            "give it more, or choose a recipe whose steps cost less"
        )
    steps, left, longer = dict(own), 60 * minutes, set(own)
    while longer:
        share = left / sum(own[key] * costs[key] for key in longer)
        short = {key for key in longer if share * own[key] < min(own[key], _LEAST)}
        steps |= {key: min(own[key], _LEAST) if key in short else round(share * own[key]) for key in longer}
        if not short:
            break
        left -= sum(steps[key] * costs[key] for key in short)
        longer -= short
    return Schedule(minutes, 60 * minutes / seconds, steps)


def step_costs(recipe: Recipe, teacher: Teacher, real: Images | None, *, progress: Progress) -> dict[str, float]:
    """Seconds that one step more would cost in each stage that learns, by the keys of `learning_steps`."""
    share = recipe.share_of_real(recipe.learned_images, 0 if real is None else len(real))
    small, learning = views(recipe, teacher)
    trials: dict[str, Callable[[], float]] = {
        "synthesis.steps": lambda: _synthesis(recipe, teacher, small),
        "synthesis.refine_steps": lambda: _refinement(recipe, teacher),
        "clipping.steps": lambda: _clipping(recipe, teacher),
        "distillation.steps": lambda: _distillation(recipe, learning, share),
        "reconstruction.iterations": lambda: _reconstruction(recipe, learning),
    }
    costs: dict[str, float] = {}
    stages = list(learning_steps(recipe))
    with progress.stage("time steps", total=len(stages)) as step:
        for key in stages:
            costs[key] = trials[key]()
            step()
    if recipe.distillation.steps and "fresh" in composition(recipe, share):
        # The generator goes on training with the student.
        costs["distillation.steps"] += costs["synthesis.steps"]
    return costs


class _Enough(Exception):
    """A trial has had its steps."""


class _Watch(Silent):
    """Notes when steps end, and stops the trial that it watches after `limit` of them."""

    def __init__(self, device: torch.device, limit: int) -> None:
        self._device, self._limit = device, limit
        self.times: list[float] = []

    def advance(self, amount: int = 1, note: str = "", *, skipped: bool = False) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.times.append(time.perf_counter())
        if len(self.times) == self._limit:
            raise _Enough


def _timed(device: torch.device, trial: Callable[..., object]) -> float:
    """Seconds of a step of `trial`, a stage of at least `_TRIAL` steps that still wants its `progress`."""
    watch = _Watch(device, _TRIAL)
    with suppress(_Enough):
        trial(progress=watch)
    return _step_seconds(watch.times)


def _step_seconds(times: list[float]) -> float:
    """Seconds of a step, from when each of `_TRIAL` steps ended."""
    return statistics.median(later - earlier for earlier, later in pairwise(times[_WARM_UP - 1 :]))


def _long_enough(steps: int) -> int:
    """The stage's own number, with which all is in its place (schedules, checkpoints), if that is enough for a trial."""
    return max(steps, _TRIAL)


def _synthesis(recipe: Recipe, teacher: Teacher, small: Teacher) -> float:
    own: Any = recipe.synthesis
    method = replace(own, steps=_long_enough(own.steps))
    if isinstance(method, Streaming):
        return _timed(teacher.device, partial(method.stream, teacher, seed=_SEED, checkpoints=Forgetful()))
    seconds = 0.0
    for seen, count in ((small, recipe.images), (teacher, recipe.held_out)):
        for size, number in _batches(method.batch, count):
            seconds += number * _timed(seen.device, partial(method, seen, size, seed=_SEED, checkpoints=Forgetful()))
    return seconds


def _refinement(recipe: Recipe, teacher: Teacher) -> float:
    """A step for each batch of all images, which are taken for equally large."""
    own: Any = recipe.synthesis
    method = replace(own, refine_steps=_long_enough(own.refine_steps), steps=1)
    stream = method.stream(teacher, seed=_SEED, checkpoints=Forgetful(), progress=Silent())
    seconds = 0.0
    for count in filter(None, (recipe.images, recipe.held_out)):
        sizes = even_batches(count, method.batch)
        seconds += len(sizes) * _timed(teacher.device, partial(stream.sample, max(sizes), _SEED, checkpoints=Forgetful()))
    return seconds


def _clipping(recipe: Recipe, teacher: Teacher) -> float:
    seconds = 0.0
    for size, number in _batches(recipe.clipping.batch, recipe.clipping.images):
        settings = replace(recipe.clipping, images=size, steps=_long_enough(recipe.clipping.steps))
        seconds += number * _timed(teacher.device, partial(excite, teacher, settings, seed=_SEED, checkpoints=Forgetful()))
    return seconds


def _batches(batch: int, *counts: int) -> list[tuple[int, int]]:
    """The sizes of the batches of sets with so many images, and how many batches of each there are."""
    return list(Counter(size for count in counts for size in batches(count, batch)).items())


def _distillation(recipe: Recipe, teacher: Teacher, share: float) -> float:
    """A step of the student alone, on as many images as in the run, with known logits where the run knows them."""
    _, student = trial_student(recipe, teacher)
    settings = replace(recipe.distillation, steps=_long_enough(recipe.distillation.steps))
    source: Source = _Noise(teacher, sum(composition(recipe, share).values()))
    kinds = [real for real, part in ((False, 1 - share), (True, share)) if part]
    augmentation = next(filter(None, (settings.augmentation(real=real) for real in kinds)), None)
    if augmentation is not None:
        source = Augmented(source, augmentation, seed=_SEED.at("crops"))
    return _timed(teacher.device, partial(distil, teacher.graph, student, source, settings, checkpoints=Forgetful()))


def _reconstruction(recipe: Recipe, teacher: Teacher) -> float:
    """A step of every unit; they cost so differently that each has its trial."""
    reference, student = trial_student(recipe, teacher)
    watch, own = _Watch(teacher.device, limit=0), recipe.reconstruction
    # Every unit takes all of its steps, once; the ranges that come after the weights take a quarter more.
    trial = replace(own, iterations=_TRIAL, patience=0, weights_first=False)
    round_weights(
        reference,
        student,
        noise(teacher, _IMAGES),
        recipe.rounding,
        trial,
        seed=_SEED,
        checkpoints=Forgetful(),
        progress=watch,
    )
    seconds = sum(_step_seconds(watch.times[first : first + _TRIAL]) for first in range(0, len(watch.times), _TRIAL))
    return 1.25 * seconds if own.weights_first else seconds


def trial_student(recipe: Recipe, teacher: Teacher) -> tuple[fx.GraphModule, Student]:
    """A reference graph and a student of it to throw away; not equalized, which changes no cost."""
    reference, student = student_of(teacher.graph, replace(recipe.quantization, equalize=False))
    calibrate_activations(reference, student, noise(teacher, _IMAGES), MinMax(), batch=_IMAGES, progress=Silent())
    calibrate_weights(student, MinMax())
    return reference, student


def noise(teacher: Teacher, count: int) -> Tensor:
    """`count` inputs of Gaussian noise for a trial, on the teacher's device, the same each time."""
    return torch.randn(count, *teacher.input.shape, generator=_SEED.generator()).to(teacher.device)


class _Noise:
    """The same batch again and again."""

    def __init__(self, teacher: Teacher, count: int) -> None:
        inputs = noise(teacher, count)
        labels = torch.arange(count, device=teacher.device) % teacher.classes
        with torch.no_grad():
            self._batch = Batch(inputs, labels, teacher.graph(inputs))

    def draw(self, number: int, progress: float) -> Batch:
        """It."""
        return self._batch

    def state(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Nothing to do."""
