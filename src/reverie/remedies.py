"""Remedies for a recipe, tried one after the other, each kept only if the answers come closer to full precision's.

A trial calibrates a student as the changed recipe says and compares the KL of its answers to held-out images with that of what is
kept so far, image by image:

    kept if  mean(d) > 2 s(d) / sqrt(n),    d = KL before - KL after        (n images, s their standard deviation)

Remedies come in the order of what the findings that they cure cost, and each is tried on top of those kept before. What costs bytes
comes last: more bits for single tensors, those first that cost most. Rounding in closed form is the recipe's own. Nothing is learned in
a trial; where the recipe learns (rounding, distillation), bias correction stands in for it, since learning gives the means back as well.

Not here: learned rounding and distillation as remedies, which take minutes, and more bits for everything, which is not a repair.
"""

import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, fx

from reverie.checkpoints import Forgetful
from reverie.errors import ConfigError
from reverie.export._packed import write_packed
from reverie.graph.equalize import find_pairs
from reverie.graph.fold import fold_batch_norms
from reverie.graph.placement import Bits
from reverie.graph.quantized import QuantizedNetwork, finish
from reverie.grid import MAX_BITS
from reverie.images import Images
from reverie.progress import Progress, Silent
from reverie.randomness import Seed
from reverie.recipe import Recipe
from reverie.recipes import from_tables, tables
from reverie.recovery.batch_norm_adaptation import adapt_batch_norms
from reverie.recovery.bias_correction import correct_biases
from reverie.recovery.closed_form import round_at_once
from reverie.recovery.ranges import calibrate_activations, calibrate_weights
from reverie.report.diagnosis import Fault, Finding, costly, next_bits
from reverie.report.metrics import predict
from reverie.report.tensor_errors import Errors, TensorKind, divergences
from reverie.stages import decide_bits, student_of
from reverie.synthesis import Streaming, Teacher
from reverie.synthesis.zeroq import ZeroQ

_SURE = 2.0
# So many tensors, the costliest, may get more bits.
_SINGLES = 3


@dataclass(frozen=True)
class Remedy:
    """A change of a recipe.

    Args:
        name: In words.
        settings: Values by dotted key, as for `--set`; a table is added to the recipe's own.
        cures: The faults of which kind of tensor it is meant for.
    """

    name: str
    settings: dict[str, Any]
    cures: frozenset[tuple[Fault, TensorKind]] = frozenset()


@dataclass(frozen=True)
class Trial:
    """What a remedy did.

    Args:
        remedy: Which.
        before, after: KL in nats on the held-out images.
        noise: How much less it must be to count.
        seconds: That the trial took.
        bytes: How much larger the packed network became.
        kept: Whether it counts.
    """

    remedy: Remedy
    before: float
    after: float
    noise: float
    seconds: float
    bytes: int
    kept: bool


@dataclass(frozen=True)
class Treatment:
    """A recipe with the remedies that helped.

    Args:
        recipe: The result.
        trials: In the order in which they were made.
        before, after: KL in nats on the held-out images, of the recipe as it was and as it is.
        held_out: How many images these were.
    """

    recipe: Recipe
    trials: tuple[Trial, ...]
    before: float
    after: float
    held_out: int


@torch.no_grad()
def bits_of(recipe: Recipe, teacher: Teacher, images: Images, progress: Progress) -> Bits:
    """The bits of single tensors in a run of the recipe: its own, and those that mixed precision chooses beside them.

    Raises:
        ConfigError: A budget of bits cannot be met.
        ModelError: There is such a budget and no solver.
    """
    if not recipe.mixed_precision.chooses:
        return recipe.bits
    reference, student = student_of(teacher.graph, recipe.quantization, recipe.bits)
    inputs = images.evenly(recipe.calibration_images).inputs.to(teacher.device)
    return decide_bits(recipe, teacher, reference, student, inputs, progress).bits


def calibrated(
    recipe: Recipe, teacher: Teacher, images: Images, progress: Progress, *, bits: Bits | None = None
) -> tuple[fx.GraphModule, QuantizedNetwork]:
    """The full-precision graph, and the student that the recipe makes of it without learning anything.

    Args:
        bits: Of single tensors, where the recipe says nothing of them (`bits_of`).
    """
    settings, rounding = recipe.quantization, recipe.rounding
    chosen = bits or Bits()
    own = Bits(weights={**chosen.weights, **recipe.bits.weights}, activations={**chosen.activations, **recipe.bits.activations})
    reference, student = student_of(teacher.graph, settings, own)
    inputs = images.evenly(recipe.calibration_images).inputs.to(teacher.device)
    calibrate_activations(reference, student, inputs, recipe.activations, batch=64, progress=progress)
    calibrate_weights(student, recipe.weights)
    if rounding.needs != "reconstruction":
        seed = Seed(recipe.seed, ("round",))
        round_at_once(reference, student, inputs, rounding, weights=None, seed=seed, progress=progress)
    if settings.batch_norm_adaptation:
        adapt_batch_norms(reference, student, inputs, progress=progress)
    elif settings.bias_correction or learns(recipe):
        correct_biases(reference, student, inputs, progress=progress)
    return reference, finish(student)


def learns(recipe: Recipe) -> bool:
    """Whether the recipe's runs learn rounding, ranges or weights, which diagnosis leaves out."""
    return recipe.rounding.needs == "reconstruction" or bool(recipe.distillation.steps) or bool(recipe.clipping.images)


def dream(recipe: Recipe, teacher: Teacher, count: int, place: str, progress: Progress) -> Images:
    """`count` images that no run of the recipe has seen, from a stream of numbers of their own.

    A generator would have to be trained for them first, so recipes with one get ZeroQ's images here.
    """
    method = recipe.synthesis
    if isinstance(method, Streaming) or method.needs_capsule:
        method = ZeroQ(class_weight=0.1)
    return method(teacher, count, seed=Seed(recipe.seed, ("diagnose", place)), checkpoints=Forgetful(), progress=progress)


def remedies(
    recipe: Recipe, teacher: Teacher, errors: Errors, findings: Sequence[Finding], *, more_images: bool
) -> list[Remedy]:
    """What may help and the recipe does not do yet: first what cures the findings that cost most, then more bits for single tensors.

    Args:
        errors: What every tensor costs. Where the recipe has a budget of bits, the program has spent it already.
        more_images: Whether more of them can be made.
    """
    found = [
        Remedy(f"activations: {name}", settings, frozenset((fault, "activation") for fault in faults))
        for name, settings, faults in (
            ("99.9 % ranges", {"activations.method": "percentile", "activations.percentile": 99.9}, _OUTLIERS),
            ("99.99 % ranges", {"activations.method": "percentile", "activations.percentile": 99.99}, _OUTLIERS),
            ("mse ranges", {"activations.method": "mse"}, _RANGES),
            ("ranges of all values", {"activations.method": "minmax"}, _SATURATION),
        )
    ]
    if recipe.clipping.images:
        # Excited images decide ranges there.
        found.clear()
    found += [
        Remedy("weights: mse ranges", {"weights.method": "mse"}, frozenset((fault, "weight") for fault in _RANGES)),
        Remedy("weights: ranges of all values", {"weights.method": "minmax"}, frozenset({("saturation", "weight")})),
    ]
    integer = recipe.quantization.placement == "integer"
    if integer and find_pairs(fold_batch_norms(teacher.graph)):
        cures: frozenset[tuple[Fault, TensorKind]] = frozenset(
            {("outlier channel", "activation"), ("outlier channel", "weight")}
        )
        found.insert(0, Remedy("cross-layer equalization", {"quantization.equalize": True}, cures))
    if not learns(recipe):
        off = {"quantization.bias_correction": False, "quantization.batch_norm_adaptation": False}
        if teacher.batch_norms:
            found.append(Remedy("batch-norm adaptation", off | {"quantization.batch_norm_adaptation": True}))
        found.append(Remedy("bias correction", off | {"quantization.bias_correction": True}))
    if more_images:
        count = 2 * recipe.images
        found.append(Remedy("twice the images", {"images": count, "calibration_images": max(count, recipe.calibration_images)}))

    def expected(remedy: Remedy) -> float:
        return sum((finding.cost for finding in findings if (finding.fault, finding.kind) in remedy.cures), 0.0)

    free = sorted((remedy for remedy in found if _changed(recipe, remedy) != recipe), key=expected, reverse=True)
    return free + _more_bits(recipe, errors)


def _more_bits(recipe: Recipe, errors: Errors) -> list[Remedy]:
    """More bits for each of the tensors that cost most."""
    mixed = recipe.mixed_precision
    chosen = {"weight": mixed.chooses_weights, "activation": mixed.chooses_activations}
    may = [tensor for tensor in costly(errors) if tensor.bits < MAX_BITS and not chosen[tensor.kind]]
    worst = sorted(may, key=lambda tensor: -tensor.alone)[:_SINGLES]
    return [
        Remedy(
            f"{tensor.kind[0].upper()}{next_bits(tensor.bits)} for {tensor.name}",
            {f"bits.{tensor.kind}s": {tensor.name: next_bits(tensor.bits)}},
        )
        for tensor in worst
    ]


_SATURATION: tuple[Fault, ...] = ("saturation", "dead grid")
_OUTLIERS: tuple[Fault, ...] = ("outliers", "dead grid")
_RANGES: tuple[Fault, ...] = ("saturation", "outliers", "dead grid")


def treat(
    recipe: Recipe,
    teacher: Teacher,
    images: Images,
    held_out: Float[Tensor, "count *shape"],
    tried: Sequence[Remedy],
    *,
    bits: Bits | None = None,
    more: Callable[[int], Images] | None = None,
    progress: Progress,
) -> Treatment:
    """Tries the remedies in their order.

    Args:
        images: For calibration.
        held_out: On these remedies are judged; at least two.
        bits: Of single tensors, where a recipe says nothing of them: those that mixed precision chose stay as they are.
        more: Makes so many further images, for remedies that want more than there are.

    Raises:
        ConfigError: There are fewer than two held-out images.
    """
    if len(held_out) < 2:
        raise ConfigError(f"remedies must be judged on at least 2 images, got {len(held_out)}; give more")
    known = predict(teacher.graph, held_out)
    trials: list[Trial] = []
    with tempfile.TemporaryDirectory() as folder, progress.stage("try remedies", total=len(tried) + 1) as step:

        def judged(candidate: Recipe, shown: Images) -> tuple[Tensor, int]:
            """KL of each image, and bytes."""
            _, quantized = calibrated(candidate, teacher, shown, Silent(), bits=bits)
            file = Path(folder) / "network.safetensors"
            write_packed(quantized, file)
            return divergences(predict(quantized.graph, held_out), known), file.stat().st_size

        before, size = judged(recipe, images)
        first = float(before.mean())
        step()
        for remedy in tried:
            began = time.perf_counter()
            candidate, shown = _changed(recipe, remedy), images
            if more is not None and candidate.images > recipe.images:
                shown = Images(inputs=torch.cat([images.inputs, more(candidate.images - recipe.images).inputs]))
            after, larger = judged(candidate, shown)
            gain = before - after
            noise = _SURE * float(gain.std()) / math.sqrt(len(gain))
            kept = float(gain.mean()) > noise
            seconds = time.perf_counter() - began
            trials.append(Trial(remedy, float(before.mean()), float(after.mean()), noise, seconds, larger - size, kept))
            if kept:
                recipe, images, before, size = candidate, shown, after, larger
            step()
    return Treatment(recipe, tuple(trials), first, float(before.mean()), len(held_out))


def _changed(recipe: Recipe, remedy: Remedy) -> Recipe:
    now, settings = tables(recipe), dict(remedy.settings)
    for key, value in settings.items():
        if isinstance(value, Mapping):
            table, _, leaf = key.partition(".")
            settings[key] = {**now[table][leaf], **value}
    return from_tables(now, settings)
