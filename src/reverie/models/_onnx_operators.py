"""What ONNX operators compute, in PyTorch: each is a function of a node's attributes and of its inputs' values.

Two kinds of values, because `torch.export` cannot follow a shape that is computed in a tensor:

    floating point      `torch.Tensor` (a single number that a file stores may come as a Python float)
    integers, booleans  `numpy.ndarray`: sizes, axes, indices and pads, which are there when the network is traced. Those that
                        depend on the batch are arrays of symbolic sizes (dtype object).

Attributes that became inputs in a later opset (axes of `ReduceMean`, pads of `Pad`) are read from where they are. Semantics are
those of opsets 11 to 24, from the specification at onnx.ai/onnx/operators.

Not here: operators on integers as data, control flow, recurrent layers, resizing, anything quantized.
"""

import operator
from collections.abc import Sequence
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from reverie.errors import ModelError
from reverie.models._onnx_moves import MOVES, Attributes, Operator, axes_of, is_float, torch_pads


def _elementwise(torch_operator: Operator, numpy_operator: Operator | None = None) -> Operator:
    def compute(_: Attributes, *operands: Any) -> Any:
        if numpy_operator is not None and not any(is_float(operand) for operand in operands):
            return np.asarray(numpy_operator(*operands))
        return torch_operator(*operands)

    return compute


def _activation(function: Operator) -> Operator:
    return lambda _, x: function(x)


def _spatial_pads(attributes: Attributes, x: Tensor, kernel: Sequence[int]) -> list[int]:
    """Zeros before and after each spatial axis, as `begin..., end...`."""
    rank = x.dim() - 2
    mode = attributes.get("auto_pad", "NOTSET")
    if mode in ("NOTSET", "VALID"):
        return list(attributes.get("pads", [0] * 2 * rank)) if mode == "NOTSET" else [0] * 2 * rank
    strides, dilations = attributes.get("strides", [1] * rank), attributes.get("dilations", [1] * rank)
    begins, ends = [], []
    for size, span, stride, dilation in zip(x.shape[2:], kernel, strides, dilations, strict=True):
        total = max((-(-size // stride) - 1) * stride + (span - 1) * dilation + 1 - size, 0)
        smaller, larger = total // 2, total - total // 2
        begins.append(smaller if mode == "SAME_UPPER" else larger)
        ends.append(larger if mode == "SAME_UPPER" else smaller)
    return begins + ends


def _padded(x: Tensor, pads: list[int], value: float) -> tuple[Tensor, list[int]]:
    """`x`, and the pads that a layer itself can do: those that are the same on both sides."""
    rank = len(pads) // 2
    if pads[:rank] == pads[rank:]:
        return x, pads[:rank]
    return F.pad(x, torch_pads(pads), value=value), [0] * rank


def convolution(attributes: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`Conv` over one or two spatial axes."""
    rank = x.dim() - 2
    function = {1: F.conv1d, 2: F.conv2d}.get(rank)
    if function is None:
        raise ModelError(f"a convolution must have one or two spatial axes, got {rank}")
    x, padding = _padded(x, _spatial_pads(attributes, x, weight.shape[2:]), 0.0)
    strides, dilations = attributes.get("strides", [1] * rank), attributes.get("dilations", [1] * rank)
    return function(x, weight, bias, strides, padding, dilations, attributes.get("group", 1))


def batch_norm(attributes: Attributes, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """`BatchNormalization` by its running statistics."""
    return F.batch_norm(x, mean, variance, weight, bias, training=False, eps=attributes.get("epsilon", 1e-5))


def linear(_: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`Gemm` or `MatMul` with a stored matrix, which `_onnx_module.py` has brought to (outputs, inputs)."""
    return F.linear(x, weight, bias)


def _gemm(attributes: Attributes, a: Any, b: Any, c: Any = 0.0) -> Any:
    if not (is_float(a) and is_float(b) and is_float(c)):
        raise ModelError("Gemm must be of floating-point data, got integers")
    a, b = (part.mT if attributes.get(key) else part for part, key in ((a, "transA"), (b, "transB")))
    return attributes.get("alpha", 1.0) * (a @ b) + attributes.get("beta", 1.0) * c


def _max_pool(attributes: Attributes, x: Tensor) -> Tensor:
    kernel = attributes["kernel_shape"]
    x, padding = _padded(x, _spatial_pads(attributes, x, kernel), float("-inf"))
    strides, dilations = (attributes.get(key, [1] * len(kernel)) for key in ("strides", "dilations"))
    function = F.max_pool2d if len(kernel) == 2 else F.max_pool1d
    return function(x, kernel, strides, padding, dilations, bool(attributes.get("ceil_mode")))


def _average_pool(attributes: Attributes, x: Tensor) -> Tensor:
    kernel = attributes["kernel_shape"]
    pads, counted = _spatial_pads(attributes, x, kernel), bool(attributes.get("count_include_pad"))
    if any(dilation != 1 for dilation in attributes.get("dilations", [])) or len(kernel) != 2:
        raise ModelError(f"AveragePool must have two axes without dilation, got {attributes}")
    rank = len(kernel)
    if pads[:rank] != pads[rank:] and not counted:
        raise ModelError(f"AveragePool must pad both sides alike or count the zeros, got pads {pads}")
    x, padding = _padded(x, pads, 0.0)
    return F.avg_pool2d(x, kernel, attributes.get("strides", [1] * rank), padding, bool(attributes.get("ceil_mode")), counted)


def _global_average_pool(_: Attributes, x: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(x, 1) if x.dim() == 4 else x.mean(tuple(range(2, x.dim())), keepdim=True)


def _global_max_pool(_: Attributes, x: Tensor) -> Tensor:
    return x.amax(tuple(range(2, x.dim())), keepdim=True)


def _reduce(torch_operator: Operator, numpy_operator: Operator | None = None) -> Operator:
    def compute(attributes: Attributes, x: Any, given: Any = None) -> Any:
        axes, keep = axes_of(attributes, given), bool(attributes.get("keepdims", 1))
        if axes is None and attributes.get("noop_with_empty_axes"):
            return x
        if is_float(x):
            return torch_operator(x, tuple(range(x.dim())) if axes is None else tuple(axes), keepdim=keep)
        if numpy_operator is None:
            raise ModelError("a mean must be of floating-point data, got integers")
        return np.asarray(numpy_operator(x, axis=None if axes is None else tuple(axes), keepdims=keep))

    return compute


def _clip(attributes: Attributes, x: Any, low: Any = None, high: Any = None) -> Any:
    low = attributes.get("min") if low is None else low
    high = attributes.get("max") if high is None else high
    if not is_float(x):
        return np.clip(x, low, high)
    return x if low is None and high is None else torch.clamp(x, low, high)


def _hard_sigmoid(attributes: Attributes, x: Tensor) -> Tensor:
    alpha, beta = attributes.get("alpha", 0.2), attributes.get("beta", 0.5)
    return F.hardsigmoid(x) if is_sixth(alpha) and beta == 0.5 else torch.clamp(x * alpha + beta, 0.0, 1.0)


def is_sixth(alpha: float) -> bool:
    """Whether a slope is that of the hard sigmoid of hard-swish, 1/6 in float32."""
    return bool(np.float32(alpha) == np.float32(1 / 6))


def _softmax(function: Operator) -> Operator:
    def compute(attributes: Attributes, x: Tensor) -> Any:
        if attributes["opset"] >= 13:
            return function(x, dim=attributes.get("axis", -1))
        # Until opset 12 over all axes from `axis` on, taken together.
        axis = attributes.get("axis", 1) % x.dim()
        return function(x.flatten(axis), dim=-1).reshape(x.shape)

    return compute


def _layer_norm(attributes: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    axis = attributes.get("axis", -1)
    return F.layer_norm(x, x.shape[axis:], weight, bias, attributes.get("epsilon", 1e-5))


def _leaky(function: Operator, default: float) -> Operator:
    return lambda attributes, x: function(x, attributes.get("alpha", default))


def _gelu(attributes: Attributes, x: Tensor) -> Tensor:
    return F.gelu(x, approximate=attributes.get("approximate", "none"))


def _swish(attributes: Attributes, x: Tensor) -> Tensor:
    alpha = attributes.get("alpha", 1.0)
    return F.silu(x) if alpha == 1 else x * torch.sigmoid(alpha * x)


def _prelu(_: Attributes, x: Tensor, slope: Tensor | float) -> Tensor:
    return torch.where(x >= 0, x, x * slope)


def _divide(x: Any, y: Any) -> Any:
    return np.asarray(x, dtype=object) // y


def _maximum(*parts: Any) -> Any:
    return reduce(lambda x, y: torch.maximum(torch.as_tensor(x), torch.as_tensor(y)), parts)


def _minimum(*parts: Any) -> Any:
    return reduce(lambda x, y: torch.minimum(torch.as_tensor(x), torch.as_tensor(y)), parts)


def _power(x: Any, y: Any) -> Any:
    return torch.pow(x, y)


OPERATORS: dict[str, Operator] = {
    **MOVES,
    "Abs": _elementwise(torch.abs, np.abs),
    "Add": _elementwise(operator.add, operator.add),
    "AveragePool": _average_pool,
    "BatchNormalization": batch_norm,
    "Clip": _clip,
    "Conv": convolution,
    "Div": _elementwise(operator.truediv, _divide),
    "Elu": _leaky(F.elu, 1.0),
    "Equal": _elementwise(torch.eq, operator.eq),
    "Erf": _activation(torch.erf),
    "Exp": _activation(torch.exp),
    "Floor": _activation(torch.floor),
    "Gelu": _gelu,
    "Gemm": _gemm,
    "GlobalAveragePool": _global_average_pool,
    "GlobalMaxPool": _global_max_pool,
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _activation(F.hardswish),
    "LayerNormalization": _layer_norm,
    "LeakyRelu": _leaky(F.leaky_relu, 0.01),
    "Log": _activation(torch.log),
    "LogSoftmax": _softmax(F.log_softmax),
    "MatMul": _elementwise(operator.matmul),
    "Max": _elementwise(_maximum, np.maximum),
    "MaxPool": _max_pool,
    "Min": _elementwise(_minimum, np.minimum),
    "Mish": _activation(F.mish),
    "Mul": _elementwise(operator.mul, operator.mul),
    "Neg": _elementwise(operator.neg, operator.neg),
    "PRelu": _prelu,
    "Pow": _elementwise(_power),
    "Reciprocal": _activation(torch.reciprocal),
    "ReduceMax": _reduce(torch.amax, np.max),
    "ReduceMean": _reduce(torch.mean),
    "ReduceProd": _reduce(torch.prod, np.prod),
    "ReduceSum": _reduce(torch.sum, np.sum),
    "Relu": _activation(F.relu),
    "Sigmoid": _activation(torch.sigmoid),
    "Softmax": _softmax(F.softmax),
    "Softplus": _activation(F.softplus),
    "Sqrt": _activation(torch.sqrt),
    "Sub": _elementwise(operator.sub, operator.sub),
    "Sum": lambda _, *parts: reduce(operator.add, parts),
    "Swish": _swish,
    "Tanh": _activation(torch.tanh),
}
