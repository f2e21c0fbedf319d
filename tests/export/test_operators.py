"""What networks are made of, each in a small one: ONNX Runtime executes all layers as integers and agrees with the student."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from reverie.export import _verify as verify
from reverie.export.onnx import Onnx
from reverie.graph.capture import capture
from reverie.graph.fold import fold_batch_norms
from reverie.runtimes.onnxruntime import OnnxRuntime

SHAPE = (3, 16, 16)


class Tail(nn.Module):
    """Convolutions whose activation is no clipping one."""

    def __init__(self, activation):
        super().__init__()
        self.stem, self.inner, self.head = nn.Conv2d(3, 8, 3, stride=2), nn.Conv2d(8, 8, 3), nn.Linear(8, 5)
        self.activation = activation

    def forward(self, x):
        x = self.activation(self.stem(x))
        return self.head((x[:, :, 1:-1, 1:-1] + self.activation(self.inner(x))).mean((2, 3)))


class Gated(nn.Module):
    """Squeeze and excitation: a product with what a mean of the same tensor becomes."""

    def __init__(self):
        super().__init__()
        self.stem, self.squeeze, self.excite = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = F.hardswish(self.stem(x))
        gate = F.hardsigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))))
        return self.head((x * gate).mean((2, 3)))


class Grouped(nn.Module):
    """Grouped, depthwise, dilated and one-dimensional kernels, and channels shuffled between groups."""

    def __init__(self):
        super().__init__()
        self.stem, self.grouped = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1, groups=3)
        self.depthwise = nn.Conv2d(12, 24, 3, padding=2, dilation=2, groups=12)
        self.row, self.head = nn.Conv2d(24, 8, (1, 7), padding=(0, 3)), nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.grouped(F.relu(self.stem(x))))
        batch, channels, height, width = x.shape
        x = x.view(batch, 3, channels // 3, height, width).transpose(1, 2).reshape(batch, channels, height, width)
        return self.head(F.relu(self.row(F.relu6(self.depthwise(x)))).mean((2, 3)))


class Pools(nn.Module):
    """Averages and maxima, with padding, ceiling and global, each followed by a layer, and their concatenation."""

    def __init__(self):
        super().__init__()
        self.stem, self.average, self.largest = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        average = self.average(F.avg_pool2d(x, 3, stride=2, padding=1))
        largest = self.largest(F.max_pool2d(x, 2, stride=2, ceil_mode=True))
        return self.head(F.adaptive_max_pool2d(torch.cat([average, largest], dim=1), 1).flatten(1))


class Perceptron(nn.Module):
    """Linear layers alone, one of them without bias."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(768, 32), nn.Linear(32, 32, bias=False), nn.Linear(32, 5)

    def forward(self, x):
        x = F.relu(self.first(x.flatten(1)))
        return self.third(F.gelu(self.second(x)) + x)


class Tokens(nn.Module):
    """Linear layers over tokens, layer norms, and attention, whose products have no stored weight."""

    def __init__(self):
        super().__init__()
        self.patches, self.norm = nn.Conv2d(3, 16, 4, stride=4), nn.LayerNorm(16)
        self.qkv, self.out, self.head = nn.Linear(16, 48), nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        batch, tokens, width = x.shape
        query, key, value = self.qkv(self.norm(x)).reshape(batch, tokens, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(batch, tokens, width)
        return self.head((x + self.out(mixed)).mean(1))


class Reused(nn.Module):
    """One tensor that layers, sums, a concatenation and the output read; one weight that two layers share."""

    def __init__(self):
        super().__init__()
        self.stem, self.one, self.other = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.other.weight = self.one.weight
        self.last, self.head = nn.Conv2d(24, 8, 1), nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        one, other = self.one(x) + x, F.relu(self.other(x)) - x
        joined = F.relu(self.last(torch.cat([x, one, other], dim=1)))
        return self.head((joined + x).mean((2, 3)))


NETWORKS = {
    "hard-swish": lambda: Tail(nn.Hardswish()),
    "SiLU": lambda: Tail(nn.SiLU()),
    "GELU": lambda: Tail(nn.GELU()),
    "leaky ReLU": lambda: Tail(nn.LeakyReLU(0.1)),
    "gated": Gated,
    "grouped": Grouped,
    "pools": Pools,
    "perceptron": Perceptron,
    "tokens": Tokens,
    "reused": Reused,
}


@pytest.mark.parametrize("bits", [(8, 8), (4, 4), (3, 5), (2, 2)], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_it_runs_as_integers_and_as_the_student(name, bits, quantizer, images, tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        graph = fold_batch_norms(capture(NETWORKS[name]().eval(), SHAPE))
    network, path = quantizer(graph, images, *bits, 8, sums=8 if bits == (4, 4) else None), tmp_path / "network.onnx"
    Onnx()(network, SHAPE, path)
    verify.assert_integer(path, network)
    parity = verify.measure_parity(network, path, images)
    verify.assert_parity(parity)
    assert parity.per_tensor.keys() == network.activations.keys()
    for batch in (1, 7):
        session = OnnxRuntime().open(path)
        answers = verify.predict(session, images[:14], batch=batch)
        assert torch.allclose(answers, verify.predict(session, images[:14]), atol=1e-5)
