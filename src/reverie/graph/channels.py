"""Which axes of a tensor are its channels.

Convolutions write channels behind the images, linear layers last, and what follows moves them: ConvNeXt permutes around its linear
layers, windowed attention splits images into rows and channels into heads. So the axes are followed from the layer that made them
through every change of shape. Several axes are channels where a reshape split them (heads), and what was flattened together with
channels is channels, as it is for the layer that reads it.

Not here: products of two computed tensors that mix channels (explicit attention by matmul); they keep the axes of their first operand.
"""

import math
import operator
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

from reverie.graph.operators import BATCH_NORM, CONVOLUTIONS, LINEARS, arguments, aten, data_nodes
from reverie.graph.taps import shapes

_RESHAPES = frozenset(
    {
        aten.reshape.default,
        aten.view.default,
        aten._unsafe_view.default,
        aten.flatten.using_ints,
        aten.unflatten.int,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.unsqueeze.default,
    }
)
# What takes axes away, by the name of the argument that says which.
_REMOVALS = {aten.select.int: "dim", aten.unbind.int: "dim", aten.mean.dim: "dim", aten.sum.dim_IntList: "dim"}


@torch.no_grad()
def channel_axes(graph: fx.GraphModule, example: Tensor) -> dict[str, tuple[int, ...]]:
    """The axes of every computed tensor of the graph that are channels, counted from 0; none where they were averaged away.

    Args:
        example: One image; only its shape counts.
    """
    sizes, data = shapes(graph, example), data_nodes(graph)
    found: dict[str, tuple[int, ...]] = {}
    for node in graph.graph.nodes:
        if node in data:
            found[node.name] = _axes(node, found, sizes)
    return found


def _axes(node: fx.Node, known: Mapping[str, tuple[int, ...]], sizes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    if node.op == "placeholder" or node.target in CONVOLUTIONS | {BATCH_NORM}:
        return (1,)
    if node.target in LINEARS:
        return (len(sizes[node.name]) - 1,)
    sources = [source for source in node.all_input_nodes if source.name in known]
    # A stored tensor may stand before the computed one, and a computed one may be spread over another.
    ranks = [len(sizes[source.name]) if source.name in sizes else None for source in sources]
    rank = len(sizes[node.name]) if node.name in sizes else None
    place = ranks.index(rank) if rank in ranks else 0
    source = sources[place]
    axes, before = known[source.name], sizes.get(source.name, ())
    if node.target is operator.getitem:
        return axes
    if node.target in _RESHAPES:
        return reshaped(axes, before, sizes[node.name])
    if node.target is aten.permute.default:
        order = [dim % len(before) for dim in arguments(node)["dims"]]
        return tuple(sorted(order.index(axis) for axis in axes))
    if node.target is aten.transpose.int:
        first, second = (arguments(node)[key] % len(before) for key in ("dim0", "dim1"))
        swapped = {first: second, second: first}
        return tuple(sorted(swapped.get(axis, axis) for axis in axes))
    if node.target in _REMOVALS:
        named = arguments(node)
        dims = named[_REMOVALS[node.target]]
        gone = {dim % len(before) for dim in (dims if isinstance(dims, Sequence) else [dims])}
        if named.get("keepdim"):
            return axes
        return tuple(axis - sum(dim < axis for dim in gone) for axis in axes if axis not in gone)
    if rank is None or not before:
        return axes
    return tuple(axis + rank - len(before) for axis in axes)


def reshaped(axes: Sequence[int], before: Sequence[int], after: Sequence[int]) -> tuple[int, ...]:
    """Where channels are after a reshape: the axes that the values of each of theirs went to.

    Args:
        axes: Before.
        before, after: The shapes, of as many values.
    """
    found: list[int] = []
    old = new = 0
    while old < len(before) and new < len(after):
        # The fewest axes on either side that hold as many values.
        first, start = old, new
        old, new = old + 1, new + 1
        while math.prod(before[first:old]) != math.prod(after[start:new]):
            if math.prod(before[first:old]) < math.prod(after[start:new]):
                old += 1
            else:
                new += 1
        if any(first <= axis < old for axis in axes):
            # An axis of one value beside others is no channel, unless there is no other.
            wide = [axis for axis in range(start, new) if after[axis] > 1]
            found += wide or [start]
    return tuple(found)
