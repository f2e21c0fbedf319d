"""Batch norms of a captured graph: what they remember, and the statistics of a batch at their inputs.

With X the input of a batch norm, n samples of s positions and c channels, the statistics are

    level "batch"   mean_c = mean over n, s;  var_c = biased variance over n, s            shape (c,)
    level "sample"  the same over s alone                                                  shape (n, c)

(algorithms 0.3: m_l, v_l and m_l^i, v_l^i). Reading them costs one pass over X forwards and one backwards: the gradient
of mean and variance is added to that of the normalization where that one is computed.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, fx

from reverie.graph.operators import BATCH_NORM, arguments, attribute

Level = Literal["batch", "sample"]


@dataclass(frozen=True)
class BatchNorm:
    """What one batch norm remembers of its training data.

    Args:
        name: The batch norm's node.
        tensor: The node whose value it normalizes.
        mean, variance: Running statistics, shape (channels,).
    """

    name: str
    tensor: str
    mean: Float[Tensor, " channels"]
    variance: Float[Tensor, " channels"]

    @cached_property
    def deviation(self) -> Float[Tensor, " channels"]:
        """Running standard deviation, as a unit to measure in.

        A channel whose running variance is (almost) zero is dead: it gets the smallest deviation that float32 can tell from
        zero beside a typical one of the layer, and not none.
        """
        return torch.maximum(self.variance, 1e-6 * self.variance.mean() + 1e-12).sqrt()


@dataclass(frozen=True)
class Statistics:
    """Mean and biased variance at the inputs of all batch norms, in execution order."""

    mean: tuple[Float[Tensor, "..."], ...]
    variance: tuple[Float[Tensor, "..."], ...]


def batch_norms(graph: fx.GraphModule) -> list[BatchNorm]:
    """The batch norms with running statistics, in execution order."""
    found = []
    for node in graph.graph.nodes:
        if node.op == "call_function" and node.target is BATCH_NORM:
            named = arguments(node)
            mean, variance = attribute(graph, named["running_mean"]), attribute(graph, named["running_var"])
            if mean is not None and variance is not None:
                found.append(BatchNorm(node.name, named["input"].name, mean, variance))
    return found


class Observed(torch.nn.Module):
    """A captured graph that answers with its logits and the statistics of this batch.

    Shares the weights of `graph` and leaves it alone.
    """

    def __init__(self, graph: fx.GraphModule, level: Level = "batch") -> None:
        super().__init__()
        copied = fx.Graph()
        output = copied.graph_copy(graph.graph, {})
        per_sample = level == "sample"
        pairs = []
        for node in list(copied.nodes):
            if node.op == "call_function" and node.target is BATCH_NORM:
                named = arguments(node)
                read = [named[key] for key in ("input", "running_mean", "running_var", "weight", "bias", "eps")]
                with copied.inserting_before(node):
                    observed = copied.call_function(normalize_and_observe, (*read, per_sample))
                    parts = [copied.call_function(_item, (observed, index)) for index in range(3)]
                node.replace_all_uses_with(parts[0])
                output = parts[0] if output is node else output
                copied.erase_node(node)
                pairs.append(parts[1:])
        copied.output((output, [mean for mean, _ in pairs], [variance for _, variance in pairs]))
        self._graph = fx.GraphModule(graph, copied, class_name="Observed")

    def forward(self, inputs: Float[Tensor, "batch *shape"]) -> tuple[Float[Tensor, "batch classes"], Statistics]:
        """Logits and statistics; both carry gradients to `inputs`."""
        logits, means, variances = self._graph(inputs)
        return logits, Statistics(tuple(means), tuple(variances))


def _item(parts: tuple[Tensor, ...], index: int) -> Tensor:
    return parts[index]


def normalize_and_observe(
    x: Float[Tensor, "batch channels *space"],
    mean: Float[Tensor, " channels"],
    variance: Float[Tensor, " channels"],
    weight: Float[Tensor, " channels"] | None,
    bias: Float[Tensor, " channels"] | None,
    epsilon: float,
    per_sample: bool,
) -> tuple[Float[Tensor, "batch channels *space"], Float[Tensor, "*level"], Float[Tensor, "*level"]]:
    """The batch norm of `x` in evaluation mode, and mean and biased variance of `x` at the level asked for."""
    rate = torch.rsqrt(variance + epsilon)
    slope = rate if weight is None else weight * rate
    offset = -mean * slope if bias is None else bias - mean * slope
    return _NormalizeAndObserve.apply(x, slope, offset, per_sample)  # type: ignore[no-any-return, no-untyped-call]


class _NormalizeAndObserve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: Tensor, offset: Tensor, per_sample: bool) -> tuple[Tensor, Tensor, Tensor]:
        # The kernel that training-mode batch norms use: 3 to 25 times faster than `torch.var_mean` over these dimensions.
        read = x.reshape(1, -1, *x.shape[2:]) if per_sample else x
        mean, variance = (part.view(x.shape[:2] if per_sample else -1) for part in _update_statistics(read))
        ctx.save_for_backward(x, slope, mean)
        ctx.set_materialize_grads(False)
        return torch.addcmul(_column(offset, x), x, _column(slope, x)), mean, variance

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor, None, None, None]:
        for_output, for_mean, for_variance = gradients
        x, slope, mean = ctx.saved_tensors
        positions = x.numel() // mean.numel()
        curve = torch.zeros_like(mean) if for_variance is None else for_variance * (2 / positions)
        shift = -curve * mean if for_mean is None else for_mean / positions - curve * mean
        gradient = torch.addcmul(_column(shift, x), x, _column(curve, x))
        if for_output is not None:
            gradient.addcmul_(for_output, _column(slope, x))
        return gradient, None, None, None


def _update_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel of `x`."""
    mean, variance = torch.ops.aten.batch_norm_update_stats.default(x, None, None, 0.0)
    return mean, variance


def _column(values: Tensor, like: Tensor) -> Tensor:
    """`values` of shape (c,) or (n, c), ready to broadcast against (n, c, ...)."""
    return values.view(*values.shape, *[1] * (like.dim() - 2))
