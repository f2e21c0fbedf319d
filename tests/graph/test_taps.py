"""Any tensor by name, and only what it needs is computed."""

import pytest
import torch
from torch import nn

from reverie.errors import ConfigError
from reverie.graph.capture import capture
from reverie.graph.taps import shapes, tap


@pytest.fixture
def module():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))


def test_tapped_tensors_are_those_of_the_module(module):
    x = torch.randn(3, 3, 4, 4)
    graph = capture(module, (3, 4, 4))
    tapped = tap(graph, ["_1_relu", "input_1"])
    answered = tapped(x)
    assert list(answered) == ["_1_relu", "input_1"]
    assert torch.equal(answered["_1_relu"], module[:2](x))
    assert answered["input_1"] is x
    assert "_3" not in [node.name for node in tapped.graph.nodes]
    assert torch.equal(graph(x), module(x))


def test_taps_share_the_weights(module):
    graph = capture(module, (3, 4, 4))
    tapped = tap(graph, ["_0"])
    graph.get_buffer("0.weight").zero_()
    graph.get_buffer("0.bias").fill_(2.0)
    assert bool((tapped(torch.randn(1, 3, 4, 4))["_0"] == 2.0).all())


def test_an_unknown_tensor_is_refused(module):
    with pytest.raises(ConfigError) as caught:
        tap(capture(module, (3, 4, 4)), ["_0", "layer9"])
    assert str(caught.value) == ("tap: tensors must be nodes of the graph, got 'layer9'; see `reverie inspect` for the names")


def test_shapes_are_those_of_the_example(module):
    found = shapes(capture(module, (3, 4, 4)), torch.zeros(5, 3, 4, 4))
    assert {name: found[name] for name in ("_0", "_1_relu", "_3")} == {
        "_0": (5, 4, 2, 2),
        "_1_relu": (5, 4, 2, 2),
        "_3": (5, 2),
    }
