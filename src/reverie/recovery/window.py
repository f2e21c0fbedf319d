"""Windows: the part of each image that a step of reconstruction looks at.

What a convolution computes at one position it computes at all of them, so that a step learns more from a few positions of many
images than from all positions of a few, in the same time: of a unit that writes 112 x 112 positions, a window of 14 x 14 is a
64th. All images of a step share a window, drawn anew for each, anywhere in the image and at its borders.

A unit that is executed on a cut-out pads where the image goes on. What comes out wrong there, as wide as the unit reaches, counts
for nothing; it is found by executing the full-precision unit both ways. A unit that has no such part (a pooling over the whole
image, attention, a linear layer) sees whole images.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, fx

# As two ways to compute the same convolution differ, relative to the largest value.
_ALIKE = 1e-4


@dataclass(frozen=True)
class Part:
    """Some rows and columns of a tensor (count, channels, height, width)."""

    rows: slice
    columns: slice

    def of(self, values: Tensor) -> Tensor:
        """A view of them."""
        return values[:, :, self.rows, self.columns]


@dataclass(frozen=True)
class Window:
    """The same part of an image in all tensors at a unit's border.

    Args:
        sources: Of each tensor that the unit reads.
        target: Of what it writes.
        valid: Of what it writes when it is executed on the sources' parts: what the border of the window does not reach.
    """

    sources: tuple[Part, ...]
    target: Part
    valid: Part


class Windows:
    """The windows of one unit.

    Args:
        unit: The full-precision unit.
        sources: What it reads, for a few images, whole.
        side: Of a window, in positions of what the unit writes; 0 for whole images.
    """

    def __init__(self, unit: fx.GraphModule, sources: list[Tensor], side: int) -> None:
        self._unit, self._sources, self._side = unit, sources, side
        self._valid: dict[tuple[bool, ...], Part | None] = {}
        with torch.no_grad():
            self._answer: Tensor = unit(*sources)
        self._ratios = self._found_ratios() if side else None
        if self._ratios is not None:
            _, _, height, width = self._answer.shape
            # In the middle, where padding is felt on all sides.
            if self._window(self._ratios, (height - side) // 2, (width - side) // 2) is None:
                self._ratios = None

    def draw(self, generator: torch.Generator) -> Window | None:
        """A window anywhere in the image; None where steps see whole images."""
        if self._ratios is None:
            return None
        _, _, height, width = self._answer.shape
        top, left = (int(torch.randint(length - self._side + 1, (), generator=generator)) for length in (height, width))
        return self._window(self._ratios, top, left)

    def _found_ratios(self) -> list[tuple[int, int]] | None:
        """How many rows and columns of each source belong to one of the answer; None where there is no whole number, or no need."""
        shapes = [tensor.shape for tensor in self._sources]
        if self._answer.dim() != 4 or any(len(shape) != 4 for shape in shapes):
            return None
        _, _, height, width = self._answer.shape
        if min(height, width) <= self._side or any(shape[2] % height or shape[3] % width for shape in shapes):
            return None
        return [(shape[2] // height, shape[3] // width) for shape in shapes]

    def _window(self, ratios: list[tuple[int, int]], top: int, left: int) -> Window | None:
        side, (_, _, height, width) = self._side, self._answer.shape
        target = Part(slice(top, top + side), slice(left, left + side))
        sources = tuple(
            Part(slice(top * down, (top + side) * down), slice(left * right, (left + side) * right)) for down, right in ratios
        )
        # Which borders of the window are the image's own decides what is valid, wherever else it lies.
        borders = (top == 0, left == 0, top + side == height, left + side == width)
        if borders not in self._valid:
            self._valid[borders] = self._unreached(sources, target)
        valid = self._valid[borders]
        return None if valid is None else Window(sources, target, valid)

    @torch.no_grad()
    def _unreached(self, sources: tuple[Part, ...], target: Part) -> Part | None:
        """The part of a window's answer that is the whole image's; None if that is no rectangle, or nothing."""
        answer: Tensor = self._unit(*(part.of(tensor) for part, tensor in zip(sources, self._sources, strict=True)))
        whole = target.of(self._answer)
        if answer.shape != whole.shape:
            return None
        alike = ((answer - whole).abs() <= _ALIKE * self._answer.abs().amax()).all(dim=1).all(dim=0)
        rows, columns = (alike.any(dim=axis).nonzero().flatten().tolist() for axis in (1, 0))
        if not rows:
            return None
        part = Part(slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
        return part if bool(alike[part.rows, part.columns].all()) else None
