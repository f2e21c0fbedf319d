"""What being on a grid does to each tensor of a network, and what that does to the answer.

    alone      KL(p || p') with only this tensor on its grid, all others in full precision
    without    KL(p || p') of the student with only this tensor in full precision

p is the full-precision network's answer to an image, p' the changed one; in nats, mean over images. Both are computed by
substitution (`graph/substitute.py`) and not estimated, so they are of the grids and codes that the student really has,
learned or not.

    SQNR = 10 log10( sum x^2 / sum (x - x')^2 )

x is the tensor in full precision; x' is it on its grid (`sqnr`), or what the student has there, with the noise of everything
before it (`student_sqnr`).

Not here: what is too much, and what to do about it (`report/diagnosis.py`).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, fx
from torch.nn import functional

from reverie.graph.channels import channel_axes
from reverie.graph.operators import (
    CLIPPING,
    CONCATENATIONS,
    PASS_THROUGH,
    arguments,
    aten,
    attribute,
    combines_computed,
    data_nodes,
)
from reverie.graph.quantized import QuantizedLayer, QuantizedNetwork
from reverie.graph.quantizers import ActivationQuantizer
from reverie.graph.substitute import Substitute, answers_with
from reverie.graph.taps import shapes, tap
from reverie.grid import Grid, dequantize, fake_quantize, quantize
from reverie.progress import Progress

TensorKind = Literal["weight", "activation"]

# Bytes that all tensors of a batch of images may take.
_MEMORY = 2**28
# Values of a tensor, of each batch, from which the bulk of its values and the codes in use are found.
_SAMPLE = 2**16
# Where a noise of nothing would be infinite.
_MOST_DB = 99.0
_SUMS = frozenset({aten.add.Tensor, aten.sub.Tensor})
# Weights are also put on grids of these parts of their range.
_NARROWER = (0.75, 0.5, 0.375, 0.25, 0.125, 0.0625)


@dataclass(frozen=True, kw_only=True)
class TensorError:
    """A tensor on a grid.

    Args:
        name: Of the layer that has the weight, or of the tensor.
        kind: Whether it is that layer's weight (and bias).
        bits: Of its codes.
        alone, without: KL in nats, see above.
        sqnr, student_sqnr: dB, at most 99.
        clipped: Share of the values that lie beyond the grid by more than half a step.
        clipping: Share of the error's energy that comes from these.
        codes: How many different codes are in use.
        filled: Part of the grid's range that the values span; of a weight 1.
        bulk: Part of the grid's range within which 99.9 % of the magnitudes of an activation's values lie, zeros not counted;
            of a weight 1.
        narrower: Of a weight: the part of its ranges that has the least error as a new range, at most 1; of an activation 1.
        narrower_gain: SQNR gained by that, dB.
        channel: The channel with the largest values: of an activation its own (root mean square), of a weight that of the
            input it is multiplied with (largest magnitude); None where there is only one.
        channel_ratio: How many times as large as those of the channel in the middle.
        operands: Where the tensor is a sum or concatenation, the names of the operands with the smallest and the largest root
            mean square.
        operand_ratio: Of the two.
        operand_steps: Root mean square of the smaller, in steps of the tensor's grid.
    """

    name: str
    kind: TensorKind
    bits: int
    alone: float
    without: float
    sqnr: float
    student_sqnr: float
    clipped: float
    clipping: float
    codes: int
    filled: float = 1.0
    bulk: float = 1.0
    narrower: float = 1.0
    narrower_gain: float = 0.0
    channel: int | None = None
    channel_ratio: float = 1.0
    operands: tuple[str, str] | None = None
    operand_ratio: float = 1.0
    operand_steps: float | None = None


@dataclass(frozen=True)
class Errors:
    """Of all tensors, in execution order: weights, then activations.

    Args:
        divergence: KL of the student's answer from full precision's, in nats, mean over images.
        agreement: Share of images to which both give the same class.
        images: How many there were.
    """

    tensors: tuple[TensorError, ...]
    divergence: float
    agreement: float
    images: int


@torch.no_grad()
def measure(
    reference: fx.GraphModule, quantized: QuantizedNetwork, inputs: Float[Tensor, "count *shape"], *, progress: Progress
) -> Errors:
    """The errors of every weight and of every tensor on a grid.

    Args:
        reference: The full-precision graph whose nodes the student's are named after (folded and equalized as it was).
        quantized: The student.
        inputs: On the device of both.
    """
    questions = _questions(reference, quantized)
    parts = torch.split(inputs, batch_that_fits(reference, inputs))
    axes = channel_axes(reference, inputs[:1])
    statistics = {name: _Statistics(quantizer, axes[name]) for name, quantizer in quantized.activations.items()}
    operands = _operands(reference, set(quantized.activations))
    powers: dict[str, float] = {name: 0.0 for pair in operands.values() for name in pair}
    alone = dict.fromkeys(questions, 0.0)
    without = dict.fromkeys(questions, 0.0)
    divergence, agreeing = 0.0, 0
    calls = quantizer_calls(quantized)
    ahead = tap(reference, dict.fromkeys([*statistics, *powers]))
    behind = tap(quantized.graph, calls.values())
    with progress.stage("diagnose", total=2 * len(questions) * len(parts)) as step:
        for part in parts:
            fast = part.contiguous(memory_format=torch.channels_last) if part.dim() == 4 else part
            known, answers = answers_with(reference, fast, [each.alone for each in questions.values()], step)
            for key, answer in zip(questions, answers, strict=True):
                alone[key] += float(divergences(answer, known).sum()) / len(inputs)
            ours, answers = answers_with(quantized.graph, fast, [each.without for each in questions.values()], step)
            for key, answer in zip(questions, answers, strict=True):
                without[key] += float(divergences(answer, known).sum()) / len(inputs)
            divergence += float(divergences(ours, known).sum()) / len(inputs)
            agreeing += int((ours.argmax(dim=1) == known.argmax(dim=1)).sum())
            full, mine = ahead(fast), behind(fast)
            for name, found in statistics.items():
                found.update(full[name], mine[calls[name]])
            for name in powers:
                powers[name] += float(full[name].square().mean()) * len(part) / len(inputs)
    found_tensors: list[TensorError] = []
    for kind, name in questions:
        shared: dict[str, Any] = {"name": name, "kind": kind, "alone": alone[kind, name], "without": without[kind, name]}
        if kind == "weight":
            found_tensors.append(TensorError(**shared, **_weight_facts(reference, quantized.layers[name])))
        else:
            facts = statistics[name].facts()
            if name in operands:
                facts |= _operand_facts(operands[name], powers, quantized.activations[name])
            found_tensors.append(TensorError(**shared, **facts))
    return Errors(tuple(found_tensors), divergence, agreeing / len(inputs), len(inputs))


def divergences(logits: Float[Tensor, "count classes"], known: Float[Tensor, "count classes"]) -> Float[Tensor, " count"]:
    """KL of each answer from the known one, in nats."""
    ours, full = functional.log_softmax(logits, dim=1), functional.log_softmax(known, dim=1)
    return functional.kl_div(ours, full, reduction="none", log_target=True).sum(dim=1)


@dataclass(frozen=True)
class _Question:
    """A tensor: what puts it on its grid in the full-precision graph, and what takes it off in the student's."""

    alone: tuple[str, Substitute]
    without: tuple[str, Substitute]


def _questions(reference: fx.GraphModule, quantized: QuantizedNetwork) -> dict[tuple[TensorKind, str], _Question]:
    nodes = {node.name: node for node in reference.graph.nodes}
    found: dict[tuple[TensorKind, str], _Question] = {}
    for name, layer in quantized.layers.items():
        ours = (
            quantized.graph.get_buffer(layer.weight),
            None if layer.bias is None else quantized.graph.get_buffer(layer.bias),
        )
        full = tuple(attribute(reference, argument) for argument in parameters_of(nodes[name]))
        found["weight", name] = _Question((name, _layer_with(*ours)), (name, _layer_with(*full)))
    calls = quantizer_calls(quantized)
    for name, quantizer in quantized.activations.items():
        found["activation", name] = _Question((name, _on_grid(quantizer)), (calls[name], _off_grid))
    return found


def parameters_of(layer: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
    """Its weight and its bias, if it has one."""
    weight, bias = layer.args[1], layer.args[2] if len(layer.args) > 2 else None
    assert isinstance(weight, fx.Node) and (bias is None or isinstance(bias, fx.Node))
    return weight, bias


def _layer_with(weight: Tensor | None, bias: Tensor | None) -> Substitute:
    def computed(node: fx.Node, values: Mapping[fx.Node, Any]) -> Tensor:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        layer: Callable[..., Tensor] = node.target  # type: ignore[assignment]
        return layer(args[0], weight, bias, *args[3:], **kwargs)

    return computed


def _on_grid(quantizer: ActivationQuantizer) -> Substitute:
    def quantized(node: fx.Node, values: Mapping[fx.Node, Any]) -> Tensor:
        result: Tensor = quantizer(values[node])
        return result

    return quantized


def _off_grid(node: fx.Node, values: Mapping[fx.Node, Any]) -> Tensor:
    source: Tensor = values[node.all_input_nodes[0]]
    return source


def quantizer_calls(quantized: QuantizedNetwork) -> dict[str, str]:
    """By tensor, the node of the student that puts it on its grid."""
    prefix = "activation_quantizers."
    nodes = [node for node in quantized.graph.graph.nodes if node.op == "call_module" and node.target.startswith(prefix)]
    return {node.target.removeprefix(prefix): node.name for node in nodes}


def batch_that_fits(graph: fx.GraphModule, inputs: Tensor) -> int:
    """How many of `inputs` to execute at once and hold all tensors of, at least one."""
    with torch.no_grad():
        values = sum(math.prod(shape) for shape in shapes(graph, inputs[:1]).values())
    return max(1, min(len(inputs), int(_MEMORY / (values * inputs.element_size()))))


class _Statistics:
    """What a tensor's values are like, and its codes.

    Args:
        channels: Its axes that are channels.
    """

    def __init__(self, quantizer: ActivationQuantizer, channels: tuple[int, ...]) -> None:
        self._axes = channels
        self._grid, self._scale, self._zero_point = quantizer.grid, quantizer.scale, quantizer.zero_point
        zero = int(quantizer.zero_point)
        self._low, self._high = ((end - zero) * quantizer.scale for end in (self._grid.quant_min, self._grid.quant_max))
        self._signal = self._noise = self._clipping = self._student_noise = 0.0
        self._count = self._clipped = self._rows = 0
        self._least, self._most = math.inf, -math.inf
        self._channels: Tensor | None = None
        self._samples: list[Tensor] = []

    def update(self, values: Float[Tensor, "rows *shape"], ours: Float[Tensor, "rows *shape"]) -> None:
        """Takes in the full-precision values of a batch, and the student's."""
        error = fake_quantize(values, self._scale, self._zero_point, self._grid).sub_(values).square_()
        beyond = (values < self._low - self._scale / 2) | (values > self._high + self._scale / 2)
        self._signal += float(values.square().sum())
        self._noise += float(error.sum())
        self._clipping += float((error * beyond).sum())
        self._student_noise += float((ours - values).square_().sum())
        self._count += values.numel()
        self._clipped += int(beyond.sum())
        least, most = torch.aminmax(values)
        self._least, self._most = min(self._least, float(least)), max(self._most, float(most))
        power = values.square().mean([axis for axis in range(values.dim()) if axis not in self._axes]).flatten() * len(values)
        self._channels = power if self._channels is None else self._channels + power
        self._rows += len(values)
        self._samples.append(values.flatten()[:: max(1, values.numel() // _SAMPLE)])

    def facts(self) -> dict[str, Any]:
        """As `TensorError` names them."""
        assert self._channels is not None
        sample = torch.cat(self._samples)
        codes = quantize(sample, self._scale, self._zero_point, self._grid)
        reach = float(torch.maximum(self._high, -self._low))
        # Exact zeros, most of what leaves a ReLU, say nothing about where the others lie.
        magnitudes = sample[sample != 0].abs().sort().values
        bulk = float(magnitudes[int(0.999 * (len(magnitudes) - 1))]) if len(magnitudes) else 0.0
        channel, ratio = _largest((self._channels / self._rows).sqrt())
        return {
            "bits": self._grid.bits,
            "sqnr": decibels(self._signal, self._noise),
            "student_sqnr": decibels(self._signal, self._student_noise),
            "clipped": self._clipped / self._count,
            "clipping": self._clipping / self._noise if self._noise else 0.0,
            "codes": _in_use(codes, self._grid),
            "filled": (max(self._most, 0.0) - min(self._least, 0.0)) / float(self._high - self._low),
            "bulk": bulk / reach,
            "channel": channel,
            "channel_ratio": ratio,
        }


def _weight_facts(reference: fx.GraphModule, layer: QuantizedLayer) -> dict[str, Any]:
    node = next(node for node in reference.graph.nodes if node.name == layer.name)
    weight = attribute(reference, parameters_of(node)[0])
    assert weight is not None
    grid, scale, zero_point = layer.grid, layer.scale, layer.zero_point

    def error(part: float) -> Tensor:
        return fake_quantize(weight, scale * part, zero_point, grid).sub_(weight).square_()

    low, high = ((end - zero_point) * scale for end in (grid.quant_min, grid.quant_max))
    beyond = (weight < low - scale / 2) | (weight > high + scale / 2)
    nearest = error(1.0)
    noises = {part: float(error(part).sum()) for part in _NARROWER} | {1.0: float(nearest.sum())}
    ours = dequantize(layer.codes.to(scale.dtype), scale, zero_point)
    groups = arguments(node).get("groups", 1)
    # Of a group's inputs; with one channel a group (depthwise) there is nothing to compare.
    columns = weight.abs().reshape(groups, -1, *weight.shape[1:]).transpose(1, 2).flatten(2).amax(2)
    compared = [_largest(group) for group in columns]
    group, (channel, ratio) = max(enumerate(compared), key=lambda one: one[1][1])
    channel = None if channel is None else group * columns.shape[1] + channel
    best = min(noises, key=lambda part: (noises[part], -part))
    signal = float(weight.square().sum())
    return {
        "bits": grid.bits,
        "sqnr": decibels(signal, noises[1.0]),
        "student_sqnr": decibels(signal, float((ours - weight).square().sum())),
        "clipped": float(beyond.float().mean()),
        "clipping": float((nearest * beyond).sum()) / noises[1.0] if noises[1.0] else 0.0,
        "codes": _in_use(layer.codes, grid),
        "narrower": best,
        "narrower_gain": decibels(signal, noises[best]) - decibels(signal, noises[1.0]),
        "channel": channel,
        "channel_ratio": ratio,
    }


def _in_use(codes: Tensor, grid: Grid) -> int:
    return int(codes.flatten().long().sub(grid.quant_min).bincount().count_nonzero())


def _largest(channels: Float[Tensor, " channels"]) -> tuple[int | None, float]:
    """The largest channel, and its ratio to the median of those that are not zero."""
    alive = channels[channels > 0]
    if len(alive) < 2:
        return None, 1.0
    return int(channels.argmax()), float(channels.max() / alive.median())


def decibels(signal: float, noise: float) -> float:
    """Signal-to-noise ratio in dB, -99 to 99."""
    if noise <= 0 or signal <= 0:
        return _MOST_DB if noise <= 0 else -_MOST_DB
    return max(-_MOST_DB, min(_MOST_DB, 10 * math.log10(signal / noise)))


def _operands(reference: fx.GraphModule, on_grid: set[str]) -> dict[str, list[str]]:
    """By tensor on a grid, the operands of the sum or concatenation that it is."""
    data = data_nodes(reference)
    found: dict[str, list[str]] = {}
    for node in reference.graph.nodes:
        if node.op != "call_function" or node.target not in _SUMS | CONCATENATIONS or not combines_computed(node, data):
            continue
        result = node
        while result.name not in on_grid:
            readers = list(result.users)
            if len(readers) != 1 or readers[0].target not in CLIPPING | PASS_THROUGH:
                break
            result = readers[0]
        if result.name in on_grid:
            found[result.name] = [operand.name for operand in node.all_input_nodes]
    return found


def _operand_facts(names: list[str], powers: dict[str, float], quantizer: ActivationQuantizer) -> dict[str, Any]:
    ordered = sorted(names, key=powers.__getitem__)
    small, large = (math.sqrt(powers[name]) for name in (ordered[0], ordered[-1]))
    if small == 0 or len(ordered) < 2:
        return {}
    return {
        "operands": (ordered[0], ordered[-1]),
        "operand_ratio": large / small,
        "operand_steps": small / float(quantizer.scale),
    }
