"""An ONNX graph as a PyTorch module: executed node by node, stored tensors as parameters of modules named after them.

What does not depend on the input is computed once, when the module is made: constants, computed weights, sizes that a file
states. The rest is `forward`, which `torch.export` traces like any other; its batch is free even if the file's is not.

Idioms of exporters become what they were: `x * Sigmoid(x)` is SiLU, `x * HardSigmoid(x)` hard-swish, `MatMul` or `Gemm` with a
stored matrix a linear layer, with its bias if an `Add` behind it is one.
"""

import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

from reverie.errors import ModelError, at
from reverie.models._onnx_limits import Bounded, check_arrays
from reverie.models._onnx_moves import Attributes, Operator
from reverie.models._onnx_operators import OPERATORS, is_sixth, linear

_LAYER = ("input", "weight", "bias")
_SLOTS = {
    "Conv": _LAYER,
    "Gemm": _LAYER,
    "MatMul": _LAYER,
    "LayerNormalization": _LAYER,
    "BatchNormalization": (*_LAYER, "running_mean", "running_var"),
}
_STATISTICS = frozenset({"running_mean", "running_var"})
# A stored single number is a number to these, as it was in the network's own code.
_TAKE_NUMBERS = frozenset({"Add", "Clip", "Div", "Max", "Min", "Mul", "Pad", "Pow", "Sub"})
_OF_A_MODULE = re.compile(r"\w+(\.\w+)*(?=\.weight$)")


@dataclass(frozen=True)
class _Node:
    """What `onnx.NodeProto` says, or an idiom of several nodes."""

    kind: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Attributes
    operator: Operator


@dataclass(frozen=True)
class _Step:
    """One node that depends on the input.

    Args:
        run: Its operator, together with what it reads besides other nodes' values.
        inputs: Names of values; None for an input that is left out or that `run` holds itself.
    """

    run: Callable[..., Any]
    inputs: tuple[str | None, ...]
    outputs: tuple[str, ...]


class _Layer(nn.Module):
    """A node with stored tensors: parameters, or buffers if they are running statistics."""

    def __init__(self, node: _Node, held: list[Any]) -> None:
        super().__init__()
        self._operator, self._attributes, self._held = node.operator, node.attributes, list[Any]()
        names = _SLOTS.get(node.kind) or [f"constant_{position}" for position in range(len(held))]
        for name, value in zip(names, held, strict=False):
            self._held.append(name if isinstance(value, Tensor) else value)
            if name in _STATISTICS:
                self.register_buffer(name, value)
            elif isinstance(value, Tensor):
                self.register_parameter(name, nn.Parameter(value.clone()))

    def forward(self, *given: Any) -> Any:
        """The node's value; None is given for what the layer holds."""
        held = (getattr(self, value) if isinstance(value, str) else value for value in self._held)
        return self._operator(self._attributes, *_filled(given, held))


class _Function:
    """A node without stored tensors."""

    def __init__(self, node: _Node, held: list[Any]) -> None:
        self._operator, self._attributes, self._held = node.operator, node.attributes, held

    def __call__(self, *given: Any) -> Any:
        return self._operator(self._attributes, *_filled(given, self._held))


class OnnxModule(nn.Module):
    """The graph of `model` from `(n, channels, height, width)` to its one output.

    Args:
        model: As `_onnx_file.read` gives it: one input, one output, operators of the standard, all tensors inside.
        example: `(2, channels, height, width)`; executed once, to tell sizes from data.
        channels_last: The file takes `(n, height, width, channels)`.

    Raises:
        ModelError: A use of an operator that is not converted; names the node.
    """

    def __init__(self, model: onnx.ModelProto, example: Tensor, *, channels_last: bool = False) -> None:
        super().__init__()
        graph = model.graph
        self._input, self._output, self._channels_last = graph.input[0].name, graph.output[0].name, channels_last
        self._steps: list[_Step] = []
        batch = graph.input[0].type.tensor_type.shape.dim[0]
        common = {
            "batch": batch.dim_value if batch.HasField("dim_value") else None,
            "opset": next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")),
        }
        stored = {tensor.name: _value(tensor) for tensor in graph.initializer}
        values: dict[str, Any] = {self._input: self._arranged(example)}
        idioms = _Idioms([_node(node, common) for node in graph.node], self._output)
        with torch.no_grad(), Bounded():  # type: ignore[no-untyped-call]
            for node in idioms.nodes:
                with at(f"{node.kind} {node.name or node.outputs[0]!r}"):
                    self._add(idioms.applied(node, stored), stored, values)
        if self._output in stored:
            raise ModelError("the output must depend on the input, got a constant; export the network again")

    def forward(self, inputs: Tensor) -> Tensor:
        """Its answers."""
        values: dict[str, Any] = {self._input: self._arranged(inputs)}
        for step in self._steps:
            values.update(_named(step.outputs, step.run(*(None if name is None else values[name] for name in step.inputs))))
        answer: Tensor = values[self._output]
        return answer

    def _arranged(self, inputs: Tensor) -> Tensor:
        return inputs.permute(0, 2, 3, 1) if self._channels_last else inputs

    def _add(self, node: _Node, stored: dict[str, Any], values: dict[str, Any]) -> None:
        """Executes `node` on the example: what it makes is `stored` if it depends on no input, and else a step is added."""
        if all(output in stored or output in values for output in node.outputs):
            # The second half of an idiom.
            return
        if node.kind == "CastLike" and node.inputs[0] in stored:
            # The other input lends its type alone.
            stored.update(_named(node.outputs, _executed(node, stored[node.inputs[0]], (stored | values)[node.inputs[1]])))
            return
        held = [stored.get(name) for name in node.inputs]
        if all(name in stored or not name for name in node.inputs):
            # What is stored has no batch, even if its first axis happens to be of the batch's size.
            alone = replace(node, attributes=node.attributes | {"batch": None})
            stored.update(_named(node.outputs, _executed(alone, *held)))
            return
        if node.kind in _TAKE_NUMBERS:
            held = [_number(value) for value in held]
        run: Callable[..., Any]
        if any(isinstance(value, Tensor) for value in held):
            run = _Layer(node, held)
            self._place(_path(node), run)
        else:
            run = _Function(node, held)
        step = _Step(run, tuple(name if name in values else None for name in node.inputs), node.outputs)
        made = _executed(
            replace(node, operator=lambda _, *given: run(*given)),
            *(None if name is None else values[name] for name in step.inputs),
        )
        values.update(_named(node.outputs, made))
        self._steps.append(step)

    def _place(self, path: str, layer: nn.Module) -> None:
        """Makes `layer` the submodule `path`, or `path_2` where there is something already."""
        owner: nn.Module = self
        *folders, leaf = path.split(".")
        for name in folders:
            if name not in owner._modules:
                name = f"{name}_" if hasattr(owner, name) else name
                owner.add_module(name, nn.Module())
            owner = getattr(owner, name)
        count, free = 1, leaf
        while hasattr(owner, free):
            count += 1
            free = f"{leaf}_{count}"
        owner.add_module(free, layer)


class _Idioms:
    """Several nodes of a file that stand for one operator of the network it was made of."""

    def __init__(self, nodes: list[_Node], output: str) -> None:
        self.nodes = nodes
        self._made_by = {name: node for node in nodes for name in node.outputs}
        self._readers: dict[str, list[_Node | None]] = defaultdict(list, {output: [None]})
        for node in nodes:
            for name in node.inputs:
                self._readers[name].append(node)

    def applied(self, node: _Node, stored: dict[str, Any]) -> _Node:
        """`node`, or the idiom that begins or ends with it.

        Args:
            stored: What is known by now not to depend on the input. Matrices and biases of linear layers are added.
        """
        if node.kind in ("MatMul", "Gemm"):
            return self._linear(node, stored)
        if node.kind == "Mul":
            for x, gate in (node.inputs, node.inputs[::-1]):
                maker = self._made_by.get(gate)
                if maker is not None and maker.inputs[:1] == (x,) and (function := _gated(maker)) is not None:
                    return replace(node, inputs=(x,), operator=lambda _, x, function=function: function(x))
        return node

    def _linear(self, node: _Node, stored: dict[str, Any]) -> _Node:
        matrix = stored.get(node.inputs[1])
        if not isinstance(matrix, Tensor) or node.inputs[0] in stored or matrix.dim() != 2 or node.attributes.get("transA"):
            return node
        alpha, beta = (node.attributes.get(key, 1.0) for key in ("alpha", "beta"))
        outputs, bias = node.outputs, node.inputs[2] if len(node.inputs) > 2 else ""
        if node.kind == "MatMul" and len(readers := self._readers[node.outputs[0]]) == 1:
            (reader,) = readers
            if reader is not None and reader.kind == "Add":
                (other,) = [name for name in reader.inputs if name != node.outputs[0]] or [""]
                if isinstance(stored.get(other), Tensor) and stored[other].shape == matrix.shape[1:]:
                    outputs, bias = reader.outputs, other
        found = stored.get(bias)
        width = matrix.shape[0 if node.attributes.get("transB") else 1]
        if bias and not (isinstance(found, Tensor) and found.numel() == width):
            return node
        # Under names of this node's own: another may read the same tensors in another way. `_path` reads the ends of names.
        weight_name, bias_name = f"{node.outputs[0]}:{node.inputs[1]}", f"{node.outputs[0]}:bias"
        stored[weight_name] = alpha * (matrix if node.attributes.get("transB") else matrix.t())
        inputs: tuple[str, ...] = (node.inputs[0], weight_name)
        if found is not None:
            stored[bias_name] = beta * found.flatten()
            inputs = (*inputs, bias_name)
        return replace(node, inputs=inputs, outputs=outputs, operator=linear)


def _gated(gate: _Node) -> Callable[[Tensor], Tensor] | None:
    """What `x` times `gate` of `x` is."""
    if gate.kind == "Sigmoid":
        return F.silu
    slope, offset = gate.attributes.get("alpha", 0.2), gate.attributes.get("beta", 0.5)
    return F.hardswish if gate.kind == "HardSigmoid" and is_sixth(slope) and offset == 0.5 else None


def _node(node: onnx.NodeProto, common: Attributes) -> _Node:
    attributes = {attribute.name: _attribute(attribute) for attribute in node.attribute}
    return _Node(
        kind=node.op_type,
        name=node.name,
        inputs=tuple(node.input),
        outputs=tuple(name for name in node.output if name),
        attributes=common | {"outputs": len(node.output)} | attributes,
        operator=OPERATORS[node.op_type],
    )


def _attribute(attribute: onnx.AttributeProto) -> Any:
    value = onnx.helper.get_attribute_value(attribute)
    if isinstance(value, onnx.TensorProto):
        return _value(value)
    return value.decode() if isinstance(value, bytes) else value


def _value(tensor: onnx.TensorProto) -> Any:
    """Floating-point data as a tensor, all else as an array."""
    try:
        array = numpy_helper.to_array(tensor)
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise ModelError(
            f"a stored tensor must hold what its shape and type say, got {' '.join(str(error).split())[:100]!r} for {tensor.name!r}; export it again"
        ) from error
    # A copy: the file's own bytes cannot be written to.
    return torch.from_numpy(array.copy()) if array.dtype == np.float32 else array


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, Tensor) and value.numel() == 1 else value


def _filled(given: tuple[Any, ...], held: Any) -> list[Any]:
    return [own if value is None else value for value, own in zip(given, held, strict=True)]


def _named(outputs: tuple[str, ...], made: Any) -> dict[str, Any]:
    return dict(zip(outputs, made if isinstance(made, tuple) else (made,), strict=False))


# What a value of another kind or size than expected leads to in operators.
_FAILURES = (
    AttributeError,
    IndexError,
    KeyError,
    NotImplementedError,
    RuntimeError,
    StopIteration,
    TypeError,
    ValueError,
)


def _executed(node: _Node, *inputs: Any) -> Any:
    check_arrays(node.kind, inputs)
    try:
        return node.operator(node.attributes, *inputs)
    except _FAILURES as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"must be used as Reverie converts it, got {type(error).__name__}: {reason}; check the input size"
        ) from error


def _path(node: _Node) -> str:
    """Where a layer lies among the modules: where it lay in the network that was exported, if the file tells."""
    for name in node.inputs[1:2]:
        if found := _OF_A_MODULE.search(name.rpartition(":")[2]):
            return found[0]
    # Names of nodes are scopes: "/layer1/layer1.0/conv1/Conv".
    scopes = [scope for scope in node.name.split("/") if scope]
    if len(scopes) > 1:
        scopes = scopes[:-1]
    inner = [
        scope for scope, following in zip(scopes, [*scopes[1:], ""], strict=False) if not following.startswith(f"{scope}.")
    ]
    words = [re.sub(r"\W", "_", word) for word in ".".join(inner).split(".") if word]
    return ".".join(words) or node.kind.lower()
