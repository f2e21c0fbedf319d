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
    # Nothing is computed before somebody asks.
    assert cache.used == 0
    fisher.rows("_1_tanh", torch.arange(3))
    assert cache.used == 10 * (5 + 4) * 4
    fisher.release("_1_tanh")
    assert cache.used == 10 * 4 * 4


class Few(Cache):
    """Room for so many tensors."""

    def __init__(self, count):
        super().__init__()
        self.count = count

    def room(self, rows, like):
        if len(self._used) == self.count:
            raise CacheFull
        return super().room(rows, like)


@pytest.mark.parametrize("count", [1, 2])
def test_where_only_some_fit_the_others_wait_for_room(graph, count):
    inputs = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    tensors, picked = ["_0", "_1_tanh", "_2"], torch.tensor([39, 0, 7])
    whole = Fisher(graph, inputs, tensors, seed=Seed(0), cache=Cache())
    cache = Few(count)
    fisher = Fisher(graph, inputs, tensors, seed=Seed(0), cache=cache)
    for name in tensors:
        torch.testing.assert_close(fisher.rows(name, picked), whole.rows(name, picked))
        assert 0 < len(cache._used) <= count
        fisher.release(name)


class Windows(nn.Module):
    """Four windows of every image are rows of their own."""

    def __init__(self):
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(16, 3)

    def forward(self, x):
        return self.last(self.inner(self.first(x).reshape(-1, 4)).tanh().reshape(x.shape[0], 16))


@pytest.mark.parametrize("cache", [Cache, Nowhere])
def test_windows_have_the_weights_of_their_own_image(cache):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        graph = capture(Windows(), (4, 4))
    inputs = torch.randn(40, 4, 4, generator=torch.Generator().manual_seed(0))
    fisher = Fisher(graph, inputs, ["inner"], seed=Seed(0), cache=cache())
    weights = fisher.rows("inner", torch.arange(160)).view(40, 4, 4)
    torch.testing.assert_close(weights.mean((1, 2)), torch.ones(40))
    picked = torch.tensor([159, 1, 34, 34])
    torch.testing.assert_close(fisher.rows("inner", picked), weights.view(160, 4)[picked])
    # Of one image, written out.
    last = graph.get_buffer("last.weight")
    hidden = (inputs[8] @ graph.get_buffer("first.weight").T + graph.get_buffer("first.bias")) @ graph.get_buffer(
        "inner.weight"
    ).T
    hidden = torch.tanh(hidden + graph.get_buffer("inner.bias")).flatten()
    answer = (last @ hidden + graph.get_buffer("last.bias")).softmax(0)
    candidates = []
    for label in range(3):
        squared = (((answer - torch.eye(3)[label]) @ last) * (1 - hidden.square())).square()
        candidates.append(squared / squared.mean())
    assert any(torch.allclose(weights[8].flatten(), candidate, rtol=1e-4) for candidate in candidates)
