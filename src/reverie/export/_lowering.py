"""The student's float graph rewritten so that every emitter finds integers where a runtime wants them.

Two operators stand for all integer storage; in a file they become standard operators of the target:

    through_codes(x)    codes = clamp(Q(x), low, high) in uint8;  value = (codes - zero_point) * scale
    from_codes(codes)   value = codes * scale, one scale per output channel: int8 weights and int32 biases

What else is rewritten, each exactly:

- A clipping activation in front of a quantizer becomes part of it. Rounding is monotone, so `Q(min(x, b)) = min(Q(x),
  Q(b))`, and bounds beyond the ends of the grid vanish. The ends of grids below 8 bits are bounds as well.
- A tensor that only moved (pooled by maximum, sliced, padded, reshaped) passes through the codes of its grid a second
  time: its values are on the grid already, and runtimes see that the operator works on integers.
- A mean over height and width becomes the pooling that integer kernels exist for; what flattens it comes after.

Not here: any file format (the emitters), and the `literature` placement, which no integer runtime executes.
"""

import copy
import operator
import sys
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
from reverie.grid import quantize

_PREFIX = "activation_quantizers."
_SPLITS = frozenset({aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int})
_PADS = frozenset({aten.pad.default, aten.constant_pad_nd.default})


@torch.library.custom_op("reverie::through_codes", mutates_args=())
def through_codes(x: Tensor, scale: Tensor, zero_point: Tensor, low: Tensor | None, high: Tensor | None, name: str) -> Tensor:
    """`x` put on a uint8 grid and taken back; `name` is the tensor's, empty for one that only moved.

    Args:
        low, high: Bounds on the codes, uint8, broadcasting against `x`; None where the grid's own ends do.
    """
    codes = torch.clamp(torch.round(x / scale) + zero_point, 0, 255)
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


def lower(quantized: QuantizedNetwork, shape: tuple[int, ...]) -> fx.GraphModule:
    """A copy of `quantized.graph` in which all that is stored or passed on as integers goes through the two operators.

    Args:
        shape: Of one input, without the batch.

    Raises:
        ExportError: The placement is `literature`, or a weight is not on a symmetric signed grid.
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
        _store_codes(graph, nodes[layer.name], layer)
    for node in list(graph.graph.nodes):
        if node.op == "call_module" and str(node.target).startswith(_PREFIX):
            _absorb_clipping(graph, node)
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


def _store_codes(graph: fx.GraphModule, node: fx.Node, layer: QuantizedLayer) -> None:
    if not layer.grid.signed or bool(layer.zero_point.any()):
        raise ExportError(
            f"{layer.path}: the weight must be on a symmetric signed grid, got zero points "
            f"{layer.zero_point.min().item()} to {layer.zero_point.max().item()}; use symmetric weight ranges"
        )
    stored = [(1, layer.weight, layer.codes, layer.scale.flatten())]
    if layer.bias_codes is not None:
        assert layer.bias is not None and layer.source is not None
        # The float32 product that BiasQuantizer.scale computes: the accumulator's own scale.
        scale = _quantizer(graph, f"{_PREFIX}{layer.source}").scale * layer.scale.cpu().flatten()
        stored.append((2, layer.bias, layer.bias_codes, scale))
    for position, name, codes, scale in stored:
        read = (_constant(graph, f"{name}_codes", codes, node), _constant(graph, f"{name}_scale", scale, node))
        with graph.graph.inserting_before(node):
            node.update_arg(position, graph.graph.call_function(torch.ops.reverie.from_codes.default, read))


def _absorb_clipping(graph: fx.GraphModule, call: fx.Node) -> None:
    """Replaces a quantizer's call, and the clipping in front of it that nothing else reads, by `through_codes`."""
    name, source, quantizer = str(call.target).removeprefix(_PREFIX), call.args[0], _quantizer(graph, str(call.target))
    assert isinstance(source, fx.Node) and not quantizer.grid.signed
    scale, zero_point = quantizer.scale, quantizer.zero_point
    low = torch.tensor(quantizer.grid.quant_min, dtype=torch.uint8)
    high = torch.tensor(quantizer.grid.quant_max, dtype=torch.uint8)
    clipped = source.target in CLIPPING and len(source.users) == 1 and all(map(constant, source.all_input_nodes[1:]))
    for bound, below in clipping_bounds(graph, source) if clipped else ():
        code = quantize(bound, scale, zero_point, quantizer.grid).to(torch.uint8)
        low, high = (torch.maximum(low, code), high) if below else (low, torch.minimum(high, code))
    if clipped:
        source = source.all_input_nodes[0]
    prefix = f"{name}_grid"
    read: list[Any] = [
        _constant(graph, f"{prefix}.scale", scale, call),
        _constant(graph, f"{prefix}.zero_point", zero_point.to(torch.uint8), call),
        _constant(graph, f"{prefix}.low", low, call) if bool((low > 0).any()) else None,
        _constant(graph, f"{prefix}.high", high, call) if bool((high < 255).any()) else None,
    ]
    with graph.graph.inserting_before(call):
        through = graph.graph.call_function(torch.ops.reverie.through_codes.default, (source, *read, name))
    call.replace_all_uses_with(through)
    graph.graph.erase_node(call)


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
