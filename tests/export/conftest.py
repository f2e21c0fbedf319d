"""A small network with every pattern that the exporter treats specially, and how these tests quantize a network."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from reverie.export._onnx import export_float
from reverie.export.onnx import Onnx
from reverie.graph.capture import capture
from reverie.graph.fold import fold_batch_norms
from reverie.graph.placement import Bits, place
from reverie.graph.quantized import QuantizedNetwork, finish
from reverie.graph.sums import separate_sums
from reverie.graph.taps import tap
from reverie.grid import affine_qparams, symmetric_qparams


class Patterns(nn.Module):
    """Takes `(3, 16, 16)`. Has asymmetric padding, a depthwise layer, a residual add, a shortcut without parameters, a
    split, a concatenation, a clamp per channel, both poolings and a linear layer."""

    zero: Tensor
    bound: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(8)
        self.down = nn.Conv2d(8, 8, 3, stride=2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.expand = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.left = nn.Conv2d(8, 8, 1)
        self.bounded = nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16, 10)
        self.register_buffer("zero", torch.zeros(16, 1, 1))
        self.register_buffer("bound", torch.linspace(0.05, 0.4, 16).view(1, 16, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem_norm(self.stem(x)))
        x = F.relu6(self.down(F.pad(x, (0, 1, 0, 1))))
        x = x + F.relu6(self.depthwise(x))
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        x = F.relu(self.expand(x) + shortcut)
        left, right = x.chunk(2, dim=1)
        x = torch.cat([right, self.left(left)], dim=1)
        x = self.bounded(x).clamp(min=self.zero, max=self.bound)
        x = F.max_pool2d(x, 3, stride=1, padding=1)
        return self.head(x.mean((2, 3)))


@torch.no_grad()
def quantize(
    graph: fx.GraphModule,
    images: Tensor,
    weights: int,
    activations: int,
    ends: int | None,
    bits: Bits | None = None,
    sums: int | None = None,
    symmetric: bool = False,
) -> QuantizedNetwork:
    """The integer model with ranges from minimum to maximum; with bits of `sums`, those apart."""
    graph = graph if sums is None else separate_sums(graph)
    student = place(
        graph,
        "integer",
        weight_bits=weights,
        activation_bits=activations,
        end_bits=ends,
        sum_bits=sums,
        symmetric=symmetric,
        bits=bits,
    )
    qparams = symmetric_qparams if symmetric else affine_qparams
    for name, value in tap(graph, student.activations)(images).items():
        quantizer = student.activations[name]
        quantizer.set_qparams(*qparams(value.min(), value.max(), quantizer.grid))
    for name, quantizer in student.weights.items():
        largest = student.graph.get_buffer(student.layers[name].weight).flatten(1).abs().amax(1).view(quantizer.scale.shape)
        quantizer.set_qparams(*symmetric_qparams(-largest, largest, quantizer.grid))
    return finish(student)


@pytest.fixture(scope="session")
def images() -> Tensor:
    """Fifty images of noise for `Patterns`."""
    return torch.randn(50, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def patterns() -> fx.GraphModule:
    """`Patterns` with seeded weights, captured and folded."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Patterns()
        module.stem_norm.running_var.uniform_(0.5, 2)
        module.stem_norm.running_mean.normal_()
    return fold_batch_norms(capture(module, (3, 16, 16)))


@pytest.fixture(scope="session")
def quantized(patterns: fx.GraphModule, images: Tensor) -> Callable[..., QuantizedNetwork]:
    """Makes integer models of `Patterns`: `quantized(4, 8, 8)` has bits of weights, activations, ends."""

    def make(weights: int, activations: int, ends: int | None) -> QuantizedNetwork:
        return quantize(patterns, images, weights, activations, ends)

    return make


@pytest.fixture(scope="session")
def written(
    quantized: Callable[..., QuantizedNetwork], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[QuantizedNetwork, Path]]:
    """Makes an integer model of `Patterns` and its ONNX file, once for each choice of bits; leave both as they are."""
    folder = tmp_path_factory.mktemp("written")

    @cache
    def make(*bits: int | None) -> tuple[QuantizedNetwork, Path]:
        network, path = quantized(*bits), folder / f"{bits}.onnx"
        Onnx()(network, (3, 16, 16), path, facts={"bits": str(bits), "about": "a test"})
        return network, path

    return make


@pytest.fixture(scope="session")
def float_file(patterns: fx.GraphModule, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`Patterns` in full precision."""
    path = tmp_path_factory.mktemp("float") / "float.onnx"
    export_float(patterns, (3, 16, 16), path)
    return path


@pytest.fixture(scope="session")
def quantizer() -> Callable[..., QuantizedNetwork]:
    """`quantize`, for other networks than `Patterns`."""
    return quantize
