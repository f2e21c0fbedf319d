"""SQuant: the sums of errors that the paper constrains, and by which codes."""

import pytest
import torch

from reverie.grid import Grid, quantize, symmetric_qparams
from reverie.rounding.squant import SQuant

# Float64 sums of up to 10,000 errors.
ROUNDING = 1e-9


def problem(shape, bits, reach, seed):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    grid, flat = Grid(bits), weight.flatten(1)
    scale, zero_point = symmetric_qparams(flat.amin(1) * reach, flat.amax(1) * reach, grid)
    column = (shape[0], *[1] * (len(shape) - 1))
    return weight, scale.view(column), zero_point.view(column), grid


def errors_of(codes, weight, scale, zero_point, grid):
    return codes.double() - (weight.double() / scale + zero_point)


SHAPES = [(16, 32, 3, 3), (16, 1, 3, 3), (8, 4, 5), (8, 64, 1, 1), (10, 1000), (4, 3, 7, 7)]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_errors_are_within_a_step_each_within_one_in_a_kernel_and_within_half_in_a_channel(shape, bits):
    for seed in range(3):
        given = problem(shape, bits, 1.0, seed)
        errors = errors_of(SQuant()(*given), *given)
        assert errors.abs().max() < 1
        assert errors.reshape(*shape[:2], -1).sum(-1).abs().max() <= 1 + ROUNDING
        assert errors.flatten(1).sum(-1).abs().max() <= 0.5 + ROUNDING
        if len(shape) > 2 and shape[1] == 1:
            assert errors.flatten(2).sum(-1).abs().max() <= 0.5 + ROUNDING


# Ranges of a third of the weights' leave most of those of two bits clipped.
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_clipped_weights_stay_at_the_end_and_the_others_make_good_for_them_within_the_grid(shape, bits):
    for seed in range(3):
        weight, scale, _, grid = given = problem(shape, bits, 0.3, seed)
        codes = SQuant()(*given)
        position = (weight.double() / scale).clamp(grid.quant_min, grid.quant_max)
        assert (codes - position).abs().max() < 1
        assert torch.equal(codes[position != weight.double() / scale], position[position != weight.double() / scale].float())
        # Whatever its channel asks for, no kernel's sum gets worse.
        after, before = (errors_of(made, *given).reshape(*shape[:2], -1).sum(-1).abs() for made in (codes, quantize(*given)))
        assert (after <= before.clamp(min=1) + ROUNDING).all()


def test_a_channel_makes_good_for_the_few_weights_that_are_clipped():
    for seed in range(3):
        given = problem((16, 32, 3, 3), 4, 0.7, seed)
        assert (errors_of(quantize(*given), *given).abs() > 0.6).any()
        errors = errors_of(SQuant()(*given), *given)
        assert errors.flatten(1).sum(-1).abs().max() <= 0.5 + ROUNDING


def test_nearest_rounding_keeps_none_of_these_sums():
    given = problem((16, 32, 3, 3), 4, 1.0, 0)
    errors = errors_of(quantize(*given), *given)
    assert errors.flatten(2).sum(-1).abs().max() > 1 and errors.flatten(1).sum(-1).abs().max() > 3


def rounded(steps):
    """SQuant's codes of weights given in steps of a 4-bit grid."""
    weight = torch.tensor(steps)
    column = (len(weight), *[1] * (weight.dim() - 1))
    return SQuant()(weight, torch.ones(column), torch.zeros(column, dtype=torch.int32), Grid(4)).tolist()


def test_the_largest_errors_of_the_sums_sign_flip_first_by_hand():
    # Errors of the nearest codes: -0.4, -0.3, -0.45, +0.2, -0.2: their sum -1.15 asks for one flip, that of 2.45.
    assert rounded([[[1.4, 1.3, 2.45, 1.8, 3.2]]]) == [[[1, 1, 3, 2, 3]]]


def test_a_kernels_candidate_flips_for_its_channel_by_hand():
    # Sums of -0.45, -0.4, -0.35: each kernel is left alone, their channel (-1.2) flips the largest error of the three candidates.
    assert rounded([[[1.3, 2.15], [1.4, 3.0], [1.05, 2.3]]]) == [[[1, 2], [2, 3], [1, 2]]]
    # Sums of -0.7 and -0.65 flip one code each, which leaves +0.3 and +0.35; with the third's +0.3 the channel has +0.95. Candidates have
    # errors of +0.6, +0.65 (the last flipped) and +0.3: the second flips back.
    assert rounded([[[1.4, 2.3], [1.35, 2.3], [1.7, 2.0]]]) == [[[2, 2], [1, 2], [2, 2]]]


def test_a_linear_layer_has_only_the_channels_stage():
    # -0.3 twice, -0.4, +0.1, -0.2: the sum -1.1 asks for one flip.
    assert rounded([[1.3, 2.3, 1.4, 0.9, 4.2]]) == [[1, 2, 2, 1, 4]]


def test_weights_that_are_zero_stay_zero_and_clipped_ones_at_the_end():
    weight = torch.randn(8, 16, 3, 3, generator=torch.Generator().manual_seed(0))
    weight[:, ::2] = 0.0
    scale, zero_point = torch.full((8, 1, 1, 1), 0.5), torch.zeros(8, 1, 1, 1, dtype=torch.int32)
    codes = SQuant()(weight, scale, zero_point, Grid(2))
    assert (codes[:, ::2] == 0).all()
    assert (codes[weight / scale > 1] == 1).all() and (codes[weight / scale < -2] == -2).all()


def test_it_lowers_the_error_of_answers_to_inputs_that_are_alike_nearby():
    # Smooth, positive inputs, as behind a ReLU: what the paper's approximation of the second moments stands for.
    generator = torch.Generator().manual_seed(0)
    images = torch.nn.functional.avg_pool2d(torch.rand(64, 16, 12, 12, generator=generator), 3, stride=1)
    for seed in range(4):
        weight, scale, zero_point, grid = problem((16, 16, 3, 3), 4, 0.9, seed)
        wrong = [
            torch.nn.functional.conv2d(images, (codes - zero_point) * scale - weight).square().mean()
            for codes in (SQuant()(weight, scale, zero_point, grid), quantize(weight, scale, zero_point, grid))
        ]
        assert wrong[0] < 0.2 * wrong[1]
