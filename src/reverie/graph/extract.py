"""A unit of a graph as a module of its own: what reconstruction runs thousands of times."""

from torch import fx

from reverie.graph.operators import aten, data_nodes
from reverie.graph.units import Unit


def extract(graph: fx.GraphModule, unit: Unit, *, with_entry: bool = False) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """The unit, sharing weights and quantizers with `graph`, and the tensors that its inputs are, in order.

    In a student, the quantizers of tensors inside the unit come along; an input is then the tensor behind its quantizer,
    and the unit's output the tensor before its own.

    Args:
        with_entry: Whether the quantizers of its inputs belong to the unit too; an input is then the tensor before it.
    """
    data = data_nodes(graph)
    by_name = {node.name: node for node in graph.graph.nodes}
    inside = set(unit.nodes)
    extracted = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    inputs: list[fx.Node] = []

    def belongs(node: fx.Node) -> bool:
        if node.op == "call_module":
            source = node.all_input_nodes[0]
            return with_entry or belongs(source) if source in data else True
        return node not in data or node.name in inside

    needed: set[fx.Node] = set()
    frontier = [by_name[unit.output]]
    while frontier:
        node = frontier.pop()
        if node in needed:
            continue
        needed.add(node)
        if node.target is aten.sym_size.int:
            continue
        if belongs(node):
            frontier.extend(node.all_input_nodes)
        elif node not in inputs:
            inputs.append(node)
    order = [node for node in graph.graph.nodes if node in needed]
    inputs.sort(key=order.index)
    for node in inputs:
        mapping[node] = extracted.placeholder(node.name)
    for node in order:
        if node in mapping:
            continue
        if node.target is aten.sym_size.int:
            # The batch size, wherever the whole graph read it from.
            mapping[node] = extracted.call_function(aten.sym_size.int, (mapping[inputs[0]], 0))
        else:
            mapping[node] = extracted.node_copy(node, lambda source: mapping[source])
    extracted.output(mapping[by_name[unit.output]])
    return fx.GraphModule(graph, extracted, class_name="Extracted"), tuple(node.name for node in inputs)
