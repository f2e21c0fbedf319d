"""Batch norms fold where, and only where, the result is the same."""

import pytest
import torch
from torch import nn

from reverie.graph.capture import capture
from reverie.graph.fold import fold_batch_norms, obstacle
from reverie.graph.operators import BATCH_NORM


def remember_something_(norm):
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)


def captured(module, shape):
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            remember_something_(part)
    return capture(module, shape)


def kept(graph):
    return [node.name for node in graph.graph.nodes if node.target is BATCH_NORM]


def obstacles(graph):
    return {node.name: obstacle(node) for node in graph.graph.nodes if node.target is BATCH_NORM}


def test_folded_weights_are_those_worked_out_by_hand():
    module = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1, eps=0.0))
    state = {"0.weight": 3.0, "0.bias": 1.0, "1.weight": 2.0, "1.bias": 0.5, "1.running_mean": -1.0, "1.running_var": 16.0}
    module.load_state_dict(
        {key: torch.tensor([value]).view_as(module.state_dict()[key]) for key, value in state.items()}, False
    )
    folded = fold_batch_norms(capture(module, (1, 2, 2)))
    # g = 2 / sqrt(16) = 0.5; W' = 3 g; b' = (1 + 1) g + 0.5.
    assert float(folded.get_buffer("0.folded_weight")) == 1.5
    assert float(folded.get_buffer("0.folded_bias")) == 1.5
    assert set(folded.state_dict()) == {"0.folded_weight", "0.folded_bias"}


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)), (3, 5, 5)),
        (nn.Sequential(nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8), nn.ReLU()), (4, 5, 5)),
        (nn.Sequential(nn.Conv2d(3, 4, 3, padding="same"), nn.BatchNorm2d(4)), (3, 5, 5)),
        (nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)), (3, 5)),
        (nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4)), (3,)),
        (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4), nn.BatchNorm1d(4)), (3,)),
    ],
)
def test_every_kind_of_layer_takes_its_batch_norm_in(module, shape):
    graph = captured(module, shape)
    x = torch.randn(3, *shape)
    folded = fold_batch_norms(graph)
    assert kept(folded) == []
    torch.testing.assert_close(folded(x), graph(x), rtol=1e-4, atol=1e-5)


class SharedLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.first, self.second = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4)

    def forward(self, x):
        return self.second(self.layer(self.first(self.layer(x))))


def test_a_layer_used_twice_folds_each_use_on_its_own():
    graph = captured(SharedLayer(), (4,))
    x = torch.randn(3, 4)
    folded = fold_batch_norms(graph)
    assert kept(folded) == []
    torch.testing.assert_close(folded(x), graph(x), rtol=1e-4, atol=1e-5)


class ReadTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x):
        y = self.layer(x)
        return self.norm(y) + y


class NormOfTokens(nn.Module):
    """A batch norm over the axis of 4 tokens, behind a linear layer with as many outputs."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x):
        return self.norm(self.layer(x))


@pytest.mark.parametrize(
    ("module", "shape", "reason"),
    [
        (
            nn.Sequential(nn.BatchNorm2d(3)),
            (3, 4, 4),
            "it normalizes 'input_1', which is not the output of a convolution or linear layer",
        ),
        (ReadTwice(), (4,), "'layer' is read by others too"),
        (NormOfTokens(), (4, 4), "it normalizes another axis of 'layer' than its outputs"),
    ],
)
def test_batch_norms_that_cannot_fold_stay_and_say_why(module, shape, reason):
    graph = captured(module, shape)
    x = torch.randn(3, *shape)
    folded = fold_batch_norms(graph)
    assert list(obstacles(graph).values()) == [reason]
    assert kept(folded) == kept(graph)
    assert torch.equal(folded(x), graph(x))


def test_the_graph_given_stays_as_it_was():
    graph = captured(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), (3, 5, 5))
    before = {key: value.clone() for key, value in graph.state_dict().items()}
    fold_batch_norms(graph)
    assert kept(graph) == ["_1_batch_norm"]
    assert all(torch.equal(value, before[key]) for key, value in graph.state_dict().items())
