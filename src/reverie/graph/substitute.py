"""A graph executed once, and from many places on again with another value there.

What would the answer be if only this tensor were quantized, or all but this one? Each such question needs the nodes behind
the tensor once more and nothing before it, so all questions of a network cost half as many passes as there are questions; and
what is held is what crosses the place where the execution stands.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, fx

from reverie.graph.operators import attribute

# Of a node and of what the nodes that it reads (and itself) have computed.
Substitute = Callable[[fx.Node, Mapping[fx.Node, Any]], Tensor]


@torch.no_grad()
def answers_with(
    graph: fx.GraphModule,
    inputs: Float[Tensor, "count *shape"],
    substitutes: Sequence[tuple[str, Substitute]],
    step: Callable[[], None] = lambda: None,
) -> tuple[Tensor, list[Tensor]]:
    """The answer of the graph, and for each substitute the one with its value in place of what the node computed.

    Args:
        graph: Captured, of a student or finished; not changed.
        inputs: Computed in one batch.
        substitutes: Names of nodes, each with what gives the other value; a node may come more than once.
        step: Is called after each substitute.
    """
    order = list(graph.graph.nodes)
    at: dict[str, list[int]] = {}
    for number, (name, _) in enumerate(substitutes):
        at.setdefault(name, []).append(number)
    unneeded = _unneeded(order)
    values: dict[fx.Node, Any] = {}
    answers: dict[int, Tensor] = {}
    for place, node in enumerate(order):
        if node.op == "output":
            break
        _execute(graph, node, values, inputs)
        for number in at.get(node.name, ()):
            forked = values | {node: substitutes[number][1](node, values)}
            answers[number] = _finish(graph, order[place:], forked, unneeded)
            step()
        for source in unneeded[node]:
            del values[source]
    return _answer(order[-1], values), [answers[number] for number in range(len(substitutes))]


def _finish(
    graph: fx.GraphModule, nodes: list[fx.Node], values: dict[fx.Node, Any], unneeded: dict[fx.Node, list[fx.Node]]
) -> Tensor:
    """The answer, from the values behind the first of `nodes` on."""
    here, *later = nodes
    for source in unneeded[here]:
        del values[source]
    for node in later[:-1]:
        _execute(graph, node, values)
        for source in unneeded[node]:
            del values[source]
    return _answer(later[-1], values)


def _unneeded(order: list[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """For each node the values that nothing behind it reads."""
    last = {source: node for node in order for source in (node, *node.all_input_nodes)}
    found: dict[fx.Node, list[fx.Node]] = {node: [] for node in order}
    for source, node in last.items():
        found[node].append(source)
    return found


def _execute(graph: fx.GraphModule, node: fx.Node, values: dict[fx.Node, Any], inputs: Tensor | None = None) -> None:
    if node.op == "placeholder":
        values[node] = inputs
    elif node.op == "get_attr":
        values[node] = attribute(graph, node)
    else:
        run: Any = graph.get_submodule(str(node.target)) if node.op == "call_module" else node.target
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        values[node] = run(*args, **kwargs)


def _answer(output: fx.Node, values: dict[fx.Node, Any]) -> Tensor:
    answer = output.args[0]
    assert isinstance(answer, fx.Node)
    found: Tensor = values[answer]
    return found
