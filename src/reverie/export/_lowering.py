"""The student's float graph rewritten so that every emitter finds integers where a runtime wants them.

Two operators stand for all integer storage; in a file they become standard operators of the target:

    through_codes(x)    codes = clamp(Q(x), low, high) in a byte;  value = (codes - zero_point) * scale
    from_codes(codes)   value = codes * scale, one scale per output channel: int8 weights and int32 biases

What else is rewritten, each exactly:

- Every grid becomes one of a byte: codes are shifted together with their zero point, to uint8, or to int8 with zero point 0
  for targets that have no other.
- A clipping activation in front of a quantizer becomes part of it. Rounding is monotone, so `Q(min(x, b)) = min(Q(x),
  Q(b))`, and bounds beyond the ends of the byte vanish. The ends of grids below 8 bits are bounds as well. Targets that
  compute nothing on codes get the bounds back as one clipping of values: `Q(min(x, D(c))) = min(Q(x), c)`.
- A tensor that only moved (pooled by maximum, sliced, padded, reshaped) passes through the codes of its grid a second
  time: its values are on the grid already, and runtimes see that the operator works on integers.
- A mean over height and width becomes the pooling that integer kernels exist for; what flattens it comes after.

Not here: any file format (the emitters), and the `literature` placement, which no integer runtime executes.
"""

import copy
import operator
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from reverie.errors import ExportError
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
from reverie.graph.taps import shapes

_PREFIX = "activation_quantizers."
_SPLITS = frozenset({aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int})
_PADS = frozenset({aten.pad.default, aten.constant_pad_nd.default})


@torch.library.custom_op("reverie::through_codes", mutates_args=())
def through_codes(x: Tensor, scale: Tensor, zero_point: Tensor, low: Tensor | None, high: Tensor | None, name: str) -> Tensor:
    """`x` put on a grid of bytes and taken back; `name` is the tensor's, empty for one that only moved.

    Args:
        zero_point: uint8 or int8, which codes are too.
        low, high: Bounds on the codes, likewise, broadcasting against `x`; None where the ends of the byte do.
    """
    byte = torch.iinfo(zero_point.dtype)
    codes = torch.clamp(torch.round(x / scale) + zero_point, byte.min, byte.max)
    if low is not None:
        codes = torch.maximum(codes, low.to(codes.dtype))
    if high is not None:
        codes = torch.minimum(codes, high.to(codes.dtype))
    return (codes - zero_point) * scale


@torch.library.custom_op("reverie::from_codes", mutates_args=())
def from_codes(codes: Tensor, scale: Tensor) -> Tensor:
    """Stored codes as real values; `scale` has one entry for each entry of the first axis."""
    return codes * scale.view(-1, *[1] * (codes.dim() - 1))


@through_codes.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, low: Tensor | None, high: Tensor | None, name: str) -> Tensor:
    return torch.empty_like(x)


@from_codes.register_fake
def _(codes: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(codes, dtype=scale.dtype)


@dataclass(frozen=True, kw_only=True)
class Form:
    """How a target wants integers.

    Args:
        zero_points: Activations are uint8 with any zero point; else int8 with 0.
        bounded_codes: It computes minimum and maximum of codes; else values are clipped in front of their quantization.
        integer_biases: Biases are int32 on the accumulator's scale; else the same values in float.
    """

    zero_points: bool = True
    bounded_codes: bool = True
    integer_biases: bool = True


def lower(quantized: QuantizedNetwork, shape: tuple[int, ...], form: Form) -> fx.GraphModule:
    """A copy of `quantized.graph` in which all that is stored or passed on as integers goes through the two operators.

    Args:
        shape: Of one input, without the batch.

    Raises:
        ExportError: The placement is `literature`, a weight is not on a symmetric signed grid, or an activation is on a grid
            that needs a zero point which the target does not have.
    """
    if quantized.kind != "integer":
        raise ExportError(
            f"export: the placement must be 'integer', got {quantized.kind!r}; "
            "quantize again with placement 'integer', which is what integer runtimes execute"
        )
    graph = copy.deepcopy(quantized.graph).cpu()
    _drop_whole_slices(graph)
    for node in list(graph.graph.nodes):
        if node.target is SAME:
            # What is left of it are two grids in a row.
            node.replace_all_uses_with(node.all_input_nodes[0])
            graph.graph.erase_node(node)
    pool_means(graph, shape)
    nodes = {node.name: node for node in graph.graph.nodes}
    for layer in quantized.layers.values():
        _store_codes(graph, nodes[layer.name], layer, form)
    for node in list(graph.graph.nodes):
        if node.op == "call_module" and str(node.target).startswith(_PREFIX):
            _absorb_clipping(graph, node, form)
    _repeat_behind_movers(graph)
    graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()
    graph.recompile()
    return graph


def pool_means(graph: fx.GraphModule, shape: tuple[int, ...]) -> None:
    """Means over height and width become average poolings, in place; a flattening comes behind their quantizer."""
    means = [node for node in graph.graph.nodes if node.target is aten.mean.dim]
    if not means:
        return
    with torch.no_grad():
        known = shapes(graph, torch.zeros(2, *shape))
    for node in means:
        named = arguments(node)
        source = named["self"]
        rank = len(known[source.name])
        if rank != 4 or {axis % rank for axis in named["dim"] or ()} != {2, 3} or named["dtype"] is not None:
            continue
        readers = list(node.users)
        with graph.graph.inserting_before(node):
            pooled = graph.graph.call_function(aten.adaptive_avg_pool2d.default, (source, [1, 1]))
        last = pooled
        if len(readers) == 1 and readers[0].op == "call_module":
            last = readers[0]
            last.args = (pooled,)
        if not named["keepdim"]:
            with graph.graph.inserting_after(last):
                flat = graph.graph.call_function(aten.flatten.using_ints, (last, 1))
            _put_behind(last, flat)
            last = flat
        node.replace_all_uses_with(last)
        graph.graph.erase_node(node)
    graph.recompile()


def _put_behind(node: fx.Node, successor: fx.Node) -> None:
    """Makes all who read `node` read `successor` instead, which reads `node`."""
    node.replace_all_uses_with(successor, delete_user_cb=lambda user: user is not successor)


def _drop_whole_slices(graph: fx.GraphModule) -> None:
    for node in list(graph.graph.nodes):
        if node.target is aten.slice.Tensor:
            named = arguments(node)
            if not named["start"] and named["end"] in (None, sys.maxsize) and named["step"] == 1:
                node.replace_all_uses_with(named["self"])
                graph.graph.erase_node(node)


def _constant(graph: fx.GraphModule, name: str, value: Tensor, before: fx.Node) -> fx.Node:
    set_attribute(graph, name, value.detach().cpu().clone())
    with graph.graph.inserting_before(before):
        return graph.graph.get_attr(name)


def _quantizer(graph: fx.GraphModule, target: str) -> ActivationQuantizer:
    quantizer = graph.get_submodule(target)
    assert isinstance(quantizer, ActivationQuantizer)
    return quantizer


def _store_codes(graph: fx.GraphModule, node: fx.Node, layer: QuantizedLayer, form: Form) -> None:
    if not layer.grid.signed or bool(layer.zero_point.any()):
        raise ExportError(
            f"{layer.path}: the weight must be on a symmetric signed grid, got zero points "
            f"{layer.zero_point.min().item()} to {layer.zero_point.max().item()}; use symmetric weight ranges"
        )
    stored = [(1, layer.weight, layer.codes, layer.scale.flatten())]
    if layer.bias_codes is not None and form.integer_biases:
        assert layer.bias is not None and layer.source is not None
        # The float32 product that BiasQuantizer.scale computes: the accumulator's own scale.
        scale = _quantizer(graph, f"{_PREFIX}{layer.source}").scale * layer.scale.cpu().flatten()
        stored.append((2, layer.bias, layer.bias_codes, scale))
    for position, name, codes, scale in stored:
        read = (_constant(graph, f"{name}_codes", codes, node), _constant(graph, f"{name}_scale", scale, node))
        with graph.graph.inserting_before(node):
            node.update_arg(position, graph.graph.call_function(torch.ops.reverie.from_codes.default, read))


def _byte_grid(name: str, quantizer: ActivationQuantizer, form: Form) -> tuple[Tensor, Tensor, int]:
    """The code range of a quantizer in a byte (low and high end, of the byte's type), and its zero point there."""
    zero_point, grid = int(quantizer.zero_point), quantizer.grid
    centre = zero_point + 128 if grid.signed else zero_point
    if not form.zero_points:
        centre = 0
        ends = (grid.quant_min - zero_point, grid.quant_max - zero_point)
        if ends[0] < -128 or ends[1] > 127:
            raise ExportError(
                f"{name}: codes must be within -128 to 127 where there are no zero points, got {ends[0]} to {ends[1]}; quantize "
                "with --set quantization.symmetric=true, or with activations of at most 7 bits (end_bits, stem_bits and sum_bits too)"
            )
    kind = torch.uint8 if form.zero_points else torch.int8
    shift = centre - zero_point
    low, high = (torch.tensor(end + shift, dtype=kind) for end in (grid.quant_min, grid.quant_max))
    return low, high, centre


def _absorb_clipping(graph: fx.GraphModule, call: fx.Node, form: Form) -> None:
    """Replaces a quantizer's call, and the clipping in front of it that nothing else reads, by `through_codes`."""
    name, source, quantizer = str(call.target).removeprefix(_PREFIX), call.args[0], _quantizer(graph, str(call.target))
    assert isinstance(source, fx.Node)
    low, high, centre = _byte_grid(name, quantizer, form)
    byte, scale, zero_point = torch.iinfo(low.dtype), quantizer.scale.cpu(), torch.tensor(centre, dtype=low.dtype)
    ends = int(low), int(high)
    clipped = source.target in CLIPPING and len(source.users) == 1 and all(map(constant, source.all_input_nodes[1:]))
    for bound, below in clipping_bounds(graph, source) if clipped else ():
        code = (torch.round(bound / scale) + centre).clamp(*ends).to(low.dtype)
        low, high = (torch.maximum(low, code), high) if below else (low, torch.minimum(high, code))
    if clipped:
        source = source.all_input_nodes[0]
    bounds = (low if bool((low > byte.min).any()) else None, high if bool((high < byte.max).any()) else None)
    if not form.bounded_codes:
        values = [None if bound is None else (bound.to(scale.dtype) - centre) * scale for bound in bounds]
        source, bounds = _clip(graph, source, f"{name}_grid", values[0], values[1], call), (None, None)
    prefix = f"{name}_grid"
    read: list[Any] = [
        _constant(graph, f"{prefix}.scale", scale, call),
        _constant(graph, f"{prefix}.zero_point", zero_point, call),
        *(
            None if bound is None else _constant(graph, f"{prefix}.{end}", bound, call)
            for end, bound in zip(("low", "high"), bounds, strict=True)
        ),
    ]
    with graph.graph.inserting_before(call):
        through = graph.graph.call_function(torch.ops.reverie.through_codes.default, (source, *read, name))
    call.replace_all_uses_with(through)
    graph.graph.erase_node(call)


def _clip(
    graph: fx.GraphModule, source: fx.Node, prefix: str, low: Tensor | None, high: Tensor | None, before: fx.Node
) -> fx.Node:
    """`source` within bounds on its values, by the operator that runtimes know best."""
    if low is None and high is None:
        return source
    whole = all(bound is None or bound.numel() == 1 for bound in (low, high))
    if whole:
        ends = tuple(None if bound is None else bound.item() for bound in (low, high))
        with graph.graph.inserting_before(before):
            if ends == (0.0, None):
                return graph.graph.call_function(aten.relu.default, (source,))
            return graph.graph.call_function(aten.clamp.default, (source, *ends))
    stored = tuple(
        None if bound is None else _constant(graph, f"{prefix}.{end}", bound, before)
        for end, bound in (("lowest", low), ("highest", high))
    )
    with graph.graph.inserting_before(before):
        return graph.graph.call_function(aten.clamp.Tensor, (source, *stored))


def _repeat_behind_movers(graph: fx.GraphModule) -> None:
    """Sends every tensor that only moved through the codes of the grid it is on."""
    grids: dict[fx.Node, tuple[Any, ...]] = {}
    for node in list(graph.graph.nodes):
        if node.target is torch.ops.reverie.through_codes.default:
            grids[node] = node.args[1:3]
        elif node.op == "call_function" and node.target in PASS_THROUGH:
            source = node.all_input_nodes[0]
            if source not in grids or not _keeps_grid(node):
                continue
            grids[node] = grids[source]
            makes_several = any(user.target is operator.getitem for user in node.users)
            if makes_several or _in_front_of_convolutions(node):
                continue
            with graph.graph.inserting_after(node):
                again = graph.graph.call_function(
                    torch.ops.reverie.through_codes.default, (node, *grids[source], None, None, "")
                )
            _put_behind(node, again)
            grids[again] = grids[source]


def _keeps_grid(node: fx.Node) -> bool:
    """Whether only values of the input, or zeros, come out."""
    if node.target in _PADS:
        return not arguments(node)["value"]
    # The second result of a pooling by maximum is where the maxima were.
    return node.target is not operator.getitem or bool(node.args[1] == 0) or node.all_input_nodes[0].target in _SPLITS


def _in_front_of_convolutions(node: fx.Node) -> bool:
    """Whether it is a padding of zeros that convolutions alone read: emitters fold it into them."""
    if node.target not in _PADS:
        return False
    named = arguments(node)
    return (
        named.get("mode", "constant") == "constant"
        and len(named["pad"]) <= 4
        and min(named["pad"]) >= 0
        and all(user.target in CONVOLUTIONS and arguments(user)["input"] is node for user in node.users)
    )
