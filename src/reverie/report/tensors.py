"""How well each tensor sits on its grid: signal to noise, largest error, share beyond the grid, and a histogram with the grid.

    SQNR         10 log10( sum x^2 / sum (x - x')^2 ),  x in full precision, x' on its grid
    student      the same with x' as the student has it: of weights the codes that were decided, of activations what is there
                 with the noise of everything before
    max_error    largest |x - x'|, in steps of the grid: at most 1/2 but for clipped values
    clipped      share of values beyond the grid's ends by more than half a step

One batch of images tells: these are shares and ratios over many thousands of values. Weights are in steps of their channel, so
that one histogram holds all channels. Not here: what a tensor's grid costs the answer (`report/tensor_errors.py`), which takes half a
pass for every tensor.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, fx

from reverie.graph.operators import attribute
from reverie.graph.quantized import QuantizedLayer, QuantizedNetwork
from reverie.graph.quantizers import ActivationQuantizer
from reverie.graph.taps import tap
from reverie.grid import dequantize, fake_quantize
from reverie.report.tensor_errors import batch_that_fits, decibels, parameters_of, quantizer_calls

_IMAGES = 32
_BINS = 64


@torch.no_grad()
def describe(
    reference: fx.GraphModule, quantized: QuantizedNetwork, inputs: Float[Tensor, "count *shape"]
) -> list[dict[str, Any]]:
    """Of every weight and then every activation on a grid, in execution order: figures, and a histogram of its values in full precision.

    Args:
        reference: The full-precision graph whose nodes the student's are named after.
        inputs: Of which a batch is looked at, evenly spaced.

    Returns:
        `name`, `kind` ("weight" or "activation"), `bits`, `sqnr` and `student_sqnr` in dB, `max_error`, `clipped`, `scale` (least and largest
        of the channels), `unit` (what one unit of the histogram is: "step" or "value"), `low` and `high` (ends of the grid), `step`,
        `from` and `to` (ends of the histogram) and `counts`.
    """
    nodes = {node.name: node for node in reference.graph.nodes}
    found = []
    for name, layer in quantized.layers.items():
        weight = attribute(reference, parameters_of(nodes[name])[0])
        assert weight is not None
        found.append({"name": name, "kind": "weight", **_weight(weight, layer)})
    device = next((tensor.device for tensor in reference.buffers()), inputs.device)
    chosen = torch.linspace(0, len(inputs) - 1, min(len(inputs), _IMAGES)).round().long()
    batch = inputs[chosen].to(device)
    batch = batch[: batch_that_fits(reference, batch)]
    batch = batch.contiguous(memory_format=torch.channels_last) if batch.dim() == 4 else batch
    calls = quantizer_calls(quantized)
    full, ours = tap(reference, quantized.activations)(batch), tap(quantized.graph, calls.values())(batch)
    for name, quantizer in quantized.activations.items():
        found.append({"name": name, "kind": "activation", **_activation(full[name], ours[calls[name]], quantizer)})
    return found


def _weight(weight: Float[Tensor, "out *rest"], layer: QuantizedLayer) -> dict[str, Any]:
    scale, zero_point, grid = layer.scale, layer.zero_point, layer.grid
    ours = dequantize(layer.codes.to(scale.dtype), scale, zero_point)
    nearest = fake_quantize(weight, scale, zero_point, grid)
    # Channels may have zero points of their own; a histogram of codes is what they share.
    places = weight / scale + zero_point
    return {
        **_errors(weight, nearest, ours, scale, grid.bits),
        **_clipping(places, float(grid.quant_min), float(grid.quant_max), 1.0),
        "scale": [float(scale.min()), float(scale.max())],
        "unit": "step",
    }


def _activation(values: Tensor, ours: Tensor, quantizer: ActivationQuantizer) -> dict[str, Any]:
    grid, scale, zero = quantizer.grid, quantizer.scale, int(quantizer.zero_point)
    nearest = fake_quantize(values, scale, quantizer.zero_point, grid)
    low, high = (float((end - zero) * scale) for end in (grid.quant_min, grid.quant_max))
    return {
        **_errors(values, nearest, ours, scale, grid.bits),
        **_clipping(values, low, high, float(scale)),
        "scale": [float(scale), float(scale)],
        "unit": "value",
    }


def _errors(values: Tensor, nearest: Tensor, ours: Tensor, scale: Tensor, bits: int) -> dict[str, Any]:
    signal, noise = float(values.square().sum()), (nearest - values).square().sum()
    return {
        "bits": bits,
        "sqnr": decibels(signal, float(noise)),
        "student_sqnr": decibels(signal, float((ours - values).square().sum())),
        "max_error": float(((nearest - values).abs() / scale).max()),
    }


def _clipping(values: Tensor, low: float, high: float, step: float) -> dict[str, Any]:
    """The share beyond the grid, and the histogram, which reaches over the values and the grid."""
    beyond = (values < low - step / 2) | (values > high + step / 2)
    first, last = min(low - step / 2, float(values.min())), max(high + step / 2, float(values.max()))
    counts = torch.histc(values.float(), _BINS, first, last)
    return {
        "clipped": float(beyond.double().mean()),
        "low": low,
        "high": high,
        "step": step,
        "from": first,
        "to": last,
        "counts": counts.long().tolist(),
    }
