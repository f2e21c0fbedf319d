"""A convolution or linear layer as a product of matrices: what its weight is multiplied with, at which position.

    answer[o, position] = sum over s of weight[o, s] * patch[s, position] + bias[o]

`s` runs over the input channels of the group and the places of the kernel, as in `weight.flatten(1)`. This is im2col, made
only where it is asked for: of all images and positions it would be as many times larger than the input as the kernel has places.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, fx
from torch.nn import functional as F

from reverie.graph.operators import LINEARS, arguments


def position_count(layer: fx.Node, outputs: Tensor) -> int:
    """At how many positions of one image the layer's weight is applied."""
    first = outputs[0]
    return first[..., 0].numel() if layer.target in LINEARS else first[0].numel()


def patches(
    layer: fx.Node, inputs: Float[Tensor, "count *shape"], kernel: tuple[int, ...], positions: Int[Tensor, " positions"]
) -> Float[Tensor, "count groups size positions"]:
    """What the layer's weight is multiplied with at these positions of each image; zeros where padding is.

    Args:
        layer: Its node, of a captured or student graph.
        inputs: What it reads.
        kernel: The spatial sizes of its weight; empty for a linear layer.
        positions: Flat indices into the output's positions.
    """
    count = inputs.shape[0]
    if layer.target in LINEARS:
        return inputs.reshape(count, -1, inputs.shape[-1])[:, positions].mT.unsqueeze(1)
    named = arguments(layer)
    stride, dilation = _each(named["stride"], kernel), _each(named["dilation"], kernel)
    windows = F.pad(inputs, _padding(named["padding"], kernel, dilation))
    for axis, (size, step, spread) in enumerate(zip(kernel, stride, dilation, strict=True), start=2):
        windows = windows.unfold(axis, spread * (size - 1) + 1, step)[..., ::spread]
    # A view so far: (count, channels, *positions, *kernel). Only what is asked for is copied.
    places = torch.unravel_index(positions, windows.shape[2 : 2 + len(kernel)])
    picked: Tensor = torch.ops.aten.index(windows, [None, None, *places])
    return picked.reshape(count, named["groups"], -1, len(positions), picked[0, 0, 0].numel()).movedim(4, 3).flatten(2, 3)


def answers(
    layer: fx.Node, outputs: Float[Tensor, "count *shape"], groups: int, positions: Int[Tensor, " positions"]
) -> Float[Tensor, "count groups out positions"]:
    """The layer's outputs at the same positions."""
    count = outputs.shape[0]
    if layer.target in LINEARS:
        return outputs.reshape(count, -1, outputs.shape[-1])[:, positions].mT.unsqueeze(1)
    return outputs.reshape(count, groups, -1, position_count(layer, outputs))[..., positions]


def _each(value: list[int], kernel: tuple[int, ...]) -> list[int]:
    """One number for each spatial dimension."""
    return list(value) * (len(kernel) // len(value))


def _padding(value: list[int] | str, kernel: tuple[int, ...], dilation: list[int]) -> list[int]:
    """Zeros before and behind each spatial dimension, the last one first, as `F.pad` has it."""
    if isinstance(value, str):
        # An odd number of zeros has its last one behind.
        whole = [spread * (size - 1) * (value == "same") for size, spread in zip(kernel, dilation, strict=True)]
        pairs = [(number // 2, number - number // 2) for number in whole]
    else:
        pairs = [(number, number) for number in _each(value, kernel)]
    return [number for pair in reversed(pairs) for number in pair]
