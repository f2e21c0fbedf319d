"""Units of reconstruction, found from the dataflow: a layer, a block, or the network.

A *cut* is a tensor that every path from input to output passes: all that comes later depends on what came earlier only
through it. Between neighbouring cuts the graph is a straight chain, or it branches and joins again: a residual block, an
Inception module, a squeeze-and-excite. A **block** is such a single-entry, single-exit region, together with the clipping
activations and shape changes behind it. A **layer** is a convolution or linear layer with the activation that is its
only reader.
"""

import operator
from dataclasses import dataclass
from typing import Literal

from torch import fx

from reverie.graph.operators import CLIPPING, LAYERS, aten, data_nodes, layers

UnitKind = Literal["layer", "block", "network"]

_ACTIVATIONS = CLIPPING | {aten.hardswish.default, aten.silu.default, aten.gelu.default, aten.hardsigmoid.default}


@dataclass(frozen=True)
class Unit:
    """A connected part of a graph, executed as one.

    Args:
        name: Of the tensor it produces.
        nodes: The data nodes it computes, in execution order.
        inputs: Tensors from outside that it reads (constants and the batch size not counted).
        output: The tensor it produces.
        layers: The convolutions and linear layers inside.
    """

    name: str
    nodes: tuple[str, ...]
    inputs: tuple[str, ...]
    output: str
    layers: tuple[str, ...]


def find_units(graph: fx.GraphModule, kind: UnitKind) -> list[Unit]:
    """The units of that kind, in execution order. Every layer is in exactly one."""
    data, known = data_nodes(graph), layers(graph)
    order = [node for node in graph.graph.nodes if node in data]
    if kind == "network":
        regions = [order[1:]] if known else []
    elif kind == "layer":
        regions = [_with_activation(layer) for layer in known]
    else:
        regions = _regions(order, data)
    return [_unit(region, set(known), data) for region in regions]


def _with_activation(layer: fx.Node) -> list[fx.Node]:
    readers = list(layer.users)
    return [layer, *readers] if len(readers) == 1 and readers[0].target in _ACTIVATIONS else [layer]


def _regions(order: list[fx.Node], data: set[fx.Node]) -> list[list[fx.Node]]:
    position = {node: index for index, node in enumerate(order)}
    regions: list[list[fx.Node]] = []
    current: list[fx.Node] = []
    furthest = 0
    for index, node in enumerate(order):
        readers = [position[user] for user in node.users if user in data]
        # `furthest` is the last reader of anything before this node: beyond it, an edge would bypass the node.
        # Nor is a split one: it is several tensors.
        cut = furthest <= index and not any(user.target is operator.getitem for user in node.users)
        furthest = max([furthest, *readers])
        if index == 0:
            continue
        current.append(node)
        if cut:
            regions.append(current)
            current = []
    if current:
        regions.append(current)
    merged: list[list[fx.Node]] = []
    for region in regions:
        # A region without a layer (a pooling, a reshape) belongs to its neighbour.
        if merged and not all(any(node.target in LAYERS for node in near) for near in (region, merged[-1])):
            merged[-1].extend(region)
        else:
            merged.append(list(region))
    return merged


def _unit(nodes: list[fx.Node], known: set[fx.Node], data: set[fx.Node]) -> Unit:
    inside = set(nodes)
    inputs: list[str] = []
    for node in nodes:
        for source in node.all_input_nodes:
            if source in data and source not in inside and source.name not in inputs:
                inputs.append(source.name)
    return Unit(
        name=nodes[-1].name,
        nodes=tuple(node.name for node in nodes),
        inputs=tuple(inputs),
        output=nodes[-1].name,
        layers=tuple(node.name for node in nodes if node in known),
    )
