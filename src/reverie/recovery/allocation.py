"""Bits for every tensor under a budget, by integer programming.

    minimise    sum over tensors t of cost_t(b_t),                 b_t among the widths that t may have
    subject to  mean over what the budget counts of (product of the bits of the tensors involved) <= limit

A size counts each weight once, a factor of one: the mean of b over all weights. Bit operations count each multiply-accumulate once,
with two factors: the mean of (bits of the weight) x (bits of what it is multiplied with). One binary variable x_t,b says whether t has b
bits, and a product of two tensors' bits becomes linear with a variable y >= 0 for each pair of widths, whose sums over either
width are the x of the other: where the x are whole, y is their product.

Nothing is assumed of the costs: more bits may cost more. Choosing bits by an integer program over summed
sensitivities is HAWQ-V3's (Yao et al. 2021, arXiv:2011.10680).
"""

import ctypes
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from reverie.errors import ConfigError
from reverie.grid import MAX_BITS, MIN_BITS
from reverie.models import _libraries

# HiGHS takes a row for satisfied to within 1e-6; beyond a few rounds something else is wrong.
_ROUNDS = 10
# Usual programs take a few; only products of bits of hundreds of tensors, with many widths, take minutes.
_SECONDS = 300


@dataclass(frozen=True)
class Term:
    """What a budget counts together.

    Args:
        tensors: The places of one or two tensors, whose bits are multiplied.
        count: How often.
    """

    tensors: tuple[int, ...]
    count: int


@dataclass(frozen=True)
class Budget:
    """An upper limit of a mean of (products of) bits.

    Args:
        name: Of the setting, for messages.
        limit: What the mean may be at most.
        terms: What is added up.
        counted: What the sum is divided by.
    """

    name: str
    limit: float
    terms: tuple[Term, ...]
    counted: int

    def spent(self, bits: Sequence[int]) -> int:
        """The sum, given the bits of all tensors."""
        return sum(term.count * math.prod(bits[place] for place in term.tensors) for term in self.terms)

    def mean(self, bits: Sequence[int]) -> float:
        """What the budget limits."""
        return self.spent(bits) / self.counted

    @property
    def allowed(self) -> int:
        """The largest sum within the limit."""
        # The least part of a count above the product of two floats is forgiven: 3.3 times 10 is 33.
        return math.floor(self.limit * self.counted * (1 + 1e-12))


def require_solver() -> Any:
    """`scipy.optimize`.

    Raises:
        ModelError: scipy is not installed.
    """
    return _libraries.require("scipy.optimize", extra="mixed", distribution="scipy")


def check_reachable(choices: Sequence[Sequence[int]], budgets: Sequence[Budget]) -> None:
    """Refuses a budget that not even the fewest bits meet.

    Args:
        choices: The widths that each tensor may have.

    Raises:
        ConfigError: Names the budget and the least that can be reached.
    """
    least = [min(widths) for widths in choices]
    for budget in budgets:
        if budget.spent(least) > budget.allowed:
            counted = {place for term in budget.terms for place in term.tensors}
            fixed = sum(len(choices[place]) == 1 for place in counted)
            reached = math.ceil(100 * budget.mean(least)) / 100
            why = f" ({fixed} of {len(counted)} tensors have fixed bits)" if fixed else ""
            raise ConfigError(
                f"{budget.name} must be at least {reached:g} for this network{why}, got {budget.limit:g}; "
                "raise it, or let tensors have fewer bits"
            )


def allocate(
    costs: Sequence[Mapping[int, float]], budgets: Sequence[Budget], *, warn: Callable[[str], None] | None = None
) -> list[int]:
    """The bits of each tensor with the smallest sum of costs within all budgets.

    Args:
        costs: For each tensor, what each width that it may have costs; finite.
        warn: Told, in a sentence, when the solver ran out of time before it had proven its bits the best.

    Raises:
        ConfigError: A budget cannot be met, or the solver found nothing in its time.
        ModelError: scipy is not installed.
    """
    choices = [sorted(cost) for cost in costs]
    check_reachable(choices, budgets)
    program = _Program(costs, choices, warn)
    rows = [program.row(budget) for budget in budgets]
    allowed = [float(budget.allowed) for budget in budgets]
    for _ in range(_ROUNDS):
        bits = program.solve(rows, allowed)
        excess = [budget.spent(bits) - budget.allowed for budget in budgets]
        if max([0, *excess]) == 0:
            return bits
        allowed = [limit - max(0, over) for limit, over in zip(allowed, excess, strict=True)]
    raise AssertionError(f"the solver's bits exceed the budgets by {excess}")


class _Program:
    """The variables: x for each tensor and width, then y for each pair of widths of two tensors that are multiplied."""

    def __init__(
        self,
        costs: Sequence[Mapping[int, float]],
        choices: Sequence[Sequence[int]],
        warn: Callable[[str], None] | None,
    ) -> None:
        self._choices, self._warn = choices, warn
        self._places = {key: number for number, key in enumerate((t, b) for t, widths in enumerate(choices) for b in widths)}
        self._costs = [float(costs[t][b]) for t, b in self._places]
        self._pairs: dict[tuple[int, int], dict[tuple[int, int], int]] = {}
        self._variables = len(self._places)

    def row(self, budget: Budget) -> dict[int, float]:
        """The coefficients of the variables in the sum that the budget limits."""
        row: dict[int, float] = {}
        for term in budget.terms:
            if len(term.tensors) == 1:
                (t,) = term.tensors
                parts = {self._places[t, b]: b for b in self._choices[t]}
            else:
                first, second = term.tensors
                parts = {y: b * c for (b, c), y in self._pair(first, second).items()}
            for variable, factor in parts.items():
                row[variable] = row.get(variable, 0.0) + term.count * factor
        return row

    def _pair(self, first: int, second: int) -> dict[tuple[int, int], int]:
        if (first, second) not in self._pairs:
            widths = product(self._choices[first], self._choices[second])
            self._pairs[first, second] = {pair: self._variables + number for number, pair in enumerate(widths)}
            self._variables += len(self._pairs[first, second])
        return self._pairs[first, second]

    def solve(self, rows: Sequence[Mapping[int, float]], allowed: Sequence[float]) -> list[int]:
        optimize = require_solver()
        equations: list[tuple[dict[int, float], float]] = []
        for t, widths in enumerate(self._choices):
            equations.append(({self._places[t, b]: 1.0 for b in widths}, 1.0))
        for (first, second), pair in self._pairs.items():
            for side, t in enumerate((first, second)):
                for b in self._choices[t]:
                    sums = {y: 1.0 for key, y in pair.items() if key[side] == b}
                    equations.append((sums | {self._places[t, b]: -1.0}, 0.0))
        constraints = [_constraint(optimize, self._variables, [row for row, _ in equations], [end for _, end in equations])]
        # Sums are whole, so half a bit more allows none of them, and keeps the solver's tolerance out of it.
        for row, end in zip(rows, allowed, strict=True):
            unit = math.gcd(*map(int, row.values()))
            limit = {variable: factor / unit for variable, factor in row.items()}
            constraints.append(_constraint(optimize, self._variables, [limit], -np.inf, end // unit + 0.5))
        # Its tolerances are absolute, and meant for numbers around 1.
        typical = float(np.mean(np.abs(self._costs))) or 1.0
        objective = np.zeros(self._variables)
        objective[: len(self._costs)] = np.array(self._costs) / typical
        whole = np.zeros(self._variables)
        whole[: len(self._costs)] = 1
        exact = {"mip_rel_gap": 0.0, "time_limit": _SECONDS}
        with _nothing_printed():
            found = optimize.milp(
                objective, integrality=whole, bounds=optimize.Bounds(0, 1), constraints=constraints, options=exact
            )
        cure = f"give fewer widths, such as --set mixed_precision.widths=[{MIN_BITS},4,{MAX_BITS}]"
        if found.x is None:
            raise ConfigError(
                f"mixed precision: the solver must find bits within {_SECONDS} s, got none for {len(self._choices)} tensors "
                f"({found.message}); {cure}"
            )
        if found.status != 0 and self._warn is not None:
            self._warn(
                f"mixed precision: the best bits must be proven within {_SECONDS} s, got some that cost up to {found.mip_gap:.2%} "
                f"more than the best, and others on another machine; {cure}"
            )
        shares = [{b: found.x[self._places[t, b]] for b in widths} for t, widths in enumerate(self._choices)]
        return [max(share, key=share.__getitem__) for share in shares]


@contextmanager
def _nothing_printed() -> Iterator[None]:
    """HiGHS writes a line of its own to standard output now and then, past Python, where a program expects a JSON document."""
    sys.stdout.flush()
    kept = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        ctypes.CDLL(None).fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _constraint(optimize: Any, variables: int, rows: Sequence[Mapping[int, float]], low: Any, high: Any = None) -> Any:
    matrix = np.zeros((len(rows), variables))
    for number, row in enumerate(rows):
        matrix[number, list(row)] = list(row.values())
    return optimize.LinearConstraint(matrix, low, low if high is None else high)
