"""The student: a copy of the captured graph with fake-quantize calls on tensors (edges), weights and biases.

Two placements, never mixed in one table (design, decision 2).

`integer`: what an integer runtime executes. On a grid are the network's input; the inputs of every convolution and
linear layer; both operands of every add, subtraction, product and concatenation of two computed tensors; inputs of
average pooling; and what leaves a convolution, behind the activation that clips it. Logits that a linear layer writes stay
in float: only linear layers have integer kernels that allow it. A tensor that only moved (pooled by maximum, sliced, padded,
reshaped) is on the grid it was on. Biases are int32. Ends (layers that read the network's input or write its output, what
the last one reads, and logits on a grid) have `end_bits`. What the first layers write has `stem_bits`: BRECQ, QDrop and Genie count it among
the ends (algorithms 9.2, 10.1). What sums and averages read (both operands of a residual block's sum) has `sum_bits`,
and layers that read the same tensor read it through a grid of their own (`sums.py`): nothing is multiplied with it, so its bits
cost no multiplier anything, and the papers leave it in float.

`literature`: batch norm kept, weights and what follows a ReLU only, ends as low as the rest, asymmetric weights whose
range need not hold zero, no bias quantization (algorithms 1.1, class A). It cannot be exported.
"""

import copy
import operator
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import fx, nn

from reverie.errors import ConfigError, ModelError, nearest
from reverie.graph.operators import (
    AVERAGES,
    CLIPPING,
    CONVOLUTIONS,
    LAYERS,
    PASS_THROUGH,
    arguments,
    attribute,
    combines_computed,
    constant,
    data_nodes,
    layers,
    set_attribute,
)
from reverie.graph.quantizers import ActivationQuantizer, BiasQuantizer, WeightQuantizer
from reverie.graph.sums import is_only_summed
from reverie.grid import MAX_BITS, MIN_BITS, Grid

PlacementKind = Literal["integer", "literature"]


@dataclass(frozen=True, kw_only=True)
class Bits:
    """Bits of single tensors; they win over those of their kind.

    Args:
        weights: Of weights, by layer, 2 to 8.
        activations: Of tensors, by name, 2 to 8.
    """

    weights: Mapping[str, int] = field(default_factory=dict)
    activations: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for kind, given in (("weights", self.weights), ("activations", self.activations)):
            for name, bits in given.items():
                if not MIN_BITS <= bits <= MAX_BITS:
                    raise ConfigError(f"bits.{kind} must be {MIN_BITS} to {MAX_BITS}, got {bits} for {name!r}")


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer of a student.

    Args:
        name: Its node.
        path: The module that held its weight, as users know it (`layer1.0.conv1`).
        weight, bias: Names of the stored tensors; bias may be None.
        source: The quantized tensor it reads, if it reads one.
        end: Whether it reads the network's input or writes its output.
    """

    name: str
    path: str
    weight: str
    bias: str | None
    source: str | None
    end: bool


@dataclass(frozen=True)
class Student:
    """A graph with quantizers, and where they are.

    Args:
        graph: Runs like the captured graph. Node names are the teacher's.
        kind: The placement.
        activations: Quantizers by the tensor they put on a grid.
        weights, biases: Quantizers by layer; `literature` has no quantized biases.
        layers: All convolutions and linear layers, in execution order, by name.
    """

    graph: fx.GraphModule
    kind: PlacementKind
    activations: dict[str, ActivationQuantizer]
    weights: dict[str, WeightQuantizer]
    biases: dict[str, BiasQuantizer]
    layers: dict[str, Layer]


def place(
    graph: fx.GraphModule,
    kind: PlacementKind,
    *,
    weight_bits: int,
    activation_bits: int,
    end_bits: int | None = None,
    stem_bits: int | None = None,
    sum_bits: int | None = None,
    symmetric: bool = False,
    bits: Bits | None = None,
) -> Student:
    """A student of `graph` (batch norms already folded for `integer`) whose quantizers wait for calibration.

    Args:
        end_bits: Bits at the ends of the network, weights and activations; None means no exception. Ignored (none) by
            the `literature` placement.
        stem_bits: Bits of what the layers that read the network's input write, as far as no other layer has a part in it; likewise.
        sum_bits: Bits of what additions, subtractions and averages read, no layer, and which is not at an end; likewise. With fewer bits than it
            for layers, `graph` should come from `separate_sums`.
        symmetric: Activations on signed grids whose zero point is 0.
        bits: Of single tensors, at the ends or not.

    Raises:
        ConfigError: `bits` names a layer or tensor that is not there, or has no grid.
        ModelError: The graph has no convolution or linear layer.
    """
    bits = bits or Bits()
    found = layers(graph)
    if not found:
        raise ModelError("place: the network must have a convolution or linear layer, got none; there is nothing to quantize")
    integer = kind == "integer"
    ends = _ends(graph) if integer else set()
    tensors = _integer_tensors(graph) if integer else _literature_tensors(graph)
    _check_names("weights", bits.weights, "layers with weights", {node.name for node in found})
    _check_names("activations", bits.activations, "tensors on a grid", {node.name for node in tensors})

    copied = copy.deepcopy(graph)
    activations, weights, biases = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
    copied.add_submodule("activation_quantizers", activations)
    copied.add_submodule("weight_quantizers", weights)
    copied.add_submodule("bias_quantizers", biases)
    nodes = {node.name: node for node in copied.graph.nodes}

    end_tensors = {_origin(node).name for node in graph.graph.nodes if node.op == "placeholder"}
    end_tensors |= {_origin(arguments(layer)["input"]).name for layer in found if layer in ends}
    output = graph.graph.output_node().args[0]
    assert isinstance(output, fx.Node)
    end_tensors.add(_origin(output).name)
    stem = _stem(graph, ends)
    for node in graph.graph.nodes:
        if node not in tensors:
            continue
        usual = activation_bits
        if integer and end_bits is not None and node.name in end_tensors:
            usual = end_bits
        elif stem_bits is not None and node in stem:
            usual = stem_bits
        elif integer and sum_bits is not None and is_only_summed(node):
            usual = sum_bits
        activations[node.name] = ActivationQuantizer(Grid(bits.activations.get(node.name, usual), signed=symmetric))
        here = nodes[node.name]
        with copied.graph.inserting_after(here):
            call = copied.graph.call_module(f"activation_quantizers.{node.name}", (here,))
        here.replace_all_uses_with(call, delete_user_cb=lambda user, call=call: user is not call)

    described: dict[str, Layer] = {}
    for original in found:
        layer, named = nodes[original.name], arguments(original)
        weight, bias = named["weight"], named["bias"]
        stored = attribute(graph, weight)
        assert stored is not None
        usual = end_bits if end_bits is not None and original in ends else weight_bits
        weights[layer.name] = WeightQuantizer(Grid(bits.weights.get(layer.name, usual), signed=True), stored)
        with copied.graph.inserting_before(layer):
            call = copied.graph.call_module(f"weight_quantizers.{layer.name}", (nodes[weight.name],))
        layer.update_arg(1, call)
        source = _origin(named["input"]).name
        source_name = source if source in activations else None
        bias_name = str(bias.target) if constant(bias) else None
        if bias_name is not None and len(bias.users) > 1:
            # Each layer's bias is corrected and coded by itself.
            bias_name = f"{bias_name}_of_{layer.name}"
            shared = attribute(graph, bias)
            assert shared is not None
            set_attribute(copied, bias_name, shared.clone())
            with copied.graph.inserting_before(layer):
                layer.update_arg(2, copied.graph.get_attr(bias_name))
        if integer and bias_name is not None and source_name is not None:
            biases[layer.name] = BiasQuantizer(activations[source_name], weights[layer.name])  # type: ignore[arg-type]
            with copied.graph.inserting_before(layer):
                call = copied.graph.call_module(f"bias_quantizers.{layer.name}", (layer.args[2],))
            layer.update_arg(2, call)
        path = str(weight.target).rpartition(".")[0] or layer.name
        described[layer.name] = Layer(layer.name, path, str(weight.target), bias_name, source_name, original in ends)
    copied.recompile()
    copied.to(next((tensor.device for tensor in graph.buffers()), torch.device("cpu")))
    return Student(
        graph=copied,
        kind=kind,
        activations=dict(activations.items()),  # type: ignore[arg-type]
        weights=dict(weights.items()),  # type: ignore[arg-type]
        biases=dict(biases.items()),  # type: ignore[arg-type]
        layers=described,
    )


def _check_names(kind: str, given: Mapping[str, int], meant: str, known: Collection[str]) -> None:
    for name in given:
        if name not in known:
            near = nearest(name, known)
            cure = f"did you mean {near!r}" if near else f"such as {min(known)!r}"
            raise ConfigError(f"bits.{kind} must name {meant}, got {name!r}; {cure}")


def _origin(node: fx.Node) -> fx.Node:
    """The node that computed the values which `node` only moved."""
    while node.op == "call_function" and node.target in PASS_THROUGH:
        source = node.all_input_nodes[0]
        if node.target is operator.getitem and source.target not in PASS_THROUGH:
            break
        node = source
    return node


def _integer_tensors(graph: fx.GraphModule) -> set[fx.Node]:
    data = data_nodes(graph)
    wanted: set[fx.Node] = set()
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            wanted.add(node)
        if node.op != "call_function" or node not in data:
            continue
        if (node.target in LAYERS and constant(arguments(node)["weight"])) or node.target in AVERAGES:
            wanted.add(_origin(node.all_input_nodes[0]))
        if combines_computed(node, data):
            wanted.update(_origin(operand) for operand in node.all_input_nodes)
        if node.target in CONVOLUTIONS:
            wanted.add(_clipped(node))
    return {node for node in wanted if node in data}


def _literature_tensors(graph: fx.GraphModule) -> set[fx.Node]:
    return {node for node in graph.graph.nodes if node.op == "call_function" and node.target in CLIPPING}


def _clipped(layer: fx.Node) -> fx.Node:
    readers = list(layer.users)
    return readers[0] if len(readers) == 1 and readers[0].target in CLIPPING else layer


def _ends(graph: fx.GraphModule) -> set[fx.Node]:
    """The layers that read the network's input or write its output, through anything but another layer."""
    known = set(layers(graph))
    data = data_nodes(graph)
    ends: set[fx.Node] = set()
    first = [node for node in graph.graph.nodes if node.op == "placeholder"]
    output = graph.graph.output_node().args[0]
    assert isinstance(output, fx.Node)
    for start, forwards in ((first, True), ([output], False)):
        frontier, seen = list(start), set(start)
        while frontier:
            node = frontier.pop()
            if node in known:
                ends.add(node)
                continue
            for near in node.users if forwards else node.all_input_nodes:
                if near in data and near not in seen:
                    seen.add(near)
                    frontier.append(near)
    return ends


def _stem(graph: fx.GraphModule, ends: set[fx.Node]) -> set[fx.Node]:
    """What the layers that read the network's input write, and what is computed from nothing else."""
    known, data = set(layers(graph)), data_nodes(graph)
    unlayered: set[fx.Node] = set()
    stem: set[fx.Node] = set()
    for node in graph.graph.nodes:
        if node not in data:
            continue
        read = [source for source in node.all_input_nodes if source in data]
        if node.op == "placeholder" or (node not in known and unlayered.issuperset(read)):
            unlayered.add(node)
        elif (node in ends and unlayered.issuperset(read)) or (node not in known and stem.union(unlayered).issuperset(read)):
            stem.add(node)
    return stem
