"""Batch norms put back where an exporter folded them: behind the convolutions with a bias.

A folded convolution computes y = gamma * (x - mu) / sigma + beta in one; what x looked like (mu, sigma) is lost. But whoever has
images can measure the mean m and the variance v of y itself, and a batch norm that remembers those and restores them,

    sqrt(v + epsilon) * (y - m) / sqrt(v + epsilon) + m  =  y,

changes nothing and gives synthesis what to match. It is marked, and folding (`fold.py`) takes it away without a trace.

Not here: what mu and sigma were. A network without a batch norm from the start can be unfolded just as well.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from reverie.graph.operators import BATCH_NORM, CONVOLUTIONS, arguments, aten, attribute, constant, set_attribute

_EPSILON = 1e-5
# One alone, such as what cuts an image into patches, is not a network that had batch norms.
_FEWEST = 2
_NORMALIZATIONS = frozenset({BATCH_NORM, aten.layer_norm.default, aten.group_norm.default, aten.instance_norm.default})
# In a node's `meta`.
_MARK = "reverie.unfolded"


def folded_convolutions(graph: fx.GraphModule) -> list[fx.Node]:
    """The convolutions with a stored bias, in execution order; none if there is but one, or if anything normalizes."""
    calls = [node for node in graph.graph.nodes if node.op == "call_function"]
    if any(node.target in _NORMALIZATIONS for node in calls):
        return []
    found = [
        node
        for node in calls
        if node.target in CONVOLUTIONS and constant(arguments(node)["weight"]) and constant(arguments(node)["bias"])
    ]
    return found if len(found) >= _FEWEST else []


def count_folded(module: nn.Module) -> int:
    """As many as `folded_convolutions` would find, without capturing: told by the shapes of weights and biases alone."""
    pairs = [(part._parameters.get("weight"), part._parameters.get("bias")) for part in module.modules()]
    shapes = [(weight.shape, bias.shape) for weight, bias in pairs if weight is not None and bias is not None]
    # Only what normalizes scales and shifts the same values.
    if any(weight == bias for weight, bias in shapes):
        return 0
    found = sum(len(weight) in (3, 4) for weight, _ in shapes)
    return found if found >= _FEWEST else 0


def unfold(graph: fx.GraphModule, statistics: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None) -> fx.GraphModule:
    """A copy of the graph with a batch norm that changes nothing behind each of `folded_convolutions`.

    Args:
        statistics: Mean and variance of each one's output, shape (channels,); None for zeros and ones.
    """
    unfolded = copy.deepcopy(graph)
    for index, node in enumerate(folded_convolutions(unfolded)):
        bias = attribute(unfolded, arguments(node)["bias"])
        assert bias is not None
        mean, variance = (
            (torch.zeros_like(bias), torch.ones_like(bias)) if statistics is None else (s[index] for s in statistics)
        )
        mean, variance = mean.to(bias), variance.to(bias)
        name = f"{node.name}_batch_norm"
        stored = {"weight": (variance + _EPSILON).sqrt(), "bias": mean, "running_mean": mean, "running_var": variance}
        for key, value in stored.items():
            set_attribute(unfolded, f"unfolded.{node.name}.{key}", value.clone())
        with unfolded.graph.inserting_after(node):
            made = unfolded.graph.call_function(BATCH_NORM, name=name)
        with unfolded.graph.inserting_before(made):
            held = [unfolded.graph.get_attr(f"unfolded.{node.name}.{key}") for key in stored]
        node.replace_all_uses_with(made)
        made.args = (node, *held, False, 0.1, _EPSILON, False)
        made.meta.update({**node.meta, _MARK: True})
    unfolded.recompile()
    return unfolded


def is_unfolded(node: fx.Node) -> bool:
    """Whether a batch norm is one of `unfold`, which changes nothing."""
    return bool(node.meta.get(_MARK))
