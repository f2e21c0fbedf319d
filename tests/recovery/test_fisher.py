"""Weights of errors: the diagonal of the Fisher information, against gradients taken one image at a time."""

import pytest
import torch
from torch import nn

from reverie.graph.cache import Cache, CacheFull
from reverie.graph.capture import capture
from reverie.randomness import Seed
from reverie.recovery.fisher import Fisher


@pytest.fixture
def graph():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return capture(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)), (3,))


class Nowhere(Cache):
    def room(self, rows, like):
        raise CacheFull


@pytest.mark.parametrize("cache", [Cache, Nowhere])
def test_each_weight_is_the_squared_gradient_at_a_label_that_the_teacher_drew(graph, cache):
    inputs = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    fisher = Fisher(graph, inputs, ["_1_tanh", "_2"], seed=Seed(0), cache=cache())
    picked = torch.tensor([39, 0, 7])
    found = fisher.rows("_1_tanh", picked)
    last = graph.get_buffer("2.weight")
    for row, image in zip(found, picked, strict=True):
        hidden = torch.tanh(inputs[image] @ graph.get_buffer("0.weight").T + graph.get_buffer("0.bias"))
        answer = (hidden @ last.T + graph.get_buffer("2.bias")).softmax(0)
        candidates = []
        for label in range(4):
            squared = ((answer - torch.eye(4)[label]) @ last).square()
            candidates.append(squared / squared.mean())
        assert any(torch.allclose(row, candidate, rtol=1e-4) for candidate in candidates)


def test_labels_are_drawn_as_often_as_the_teacher_expects_them(graph):
    inputs = torch.zeros(4000, 3)
    fisher = Fisher(graph, inputs, ["_2"], seed=Seed(1), cache=Cache())
    expected = graph(inputs[:1]).softmax(1)[0]
    drawn = torch.bincount(fisher._labels, minlength=4) / 4000
    torch.testing.assert_close(drawn, expected, atol=0.03, rtol=0)


def test_released_weights_make_room(graph):
    cache = Cache()
    fisher = Fisher(graph, torch.randn(10, 3), ["_1_tanh", "_2"], seed=Seed(0), cache=cache)
    assert cache.used == 10 * (5 + 4) * 4
    fisher.release("_1_tanh")
    assert cache.used == 10 * 4 * 4
