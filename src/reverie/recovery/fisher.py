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
    """The weights of some tensors for all images, computed in one pass and held, or computed when asked for.

    Args:
        teacher: The full-precision graph; it answers with logits.
        inputs: All images.
        tensors: Names of tensors with one row for each image.
        seed: Of the labels drawn.
        cache: Where weights are held.
    """

    def __init__(self, teacher: fx.GraphModule, inputs: Tensor, tensors: Iterable[str], *, seed: Seed, cache: Cache) -> None:
        output = teacher.graph.output_node().args[0]
        assert isinstance(output, fx.Node)
        self._output, self._tensors, self._inputs = output.name, list(tensors), inputs
        self._tapped = tap(teacher, [*self._tensors, self._output])
        self._generator, self._cache = seed.generator(), cache
        self._labels = torch.empty(len(inputs), dtype=torch.int64)
        self._held: dict[str, Tensor] = {}
        self._full = False
        for picked in torch.split(torch.arange(len(inputs)), 32):
            with torch.no_grad():
                answers = self._tapped(inputs[picked.to(inputs.device)])[self._output].float().softmax(dim=1).cpu()
            self._labels[picked] = torch.multinomial(answers, 1, generator=self._generator).flatten()
            if not self._full:
                self._hold(picked, self._weights(picked, self._tensors))

    def rows(self, tensor: str, picked: Int[Tensor, " rows"]) -> Tensor:
        """The weights of the tensor for these images; their mean for each image is 1."""
        if self._full:
            return self._weights(picked, [tensor])[tensor]
        held = self._held[tensor]
        return held[picked.to(held.device)].to(self._inputs.device)

    def release(self, tensor: str) -> None:
        """The caller no longer needs the tensor's weights."""
        if tensor in self._held:
            self._cache.free(self._held.pop(tensor))

    def _hold(self, picked: Tensor, weights: dict[str, Tensor]) -> None:
        try:
            for name, part in weights.items():
                if name not in self._held:
                    self._held[name] = self._cache.room(len(self._inputs), part)
                self._held[name][picked[0] : picked[-1] + 1].copy_(part)
        except CacheFull:
            self._full = True
            for name in list(self._held):
                self.release(name)

    def _weights(self, picked: Tensor, tensors: list[str]) -> dict[str, Tensor]:
        inputs = self._inputs[picked.to(self._inputs.device)].detach().requires_grad_()
        with torch.enable_grad():
            values = self._tapped(inputs)
            labels = self._labels[picked].to(inputs.device)
            loss = functional.cross_entropy(values[self._output], labels, reduction="sum")
            gradients = torch.autograd.grad(loss, [values[name] for name in tensors])
        found = {}
        for name, gradient in zip(tensors, gradients, strict=True):
            squared = gradient.square().flatten(1)
            # An image that the network is sure of has next to no gradient; every image counts alike.
            mean = squared.mean(dim=1, keepdim=True).clamp_min(torch.finfo(squared.dtype).tiny)
            found[name] = (squared / mean).view_as(gradient)
        return found
