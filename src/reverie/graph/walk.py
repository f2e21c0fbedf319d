"""A graph executed over a whole set of images, in batches, holding only the tensors still needed.

Reconstruction goes through a network unit by unit, and each unit's inputs depend on what happened to the ones before. A
`Walk` computes every tensor once, stops where it is told, and goes on with the weights as they are by then. It holds what
crosses the place where it stands, not what lies between two such places.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, fx

from reverie.graph.cache import Cache, CacheFull
from reverie.graph.operators import attribute
from reverie.graph.taps import tap


class Walk:
    """The state of an execution: which node is next, and the values that later nodes (or the caller) still need.

    Args:
        graph: A captured or student graph.
        inputs: All images; results are kept for all of them.
        batch: Images at a time.
        keep: Tensors that the caller will read; they are held until `release`.
        cache: Where they are held; None means memory without a limit. Once it is full nothing is held any more, and `rows`
            computes anew what it is asked for.
    """

    def __init__(
        self, graph: fx.GraphModule, inputs: Tensor, *, batch: int, keep: Iterable[str] = (), cache: Cache | None = None
    ) -> None:
        self._graph = graph
        self._order = list(graph.graph.nodes)
        self._position = {node.name: index for index, node in enumerate(self._order)}
        self._next = 0
        self._kept = set(keep)
        self._last_use: dict[str, int] = {}
        for index, node in enumerate(self._order):
            for source in node.all_input_nodes:
                self._last_use[source.name] = index
        self._cache = Cache() if cache is None else cache
        self._full = False
        # By name, a value for each batch of images; where these are tensors with so many rows for each image, they are views of
        # the whole.
        self._parts: dict[str, list[Any]] = {}
        self._whole: dict[str, Tensor] = {}
        self._constants: dict[str, Any] = {}
        self._probes: dict[tuple[str, ...], tuple[fx.GraphModule, int]] = {}
        self._images = inputs
        self._batches = list(torch.split(inputs, batch))

    @torch.no_grad()
    def to(self, tensor: str) -> None:
        """Executes up to and including the node that computes `tensor`."""
        # A quantizer call behind the tensor is not included: what is held is what the operator computed.
        stop = self._position[tensor] + 1
        if stop <= self._next or self._full:
            return
        nodes, self._next = self._order[self._next : stop], stop
        try:
            for number in range(len(self._batches)):
                self._advance(nodes, number)
        except CacheFull:
            self._full = True
            self._kept.clear()
        for name in [*self._parts, *self._constants]:
            self._forget_if_done(name)

    def value(self, tensor: str) -> Tensor:
        """The tensor for all images, in one piece."""
        if tensor not in self._whole:
            parts = self._parts[tensor]
            whole = torch.cat(parts) if len(parts) > 1 else parts[0]
            assert isinstance(whole, Tensor)
            # Later nodes read views of the joined tensor.
            self._parts[tensor] = list(torch.split(whole, [part.shape[0] for part in parts]))
            self._whole[tensor] = whole
        return self._whole[tensor]

    @torch.no_grad()
    def rows(self, tensors: Sequence[str], picked: Int[Tensor, " rows"]) -> list[Tensor]:
        """These rows of the tensors, all of which have as many rows for an image, on the device of the images."""
        if not self._full:
            return [_picked(self.value(name), picked).to(self._images.device) for name in tensors]
        probe, rows = self._probe(tuple(tensors))
        found = probe(_picked(self._images, picked.div(rows, rounding_mode="floor")))
        own = torch.arange(len(picked), device=picked.device) * rows + picked % rows
        return [_picked(found[name], own) for name in tensors]

    def count(self, tensor: str) -> int:
        """How many rows the tensor has for all images."""
        return len(self._images) * self._probe((tensor,))[1] if self._full else len(self.value(tensor))

    def _probe(self, tensors: tuple[str, ...]) -> tuple[fx.GraphModule, int]:
        """What computes the tensors from images, and how many rows they have for each."""
        if tensors not in self._probes:
            probe = tap(self._graph, tensors)
            self._probes = {tensors: (probe, len(probe(self._images[:1])[tensors[0]]))}
        return self._probes[tensors]

    def release(self, tensor: str) -> None:
        """The caller no longer needs the tensor."""
        self._kept.discard(tensor)
        self._forget_if_done(tensor)

    def _forget_if_done(self, name: str) -> None:
        if name in self._kept or (self._last_use.get(name, -1) >= self._next and not self._full):
            return
        self._parts.pop(name, None)
        self._constants.pop(name, None)
        whole = self._whole.pop(name, None)
        if whole is not None:
            self._cache.free(whole)

    def _advance(self, nodes: list[fx.Node], number: int) -> None:
        """Executes the nodes for one batch of images, and holds what is needed later."""
        values: dict[str, Any] = {}

        def look_up(source: fx.Node) -> Any:
            if source.name in values:
                return values[source.name]
            if source.name in self._constants:
                return self._constants[source.name]
            part = self._parts[source.name][number]
            return part.to(self._images.device) if isinstance(part, Tensor) else part

        for node in nodes:
            if node.op == "placeholder":
                self._parts[node.name], self._whole[node.name] = self._batches, self._images
            elif node.op == "get_attr":
                self._constants[node.name] = attribute(self._graph, node)
            elif node.op in ("call_function", "call_module"):
                constant = all(source.name in self._constants for source in node.all_input_nodes)
                if constant and node.name in self._constants:
                    continue
                run: Any = self._graph.get_submodule(str(node.target)) if node.op == "call_module" else node.target
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), look_up)
                result = run(*args, **kwargs)
                if constant:
                    self._constants[node.name] = result
                    continue
                values[node.name] = result
                if node.name in self._kept or self._last_use.get(node.name, -1) >= self._next:
                    self._hold(node.name, number, result)
            for source in node.all_input_nodes:
                if self._last_use[source.name] == self._position[node.name]:
                    values.pop(source.name, None)

    def _hold(self, name: str, number: int, result: Any) -> None:
        """Keeps the value that a batch of images has."""
        parts, images = self._parts.setdefault(name, []), len(self._batches[number])
        # Not always one row for an image: windowed attention has more.
        if number == 0 and isinstance(result, Tensor) and result.dim() and len(result) % images == 0:
            self._whole[name] = self._cache.room(len(result) // images * len(self._images), result)
        whole = self._whole.get(name)
        if whole is not None:
            rows = len(whole) // len(self._images)
            begin = rows * len(self._batches[0]) * number
            place = whole[begin : begin + rows * images]
            if place.shape == result.shape:
                result = place.copy_(result)
            else:
                self._cache.free(self._whole.pop(name))
        parts.append(result)


def _picked(values: Tensor, rows: Tensor) -> Tensor:
    return values[rows.to(values.device)]
