"""GPTQ: the codes of the papers' algorithms, errors never above nearest rounding's, groups in parallel."""

import itertools
from dataclasses import replace

import pytest
import torch

from reverie.errors import ConfigError, ModelError
from reverie.grid import Grid, dequantize, quantize, symmetric_qparams
from reverie.rounding import Moments
from reverie.rounding.gptq import GPTQ


def grid_of(weight, bits, reach=0.9):
    flat, grid = weight.flatten(1), Grid(bits)
    scale, zero_point = symmetric_qparams(flat.amin(1) * reach, flat.amax(1) * reach, grid)
    column = (len(weight), *[1] * (weight.dim() - 1))
    return scale.view(column), zero_point.view(column), grid


def drawn(size, out, samples, seed, groups=1):
    """Weights (groups * out, size), correlated inputs (groups, size, samples)."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(groups, size, size, generator=generator, dtype=torch.float64)
    x = (mixing @ torch.randn(groups, size, samples, generator=generator, dtype=torch.float64)).clamp(min=0)
    return torch.randn(groups * out, size, generator=generator), x


def moments_of(x, y):
    """Of inputs (groups, size, samples) and answers (groups, out, samples)."""
    samples = x.shape[-1]
    return Moments(x @ x.mT / samples, y @ x.mT / samples, y.square().mean(-1))


def own_moments(weight, x):
    """Those of a layer that reads what it read in full precision."""
    return moments_of(x, weight.reshape(x.shape[0], -1, x.shape[1]).double() @ x)


def optimal_brain_quantization(weight, scale, zero_point, grid, inputs, damping):
    """Frantar et al.'s section 3.1, one row and weight at a time, with the inverse updated by elimination (eq. 3), in GPTQ's order."""
    size = len(inputs)
    damped = inputs + damping * inputs.diagonal().mean() * torch.eye(size, dtype=torch.float64)
    codes = torch.zeros(weight.shape)
    for row in range(len(weight)):
        values, inverse = weight[row].double().clone(), torch.linalg.inv(damped)
        for column in inputs.diagonal().argsort(descending=True, stable=True).tolist():
            code = quantize(values[column], scale[row, 0].double(), zero_point[row, 0], grid)
            codes[row, column] = code
            error = values[column] - dequantize(code, scale[row, 0].double(), zero_point[row, 0])
            values -= error / inverse[column, column] * inverse[:, column]
            inverse -= torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
            inverse[column, column] = 1.0
    return codes


def damped_error(codes, weight, scale, zero_point, moments, damping=GPTQ.damping):
    """What GPTQ minimises, of each channel."""
    values = dequantize(codes, scale, zero_point)
    far = (values - weight).double().square().sum(1) * damping * moments.inputs[0].diagonal().mean()
    return moments.error(values)[0] + far


@pytest.mark.parametrize(("size", "bits", "least"), [(5, 3, 2), (40, 4, 8), (200, 3, 8)])
def test_the_codes_are_those_of_optimal_brain_quantization_in_a_fixed_order(size, bits, least):
    weight, x = drawn(size, 8, 3 * size, seed=size)
    moments, on = own_moments(weight, x), grid_of(weight, bits, reach=1.0)
    expected, nearest = optimal_brain_quantization(weight, *on, moments.inputs[0], GPTQ.damping), quantize(weight, *on)
    better = damped_error(expected, weight, *on[:2], moments) < damped_error(nearest, weight, *on[:2], moments)
    assert better.sum() >= least
    assert torch.equal(GPTQ(sweeps=0)(weight, *on, moments), torch.where(better[:, None], expected, nearest))


@pytest.mark.parametrize("seed", range(6))
def test_it_is_near_the_best_of_all_codes_where_all_can_be_tried(seed):
    weight, x = drawn(4, 1, 30, seed)
    scale, zero_point, grid = grid_of(weight, 2)
    # Not the layer's own answers, but those to other inputs.
    y = weight.double() @ (
        x[0] + 0.3 * torch.randn(x[0].shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    )
    moments = moments_of(x, y[None])
    every = torch.tensor(list(itertools.product(range(grid.quant_min, grid.quant_max + 1), repeat=4)), dtype=torch.float32)
    errors = torch.cat([damped_error(codes[None], weight, scale, zero_point, moments) for codes in every])
    found = damped_error(GPTQ()(weight, scale, zero_point, grid, moments), weight, scale, zero_point, moments)
    start = damped_error(quantize(weight, scale, zero_point, grid), weight, scale, zero_point, moments)
    rank = (errors < found * (1 - 1e-9)).sum()
    assert rank <= 4 and found <= start


def test_where_inputs_are_independent_it_rounds_to_nearest():
    for shape in ((6, 20), (6, 4, 3, 3)):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        size = weight[0].numel()
        rows, identity = weight.reshape(1, 6, size).double(), torch.eye(size, dtype=torch.float64)[None]
        on = grid_of(weight, 3)
        assert torch.equal(GPTQ()(weight, *on, Moments(identity, rows, rows.square().sum(-1))), quantize(weight, *on))


@pytest.mark.parametrize("sweeps", [0, 1, 4])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_no_channels_error_on_its_inputs_is_ever_above_that_of_rounding_to_nearest(bits, sweeps):
    shares = []
    for seed in range(6):
        # Some layers have fewer samples than inputs.
        weight, x = drawn(32, 16, (20, 200)[seed % 2], seed)
        y = weight.double() @ (x[0] * (1 + 0.1 * torch.randn(x[0].shape, generator=torch.Generator().manual_seed(9))))
        on = grid_of(weight, bits)
        codes = GPTQ(sweeps=sweeps)(weight, *on, moments_of(x, y[None]))
        after, before = (
            (dequantize(made, *on[:2]).double() @ x[0] - y).square().mean(1) for made in (codes, quantize(weight, *on))
        )
        assert (after <= before * (1 + 1e-9)).all()
        shares.append(after.mean() / before.mean())
    assert max(shares) < 0.8


def test_each_sweep_lowers_the_error_or_leaves_it():
    weight, x = drawn(150, 16, 400, seed=0)
    moments, on = own_moments(weight, x), grid_of(weight, 2)
    errors = [damped_error(GPTQ(sweeps=sweeps)(weight, *on, moments), weight, *on[:2], moments) for sweeps in range(4)]
    for before, after in itertools.pairwise(errors):
        assert (after <= before * (1 + 1e-9)).all()
    assert errors[1].mean() < 0.99 * errors[0].mean()


@pytest.mark.parametrize(("groups", "out"), [(3, 4), (8, 1)])
def test_groups_in_parallel_are_groups_one_by_one(groups, out):
    weight, x = drawn(9, out, 50, seed=1, groups=groups)
    weight = weight.view(groups * out, 1, 3, 3)
    scale, zero_point, grid = grid_of(weight, 3)
    together = GPTQ()(weight, scale, zero_point, grid, own_moments(weight, x))
    for group in range(groups):
        part = slice(group * out, (group + 1) * out)
        alone = GPTQ()(weight[part], scale[part], zero_point[part], grid, own_moments(weight[part], x[group : group + 1]))
        assert torch.equal(together[part], alone)


def test_the_student_makes_good_what_its_input_has_lost():
    # The student reads three quarters of what the teacher reads: its weights want to be a third larger.
    weight, x = drawn(24, 8, 300, seed=0)
    y = weight.double() @ x[0]
    scale, zero_point, grid = grid_of(weight, 8, reach=1.5)
    codes = GPTQ()(weight, scale, zero_point, grid, moments_of(0.75 * x, y[None]))
    assert (0.75 * dequantize(codes, scale, zero_point).double() @ x[0] - y).square().mean() < 1e-3 * y.square().mean()


def test_an_input_that_is_always_zero_or_a_singular_moment_is_held_to_the_weight():
    weight, x = drawn(12, 5, 4, seed=0)
    x[:, 3] = 0
    on = grid_of(weight, 4)
    codes = GPTQ()(weight, *on, own_moments(weight, x))
    assert torch.equal(codes[:, 3], quantize(weight, *on)[:, 3])
    nothing = own_moments(weight, torch.zeros_like(x))
    assert torch.equal(GPTQ()(weight, *on, nothing), quantize(weight, *on))


@pytest.mark.parametrize("part", ["inputs", "answers"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_moments_that_are_not_finite_are_refused(part, value):
    weight, x = drawn(6, 2, 20, seed=0)
    moments = own_moments(weight, x)
    broken = getattr(moments, part).clone()
    broken[0, 1, 2] = value
    with pytest.raises(ModelError) as caught:
        GPTQ()(weight, *grid_of(weight, 4), replace(moments, **{part: broken}))
    assert str(caught.value) == "second moments of inputs must be finite, got some that are not; check the weights and images"


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("damping", 0.0, "damping must be at least 0.001, got 0.0"),
        ("sweeps", -1, "sweeps must be at least 0, got -1"),
    ],
)
def test_a_setting_out_of_range_is_refused(setting, value, message):
    with pytest.raises(ConfigError) as caught:
        GPTQ(**{setting: value})
    assert str(caught.value) == message
