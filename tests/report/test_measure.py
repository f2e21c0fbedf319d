import math

import pytest
import torch

from reverie.report.measure import accuracy, agreement, paired_interval, sizes


def test_accuracy_and_agreement_are_shares():
    first, second = torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 0, 4])
    assert accuracy(first, second) == 0.75
    assert agreement(first, first) == 1.0


def test_the_paired_interval_by_hand():
    """10 images: only the first right on 3, only the second on 1; cells 3.5 and 1.5 of 12."""
    first = torch.tensor([1, 1, 1, 0, 1, 1, 1, 1, 0, 0]).bool()
    second = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 0, 0]).bool()
    reach = 1.959964 * math.sqrt((5 / 12 - (2 / 12) ** 2) / 12)
    difference, low, high = paired_interval(first, second)
    assert difference == pytest.approx(0.2)
    assert (low, high) == pytest.approx((1 / 6 - reach, 1 / 6 + reach), abs=1e-6)


def test_the_paired_interval_is_antisymmetric_and_has_a_width_when_nothing_differs():
    right = torch.rand(200, generator=torch.Generator().manual_seed(0)) < 0.9
    other = right ^ (torch.rand(200, generator=torch.Generator().manual_seed(1)) < 0.05)
    one, two = paired_interval(right, other), paired_interval(other, right)
    assert (one.difference, one.low, one.high) == pytest.approx((-two.difference, -two.high, -two.low))
    same = paired_interval(right, right)
    assert same.difference == 0
    assert -0.02 < same.low < 0 < same.high < 0.02


def test_the_paired_interval_contains_the_difference_even_at_the_end():
    one = paired_interval(torch.tensor([True]), torch.tensor([False]))
    assert one.low <= one.difference == one.high == 1.0


@pytest.mark.parametrize(("only_first", "only_second", "count"), [(0.03, 0.01, 1000), (0.004, 0.002, 1000), (0.1, 0.1, 50)])
def test_the_paired_interval_covers_the_true_difference_19_times_in_20(only_first, only_second, count):
    generator = torch.Generator().manual_seed(3)
    covered = 0
    for _ in range(1000):
        draw = torch.rand(count, generator=generator)
        first, second = draw < only_first, draw > 1 - only_second
        interval = paired_interval(first, second)
        covered += interval.low <= only_first - only_second <= interval.high
    # 0.95 less three standard errors of 1000 trials.
    assert covered >= 1000 * (0.95 - 3 * math.sqrt(0.95 * 0.05 / 1000))


def test_sizes_are_bytes_on_disk(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    assert sizes({"packed": tmp_path / "file"}) == {"packed": 5}
