"""What Reverie knows of ATen operators, in one place: their roles, and how to read their arguments by name."""

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

aten = torch.ops.aten

CONVOLUTIONS = frozenset({aten.conv1d.default, aten.conv2d.default, aten.conv2d.padding, aten.conv1d.padding})
LINEARS = frozenset({aten.linear.default})
LAYERS = CONVOLUTIONS | LINEARS
BATCH_NORM = aten.batch_norm.default

# Activations that an integer runtime absorbs into the range of the tensor behind a layer or an add.
CLIPPING = frozenset({aten.relu.default, aten.hardtanh.default, aten.relu6.default, aten.clamp.default, aten.clamp.Tensor})

# Two-operand arithmetic whose operands must both be on a grid for an integer kernel.
SUMS = frozenset({aten.add.Tensor, aten.sub.Tensor})
ARITHMETIC = SUMS | {aten.mul.Tensor}
CONCATENATIONS = frozenset({aten.cat.default})
AVERAGES = frozenset(
    {aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool1d.default, aten.avg_pool2d.default, aten.mean.dim}
)

# Operators that move or pick values and so keep them on the grid they are on (0.0, a padding's value, is on every grid).
PASS_THROUGH = frozenset(
    {
        aten.max_pool2d.default,
        aten.adaptive_max_pool2d.default,
        aten.reshape.default,
        aten.view.default,
        aten.flatten.using_ints,
        aten.permute.default,
        aten.transpose.int,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.unsqueeze.default,
        aten.slice.Tensor,
        aten.select.int,
        aten.clone.default,
        aten.contiguous.default,
        aten.constant_pad_nd.default,
        aten.pad.default,
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.chunk.default,
        aten.unbind.int,
        aten.expand.default,
        aten.roll.default,
        aten.upsample_nearest2d.vec,
        operator.getitem,
    }
)


# Stands for a tensor on its way to a second grid; it computes nothing, and is the origin of what moves it.
SAME = aten.alias.default


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an ATen call by the names of its schema, defaults filled in."""
    assert isinstance(node.target, torch._ops.OpOverload)
    found: dict[str, Any] = {}
    for position, argument in enumerate(node.target._schema.arguments):
        if position < len(node.args) and not argument.kwarg_only:
            found[argument.name] = node.args[position]
        else:
            found[argument.name] = node.kwargs.get(argument.name, argument.default_value)
    return found


def attribute(graph: fx.GraphModule, node: fx.Node | None) -> Tensor | None:
    """The parameter or buffer that a `get_attr` node stands for; None for None (a layer without bias)."""
    if node is None:
        return None
    assert node.op == "get_attr" and isinstance(node.target, str)
    found: Any = graph
    for part in node.target.split("."):
        found = getattr(found, part)
    assert isinstance(found, Tensor)
    return found


def set_attribute(root: nn.Module, target: str, value: Tensor) -> None:
    """Stores `value` as the buffer `target` (dotted) below `root`; makes the modules on the way."""
    *path, leaf = target.split(".")
    owner = root
    for part in path:
        if not hasattr(owner, part):
            owner.add_module(part, nn.Module())
        owner = getattr(owner, part)
    owner.register_buffer(leaf, value)


def constant(node: object) -> bool:
    """Whether an argument is a weight or buffer of the graph."""
    return isinstance(node, fx.Node) and node.op == "get_attr"


def data_nodes(graph: fx.GraphModule) -> set[fx.Node]:
    """The nodes whose value depends on the pixels of the input, and not only on its shape."""
    shape_only = {aten.sym_size.int, aten.new_zeros.default, aten.zeros_like.default, aten.new_ones.default}
    found: set[fx.Node] = set()
    for node in graph.graph.nodes:
        if node.op == "placeholder" or (
            node.op in ("call_function", "call_module")
            and node.target not in shape_only
            and any(source in found for source in node.all_input_nodes)
        ):
            found.add(node)
    return found


def combines_computed(node: fx.Node, data: set[fx.Node]) -> bool:
    """Whether every operand of an add, product or concatenation is computed: no stored tensor among them, no number."""
    if node.target in ARITHMETIC:
        named = arguments(node)
        return named["self"] in data and named["other"] in data
    return node.target in CONCATENATIONS and all(operand in data for operand in node.all_input_nodes)


def layers(graph: fx.GraphModule) -> list[fx.Node]:
    """Convolutions and linear layers with a stored weight, in execution order."""
    return [
        node
        for node in graph.graph.nodes
        if node.op == "call_function" and node.target in LAYERS and constant(arguments(node)["weight"])
    ]


def clipping_bounds(graph: fx.GraphModule, clipping: fx.Node) -> list[tuple[Tensor, bool]]:
    """The bounds of a clipping activation, each with whether it bounds from below."""
    if clipping.target is aten.relu.default:
        return [(torch.tensor(0.0), True)]
    if clipping.target is aten.relu6.default:
        return [(torch.tensor(0.0), True), (torch.tensor(6.0), False)]
    named = arguments(clipping)
    keys = ("min_val", "max_val") if clipping.target is aten.hardtanh.default else ("min", "max")
    found = []
    for key, below in zip(keys, (True, False), strict=True):
        value = named[key]
        if isinstance(value, fx.Node):
            value = attribute(graph, value)
        if value is not None:
            found.append((torch.as_tensor(value, dtype=torch.float32), below))
    return found
