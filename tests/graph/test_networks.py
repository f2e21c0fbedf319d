"""Capture, folding, placement, units, walking and equalization on real architectures with random weights.

Batch norms hold the statistics of a random batch, each off by a random factor, so that folding has work to do while
activations neither vanish nor explode.
"""

import json
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from torch import fx, nn

from reverie.graph.capture import capture
from reverie.graph.equalize import equalize, find_pairs
from reverie.graph.extract import extract
from reverie.graph.fold import fold_batch_norms
from reverie.graph.operators import BATCH_NORM, CLIPPING, data_nodes, layers
from reverie.graph.placement import place
from reverie.graph.summary import summarize
from reverie.graph.taps import tap
from reverie.graph.units import find_units
from reverie.graph.walk import Walk
from reverie.grid import affine_qparams, symmetric_qparams
from reverie.models import _torchvision_import

TOLERANCE = 1e-4


@dataclass(frozen=True)
class Architecture:
    """What to build, and what is known about it."""

    name: str
    library: str = "torchvision"
    size: int = 64
    options: tuple[tuple[str, object], ...] = ()
    kept_batch_norms: int = 0
    slow: bool = True


WITHOUT_HEADS = (("aux_logits", False), ("init_weights", False))
ARCHITECTURES = [
    Architecture("resnet18", slow=False),
    Architecture("resnet50"),
    Architecture("mobilenet_v2"),
    Architecture("mobilenet_v3_small"),
    Architecture("regnet_x_400mf"),
    Architecture("shufflenet_v2_x0_5"),
    Architecture("efficientnet_b0"),
    Architecture("tf_efficientnet_lite0", "timm"),
    Architecture("mnasnet0_5"),
    Architecture("densenet121", kept_batch_norms=62),
    Architecture("googlenet", options=WITHOUT_HEADS),
    Architecture("inception_v3", size=75, options=WITHOUT_HEADS),
    Architecture("repvgg_a0", "timm", kept_batch_norms=17),
    Architecture("convnext_tiny"),
    Architecture("deit_tiny_patch16_224", "timm", options=(("img_size", 64),), slow=False),
    Architecture("swin_t"),
]


class Case:
    """A network, its captured and folded graphs, and inputs."""

    def __init__(self, architecture: Architecture) -> None:
        self.architecture = architecture
        self.shape = (3, architecture.size, architecture.size)
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            self.module = build(architecture)
            self.inputs = torch.randn(3, *self.shape)
            settle_batch_norms_(self.module, torch.randn(8, *self.shape))
            self.expected = self.module(self.inputs)
        self.graph = capture(self.module, self.shape)
        self.folded = fold_batch_norms(self.graph)


def build(architecture: Architecture) -> nn.Module:
    options = dict(architecture.options)
    if architecture.library == "timm":
        return _torchvision_import.timm().create_model(architecture.name, **options).eval()
    return _torchvision_import.torchvision().models.get_model(architecture.name, **options).eval()


def settle_batch_norms_(module: nn.Module, inputs: torch.Tensor) -> None:
    norms = [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.weight.uniform_(0.7, 1.4)
        norm.bias.normal_(std=0.1)
        norm.train()
        norm.momentum = 1.0
    module(inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval()
        norm.momentum = momentum
        norm.running_mean += 0.05 * norm.running_var.sqrt() * torch.randn_like(norm.running_mean)
        norm.running_var *= torch.empty_like(norm.running_var).uniform_(0.9, 1.1)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(architecture, id=architecture.name, marks=[pytest.mark.slow] if architecture.slow else [])
        for architecture in ARCHITECTURES
    ],
)
def case(request):
    return Case(request.param)


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def relative_error(actual, expected):
    return float((actual - expected).abs().max() / expected.abs().max())


def test_the_captured_graph_answers_like_the_module_at_any_batch_size(case):
    assert relative_error(case.graph(case.inputs), case.expected) < TOLERANCE
    assert relative_error(case.graph(case.inputs[:1]), case.module(case.inputs[:1])) < TOLERANCE
    channels_last = case.inputs.to(memory_format=torch.channels_last)
    assert relative_error(case.graph(channels_last), case.expected) < TOLERANCE


def test_no_operator_of_the_captured_graph_works_in_place(case):
    overloads = [node.target for node in case.graph.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    assert not [str(overload) for overload in overloads if overload._schema.is_mutable]


def test_folding_keeps_outputs_and_leaves_only_batch_norms_that_no_layer_precedes(case):
    assert relative_error(case.folded(case.inputs), case.expected) < TOLERANCE
    kept = [node for node in case.folded.graph.nodes if node.target is BATCH_NORM]
    assert len(kept) == case.architecture.kept_batch_norms


def test_equalizing_keeps_outputs(case):
    assert relative_error(equalize(case.folded)(case.inputs), case.expected) < TOLERANCE


def calibrate_(student, graph, inputs):
    """Min/max for everything, at the student's bits."""
    for name, values in tap(graph, student.activations)(inputs).items():
        quantizer = student.activations[name]
        quantizer.set_qparams(*affine_qparams(values.min(), values.max(), quantizer.grid))
    for name, quantizer in student.weights.items():
        weight = graph.get_buffer(student.layers[name].weight)
        over = tuple(range(1, weight.dim()))
        low, high = weight.amin(over, keepdim=True), weight.amax(over, keepdim=True)
        if student.kind == "integer":
            quantizer.set_qparams(*symmetric_qparams(low, high, quantizer.grid))
        else:
            quantizer.set_qparams(*affine_qparams(low, high, quantizer.grid, include_zero=False))


@pytest.mark.parametrize("kind", ["integer", "literature"])
def test_a_student_is_its_teacher_until_calibrated_and_block_by_block_close_to_it_at_8_bits(case, kind):
    graph = case.folded if kind == "integer" else case.graph
    expected = graph(case.inputs)
    student = place(graph, kind, weight_bits=8, activation_bits=8)
    assert torch.equal(student.graph(case.inputs), expected)
    assert list(student.layers) == list(student.weights) == [node.name for node in layers(graph)]
    calibrate_(student, graph, case.inputs)
    assert not torch.equal(student.graph(case.inputs), expected)
    blocks = find_units(graph, "block")
    truth = tap(graph, {name for block in blocks for name in (*block.inputs, block.output)})(case.inputs)
    for block in blocks:
        # From true inputs: a random network of 50 layers amplifies what the first ones get wrong.
        ((entry,), (module, _)) = block.inputs, extract(student.graph, block)
        source = student.activations[entry](truth[entry]) if entry in student.activations else truth[entry]
        error = module(source) - truth[block.output]
        assert 20 * float(torch.log10(truth[block.output].norm() / error.norm())) > 20


def test_the_integer_placement_gives_every_layer_a_quantized_input_and_bias(case):
    student = place(case.folded, "integer", weight_bits=4, activation_bits=4, end_bits=8)
    assert [name for name, layer in student.layers.items() if layer.source not in student.activations] == []
    assert set(student.biases) == {name for name, layer in student.layers.items() if layer.bias is not None}
    (entry,) = [node.name for node in case.folded.graph.nodes if node.op == "placeholder"]
    ends = [name for name, layer in student.layers.items() if layer.end]
    assert ends == [*(name for name, layer in student.layers.items() if layer.source == entry), list(student.layers)[-1]]
    assert [name for name, quantizer in student.weights.items() if quantizer.grid.bits == 8] == ends


def test_the_literature_placement_quantizes_behind_clipping_activations_alone(case):
    student = place(case.graph, "literature", weight_bits=4, activation_bits=4)
    clips = {node.name for node in case.graph.graph.nodes if node.target in CLIPPING}
    assert set(student.activations) == clips
    assert student.biases == {}


@pytest.mark.parametrize("kind", ["layer", "block", "network"])
@pytest.mark.parametrize("which", ["graph", "folded"])
def test_every_layer_is_in_exactly_one_unit(case, kind, which):
    graph = getattr(case, which)
    units = find_units(graph, kind)
    assert [name for unit in units for name in unit.layers] == [node.name for node in layers(graph)]
    assert all(count == 1 for count in Counter(node for unit in units for node in unit.nodes).values())
    assert all(unit.layers and unit.output == unit.nodes[-1] for unit in units)


def test_blocks_are_entered_and_left_through_one_tensor(case):
    graph = case.folded
    data = data_nodes(graph)
    nodes = {node.name: node for node in graph.graph.nodes}
    (entry,) = [node.name for node in data if node.op == "placeholder"]
    blocks = find_units(graph, "block")
    assert [name for block in blocks for name in block.nodes] == [
        node.name for node in graph.graph.nodes if node in data and node.op != "placeholder"
    ]
    for before, block in zip([None, *blocks], blocks, strict=False):
        assert block.inputs == (entry if before is None else before.output,)
        assert not reaches_output(nodes[entry], nodes[block.output], data)


def reaches_output(start: fx.Node, removed: fx.Node, data: set[fx.Node]) -> bool:
    """Whether the graph's output depends on `start` other than through `removed`."""
    frontier, seen = [start], {start}
    while frontier:
        for user in frontier.pop().users:
            if user.op == "output":
                return True
            if user is not removed and user in data and user not in seen:
                seen.add(user)
                frontier.append(user)
    return False


@pytest.mark.parametrize("kind", ["layer", "block", "network"])
def test_walking_in_batches_gives_every_tensor_and_units_on_their_own_compute_theirs(case, kind):
    units = find_units(case.folded, kind)
    read = {name for unit in units for name in (unit.output, *extract(case.folded, unit)[1])}
    whole = tap(case.folded, read)(case.inputs)
    walk = Walk(case.folded, case.inputs, batch=2, keep=read)
    for unit in units:
        walk.to(unit.output)
        actual = walk.value(unit.output)
        assert actual.shape == whole[unit.output].shape
        assert relative_error(actual, whole[unit.output]) < TOLERANCE
        module, sources = extract(case.folded, unit)
        assert set(sources) == set(unit.inputs)
        assert relative_error(module(*(walk.value(source) for source in sources)), actual) < TOLERANCE


def test_the_summary_counts_what_is_there(case):
    summary = summarize(case.graph, case.shape)
    assert summary.parameters == sum(parameter.numel() for parameter in case.module.parameters())
    assert summary.output_shape == case.expected.shape[1:]
    assert sum(norm.folds for norm in summary.batch_norms) == len(summary.batch_norms) - case.architecture.kept_batch_norms
    assert [block.layers for block in summary.blocks] == [unit.layers for unit in find_units(case.folded, "block")]
    found = {verdict.capability: verdict for verdict in summary.verdicts}
    assert found["cross-layer equalization"].possible == bool(find_pairs(case.folded))
    assert json.loads(json.dumps(summary.as_dict())) == summary.as_dict()
