"""AdaRound: what its formulas say."""

import pytest
import torch

from reverie.grid import Grid
from reverie.rounding.adaround import AdaRound


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
