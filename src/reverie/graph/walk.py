"""A graph executed node by node over a whole set of images, in batches, holding only the tensors still needed.

Reconstruction goes through a network unit by unit, and each unit's inputs depend on what happened to the ones before. A
`Walk` computes every tensor once, stops where it is told, and goes on with the weights as they are by then.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from reverie.graph.operators import attribute


class Walk:
    """The state of an execution: which node is next, and the values that later nodes (or the caller) still need.

    Args:
        graph: A captured or student graph.
        inputs: All images; results are kept for all of them.
        batch: Images at a time.
        keep: Tensors that the caller will read with `value`; they are held until `release`.
    """

    def __init__(self, graph: fx.GraphModule, inputs: Tensor, *, batch: int, keep: Iterable[str] = ()) -> None:
        self._graph = graph
        self._order = list(graph.graph.nodes)
        self._next = 0
        self._kept = set(keep)
        self._last_use: dict[str, int] = {}
        for index, node in enumerate(self._order):
            for source in node.all_input_nodes:
                self._last_use[source.name] = index
        self._chunks: dict[str, list[Any]] = {}
        self._joined: dict[str, Tensor] = {}
        self._constants: dict[str, Any] = {}
        self._images = inputs
        self._inputs = list(torch.split(inputs, batch))

    @torch.no_grad()
    def to(self, tensor: str) -> None:
        """Executes up to and including the node that computes `tensor`."""
        names = {node.name: index for index, node in enumerate(self._order)}
        # A quantizer call behind the tensor is not included: `value` answers what the operator computed.
        stop = names[tensor]
        while self._next <= stop:
            self._step(self._order[self._next])
            self._next += 1
            for name in [name for name, last in self._last_use.items() if last < self._next and name not in self._kept]:
                self._chunks.pop(name, None)
                self._joined.pop(name, None)
                self._constants.pop(name, None)

    def value(self, tensor: str) -> Tensor:
        """The tensor for all images, in one piece."""
        if tensor not in self._joined:
            chunks = self._chunks[tensor]
            whole = torch.cat(chunks) if len(chunks) > 1 else chunks[0]
            assert isinstance(whole, Tensor)
            # Later nodes read views of the joined tensor. Their sizes are not always the batch's: windowed attention
            # has more rows than images.
            self._chunks[tensor] = list(torch.split(whole, [chunk.shape[0] for chunk in chunks]))
            self._joined[tensor] = whole
        return self._joined[tensor]

    def release(self, tensor: str) -> None:
        """The caller no longer needs the tensor."""
        self._kept.discard(tensor)

    def _step(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self._chunks[node.name], self._joined[node.name] = self._inputs, self._images
        elif node.op == "get_attr":
            self._constants[node.name] = attribute(self._graph, node)
        elif node.op in ("call_function", "call_module"):
            run: Any = self._graph.get_submodule(str(node.target)) if node.op == "call_module" else node.target
            sources = [source.name for source in node.all_input_nodes if source.name in self._chunks]
            if not sources:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: self._constants[n.name])
                self._constants[node.name] = run(*args, **kwargs)
                return
            results = []
            for index in range(len(self._inputs)):

                def look_up(source: fx.Node, index: int = index) -> Any:
                    if source.name in self._chunks:
                        return self._chunks[source.name][index]
                    return self._constants[source.name]

                args, kwargs = fx.node.map_arg((node.args, node.kwargs), look_up)
                results.append(run(*args, **kwargs))
            self._chunks[node.name] = results
