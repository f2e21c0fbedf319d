"""How much the network's answer depends on each value that a unit writes: the diagonal of the Fisher information.

    weight = g^2 / mean of g^2,    g = gradient of -log p(y | x) with respect to the unit's output, y drawn from p(. | x)

A squared error weighted so is the second-order change of the loss (Li et al. 2021, BRECQ, section 3.2). The paper takes the
gradient of the loss at the labels; without labels they are drawn from what the teacher answers, which is the definition of the
Fisher information. Not here: BRECQ's released code, which takes absolute gradients of a KL that is zero at full precision.
"""

from collections.abc import Iterable

import torch
from jaxtyping import Int
from torch import Tensor, fx
from torch.nn import functional

from reverie.graph.cache import Cache, CacheFull
from reverie.graph.taps import tap
from reverie.randomness import Seed


class Fisher:
    """The weights of some tensors for all images, computed when they are first asked for.

    One pass over the images computes them for the tensor and for as many of the later ones as there is room for.

    Args:
        teacher: The full-precision graph; it answers with logits.
        inputs: All images.
        tensors: Names of tensors in the order in which they will be asked for, each with as many rows for each image.
        seed: Of the labels drawn.
        cache: Where weights are held. Those that it has no room for are computed anew, for the rows that are asked for.
    """

    def __init__(self, teacher: fx.GraphModule, inputs: Tensor, tensors: Iterable[str], *, seed: Seed, cache: Cache) -> None:
        output = teacher.graph.output_node().args[0]
        assert isinstance(output, fx.Node)
        self._output, self._tensors, self._inputs = output.name, list(tensors), inputs
        self._tapped = tap(teacher, [*self._tensors, self._output])
        self._cache = cache
        self._labels = torch.empty(len(inputs), dtype=torch.int64)
        self._held: dict[str, Tensor] = {}
        self._tried: set[str] = set()
        # How many rows each tensor has for an image: windowed attention has more than one.
        self._rows: dict[str, int] = {}
        generator = seed.generator()
        for picked in self._batches():
            with torch.no_grad():
                values = self._tapped(inputs[picked.to(inputs.device)])
            self._rows = {name: len(values[name]) // len(picked) for name in self._tensors}
            answers = values[self._output].float().softmax(dim=1).cpu()
            self._labels[picked] = torch.multinomial(answers, 1, generator=generator).flatten()

    def rows(self, tensor: str, picked: Int[Tensor, " rows"]) -> Tensor:
        """The weights of these rows of the tensor; their mean for each image is 1."""
        if tensor not in self._held and tensor not in self._tried:
            self._tried.add(tensor)
            self._fill(tensor)
        if tensor in self._held:
            held = self._held[tensor]
            return held[picked.to(held.device)].to(self._inputs.device)
        rows = self._rows[tensor]
        computed = self._weights(picked.div(rows, rounding_mode="floor"), [tensor])[tensor]
        own = torch.arange(len(picked), device=picked.device) * rows + picked % rows
        return computed[own.to(computed.device)]

    def release(self, tensor: str) -> None:
        """The caller no longer needs the tensor's weights."""
        if tensor in self._held:
            self._cache.free(self._held.pop(tensor))

    def _batches(self) -> tuple[Tensor, ...]:
        return torch.split(torch.arange(len(self._inputs)), 32)

    def _fill(self, first: str) -> None:
        """Computes the weights of the tensor for all images, and those of later ones, if there is room."""
        wanted = self._tensors[self._tensors.index(first) :]
        for picked in self._batches():
            for name, part in self._weights(picked, wanted).items():
                if name not in self._held:
                    try:
                        self._held[name] = self._cache.room(self._rows[name] * len(self._inputs), part)
                    except CacheFull:
                        wanted = wanted[: wanted.index(name)]
                        break
                begin = self._rows[name] * int(picked[0])
                self._held[name][begin : begin + len(part)].copy_(part)
            if not wanted:
                return

    def _weights(self, picked: Tensor, tensors: list[str]) -> dict[str, Tensor]:
        """The weights of all rows of these images."""
        inputs = self._inputs[picked.to(self._inputs.device)].detach().requires_grad_()
        with torch.enable_grad():
            values = self._tapped(inputs)
            labels = self._labels[picked].to(inputs.device)
            loss = functional.cross_entropy(values[self._output], labels, reduction="sum")
            gradients = torch.autograd.grad(loss, [values[name] for name in tensors])
        found = {}
        for name, gradient in zip(tensors, gradients, strict=True):
            squared = gradient.square().reshape(len(picked), -1)
            # An image that the network is sure of has next to no gradient; every image counts alike.
            mean = squared.mean(dim=1, keepdim=True).clamp_min(torch.finfo(squared.dtype).tiny)
            found[name] = (squared / mean).view_as(gradient)
        return found
