"""A third opinion: the integer model executed with integers alone, code by code, as a device would.

Codes and weights are int32 tensors that hold 8-bit codes, products are summed in int32 (checked not to overflow), and
float32 occurs in one place, the step from one integer to the next that every integer runtime describes so:

    layers      y = clamp(rint(float32(accumulator) * M) + y_zero_point),   M = x_scale * w_scale / y_scale, left to right in float32
    averages    likewise with M = x_scale / (y_scale * count)
    sums        y = clamp(rint(fma(a, A, fma(b, B, y_zero_point - fma(A, a_zero_point, B * b_zero_point))))),
                A = a_scale / y_scale, B = b_scale / y_scale; `a` and `b` are codes with their zero points, fma rounds once
    products    y = clamp(rint(float32(a * b) * M + y_zero_point)),         M = a_scale * b_scale / y_scale; codes without zero points
    requantize  y = table[x], each entry clamp(rint((x - x_zero_point) * x_scale / y_scale) + y_zero_point)

`rint` rounds halves to even. Sums are where ONNX Runtime's order of operations on x86 matters: values half-way between two
codes are common. Concatenations requantize each operand. What only moves is moved as codes, and a clipping activation is a
clamp of the codes it becomes.

Whatever has no integer form here (softmax, hard-swish, layers whose input is on no grid) is computed in float between
dequantize and quantize; `Answer.float_nodes` says which nodes those were.

Not here: speed (hundreds of small images or a few large ones in a minute), and anything of `graph.integer`, which computes the
same with float32 convolutions and is checked against this.
"""

import itertools
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int, Int32
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from reverie.errors import ExportError
from reverie.graph.operators import (
    CLIPPING,
    CONVOLUTIONS,
    LAYERS,
    PASS_THROUGH,
    SAME,
    arguments,
    aten,
    clipping_bounds,
    constant,
    data_nodes,
)
from reverie.graph.quantized import QuantizedLayer, QuantizedNetwork
from reverie.graph.quantizers import ActivationQuantizer
from reverie.grid import Grid

_INT32_MAX = 2**31 - 1
_PADS = frozenset({aten.pad.default, aten.constant_pad_nd.default})
_SPLITS = frozenset({aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int})


@dataclass(frozen=True)
class Answer:
    """What the reference computed.

    Args:
        logits: In float32.
        codes: Of every quantized tensor, by its name; those of the student's grid, below 0 too where that is signed.
        float_nodes: The nodes that were computed in float, in execution order.
    """

    logits: Float[Tensor, "n classes"]
    codes: dict[str, Int32[Tensor, "n *_"]]
    float_nodes: tuple[str, ...]


class Reference:
    """Executes an integer model; of a checkpoint, give what `restore` makes of it.

    Raises:
        ExportError: The placement is `literature`, which no integer runtime executes.
    """

    def __init__(self, quantized: QuantizedNetwork) -> None:
        if quantized.kind != "integer":
            raise ExportError(
                f"reference: the placement must be 'integer', got {quantized.kind!r}; "
                "quantize again with placement 'integer', which is what integer runtimes execute"
            )
        self._quantized = quantized

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "n *shape"], *, batch: int = 16) -> Answer:
        """Logits and codes for all images.

        Args:
            images: In the network's own input units.
            batch: Images at a time.

        Raises:
            ExportError: The sum of a layer's products does not fit an int32 accumulator.
        """
        runs = [_Execution(self._quantized) for _ in range(0, len(images), batch)]
        logits = [run.run(part) for run, part in zip(runs, torch.split(images.cpu(), batch), strict=True)]
        codes = {name: torch.cat([run.codes[name] for run in runs]) for name in runs[0].codes}
        return Answer(torch.cat(logits), codes, tuple(runs[0].float_nodes))


@dataclass(frozen=True)
class _Grid:
    scale: Float[Tensor, ""]
    zero_point: Int[Tensor, ""]
    ends: Grid


@dataclass(frozen=True)
class _Codes:
    """A tensor on a grid."""

    codes: Int[Tensor, "*shape"]
    grid: _Grid

    def centred(self) -> Int[Tensor, "*shape"]:
        return self.codes - self.grid.zero_point

    def real(self) -> Float[Tensor, "*shape"]:
        return self.centred().float() * self.grid.scale

    def onto(self, target: _Grid) -> Float[Tensor, "*shape"]:
        ends = self.grid.ends
        every = _Codes(torch.arange(ends.quant_min, ends.quant_max + 1, dtype=torch.int32), self.grid).real()
        return _rounded(every, target)[self.codes - ends.quant_min]


@dataclass(frozen=True)
class _Result:
    """What an integer operator computed, before it is put on a grid.

    Args:
        onto: Its codes on a grid, whole numbers that are not clamped yet.
        real: Its real values, for an operator in float or the output.
        bounds: Of clipping activations, each with whether it bounds from below.
    """

    onto: Callable[[_Grid], Float[Tensor, "*shape"]]
    real: Callable[[], Float[Tensor, "*shape"]]
    bounds: tuple[tuple[Tensor, bool], ...] = ()


def _rounded(x: Float[Tensor, "*shape"], grid: _Grid) -> Float[Tensor, "*shape"]:
    return torch.round(x / grid.scale) + grid.zero_point


def _scaled(sums: Int[Tensor, "*shape"], multiplier: Float[Tensor, "*#shape"], grid: _Grid) -> Float[Tensor, "*shape"]:
    return torch.round(sums.float() * multiplier) + grid.zero_point


def _fma(factor: Tensor, ratio: Tensor, addend: Tensor) -> Tensor:
    """In float32, rounded once: a product of two float32 numbers is exact in float64."""
    return (factor.double() * ratio.double() + addend.double()).float()


def _real(value: Any) -> Any:
    if isinstance(value, _Result) and value.bounds:
        clipped = value.real()
        for bound, below in value.bounds:
            clipped = torch.maximum(clipped, bound) if below else torch.minimum(clipped, bound)
        return clipped
    return value.real() if isinstance(value, _Codes | _Result) else value


class _Execution(fx.Interpreter):
    """One pass over the graph; values are `_Codes`, `_Result`, or whatever an operator in float gives."""

    def __init__(self, quantized: QuantizedNetwork) -> None:
        super().__init__(quantized.graph)
        # Errors are sentences for users; the interpreter would add the node's source to them.
        self.extra_traceback = False
        self._graph, self._layers = quantized.graph, quantized.layers
        self._data = data_nodes(quantized.graph)
        self.codes: dict[str, Tensor] = {}
        self.float_nodes: list[str] = []

    def run_node(self, node: fx.Node) -> Any:
        if node.op == "call_module":
            return self._put(str(node.target), self.env[node.all_input_nodes[0]])
        if node.op != "call_function":
            return _real(super().run_node(node))
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        found = self._as_integers(node, args)
        if found is not None:
            return found
        if node in self._data:
            self.float_nodes.append(node.name)
        assert callable(node.target)
        return node.target(*map_aggregate(args, _real), **map_aggregate(kwargs, _real))

    def _put(self, target: str, value: Any) -> _Codes:
        quantizer = self.fetch_attr(target)
        assert isinstance(quantizer, ActivationQuantizer)
        ends = quantizer.grid
        grid = _Grid(quantizer.scale.cpu(), quantizer.zero_point.cpu(), ends)
        bounds = value.bounds if isinstance(value, _Result) else ()
        whole = value.onto(grid) if isinstance(value, _Codes | _Result) else _rounded(value, grid)
        codes = whole.clamp(ends.quant_min, ends.quant_max)
        for bound, below in bounds:
            code = _rounded(bound, grid).clamp(ends.quant_min, ends.quant_max)
            codes = torch.maximum(codes, code) if below else torch.minimum(codes, code)
        put = _Codes(codes.to(torch.int32), grid)
        self.codes[target.rpartition(".")[2]] = put.codes
        return put

    def _as_integers(self, node: fx.Node, args: tuple[Any, ...]) -> Any:
        """The node's result, or None where it has no integer form."""
        target = node.target
        first: Any = args[0] if args else None
        if target is operator.getitem:
            return first[args[1]] if isinstance(first, tuple | list) else None
        if target is SAME:
            return first
        if target in CLIPPING and isinstance(first, _Codes | _Result) and all(map(constant, node.all_input_nodes[1:])):
            unclipped = first if isinstance(first, _Result) else _Result(first.onto, first.real)
            return replace(unclipped, bounds=(*unclipped.bounds, *clipping_bounds(self._graph, node)))
        if target is aten.cat.default and all(isinstance(part, _Codes) for part in first):
            return _concatenated(first, arguments(node)["dim"])
        if not isinstance(first, _Codes):
            return None
        if node.name in self._layers and target in LAYERS:
            return _layer(first, self._layers[node.name], node)
        if target in PASS_THROUGH and not (target in _PADS and arguments(node)["value"]):
            return _moved(first, node, args)
        if target in (aten.add.Tensor, aten.mul.Tensor) and isinstance(args[1], _Codes):
            if target is aten.mul.Tensor:
                return _product(first, args[1])
            return _sum(first, args[1]) if arguments(node)["alpha"] == 1 else None
        return _averaged(first, node)


def _moved(source: _Codes, node: fx.Node, args: tuple[Any, ...]) -> Any:
    """Codes without zero points, so that paddings are 0; in float, since not every operator moves integers."""
    assert callable(node.target)
    moved = node.target(source.centred().float(), *args[1:], **node.kwargs)

    def back(values: Tensor) -> _Codes:
        return _Codes(values.to(torch.int32) + source.grid.zero_point, source.grid)

    if isinstance(moved, Tensor):
        return back(moved)
    # The second result of a pooling by maximum is where the maxima were.
    return [back(part) if node.target in _SPLITS or not index else part for index, part in enumerate(moved)]


def _layer(source: _Codes, layer: QuantizedLayer, node: fx.Node) -> _Result | None:
    if layer.bias is not None and layer.bias_codes is None:
        return None
    weight = layer.codes.cpu().to(torch.int32) - layer.zero_point.cpu()
    bias = torch.zeros(len(weight), dtype=torch.int32) if layer.bias_codes is None else layer.bias_codes.cpu()
    # No sum can be larger than if all codes were at the far end of their grid.
    largest = int((weight.long().abs().flatten(1).sum(1) * 255 + bias.long().abs()).max())
    kind = torch.int32 if largest <= _INT32_MAX else torch.int64
    x, weight, bias = source.centred().to(kind), weight.to(kind), bias.to(kind)
    if node.target in CONVOLUTIONS:
        sums, column = _convolved(x, weight, arguments(node)) + bias.view(-1, *[1] * (x.dim() - 2)), (-1, *[1] * (x.dim() - 2))
    else:
        sums, column = (x.flatten(0, -2) @ weight.t()).view(*x.shape[:-1], -1) + bias, (-1,)
    if kind is torch.int64 and int(sums.abs().max()) > _INT32_MAX:
        raise ExportError(
            f"{layer.path}: the sum of products must fit an int32 accumulator, got {int(sums.abs().max())}; "
            "use fewer bits for its weights"
        )
    scale = (source.grid.scale * layer.scale.cpu().flatten()).view(column)
    return _Result(lambda grid: _scaled(sums, scale / grid.scale, grid), lambda: sums.float() * scale)


def _convolved(
    x: Int[Tensor, "n channels *size"], weight: Int[Tensor, "out *rest"], named: dict[str, Any]
) -> Int[Tensor, "n out *_"]:
    """The convolution as a sum over the kernel's taps, each a matrix product of integers within every group."""
    axes = x.dim() - 2
    stride, dilation = _each(named["stride"], axes), _each(named["dilation"], axes)
    groups, kernel = named["groups"], weight.shape[2:]
    reach = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
    padding = named["padding"]
    if padding == "same":
        ends = [(total // 2, total - total // 2) for total in reach]
    else:
        ends = [(amount, amount) for amount in (_each(padding, axes) if padding != "valid" else [0] * axes)]
    x = torch.nn.functional.pad(x, [amount for pair in reversed(ends) for amount in pair])
    size = [(whole - far - 1) // step + 1 for whole, far, step in zip(x.shape[2:], reach, stride, strict=True)]
    grouped = x.reshape(len(x), groups, -1, *x.shape[2:]).movedim((1, 2), (0, -1))
    weights = weight.reshape(groups, -1, *weight.shape[1:]).movedim((0, 1, 2), (-3, -1, -2))
    sums = x.new_zeros(groups, len(x) * torch.Size(size).numel(), len(weight) // groups)
    for tap in itertools.product(*map(range, kernel)):
        window = tuple(
            slice(place * far, place * far + (count - 1) * step + 1, step)
            for place, far, count, step in zip(tap, dilation, size, stride, strict=True)
        )
        seen = grouped[(slice(None), slice(None), *window)]
        sums += torch.bmm(seen.reshape(groups, -1, seen.shape[-1]), weights[tap])
    return sums.view(groups, len(x), *size, -1).movedim((0, -1), (1, 2)).flatten(1, 2)


def _each(value: Any, axes: int) -> list[int]:
    found = [value] if isinstance(value, int) else list(value)
    return found * axes if len(found) == 1 else found


def _sum(first: _Codes, second: _Codes) -> _Result:
    def onto(grid: _Grid) -> Tensor:
        left, right = first.grid.scale / grid.scale, second.grid.scale / grid.scale
        rest = grid.zero_point - _fma(first.grid.zero_point, left, right * second.grid.zero_point)
        return torch.round(_fma(first.codes, left, _fma(second.codes, right, rest)))

    return _Result(onto, lambda: first.real() + second.real())


def _product(first: _Codes, second: _Codes) -> _Result:
    products, scale = first.centred() * second.centred(), first.grid.scale * second.grid.scale
    return _Result(
        lambda grid: torch.round(products.float() * (scale / grid.scale) + grid.zero_point),
        lambda: first.real() * second.real(),
    )


def _concatenated(parts: list[_Codes], dim: int) -> _Result:
    return _Result(
        lambda grid: torch.cat([part.onto(grid) for part in parts], dim),
        lambda: torch.cat([part.real() for part in parts], dim),
    )


def _averaged(source: _Codes, node: fx.Node) -> _Result | None:
    """An average over windows of one size or whole axes; None for any other operator."""
    if node.target is aten.mean.dim:
        named = arguments(node)
        axes = list(named["dim"] or range(source.codes.dim()))
        sums = source.centred().sum(axes, keepdim=named["keepdim"])
    elif node.target is aten.adaptive_avg_pool2d.default and list(arguments(node)["output_size"]) == [1, 1]:
        sums = source.centred().sum((-2, -1), keepdim=True)
    elif node.target is aten.avg_pool2d.default:
        named = arguments(node)
        kernel, padding = _each(named["kernel_size"], 2), _each(named["padding"], 2)
        stride = _each(named["stride"] or kernel, 2)
        if named["ceil_mode"] or named["divisor_override"] or (any(padding) and not named["count_include_pad"]):
            return None
        padded = torch.nn.functional.pad(source.centred(), [padding[1], padding[1], padding[0], padding[0]])
        sums = padded.unfold(-2, kernel[0], stride[0]).unfold(-2, kernel[1], stride[1]).sum((-2, -1))
        return _mean(sums, kernel[0] * kernel[1], source.grid.scale)
    else:
        return None
    return _mean(sums, source.codes.numel() // sums.numel(), source.grid.scale)


def _mean(sums: Int[Tensor, "*shape"], count: int, scale: Float[Tensor, ""]) -> _Result:
    return _Result(lambda grid: _scaled(sums, scale / (grid.scale * count), grid), lambda: sums.float() * (scale / count))
