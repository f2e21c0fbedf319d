"""The arithmetic of grids: its properties, the literature's check vectors, and PyTorch's gradients."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reverie.errors import ConfigError
from reverie.grid import Grid, affine_qparams, dequantize, fake_quantize, quantize, symmetric_qparams

GRIDS = st.builds(Grid, bits=st.integers(2, 8), signed=st.booleans())
# Multiples of 2^-10 below 2^10: every sum and difference below is exact in float32, so bounds need no slack of their own.
VALUES = st.integers(-(2**20), 2**20).map(lambda units: units / 1024)
TENSORS = st.lists(VALUES, min_size=2, max_size=16).map(torch.tensor)
# Divisions by the scale round once: values of up to 2^8 steps are off by at most 2^-16 steps.
SLACK = 1 + 2**-15


def per_tensor(x, grid):
    return affine_qparams(x.min(), x.max(), grid)


@pytest.mark.parametrize(
    ("grid", "ends"),
    [
        (Grid(), (-128, 127)),
        (Grid(8, signed=False), (0, 255)),
        (Grid(4), (-8, 7)),
        (Grid(2), (-2, 1)),
        (Grid(3, signed=False), (0, 7)),
    ],
)
def test_a_grid_has_the_ends_of_its_integers(grid, ends):
    assert (grid.quant_min, grid.quant_max) == ends


@pytest.mark.parametrize("bits", [1, 9, 16])
def test_bits_outside_2_to_8_are_refused(bits):
    with pytest.raises(ConfigError) as caught:
        Grid(bits)
    assert str(caught.value) == f"Grid.bits must be 2 to 8, got {bits}"


@given(TENSORS, GRIDS)
def test_inside_the_range_the_error_is_at_most_half_a_step(x, grid):
    scale, zero_point = per_tensor(x, grid)
    error = (fake_quantize(x, scale, zero_point, grid) - x).abs()
    assert bool((error <= 0.5 * SLACK * scale).all())


@given(TENSORS, GRIDS)
def test_inside_a_symmetric_range_the_error_is_at_most_half_a_step(x, grid):
    if not grid.signed:
        x = x.abs()
    scale, zero_point = symmetric_qparams(x.min(), x.max(), grid)
    error = (fake_quantize(x, scale, zero_point, grid) - x).abs()
    assert bool((error <= 0.5 * SLACK * scale).all())
    assert int(zero_point) == 0


@given(TENSORS, GRIDS)
def test_fake_quantizing_twice_changes_nothing(x, grid):
    qparams = per_tensor(x, grid)
    once = fake_quantize(x, *qparams, grid)
    assert torch.equal(fake_quantize(once, *qparams, grid), once)


@given(TENSORS, GRIDS)
def test_order_is_kept(x, grid):
    codes = quantize(x.sort().values, *per_tensor(x, grid), grid)
    assert bool((codes.diff() >= 0).all())


@given(GRIDS, st.floats(1e-6, 1e6), st.integers(-300, 300))
def test_zero_is_exact_for_every_zero_point_on_the_grid(grid, scale, zero_point):
    zero_point = min(max(zero_point, grid.quant_min), grid.quant_max)
    qparams = torch.tensor(scale), torch.tensor(zero_point)
    zero = torch.zeros(1)
    assert float(quantize(zero, *qparams, grid)) == zero_point
    assert float(fake_quantize(zero, *qparams, grid)) == 0.0


@given(TENSORS, GRIDS)
def test_ranges_widened_to_zero_keep_the_zero_point_on_the_grid(x, grid):
    _, zero_point = per_tensor(x, grid)
    assert grid.quant_min <= int(zero_point) <= grid.quant_max


@given(TENSORS, GRIDS)
def test_dequantized_codes_quantize_to_themselves(x, grid):
    qparams = per_tensor(x, grid)
    codes = torch.arange(grid.quant_min, grid.quant_max + 1).float()
    assert torch.equal(quantize(dequantize(codes, *qparams), *qparams, grid), codes)


@given(st.lists(TENSORS, min_size=2, max_size=5), GRIDS, st.randoms(use_true_random=False))
def test_permuting_channels_permutes_results(rows, grid, random):
    length = min(len(row) for row in rows)
    x = torch.stack([row[:length] for row in rows])
    order = random.sample(range(len(rows)), len(rows))

    def per_channel(weight):
        scale, zero_point = symmetric_qparams(weight.amin(1, keepdim=True), weight.amax(1, keepdim=True), grid)
        return fake_quantize(weight, scale, zero_point, grid)

    assert torch.equal(per_channel(x[order]), per_channel(x)[order])


def test_a_range_without_width_has_a_usable_scale():
    nothing = torch.zeros(3)
    for qparams in (affine_qparams(nothing, nothing, Grid()), symmetric_qparams(nothing, nothing, Grid())):
        assert torch.equal(qparams[0], torch.ones(3))
        assert torch.equal(fake_quantize(nothing, *qparams, Grid()), nothing)


def test_halves_round_to_the_even_code():
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    codes = quantize(x, torch.tensor(1.0), torch.tensor(3), Grid())
    assert codes.tolist() == [1, 1, 3, 3, 5, 5]


# algorithms.md 1.2: its `s` is 1 / scale and its `z` is minus our zero point.
@pytest.mark.parametrize(
    ("bits", "low", "high", "rate", "offset", "expected"),
    [
        (4, -1.0, 0.9, 7.894737, 0, [-1.013333, -0.253333, 0, 0.253333, 0.886667]),
        (4, 0.05, 1.0, 15.789474, 9, [0.063333, 0.063333, 0.063333, 0.19, 0.886667]),
        (2, 0.0, 1.0, 3.0, 2, [0, 0, 0, 0.333333, 1]),
    ],
)
def test_signed_grids_without_forced_zero_equal_the_literature(bits, low, high, rate, offset, expected):
    x = torch.tensor([-1, -0.3, 0, 0.2, 0.9])
    grid = Grid(bits, signed=True)
    scale, zero_point = affine_qparams(torch.tensor(low), torch.tensor(high), grid, include_zero=False)
    assert 1 / float(scale) == pytest.approx(rate, abs=1e-6)
    assert int(zero_point) == -offset
    assert fake_quantize(x, scale, zero_point, grid).tolist() == pytest.approx(expected, abs=1e-6)


def normals(count=10_000):
    return torch.randn(count, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("grid", [Grid(8), Grid(4), Grid(2, signed=False)])
@pytest.mark.parametrize("zero_point", [0, 1])
def test_values_and_input_gradients_equal_those_of_torch(grid, zero_point):
    ours, theirs = (normals().requires_grad_() for _ in range(2))
    # Small enough that values fall outside the range on both sides; they must get no gradient.
    scale = 4.0 / 2**grid.bits
    weights = torch.linspace(-1, 1, len(ours))
    mine = fake_quantize(ours, torch.tensor(scale), torch.tensor(zero_point), grid)
    other = torch.fake_quantize_per_tensor_affine(theirs, scale, zero_point, grid.quant_min, grid.quant_max)
    (mine * weights).sum().backward()
    (other * weights).sum().backward()
    assert torch.equal(mine, other)
    assert torch.equal(ours.grad, theirs.grad)
    assert 0 < int((ours.grad == 0).sum()) < len(ours)


@pytest.mark.parametrize("grid", [Grid(8), Grid(4), Grid(2, signed=False)])
@pytest.mark.parametrize("zero_point", [0, 1])
def test_scale_gradients_equal_those_of_torch(grid, zero_point):
    x, weights = normals(), torch.linspace(-1, 1, 10_000)
    ours, theirs = (torch.tensor([4.0 / 2**grid.bits], requires_grad=True) for _ in range(2))
    mine = fake_quantize(x, ours, torch.tensor([zero_point]), grid)
    other = torch._fake_quantize_learnable_per_tensor_affine(
        x, theirs, torch.tensor([float(zero_point)]), grid.quant_min, grid.quant_max, 1.0
    )
    (mine * weights).sum().backward()
    (other * weights).sum().backward()
    assert torch.equal(mine, other)
    # Sums of 10,000 float32 terms in another order.
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-3)


def test_scale_gradients_are_summed_within_their_channel():
    x = torch.tensor([[0.3, 5.0], [-0.2, 0.6]])
    scale = torch.tensor([[1.0], [0.5]], requires_grad=True)
    fake_quantize(x, scale, torch.zeros(2, 1, dtype=torch.int32), Grid(2)).sum().backward()
    # Inside: round(x / s) - x / s; above the range: the largest code, 1.
    expected = torch.tensor([[(0 - 0.3) + 1], [(0 - -0.4) + (1 - 1.2)]])
    torch.testing.assert_close(scale.grad, expected)


def test_with_and_without_gradients_the_values_are_the_same_and_the_input_stays():
    x = normals()
    kept = x.clone()
    qparams = torch.tensor(0.0371), torch.tensor(-5), Grid()
    without = fake_quantize(x, *qparams)
    assert torch.equal(without, fake_quantize(x.clone().requires_grad_(), *qparams).detach())
    assert torch.equal(x, kept)


def by_autograd(x, scale, zero_point, grid):
    """`fake_quantize` in plain operators: a detached remainder makes rounding straight-through, `where` cuts gradients."""
    steps = x / scale
    rounded = steps + (torch.round(steps) - steps).detach()
    codes = torch.round(steps).detach() + zero_point
    lowest, highest = (torch.as_tensor(end - zero_point).to(x.dtype) for end in (grid.quant_min, grid.quant_max))
    inner = torch.where(codes < grid.quant_min, lowest, torch.where(codes > grid.quant_max, highest, rounded))
    return inner * scale


def gradients(function, x, scale, zero_point, grid, gradient):
    x, scale = x.detach().requires_grad_(), scale.clone().requires_grad_()
    return torch.autograd.grad(function(x, scale, zero_point, grid), (x, scale), gradient)


SHAPE = (4, 3, 6, 5)
LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "sliced": lambda x: torch.stack([x, x], dim=-1)[..., 1],
    "expanded": lambda x: x[:1].expand(SHAPE),
    "one value": lambda x: x[0, 0, 0, 0].expand(SHAPE),
}
SCALES = {"tensor": (), "one": (1,), "out channels": (4, 1, 1, 1), "channels": (1, 3, 1, 1)}


def spread(dtype, seed, scale, zero_point, grid):
    """Values that reach half as far again as the grid on either side."""
    steps = torch.empty(SHAPE, dtype=dtype).uniform_(-0.5, 1.5, generator=torch.Generator().manual_seed(seed))
    return (grid.quant_min - zero_point + steps * (grid.quant_max - grid.quant_min)) * scale


def assert_gradients_are_those_of_autograd(x, scale, zero_point, grid, gradient):
    ours, theirs = (gradients(function, x, scale, zero_point, grid, gradient) for function in (fake_quantize, by_autograd))
    # Autograd multiplies by the scale and divides by it again, which rounds.
    torch.testing.assert_close(theirs[0], gradient * (theirs[0] != 0))
    assert torch.equal(ours[0], gradient * (theirs[0] != 0))
    assert ours[1].shape == scale.shape
    # Each of n terms, and each addition, rounds by no more than eps times the sum of all terms' sizes.
    sizes = (gradient.abs() * (x.abs() + by_autograd(x, scale, zero_point, grid).abs())).sum_to_size(scale.shape) / scale
    bound = torch.finfo(x.dtype).eps * (x.numel() / scale.numel() + 4) * sizes
    assert bool(((ours[1] - theirs[1]).abs() <= bound).all())
    return theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("of_gradient", LAYOUTS)
@pytest.mark.parametrize("of_values", ["contiguous", "channels_last", "transposed", "expanded"])
def test_gradients_equal_those_of_plain_operators_in_every_memory_layout(dtype, scales, of_gradient, of_values):
    grid = Grid(3)
    shape = SCALES[scales]
    scale = torch.linspace(0.1, 0.3, math.prod(shape), dtype=dtype).view(shape)
    zero_point = torch.full(shape, 1, dtype=torch.int32)
    x = LAYOUTS[of_values](spread(dtype, 0, scale, zero_point, grid))
    gradient = LAYOUTS[of_gradient](torch.randn(SHAPE, dtype=dtype, generator=torch.Generator().manual_seed(1)))
    for_x, _ = assert_gradients_are_those_of_autograd(x, scale, zero_point, grid, gradient)
    assert 0 < int((for_x == 0).sum()) < x.numel()


@pytest.mark.parametrize("zero_point", [-300, -9, 8, 40])
@pytest.mark.parametrize("scales", SCALES)
def test_gradients_equal_those_of_plain_operators_for_zero_points_outside_the_grid(zero_point, scales):
    grid = Grid(4)
    shape = SCALES[scales]
    scale = torch.linspace(0.1, 0.3, math.prod(shape), dtype=torch.float64).view(shape)
    offset = torch.full(shape, zero_point, dtype=torch.int32)
    x = spread(torch.float64, 0, scale, offset, grid)
    gradient = torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for_x, _ = assert_gradients_are_those_of_autograd(x, scale, offset, grid, gradient)
    assert 0 < int((for_x == 0).sum()) < x.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("grid", [Grid(2), Grid(3, signed=False), Grid(8)])
@pytest.mark.parametrize("zero_point", [0, 1, 200])
def test_gradients_on_ties_and_on_the_edges_of_the_range_are_exact(dtype, grid, zero_point):
    # Quarter steps of a scale that is a power of two: every number here is exact, so no tolerance is needed.
    quarters = torch.arange(4 * (grid.quant_min - 3), 4 * (grid.quant_max + 3) + 1, dtype=dtype)
    scale = torch.tensor(0.25, dtype=dtype)
    x = (quarters / 4 - zero_point) * scale
    weights = (torch.arange(len(x)) % 5 - 2).to(dtype)
    ours, theirs = (
        gradients(function, x, scale, torch.tensor(zero_point), grid, weights) for function in (fake_quantize, by_autograd)
    )
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])
    # By hand: half a step above the last code is still inside if the tie goes to that code.
    codes = torch.round(x / scale) + zero_point
    inside = (codes >= grid.quant_min) & (codes <= grid.quant_max)
    assert torch.equal(ours[0] != 0, inside & (weights != 0))


@pytest.mark.parametrize("learned", [(True, False), (False, True)])
def test_only_what_is_learned_gets_a_gradient(learned):
    x, scale = normals(100).requires_grad_(learned[0]), torch.tensor(0.1, requires_grad=learned[1])
    fake_quantize(x, scale, torch.tensor(0), Grid(4)).sum().backward()
    assert (x.grad is not None, scale.grad is not None) == learned
