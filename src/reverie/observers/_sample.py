"""A bounded sample of the values of a tensor, with its exact ends: what `mse` and `percentile` look at."""

import torch
from jaxtyping import Float
from torch import Tensor

from reverie.observers import widen


class Sample:
    """Up to `capacity` values of each group from every batch, picked at fixed pseudo-random places, and the exact ends.

    All values of a tensor over all batches would not fit in memory; 32,768 of a batch tell a range's best clipping to
    well below a step.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._parts: list[Tensor] = []
        self._ends: tuple[Tensor, Tensor] | None = None

    def update(self, values: Float[Tensor, "groups values"]) -> None:
        """Takes in the values of one more batch."""
        self._ends = widen(self._ends, values)
        if values.shape[1] > self._capacity:
            # Fixed by the number of the batch, so that a watch is a function of what it saw.
            generator = torch.Generator().manual_seed(len(self._parts))
            places = torch.randint(values.shape[1], (self._capacity,), generator=generator)
            values = values[:, places.to(values.device)]
        self._parts.append(values.clone())

    def values(self) -> Float[Tensor, "groups sampled"]:
        """The values kept."""
        return torch.cat(self._parts, dim=1)

    def ends(self) -> tuple[Float[Tensor, " groups"], Float[Tensor, " groups"]]:
        """Exact minimum and maximum of everything seen."""
        assert self._ends is not None
        return self._ends
