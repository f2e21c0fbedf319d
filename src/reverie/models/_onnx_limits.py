"""What an ONNX file may grow to: a few kilobytes can describe terabytes, by functions of functions and by sizes alone.

Counted before anything is expanded or computed. What a node makes is checked while the network is converted (`_onnx_module.py`).
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from reverie.errors import ModelError

# ConvNeXt-L, exported with every function inlined, has 4000.
MOST_NODES = 200_000
# Of one tensor of two images, 1 GiB of float32: a convolution of 64 channels on 1024 x 1024 pixels has half of it.
MOST_ELEMENTS = 2**28
# Of an array of sizes or indices; tables of relative positions have thousands.
MOST_INTEGERS = 2**22
_TOLD_AT_MOST = 10**18
# Of a file that takes batches of one size alone.
MOST_BATCH = 4096
# Of the input: 4096 x 4096 pixels in colour.
MOST_INPUT_ELEMENTS = 3 * 2**24


def check_functions(model: onnx.ModelProto) -> None:
    """Refuses functions that become too many nodes when they are written out, or that call themselves.

    Raises:
        ModelError: Names the function, or the number.
    """
    bodies = {(function.domain, function.name): function.node for function in model.functions}
    counted: dict[tuple[str, str], int] = {}
    # A function is counted behind all that it calls, without recursion: a chain of them may be longer than Python's stack.
    pending: list[tuple[tuple[str, str], bool]] = [(key, False) for key in bodies]
    open_: set[tuple[str, str]] = set()
    while pending:
        key, called = pending.pop()
        if called:
            # More than enough to be refused, and still a number that can be told.
            counted[key] = min(sum(counted.get(inner, 1) for inner in _calls(bodies[key])), _TOLD_AT_MOST)
            open_.discard(key)
        elif key in open_:
            raise ModelError(f"functions must not call themselves, got {key[1]!r}; export the network again")
        elif key not in counted:
            open_.add(key)
            pending.append((key, True))
            pending += [(inner, False) for inner in set(_calls(bodies[key])) if inner in bodies]
    total = sum(counted.get(key, 1) for key in _calls(model.graph.node))
    if total > MOST_NODES:
        raise ModelError(f"the network must have at most {MOST_NODES} nodes with its functions written out, got {total:.3g}")


def _calls(nodes: Iterable[onnx.NodeProto]) -> list[tuple[str, str]]:
    """Domain and operator of all nodes, those of subgraphs too."""
    found = []
    for node in nodes:
        found.append((node.domain, node.op_type))
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                found += _calls(graph.node)
    return found


def check_stored(tensors: Iterable[onnx.TensorProto]) -> None:
    """Refuses stored tensors whose sizes no memory holds, whatever bytes are there.

    Raises:
        ModelError: Names the tensor.
    """
    for tensor in tensors:
        sizes = list(tensor.dims)
        if min(sizes, default=0) < 0 or math.prod(sizes) > MOST_ELEMENTS:
            raise ModelError(
                f"stored tensors must have at most {MOST_ELEMENTS} values, got {_told(sizes)} in {tensor.name!r}; "
                "export the network again"
            )


def check_input(value: onnx.ValueInfoProto, shape: tuple[int, ...]) -> None:
    """Refuses an image that is larger than any network takes, or too many at a time.

    Args:
        value: The file's input.
        shape: Of one image.

    Raises:
        ModelError: Says the shape, or how many.
    """
    batch = value.type.tensor_type.shape.dim[0]
    if batch.HasField("dim_value") and not 1 <= batch.dim_value <= MOST_BATCH:
        raise ModelError(f"the batch must be free, or 1 to {MOST_BATCH}, got {batch.dim_value}; export it with a free batch")
    if math.prod(shape) > MOST_INPUT_ELEMENTS:
        raise ModelError(
            f"the input must have at most {MOST_INPUT_ELEMENTS} values, got {_told(shape)}; give a smaller --input-size"
        )


def check_arrays(kind: str, operands: Sequence[Any]) -> None:
    """Refuses an operator on integers, which are sizes and indices, that would make far more of them.

    Args:
        kind: The operator.
        operands: Arrays, and anything else, which is left out.

    Raises:
        ModelError: Says the shape.
    """
    arrays = [operand for operand in operands if isinstance(operand, np.ndarray)]
    shapes = [array.shape for array in arrays]
    if kind in ("ConstantOfShape", "Expand") and arrays:
        made = math.prod(int(size) for size in arrays[-1].flat if isinstance(size, int | np.integer))
    elif kind == "Gather" and len(arrays) == 2:
        made = arrays[0].size * arrays[1].size
    else:
        # Broadcast or joined: never more than the product of the largest sizes along each axis, times their number.
        rank = max((len(shape) for shape in shapes), default=0)
        aligned = [(1,) * (rank - len(shape)) + shape for shape in shapes]
        made = math.prod(max(sizes) for sizes in zip(*aligned, strict=True)) * max(len(arrays), 1)
    if made > MOST_INTEGERS and not any(isinstance(operand, Tensor) for operand in operands):
        raise ModelError(
            f"sizes and indices must be at most {MOST_INTEGERS} in one array, got {min(made, _TOLD_AT_MOST):.3g}; export the network again"
        )


class Bounded(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is on, an operator whose result would be too large is refused before it is computed.

    Raises:
        ModelError: Says the shape.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(returned.type, torch.TensorType | torch.ListType) for returned in func._schema.returns):
            asked_args, asked_kwargs = tree_map(_on_meta, (args, kwargs))
            try:
                asked = func(*asked_args, **asked_kwargs)
            except NotImplementedError:
                raise
            except RuntimeError:
                # Operands that do not fit: the operator itself says better what is wrong.
                return func(*args, **kwargs)
            for made in tree_leaves(asked):
                if isinstance(made, Tensor) and made.numel() > MOST_ELEMENTS:
                    raise ModelError(
                        f"tensors must have at most {MOST_ELEMENTS} values for two images, got {_told(made.shape)}; give a smaller input size"
                    )
        return func(*args, **kwargs)


def _on_meta(value: Any) -> Any:
    """A tensor's shape and type alone; places become the place of such tensors."""
    if isinstance(value, Tensor):
        return value.to("meta")
    return torch.device("meta") if isinstance(value, torch.device) else value


def _told(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
