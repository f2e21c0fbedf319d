"""One seed for a run, and an independent stream of numbers for each place that draws.

A stage draws from a generator derived from the run's seed and the place's path, such as ("synthesis", 3) for the fourth
batch, and not from a generator that flows through the run: so a resumed run draws what an uninterrupted one would have.
"""

import hashlib
import json
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Seed:
    """A seed and the path of places below it."""

    value: int
    path: tuple[str | int, ...] = ()

    def at(self, *places: str | int) -> "Seed":
        """The seed of a place further down."""
        return Seed(self.value, (*self.path, *places))

    def derived(self) -> int:
        """The seed of this place's own stream, in 0..2^63-1; stable for ever."""
        digest = hashlib.sha256(json.dumps([self.value, *self.path]).encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 1

    def generator(self, device: str | torch.device = "cpu") -> torch.Generator:
        """A fresh generator, the same at every call, independent of what is drawn at any other place."""
        return torch.Generator(device).manual_seed(self.derived())
