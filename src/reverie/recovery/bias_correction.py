"""Bias correction: give every output channel back the mean that rounding its weights took from it.

    b' = b + E[teacher's output] - E[student's output]           per channel, over calibration images and positions

Layers are taken in execution order, and each one's expectation is over inputs that come through the corrected layers
before it. Reference: Nagel et al. 2019, arXiv:1906.04721, section 4.2 (their empirical variant).

Activations stay in full precision meanwhile. What a clipped range takes from the calibration images' means is a property of
their extremes, and synthetic images have others than photographs: corrected for, it made MobileNetV2 (W8A8, 99.99 % ranges)
six times worse in KL to full precision (docs/log.md).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, fx

from reverie.graph.operators import LINEARS, layers
from reverie.graph.placement import Student
from reverie.graph.walk import Walk
from reverie.progress import Progress


@torch.no_grad()
def correct_biases(
    teacher: fx.GraphModule, student: Student, inputs: Float[Tensor, "count *shape"], *, progress: Progress
) -> dict[str, float]:
    """Corrects the bias of every layer that has one, in place. Returns the largest correction of each."""
    found = layers(teacher)
    names = [node.name for node in found]
    ahead = Walk(teacher, inputs, batch=64, keep=names)
    behind = Walk(student.graph, inputs, batch=64, keep=names)
    corrections: dict[str, float] = {}
    with activations_in_float(student), progress.stage("correct biases", total=len(names)) as step:
        for node in found:
            ahead.to(node.name)
            behind.to(node.name)
            if student.layers[node.name].bias is not None:
                corrections[node.name] = correct_layer(student, node, ahead.value(node.name), behind.value(node.name))
            for walk in (ahead, behind):
                walk.release(node.name)
            step()
    return corrections


def correct_layer(student: Student, node: fx.Node, expected: Tensor, answered: Tensor) -> float:
    """Corrects one layer's bias, in place, and its outputs too. Returns the largest correction.

    Args:
        node: The layer, which has a bias.
        expected, answered: What it answers in the teacher and in the student, for all images.
    """
    channel = -1 if node.target in LINEARS else 1
    shift = _means(expected, channel) - _means(answered, channel)
    student.graph.get_buffer(str(student.layers[node.name].bias)).add_(shift)
    # Later nodes read the corrected output; recomputing it would give the same up to the bias's own grid.
    column = [1] * answered.dim()
    column[channel] = -1
    answered.add_(shift.view(column))
    return float(shift.abs().max())


@contextmanager
def activations_in_float(student: Student) -> Iterator[None]:
    """Lets every tensor pass its quantizer unchanged (biases, whose grid depends on it, too) until the block ends."""
    calibrated = [quantizer for quantizer in student.activations.values() if quantizer.calibrated]
    for quantizer in calibrated:
        quantizer.calibrated = False
    try:
        yield
    finally:
        for quantizer in calibrated:
            quantizer.calibrated = True


def _means(values: Tensor, channel: int) -> Float[Tensor, " channels"]:
    return values.movedim(channel, 0).flatten(1).mean(dim=1)
