"""What a run would take, before it begins: its stages with steps, seconds and memory.

    learned    steps x seconds of a step: a few steps of each stage are timed here with the stage's own code (`budget.py`)
    passes     images x seconds of one image through full precision, through the student, or through its codes: those are timed
               here, how many of them a stage takes is counted in its code, and what it does beside them is left out
    guessed    from runs on small and middle-sized networks (docs/log.md); nothing was timed

Learned stages that end early (`reconstruction.patience`) take less. Memory is what the run itself estimates (`memory.py`).
"""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import fx

from reverie import memory
from reverie.budget import Schedule, learning_steps, noise, schedule, step_costs, trial_student
from reverie.errors import ConfigError
from reverie.graph.integer import as_integers
from reverie.graph.quantized import finish
from reverie.graph.units import find_units
from reverie.images import Images
from reverie.models import Network
from reverie.progress import Progress, Silent
from reverie.recipe import Recipe
from reverie.report import plots
from reverie.report.metrics import predict
from reverie.request import check
from reverie.rounding.nearest import Nearest
from reverie.stages import (
    as_teacher,
    check_captured,
    estimating,
    method_name,
    synthesizes,
    views,
    with_capsule,
)
from reverie.synthesis import Streaming, Teacher
from reverie.synthesis._capsule import Capsule

Known = Literal["timed", "passes", "guessed"]

# Images of a timed pass.
_IMAGES = 4
# Seconds of what no pass tells: a file, written and read back; each million parameters of it on top; plots.
_EXPORT, _EACH_MILLION, _PLOTS = 3.0, 1.0, 3.0
# Passes of full precision that fidelity, separation and the teacher's answers take.
_FIDELITY = 4
# Passes of the student over the calibration images.
_PASSES = {
    "calibrate": 1,
    "round at once": 4,
    "walk between units": 2,
    "correct biases": 2,
    "adapt batch norms": 2,
    "sensitivity": 40,
}


@dataclass(frozen=True)
class Part:
    """Something that takes time.

    Args:
        stage: Of the run, as in `metrics.json`.
        work: What is done.
        steps: Of gradient descent, or images; None where that says nothing.
        seconds: Expected.
        known: Where from; see the module.
    """

    stage: str
    work: str
    steps: int | None
    seconds: float
    known: Known


@dataclass(frozen=True)
class Forecast:
    """What a run would take.

    Args:
        parts: In their order.
        memory: Expected.
        budget: What a budget makes of the steps, if there is one.
    """

    parts: tuple[Part, ...]
    memory: memory.Estimate
    budget: Schedule | None

    @property
    def seconds(self) -> float:
        """Of all parts."""
        return sum(part.seconds for part in self.parts)

    @property
    def timed_share(self) -> float:
        """The share of `seconds` that rests on timed steps."""
        return sum(part.seconds for part in self.parts if part.known == "timed") / max(self.seconds, 1e-9)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "parts": [asdict(part) for part in self.parts],
            "seconds": self.seconds,
            "timed_share": self.timed_share,
            "memory_bytes": self.memory.peak,
            "file_bytes": self.memory.mapped,
            "budget": None if self.budget is None else asdict(self.budget),
        }


def forecast(
    recipe: Recipe,
    network: Network,
    *,
    calibration: Images | None = None,
    capsule: Capsule | None = None,
    evaluation: Images | None = None,
    unlabelled: Images | None = None,
    device: str = "cpu",
    budget: float | None = None,
    memory_limit: float | None = None,
    only_images: bool = False,
    progress: Progress | None = None,
) -> Forecast:
    """What `pipeline.run` would take with these arguments, or `pipeline.run_synthesis`, where `only_images`; writes nothing.

    Raises:
        ConfigError, ModelError: What the run would raise before it learns anything.
    """
    progress = Silent() if progress is None else progress
    if only_images and recipe.images == 0:
        raise ConfigError("images must be at least 1, got 0")
    check(recipe, network, calibrated=calibration is not None, capsule=capsule is not None, device=device, budget=budget)
    began = time.perf_counter()
    teacher = with_capsule(as_teacher(network, device), recipe, calibration, capsule)
    small, learning = views(recipe, teacher)
    given = {"calibration": calibration, "evaluation": evaluation, "unlabelled": unlabelled}
    if only_images:
        recipe = _images_alone(recipe)
        needed = memory.estimate_images_alone(recipe, teacher, given)
    else:
        check_captured(recipe, teacher)
        needed = memory.estimate(recipe, teacher, given)
    _, needed = memory.limited(recipe, needed, memory_limit)
    parts = [Part("capture", "the graph, and whether the request can be met", None, time.perf_counter() - began, "timed")]
    costs = step_costs(recipe, teacher, calibration, progress=progress)
    shortened = None if budget is None else schedule(recipe, costs, budget)
    recipe = recipe if shortened is None else shortened.shorten(recipe)
    labelled = evaluation is not None and evaluation.labels is not None and len(evaluation) > 0
    foreign = 0 if labelled or only_images or not teacher.batch_norms else recipe.estimate_images
    parts += _synthesis(recipe, costs)
    if foreign:
        parts.append(_estimate(recipe, teacher, foreign, progress))
    whole = _image_seconds(learning.graph, learning)
    if not only_images:
        reference, student = trial_student(recipe, learning)
        units = len(find_units(reference, recipe.reconstruction.unit))
        real = 0 if calibration is None else len(calibration)
        sets = (recipe.learned_images, 0 if recipe.keeps_apart(recipe.images, real) else real)
        seen = sum(min(count, recipe.calibration_images) for count in sets)
        parts += _quantization(recipe, costs, units, seen, _image_seconds(student.graph, learning), whole)
        size = _EXPORT + _EACH_MILLION * sum(tensor.numel() for tensor in network.module.parameters()) / 1e6
        parts.append(
            Part("export", "packed network" + (", file for its runtime" if recipe.export else ""), None, size, "guessed")
        )
        count = recipe.held_out + foreign + sum(len(part) for part in (evaluation, unlabelled) if part is not None)
        codes = _image_seconds(as_integers(finish(student)), learning)
        # The runtime's integers take about as long as full precision here.
        answers = count * (codes + (2 if recipe.export else 1) * whole)
        parts.append(Part("measure", "answers of full precision, student and file", count, answers, "passes"))
    fidelity = _FIDELITY * recipe.images * _image_seconds(small.graph, small)
    parts.append(Part("measure", "fidelity of the images", recipe.images, fidelity, "passes"))
    if plots.available():
        parts.append(Part("measure", "plots", None, _PLOTS, "guessed"))
    return Forecast(tuple(parts), needed, shortened)


def _images_alone(recipe: Recipe) -> Recipe:
    """The recipe without what `run_synthesis` leaves out."""
    return replace(
        recipe,
        held_out=0,
        real_apart=False,
        rounding=Nearest(),
        distillation=replace(recipe.distillation, steps=0),
        clipping=replace(recipe.clipping, images=0),
    )


def _synthesis(recipe: Recipe, costs: Mapping[str, float]) -> list[Part]:
    """The images that are learned from, and those held out."""
    name, steps = method_name(recipe), learning_steps(recipe)
    made = f"{recipe.images} images" + (f" and {recipe.held_out} held out" if recipe.held_out else "")
    parts = []
    for key, work in (("synthesis.steps", f"{made} by {name}"), ("synthesis.refine_steps", "their pixels refined")):
        if key in steps:
            counts = (recipe.images, recipe.held_out)
            # A generator is trained once for both sets, and then each batch is refined.
            once = isinstance(recipe.synthesis, Streaming) and key == "synthesis.steps"
            size: int = getattr(recipe.synthesis, "batch", max(counts))
            times = 1 if once else sum(-(-count // size) for count in counts)
            parts.append(Part("synthesize", work, times * steps[key], steps[key] * costs[key], "timed"))
    if not parts and synthesizes(recipe):
        parts.append(Part("synthesize", f"{made} by {name}", None, 0.0, "guessed"))
    return parts


def _estimate(recipe: Recipe, teacher: Teacher, count: int, progress: Progress) -> Part:
    """The images on which the drop is estimated."""
    other = replace(_images_alone(estimating(recipe)), images=count, image_scale=1.0, mosaic=False)
    (number,) = learning_steps(other).values()
    (cost,) = step_costs(other, teacher, None, progress=progress).values()
    times = -(-count // other.synthesis.batch)  # type: ignore[attr-defined]
    return Part("synthesize", f"{count} images to estimate the drop on", times * number, number * cost, "timed")


def _quantization(
    recipe: Recipe, costs: Mapping[str, float], units: int, seen: int, student: float, whole: float
) -> list[Part]:
    """Calibration and whatever learns.

    Args:
        units: Of reconstruction.
        seen: Calibration images.
        student, whole: Seconds of one image through the student and through full precision.
    """
    steps = learning_steps(recipe)

    def passes(work: str, images: int = seen) -> Part:
        return Part("quantize", work, images, _PASSES[work] * images * (student + whole), "passes")

    def learned(key: str, work: str, times: int = 1) -> list[Part]:
        return [Part("quantize", work, times * steps[key], steps[key] * costs[key], "timed")] if key in steps else []

    parts = [passes("sensitivity", min(seen, recipe.mixed_precision.images))] if recipe.mixed_precision.chooses else []
    batches = -(-recipe.clipping.images // recipe.clipping.batch)
    parts += learned("clipping.steps", "images that excite the network", batches) or [passes("calibrate")]
    distillation = learned("distillation.steps", "distillation")
    parts += distillation if recipe.distils_after("calibration") else []
    if recipe.rounding.needs == "reconstruction":
        parts += [passes("walk between units"), *learned("reconstruction.iterations", f"{units} units rounded", units)]
    elif recipe.rounding.needs == "moments":
        parts.append(passes("round at once"))
    parts += distillation if recipe.distils_after("rounding") else []
    parts += [passes("correct biases")] if recipe.quantization.bias_correction else []
    return parts + ([passes("adapt batch norms")] if recipe.quantization.batch_norm_adaptation else [])


@torch.no_grad()
def _image_seconds(graph: fx.GraphModule, teacher: Teacher) -> float:
    """Seconds of one image through `graph`, of some at once, when all is warm."""
    inputs = noise(teacher, _IMAGES)
    predict(graph, inputs)
    began = time.perf_counter()
    predict(graph, inputs)
    return (time.perf_counter() - began) / _IMAGES
