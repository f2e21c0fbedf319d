"""The native checkpoint: every code in as many bits as it has, in one safetensors file.

For a layer whose weight is called W in the captured graph: `W.codes` (uint8, dense packing of `grid.packing`), `W.scale`
and `W.zero_point` (per output channel); `B.codes` (int32) for a bias B on the accumulator's grid. For a quantized tensor
T: `T.scale`, `T.zero_point`. Everything else the graph stores stands in float under its own name. The header says, for
each layer, shape, bits and names, and for each tensor its bits, as JSON under the metadata key `reverie`.
"""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from reverie import received
from reverie.errors import ConfigError, at
from reverie.files import atomic_write
from reverie.graph.placement import Bits, Student
from reverie.graph.quantized import QuantizedNetwork, finish
from reverie.grid import MAX_BITS, MIN_BITS
from reverie.grid.packing import pack, unpack

_FORMAT = "reverie packed 1"
# One key: safetensors writes several in an order that changes from process to process.
_KEY = "reverie"
_AGAIN = "run `reverie quantize` again"


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """What the header says of a layer."""

    weight: str
    bias: str | None
    shape: tuple[int, ...]
    bits: int
    source: str | None


@dataclass(frozen=True, kw_only=True)
class _Header:
    """What the header says."""

    placement: str
    layers: dict[str, _Layer]
    tensors: dict[str, int]
    facts: dict[str, str]


def write_packed(quantized: QuantizedNetwork, path: Path, *, facts: dict[str, str] | None = None) -> None:
    """Writes `path`, whole or not at all; the same arguments give the same bytes.

    Args:
        facts: What the file is, as text by name; stored in its header.
    """
    tensors: dict[str, Tensor] = {}
    described: dict[str, dict[str, Any]] = {}
    stored: set[str] = set()
    for name, layer in quantized.layers.items():
        tensors[f"{layer.weight}.codes"] = pack(layer.codes.cpu(), layer.grid.bits)
        tensors[f"{layer.weight}.scale"] = layer.scale.flatten()
        tensors[f"{layer.weight}.zero_point"] = layer.zero_point.flatten()
        described[name] = {
            "weight": layer.weight,
            "bias": layer.bias if layer.bias_codes is not None else None,
            "shape": list(layer.codes.shape),
            "bits": layer.grid.bits,
            "source": layer.source,
        }
        stored.add(layer.weight)
        if layer.bias_codes is not None:
            tensors[f"{layer.bias}.codes"] = layer.bias_codes
            stored.add(str(layer.bias))
    for name, quantizer in quantized.activations.items():
        tensors[f"{name}.scale"], tensors[f"{name}.zero_point"] = quantizer.scale, quantizer.zero_point
    for name, tensor in quantized.graph.named_buffers():
        if name not in stored and not name.startswith("activation_quantizers."):
            tensors[name] = tensor
    header = {
        "format": _FORMAT,
        "placement": quantized.kind,
        "layers": described,
        "tensors": {name: quantizer.grid.bits for name, quantizer in quantized.activations.items()},
        "facts": facts or {},
    }
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    atomic_write(path, lambda aside: save_file(whole, aside, metadata={_KEY: json.dumps(header)}))


def read_packed(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What a packed checkpoint holds.

    Returns:
        Codes unpacked to int8 in the weight's shape, everything else as stored; and the header, its JSON decoded.

    Raises:
        ConfigError: The file is not one of ours, or its header and its tensors do not belong together.
    """
    with at(str(path)):
        if path.exists():
            received.check_file(path)
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"must be a packed network, got {str(error).splitlines()[0]!r}; {_AGAIN}") from None
        text = metadata.get(_KEY, "{}")
        stated = received.parse_json(text, dict[str, Any], _AGAIN).get("format")
        if stated != _FORMAT:
            raise ConfigError(f"must be a packed network, got the format {stated!r}; {_AGAIN}")
        header: dict[str, Any] = received.parse_json(text, _Header, _AGAIN)
        for name, layer in header["layers"].items():
            with at(f"layer {name!r}"):
                _check_layer(layer, tensors)
            key = f"{layer['weight']}.codes"
            tensors[key] = unpack(tensors[key], tuple(layer["shape"]), layer["bits"], signed=True)
        for name, bits in header["tensors"].items():
            with at(f"tensor {name!r}"):
                _check_bits_stated(bits)
                _check(tensors, f"{name}.scale", torch.float32, ())
                _check(tensors, f"{name}.zero_point", torch.int32, ())
    return tensors, header


def _check_layer(layer: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Refuses a layer whose codes, scales or bias are not there, or not as many as its shape says."""
    _check_bits_stated(layer["bits"])
    shape, weight = layer["shape"], layer["weight"]
    if not shape or min(shape) < 1:
        raise ConfigError(f"shape must have sizes of at least 1, got {tuple(shape)}; {_AGAIN}")
    _check(tensors, f"{weight}.codes", torch.uint8, (-(-math.prod(shape) * layer["bits"] // 8),))
    _check(tensors, f"{weight}.scale", torch.float32, (shape[0],))
    _check(tensors, f"{weight}.zero_point", torch.int32, (shape[0],))
    if layer["bias"] is not None:
        _check(tensors, f"{layer['bias']}.codes", torch.int32, (shape[0],))


def _check_bits_stated(bits: int) -> None:
    if not MIN_BITS <= bits <= MAX_BITS:
        raise ConfigError(f"bits must be {MIN_BITS} to {MAX_BITS}, got {bits}; {_AGAIN}")


def _check(tensors: dict[str, Tensor], name: str, kind: torch.dtype, shape: tuple[int, ...]) -> None:
    found = tensors.get(name)
    if found is None or (found.dtype, tuple(found.shape)) != (kind, shape):
        got = "nothing" if found is None else f"{found.dtype} of shape {tuple(found.shape)}"
        raise ConfigError(f"{name} must be {kind} of shape {shape}, got {got}; {_AGAIN}")
    if name.endswith(".scale") and not bool(((found > 0) & found.isfinite()).all()):
        raise ConfigError(f"{name} must be positive and finite, got {float(found.min()):g} to {float(found.max()):g}; {_AGAIN}")


def stored_bits(path: Path) -> Bits:
    """The bits of every tensor in a packed checkpoint; errors as for `read_packed`."""
    _, header = read_packed(path)
    return Bits(weights={name: layer["bits"] for name, layer in header["layers"].items()}, activations=header["tensors"])


@torch.no_grad()
def restore(student: Student, path: Path) -> QuantizedNetwork:
    """The integer model that `path` stores.

    Args:
        student: Freshly placed on the same network with the same bits (`stored_bits`); it is calibrated in place.

    Raises:
        ConfigError: The file is of another network or another placement, or the student has other bits.
    """
    tensors, header = read_packed(path)
    if set(header["layers"]) != set(student.layers) or set(header["tensors"]) != set(student.activations):
        raise ConfigError(
            f"{path}: must be of the same network and placement, got other layers; give the network that was quantized"
        )
    stored = {name: layer["bits"] for name, layer in header["layers"].items()}
    _check_bits(path, "weight", stored, {name: weight.grid.bits for name, weight in student.weights.items()})
    _check_bits(path, "tensor", header["tensors"], {name: tensor.grid.bits for name, tensor in student.activations.items()})
    _check_shapes(path, header, tensors, student)
    for name, quantizer in student.activations.items():
        quantizer.set_qparams(tensors[f"{name}.scale"], tensors[f"{name}.zero_point"])
    for name, described in header["layers"].items():
        weight = student.weights[name]
        codes = tensors[f"{described['weight']}.codes"]
        weight.set_qparams(
            tensors[f"{described['weight']}.scale"].view(weight.scale.shape),
            tensors[f"{described['weight']}.zero_point"].view(weight.scale.shape),
        )
        weight.set_codes(codes.to(weight.scale))
    quantized = finish(student)
    layers = {}
    for name, layer in quantized.layers.items():
        bias = header["layers"][name]["bias"]
        if bias is not None:
            scale = student.biases[name].scale()
            bias_codes = tensors[f"{bias}.codes"].to(scale.device)
            quantized.graph.get_buffer(str(layer.bias)).copy_(bias_codes * scale)
            layer = replace(layer, bias_codes=bias_codes)
        layers[name] = layer
    # What a run changed beside codes: biases in float, running statistics.
    coded = {layer.weight for layer in layers.values()} | {
        str(layer.bias) for layer in layers.values() if layer.bias_codes is not None
    }
    for name, tensor in quantized.graph.named_buffers():
        if name in tensors and name not in coded and not name.startswith("activation_quantizers."):
            tensor.copy_(tensors[name])
    return replace(quantized, layers=layers)


def _check_shapes(path: Path, header: dict[str, Any], tensors: dict[str, Tensor], student: Student) -> None:
    """Refuses codes, biases and float tensors of other shapes than those of the network."""
    own = student.graph.state_dict()
    for name, layer in student.layers.items():
        described, shape = header["layers"][name], tuple(own[layer.weight].shape)
        if tuple(described["shape"]) != shape or (described["bias"] is not None) != (name in student.biases):
            raise ConfigError(
                f"{path}: layer {name} must have a weight of shape {shape} and {'a' if name in student.biases else 'no'} quantized bias, "
                f"got {tuple(described['shape'])} and bias {described['bias']!r}; give the network that was quantized"
            )
    for name, tensor in own.items():
        if name in tensors and not name.startswith("activation_quantizers.") and tensors[name].shape != tensor.shape:
            raise ConfigError(
                f"{path}: {name} must have shape {tuple(tensor.shape)}, got {tuple(tensors[name].shape)}; give the network that was quantized"
            )


def _check_bits(path: Path, kind: str, stored: dict[str, int], placed: dict[str, int]) -> None:
    for name, bits in stored.items():
        if placed[name] != bits:
            raise ConfigError(
                f"{path}: {kind} {name} must have the {bits} bits that are stored, got a student with {placed[name]}; "
                "place it with `stored_bits`"
            )
