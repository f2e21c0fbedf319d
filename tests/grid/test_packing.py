"""Codes in bytes: nothing is lost at any width, and the bytes are the ones worked out by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reverie.grid.packing import pack, unpack

WIDTHS = [(bits, signed) for bits in range(1, 9) for signed in (True, False)]


def ends(bits, signed):
    """The least and the largest code: of one bit in two's complement -1 and 0."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


@pytest.mark.parametrize(("bits", "signed"), WIDTHS)
def test_every_code_comes_back_at_every_position_in_a_byte(bits, signed):
    low, high = ends(bits, signed)
    codes = torch.arange(low, high + 1).repeat(3)[:-1]
    packed = pack(codes, bits)
    assert len(packed) == -(-len(codes) * bits // 8)
    assert torch.equal(unpack(packed, tuple(codes.shape), bits, signed=signed).long(), codes)


@given(st.sampled_from(WIDTHS), st.lists(st.integers(1, 4), max_size=4), st.data())
def test_shapes_come_back(width, shape, data):
    bits, signed = width
    count = torch.Size(shape).numel()
    values = data.draw(st.lists(st.integers(*ends(bits, signed)), min_size=count, max_size=count))
    codes = torch.tensor(values).reshape(shape)
    restored = unpack(pack(codes, bits), tuple(shape), bits, signed=signed)
    assert restored.dtype == (torch.int8 if signed else torch.uint8)
    assert torch.equal(restored.long(), codes)


@pytest.mark.parametrize(
    ("bits", "codes", "expected"),
    [
        # 1, 2, -1, -8 in 4 bits: 0001, 0010, 1111, 1000; the first in the low half, as in ONNX's INT4.
        (4, [1, 2, -1, -8], [0x21, 0x8F]),
        # 0, 1, -1, -2 in 2 bits: 00, 01, 11, 10; the first lowest: 10 11 01 00.
        (2, [0, 1, -1, -2], [0b10110100]),
        # 5, 3, 6 in 3 bits: 101, 011, 110; the third crosses the border: 10 011 101 and 1.
        (3, [5, 3, 6], [0b10011101, 0b00000001]),
        # Signs alone.
        (1, [-1, 0, 0, -1, -1, 0, -1, 0, -1], [0b01011001, 0b00000001]),
        (8, [-128, 127, -1], [0x80, 0x7F, 0xFF]),
        (4, [15], [0x0F]),
    ],
)
def test_bytes_are_those_worked_out_by_hand(bits, codes, expected):
    packed = pack(torch.tensor(codes), bits)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == expected


def test_codes_in_any_layout_are_stored_row_by_row():
    codes = torch.tensor([[1, 2], [3, 4]])
    assert torch.equal(pack(codes.t(), 4), pack(torch.tensor([1, 3, 2, 4]), 4))
