"""Units of a small graph, worked out by hand; and units on their own."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from reverie.graph.capture import capture
from reverie.graph.extract import extract
from reverie.graph.placement import place
from reverie.graph.taps import tap
from reverie.graph.units import Unit, find_units


class Small(nn.Module):
    """A stem, a residual block behind a split of channels, a pooling, a classifier."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.a, self.b = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        y = F.relu(self.stem(x))
        left, right = y.chunk(2, dim=1)
        y = torch.cat([left, self.b(F.relu(self.a(right)))], 1)
        return self.head(F.adaptive_avg_pool2d(y, 1).flatten(1))


@pytest.fixture
def graph():
    torch.manual_seed(0)
    return capture(Small(), (3, 4, 4))


def test_a_layer_comes_with_its_activation(graph):
    assert find_units(graph, "layer") == [
        Unit("relu", ("stem", "relu"), ("x",), "relu", ("stem",)),
        Unit("relu_2", ("a", "relu_2"), ("getitem_2",), "relu_2", ("a",)),
        Unit("b", ("b",), ("relu_2",), "b", ("b",)),
        Unit("head", ("head",), ("reshape",), "head", ("head",)),
    ]


def test_a_block_begins_with_the_split_and_ends_where_its_branches_join(graph):
    block = ("split", "getitem", "getitem_2", "a", "relu_2", "b", "cat", "adaptive_avg_pool2d", "reshape")
    assert find_units(graph, "block") == [
        Unit("relu", ("stem", "relu"), ("x",), "relu", ("stem",)),
        Unit("reshape", block, ("relu",), "reshape", ("a", "b")),
        Unit("head", ("head",), ("reshape",), "head", ("head",)),
    ]


def test_the_network_is_one_unit_without_its_input(graph):
    (unit,) = find_units(graph, "network")
    assert (unit.inputs, unit.output, unit.layers) == (("x",), "head", ("stem", "a", "b", "head"))


@pytest.mark.parametrize("kind", ["layer", "block", "network"])
def test_a_network_without_layers_has_no_network_or_layer_units(kind):
    graph = capture(nn.ReLU(), (3,))
    assert [unit.layers for unit in find_units(graph, kind)] == ([()] if kind == "block" else [])


def test_a_unit_of_a_student_reads_behind_and_answers_before_the_quantizers(graph):
    student = place(graph, "integer", weight_bits=8, activation_bits=8)
    for quantizer in student.activations.values():
        quantizer.set_qparams(torch.tensor(0.05), torch.tensor(100, dtype=torch.int32))
    block = find_units(graph, "block")[1]
    module, sources = extract(student.graph, block)
    assert sources == ("activation_quantizers_relu",)
    tapped = tap(student.graph, [*sources, block.output])(torch.randn(3, 3, 4, 4))
    assert torch.equal(module(tapped[sources[0]]), tapped[block.output])


def test_what_is_learned_in_a_unit_on_its_own_is_learned_in_the_graph(graph):
    block = find_units(graph, "block")[1]
    module, _ = extract(graph, block)
    module.get_buffer("a.weight").zero_()
    assert bool((graph.get_buffer("a.weight") == 0).all())
