"""The estimate of the drop: its arithmetic against numbers worked out by hand, and what must hold of any estimate."""

import math
from dataclasses import asdict, replace
from itertools import pairwise

import pytest
import torch

from reverie.errors import ConfigError
from reverie.recipes import read
from reverie.report.estimate import CALIBRATED, Relation, distances

# At a distance of 0.1 the logarithm of the drop and the offset is 3 + 1 * log(0.1) = log(2.0086).
STRAIGHT = Relation(intercept=3.0, slope=1.0, spread=0.4, smallest=0.01, largest=0.5)


def spread_out(mean, deviation, count):
    """Half of the distances above the mean, half below; `deviation` is the one of a sample."""
    shift = deviation * math.sqrt((count - 1) / count)
    return torch.tensor([mean - shift, mean + shift] * (count // 2), dtype=torch.float64)


def test_the_distance_is_half_of_what_the_probabilities_differ_by():
    teacher = torch.tensor([[0.7, 0.2, 0.1], [0.7, 0.2, 0.1], [1.0, 1e-30, 1e-30]]).log()
    student = torch.tensor([[0.7, 0.2, 0.1], [0.4, 0.4, 0.2], [1e-30, 1.0, 1e-30]]).log() + 5.0
    assert distances(teacher, student).tolist() == pytest.approx([0.0, 0.3, 1.0], abs=1e-6)


def test_the_estimate_and_its_interval_are_those_worked_out_by_hand():
    # The standard error of the mean is 0.04 / sqrt(16) = 0.01, a tenth of it; hypot(0.4, 0.1) = 0.41231; times 1.64485 it is 0.67820.
    found = STRAIGHT(spread_out(0.1, 0.04, 16))
    assert found.images == 16 and found.distance == pytest.approx(0.1)
    assert 100 * found.drop == pytest.approx(2.00855 - 0.5, abs=1e-4)
    assert 100 * found.low == pytest.approx(2.00855 / 1.97032 - 0.5, abs=1e-3)
    assert 100 * found.high == pytest.approx(2.00855 * 1.97032 - 0.5, abs=1e-3)


def test_a_larger_distance_is_a_larger_drop():
    found = [
        CALIBRATED(torch.full((32,), distance)) for distance in torch.linspace(CALIBRATED.smallest, CALIBRATED.largest, 20)
    ]
    for before, after in pairwise(found):
        assert before.drop <= after.drop and before.low <= after.low and before.high <= after.high
    assert found[0].drop < found[-1].drop
    assert all(part.low <= part.drop <= part.high for part in found)


def test_fewer_images_widen_the_interval_and_leave_the_estimate():
    few, many = (STRAIGHT(spread_out(0.1, 0.08, count)) for count in (8, 128))
    assert few.drop == pytest.approx(many.drop)
    assert few.low < many.low < many.high < few.high


def test_a_network_that_answers_the_same_has_lost_next_to_nothing():
    found = CALIBRATED(torch.zeros(32))
    assert found.distance == found.low == 0.0
    assert found.drop < 0.005
    assert found.high < 0.02


def test_beyond_what_was_measured_only_a_bound_is_given():
    edge, beyond = (STRAIGHT(torch.full((16,), distance)) for distance in (0.5, 0.9))
    assert edge.drop is not None and edge.high is not None
    assert (beyond.drop, beyond.high) == (None, None)
    assert beyond.low == pytest.approx(edge.low)


def test_nobody_loses_more_than_everything():
    steep = replace(STRAIGHT, intercept=9.0)
    found = steep(torch.full((16,), 0.5))
    assert found.high == found.drop == 1.0
    assert set(asdict(found)) == {"images", "distance", "drop", "low", "high"}


@pytest.mark.parametrize("count", [1, 7])
def test_too_few_images_to_tell_how_much_they_differ_are_refused(count):
    with pytest.raises(ConfigError) as caught:
        read("zeroq", {"estimate_images": count})
    assert str(caught.value) == (
        f"recipe zeroq: estimate_images must be at least 8, or 0, got {count}; fewer do not tell how much they differ"
    )
