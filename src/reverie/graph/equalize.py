"""Cross-layer equalization: channels of neighbouring layers rescaled until their ranges agree.

For two layers with weights W1 (output channel i) and W2 (input channel i), nothing else reading what is between them,

    W1_i / s_i,  b1_i / s_i,  W2_:i * s_i        with  s_i = sqrt(r1_i r2_i) / r2_i        (eq. 11)

leaves the network's function as it was and gives both ranges the value sqrt(r1_i r2_i). Pairs are visited in execution
order, again and again, until a whole sweep changes nothing any more.

Reference: Nagel et al. 2019, arXiv:1906.04721, section 4.1.

    paper    here             meaning
    r1, r2   rows, columns    largest magnitude of the weights of an output, of an input channel
    s        step             of one visit; `totals` holds the product of all visits

What may stand between the layers is what commutes with a positive factor per channel: ReLU and leaky ReLU; maximum and
average pooling; spatial padding with zeros, by reflection or by repetition; the flattening of a spatial size of 1; and
clipping, whose bounds are divided by s. ReLU6 becomes `aten.clamp.Tensor` with the upper bound 6 / s_i, which is exact,
where the paper replaces ReLU6 by ReLU. Hard-swish, SiLU, GELU, products and sums end a chain.

Either layer may have groups, and a depthwise convolution takes part on both sides. A channel whose weights are all zero
on either side keeps its scale. Not here: layers that share a weight or bias (they stay as they are), and the paper's bias
absorption.
"""

import copy
import math
from collections import Counter
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, fx

from reverie.graph.operators import (
    CLIPPING,
    LAYERS,
    LINEARS,
    arguments,
    aten,
    attribute,
    constant,
    data_nodes,
    layers,
    set_attribute,
)

_HOMOGENEOUS = frozenset({aten.relu.default, aten.leaky_relu.default})
_POOLS = frozenset({aten.max_pool2d.default, aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default})
_PADS = frozenset({aten.constant_pad_nd.default, aten.pad.default})


@dataclass(frozen=True)
class Pair:
    """Two layers whose common channels can be rescaled.

    Args:
        first, second: The layers' nodes.
        between: The nodes from one to the other, in execution order; may be empty.
    """

    first: str
    between: tuple[str, ...]
    second: str


def find_pairs(graph: fx.GraphModule) -> list[Pair]:
    """All pairs of layers that `equalize` rescales, in execution order."""
    uses: Counter[object] = Counter()
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            uses[node.target] += len(node.users)
    data, pairs = data_nodes(graph), []
    own = {layer for layer in layers(graph) if all(uses[node.target] == 1 for node in layer.all_input_nodes if constant(node))}
    for first in layers(graph):
        path = _path_to_layer(graph, first, data)
        if path and {first, path[-1]} <= own:
            pairs.append(Pair(first.name, tuple(node.name for node in path[:-1]), path[-1].name))
    return pairs


def equalize(graph: fx.GraphModule, *, sweeps: int = 100, tolerance: float = 1e-3, limit: float = math.inf) -> fx.GraphModule:
    """A copy of the graph (batch norms folded) with equalized layers; same outputs up to rounding of float arithmetic.

    Args:
        sweeps: At most so many visits to every pair.
        tolerance: Ends when a sweep changed no scale by more than this, relatively.
        limit: Bounds every channel's total factor to `1 / limit` .. `limit`. A channel whose weights have all but vanished
            would otherwise grow a bias, and with it an activation, by the inverse of what is left of them.
    """
    equalized = copy.deepcopy(graph)
    pairs = find_pairs(equalized)
    nodes = {node.name: node for node in equalized.graph.nodes}
    # Ranges need the largest magnitude of every (output, input) position only; the weights are rescaled once, at the end.
    magnitudes = {name: _magnitudes(equalized, nodes[name]) for pair in pairs for name in (pair.first, pair.second)}
    totals = {pair.first: torch.ones_like(magnitudes[pair.first][:, :, 0], dtype=torch.float64).flatten() for pair in pairs}
    for _ in range(sweeps):
        change = 0.0
        for pair in pairs:
            first, second, total = magnitudes[pair.first], magnitudes[pair.second], totals[pair.first]
            step = _step(first.amax(2).flatten(), second.amax(1).flatten())
            step = (total * step).clamp(1 / limit, limit) / total
            total.mul_(step)
            first.div_(step.view(*first.shape[:2], 1))
            second.mul_(step.view(second.shape[0], 1, second.shape[2]))
            change = max(change, float(step.log().abs().max()))
        if change < tolerance:
            break
    for pair in pairs:
        _rescale_(equalized, nodes[pair.first], [nodes[name] for name in pair.between], nodes[pair.second], totals[pair.first])
    equalized.recompile()
    return equalized


def _path_to_layer(graph: fx.GraphModule, first: fx.Node, data: set[fx.Node]) -> list[fx.Node]:
    """The nodes behind `first` up to the next layer, which is the last; empty where channels cannot be rescaled."""
    weight = attribute(graph, arguments(first)["weight"])
    assert weight is not None
    path = [first]
    # Channels are on the last axis (of a linear layer), or on axis 1 with spatial axes behind; maybe all of size 1.
    last, one_position = first.target in LINEARS, False
    while True:
        readers = [user for user in path[-1].users if user in data or user.op == "output"]
        if len(readers) != 1 or not isinstance(readers[0].target, torch._ops.OpOverload):
            return []
        reader, node = readers[0], path[-1]
        path.append(reader)
        if reader.target in LAYERS:
            return path[1:] if last == (reader.target in LINEARS) and arguments(reader)["input"] is node else []
        if reader.target in CLIPPING | _HOMOGENEOUS:
            if not all(source is node or constant(source) for source in reader.all_input_nodes):
                return []
        elif last or not _keeps_channels(reader, weight.shape[0], weight.dim(), one_position):
            return []
        elif reader.target in _POOLS:
            one_position = set(arguments(reader).get("output_size", ())) == {1}
        else:
            one_position, last = reader.target is aten.mean.dim, _drops_space(reader)


def _keeps_channels(node: fx.Node, channels: int, rank: int, one_position: bool) -> bool:
    """Whether a pooling, padding or flattening computes every channel from that channel alone, linearly in its scale."""
    named = arguments(node)
    if node.target is aten.mean.dim:
        return {axis % rank for axis in named["dim"]} == set(range(2, rank))
    if node.target in _PADS:
        zeros = named.get("mode", "constant") != "constant" or named["value"] in (None, 0)
        return zeros and len(named["pad"]) <= 2 * (rank - 2)
    if node.target is aten.reshape.default:
        return one_position and list(named["shape"][1:]) == [channels]
    return node.target in _POOLS


def _drops_space(node: fx.Node) -> bool:
    """Whether only the channels are left behind this node."""
    return node.target is aten.reshape.default or (node.target is aten.mean.dim and not arguments(node)["keepdim"])


def _magnitudes(graph: fx.GraphModule, layer: fx.Node) -> Float[Tensor, "groups out in"]:
    weight = attribute(graph, arguments(layer)["weight"])
    assert weight is not None
    return _grouped(weight, layer).abs().amax(3)


def _grouped(weight: Tensor, layer: fx.Node) -> Float[Tensor, "groups out in positions"]:
    groups = arguments(layer).get("groups", 1)
    return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)


def _step(rows: Float[Tensor, " channels"], columns: Float[Tensor, " channels"]) -> Float[Tensor, " channels"]:
    step = torch.sqrt(rows.double() * columns) / columns
    return torch.where((rows > 0) & (columns > 0), step, 1.0)


def _rescale_(graph: fx.GraphModule, first: fx.Node, between: list[fx.Node], second: fx.Node, total: Tensor) -> None:
    """Divides what leaves `first` by `total`, per channel, and lets `second` multiply it back."""
    outer, bias = (attribute(graph, arguments(first)[key]) for key in ("weight", "bias"))
    inner = attribute(graph, arguments(second)["weight"])
    assert outer is not None and inner is not None
    grouped = _grouped(inner.double(), second)
    multiplied = (grouped * total.view(grouped.shape[0], 1, grouped.shape[2], 1)).view_as(inner)
    _store(graph, arguments(second)["weight"], multiplied.to(inner.dtype))
    _store(graph, arguments(first)["weight"], (outer / total.view(-1, *[1] * (outer.dim() - 1))).to(outer.dtype))
    if bias is not None:
        _store(graph, arguments(first)["bias"], (bias / total).to(bias.dtype))
    column = total if first.target in LINEARS else total.view(1, -1, *[1] * (outer.dim() - 2))
    for node in between:
        if _drops_space(node):
            column = total
        if node.target in CLIPPING - _HOMOGENEOUS:
            _clip_per_channel_(graph, node, column)


def _store(graph: fx.GraphModule, node: fx.Node, value: Tensor) -> None:
    set_attribute(graph, str(node.target), value)


def _clip_per_channel_(graph: fx.GraphModule, clip: fx.Node, total: Tensor) -> None:
    """Divides the bounds of a clipping activation by `total`; it keeps its name."""
    args: list[fx.Node | None] = [arguments(clip)["self"]]
    for side, bound in zip(("lower", "upper"), _bounds(clip), strict=True):
        if bound is None:
            args.append(None)
            continue
        value = attribute(graph, bound) if isinstance(bound, fx.Node) else total.new_tensor(bound)
        assert value is not None
        name = f"{clip.name}_{side}"
        set_attribute(graph, name, (value / total).float())
        with graph.graph.inserting_before(clip):
            args.append(graph.graph.get_attr(name))
    clip.target, clip.args, clip.kwargs = aten.clamp.Tensor, tuple(args), {}


def _bounds(clip: fx.Node) -> tuple[fx.Node | float | None, fx.Node | float | None]:
    """Where a clipping activation cuts, below and above."""
    named = arguments(clip)
    if clip.target is aten.relu6.default:
        return 0.0, 6.0
    if clip.target is aten.hardtanh.default:
        return named["min_val"], named["max_val"]
    return named["min"], named["max"]
