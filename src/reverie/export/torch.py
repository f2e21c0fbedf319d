"""A `torch.export` program (`.pt2`) whose integers `torch.compile` lowers to int8 kernels on x86.

    activations     quantized_decomposed.quantize_per_tensor to uint8 -> [clamp of the codes] -> dequantize_per_tensor
    weights         int8 codes -> quantized_decomposed.dequantize_per_channel, one scale per output channel
    biases          float32, each the multiple of the accumulator's step that it is

That is the form in which PyTorch's own quantization writes networks, so Inductor finds it when it freezes weights, and makes
`onednn.qconv_pointwise` and `onednn.qlinear_pointwise` of it; docs/checkpoint.md has the three lines that compile it. Uncompiled
it answers the same, slower than full precision: that is what `runtimes/torch.py` proves. The node that gives the codes of tensor
NAME is NAME_codes.

Activations below 8 bits are clamped as codes, by an operator of its own: Inductor's int8 kernels drop `quant_min` and `quant_max`
of the quantize that they absorb, and would answer with all 256 codes. The clamp is fused into what follows.

Weights take a byte each, at any bit width: torch has no element types between; `network.safetensors` is dense. Quantize
multiplies by 1 / scale where ONNX divides, and oneDNN adds the bias as a float, so some codes in a million differ by one.
"""

import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.ao.quantization.fx._decomposed  # names the operators of torch.ops.quantized_decomposed
from torch import Tensor, fx

from reverie.export._lowering import Form, lower
from reverie.files import atomic_write
from reverie.graph.operators import arguments, attribute, set_attribute
from reverie.graph.quantized import QuantizedNetwork

_CODES = (0, 255, torch.uint8)
_BOUNDS = frozenset(
    {
        torch.ops.aten.clamp_min.default,
        torch.ops.aten.clamp_max.default,
        torch.ops.aten.maximum.default,
        torch.ops.aten.minimum.default,
    }
)
_QUANTIZE = torch.ops.quantized_decomposed.quantize_per_tensor.default
_DEQUANTIZE = torch.ops.quantized_decomposed.dequantize_per_tensor.default


@dataclass(frozen=True, kw_only=True)
class Torch:
    """Has no settings."""

    filename: ClassVar[str] = "network.pt2"
    runtime: ClassVar[str] = "torch"
    device: ClassVar[str | None] = "torch.compile on x86"

    def __call__(
        self, quantized: QuantizedNetwork, shape: tuple[int, ...], path: Path, *, facts: dict[str, str] | None = None
    ) -> None:
        """Writes `path`; see `export.Exporter`. Facts are extra files of the archive, by their names."""
        graph = lower(quantized, shape, Form())
        for node in list(graph.graph.nodes):
            if node.target is torch.ops.reverie.through_codes.default:
                _decompose_activation(graph, node)
            elif node.target is torch.ops.reverie.from_codes.default:
                _decompose_stored(graph, node)
        for node in graph.graph.find_nodes(op="call_function", target=torch.ops.aten.pad.default):
            _pad_codes(graph, node)
        graph.graph.eliminate_dead_code()
        _drop_unused(graph)
        graph.recompile()
        _write(graph, shape, path, facts or {})


def export_float(graph: fx.GraphModule, shape: tuple[int, ...], path: Path) -> None:
    """Writes a full-precision program of any batch size, for comparison.

    Args:
        graph: As `graph.fold` leaves it.
        shape: Of one input, without the batch.
    """
    _write(graph, shape, path, {})


def _write(graph: fx.GraphModule, shape: tuple[int, ...], path: Path, facts: dict[str, str]) -> None:
    archive = io.BytesIO()
    torch.export.save(_program(graph, shape), archive, extra_files=facts)
    atomic_write(path, archive.getvalue())


def _program(graph: fx.GraphModule, shape: tuple[int, ...]) -> torch.export.ExportedProgram:
    batch = {0: torch.export.Dim("batch")}
    with warnings.catch_warnings(), torch.no_grad():
        # What torch says here of its own parts is not the user's.
        warnings.simplefilter("ignore")
        program = torch.export.export(graph, (torch.zeros(2, *shape),), dynamic_shapes=(batch,), strict=False)
    # Tracing names nodes after their operators; their order stays.
    for before, after in zip(_code_nodes(graph.graph), _code_nodes(program.graph), strict=True):
        after._rename(before.name)
    for node in program.graph.nodes:
        # Traces of where nodes come from name files of this machine, and numbers that change from run to run.
        node.meta = {key: value for key, value in node.meta.items() if key == "val"}
    return program


def _code_nodes(graph: fx.Graph) -> Iterator[fx.Node]:
    """What gives the codes of each quantized tensor: a quantize, or the last of the bounds behind it."""
    for node in graph.find_nodes(op="call_function", target=_QUANTIZE):
        while (bound := next((reader for reader in node.users if reader.target in _BOUNDS), None)) is not None:
            node = bound
        yield node


def _drop_unused(graph: fx.GraphModule) -> None:
    """Deletes buffers that nothing reads any more, such as the weights in float."""
    read = {node.target for node in graph.graph.nodes if node.op == "get_attr"}
    for name, _ in list(graph.named_buffers()):
        if name not in read:
            *path, leaf = name.split(".")
            delattr(graph.get_submodule(".".join(path)), leaf)


def _stored(graph: fx.GraphModule, node: Any) -> Tensor | None:
    return attribute(graph, node) if isinstance(node, fx.Node) else None


def _decompose_activation(graph: fx.GraphModule, node: fx.Node) -> None:
    x, *stored, name = node.args
    scale, zero_point, low, high = (_stored(graph, value) for value in stored)
    assert scale is not None and zero_point is not None
    grid = (float(scale), int(zero_point), *_CODES)
    with graph.graph.inserting_before(node):
        codes = graph.graph.call_function(_QUANTIZE, (x, *grid))
        for bound, numbers, tensors in (
            (low, torch.ops.aten.clamp_min.default, torch.ops.aten.maximum.default),
            (high, torch.ops.aten.clamp_max.default, torch.ops.aten.minimum.default),
        ):
            if bound is not None:
                single = bound.numel() == 1
                limit = int(bound) if single else stored[2 if bound is low else 3]
                codes = graph.graph.call_function(numbers if single else tensors, (codes, limit))
        if name:
            codes._rename(f"{name}_codes")
        values = graph.graph.call_function(_DEQUANTIZE, (codes, *grid))
    node.replace_all_uses_with(values)
    graph.graph.erase_node(node)


def _decompose_stored(graph: fx.GraphModule, node: fx.Node) -> None:
    codes, scale = (_stored(graph, value) for value in node.args)
    assert codes is not None and scale is not None
    assert isinstance(node.args[0], fx.Node) and isinstance(node.args[1], fx.Node)
    name = str(node.args[0].target)
    with graph.graph.inserting_before(node):
        if codes.dtype is torch.int8:
            zeros = f"{name}_zero_point"
            set_attribute(graph, zeros, torch.zeros(len(scale), dtype=torch.int64))
            read = (node.args[0], node.args[1], graph.graph.get_attr(zeros), 0, -128, 127, torch.int8)
            value = graph.graph.call_function(torch.ops.quantized_decomposed.dequantize_per_channel.default, read)
        else:
            bias = name.removesuffix("_codes")
            set_attribute(graph, bias, codes * scale)
            value = graph.graph.get_attr(bias)
    node.replace_all_uses_with(value)
    graph.graph.erase_node(node)


def _pad_codes(graph: fx.GraphModule, node: fx.Node) -> None:
    """Moves a padding of zeros from behind a dequantize to in front of it: a convolution that reads floats stays in float."""
    dequantize, named = node.all_input_nodes[0], arguments(node)
    if dequantize.target is not _DEQUANTIZE or named["mode"] != "constant" or named["value"]:
        return
    codes, scale, zero_point, *ends = dequantize.args
    with graph.graph.inserting_before(node):
        padded = graph.graph.call_function(torch.ops.aten.pad.default, (codes, named["pad"], "constant", zero_point))
        values = graph.graph.call_function(_DEQUANTIZE, (padded, scale, zero_point, *ends))
    node.replace_all_uses_with(values)
    graph.graph.erase_node(node)


METHOD = Torch
