"""Every place that draws random numbers has a stream of its own."""

import torch

from reverie.randomness import Seed


def test_every_stage_and_batch_draws_numbers_of_its_own():
    root = Seed(0)
    seeds = [root, root.at("synthesize"), root.at("synthesize", 1), root.at("synthesize", "1"), root.at("synthesize1"), Seed(1)]
    draws = [torch.rand(4, generator=seed.generator()) for seed in seeds]
    for index, draw in enumerate(draws):
        assert torch.equal(draw, torch.rand(4, generator=seeds[index].generator()))
        assert not any(torch.equal(draw, other) for other in draws[:index])


def test_seeds_stay_the_same_for_ever():
    # From the definition: python -c "import hashlib, json;
    # print(int(hashlib.sha256(b'[0, \"synthesize\", 3]').hexdigest()[:16], 16) // 2)"
    assert Seed(0).at("synthesize", 3).derived() == 8605667069757586336
