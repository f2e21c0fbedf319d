"""The native checkpoint: every code in as many bits as it has, in one safetensors file.

For a layer whose weight is called W in the captured graph: `W.codes` (uint8, dense packing of `grid.packing`), `W.scale`
and `W.zero_point` (per output channel); `B.codes` (int32) for a bias B on the accumulator's grid. For a quantized tensor
T: `T.scale`, `T.zero_point`. Everything else the graph stores stands in float under its own name. The header says, for
each layer, shape, bits and names, and for each tensor its bits, as JSON under the metadata key `reverie`.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from reverie.errors import ConfigError
from reverie.graph.placement import Bits, Student
from reverie.graph.quantized import QuantizedNetwork, finish
from reverie.grid import Grid
from reverie.grid.packing import pack, unpack
from reverie.runs import atomic_write

_FORMAT = "reverie packed 1"
# One key: safetensors writes several in an order that changes from process to process.
_KEY = "reverie"


def write_packed(quantized: QuantizedNetwork, path: Path, *, facts: dict[str, str] | None = None) -> None:
    """Writes `path`, whole or not at all; the same arguments give the same bytes.

    Args:
        facts: What the file is, as text by name; stored in its header.
    """
    tensors: dict[str, Tensor] = {}
    described: dict[str, dict[str, Any]] = {}
    stored: set[str] = set()
    for name, layer in quantized.layers.items():
        tensors[f"{layer.weight}.codes"] = pack(layer.codes.cpu(), layer.grid)
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
        ConfigError: The file is not one of ours.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"{path}: must be a packed network, got {str(error).splitlines()[0]!r}; run `reverie quantize` again"
        ) from None
    header: dict[str, Any] = json.loads(metadata.get(_KEY, "{}"))
    if header.get("format") != _FORMAT:
        raise ConfigError(
            f"{path}: must be a packed network, got the format {header.get('format')!r}; run `reverie quantize` again"
        )
    for layer in header["layers"].values():
        key = f"{layer['weight']}.codes"
        tensors[key] = unpack(tensors[key], tuple(layer["shape"]), Grid(layer["bits"]))
    return tensors, header


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


def _check_bits(path: Path, kind: str, stored: dict[str, int], placed: dict[str, int]) -> None:
    for name, bits in stored.items():
        if placed[name] != bits:
            raise ConfigError(
                f"{path}: {kind} {name} must have the {bits} bits that are stored, got a student with {placed[name]}; "
                "place it with `stored_bits`"
            )
