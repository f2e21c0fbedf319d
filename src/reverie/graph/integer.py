"""An integer model executed on codes, as ONNX Runtime does on x86, with nothing but PyTorch.

    layer       accumulator = conv(x_codes - x_zero_point, w_codes) + b_codes
                y_codes = round(accumulator * (x_scale * w_scale / y_scale)) + y_zero_point
    sum         rest = y_zero_point - (a_scale / y_scale * a_zero_point + b_scale / y_scale * b_zero_point)
                y_codes = round(a_codes * (a_scale / y_scale) + (b_codes * (b_scale / y_scale) + rest))
    product     y_codes = round(product of both (codes - zero_point) * (a_scale * b_scale / y_scale) + y_zero_point)
    mean        y_codes = round(sum of (x_codes - x_zero_point) * (x_scale / (y_scale * count))) + y_zero_point

and then the clamp to the bounds of the grid and of the clipping activation.

The fake-quantized graph computes the same in real numbers, and its float32 results are off by a few parts in ten million: in
one value of a million that tips a rounding, and through eight-bit activations one tipped rounding tips others, until some
images in a thousand get another class. Sums of integers below 2^24 are exact in float32, so here nothing tips in layers. The
other three are where values lie exactly half-way between codes, many of them where scales are learned or shared; which code wins
depends on where the zero point is added and on what is rounded on the way, so it is done in ONNX Runtime's order. Its
additions are fused with the products before them (AVX2, FMA): rounded once, here by way of float64.

What has none of these forms is executed as in the fake-quantized graph.
"""

import copy
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, fx, nn

from reverie.graph.operators import (
    CLIPPING,
    CONVOLUTIONS,
    PASS_THROUGH,
    SAME,
    arguments,
    aten,
    clipping_bounds,
    constant,
    set_attribute,
)
from reverie.graph.quantized import QuantizedLayer, QuantizedNetwork
from reverie.graph.quantizers import ActivationQuantizer
from reverie.grid import quantize


@torch.no_grad()
def as_integers(quantized: QuantizedNetwork) -> fx.GraphModule:
    """A graph with the inputs and outputs of `quantized.graph` whose operators compute on codes where they can."""
    graph = copy.deepcopy(quantized.graph)
    grids = _grids(graph)
    for node in list(graph.graph.nodes):
        write = _write_of(graph, node)
        module = None if write is None else _on_codes(graph, quantized, node, write, grids)
        if write is not None and module is not None:
            grids[_finish(graph, node, write, module)] = write.quantizer
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _on_codes(
    graph: fx.GraphModule,
    quantized: QuantizedNetwork,
    node: fx.Node,
    write: "_Write",
    grids: dict[fx.Node, ActivationQuantizer],
) -> "End | None":
    """What computes the values that `write` puts on a grid, from the operands' or a layer's accumulator; None for what stays in float."""
    layer, operands = quantized.layers.get(node.name), [grids.get(operand) for operand in node.all_input_nodes]
    if layer is not None:
        if layer.source is None or (layer.bias is not None and layer.bias_codes is None):
            return None
        source = quantized.activations[layer.source]
        _multiply_codes(graph, layer, node, source)
        column = (-1, *[1] * (layer.codes.dim() - 2)) if node.target in CONVOLUTIONS else (-1,)
        return _Requantized(write, (source.scale * layer.scale.flatten() / write.quantizer.scale).view(column))
    if node.target in _PAIRS and len(operands) == 2 and arguments(node).get("alpha", 1) == 1:
        first, second = operands
        return _PAIRS[node.target](write, first, second) if first is not None and second is not None else None
    if operands and operands[0] is not None and _averages_whole(node):
        keeps_axes = node.target is not aten.mean.dim or bool(arguments(node)["keepdim"])
        return _Mean(write, operands[0], keeps_axes)
    return None


@dataclass(frozen=True)
class _Write:
    """How an operator's result is put on a grid: through `clipping`, if there is one, and the call of a quantizer."""

    call: fx.Node
    clipping: fx.Node | None
    quantizer: ActivationQuantizer
    bounds: tuple[tuple[Tensor, bool], ...]


def _write_of(graph: fx.GraphModule, node: fx.Node) -> _Write | None:
    """None where something else reads the result, or it is on no grid."""
    clipping = _only_reader(node)
    if clipping is not None and not (clipping.target in CLIPPING and all(map(constant, clipping.all_input_nodes[1:]))):
        clipping = None
    call = _only_reader(node if clipping is None else clipping)
    if node.op != "call_function" or call is None or call.op != "call_module":
        return None
    quantizer = graph.get_submodule(str(call.target))
    assert isinstance(quantizer, ActivationQuantizer)
    return _Write(call, clipping, quantizer, tuple(clipping_bounds(graph, clipping)) if clipping is not None else ())


def _only_reader(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _grids(graph: fx.GraphModule) -> dict[fx.Node, ActivationQuantizer]:
    """The grid that a node's values are on, where they are on one: a quantizer's, or that of what was only moved."""
    found: dict[fx.Node, ActivationQuantizer] = {}
    for node in graph.graph.nodes:
        if node.op == "call_module":
            quantizer = graph.get_submodule(str(node.target))
            assert isinstance(quantizer, ActivationQuantizer)
            found[node] = quantizer
        elif node.op == "call_function" and (node.target in PASS_THROUGH or node.target is SAME):
            source = node.all_input_nodes[0]
            if source in found:
                found[node] = found[source]
    return found


def _averages_whole(node: fx.Node) -> bool:
    """Whether it is the mean over height and width, for which there is an integer kernel."""
    if node.target is aten.adaptive_avg_pool2d.default:
        return list(arguments(node)["output_size"]) == [1, 1]
    return node.target is aten.mean.dim and sorted(axis % 4 for axis in arguments(node)["dim"] or ()) == [2, 3]


def _finish(graph: fx.GraphModule, node: fx.Node, write: _Write, module: "End") -> fx.Node:
    """Makes all who read the quantizer's result read that of `module` instead; gives it."""
    target = f"integer.{node.name}.end"
    graph.add_submodule(target, module)
    operands = (node,) if isinstance(module, _Requantized) else tuple(node.all_input_nodes)
    with graph.graph.inserting_before(write.call):
        end = graph.graph.call_module(target, operands)
    write.call.replace_all_uses_with(end)
    graph.graph.erase_node(write.call)
    if write.clipping is not None:
        graph.graph.erase_node(write.clipping)
    return end


def _multiply_codes(graph: fx.GraphModule, layer: QuantizedLayer, node: fx.Node, source: ActivationQuantizer) -> None:
    """Makes a layer multiply codes; what it answers is the accumulator."""
    values = {"weight": layer.codes.to(layer.scale.dtype) - layer.zero_point, "source_scale": source.scale}
    if layer.bias_codes is not None:
        values["bias"] = layer.bias_codes.to(layer.scale.dtype)
    for key, value in values.items():
        set_attribute(graph, f"integer.{layer.name}.{key}", value)
    with graph.graph.inserting_before(node):
        stored = {key: graph.graph.get_attr(f"integer.{layer.name}.{key}") for key in values}
        codes = graph.graph.call_function(_centred_codes, (node.args[0], stored["source_scale"]))
    node.args = (codes, stored["weight"], stored.get("bias"), *node.args[3:])


def _centred_codes(x: Float[Tensor, "*shape"], scale: Float[Tensor, ""]) -> Float[Tensor, "*shape"]:
    """Codes minus the zero point of values that are on the grid; the rounding only undoes that of the division."""
    return torch.div(x, scale).round_()


class End(nn.Module):
    """What an operator ends with: codes, still without the zero point, between their bounds and as real values.

    Args:
        write: How they are put on the grid of the tensor `tensor`.
    """

    low: Tensor
    high: Tensor
    scale: Tensor

    def __init__(self, write: _Write) -> None:
        super().__init__()
        self.tensor = str(write.call.target).rpartition(".")[2]
        target = write.quantizer
        ends = (target.grid.quant_min, target.grid.quant_max)
        low, high = (torch.tensor(float(end), device=target.scale.device) for end in ends)
        for bound, below in write.bounds:
            code = quantize(bound.to(target.scale.device), target.scale, target.zero_point, target.grid)
            low, high = (torch.maximum(low, code), high) if below else (low, torch.minimum(high, code))
        self.register_buffer("low", low - target.zero_point)
        self.register_buffer("high", high - target.zero_point)
        self.register_buffer("scale", target.scale)

    def put(self, centred: Tensor) -> Tensor:
        return torch.clamp(centred, self.low, self.high).mul_(self.scale)


class _Requantized(End):
    multiplier: Tensor

    def __init__(self, write: _Write, multiplier: Tensor) -> None:
        super().__init__(write)
        self.register_buffer("multiplier", multiplier)

    def forward(self, accumulator: Tensor) -> Tensor:
        return self.put((accumulator * self.multiplier).round_())


class _Pair(End):
    """Of two operands on grids of their own."""

    scales: Tensor
    zero_points: Tensor
    zero_point: Tensor

    def __init__(self, write: _Write, first: ActivationQuantizer, second: ActivationQuantizer) -> None:
        super().__init__(write)
        self.register_buffer("scales", torch.stack([first.scale, second.scale]))
        self.register_buffer("zero_points", torch.stack([first.zero_point, second.zero_point]).to(first.scale))
        self.register_buffer("zero_point", write.quantizer.zero_point.to(first.scale))


class _Sum(_Pair):
    ratios: Tensor
    rest: Tensor

    def __init__(self, write: _Write, first: ActivationQuantizer, second: ActivationQuantizer) -> None:
        super().__init__(write, first, second)
        self.register_buffer("ratios", (self.scales / write.quantizer.scale).double())
        product = (self.ratios[1] * self.zero_points[1]).float()
        self.register_buffer("rest", self.zero_point - _fused(self.zero_points[0], self.ratios[0], product))

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        codes = (
            _centred_codes(x, scale).add_(zero_point)
            for x, scale, zero_point in zip((first, second), self.scales, self.zero_points, strict=True)
        )
        left, right = codes
        inner = _fused(right, self.ratios[1], self.rest)
        return self.put(_fused(left, self.ratios[0], inner).round_().sub_(self.zero_point))


class _Product(_Pair):
    ratio: Tensor

    def __init__(self, write: _Write, first: ActivationQuantizer, second: ActivationQuantizer) -> None:
        super().__init__(write, first, second)
        self.register_buffer("ratio", first.scale * second.scale / write.quantizer.scale)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        product = _centred_codes(first, self.scales[0]) * _centred_codes(second, self.scales[1])
        return self.put(product.mul_(self.ratio).add_(self.zero_point).round_().sub_(self.zero_point))


class _Mean(End):
    source_scale: Tensor

    def __init__(self, write: _Write, source: ActivationQuantizer, keeps_axes: bool) -> None:
        super().__init__(write)
        self.register_buffer("source_scale", source.scale)
        self._keeps_axes = keeps_axes

    def forward(self, x: Tensor) -> Tensor:
        total = _centred_codes(x, self.source_scale).sum((-2, -1), keepdim=self._keeps_axes)
        multiplier = self.source_scale / (self.scale * (x.shape[-2] * x.shape[-1]))
        return self.put((total * multiplier).round_())


def _fused(factor: Tensor, ratio: Float[Tensor, ""], addend: Tensor) -> Tensor:
    """factor * ratio + addend in float32, rounded once; `ratio` in float64 (a product of float32 numbers is exact there)."""
    return torch.addcmul(addend.double(), factor.double(), ratio).float()


_PAIRS: dict[object, type[_Pair]] = {aten.add.Tensor: _Sum, aten.mul.Tensor: _Product}
