"""Channels are followed through changes of shape, on networks whose channels are known."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from reverie.graph.capture import capture
from reverie.graph.channels import channel_axes, reshaped
from reverie.graph.taps import shapes


@pytest.mark.parametrize(
    ("axes", "before", "after", "expected"),
    [
        ((1,), (2, 8, 3, 5), (2, 8, 15), (1,)),
        ((2,), (2, 15, 8), (2, 3, 5, 8), (3,)),
        # What is flattened together with channels is channels.
        ((1,), (2, 8, 3, 5), (2, 120), (1,)),
        ((1,), (1, 8, 1, 1), (1, 8), (1,)),
        ((1,), (1, 8), (1, 8, 1, 1), (1,)),
        # Heads, and back.
        ((2,), (1, 49, 96), (1, 49, 3, 4, 8), (2, 3, 4)),
        ((2, 3), (1, 49, 4, 8), (1, 49, 32), (2,)),
        # Windows, and rows of them.
        ((1,), (1, 8, 6, 6), (1, 8, 2, 3, 2, 3), (1,)),
        ((5,), (1, 2, 2, 3, 3, 8), (4, 9, 8), (2,)),
        # Nothing but channels of one value.
        ((1,), (1, 1, 8, 8), (1, 64), (1,)),
        ((), (1, 8, 8), (1, 64), ()),
    ],
)
def test_a_reshape_takes_channels_along(axes, before, after, expected):
    assert reshaped(axes, before, after) == expected


class ConvNeXt(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 8, 2, stride=2), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm, self.up, self.down, self.head = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        y = self.down(F.gelu(self.up(self.norm(self.depthwise(x).permute(0, 2, 3, 1)))))
        return self.head((x + y.permute(0, 3, 1, 2)).mean((2, 3)))


class Swin(nn.Module):
    """Tokens of patches, attention of two heads within windows of 2 x 2, and a classifier."""

    def __init__(self):
        super().__init__()
        self.patches, self.qkv, self.out, self.head = nn.Conv2d(3, 8, 2, 2), nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x):
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        side = 4
        grid = tokens.view(-1, side // 2, 2, side // 2, 2, 8)
        windows = grid.permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, 8)
        q, k, v = self.qkv(windows).reshape(-1, 4, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, 4, 8))
        back = mixed.reshape(-1, side // 2, side // 2, 2, 2, 8).permute(0, 1, 3, 2, 4, 5).reshape(-1, side * side, 8)
        return self.head((tokens + back).mean(1))


class Shuffled(nn.Module):
    """Channels in two groups, shuffled, one of two halves worked on."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(4, 4, 1), nn.Linear(8 * 36, 5)

    def forward(self, x):
        y = self.first(x)
        y = y.view(-1, 2, 4, 6, 6).transpose(1, 2).reshape(-1, 8, 6, 6)
        left, right = y.chunk(2, 1)
        return self.head(torch.cat([left, self.second(right).sigmoid()], 1).flatten(1))


def channels(network):
    """By tensor, how many channels it has."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        graph = capture(network, (3, 8, 8))
    sizes = shapes(graph, torch.zeros(1, 3, 8, 8))
    axes = channel_axes(graph, torch.zeros(1, 3, 8, 8))
    return {name: [sizes[name][axis] for axis in found] for name, found in axes.items() if name in sizes}


def test_permutes_of_convnext_are_followed():
    found = channels(ConvNeXt())
    assert found.pop("x") == [3]
    assert found.pop("head") == [5]
    assert {name: sizes for name, sizes in found.items() if sizes != [8]} == {"up": [16], "gelu": [16]}


def test_windows_and_heads_of_swin_are_followed():
    found = channels(Swin())
    assert found["patches"] == found["out"] == [8] and found["qkv"] == [24]
    (attention,) = [sizes for name, sizes in found.items() if name.startswith("scaled_dot_product")]
    assert attention == [2, 4]
    inside = {"x", "head", "qkv"}
    assert {tuple(sizes) for name, sizes in found.items() if name not in inside} == {(8,), (2, 4), (3, 2, 4)}


def test_groups_are_shuffled_and_features_are_flattened():
    found = channels(Shuffled())
    assert [sizes for name, sizes in found.items() if name.startswith(("view", "reshape"))] == [[2, 4], [8], [288]]
    assert found["second"] == [4] and found["cat"] == [8]
