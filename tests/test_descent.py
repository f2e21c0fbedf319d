"""One step of descent: what it does, what it refuses and says, and that it goes on where it was."""

import math

import pytest
import torch
from torch import nn

from reverie.descent import Descent, below, under
from reverie.errors import DivergenceError

OPTIMIZERS = {
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.1, betas=(0.5, 0.999)),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
}


def weight(value=1.0):
    return nn.Parameter(torch.tensor([value, -value]))


def descent_of(parameters, kind="sgd"):
    return Descent(OPTIMIZERS[kind](parameters), place="gdfq: generator", cure="try a smaller one")


def terms(parameter, **factors):
    return {name: factor * parameter.square().sum() for name, factor in (factors or {"fit": 1.0}).items()}


def test_a_step_goes_down_the_sum_of_the_terms_and_answers_with_what_it_was():
    parameter = weight()
    descent = Descent(torch.optim.SGD([parameter], lr=0.1), place="x", cure="y")
    assert descent.step(0, terms(parameter, fit=1.0, penalty=0.5)) == pytest.approx(3.0)
    # The slope of 1.5 w^2 is 3 w.
    assert parameter.tolist() == pytest.approx([0.7, -0.7])
    descent.step(1, terms(parameter, fit=1.0))
    # Gradients do not add up from step to step.
    assert parameter.tolist() == pytest.approx([0.56, -0.56])


def refusal(descent, number, found):
    with pytest.raises(DivergenceError) as caught:
        descent.step(number, found)
    return str(caught.value)


@pytest.mark.parametrize(("factor", "shown"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")])
def test_a_loss_that_is_not_finite_is_refused_with_its_terms(factor, shown):
    parameter = weight()
    assert refusal(descent_of([parameter]), 0, terms(parameter, fit=factor, penalty=0.25)) == (
        f"gdfq: generator: the loss must stay finite, got {shown} at step 0 (fit {shown}, penalty 0.5); try a smaller one"
    )


def test_a_loss_a_thousand_times_above_its_beginnings_is_refused_with_its_terms():
    parameter = weight()
    descent = Descent(torch.optim.SGD([parameter], lr=0.0), place="head: weights", cure="set learning_rate=0.1")
    # The largest of the first twenty is 2 * 3.
    for number in range(20):
        descent.step(number, terms(parameter, fit=3.0 if number == 7 else 1.0))
    descent.step(20, terms(parameter, fit=2999.0))
    assert refusal(descent, 21, terms(parameter, fit=3001.0, penalty=0.0)) == (
        "head: weights: the loss must stay below 1000 times where it began, got 6e+03 at step 21 (fit 6e+03, penalty 0); "
        "set learning_rate=0.1"
    )
    # What came later does not widen what is allowed.
    assert "got 6e+03 at step 22" in refusal(descent, 22, terms(parameter, fit=3001.0))


def test_the_watch_counts_its_own_steps_not_those_of_the_caller():
    parameter = weight()
    descent = Descent(torch.optim.SGD([parameter], lr=0.0), place="x", cure="y")
    for number in range(100, 120):
        descent.step(number, terms(parameter))
    assert "step 120" in refusal(descent, 120, terms(parameter, fit=1001.0))


@pytest.mark.parametrize("factor", [math.nan, 1e6])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_refused_step_changes_neither_weights_nor_the_optimizers_memory(kind, factor):
    parameter = weight()
    descent = descent_of([parameter], kind)
    for number in range(20):
        descent.step(number, {"fit": (parameter - 3).square().sum()})
    value, memory = parameter.detach().clone(), descent.state()
    refusal(descent, 20, {"fit": factor * (1 + parameter.square().sum())})
    assert torch.equal(parameter, value)
    after = descent.state()
    assert memory.keys() == after.keys() and len(memory) > 1
    assert all(torch.equal(memory[name], after[name]) for name in memory)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("steps", [0, 1, 5, 25])
def test_a_restored_descent_goes_on_identically(kind, steps):
    def run(descent, parameters, numbers):
        for number in numbers:
            # The second parameter gets its first gradient late.
            loss = (parameters[0] - 3).square().sum()
            if number >= 3:
                loss = loss + (parameters[1] - number).square().sum()
            descent.step(number, {"fit": loss})

    first = [weight(), weight(2.0)]
    descent = descent_of(first, kind)
    run(descent, first, range(steps))
    state, values = descent.state(), [part.detach().clone() for part in first]
    run(descent, first, range(steps, steps + 10))
    for _ in range(2):
        again = [nn.Parameter(value.clone()) for value in values]
        fresh = descent_of(again, kind)
        fresh.restore(state)
        run(fresh, again, range(steps, steps + 10))
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(first, again, strict=True))
        ours, theirs = descent.state(), fresh.state()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_watch_is_restored_with_the_optimizer():
    parameter = weight()
    descent = Descent(torch.optim.SGD([parameter], lr=0.0), place="x", cure="y")
    for number in range(20):
        descent.step(number, terms(parameter))
    fresh = Descent(torch.optim.SGD([parameter], lr=0.0), place="x", cure="y")
    fresh.restore(descent.state())
    assert "got 2e+03 at step 20" in refusal(fresh, 20, terms(parameter, fit=1001.0))


def test_states_fit_into_one_and_come_out_again():
    first, second = {"a": torch.ones(1), "b.c": torch.zeros(2)}, {"a": torch.ones(3)}
    whole = below("x", first) | below("xy", second) | below("z", {})
    assert set(whole) == {"x.a", "x.b.c", "xy.a"}
    assert under("x", whole).keys() == first.keys() and under("xy", whole).keys() == second.keys()
    assert under("z", whole) == {}
