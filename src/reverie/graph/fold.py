"""Batch norms folded into the convolution or linear layer in front of them.

    W' = W * g,  b' = (b - mean) * g + beta,  g = gamma / sqrt(variance + epsilon)        (per output channel)

A batch norm folds when its input is a layer's output that nothing else reads. Others (DenseNet's, behind a concat) stay.
"""

import copy

import torch
from torch import fx

from reverie.graph.operators import BATCH_NORM, LAYERS, LINEARS, arguments, attribute, constant, set_attribute
from reverie.graph.unfold import is_unfolded


def obstacle(batch_norm: fx.Node) -> str | None:
    """What keeps a batch norm from folding; None if it folds."""
    named = arguments(batch_norm)
    layer = named["input"]
    if layer.target not in LAYERS:
        return f"it normalizes {layer.name!r}, which is not the output of a convolution or linear layer"
    if len(layer.users) > 1:
        return f"{layer.name!r} is read by others too"
    inner = arguments(layer)
    if not constant(inner["weight"]) or not (inner["bias"] is None or constant(inner["bias"])):
        return f"{layer.name!r} computes its weight or bias"
    if not (constant(named["running_mean"]) and constant(named["running_var"])):
        return "it has no running statistics"
    if layer.target in LINEARS and layer.meta["val"].dim() != 2:
        return f"it normalizes another axis of {layer.name!r} than its outputs"
    return None


def fold_batch_norms(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy of the graph without the batch norms that fold; same outputs up to rounding of float arithmetic."""
    folded = copy.deepcopy(graph)
    for node in list(folded.graph.nodes):
        if not (node.op == "call_function" and node.target is BATCH_NORM) or obstacle(node) is not None:
            continue
        named = arguments(node)
        layer = named["input"]
        if is_unfolded(node):
            node.replace_all_uses_with(layer)
            folded.graph.erase_node(node)
            continue
        inner = arguments(layer)
        weight, bias = attribute(folded, inner["weight"]), attribute(folded, inner["bias"])
        mean, variance = attribute(folded, named["running_mean"]), attribute(folded, named["running_var"])
        gamma, beta = attribute(folded, named["weight"]), attribute(folded, named["bias"])
        assert weight is not None and mean is not None and variance is not None
        # In double: the product of three float32 roundings would show at 1e-4 in deep networks with small variances.
        gain = torch.rsqrt(variance.double() + named["eps"]) * (1.0 if gamma is None else gamma.double())
        shift = ((0.0 if bias is None else bias.double()) - mean.double()) * gain + (0.0 if beta is None else beta.double())
        path = inner["weight"].target.rpartition(".")[0]
        prefix = f"{path}." if path else ""
        shared = len(inner["weight"].users) > 1
        # A weight that several layers share must not be folded twice, so each folded layer gets its own.
        for key, value in (("folded_weight", weight * gain.view(-1, *[1] * (weight.dim() - 1))), ("folded_bias", shift)):
            name = f"{prefix}{key}_{layer.name}" if shared else f"{prefix}{key}"
            set_attribute(folded, name, value.to(weight.dtype))
            with folded.graph.inserting_before(layer):
                stored = folded.graph.get_attr(name)
            position = 1 if key == "folded_weight" else 2
            args = [*layer.args, *[None] * (3 - len(layer.args))]
            args[position] = stored
            layer.args = tuple(args)
        node.replace_all_uses_with(layer)
        folded.graph.erase_node(node)
    return _cleaned(folded)


def _cleaned(graph: fx.GraphModule) -> fx.GraphModule:
    """A graph module that holds only the tensors its graph reads."""
    graph.graph.eliminate_dead_code()
    root = torch.nn.Module()
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            value = attribute(graph, node)
            assert value is not None
            set_attribute(root, node.target, value)
    return fx.GraphModule(root, graph.graph, class_name="Folded").eval()
