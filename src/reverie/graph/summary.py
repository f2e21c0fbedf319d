"""What a captured network consists of, and what Reverie can and cannot do with it: the facts behind `reverie inspect`.

Nothing is computed with the weights. Shapes come from running the graph on tensors without data. Units, equalizable
pairs and operators in float are those of the graph behind `fold_batch_norms`, as the `integer` placement sees it.

Parameters are the floating-point tensors that the graph reads, without running statistics and single numbers.
Multiply-accumulates are those of convolutions and linear layers, for one image; products inside attention are not counted.
"""

import math
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import fx
from torch._subclasses import FakeTensorMode

from reverie.graph.equalize import find_pairs
from reverie.graph.fold import obstacle
from reverie.graph.operators import (
    AVERAGES,
    BATCH_NORM,
    CLIPPING,
    CONVOLUTIONS,
    PASS_THROUGH,
    arguments,
    attribute,
    combines_computed,
    constant,
    data_nodes,
    layers,
)
from reverie.graph.taps import shapes
from reverie.graph.unfold import folded_convolutions
from reverie.graph.units import find_units

LayerKind = Literal["convolution", "grouped", "depthwise", "linear"]


@dataclass(frozen=True)
class LayerSummary:
    """A convolution or linear layer.

    Args:
        name: Its node, and the tensor it computes.
        path: The module that holds its weight.
        kind: "grouped" and "depthwise" (one input channel a group) are convolutions too.
        weight_shape: Output channels first.
        parameters: Weights and biases.
        multiply_accumulates: For one image.
        output_shape: For one image, without the batch axis.
    """

    name: str
    path: str
    kind: LayerKind
    weight_shape: tuple[int, ...]
    parameters: int
    multiply_accumulates: int
    output_shape: tuple[int, ...]


@dataclass(frozen=True)
class BatchNormSummary:
    """A batch norm.

    Args:
        name: Its node.
        channels: How many it normalizes.
        folds: Whether it disappears into the layer in front of it.
        reason: Why not; None if it folds.
    """

    name: str
    channels: int
    folds: bool
    reason: str | None


@dataclass(frozen=True)
class BlockSummary:
    """A block unit.

    Args:
        name: Of the tensor it produces.
        layers: The convolutions and linear layers inside.
    """

    name: str
    layers: tuple[str, ...]


@dataclass(frozen=True)
class Verdict:
    """What Reverie can or cannot do with the network.

    Args:
        capability: The thing in question.
        possible: Whether it can, entirely.
        reason: Why, or what is in the way.
    """

    capability: str
    possible: bool
    reason: str


@dataclass(frozen=True)
class Summary:
    """A captured network at a glance.

    Args:
        input_shape, output_shape: For one image, without the batch axis.
        layers, batch_norms, blocks: In execution order.
        operators: How often each ATen operator occurs, most frequent first.
        parameters, multiply_accumulates: Of the whole network; see the module.
        verdicts: What can and cannot be done with it.
    """

    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    layers: tuple[LayerSummary, ...]
    batch_norms: tuple[BatchNormSummary, ...]
    blocks: tuple[BlockSummary, ...]
    operators: dict[str, int]
    parameters: int
    multiply_accumulates: int
    verdicts: tuple[Verdict, ...]

    def as_dict(self) -> dict[str, Any]:
        """The same as dictionaries, lists, strings and numbers, ready for JSON."""
        return {key: _plain(value) for key, value in asdict(self).items()}


def summarize(graph: fx.GraphModule, shape: tuple[int, ...]) -> Summary:
    """What `graph`, as `capture` returns it, consists of; `shape` is that of one input, without the batch axis."""
    device = next((tensor.device for tensor in graph.buffers()), torch.device("cpu"))
    example = torch.empty(1, *shape, device=device)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        sizes = shapes(graph, mode.from_tensor(example))
    output = graph.graph.output_node().args[0]
    assert isinstance(output, fx.Node)
    found = tuple(_layer(graph, layer, sizes[layer.name]) for layer in layers(graph))
    batch_norms = tuple(
        _batch_norm(graph, node) for node in graph.graph.nodes if node.op == "call_function" and node.target is BATCH_NORM
    )
    folded = _structure_behind_folding(graph)
    blocks = tuple(BlockSummary(unit.name, unit.layers) for unit in find_units(folded, "block"))
    calls = Counter(_operator(node) for node in graph.graph.nodes if node.op == "call_function")
    output_shape = sizes[output.name][1:]
    return Summary(
        input_shape=shape,
        output_shape=output_shape,
        layers=found,
        batch_norms=batch_norms,
        blocks=blocks,
        operators=dict(calls.most_common()),
        parameters=_parameters(graph),
        multiply_accumulates=sum(layer.multiply_accumulates for layer in found),
        verdicts=(
            _batch_norm_matching(batch_norms, len(folded_convolutions(graph))),
            _folding(batch_norms),
            _integer_kernels(folded),
            _equalization(folded),
            _layer_rounding(found),
            _block_reconstruction(blocks),
            _literature(graph),
            _classification(output_shape),
        ),
    )


def _layer(graph: fx.GraphModule, layer: fx.Node, size: tuple[int, ...]) -> LayerSummary:
    named = arguments(layer)
    weight = attribute(graph, named["weight"])
    assert weight is not None
    bias = attribute(graph, named["bias"]) if constant(named["bias"]) else None
    return LayerSummary(
        name=layer.name,
        path=str(named["weight"].target).rpartition(".")[0] or layer.name,
        kind=_kind(layer, weight.shape[1]),
        weight_shape=tuple(weight.shape),
        parameters=weight.numel() + (0 if bias is None else bias.numel()),
        multiply_accumulates=math.prod(size[1:]) * math.prod(weight.shape[1:]),
        output_shape=size[1:],
    )


def _kind(layer: fx.Node, inputs_per_group: int) -> LayerKind:
    if layer.target not in CONVOLUTIONS:
        return "linear"
    if arguments(layer)["groups"] == 1:
        return "convolution"
    return "depthwise" if inputs_per_group == 1 else "grouped"


def _batch_norm(graph: fx.GraphModule, node: fx.Node) -> BatchNormSummary:
    mean = attribute(graph, arguments(node)["running_mean"])
    assert mean is not None
    reason = obstacle(node)
    return BatchNormSummary(node.name, mean.numel(), reason is None, reason)


def _structure_behind_folding(graph: fx.GraphModule) -> fx.GraphModule:
    """The graph without the batch norms that fold. Its weights are not folded, so it must not be run."""
    copied = fx.Graph()
    copied.output(copied.graph_copy(graph.graph, {}))
    for node in list(copied.nodes):
        if node.op == "call_function" and node.target is BATCH_NORM and obstacle(node) is None:
            node.replace_all_uses_with(arguments(node)["input"])
            copied.erase_node(node)
    return fx.GraphModule(graph, copied, class_name="Folded")


def _parameters(graph: fx.GraphModule) -> int:
    statistics = {
        arguments(node)[key].target
        for node in graph.graph.nodes
        if node.op == "call_function" and node.target is BATCH_NORM
        for key in ("running_mean", "running_var")
    }
    stored = {node.target: attribute(graph, node) for node in graph.graph.nodes if node.op == "get_attr"}
    return sum(
        tensor.numel()
        for target, tensor in stored.items()
        if tensor is not None and tensor.is_floating_point() and tensor.dim() and target not in statistics
    )


def _operator(node: fx.Node) -> str:
    """`conv2d` for `aten.conv2d.default`."""
    return getattr(node.target, "__name__", str(node.target)).partition(".")[0]


def _batch_norm_matching(batch_norms: tuple[BatchNormSummary, ...], folded: int) -> Verdict:
    if folded:
        return Verdict(
            "batch-norm matching",
            False,
            f"no batch norm, but {folded} convolutions with a bias, into which exporters fold them: "
            "what the training data's statistics were is lost, unless a capsule tells (`reverie capsule`)",
        )
    if not batch_norms:
        return Verdict("batch-norm matching", False, "no batch norm, so nothing remembers the training data's statistics")
    channels = sum(norm.channels for norm in batch_norms)
    return Verdict("batch-norm matching", True, f"{_count(batch_norms, 'batch norm')} with {channels} means and variances")


def _folding(batch_norms: tuple[BatchNormSummary, ...]) -> Verdict:
    kept = [norm for norm in batch_norms if not norm.folds]
    if kept:
        more = f"; and {len(kept) - 1} more" if len(kept) > 1 else ""
        reason = f"{len(kept)} of {len(batch_norms)} stay: {kept[0].name!r}, because {kept[0].reason}{more}"
        return Verdict("batch-norm folding", False, reason)
    every = f"{len(batch_norms)} of {len(batch_norms)} fold into the layer in front of them"
    return Verdict("batch-norm folding", True, every if batch_norms else "no batch norm to fold")


def _integer_kernels(folded: fx.GraphModule) -> Verdict:
    data = data_nodes(folded)
    known = set(layers(folded))
    whole = CLIPPING | AVERAGES | PASS_THROUGH
    floating = Counter(
        _operator(node)
        for node in folded.graph.nodes
        if node in data
        and node.op == "call_function"
        and not (node in known or node.target in whole or combines_computed(node, data))
    )
    if not floating:
        return Verdict("integer kernels", True, "every operator has one")
    listed = ", ".join(f"{name} ({count})" for name, count in floating.most_common())
    return Verdict("integer kernels", False, f"these stay in float: {listed}")


def _equalization(folded: fx.GraphModule) -> Verdict:
    pairs = find_pairs(folded)
    if not pairs:
        return Verdict(
            "cross-layer equalization", False, "no two layers with only ReLU-like activations or pooling between them"
        )
    starts = {pair.first for pair in pairs} - {pair.second for pair in pairs}
    reason = f"{_count(pairs, 'pair')} of neighbouring layers in {_count(starts, 'chain')}"
    return Verdict("cross-layer equalization", True, reason)


def _layer_rounding(found: tuple[LayerSummary, ...]) -> Verdict:
    reason = f"{_count(found, 'layer')} with stored weights" if found else "no convolution or linear layer"
    return Verdict("layer-wise rounding", bool(found), reason)


def _block_reconstruction(blocks: tuple[BlockSummary, ...]) -> Verdict:
    if len(blocks) < 2:
        return Verdict("block units", False, "no single-entry, single-exit region is smaller than the network")
    wide = sum(len(block.layers) > 1 for block in blocks)
    return Verdict("block units", True, f"{len(blocks)} blocks, {wide} of them with several layers")


def _literature(graph: fx.GraphModule) -> Verdict:
    clips = [node for node in graph.graph.nodes if node.op == "call_function" and node.target in CLIPPING]
    if not clips:
        return Verdict("literature placement", False, "no ReLU-like activation, so only weights would be quantized")
    return Verdict("literature placement", True, f"{_count(clips, 'ReLU-like activation')} to quantize behind")


def _classification(output_shape: tuple[int, ...]) -> Verdict:
    if len(output_shape) != 1:
        return Verdict("classification", False, f"one output has shape {output_shape}, not (classes,)")
    return Verdict("classification", True, f"{output_shape[0]} classes")


def _count(things: Any, noun: str) -> str:
    return f"{len(things)} {noun}" if len(things) == 1 else f"{len(things)} {noun}s"


def _plain(value: Any) -> Any:
    """Tuples as lists, all the way down."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, (list, tuple)) else value
