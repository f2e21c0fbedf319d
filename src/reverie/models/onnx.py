"""`onnx:path/to/network.onnx`: a classification network in an ONNX file, converted to a PyTorch module.

A file says neither what the pixels are scaled to nor how images are cropped, so `mean` and `std` must be given; its size and number of
classes only where it leaves them open. With the batch norms still in it, everything works as with the network's own code:

    torch.onnx.export(network.eval(), example, "network.onnx", optimize=False)
    torch.onnx.export(network.eval(), example, "network.onnx", dynamo=False, training=TrainingMode.PRESERVE, do_constant_folding=False)

Exporters fold them by default. Then the statistics that images are made from are gone (`graph/unfold.py` says what helps).

The converted network is compared with ONNX Runtime on noise before anything is done with it, and later on synthesized images:
the largest difference must be below 1e-4 of the largest answer.

A softmax at the end is left out: the class is the same, and logits are what the student learns from.

Not here: detection, several inputs, recurrent networks, files in float16, files that are quantized already.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reverie.errors import ConfigError, ModelError, at
from reverie.images import Images
from reverie.models import InputContract, Interpolation, Network
from reverie.models._libraries import require


def load(
    name: str,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    input_size: int | tuple[int, int] | None = None,
    classes: int | None = None,
    resize: int | None = None,
    interpolation: Interpolation = "bilinear",
) -> Network:
    """The network in the file `name`.

    Args:
        mean, std: Per channel, of pixels in 0..1. Their number is the number of channels.
        input_size: Side of the square input in pixels, or its (height, width); None if the file says it.
        classes: Number of classes; None for the file's.
        resize: Shorter side of an image file before the centre crop; None means no margin.
        interpolation: How an image file is resized.

    Raises:
        ConfigError: The file cannot be read, or the input contract is not whole or not the file's.
        ModelError: The file holds something else than one image in and logits out, or operators that are not converted; the
            converted network answers otherwise than ONNX Runtime; the extra `onnx` is not installed.
    """
    with at(f"onnx:{name}"):
        require("onnx", extra="onnx", distribution="onnx")
        require("onnxruntime", extra="onnx", distribution="ONNX Runtime")
        # These import what the extra brings.
        from reverie.models._onnx_file import read
        from reverie.models._onnx_limits import check_input
        from reverie.models._onnx_module import OnnxModule
        from reverie.models._onnx_reference import OnnxReference

        model = read(Path(name))
        contract, channels_last = _contract(
            model.graph.input[0], mean=mean, std=std, input_size=input_size, resize=resize, interpolation=interpolation
        )
        check_input(model.graph.input[0], contract.shape)
        module = OnnxModule(model, torch.zeros(2, *contract.shape), channels_last=channels_last).eval()
        reference = OnnxReference(model, channels_last=channels_last)
        # Its own generator: what is compared is the same every time.
        noise = torch.randn(4, *contract.shape, generator=torch.Generator().manual_seed(0))
        found = _classes(reference(noise), classes)
        network = Network(name=f"onnx:{name}", module=module, input=contract, classes=found, reference=reference)
        network.check_reference(Images(inputs=noise), "noise")
    return network


def _contract(
    value: Any, *, mean: tuple[float, ...], std: tuple[float, ...], input_size: int | tuple[int, int] | None, **rest: Any
) -> tuple[InputContract, bool]:
    """The input contract, and whether the file takes channels last.

    Args:
        value: The file's input, an `onnx.ValueInfoProto` with 4 axes.
    """
    sizes = [dim.dim_value if dim.HasField("dim_value") else None for dim in value.type.tensor_type.shape.dim]
    # The number of channels tells the layouts apart; where the file leaves both open, that of its standard counts.
    channels_last = sizes[1] != len(mean) and sizes[3] == len(mean)
    if not channels_last and sizes[1] not in (None, len(mean)):
        shape = ", ".join("?" if size is None else str(size) for size in sizes)
        raise ConfigError(
            f"mean must have one value for each channel of the input ({shape}), got {len(mean)}; give one for each"
        )
    said = tuple(sizes[1:3] if channels_last else sizes[2:4])
    given = (input_size, input_size) if isinstance(input_size, int) else input_size
    if given is None and None in said:
        raise ConfigError("input_size must be given, got nothing; the file leaves height and width open")
    if given is not None and any(size not in (None, wanted) for size, wanted in zip(said, given, strict=True)):
        raise ConfigError(
            f"input_size must be {said[0] or '?'} x {said[1] or '?'}, which is all that the file takes, got "
            f"{given[0]} x {given[1]}; leave it out"
        )
    height, width = given or said
    assert height is not None
    assert width is not None
    return InputContract(channels=len(mean), height=height, width=width, mean=mean, std=std, **rest), channels_last


def _classes(answer: Tensor, said: int | None) -> int:
    if answer.dim() != 2:
        shape = ("n", *answer.shape[1:])
        raise ModelError(
            f"the network must give (n, classes) logits, got ({', '.join(map(str, shape))}); export it as a classifier"
        )
    if said not in (None, answer.shape[1]):
        raise ConfigError(f"classes must be {answer.shape[1]}, which the file gives, got {said}; leave it out")
    return answer.shape[1]
