"""A graph executed over a whole set of images, in batches, holding only the tensors still needed.

Reconstruction goes through a network unit by unit, and each unit's inputs depend on what happened to the ones before. A
`Walk` computes every tensor once, stops where it is told, and goes on with the weights as they are by then. It holds what
crosses the place where it stands, not what lies between two such places.
"""

from collections.abc import Callable, Iterable, Sequence
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
        cache: Where they are held; None means memory without a limit. A tensor that it has no room for is computed anew, by `rows`
            for those that it is asked for, and by `to` from what is held when a later node reads it; it is then held if there is
            room by that time.
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
        # What found no room since the last stop.
        self._refused: set[str] = set()
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
        if stop <= self._next:
            return
        nodes, self._next = self._lost_before(self._order[self._next : stop]), stop
        self._refused.clear()
        for number in range(len(self._batches)):
            self._advance(nodes, number)
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
    def rows(
        self, tensors: Sequence[str], picked: Int[Tensor, " rows"], cut: Sequence[Callable[[Tensor], Tensor]] | None = None
    ) -> list[Tensor]:
        """These rows of the tensors, all of which have as many rows for an image, on the device of the images.

        Args:
            cut: For each tensor, gives the view of it that is wanted, with the same rows; None for whole tensors.
        """
        views = dict(zip(tensors, cut, strict=True)) if cut is not None else {}
        found = {name: _picked(views.get(name, _whole)(self.value(name)), picked) for name in tensors if name in self._parts}
        lost = tuple(name for name in tensors if name not in found)
        if lost:
            probe, rows = self._probe(lost)
            computed = probe(_picked(self._images, picked.div(rows, rounding_mode="floor")))
            own = torch.arange(len(picked), device=picked.device) * rows + picked % rows
            found |= {name: _picked(views.get(name, _whole)(computed[name]), own) for name in lost}
        return [found[name].to(self._images.device) for name in tensors]

    def count(self, tensor: str) -> int:
        """How many rows the tensor has for all images."""
        return len(self.value(tensor)) if tensor in self._parts else len(self._images) * self._probe((tensor,))[1]

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
        if self._is_needed(name):
            return
        self._parts.pop(name, None)
        self._constants.pop(name, None)
        whole = self._whole.pop(name, None)
        if whole is not None:
            self._cache.free(whole)

    def _is_needed(self, name: str) -> bool:
        return name in self._kept or self._last_use.get(name, -1) >= self._next

    def _lost_before(self, nodes: list[fx.Node]) -> list[fx.Node]:
        """The nodes, and before them those that must be executed once more because they read what is not held."""
        wanted = set(nodes)
        frontier = list(nodes)
        while frontier:
            for source in frontier.pop().all_input_nodes:
                if source not in wanted and source.name not in self._parts and source.name not in self._constants:
                    wanted.add(source)
                    frontier.append(source)
        return [node for node in self._order if node in wanted]

    def _advance(self, nodes: list[fx.Node], number: int) -> None:
        """Executes the nodes for one batch of images, and holds what is needed later."""
        values: dict[str, Any] = {}
        last_use = {source: node for node in nodes for source in node.all_input_nodes}

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
                if self._is_needed(node.name) and node.name not in self._refused:
                    self._hold(node.name, number, result)
            for source in node.all_input_nodes:
                if last_use[source] is node:
                    values.pop(source.name, None)

    def _hold(self, name: str, number: int, result: Any) -> None:
        """Keeps the value that a batch of images has, if there is room."""
        images = len(self._batches[number])
        # Not always one row for an image: windowed attention has more.
        if number == 0 and isinstance(result, Tensor) and result.dim() and len(result) % images == 0:
            try:
                self._whole[name] = self._cache.room(len(result) // images * len(self._images), result)
            except CacheFull:
                self._refused.add(name)
                return
        parts = self._parts.setdefault(name, [])
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


def _whole(values: Tensor) -> Tensor:
    return values


def _picked(values: Tensor, rows: Tensor) -> Tensor:
    # A view of some positions of channels-last values gives channels-last rows.
    return values[rows.to(values.device)]
