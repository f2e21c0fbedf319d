"""Equalized channels have equal ranges and the network computes what it did."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from reverie.graph.capture import capture
from reverie.graph.equalize import Pair, equalize, find_pairs
from reverie.graph.operators import aten


def uneven_(module):
    """Random weights, output channels of every layer between 1/30 and 30 times their size."""
    torch.manual_seed(0)
    for part in module.modules():
        if isinstance(part, nn.Conv1d | nn.Conv2d | nn.Linear):
            for parameter in part.parameters():
                nn.init.normal_(parameter, std=0.3)
            factors = torch.exp(torch.empty(part.weight.shape[0]).uniform_(-3.4, 3.4))
            part.weight.data.mul_(factors.view(-1, *[1] * (part.weight.dim() - 1)))
    return module


def pairs(module, shape):
    return find_pairs(capture(module, shape))


def assert_same_function(graph, equalized, shape):
    x = torch.randn(5, *shape)
    expected = graph(x)
    assert float((equalized(x) - expected).abs().max() / expected.abs().max()) < 1e-4


def spread(weight):
    """Largest over smallest channel range."""
    ranges = weight.flatten(1).abs().amax(1)
    return float(ranges.max() / ranges.min())


def assert_both_sides_agree(graph, module):
    """Every pair's layers have the same range in every channel they share: r1 = r2."""
    for pair in find_pairs(graph):
        first, second = (int(name.removeprefix("_")) for name in (pair.first, pair.second))
        rows = graph.get_buffer(f"{first}.weight").flatten(1).abs().amax(1)
        # Each group reads its own share of the channels.
        shares = graph.get_buffer(f"{second}.weight").abs().chunk(getattr(module[second], "groups", 1))
        columns = torch.cat([share.transpose(0, 1).flatten(1).amax(1) for share in shares])
        torch.testing.assert_close(rows, columns, rtol=1e-2, atol=0)


def inverted_residual(activation):
    return nn.Sequential(
        nn.Conv2d(6, 12, 1),
        activation,
        nn.Conv2d(12, 12, 3, padding=1, groups=12),
        activation,
        nn.Conv2d(12, 6, 1),
    )


def test_two_layers_get_the_scales_worked_out_by_hand():
    module = nn.Sequential(nn.Linear(1, 2), nn.ReLU6(), nn.Linear(2, 1))
    module[0].weight.data = torch.tensor([[8.0], [1.0]])
    module[0].bias.data = torch.tensor([4.0, 2.0])
    module[2].weight.data = torch.tensor([[2.0, 9.0]])
    equalized = equalize(capture(module, (1,)))
    # s = sqrt(r1 / r2) = 2 and 1/3.
    torch.testing.assert_close(equalized.get_buffer("0.weight"), torch.tensor([[4.0], [3.0]]))
    torch.testing.assert_close(equalized.get_buffer("0.bias"), torch.tensor([2.0, 6.0]))
    torch.testing.assert_close(equalized.get_buffer("2.weight"), torch.tensor([[4.0, 3.0]]))
    torch.testing.assert_close(equalized.get_buffer("_1_hardtanh_upper"), torch.tensor([3.0, 18.0]))
    torch.testing.assert_close(equalized.get_buffer("_1_hardtanh_lower"), torch.zeros(2))


@pytest.mark.parametrize(
    "activation", [nn.ReLU(), nn.ReLU6(), nn.Hardtanh(-0.5, 2.0), nn.LeakyReLU(0.1), nn.Identity()], ids=str
)
def test_a_depthwise_chain_keeps_its_outputs_while_ranges_come_together(activation):
    module = uneven_(inverted_residual(activation))
    graph = capture(module, (6, 8, 8))
    equalized = equalize(graph)
    assert_same_function(graph, equalized, (6, 8, 8))
    assert_both_sides_agree(equalized, module)
    for name in ("0.weight", "2.weight"):
        assert spread(equalized.get_buffer(name)) < 0.2 * spread(graph.get_buffer(name))


def test_relu6_gets_a_bound_for_every_channel_and_keeps_its_name():
    graph = capture(uneven_(inverted_residual(nn.ReLU6())), (6, 8, 8))
    equalized = equalize(graph)
    clips = [node for node in equalized.graph.nodes if node.target is aten.clamp.Tensor]
    assert [clip.name for clip in clips] == [node.name for node in graph.graph.nodes if "hardtanh" in node.name]
    for clip in clips:
        upper = equalized.get_buffer(f"{clip.name}_upper")
        assert upper.shape == (1, 12, 1, 1)
        assert bool((upper > 0).all())


def test_equalizing_again_changes_nothing_more():
    once = equalize(capture(uneven_(inverted_residual(nn.ReLU6())), (6, 8, 8)), tolerance=1e-6)
    twice = equalize(once, tolerance=1e-6)
    assert_same_function(once, twice, (6, 8, 8))
    for name, value in once.named_buffers():
        torch.testing.assert_close(twice.get_buffer(name), value, rtol=1e-3, atol=1e-5)


BETWEEN = {
    "maximum pooling": nn.MaxPool2d(2),
    "average pooling": nn.AvgPool2d(3, stride=2, padding=1),
    "zero padding": nn.ZeroPad2d(1),
    "reflection padding": nn.ReflectionPad2d(1),
    "pooling before the clipping": nn.Sequential(nn.MaxPool2d(2), nn.ReLU6()),
}


@pytest.mark.parametrize("between", BETWEEN.values(), ids=BETWEEN.keys())
def test_scales_pass_through_what_treats_channels_apart(between):
    module = uneven_(nn.Sequential(nn.Conv2d(3, 8, 3), between, nn.ReLU(), nn.Conv2d(8, 4, 1)))
    graph = capture(module, (3, 10, 10))
    equalized = equalize(graph)
    assert len(find_pairs(graph)) == 1
    assert_same_function(graph, equalized, (3, 10, 10))
    assert_both_sides_agree(equalized, module)


class SpatialMean(nn.Module):
    def __init__(self, keepdim):
        super().__init__()
        self.keepdim = keepdim

    def forward(self, x):
        return x.mean([2, 3], keepdim=self.keepdim)


@pytest.mark.parametrize(
    "head",
    [
        (nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.ReLU6()),
        (nn.ReLU6(), nn.AdaptiveAvgPool2d((1, 1)), nn.ReLU(), nn.Flatten()),
        (nn.ReLU6(), SpatialMean(keepdim=False)),
        (SpatialMean(keepdim=True), nn.ReLU6(), nn.Flatten()),
    ],
)
def test_scales_reach_a_linear_layer_behind_pooling_to_one_position(head):
    module = uneven_(nn.Sequential(nn.Conv2d(3, 8, 3), *head, nn.Linear(8, 4)))
    graph = capture(module, (3, 6, 6))
    equalized = equalize(graph)
    assert len(find_pairs(graph)) == 1
    assert_same_function(graph, equalized, (3, 6, 6))
    assert_both_sides_agree(equalized, module)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Sequential(nn.Conv2d(4, 8, 1, groups=2), nn.ReLU6(), nn.Conv2d(8, 6, 3, groups=2)), (4, 6, 6)),
        (nn.Sequential(nn.Conv2d(4, 8, 3, groups=4), nn.ReLU(), nn.Conv2d(8, 16, 1, groups=8)), (4, 6, 6)),
        (nn.Sequential(nn.Conv1d(4, 8, 3), nn.ReLU6(), nn.Conv1d(8, 2, 1, bias=False)), (4, 9)),
        (nn.Sequential(nn.Linear(4, 8), nn.ReLU6(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), (5, 4)),
        (nn.Sequential(nn.Conv2d(3, 8, 3, padding="same"), nn.ReLU6(), nn.Conv2d(8, 2, 3, padding="same")), (3, 6, 6)),
    ],
    ids=["grouped", "depthwise multiplier", "one-dimensional", "tokens", "same padding"],
)
def test_layers_of_every_kind_take_part(module, shape):
    graph = capture(uneven_(module), shape)
    assert len(find_pairs(graph)) == len([part for part in module if hasattr(part, "weight")]) - 1
    equalized = equalize(graph)
    assert_same_function(graph, equalized, shape)
    assert_both_sides_agree(equalized, module)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(4, 4, 1) for _ in range(3))

    def forward(self, x):
        y = F.relu(self.a(x))
        return self.c(y + self.b(y))


class SharedTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.b(F.relu(self.a(F.relu(self.a(x)))))


NOT_PAIRS = {
    "a tensor read twice": (Residual(), (4, 5, 5)),
    "a weight used twice": (SharedTwice(), (4,)),
    "an activation that bends": (nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)), (4,)),
    "a pooling over features": (nn.Sequential(nn.Linear(4, 4), nn.MaxPool1d(1), nn.Linear(4, 4)), (3, 4)),
    "a layer over another axis": (nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Linear(5, 4)), (4, 5, 5)),
    "a flattening of positions": (nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(100, 4)), (4, 5, 5)),
    "a padding with ones": (nn.Sequential(nn.Conv2d(4, 4, 1), nn.ConstantPad2d(1, 1.0), nn.Conv2d(4, 4, 3)), (4, 5, 5)),
    "a batch norm": (nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)), (4, 5, 5)),
}


@pytest.mark.parametrize(("module", "shape"), NOT_PAIRS.values(), ids=NOT_PAIRS.keys())
def test_where_scales_cannot_pass_nothing_changes(module, shape):
    graph = capture(module, shape)
    assert find_pairs(graph) == []
    equalized = equalize(graph)
    x = torch.randn(2, *shape)
    assert torch.equal(equalized(x), graph(x))


def test_pairs_say_what_is_between():
    assert pairs(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 2, 1)), (3, 4, 4)) == [
        Pair("_0", ("_1_relu", "_2_max_pool2d"), "_3")
    ]


def test_dead_channels_keep_their_scale_and_nothing_becomes_infinite():
    module = uneven_(inverted_residual(nn.ReLU6()))
    module[0].weight.data[2] = 0.0
    module[2].weight.data[5] = 0.0
    module[4].weight.data[:, 7] = 0.0
    graph = capture(module, (6, 8, 8))
    equalized = equalize(graph)
    assert all(bool(torch.isfinite(value).all()) for value in equalized.buffers())
    assert_same_function(graph, equalized, (6, 8, 8))
    assert float(equalized.get_buffer("_1_hardtanh_upper")[0, 2]) == 6.0


def test_no_channel_is_rescaled_beyond_the_limit():
    module = uneven_(inverted_residual(nn.ReLU6()))
    module[0].weight.data[3] *= 1e-9
    graph = capture(module, (6, 8, 8))
    bounded, free = equalize(graph, limit=10.0), equalize(graph)
    assert_same_function(graph, bounded, (6, 8, 8))
    assert float(bounded.get_buffer("_1_hardtanh_upper")[0, 3]) == pytest.approx(60.0)
    assert float(free.get_buffer("_1_hardtanh_upper")[0, 3]) > 6e2
    for name in ("_1_hardtanh_upper", "_3_hardtanh_upper"):
        factors = bounded.get_buffer(name) / 6
        assert bool((factors.log().abs() <= math.log(10.0) + 1e-5).all())


def test_the_graph_given_stays_as_it_was():
    graph = capture(uneven_(inverted_residual(nn.ReLU6())), (6, 8, 8))
    before = {key: value.clone() for key, value in graph.state_dict().items()}
    targets = [node.target for node in graph.graph.nodes]
    equalize(graph)
    assert [node.target for node in graph.graph.nodes] == targets
    assert all(torch.equal(value, before[key]) for key, value in graph.state_dict().items())
