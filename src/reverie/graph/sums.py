"""What sums read gets a grid of its own, so that multipliers may read the same tensor in fewer bits.

The stream of a residual network is read twice: by the next block's first layer, which multiplies it, and by the sum behind that block,
which does not. Few bits are asked for because of multipliers; on the stream they would add an error at every block, and none of
them ever leaves it. So what layers read becomes a node of its own, the same values on their way to a second, coarser grid:

    sum -> relu ---------------------> add         sum -> relu [8 bits] ------------------------> add
             `----> conv ----> ... -----^                    `---> same [4 bits] -> conv -> ... ---^

The papers do the same with more: LSQ (Esser et al. 2020, section 2) and PACT quantize what layers read and leave the sums in float.

Not here: how many bits each has (`placement.py`), and what a file makes of it (two grids in a row, `export/_lowering.py`).
"""

import copy
from collections.abc import Callable

from torch import fx

from reverie.graph.operators import AVERAGES, CONCATENATIONS, LAYERS, PASS_THROUGH, SAME, SUMS, aten, constant, data_nodes


def separate_sums(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy of `graph` in which what is multiplied, or joined with others, is no tensor that is summed too.

    Names stay; the new nodes are called `NAME_for_layers`.
    """
    separated = copy.deepcopy(graph)
    data = data_nodes(separated)
    for node in [node for node in separated.graph.nodes if node in data and node.op != "placeholder"]:
        others = [user for user in node.users if _is_multiplied(user)]
        if not others or not _leads_to(node, _is_sum):
            continue
        with separated.graph.inserting_after(node):
            same = separated.graph.call_function(SAME, (node,))
        # Named after the tensor, as that is what users know.
        same.name = f"{node.name}_for_layers"
        for user in others:
            user.replace_input_with(node, same)
    separated.recompile()
    return separated


def is_only_summed(node: fx.Node) -> bool:
    """Whether it is summed or averaged, as it is or moved, and neither multiplied nor joined."""
    summed = _leads_to(node, lambda user: _is_sum(user) or user.target in AVERAGES)
    return summed and not _leads_to(node, _multiplies)


def _leads_to(node: fx.Node, wanted: Callable[[fx.Node], bool]) -> bool:
    """Whether what reads the tensor, as it is or moved, is wanted."""
    return any(wanted(user) or (_moves(user) and _leads_to(user, wanted)) for user in node.users)


def _is_multiplied(reader: fx.Node) -> bool:
    """Whether `reader`, or what reads it where it only moves, multiplies or joins, and none of that is a sum."""
    if _moves(reader):
        return not _leads_to(reader, _is_sum) and _leads_to(reader, _multiplies)
    return _multiplies(reader)


def _multiplies(node: fx.Node) -> bool:
    return node.target in LAYERS | CONCATENATIONS or node.target is aten.mul.Tensor


def _is_sum(node: fx.Node) -> bool:
    # Adding a number or a stored tensor is another thing.
    return node.target in SUMS and len(node.all_input_nodes) == 2 and not any(map(constant, node.all_input_nodes))


def _moves(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in PASS_THROUGH
