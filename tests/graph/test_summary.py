"""The facts of `reverie inspect` about small networks, counted by hand."""

import json

import pytest
import torch
from torch import nn

from reverie.graph.capture import capture
from reverie.graph.summary import BatchNormSummary, LayerSummary, Verdict, summarize


def verdicts(module, shape):
    return {
        verdict.capability: (verdict.possible, verdict.reason) for verdict in summarize(capture(module, shape), shape).verdicts
    }


@pytest.fixture
def depthwise():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU6(),
        nn.Conv2d(4, 4, 3, padding=1, groups=4),
        nn.ReLU6(),
        nn.Conv2d(4, 8, 1, groups=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
    )


def test_layers_have_the_sizes_worked_out_by_hand(depthwise):
    summary = summarize(capture(depthwise, (3, 8, 8)), (3, 8, 8))
    assert summary.layers == (
        LayerSummary("_0", "0", "convolution", (4, 3, 3, 3), 108, 4 * 16 * 27, (4, 4, 4)),
        LayerSummary("_3", "3", "depthwise", (4, 1, 3, 3), 36 + 4, 4 * 16 * 9, (4, 4, 4)),
        LayerSummary("_5", "5", "grouped", (8, 2, 1, 1), 16 + 8, 8 * 16 * 2, (8, 4, 4)),
        LayerSummary("_8", "8", "linear", (10, 8), 80 + 10, 80, (10,)),
    )
    assert summary.multiply_accumulates == 1728 + 576 + 256 + 80
    assert summary.parameters == 108 + 8 + 40 + 24 + 90
    assert summary.batch_norms == (BatchNormSummary("_1_batch_norm", 4, True, None),)
    assert (summary.input_shape, summary.output_shape) == ((3, 8, 8), (10,))
    assert summary.operators == {
        "conv2d": 3,
        "hardtanh": 2,
        "sym_size": 1,
        "batch_norm": 1,
        "adaptive_avg_pool2d": 1,
        "reshape": 1,
        "linear": 1,
    }


def test_an_ordinary_network_can_have_everything(depthwise):
    assert summarize(capture(depthwise, (3, 8, 8)), (3, 8, 8)).verdicts == (
        Verdict("batch-norm matching", True, "1 batch norm with 4 means and variances"),
        Verdict("batch-norm folding", True, "1 of 1 fold into the layer in front of them"),
        Verdict("integer kernels", True, "every operator has one"),
        Verdict("cross-layer equalization", True, "3 pairs of neighbouring layers in 1 chain"),
        Verdict("layer-wise rounding", True, "4 layers with stored weights"),
        Verdict("block units", True, "4 blocks, 0 of them with several layers"),
        Verdict("literature placement", True, "2 ReLU-like activations to quantize behind"),
        Verdict("classification", True, "10 classes"),
    )


def test_what_is_missing_is_said_with_its_reason():
    assert verdicts(nn.Sequential(nn.LayerNorm(4), nn.GELU()), (3, 4)) == {
        "batch-norm matching": (False, "no batch norm, so nothing remembers the training data's statistics"),
        "batch-norm folding": (True, "no batch norm to fold"),
        "integer kernels": (False, "these stay in float: layer_norm (1), gelu (1)"),
        "cross-layer equalization": (False, "no two layers with only ReLU-like activations or pooling between them"),
        "layer-wise rounding": (False, "no convolution or linear layer"),
        "block units": (False, "no single-entry, single-exit region is smaller than the network"),
        "literature placement": (False, "no ReLU-like activation, so only weights would be quantized"),
        "classification": (False, "one output has shape (3, 4), not (classes,)"),
    }


def test_batch_norms_that_stay_are_counted_and_one_explains():
    module = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))
    found = verdicts(module, (3, 4, 4))
    assert found["batch-norm folding"] == (
        False,
        "2 of 3 stay: '_0_batch_norm', because it normalizes 'input_1', which is not the output of a convolution or linear "
        "layer; and 1 more",
    )
    assert found["integer kernels"] == (False, "these stay in float: batch_norm (2)")


def test_arithmetic_with_numbers_stays_in_float():
    class Scaled(nn.Module):
        def forward(self, x):
            return x * 2 + x

    assert verdicts(Scaled(), (4,))["integer kernels"] == (False, "these stay in float: mul (1)")


def test_the_graph_stays_as_it_was_and_no_weight_is_copied(depthwise):
    graph = capture(depthwise, (3, 8, 8))
    nodes = [(node.name, node.target) for node in graph.graph.nodes]
    x = torch.randn(2, 3, 8, 8)
    expected = graph(x)
    summarize(graph, (3, 8, 8))
    assert [(node.name, node.target) for node in graph.graph.nodes] == nodes
    assert torch.equal(graph(x), expected)


def test_as_dict_goes_through_json_unchanged(depthwise):
    found = summarize(capture(depthwise, (3, 8, 8)), (3, 8, 8)).as_dict()
    assert json.loads(json.dumps(found)) == found
    assert found["layers"][1]["weight_shape"] == [4, 1, 3, 3]
    assert found["verdicts"][2] == {"capability": "integer kernels", "possible": True, "reason": "every operator has one"}
