"""What every observer must do, and what each one is for."""

import pytest
import torch

from reverie import observers, plugins
from reverie.grid import Grid, fake_quantize, symmetric_qparams
from reverie.observers import rows, tensor_qparams, weight_qparams
from reverie.observers.ema import Ema
from reverie.observers.minmax import MinMax
from reverie.observers.mse import Mse
from reverie.observers.percentile import Percentile

NAMES = plugins.names(observers)


@pytest.fixture(params=NAMES)
def observer(request):
    return plugins.load(observers, request.param)()


def seen(observer, *batches):
    watch = observer.watch()
    for batch in batches:
        watch.update(batch)
    return watch


def test_a_range_lies_within_what_was_seen_and_is_not_empty(observer):
    batches = [torch.randn(3, 500, generator=torch.Generator().manual_seed(index)) for index in range(4)]
    low, high = seen(observer, *batches).range(Grid(4), symmetric=False)
    everything = torch.cat(batches, dim=1)
    assert (low >= everything.amin(1)).all() and (high <= everything.amax(1)).all()
    assert (low < high).all()


def test_groups_do_not_mix(observer):
    values = torch.randn(2, 400, generator=torch.Generator().manual_seed(0))
    together = seen(observer, values).range(Grid(4), symmetric=True)
    alone = [seen(observer, values[index : index + 1]).range(Grid(4), symmetric=True) for index in range(2)]
    for end in range(2):
        assert torch.equal(together[end], torch.cat([ends[end] for ends in alone]))


def test_watches_are_independent_and_deterministic(observer):
    values = torch.randn(1, 100_000, generator=torch.Generator().manual_seed(0))
    seen(observer, values * 100)
    first, second = (seen(observer, values).range(Grid(8, signed=False), symmetric=False) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_a_dead_tensor_gets_a_usable_scale(observer):
    scale, zero_point = tensor_qparams(seen(observer, torch.zeros(1, 50)), Grid(8, signed=False))
    assert scale > 0 and zero_point == 0


def test_a_weight_gets_one_scale_per_output_channel(observer):
    weight = torch.randn(6, 3, 3, 3, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 7).view(6, 1, 1, 1)
    scale, zero_point = weight_qparams(weight, observer, Grid(4), symmetric=True)
    assert scale.shape == (6, 1, 1, 1) and not zero_point.any()
    error = (fake_quantize(weight, scale, zero_point, Grid(4)) - weight).abs().flatten(1)
    # No observer may do worse than twice the step of the bare range on a typical value.
    step = symmetric_qparams(weight.flatten(1).amin(1), weight.flatten(1).amax(1), Grid(4))[0]
    assert (error.median(dim=1).values <= step).all()


def test_minmax_is_the_exact_range_over_all_batches():
    low, high = seen(MinMax(), torch.tensor([[0.0, 2.0]]), torch.tensor([[-1.0, 1.0]])).range(Grid(), symmetric=False)
    assert (low.item(), high.item()) == (-1.0, 2.0)


def test_ema_is_the_plain_average_started_at_the_first_value():
    # By hand: 1, then 0.9 * 1 + 0.1 * 2 = 1.1, then 0.9 * 1.1 + 0.1 * 2 = 1.19.
    watch = seen(Ema(momentum=0.9), *(torch.tensor([[0.0, top]]) for top in (1.0, 2.0, 2.0)))
    assert watch.range(Grid(), symmetric=False)[1].item() == pytest.approx(1.19)


def test_percentile_cuts_the_tails_it_is_told_to():
    values = torch.arange(0, 1001, dtype=torch.float32).view(1, -1)
    low, high = seen(Percentile(percentile=90.0), values).range(Grid(), symmetric=False)
    assert (low.item(), high.item()) == pytest.approx((50.0, 950.0))


def test_mse_clips_outliers_and_beats_the_bare_range_in_its_own_error():
    values = torch.randn(1, 4000, generator=torch.Generator().manual_seed(0))
    values[0, 0] = 30.0
    grid = Grid(4, signed=False)

    def error(observer):
        scale, zero_point = tensor_qparams(seen(observer, values), grid)
        return (fake_quantize(values, scale, zero_point, grid) - values).abs().pow(2.4).mean()

    assert error(Mse()) < error(MinMax())
    assert seen(Mse(), values).range(grid, symmetric=False)[1].item() < 30.0


def test_a_sample_still_knows_the_exact_ends():
    values = torch.zeros(1, 200_000)
    values[0, 123_457] = 9.0
    low, high = seen(Mse(capacity=100, candidates=1), values).range(Grid(8, signed=False), symmetric=False)
    assert (low.item(), high.item()) == (0.0, 9.0)


def test_rows_of_a_tensor_are_one_group():
    assert rows(torch.zeros(2, 3, 4)).shape == (1, 24)
