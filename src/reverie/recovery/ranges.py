"""Calibration: the grids of activations and weights, from images and from the weights themselves."""

from collections.abc import Callable, Iterable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, fx

from reverie.errors import ModelError
from reverie.graph.placement import Student
from reverie.graph.taps import tap
from reverie.grid import Grid
from reverie.observers import Observer, Watch, rows, tensor_qparams, weight_qparams
from reverie.progress import Progress

# A bias code must fit int32 with room for the accumulator it is added to.
BIAS_LIMIT = 2.0**30


@torch.no_grad()
def calibrate_activations(
    teacher: fx.GraphModule,
    student: Student,
    inputs: Float[Tensor, "count *shape"],
    observer: Observer,
    *,
    batch: int,
    progress: Progress,
) -> None:
    """Sets the grid of every quantized tensor of the student, in place, from the full-precision values it takes.

    Args:
        teacher: The graph that `student` was placed on: same node names.

    Raises:
        ModelError: A tensor takes a value that is not finite.
    """
    parts = torch.split(inputs, batch)
    with progress.stage("calibrate", total=len(parts)) as step:
        watches = watch_tensors(teacher, student.activations, parts, observer, step)
    for name, quantizer in student.activations.items():
        quantizer.set_qparams(*finite_qparams(name, watches[name], quantizer.grid))


@torch.no_grad()
def watch_tensors(
    teacher: fx.GraphModule,
    tensors: Iterable[str],
    parts: Sequence[Float[Tensor, "_ *shape"]],
    observer: Observer,
    step: Callable[[], None] = lambda: None,
) -> dict[str, Watch]:
    """What `observer` sees of each tensor on all batches; `step` is called after each."""
    names = list(tensors)
    tapped = tap(teacher, names)
    watches = {name: observer.watch() for name in names}
    for part in parts:
        for name, values in tapped(part).items():
            watches[name].update(rows(values))
        step()
    return watches


def finite_qparams(name: str, watch: Watch, grid: Grid) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """Scale and zero point for what was seen of the tensor `name`.

    Raises:
        ModelError: It took a value that is not finite.
    """
    scale, zero_point = tensor_qparams(watch, grid)
    if not bool(torch.isfinite(scale)):
        raise ModelError(f"{name}: values must be finite on every image, got a range that is not; check the weights and images")
    return scale, zero_point


@torch.no_grad()
def calibrate_weights(student: Student, observer: Observer) -> None:
    """Sets the grid of every weight, in place; activations must be calibrated first."""
    for name, layer in student.layers.items():
        quantizer = student.weights[name]
        weight = student.graph.get_buffer(layer.weight)
        quantizer.set_qparams(*weight_qparams(weight, observer, quantizer.grid, symmetric=student.kind == "integer"))
    keep_biases_in_range(student)


@torch.no_grad()
def keep_biases_in_range(student: Student) -> None:
    """Raises, in place, the scale of each weight channel that is so small that its bias would not fit int32.

    Such a channel's weights are next to nothing: the bias is what it has to say. Where the codes of a weight are decided, so is
    its scale, and the scale of the tensor that the layer reads is raised instead.
    """
    for name in student.biases:
        layer, quantizer = student.layers[name], student.weights[name]
        assert layer.bias is not None and layer.source is not None
        source = student.activations[layer.source]
        smallest = student.graph.get_buffer(layer.bias).abs() / BIAS_LIMIT
        if quantizer.codes is None:
            needed = (smallest / source.scale).view(quantizer.scale.shape)
            quantizer.scale.copy_(torch.maximum(quantizer.scale, needed))
        else:
            source.scale.copy_(torch.maximum(source.scale, (smallest / quantizer.scale.flatten()).amax()))
