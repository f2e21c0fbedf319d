"""Swing convolution shifts what convolutions with a stride read, and nothing else."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from reverie.graph.capture import capture
from reverie.graph.swing import shifted, swing


class Shapes(nn.Module):
    """A strided convolution with a strided shortcut between two plain ones."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.main = nn.Conv2d(4, 4, 3, stride=2, padding=1)
        self.shortcut = nn.Conv2d(4, 4, 1, stride=(1, 2))
        self.pool = nn.MaxPool2d((2, 1))
        self.last = nn.Conv2d(4, 2, 3, padding="same")

    def forward(self, x):
        x = self.first(x)
        return self.last(self.main(x) + self.pool(self.shortcut(x))).mean((2, 3))


@pytest.fixture(scope="module")
def graph():
    torch.manual_seed(0)
    return capture(Shapes(), (3, 12, 10))


@pytest.fixture
def inputs():
    return torch.randn(2, 3, 12, 10, generator=torch.Generator().manual_seed(1))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("rows", [0, 1, 2])
@pytest.mark.parametrize("columns", [0, 1, 2])
def test_a_shift_is_a_crop_of_the_reflect_padded_map(rows, columns):
    x = torch.randn(2, 3, 7, 5, generator=seeded(0))
    padded = functional.pad(x, (1, 1, 1, 1), mode="reflect")
    assert torch.equal(shifted(x, (rows, columns)), padded[:, :, rows : rows + 7, columns : columns + 5])


@pytest.mark.parametrize("offsets", [(0, 0), (0, 2), (2, 1), (2, 2)])
def test_the_gradient_of_a_shift_is_the_derivative(offsets):
    x = torch.randn(2, 1, 4, 3, generator=seeded(0), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda values: shifted(values, offsets), x)


def test_a_shift_keeps_the_memory_layout_and_has_the_gradient_of_a_crop():
    x = torch.randn(2, 3, 7, 5, generator=seeded(0)).contiguous(memory_format=torch.channels_last).requires_grad_()
    assert shifted(x, (2, 0)).is_contiguous(memory_format=torch.channels_last)
    (gradient,) = torch.autograd.grad(shifted(x, (2, 1)).sum(), x)
    # Row 0 is left out, and row 5 stands in for the row below the last.
    assert torch.equal(gradient[0, 0, :, 0], torch.tensor([0.0, 1, 1, 1, 1, 2, 1]))


def test_an_axis_too_short_to_reflect_is_not_shifted():
    x = torch.randn(1, 1, 2, 1, generator=seeded(0))
    assert torch.equal(shifted(x, (0, 2)), x)


def test_only_convolutions_with_a_stride_read_a_shifted_input(graph):
    swung = swing(graph, seeded(0))
    moved = {node.name: [source.name for source in node.all_input_nodes] for node in swung.graph.nodes}
    plain = {node.name: [source.name for source in node.all_input_nodes] for node in graph.graph.nodes}
    changed = {name for name, sources in moved.items() if sources != plain.get(name)}
    assert changed == {"main", "shortcut", "main_swing", "shortcut_swing"}
    assert moved["main_swing"] == moved["shortcut_swing"] == ["first"]


def test_with_centred_crops_the_network_is_the_plain_one(graph, inputs, monkeypatch):
    swung = swing(graph, seeded(0))
    assert not torch.equal(swung(inputs), graph(inputs))
    monkeypatch.setattr(torch, "randint", lambda high, shape, generator: torch.ones(shape, dtype=torch.int64))
    assert torch.equal(swung(inputs), graph(inputs))


def test_passes_differ_and_the_same_seed_repeats_them(graph, inputs):
    one, other = swing(graph, seeded(3)), swing(graph, seeded(3))
    first = [one(inputs) for _ in range(8)]
    assert all(torch.equal(ours, other(inputs)) for ours in first)
    assert len({float(answer[0, 0]) for answer in first}) > 4


def test_the_graph_is_left_as_it_was_and_its_weights_are_shared(graph, inputs):
    code, state, answers = graph.code, copy.deepcopy(graph.state_dict()), graph(inputs)
    modules = [name for name, _ in graph.named_modules()]
    swung = swing(graph, seeded(0))
    swung(inputs)
    assert graph.code == code and [name for name, _ in graph.named_modules()] == modules
    assert all(torch.equal(value, state[name]) for name, value in graph.state_dict().items())
    assert torch.equal(graph(inputs), answers)
    assert swung.main.weight is graph.main.weight
