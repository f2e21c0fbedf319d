"""The packed checkpoint is read by torch and safetensors alone, with the ten lines of docs/checkpoint.md."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from reverie.export._packed import write_packed
from reverie.graph.placement import Bits, place
from reverie.graph.quantized import finish
from reverie.grid import dequantize

PAGE = Path(__file__).parents[2] / "docs/checkpoint.md"
AFTER = """
import sys
from safetensors.torch import save_file
assert not {name for name in sys.modules if name.partition(".")[0] in ("reverie", "numpy.testing", "onnx")}
save_file({name: weight.contiguous() for name, weight in weights.items()}, "weights.safetensors")
"""


def ten_lines():
    (block,) = re.findall(r"<!-- ten lines -->\n```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return block


def read_by_ten_lines(folder):
    """What the documented lines make of `network.safetensors` there, in a process that does not know Reverie."""
    done = subprocess.run(
        [sys.executable, "-I", "-W", "ignore", "-c", ten_lines() + AFTER],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return load_file(folder / "weights.safetensors")


def test_there_are_ten_of_them():
    assert len(list(filter(None, ten_lines().splitlines()))) == 10


@pytest.mark.slow
def test_ten_lines_read_every_weight_of_every_width(patterns, quantizer, images, tmp_path):
    layers = list(quantizer(patterns, images, 8, 8, 8).layers)
    widths = dict(zip(layers, (8, 7, 6, 5, 4, 3, 2), strict=True))
    network = quantizer(patterns, images, 4, 4, 8, Bits(weights=widths))
    write_packed(network, tmp_path / "network.safetensors")
    weights = read_by_ten_lines(tmp_path)
    assert {layer.grid.bits for layer in network.layers.values()} == set(range(2, 9))
    assert weights.keys() == {layer.weight for layer in network.layers.values()}
    for layer in network.layers.values():
        assert torch.equal(weights[layer.weight], dequantize(layer.codes.float(), layer.scale, layer.zero_point)), layer.path
        assert torch.equal(weights[layer.weight], network.graph.get_buffer(layer.weight)), layer.path


@pytest.mark.slow
def test_they_read_zero_points_too(patterns, tmp_path):
    student = place(patterns, "literature", weight_bits=3, activation_bits=4)
    for quantizer in student.activations.values():
        quantizer.set_qparams(torch.tensor(0.1), torch.tensor(0, dtype=torch.int32))
    for quantizer in student.weights.values():
        quantizer.set_qparams(torch.full_like(quantizer.scale, 0.07), torch.full_like(quantizer.zero_point, -2))
    network = finish(student)
    write_packed(network, tmp_path / "network.safetensors")
    weights = read_by_ten_lines(tmp_path)
    assert len(weights) == 7
    for layer in network.layers.values():
        assert torch.equal(weights[layer.weight], network.graph.get_buffer(layer.weight)), layer.path


@pytest.mark.slow
def test_they_read_one_bit(tmp_path):
    header = {"layers": {"conv": {"weight": "conv.weight", "shape": [2, 5], "bits": 1}}}
    stored = {
        # Signs - + + - + + - - - - from the lowest bit of the first byte on; one bit in two's complement is 0 or -1.
        "conv.weight.codes": torch.tensor([0b11001001, 0b11], dtype=torch.uint8),
        "conv.weight.scale": torch.tensor([0.5, 2.0]),
        "conv.weight.zero_point": torch.tensor([0, 0], dtype=torch.int32),
    }
    save_file(stored, tmp_path / "network.safetensors", metadata={"reverie": json.dumps(header)})
    weights = read_by_ten_lines(tmp_path)
    assert weights["conv.weight"].tolist() == [[-0.5, 0, 0, -0.5, 0], [0, -2, -2, -2, -2]]
