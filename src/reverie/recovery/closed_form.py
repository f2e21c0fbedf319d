"""Rounding without learning: each layer's codes at once, from its weight alone or from the second moments of its inputs.

    H = E[x x^T], Y = E[y x^T]      over calibration images and positions; x the student's input, y the teacher's answer

Layers are taken in execution order. The student's input comes through the rounded layers before, and the teacher's answer from full
precision, so that a layer makes good what those before it lost (asymmetric, as reconstruction is). Each layer's bias gets its channel's mean
back before the next layer is looked at, whose moments are then of what it will read; without that, two bits diverged. Activations stay
in full precision meanwhile, for bias correction's reason: what their grids take from synthetic images is not what they take from
photographs, and weights bent to make good for it doubled the KL at W4A4 (docs/log.md).

What a size x size matrix of moments is to be trusted for needs some multiple of `size` columns, not all 800,000 of an early layer: of
each image as many positions are taken, drawn anew for every batch, as make `COLUMNS` for each row of the matrix. Moments are summed
batch by batch, and no more than a batch's patches are ever in memory.
"""

import torch
from jaxtyping import Float
from torch import Tensor, fx

from reverie.errors import at
from reverie.graph.operators import LINEARS, arguments, layers
from reverie.graph.patches import answers, patches, position_count
from reverie.graph.placement import Student
from reverie.graph.walk import Walk
from reverie.grid import dequantize, quantize
from reverie.progress import Progress
from reverie.randomness import Seed
from reverie.recovery.bias_correction import activations_in_float, correct_layer
from reverie.rounding import FromMoments, FromWeights, Moments

COLUMNS = 32
# Images whose patches are in memory at a time.
_BATCH = 64
# Rows of a matrix of moments that are multiplied at a time.
_STRIP = 512


@torch.no_grad()
def round_at_once(
    teacher: fx.GraphModule,
    student: Student,
    inputs: Float[Tensor, "count *shape"],
    rounding: FromWeights | FromMoments,
    *,
    weights: Float[Tensor, " count"] | None,
    seed: Seed,
    progress: Progress,
) -> dict[str, tuple[float, float]]:
    """Decides every weight's code, in place, and with moments corrects the biases; arguments as for `reconstruction.round_weights`.

    Returns:
        For each layer the mean squared error of its answers before (at the nearest codes) and after, by its moments. Empty for a
        rounding that needs none.

    Raises:
        ModelError: A layer's moments are not finite.
    """
    if rounding.needs == "weights":
        for name, layer in student.layers.items():
            quantizer = student.weights[name]
            weight = student.graph.get_buffer(layer.weight)
            quantizer.set_codes(rounding(weight, quantizer.scale, quantizer.zero_point, quantizer.grid))
        return {}
    found = layers(teacher)
    # What a layer reads in the student is behind a quantizer, which is a node of its own.
    reads = {node.name: node.all_input_nodes[0].name for node in student.graph.graph.nodes if node.name in student.layers}
    names = [node.name for node in found]
    ahead = Walk(teacher, inputs, batch=_BATCH, keep=names)
    behind = Walk(student.graph, inputs, batch=_BATCH, keep=[*names, *reads.values()])
    errors: dict[str, tuple[float, float]] = {}
    with activations_in_float(student), progress.stage("round", total=len(found)) as step:
        for place, node in enumerate(found):
            ahead.to(node.name)
            behind.to(reads[node.name])
            weight, quantizer = student.graph.get_buffer(student.layers[node.name].weight), student.weights[node.name]
            generator = seed.at("positions", node.name).generator()
            sources = behind.value(reads[node.name])
            moments = _moments(student, node, sources, ahead.value(node.name), weights, generator)
            with at(node.name):
                codes = rounding(weight, quantizer.scale, quantizer.zero_point, quantizer.grid, moments)
            quantizer.set_codes(codes)
            nearest = quantize(weight, quantizer.scale, quantizer.zero_point, quantizer.grid)
            before, after = (
                float(moments.error(dequantize(made, quantizer.scale, quantizer.zero_point)).mean())
                for made in (nearest, codes)
            )
            errors[node.name] = (before, after)
            if student.layers[node.name].bias is not None:
                behind.to(node.name)
                correct_layer(student, node, ahead.value(node.name), behind.value(node.name))
            ahead.release(node.name)
            later = {reads[name] for name in names[place + 1 :]}
            for name in {node.name, reads[node.name]} - later:
                behind.release(name)
            step()
    return errors


def _moments(
    student: Student, node: fx.Node, sources: Tensor, targets: Tensor, weights: Tensor | None, generator: torch.Generator
) -> Moments:
    """The moments of one layer, from what it reads in the student and what it answers in the teacher."""
    layer = student.layers[node.name]
    weight = student.graph.get_buffer(layer.weight)
    size, everywhere = weight[0].numel(), position_count(node, targets)
    share = min(everywhere, -(-COLUMNS * size // sources.shape[0]))
    # Of a windowed attention, a row is no image but a part of one.
    trust = sources.new_ones(len(sources))
    if weights is not None:
        trust *= weights.repeat_interleave(len(sources) // len(weights)).to(trust.device)
    groups, out = _groups(node), weight.shape[0]
    inputs, answered, power = (
        torch.zeros(groups, *shape, dtype=torch.float64, device=sources.device)
        for shape in ((size, size), (out // groups, size), (out // groups,))
    )
    for part, target, due in zip(*(torch.split(whole, _BATCH) for whole in (sources, targets, trust)), strict=True):
        positions = torch.randperm(everywhere, generator=generator)[:share].to(part.device)
        x, y = patches(node, part, tuple(weight.shape[2:]), positions), answers(node, target, groups, positions)
        if layer.bias is not None:
            y = y - student.graph.get_buffer(layer.bias).view(1, groups, -1, 1)
        due = due.view(-1, 1, 1, 1)
        left, answer = _columns(x), _columns(y)
        right = left if weights is None else _columns(due * x)
        # Symmetric: what lies below the diagonal is mirrored at the end.
        for first in range(0, size, _STRIP):
            strip = slice(first, first + _STRIP)
            inputs[:, strip, first:] += left[:, strip] @ right[:, first:].mT
        answered += answer @ right.mT
        power += (due * y.square()).sum((0, 3))
    total = share * trust.sum().double()
    upper = inputs.triu_()
    return Moments((upper + upper.triu(1).mT) / total, answered / total, power / total)


def _groups(layer: fx.Node) -> int:
    return 1 if layer.target in LINEARS else int(arguments(layer)["groups"])


def _columns(rows: Float[Tensor, "count groups size positions"]) -> Float[Tensor, "groups size columns"]:
    return rows.permute(1, 2, 0, 3).flatten(2)
