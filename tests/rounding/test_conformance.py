"""What every rounding method must do."""

import pytest
import torch

from reverie import plugins, rounding
from reverie.grid import Grid, quantize, symmetric_qparams
from reverie.rounding import Moments

METHODS = {name: plugins.load(rounding, name)() for name in plugins.names(rounding)}


def those_that_need(*needs):
    return pytest.mark.parametrize("method", [method for method in METHODS.values() if method.needs in needs], ids=repr)


def problem(bits, shape=(6, 3, 3, 3), zero_point=0, dtype=torch.float32):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    grid = Grid(bits)
    flat = weight.flatten(1)
    # Some of the largest are clipped.
    scale, zero = symmetric_qparams(flat.amin(1) * 0.8, flat.amax(1) * 0.8, grid)
    column = (len(weight), *[1] * (weight.dim() - 1))
    return weight, scale.view(column), zero.view(column) + zero_point, grid


def moments_of(weight, groups=1, samples=400):
    """The moments of correlated inputs whose answers are the weight's own."""
    rows = weight.reshape(groups, -1, weight[0].numel()).double()
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(groups, rows.shape[2], rows.shape[2], generator=generator, dtype=torch.float64)
    x = mixing @ torch.randn(groups, rows.shape[2], samples, generator=generator, dtype=torch.float64)
    inputs = x @ x.mT / samples
    return Moments(inputs, rows @ inputs, (rows @ x).square().mean(-1))


def decided(method, weight, scale, zero_point, grid):
    """The method's codes; a rounder's, before it has learned."""
    if method.needs == "reconstruction":
        return method(weight, scale, zero_point, grid).harden()
    if method.needs == "moments":
        return method(weight, scale, zero_point, grid, moments_of(weight))
    return method(weight, scale, zero_point, grid)


def test_there_is_a_method_of_each_kind():
    assert {method.needs for method in METHODS.values()} == {"weights", "moments", "reconstruction"}


@pytest.mark.parametrize("shape", [(6, 3, 3, 3), (5, 7), (4, 3, 1, 1), (6, 1, 3, 3), (4, 2, 5)])
@pytest.mark.parametrize("bits", [2, 4, 8])
@those_that_need("weights", "moments", "reconstruction")
def test_final_codes_are_whole_and_on_the_grid_and_nothing_else_changes(method, bits, shape):
    given = problem(bits, shape)
    kept = [part.clone() for part in given[:3]]
    codes = decided(method, *given)
    grid = given[3]
    assert codes.shape == given[0].shape and codes.dtype == given[0].dtype
    assert torch.equal(codes, codes.round())
    assert codes.min() >= grid.quant_min and codes.max() <= grid.quant_max
    assert all(torch.equal(part, before) for part, before in zip(given[:3], kept, strict=True))


@pytest.mark.parametrize("zero_point", [0, -3])
@those_that_need("weights", "moments", "reconstruction")
def test_a_weight_that_is_on_the_grid_stays(method, zero_point):
    weight, scale, zero, grid = problem(4, zero_point=zero_point)
    codes = quantize(weight, scale, zero, grid)
    assert torch.equal(decided(method, (codes - zero) * scale, scale, zero, grid), codes)


@pytest.mark.parametrize("bits", [2, 4, 8])
@those_that_need("reconstruction")
def test_it_starts_at_the_nearest_codes(method, bits):
    assert torch.equal(method(*problem(bits)).harden(), quantize(*problem(bits)))


@pytest.mark.parametrize("bits", [2, 4, 8])
@those_that_need("weights", "reconstruction")
def test_no_code_is_further_than_one_step_from_the_weight(method, bits):
    weight, scale, zero_point, grid = problem(bits)
    made = method(weight, scale, zero_point, grid)
    if method.needs == "reconstruction":
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 9)
        made = made.harden()
    position = (weight / scale + zero_point).clamp(grid.quant_min, grid.quant_max)
    assert ((made - position).abs() < 1).all()


@those_that_need("reconstruction")
def test_the_gradient_reaches_everything_learned(method):
    rounder = method(*problem(4))
    parameters = list(rounder.parameters())
    assert parameters
    (rounder().square().sum() + rounder.penalty(0.6)).backward()
    for parameter in parameters:
        assert parameter.grad is not None and (parameter.grad != 0).float().mean() > 0.5


@pytest.mark.parametrize("progress", [0.0, 0.3, 0.999])
@those_that_need("reconstruction")
def test_the_penalty_is_finite_and_not_negative(method, progress):
    penalty = method(*problem(4)).penalty(progress)
    assert torch.isfinite(penalty) and penalty >= 0


def test_moments_tell_the_mean_squared_error_of_any_weight():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, size, 50, generator=generator, dtype=torch.float64) for size in (12, 3))
    weight = torch.randn(6, 3, 2, 2, generator=generator)
    moments = Moments(x @ x.mT / 50, y @ x.mT / 50, y.square().mean(-1))
    answer = weight.reshape(2, 3, 12).double() @ x
    torch.testing.assert_close(moments.error(weight), (y - answer).square().mean(-1))
