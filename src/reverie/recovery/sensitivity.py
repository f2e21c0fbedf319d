"""How much the network's answer changes when a single tensor is put on a grid of few bits: for every tensor and width.

    KL(p || p') ~ 1/2 dz^T (diag(p) - p p^T) dz,    dz = J_t dt
                = 1/2 mean over v of (g_v . dt)^2,    g_v = J_t^T (sqrt(p) v - p (sqrt(p) . v)),    v = +1 or -1 at random

z are the logits and p = softmax(z) of the full-precision network, dt is what quantization does to the tensor t, J_t its effect on the
logits. The Gauss-Newton form of the divergence is exact to second order, and random signs, one for each class, make it the
square of one product with a gradient (Hutchinson's estimate of a quadratic form). A few backward passes give the g_v of all
tensors at once, and every width costs one more product: all tensors of a network at six widths take as long as some fifteen
passes of the images, where quantizing one tensor after the other takes hundreds. Where a tensor is nearly destroyed (a first
layer at 2 bits) the true divergence is larger; bits chosen by either are equally good (docs/log.md).

What a weight does is seen at its layer's output: dy = layer(x, dW) minus its mean over images and positions, because whatever
decides the codes afterwards gives the means back (bias correction, batch-norm adaptation, learned rounding).

Not here: interactions. The sum over tensors counts every tensor as if all others were in full precision.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, fx
from torch.nn import functional

from reverie.graph.operators import LINEARS
from reverie.graph.placement import Student
from reverie.graph.taps import shapes
from reverie.grid import Grid, fake_quantize
from reverie.images import evenly
from reverie.observers import Observer, weight_qparams
from reverie.progress import Progress
from reverie.randomness import Seed
from reverie.recovery.ranges import finite_qparams, watch_tensors

TensorKind = Literal["weight", "activation"]

_BATCH = 64
# Bytes of all tensors of a batch, their gradients included, unless that is fewer images than a mean needs.
_MEMORY = 2**30
_FEWEST = 8


@dataclass(frozen=True)
class Sensitivity:
    """What quantizing one tensor alone costs.

    Args:
        name: Of the layer or the tensor.
        kind: Whether it is the layer's weight or the tensor itself.
        elements: Values, of an activation for one image.
        divergence: KL of the quantized answer from the full-precision one, in nats, mean over images, by bits.
    """

    name: str
    kind: TensorKind
    elements: int
    divergence: dict[int, float]


@torch.no_grad()
def measure(
    teacher: fx.GraphModule,
    student: Student,
    inputs: Float[Tensor, "count *shape"],
    widths: Sequence[int],
    *,
    activations: Observer,
    weights: Observer,
    images: int,
    probes: int,
    seed: Seed,
    progress: Progress,
) -> list[Sensitivity]:
    """The sensitivity of every weight and then of every tensor on a grid, each in execution order.

    Args:
        teacher: The graph that `student` was placed on.
        student: Says which tensors; not changed.
        inputs: Calibration images; all of them decide ranges.
        widths: Bits to try on each tensor.
        activations, weights: Decide the ranges.
        images: On how many of `inputs`, evenly from all, answers are compared.
        probes: Random vectors v for each of them.

    Raises:
        ModelError: A tensor takes a value that is not finite.
    """
    chosen = inputs[evenly(len(inputs), images)]
    parts = torch.tensor_split(chosen, -(-len(chosen) // _batch(teacher, chosen, probes)))
    names = list(dict.fromkeys([*student.layers, *student.activations]))
    nodes = {node.name: node for node in teacher.graph.nodes}
    random = seed.generator()
    with progress.stage("sensitivity", total=len(parts)) as step:
        grids = _Grids(teacher, student, inputs, widths, activations, weights)
        totals = {(kind, name, bits): 0.0 for kind, name in grids.tensors for bits in widths}
        elements: dict[str, int] = {}
        for part in parts:
            values, gradients = _probed(teacher, part, names, probes, random)
            for kind, name in grids.tensors:
                elements[name] = values[nodes[name]].numel() // len(part)
                for bits in widths:
                    if kind == "weight":
                        moved = _effect(nodes[name], grids.weight_error(name, bits), values)
                    else:
                        moved = grids.tensor_error(name, bits, values[nodes[name]])
                    # A tensor may have several rows for an image, such as the windows of its attention.
                    products = torch.einsum(
                        "vif,if->vi", gradients[name].view(probes, len(part), -1), moved.reshape(len(part), -1)
                    )
                    totals[kind, name, bits] += float(products.square().sum()) / 2 / probes / len(chosen)
            step()
    sizes = {name: student.graph.get_buffer(layer.weight).numel() for name, layer in student.layers.items()}
    return [
        Sensitivity(
            name=name,
            kind=kind,
            elements=sizes[name] if kind == "weight" else elements[name],
            divergence={bits: totals[kind, name, bits] for bits in widths},
        )
        for kind, name in grids.tensors
    ]


class _Grids:
    """What each width does to each tensor."""

    def __init__(
        self,
        teacher: fx.GraphModule,
        student: Student,
        inputs: Tensor,
        widths: Sequence[int],
        activations: Observer,
        weights: Observer,
    ) -> None:
        self.tensors: list[tuple[TensorKind, str]] = [
            *(("weight", name) for name in student.layers),
            *(("activation", name) for name in student.activations),
        ]
        watches = watch_tensors(teacher, student.activations, torch.split(inputs, _BATCH), activations)
        self._signed = {name: quantizer.grid.signed for name, quantizer in student.activations.items()}
        self._tensor_qparams = {
            (name, bits): finite_qparams(name, watch, Grid(bits, self._signed[name]))
            for name, watch in watches.items()
            for bits in widths
        }
        self._weight_errors = {}
        for name, layer in student.layers.items():
            weight = student.graph.get_buffer(layer.weight)
            for bits in widths:
                qparams = weight_qparams(weight, weights, Grid(bits), symmetric=student.kind == "integer")
                self._weight_errors[name, bits] = fake_quantize(weight, *qparams, Grid(bits)) - weight

    def weight_error(self, name: str, bits: int) -> Tensor:
        """What rounding to nearest adds to the weight of the layer `name`."""
        return self._weight_errors[name, bits]

    def tensor_error(self, name: str, bits: int, values: Tensor) -> Tensor:
        """What quantization adds to these values of the tensor `name`."""
        return fake_quantize(values, *self._tensor_qparams[name, bits], Grid(bits, self._signed[name])) - values


def _probed(
    teacher: fx.GraphModule, inputs: Tensor, names: list[str], probes: int, random: torch.Generator
) -> tuple[dict[fx.Node, Any], dict[str, Float[Tensor, "probes *shape"]]]:
    """What every node computes of these images, and g_v at the tensors `names`."""
    interpreter = fx.Interpreter(teacher, garbage_collect_values=False)
    with torch.enable_grad():
        # A copy: the images stay as they are, without a gradient.
        logits = interpreter.run(inputs.clone().requires_grad_())
    values = dict(interpreter.env)
    named = {node.name: value for node, value in values.items()}
    shares = functional.softmax(logits.detach(), dim=1)
    found: list[tuple[Tensor, ...]] = []
    for probe in range(probes):
        signs = torch.randint(2, logits.shape, generator=random).mul(2).sub(1).to(shares)
        rooted = shares.sqrt() * signs
        direction = rooted - shares * rooted.sum(dim=1, keepdim=True)
        tensors = [named[name] for name in names]
        found.append(torch.autograd.grad(logits, tensors, direction, retain_graph=probe < probes - 1))
    gradients = {name: torch.stack(each) for name, each in zip(names, zip(*found, strict=True), strict=True)}
    return {node: value.detach() if isinstance(value, Tensor) else value for node, value in values.items()}, gradients


def _effect(layer: fx.Node, error: Tensor, values: dict[fx.Node, Any]) -> Tensor:
    """What an error of a layer's weight adds to its output, means of channels taken off."""
    args, kwargs = fx.node.map_arg((layer.args, layer.kwargs), values.__getitem__)
    assert callable(layer.target)
    moved: Tensor = layer.target(args[0], error, None, *args[3:], **kwargs)
    channel = moved.dim() - 1 if layer.target in LINEARS else 1
    others = [axis for axis in range(moved.dim()) if axis != channel]
    # The mean of a single value is itself, and taking it off would leave nothing.
    alone = moved.numel() == moved.shape[channel]
    return moved if alone else moved - moved.mean(others, keepdim=True)


def _batch(teacher: fx.GraphModule, inputs: Tensor, probes: int) -> int:
    """How many images may be looked at together."""
    with torch.no_grad():
        values = sum(math.prod(shape) for shape in shapes(teacher, inputs[:1]).values())
    # Means over images are to be taken off, so not one by one.
    return max(_FEWEST, int(_MEMORY / (values * inputs.element_size() * (1 + probes))))
