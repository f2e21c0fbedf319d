"""The state in which a unit's hardened weights did best on images that it does not learn from."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from reverie.errors import DivergenceError
from reverie.graph.placement import Student
from reverie.graph.quantizers import Rounder
from reverie.graph.units import Unit


class Best:
    """The hardened state of a unit with the lowest error so far; `since` counts the looks after it.

    Args:
        place, cure: What is learned, and what to try when it diverges, for the error.
    """

    def __init__(
        self, student: Student, unit: Unit, rounders: dict[str, Rounder], ranges: list[str], *, place: str, cure: str
    ) -> None:
        self._student, self._rounders = student, rounders
        self._place, self._cure = place, cure
        self._quantizers = [student.activations[name] for name in (*unit.inputs, *unit.nodes) if name in student.activations]
        gains = [student.activations[name].log_gain for name in ranges] + [student.weights[name].log_gain for name in rounders]
        parameters = [parameter for rounder in rounders.values() for parameter in rounder.parameters()]
        self._learned = [*parameters, *(gain for gain in gains if gain is not None)]
        self._lowest, self.since = math.inf, 0
        self._state: list[Tensor] = []

    @contextmanager
    def hardened(self) -> Iterator[None]:
        """Codes are whole and nothing is dropped until the block ends."""
        droppings = [quantizer.drop(None) for quantizer in self._quantizers]
        try:
            for name, rounder in self._rounders.items():
                self._student.weights[name].codes = rounder.harden()
            yield
        finally:
            for name in self._rounders:
                self._student.weights[name].codes = None
            for quantizer, dropping in zip(self._quantizers, droppings, strict=True):
                quantizer.drop(dropping)

    def look(self, error: float) -> None:
        """Keeps the state if its error is lower than before.

        Raises:
            DivergenceError: It is not finite, nor was any before it.
        """
        if not self._state and not math.isfinite(error):
            raise DivergenceError(f"{self._place}: the held-out error must be finite, got {error:g}; {self._cure}")
        if error < self._lowest:
            self._lowest, self.since = error, 0
            self._state = [parameter.detach().clone() for parameter in self._learned]
        else:
            self.since += 1

    def state(self) -> dict[str, Tensor]:
        """All of it, by name."""
        kept = {f"{number}": value for number, value in enumerate(self._state)}
        return {"lowest, since": torch.tensor([self._lowest, self.since], dtype=torch.float64), **kept}

    def resume(self, state: dict[str, Tensor]) -> None:
        """Goes on from `state`."""
        self._lowest, self.since = float(state["lowest, since"][0]), int(state["lowest, since"][1])
        self._state = [state[f"{number}"] for number in range(len(state) - 1)]

    @torch.no_grad()
    def restore(self) -> None:
        """Puts the state with the lowest error back."""
        for parameter, value in zip(self._learned, self._state, strict=True):
            parameter.copy_(value)
