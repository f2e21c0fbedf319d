"""The integer program finds what trying everything finds, and keeps to its budgets."""

import itertools
import random
from types import SimpleNamespace

import pytest

from reverie.errors import ConfigError
from reverie.recovery import allocation
from reverie.recovery.allocation import Budget, Term, allocate

WIDTHS = (2, 3, 4, 5, 6, 8)


def size(counts, limit):
    return Budget("size", float(limit), tuple(Term((place,), count) for place, count in enumerate(counts)), sum(counts))


def operations(pairs, limit):
    terms = tuple(Term(places, count) for places, count in pairs)
    return Budget("operations", limit, terms, sum(count for _, count in pairs))


def best(costs, budgets):
    """The smallest sum of costs, by trying everything; None if nothing is within the budgets."""
    sums = [
        sum(cost[bits] for cost, bits in zip(costs, chosen, strict=True))
        for chosen in itertools.product(*costs)
        if all(budget.mean(chosen) <= budget.limit for budget in budgets)
    ]
    return min(sums, default=None)


@pytest.mark.parametrize("trial", range(40))
def test_it_is_as_good_as_trying_everything_whatever_the_costs(trial):
    chance = random.Random(trial)
    count = chance.randint(2, 5)
    # Neither falling with the bits nor of one size.
    costs = [
        {bits: chance.random() * 10 ** chance.uniform(-6, 0) for bits in chance.sample(WIDTHS, chance.randint(1, 4))}
        for _ in range(count)
    ]
    budgets = [size([chance.randint(1, 100_000) for _ in range(count)], chance.uniform(2, 8))]
    if trial % 2:
        pairs = [((place, (place + 1) % count), chance.randint(1, 10**7)) for place in range(count)]
        budgets.append(operations(pairs, chance.uniform(4, 64)))
    expected = best(costs, budgets)
    if expected is None:
        with pytest.raises(ConfigError, match=r"^(size|operations) must be at least "):
            allocate(costs, budgets)
        return
    bits = allocate(costs, budgets)
    assert all(budget.mean(bits) <= budget.limit for budget in budgets)
    assert sum(cost[width] for cost, width in zip(costs, bits, strict=True)) == pytest.approx(expected, rel=1e-9)


def test_a_budget_is_met_to_the_last_bit_among_millions():
    # One bit more for the tensor of a single value would exceed 3 by a ten-millionth.
    costs = [{3: 1.0, 4: 0.0}, {3: 0.0, 8: 1.0}]
    assert allocate(costs, [size([1, 10**7], 3)]) == [3, 3]
    assert allocate(costs, [size([1, 10**7], 3.000001)]) == [4, 3]


def test_a_limit_that_a_float_falls_short_of_is_reached():
    assert allocate([{3: 1.0, 4: 0.0}] * 10, [size([1] * 10, 3.3)]).count(4) == 3


def test_the_sensitive_tensor_gets_the_bits():
    falling = {2: 1.0, 4: 0.1, 8: 0.001}
    costs = [{bits: 100 * cost for bits, cost in falling.items()}, falling]
    assert allocate(costs, [size([100, 100], 5)]) == [8, 2]


def test_what_is_unreachable_is_refused_with_the_least_that_can_be_reached():
    costs = [{8: 0.0}, dict.fromkeys(WIDTHS, 0.0)]
    with pytest.raises(ConfigError) as caught:
        allocate(costs, [size([111, 2000], 2)])
    assert str(caught.value) == (
        "size must be at least 2.32 for this network (1 of 2 tensors have fixed bits), got 2; "
        "raise it, or let tensors have fewer bits"
    )
    assert allocate(costs, [size([111, 2000], 2.32)]) == [8, 2]


def test_nothing_is_printed(capfd):
    # The solver does, for one in forty such programs.
    sizes = [432, *[2304] * 6, 4608, *[9216] * 5, 18432, *[36864] * 5, 640]
    for trial in range(8):
        chance = random.Random(trial)
        costs = [{bits: chance.lognormvariate(0, 1) * 3.0**-bits for bits in WIDTHS} for _ in sizes]
        allocate(costs, [size(sizes, 2.5)])
    assert capfd.readouterr() == ("", "")


def solved(monkeypatch, **changed):
    """The real solver, with another result."""
    optimize = allocation.require_solver()

    def milp(*arguments, **settings):
        found = optimize.milp(*arguments, **settings)
        return SimpleNamespace(**{"x": found.x, "status": 0, "message": "", "mip_gap": 0.0} | changed)

    solver = SimpleNamespace(milp=milp, Bounds=optimize.Bounds, LinearConstraint=optimize.LinearConstraint)
    monkeypatch.setattr(allocation, "require_solver", lambda: solver)


COSTS = [{2: 1.0, 4: 0.0}, {2: 0.5, 4: 0.0}]


def test_a_solver_that_finds_nothing_is_told(monkeypatch):
    solved(monkeypatch, x=None, status=1, message="Time limit reached.")
    with pytest.raises(ConfigError) as caught:
        allocate(COSTS, [size([1, 1], 3)])
    assert str(caught.value) == (
        "mixed precision: the solver must find bits within 300 s, got none for 2 tensors (Time limit reached.); give fewer widths, "
        "such as --set mixed_precision.widths=[2,4,8]"
    )


def test_bits_that_are_not_proven_the_best_are_told(monkeypatch):
    solved(monkeypatch, status=1, mip_gap=0.0125)
    told = []
    assert allocate(COSTS, [size([1, 1], 3)], warn=told.append) == [4, 2]
    assert told == [
        "mixed precision: the best bits must be proven within 300 s, got some that cost up to 1.25% more than the best, and others "
        "on another machine; give fewer widths, such as --set mixed_precision.widths=[2,4,8]"
    ]
