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
            bias = student.layers[node.name].bias
            if bias is not None:
                channel = -1 if node.target in LINEARS else 1
                shift = _means(ahead.value(node.name), channel) - _means(behind.value(node.name), channel)
                student.graph.get_buffer(bias).add_(shift)
                corrections[node.name] = float(shift.abs().max())
                # Later nodes read the corrected output; recomputing it would give the same up to the bias's own grid.
                column = [1] * behind.value(node.name).dim()
                column[channel] = -1
                behind.value(node.name).add_(shift.view(column))
            for walk in (ahead, behind):
                walk.release(node.name)
            step()
    return corrections


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
