"""What every rounding method must do."""

import pytest
import torch

from reverie import plugins, rounding
from reverie.grid import Grid, quantize, symmetric_qparams
from reverie.rounding.adaround import AdaRound


@pytest.fixture(params=plugins.names(rounding))
def method(request):
    return plugins.load(rounding, request.param)()


@pytest.fixture(params=[2, 4, 8])
def problem(request):
    weight = torch.randn(5, 3, 3, 3, generator=torch.Generator().manual_seed(1))
    grid = Grid(request.param)
    flat = weight.flatten(1)
    scale, zero_point = symmetric_qparams(flat.amin(1) * 0.8, flat.amax(1) * 0.8, grid)
    return weight, scale.view(5, 1, 1, 1), zero_point.view(5, 1, 1, 1), grid


def test_final_codes_are_whole_and_on_the_grid(method, problem):
    codes = method(*problem).harden()
    grid = problem[3]
    assert torch.equal(codes, codes.round())
    assert codes.min() >= grid.quant_min and codes.max() <= grid.quant_max


def test_it_starts_at_the_nearest_codes(method, problem):
    assert torch.equal(method(*problem).harden(), quantize(*problem))


def test_no_code_is_further_than_one_step_from_the_weight(method, problem):
    weight, scale, zero_point, grid = problem
    rounder = method(*problem)
    with torch.no_grad():
        for parameter in rounder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 9)
    position = (weight / scale + zero_point).clamp(grid.quant_min, grid.quant_max)
    assert ((rounder.harden() - position).abs() < 1).all()


def test_the_gradient_reaches_everything_learned(method, problem):
    rounder = method(*problem)
    parameters = list(rounder.parameters())
    assert bool(parameters) == method.learned
    if parameters:
        (rounder().square().sum() + rounder.penalty(0.6)).backward()
        for parameter in parameters:
            assert parameter.grad is not None and (parameter.grad != 0).float().mean() > 0.5


@pytest.mark.parametrize("progress", [0.0, 0.3, 0.999])
def test_the_penalty_is_finite_and_not_negative(method, problem, progress):
    penalty = method(*problem).penalty(progress)
    assert torch.isfinite(penalty) and penalty >= 0


def test_adarounds_soft_weight_starts_at_the_weight():
    weight = torch.linspace(-3.3, 3.3, 24).view(2, 3, 2, 2)
    rounder = AdaRound()(weight, torch.ones(2, 1, 1, 1), torch.zeros(2, 1, 1, 1, dtype=torch.int32), Grid(4))
    assert torch.allclose(rounder(), weight, atol=1e-5)


def test_adarounds_penalty_is_the_papers_by_hand():
    # h = 0.5 everywhere: 1 - |2 * 0.5 - 1|^beta = 1 for each of the 4 weights, times lambda.
    weight = torch.full((1, 4), 0.5)
    rounder = AdaRound(penalty_weight=0.01)(weight, torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int32), Grid(4))
    assert rounder.penalty(0.1) == 0.0
    assert rounder.penalty(0.5).item() == pytest.approx(0.04, rel=1e-5)


def test_adarounds_sharpness_falls_from_20_to_2_by_half_a_cosine():
    rounder = AdaRound()(torch.ones(1, 1), torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int32), Grid(4))
    assert [round(rounder._sharpness(progress), 6) for progress in (0.2, 0.6, 1.0)] == [20.0, 11.0, 2.0]


def test_the_penalty_drives_the_soft_codes_to_whole_numbers():
    weight = torch.rand(1, 200, generator=torch.Generator().manual_seed(0)) * 6 - 3
    rounder = AdaRound()(weight, torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int32), Grid(4))
    optimizer = torch.optim.Adam(rounder.parameters(), lr=3e-2)
    for step in range(600):
        optimizer.zero_grad()
        rounder.penalty(step / 600).backward() if step > 120 else None
        optimizer.step() if step > 120 else None
    up = rounder._up()
    assert (torch.minimum(up, 1 - up) < 1e-3).float().mean() > 0.99
