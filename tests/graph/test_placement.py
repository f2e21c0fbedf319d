"""Where quantizers sit, tensor by tensor, in both placements; and what becomes of a calibrated student."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from reverie.errors import ConfigError, ModelError
from reverie.graph.capture import capture
from reverie.graph.fold import fold_batch_norms
from reverie.graph.placement import Bits, place
from reverie.graph.quantized import finish
from reverie.graph.sums import separate_sums
from reverie.graph.taps import tap
from reverie.grid import Grid, symmetric_qparams
from reverie.observers.minmax import MinMax
from reverie.progress import Silent
from reverie.recovery.ranges import calibrate_activations


class Small(nn.Module):
    """A stem, a residual block, a concatenation, a scaling by a number, pooling and a classifier."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.a, self.clip, self.b = nn.Conv2d(4, 4, 1), nn.ReLU6(), nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        y = F.max_pool2d(F.relu(self.norm(self.stem(x))), 2)
        z = F.relu(y + self.b(self.clip(self.a(y))))
        both = torch.cat([y, z * 0.5], 1)
        return self.head(F.adaptive_avg_pool2d(both, 1).flatten(1))


@pytest.fixture
def graph():
    torch.manual_seed(0)
    return capture(Small().eval(), (3, 8, 8))


@pytest.fixture
def student(graph):
    return place(fold_batch_norms(graph), "integer", weight_bits=4, activation_bits=5, end_bits=8)


def calibrate_(student):
    for quantizer in student.activations.values():
        quantizer.set_qparams(torch.tensor(0.01), torch.tensor(12, dtype=torch.int32))
    for name, quantizer in student.weights.items():
        weight = student.graph.get_buffer(student.layers[name].weight).flatten(1)
        scale, zero_point = symmetric_qparams(weight.amin(1), weight.amax(1), quantizer.grid)
        quantizer.set_qparams(scale.view_as(quantizer.scale), zero_point.view_as(quantizer.scale))


def test_single_tensors_have_the_bits_they_are_given_at_the_ends_too(graph):
    given = Bits(weights={"a": 2, "head": 3}, activations={"x": 6, "cat": 7})
    student = place(fold_batch_norms(graph), "integer", weight_bits=4, activation_bits=5, end_bits=8, bits=given)
    assert {name: quantizer.grid.bits for name, quantizer in student.weights.items()} == {"stem": 8, "a": 2, "b": 4, "head": 3}
    bits = {name: quantizer.grid.bits for name, quantizer in student.activations.items()}
    assert bits["x"] == 6 and bits["cat"] == 7 and bits["relu"] == 5


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weights": {"headd": 3}}, "bits.weights must name layers with weights, got 'headd'; did you mean 'head'"),
        ({"weights": {"zzz": 3}}, "bits.weights must name layers with weights, got 'zzz'; such as 'a'"),
        ({"activations": {"a": 3}}, "bits.activations must name tensors on a grid, got 'a'; such as 'adaptive_avg_pool2d'"),
    ],
)
def test_bits_of_a_tensor_that_is_not_there_are_refused(graph, given, message):
    with pytest.raises(ConfigError) as caught:
        place(fold_batch_norms(graph), "integer", weight_bits=4, activation_bits=5, bits=Bits(**given))
    assert str(caught.value) == message


def test_bits_that_no_grid_has_are_refused():
    with pytest.raises(ConfigError, match=r"^bits\.weights must be 2 to 8, got 9 for 'head'$"):
        Bits(weights={"head": 9})


def test_integer_puts_tensors_on_a_grid_where_a_runtime_does(student):
    assert list(student.activations) == [
        "x",  # the network's input
        "relu",  # behind the stem, read through the pooling by two layers and an add
        "clip_hardtanh",  # between the block's layers
        "b",  # the add's other operand
        "mul",  # an operand of the concatenation; its own operand is a number, so no integer kernel multiplies
        "cat",  # read by the average
        "adaptive_avg_pool2d",  # read by the classifier through the reshape
    ]


def test_ends_have_their_own_bits(student):
    assert {name: quantizer.grid for name, quantizer in student.activations.items()} == {
        "x": Grid(8, signed=False),
        "relu": Grid(5, signed=False),
        "clip_hardtanh": Grid(5, signed=False),
        "b": Grid(5, signed=False),
        "mul": Grid(5, signed=False),
        "cat": Grid(5, signed=False),
        "adaptive_avg_pool2d": Grid(8, signed=False),
    }
    assert {name: quantizer.grid for name, quantizer in student.weights.items()} == {
        "stem": Grid(8),
        "a": Grid(4),
        "b": Grid(4),
        "head": Grid(8),
    }


def test_what_the_first_layer_writes_has_bits_of_its_own_until_another_layer_has_a_part_in_it(graph):
    folded = fold_batch_norms(graph)
    student = place(folded, "integer", weight_bits=4, activation_bits=5, end_bits=8, stem_bits=7)
    bits = {name: quantizer.grid.bits for name, quantizer in student.activations.items()}
    assert bits == {"x": 8, "relu": 7, "clip_hardtanh": 5, "b": 5, "mul": 5, "cat": 5, "adaptive_avg_pool2d": 8}
    # What layers read through a grid of their own is the stem's too.
    apart = place(separate_sums(folded), "integer", weight_bits=4, activation_bits=5, end_bits=8, stem_bits=7, sum_bits=6)
    bits = {name: quantizer.grid.bits for name, quantizer in apart.activations.items()}
    assert (bits["relu"], bits["max_pool2d_for_layers"], bits["b"]) == (7, 7, 6)
    literature = place(graph, "literature", weight_bits=4, activation_bits=3, stem_bits=7)
    assert {quantizer.grid.bits for quantizer in literature.activations.values()} == {3}


@pytest.mark.parametrize("network", ["two stems", "input normalized", "read again"])
def test_the_stem_is_what_comes_from_the_first_layers_alone(network):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Conv2d(3, 3, 1) for _ in range(4))

        def forward(self, x):
            if network == "input normalized":
                x = (x - 0.5) / 0.25
            y = F.silu(self.a(x)) + F.silu(self.b(x)) if network == "two stems" else F.silu(self.a(x))
            z = self.c(y) * y
            # A layer that reads the input again, beside what others made.
            return self.d(torch.cat([z, self.b(x)], 1)[:, :3] if network == "read again" else z)

    student = place(capture(Net().eval(), (3, 4, 4)), "integer", weight_bits=4, activation_bits=5, end_bits=8, stem_bits=7)
    stem = {name for name, quantizer in student.activations.items() if quantizer.grid.bits == 7}
    assert (
        stem
        == {
            "two stems": {"a", "b", "silu", "silu_2", "add"},
            "input normalized": {"a", "silu"},
            "read again": {"a", "b", "silu"},
        }[network]
    )


def test_layers_know_their_path_tensors_and_source(student):
    found = {name: (layer.path, layer.weight, layer.bias, layer.source, layer.end) for name, layer in student.layers.items()}
    assert found == {
        "stem": ("stem", "stem.folded_weight", "stem.folded_bias", "x", True),
        "a": ("a", "a.weight", "a.bias", "relu", False),
        "b": ("b", "b.weight", "b.bias", "clip_hardtanh", False),
        "head": ("head", "head.weight", "head.bias", "adaptive_avg_pool2d", True),
    }
    assert list(student.biases) == ["stem", "a", "b", "head"]


def test_without_end_bits_all_bits_are_the_same(graph):
    student = place(fold_batch_norms(graph), "integer", weight_bits=4, activation_bits=5)
    assert {quantizer.grid.bits for quantizer in student.weights.values()} == {4}
    assert {quantizer.grid.bits for quantizer in student.activations.values()} == {5}


def test_what_only_sums_read_has_bits_of_its_own(graph):
    folded = fold_batch_norms(graph)
    student = place(folded, "integer", weight_bits=4, activation_bits=3, end_bits=7, sum_bits=6)
    bits = {name: quantizer.grid.bits for name, quantizer in student.activations.items()}
    # `relu` is added too, but two layers read it; the last pooling alone reads `cat`.
    assert bits == {"x": 7, "relu": 3, "clip_hardtanh": 3, "b": 6, "mul": 3, "cat": 6, "adaptive_avg_pool2d": 7}
    literature = place(graph, "literature", weight_bits=4, activation_bits=3, sum_bits=6)
    assert {quantizer.grid.bits for quantizer in literature.activations.values()} == {3}


class Moved(nn.Module):
    """A branch that is sliced before it is added, and one that is sliced and read by a layer as well."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 3, 1) for _ in range(3))

    def forward(self, x):
        first, second = self.a(x)[:, :, 1:], self.b(x)[:, :, 1:]
        return first + second - self.c(second)


def test_a_branch_that_is_moved_before_it_is_added_is_only_summed():
    student = place(capture(Moved(), (3, 4, 4)), "integer", weight_bits=4, activation_bits=3, sum_bits=6)
    bits = {name: quantizer.grid.bits for name, quantizer in student.activations.items()}
    assert (bits["a"], bits["b"], bits["c"]) == (6, 3, 6)


def test_literature_keeps_batch_norm_and_quantizes_behind_relu_alone(graph):
    student = place(graph, "literature", weight_bits=4, activation_bits=4, end_bits=8)
    assert list(student.activations) == ["relu", "clip_hardtanh", "relu_2"]
    assert student.biases == {}
    assert {quantizer.grid.bits for quantizer in [*student.weights.values(), *student.activations.values()]} == {4}


def test_the_student_answers_like_the_graph_and_leaves_it_alone(graph):
    folded = fold_batch_norms(graph)
    targets = [node.target for node in folded.graph.nodes]
    student = place(folded, "integer", weight_bits=4, activation_bits=5, end_bits=8)
    x = torch.randn(3, 3, 8, 8)
    expected = folded(x)
    assert torch.equal(student.graph(x), expected)
    calibrate_(student)
    assert not torch.equal(student.graph(x), expected)
    assert torch.equal(folded(x), expected)
    assert [node.target for node in folded.graph.nodes] == targets


def test_a_network_without_layers_is_refused():
    with pytest.raises(ModelError) as caught:
        place(capture(nn.ReLU(), (3,)), "integer", weight_bits=8, activation_bits=8)
    assert str(caught.value) == (
        "place: the network must have a convolution or linear layer, got none; there is nothing to quantize"
    )


def test_an_uncalibrated_student_cannot_be_finished(student):
    with pytest.raises(ModelError) as caught:
        finish(student)
    assert str(caught.value) == "x: its range must be known, got no calibration; calibrate the student before finishing it"


def test_the_finished_network_answers_like_its_student(student):
    calibrate_(student)
    quantized = finish(student)
    x = torch.randn(3, 3, 8, 8)
    assert torch.equal(quantized.graph(x), student.graph(x))
    assert not [name for name, _ in quantized.graph.named_modules() if name.startswith(("weight_quant", "bias_quant"))]
    for name, layer in quantized.layers.items():
        stored = quantized.graph.get_buffer(layer.weight)
        assert torch.equal((layer.codes - layer.zero_point) * layer.scale, stored)
        assert layer.grid == student.weights[name].grid
        assert layer.grid.quant_min <= int(layer.codes.min()) <= int(layer.codes.max()) <= layer.grid.quant_max
        # The bias lies on the accumulator's grid: input scale times weight scale.
        step = student.activations[layer.source].scale * layer.scale.flatten()
        torch.testing.assert_close(layer.bias_codes * step, quantized.graph.get_buffer(layer.bias))


class SharedLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(F.relu(self.layer(x)))


def test_a_layer_used_twice_is_finished_for_each_use():
    torch.manual_seed(0)
    student = place(capture(SharedLayer(), (4,)), "integer", weight_bits=4, activation_bits=8)
    calibrate_(student)
    student.activations["relu"].set_qparams(torch.tensor(0.02), torch.tensor(0, dtype=torch.int32))
    quantized = finish(student)
    x = torch.randn(3, 4)
    assert [layer.weight for layer in quantized.layers.values()] == ["layer.weight_of_layer", "layer.weight_of_layer_1"]
    assert torch.equal(quantized.graph(x), student.graph(x))


def test_symmetric_activations_are_on_signed_grids_whose_zero_point_is_zero(tiny_cnn):
    network = tiny_cnn()
    graph = fold_batch_norms(capture(network.module, (3, 16, 16)))
    images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    student = place(graph, "integer", weight_bits=8, activation_bits=5, end_bits=8, symmetric=True)
    calibrate_activations(graph, student, images, MinMax(), batch=4, progress=Silent())
    values = tap(graph, student.activations)(images)
    assert {quantizer.grid for quantizer in student.activations.values()} == {Grid(5), Grid(8)}
    for name, quantizer in student.activations.items():
        assert int(quantizer.zero_point) == 0
        largest = max(
            float(values[name].max()) / quantizer.grid.quant_max, float(values[name].min()) / quantizer.grid.quant_min
        )
        assert float(quantizer.scale) == pytest.approx(largest)
