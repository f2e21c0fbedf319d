"""A walk computes each tensor once, in batches, with the weights as they are when it gets there."""

import pytest
import torch
from torch import nn

from reverie.graph.capture import capture
from reverie.graph.taps import tap
from reverie.graph.walk import Walk


@pytest.fixture
def graph():
    torch.manual_seed(0)
    return capture(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), (3,))


def test_reading_tensors_on_the_way_disturbs_nothing(graph):
    x = torch.randn(7, 3)
    names = ["_0", "_1_relu", "_2", "_3_relu", "_4"]
    whole = tap(graph, names)(x)
    walk = Walk(graph, x, batch=3, keep=names)
    for name in names:
        walk.to(name)
        torch.testing.assert_close(walk.value(name), whole[name])
        assert walk.value(name) is walk.value(name)


def test_the_input_is_read_without_a_copy(graph):
    x = torch.randn(7, 3)
    walk = Walk(graph, x, batch=3, keep=["input_1"])
    walk.to("_0")
    assert walk.value("input_1") is x


def test_a_walk_goes_on_with_the_weights_as_they_are_by_then(graph):
    x = torch.randn(5, 3)
    walk = Walk(graph, x, batch=2, keep=["_1_relu", "_4"])
    walk.to("_1_relu")
    before = walk.value("_1_relu").clone()
    graph.get_buffer("0.weight").zero_()
    graph.get_buffer("4.weight").zero_()
    walk.to("_4")
    assert torch.equal(walk.value("_1_relu"), before)
    assert torch.equal(walk.value("_4"), graph.get_buffer("4.bias").expand(5, 2))


def test_only_what_is_still_needed_is_held(graph):
    walk = Walk(graph, torch.randn(5, 3), batch=2, keep=["_1_relu"])
    walk.to("_3_relu")
    walk.value("_1_relu")
    with pytest.raises(KeyError):
        walk.value("_0")
    walk.release("_1_relu")
    walk.to("_4")
    with pytest.raises(KeyError):
        walk.value("_1_relu")


class Windows(nn.Module):
    """Puts two windows of every image into the batch axis and takes them back, as windowed attention does."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        windows = self.inner(x.reshape(-1, 4))
        return windows.reshape(x.shape[0], 8) + x


def test_tensors_with_more_rows_than_images_keep_their_rows_apart():
    graph = capture(Windows(), (8,))
    x = torch.randn(5, 8)
    walk = Walk(graph, x, batch=2, keep=["inner", "add"])
    walk.to("inner")
    torch.testing.assert_close(walk.value("inner"), tap(graph, ["inner"])(x)["inner"])
    walk.to("add")
    torch.testing.assert_close(walk.value("add"), graph(x))
