"""ONNX operators that move, pick, shape and convert values, and compute sizes; `_onnx_operators.py` says what values are."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from reverie.errors import ModelError

Attributes = dict[str, Any]
Operator = Callable[..., Any]

# Of `TensorProto.DataType`: FLOAT, FLOAT16, DOUBLE, BFLOAT16. What is not float32 is refused before anything is converted.
_FLOATS = frozenset({1, 10, 11, 16})


def is_float(value: Any) -> bool:
    """Whether a value is floating-point data, and not sizes or indices."""
    return isinstance(value, Tensor | float)


def integers(value: NDArray[Any] | Sequence[int] | int) -> list[Any]:
    """Sizes, axes or pads as a list of (symbolic) integers."""
    return list(np.atleast_1d(np.asarray(value, dtype=object)))


def _sizes(values: Sequence[Any]) -> NDArray[Any]:
    plain = all(isinstance(value, int | np.integer) for value in values)
    return np.array([int(value) if plain else value for value in values], dtype=np.int64 if plain else object)


def axes_of(attributes: Attributes, given: Any = None) -> list[int] | None:
    found = attributes.get("axes") if given is None else given
    return None if found is None else [int(axis) for axis in integers(found)]


def torch_pads(pads: Sequence[int]) -> list[int]:
    """The order of `torch.nn.functional.pad`: last axis first, begin and end of each together; no leading axes without any."""
    rank = len(pads) // 2
    pairs = [(int(pads[axis]), int(pads[axis + rank])) for axis in range(rank)]
    while pairs and pairs[0] == (0, 0):
        pairs = pairs[1:]
    return [pad for pair in reversed(pairs) for pad in pair]


def _shape(attributes: Attributes, x: Any) -> NDArray[Any]:
    return _sizes(list(x.shape)[attributes.get("start", 0) : attributes.get("end")])


def _reshape(attributes: Attributes, x: Any, shape: NDArray[Any]) -> Any:
    target = integers(shape)
    if not attributes.get("allowzero"):
        target = [x.shape[axis] if size == 0 else size for axis, size in enumerate(target)]
    if not is_float(x):
        return x.reshape([int(size) for size in target])
    batch = attributes["batch"]
    # A file for batches of one size says that size here. What it means is "as many as there are".
    if batch is not None and target[:1] == [batch] and _keeps_rows(target[1:], x.shape[1:]):
        target[0] = x.shape[0]
    return x.reshape(target)


def _keeps_rows(target: list[Any], rest: Sequence[int]) -> bool:
    return -1 in target or int(np.prod(target)) == int(np.prod(rest))


def _flatten(attributes: Attributes, x: Tensor) -> Tensor:
    axis = attributes.get("axis", 1) % x.dim()
    return x.flatten(1) if axis == 1 else x.reshape(int(np.prod(x.shape[:axis])), -1)


def _transpose(attributes: Attributes, x: Any) -> Any:
    order = attributes.get("perm", list(reversed(range(len(x.shape)))))
    return x.permute(order) if is_float(x) else x.transpose(order)


def _squeeze(attributes: Attributes, x: Any, given: Any = None) -> Any:
    axes = axes_of(attributes, given)
    if is_float(x):
        return x.squeeze() if axes is None else x.squeeze(tuple(axes))
    return np.squeeze(x, None if axes is None else tuple(axes))


def _unsqueeze(attributes: Attributes, x: Any, given: Any = None) -> Any:
    axes = axes_of(attributes, given) or []
    if not is_float(x):
        return np.expand_dims(x, tuple(axes))
    rank = x.dim() + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


def _concat(attributes: Attributes, *parts: Any) -> Any:
    if is_float(parts[0]):
        return torch.cat(parts, attributes["axis"])
    return np.concatenate([np.atleast_1d(part) for part in parts], attributes["axis"])


def _slice(_: Attributes, x: Any, starts: Any, ends: Any, axes: Any = None, steps: Any = None) -> Any:
    starts, ends = integers(starts), integers(ends)
    along = range(len(starts)) if axes is None else integers(axes)
    strides = [1] * len(starts) if steps is None else integers(steps)
    for axis, start, end, step in zip(along, starts, ends, strides, strict=True):
        chosen = slice(*(int(bound) if isinstance(bound, int | np.integer) else bound for bound in (start, end, step)))
        x = x[(slice(None),) * (int(axis) % len(x.shape)) + (chosen,)]
    return x


def _gather(attributes: Attributes, x: Any, indices: NDArray[Any]) -> Any:
    axis = attributes.get("axis", 0)
    if not is_float(x):
        return np.asarray(np.take(x, np.asarray(indices, dtype=np.int64), axis))
    if np.ndim(indices) == 0:
        return x.select(axis, int(indices))
    chosen = torch.as_tensor(np.asarray(indices, dtype=np.int64) % x.shape[axis], device=x.device)
    return x.index_select(axis, chosen.flatten()).unflatten(axis, tuple(chosen.shape))


def _split_sizes(attributes: Attributes, x: Any, given: Any) -> list[int]:
    size = x.shape[attributes.get("axis", 0)]
    found = attributes.get("split") if given is None else given
    if found is not None and np.ndim(found) > 0:
        return [int(part) for part in integers(found)]
    number = attributes.get("num_outputs", attributes["outputs"])
    part = -(-size // number) if found is None else int(found)
    return [min(part, size - start) for start in range(0, size, part)]


def _split(attributes: Attributes, x: Any, given: Any = None) -> tuple[Any, ...]:
    sizes, axis = _split_sizes(attributes, x, given), attributes.get("axis", 0)
    return tuple(torch.split(x, sizes, axis) if is_float(x) else np.split(x, np.cumsum(sizes)[:-1], axis))


def _split_to_sequence(attributes: Attributes, x: Any, given: Any = None) -> tuple[Any, ...]:
    if given is None:
        raise ModelError("SplitToSequence must say the sizes of its parts, got none")
    # A sequence is one value, and not as many outputs as it has parts.
    return (_split(attributes, x, given),)


def _expand(_: Attributes, x: Any, shape: NDArray[Any]) -> Any:
    sizes = integers(shape)
    if not is_float(x):
        return np.broadcast_to(x, np.broadcast_shapes(np.shape(x), tuple(int(size) for size in sizes)))
    # Both ways: a size of 1 keeps what is there.
    rank = max(x.dim(), len(sizes))
    x = x.reshape([1] * (rank - x.dim()) + list(x.shape))
    sizes = [1] * (rank - len(sizes)) + sizes
    return x.expand([had if wanted == 1 else wanted for had, wanted in zip(x.shape, sizes, strict=True)])


def _pad(attributes: Attributes, x: Tensor, given: Any = None, value: Any = None, axes: Any = None) -> Tensor:
    pads = [int(pad) for pad in integers(attributes["pads"] if given is None else given)]
    if axes is not None:
        along = [int(axis) % x.dim() for axis in integers(axes)]
        whole = [0] * 2 * x.dim()
        for place, axis in enumerate(along):
            whole[axis], whole[axis + x.dim()] = pads[place], pads[place + len(along)]
        pads = whole
    mode = {"constant": "constant", "reflect": "reflect", "edge": "replicate"}.get(attributes.get("mode", "constant"))
    if mode is None:
        raise ModelError(f"Pad must be constant, reflect or edge, got {attributes['mode']!r}")
    filled = float(attributes.get("value", 0.0) if value is None else value)
    return F.pad(x, torch_pads(pads), mode, filled if mode == "constant" else None)


def _constant_of_shape(attributes: Attributes, shape: NDArray[Any]) -> Any:
    value = attributes.get("value", torch.zeros(1))
    sizes = integers(shape)
    if is_float(value):
        return torch.full(sizes, float(value))
    return np.full([int(size) for size in sizes], value.item())


def _constant(attributes: Attributes) -> Any:
    kind = next(key for key in attributes if key.startswith("value"))
    value = attributes[kind]
    if kind == "value":
        return value
    return torch.tensor(value) if kind in ("value_float", "value_floats") else np.array(value)


def _cast(attributes: Attributes, x: Any) -> Any:
    to_float = attributes["to"] in _FLOATS
    if to_float == is_float(x):
        return x
    if to_float:
        return torch.from_numpy(np.asarray(x, dtype=np.float32))
    raise ModelError("a Cast must keep floating-point data floating-point, got one to integers")


def _cast_like(_: Attributes, x: Any, like: Any) -> Any:
    return _cast({"to": 1 if is_float(like) else 7}, x)


def _where(_: Attributes, condition: Any, x: Any, y: Any) -> Any:
    if not (is_float(x) or is_float(y)):
        return np.where(np.asarray(condition, dtype=bool), x, y)
    return torch.where(condition if isinstance(condition, Tensor) else torch.as_tensor(np.array(condition, dtype=bool)), x, y)


def _depth_to_space(attributes: Attributes, x: Tensor) -> Tensor:
    if attributes.get("mode", "DCR") == "CRD":
        return F.pixel_shuffle(x, attributes["blocksize"])
    side = attributes["blocksize"]
    parts = x.reshape(x.shape[0], side, side, -1, *x.shape[2:])
    return parts.permute(0, 3, 4, 1, 5, 2).flatten(4, 5).flatten(2, 3)


MOVES: dict[str, Operator] = {
    "Cast": _cast,
    "CastLike": _cast_like,
    "Concat": _concat,
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "DepthToSpace": _depth_to_space,
    "Dropout": lambda _, x, *settings: x,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "Identity": lambda _, x: x,
    "Pad": _pad,
    "Reshape": _reshape,
    "SequenceAt": lambda _, parts, index: parts[int(index)],
    "Shape": _shape,
    "Slice": _slice,
    "Split": _split,
    "SplitToSequence": _split_to_sequence,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Where": _where,
}
