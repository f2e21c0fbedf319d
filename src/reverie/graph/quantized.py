"""The integer model in memory: what quantization produced and every emitter starts from."""

import copy
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, fx

from reverie.errors import ModelError
from reverie.graph.operators import attribute, set_attribute
from reverie.graph.placement import PlacementKind, Student
from reverie.graph.quantizers import ActivationQuantizer
from reverie.grid import Grid


@dataclass(frozen=True)
class QuantizedLayer:
    """A convolution or linear layer as an integer runtime stores it.

    Args:
        name: Its node.
        path: The module that held its weight.
        weight, bias: Names of the stored tensors in the graph; bias may be None.
        codes: int8, shape of the weight.
        scale: Per output channel, shape (out, 1, ...).
        zero_point: Like `scale`; zeros in the `integer` placement.
        grid: Bits and signedness of `codes`.
        bias_codes: int32, shape (out,), on the scale of the accumulator (input scale times `scale`); None if the layer
            has no bias or its bias stays in float.
        source: The quantized tensor it reads, if it reads one.
    """

    name: str
    path: str
    weight: str
    bias: str | None
    codes: Int[Tensor, "out *rest"]
    scale: Float[Tensor, "out *ones"]
    zero_point: Int[Tensor, "out *ones"]
    grid: Grid
    bias_codes: Int[Tensor, " out"] | None
    source: str | None


@dataclass(frozen=True)
class QuantizedNetwork:
    """A student with everything decided.

    Args:
        graph: Runs in float exactly what the integers mean: weights and biases are stored dequantized under their
            names, and tensors pass through `activation_quantizers.NAME`.
        kind: The placement.
        activations: The quantizers in `graph`, by tensor.
        layers: By node name, in execution order.
    """

    graph: fx.GraphModule
    kind: PlacementKind
    activations: dict[str, ActivationQuantizer]
    layers: dict[str, QuantizedLayer]


@torch.no_grad()
def finish(student: Student) -> QuantizedNetwork:
    """The integer model that a calibrated and rounded student stands for.

    Raises:
        ModelError: An activation quantizer was never calibrated.
    """
    for name, activation in student.activations.items():
        if not activation.calibrated:
            raise ModelError(f"{name}: its range must be known, got no calibration; calibrate the student before finishing it")
    graph = copy.deepcopy(student.graph)
    nodes = {node.name: node for node in graph.graph.nodes}
    finished: dict[str, QuantizedLayer] = {}
    for name, layer in student.layers.items():
        weight_call, bias_call = nodes[name].args[1], nodes[name].args[2] if len(nodes[name].args) > 2 else None
        assert isinstance(weight_call, fx.Node)
        stored = weight_call.args[0]
        assert isinstance(stored, fx.Node)
        weight, quantizer = attribute(graph, stored), student.weights[name]
        assert weight is not None
        bias_codes = None
        with graph.graph.inserting_before(nodes[name]):
            weight_name = f"{layer.weight}_of_{name}" if len(stored.users) > 1 else layer.weight
            set_attribute(graph, weight_name, quantizer(weight))
            weight_call.replace_all_uses_with(graph.graph.get_attr(weight_name))
            if isinstance(bias_call, fx.Node) and bias_call.op == "call_module":
                kept = bias_call.args[0]
                assert isinstance(kept, fx.Node)
                bias = attribute(graph, kept)
                assert bias is not None
                bias_codes = student.biases[name].final_codes(bias)
                set_attribute(graph, str(layer.bias), student.biases[name](bias))
                bias_call.replace_all_uses_with(graph.graph.get_attr(str(layer.bias)))
        finished[name] = QuantizedLayer(
            name=name,
            path=layer.path,
            weight=weight_name,
            bias=layer.bias,
            codes=quantizer.final_codes(weight),
            scale=quantizer.scale.clone(),
            zero_point=quantizer.zero_point.clone(),
            grid=quantizer.grid,
            bias_codes=bias_codes,
            source=layer.source,
        )
    graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()
    graph.recompile()
    activations = {name: graph.get_submodule(f"activation_quantizers.{name}") for name in student.activations}
    return QuantizedNetwork(graph, student.kind, activations, finished)  # type: ignore[arg-type]
