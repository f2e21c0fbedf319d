"""Swing convolution: convolutions with a stride read their input a little shifted, anew at each pass.

Such a convolution looks at its input on a fixed lattice, so gradient descent on pixels finds what is good on that lattice alone:
a checkerboard. With X' the input X reflect-padded by 1 at every side,

    swing(X) = X'[a : a + height, b : b + width],   a, b uniform in {0, 1, 2}, the same for all images and channels

stands in front of each convolution with a stride, drawn for each of them at each pass. Offset 1 is X itself.

Reference: Jeon et al. 2023 (Genie), arXiv:2212.04780 (algorithms 9.2). As in the released code, a block's shortcut draws its own
offsets. Here an axis shorter than 3 is not shifted.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, fx, nn

from reverie.graph.operators import CONVOLUTIONS, arguments

# The offset at which the crop of the padded input is the input.
_CENTRE = 1


def swing(graph: fx.GraphModule, generator: torch.Generator) -> fx.GraphModule:
    """A copy of `graph` in which every convolution with a stride reads a shifted input; shares the weights, leaves `graph` alone.

    Args:
        generator: Drawn from at each pass, on the CPU, so that every device sees the same shifts.
    """
    copied = fx.Graph()
    copied.output(copied.graph_copy(graph.graph, {}))
    swung = fx.GraphModule(graph, copied, class_name="Swung")
    for node in _strided(copied):
        name, source = f"{node.name}_swing", arguments(node)["input"]
        swung.add_submodule(name, _Swing(generator))
        with copied.inserting_before(node):
            node.replace_input_with(source, copied.call_module(name, (source,)))
    swung.recompile()
    return swung.eval()


def _strided(graph: fx.Graph) -> list[fx.Node]:
    convolutions = (node for node in graph.nodes if node.op == "call_function" and node.target in CONVOLUTIONS)
    return [node for node in convolutions if any(step != 1 for step in arguments(node)["stride"])]


def shifted(x: Float[Tensor, "batch channels *space"], offsets: Sequence[int]) -> Float[Tensor, "batch channels *space"]:
    """`x` reflect-padded by 1 at every side and cropped back to its size, from `offsets` (0, 1 or 2, one for each axis in space) on."""
    steps = [offset - _CENTRE if size > 2 else 0 for offset, size in zip(offsets, x.shape[2:], strict=True)]
    return _Shift.apply(x, steps) if any(steps) else x  # type: ignore[no-untyped-call]


class _Shift(torch.autograd.Function):
    """Each axis moved by its step (-1, 0 or 1), the free border filled by reflection: 2 to 3 times faster than pad and crop."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, steps: list[int]) -> Tensor:
        ctx.steps = steps
        out = torch.empty_like(x)
        _kept(out, [-step for step in steps]).copy_(_kept(x, steps))
        for axis, (free, mirrored) in _borders(x, steps):
            out.select(axis, free).copy_(out.select(axis, mirrored))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].clone()
        # What was filled last is given back first.
        for axis, (free, mirrored) in reversed(_borders(gradient, ctx.steps)):
            gradient.select(axis, mirrored).add_(gradient.select(axis, free))
        moved = torch.zeros_like(gradient)
        _kept(moved, ctx.steps).copy_(_kept(gradient, [-step for step in ctx.steps]))
        return moved, None


def _kept(x: Tensor, steps: list[int]) -> Tensor:
    """What of `x` stays inside when it moves by `steps` towards the origin."""
    for axis, step in enumerate(steps, start=2):
        x = x.narrow(axis, max(step, 0), x.shape[axis] - abs(step))
    return x


def _borders(x: Tensor, steps: list[int]) -> list[tuple[int, tuple[int, int]]]:
    """Of each axis that moved: the place left free, and the place that mirrors it at the border of what there was."""
    moved = [(axis, step) for axis, step in enumerate(steps, start=2) if step]
    return [(axis, (0, 2) if step < 0 else (x.shape[axis] - 1, x.shape[axis] - 3)) for axis, step in moved]


class _Swing(nn.Module):
    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self._generator = generator

    def forward(self, x: Tensor) -> Tensor:
        return shifted(x, torch.randint(3, (x.dim() - 2,), generator=self._generator).tolist())
