"""What is summed and what is multiplied are apart, and nothing else is changed."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from reverie.graph.capture import capture
from reverie.graph.operators import SAME
from reverie.graph.placement import place
from reverie.graph.sums import is_only_summed, separate_sums


class Streams(nn.Module):
    """Every way in which a tensor that is summed is read by something else."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(4, 4, 1) for _ in range(4))
        self.shift = nn.Parameter(torch.ones(4, 1, 1))
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        # Two layers and a sum read it.
        first = F.relu(self.a(x))
        second = first + self.b(first) - self.c(first)
        # A layer reads it moved, a sum as it is.
        third = second + self.d(F.max_pool2d(second, 1))
        # What reads it besides the sum computes in float.
        fourth = third + self.norm(third)
        # A gate reads its mean; adding numbers and stored tensors is no sum.
        fifth = fourth + 1.0 + self.shift
        gated = fifth * fifth.mean((2, 3), keepdim=True)
        return self.a(gated).mean((2, 3))


@pytest.fixture
def graph():
    torch.manual_seed(0)
    return capture(Streams().eval(), (4, 6, 6))


def readers(graph):
    return {node.args[0].name: sorted(user.name for user in node.users) for node in graph.graph.nodes if node.target is SAME}


def test_what_layers_read_of_a_summed_tensor_is_a_node_of_its_own(graph):
    separated = separate_sums(graph)
    assert readers(separated) == {"relu": ["b", "c"], "sub": ["max_pool2d"]}
    assert [node.name for node in separated.graph.nodes if node.target is SAME] == ["relu_for_layers", "sub_for_layers"]


def test_the_function_is_the_same_and_the_graph_given_is_left_alone(graph):
    before = [str(node) for node in graph.graph.nodes]
    x = torch.randn(3, 4, 6, 6)
    with torch.no_grad():
        assert torch.equal(separate_sums(graph)(x), graph(x))
    assert [str(node) for node in graph.graph.nodes] == before


def third_stream(graph):
    (norm,) = [node for node in graph.graph.nodes if node.name == "norm_batch_norm"]
    return norm.args[0].name


def test_what_is_only_summed(graph):
    separated = separate_sums(graph)
    found = [node.name for node in separated.graph.nodes if is_only_summed(node)]
    # `a_1` is averaged; the third stream is read in float besides.
    assert found == ["relu", "b", "add", "c", "sub", "d", third_stream(separated), "norm_batch_norm", "a_1"]


def test_each_has_its_bits(graph):
    separated = separate_sums(graph)
    student = place(separated, "integer", weight_bits=4, activation_bits=3, end_bits=8, sum_bits=7)
    bits = {name: quantizer.grid.bits for name, quantizer in student.activations.items()}
    assert [bits[name] for name in ("relu", "b", "sub", third_stream(separated))] == [7, 7, 7, 7]
    assert [bits[name] for name in ("relu_for_layers", "sub_for_layers", "mul")] == [3, 3, 8]
    assert student.layers["b"].source == "relu_for_layers" and student.layers["d"].source == "sub_for_layers"
