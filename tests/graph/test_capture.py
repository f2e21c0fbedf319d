"""What `capture` promises of any module: functional, frozen, named after its modules; and what it refuses."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from reverie.errors import ModelError
from reverie.graph.capture import capture
from reverie.graph.placement import place


class Careless(nn.Module):
    """In-place operators, views, dropout, a layer used twice, a functional add."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4 * 16, 2)

    def forward(self, x):
        y = F.relu_(self.norm(self.conv(x)))
        y += x
        y.mul_(0.5)
        y = F.hardtanh_(self.conv(y), -1, 1)
        return self.head(self.drop(y.view(y.shape[0], -1)))


@pytest.fixture
def careless():
    torch.manual_seed(0)
    return Careless()


def names(graph):
    return [node.name for node in graph.graph.nodes if node.op == "call_function"]


def test_in_place_operators_are_gone_and_inputs_survive(careless):
    x = torch.randn(3, 4, 4, 4)
    kept = x.clone()
    graph = capture(careless, (4, 4, 4))
    torch.testing.assert_close(graph(x), careless.eval()(x))
    assert torch.equal(x, kept)
    assert not [node for node in graph.graph.nodes if node.op == "call_function" and node.target._schema.is_mutable]


def test_tensors_are_named_after_the_modules_that_compute_them(careless):
    assert [name for name in names(capture(careless, (4, 4, 4))) if name != "sym_size"] == [
        "conv",
        "norm_batch_norm",
        "relu",
        "add",
        "mul",
        "conv_1",
        "hardtanh",
        # Dropout hands the reshaped tensor on as its own.
        "drop_reshape",
        "head",
    ]


def test_the_module_stays_as_it_was(careless):
    careless.train()
    careless.norm.eval()
    modes = [part.training for part in careless.modules()]
    state = {key: value.clone() for key, value in careless.state_dict().items()}
    capture(careless, (4, 4, 4))
    assert [part.training for part in careless.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in careless.state_dict().items())


def test_weights_are_frozen_copies(careless):
    graph = capture(careless, (4, 4, 4))
    with torch.no_grad():
        careless.conv.weight.zero_()
    assert bool((graph.get_buffer("conv.weight") != 0).any())
    assert list(graph.parameters()) == []
    assert not any(tensor.requires_grad for tensor in graph.buffers())


def test_gradients_reach_the_input(careless):
    x = torch.randn(2, 4, 4, 4, requires_grad=True)
    capture(careless, (4, 4, 4))(x).sum().backward()
    assert bool((x.grad != 0).any())


def test_names_that_modules_reserve_are_no_trouble():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.keys, self.values = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, items):
            return self.values(F.relu(self.keys(items)))

    graph = capture(Attention(), (8,))
    student = place(graph, "integer", weight_bits=8, activation_bits=8)
    assert list(student.layers) == ["keys_0", "values_0"]
    assert list(student.activations) == ["items_0", "relu"]
    x = torch.randn(2, 8)
    assert torch.equal(student.graph(x), graph(x))


class Returning(nn.Module):
    def __init__(self, count):
        super().__init__()
        self.count = count

    def forward(self, x):
        return [x + number for number in range(self.count)]


def test_one_tensor_in_a_list_is_one_output():
    x = torch.randn(2, 3)
    assert torch.equal(capture(Returning(1), (3,))(x), x)


@pytest.mark.parametrize(("count", "got"), [(2, "2"), (0, "no")])
def test_other_than_one_output_is_refused(count, got):
    with pytest.raises(ModelError) as caught:
        capture(Returning(count), (3,), name="net.py:make")
    assert str(caught.value) == (
        f"net.py:make: the network must return one tensor of logits, got {got} outputs; wrap it in a module that returns the logits"
    )


def test_what_export_cannot_follow_is_refused_with_its_reason():
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(
        ModelError,
        match=r"^branching: torch\.export must be able to capture the network at input \(2, 3\), got '.*data-dependent.*'; "
        r"check the input size, and that forward has no branch that depends on values$",
    ):
        capture(Branching(), (3,), name="branching")


def test_an_input_of_the_wrong_size_is_refused():
    with pytest.raises(
        ModelError, match=r"^network: torch\.export must be able to capture the network at input \(2, 5\), got '.*'; "
    ):
        capture(nn.Linear(3, 2), (5,))


def test_a_fixed_batch_size_is_refused():
    class Fixed(nn.Module):
        def forward(self, x):
            return x.view(2, 3)

    with pytest.raises(
        ModelError, match=r"^network: torch\.export must be able to capture the network at input \(2, 3\), got '"
    ):
        capture(Fixed(), (3,))
