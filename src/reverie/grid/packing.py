"""Codes of 1 to 8 bits packed densely into bytes, first code in the lowest bits.

A byte of 4-bit codes holds two (ONNX's INT4 layout), of 2-bit codes four (its INT2 layout); 3, 5, 6 and 7 bits run
across byte borders. Signed codes are stored in two's complement.
"""

import math

import numpy as np
import torch
from jaxtyping import Integer, UInt8
from torch import Tensor


def pack(codes: Integer[Tensor, "*shape"], bits: int) -> UInt8[Tensor, " bytes"]:
    """The codes, flattened in row-major order, `bits` (1 to 8) bits each; the last byte is padded with zero bits."""
    values = codes.flatten().to(torch.int16).numpy().astype(np.uint8)
    stream = np.unpackbits(values[:, None], axis=1, count=bits, bitorder="little")
    return torch.from_numpy(np.packbits(stream.reshape(-1), bitorder="little"))


def unpack(packed: UInt8[Tensor, " bytes"], shape: tuple[int, ...], bits: int, *, signed: bool) -> Integer[Tensor, "*shape"]:
    """The int8 (signed) or uint8 codes that `pack` stored."""
    count = math.prod(shape)
    stream = np.unpackbits(packed.numpy(), count=count * bits, bitorder="little").reshape(count, bits)
    values = np.packbits(stream, axis=1, bitorder="little")[:, 0].astype(np.int16)
    if signed:
        values -= (values >> (bits - 1)) << bits
    return torch.from_numpy(values.astype(np.int8 if signed else np.uint8)).reshape(shape)
