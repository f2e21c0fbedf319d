"""An integer model executed on codes, as an integer runtime does, with nothing but PyTorch.

    accumulator = conv(x_codes - x_zero_point, w_codes) + b_codes
    y_codes     = clamp(round(accumulator * (x_scale * w_scale / y_scale)) + y_zero_point, low, high)

The fake-quantized graph computes the same in real numbers, and its float32 sums of dequantized products are off by a few
parts in ten million: in one value of a million that tips a rounding, and through eight-bit activations one tipped rounding
tips others, until some images in a thousand get another class. Sums of integers below 2^24 are exact in float32, so here
nothing tips, and the product with the multiplier is the very float32 product that ONNX Runtime takes.

Layers that read and write quantized tensors are executed so; everything else as in the fake-quantized graph.
"""

import copy

import torch
from jaxtyping import Float
from torch import Tensor, fx

from reverie.graph.operators import CLIPPING, CONVOLUTIONS, clipping_bounds, constant, set_attribute
from reverie.graph.quantized import QuantizedLayer, QuantizedNetwork
from reverie.grid import quantize


@torch.no_grad()
def as_integers(quantized: QuantizedNetwork) -> fx.GraphModule:
    """A graph with the inputs and outputs of `quantized.graph` whose layers compute on codes."""
    graph = copy.deepcopy(quantized.graph)
    nodes = {node.name: node for node in graph.graph.nodes}
    for layer in quantized.layers.values():
        node = nodes[layer.name]
        clipping = _only_reader(node)
        if clipping is not None and not (clipping.target in CLIPPING and all(map(constant, clipping.all_input_nodes[1:]))):
            clipping = None
        call = _only_reader(node if clipping is None else clipping)
        coded = layer.source is not None and (layer.bias is None or layer.bias_codes is not None)
        if coded and call is not None and call.op == "call_module":
            _on_codes(graph, quantized, layer, node, clipping, call)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _only_reader(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _on_codes(
    graph: fx.GraphModule,
    quantized: QuantizedNetwork,
    layer: QuantizedLayer,
    node: fx.Node,
    clipping: fx.Node | None,
    call: fx.Node,
) -> None:
    written = str(call.target).partition(".")[2]
    source, target = quantized.activations[str(layer.source)], quantized.activations[written]
    column = (-1, 1, 1) if node.target in CONVOLUTIONS else (-1,)
    low, high = (torch.tensor(float(end), device=target.scale.device) for end in (target.grid.quant_min, target.grid.quant_max))
    for bound, below in clipping_bounds(graph, clipping) if clipping is not None else ():
        code = quantize(bound.to(target.scale.device), target.scale, target.zero_point, target.grid)
        low, high = (torch.maximum(low, code), high) if below else (low, torch.minimum(high, code))
    multiplier = (source.scale * layer.scale.flatten() / target.scale).view(column)
    values = {
        "weight": layer.codes.to(layer.scale.dtype) - layer.zero_point,
        "multiplier": multiplier,
        # The smallest and the largest value before the zero point is added.
        "low": low - target.zero_point,
        "high": high - target.zero_point,
        "source_scale": source.scale,
        "target_scale": target.scale,
    }
    if layer.bias_codes is not None:
        values["bias"] = layer.bias_codes.to(layer.scale.dtype)
    for key, value in values.items():
        set_attribute(graph, f"integer.{layer.name}.{key}", value)
    with graph.graph.inserting_before(node):
        stored = {key: graph.graph.get_attr(f"integer.{layer.name}.{key}") for key in values}
        codes = graph.graph.call_function(_centred_codes, (node.args[0], stored["source_scale"]))
        node.args = (codes, stored["weight"], stored.get("bias"), *node.args[3:])
    with graph.graph.inserting_before(call):
        ends = (stored["low"], stored["high"], stored["target_scale"])
        written_values = graph.graph.call_function(_requantized, (node, stored["multiplier"], *ends))
    call.replace_all_uses_with(written_values)
    graph.graph.erase_node(call)
    if clipping is not None:
        graph.graph.erase_node(clipping)


def _centred_codes(x: Float[Tensor, "*shape"], scale: Float[Tensor, ""]) -> Float[Tensor, "*shape"]:
    """Codes minus the zero point of values that are on the grid; the rounding only undoes that of the division."""
    return torch.div(x, scale).round_()


def _requantized(
    accumulator: Float[Tensor, "*shape"],
    multiplier: Float[Tensor, "*channels"],
    low: Float[Tensor, "*#shape"],
    high: Float[Tensor, "*#shape"],
    scale: Float[Tensor, ""],
) -> Float[Tensor, "*shape"]:
    """The real values of the codes that an accumulator becomes."""
    return torch.clamp((accumulator * multiplier).round_(), low, high).mul_(scale)
