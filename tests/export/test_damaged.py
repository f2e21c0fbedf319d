"""A packed checkpoint whose header and tensors do not belong together is refused, and says where."""

import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from reverie.errors import ConfigError
from reverie.export._packed import read_packed

HEADER = {
    "format": "reverie packed 1",
    "placement": "integer",
    "layers": {"conv": {"weight": "w", "bias": "b", "shape": [2, 5], "bits": 4, "source": None}},
    "tensors": {"x": 8},
    "facts": {},
}
TENSORS = {
    "w.codes": torch.zeros(5, dtype=torch.uint8),
    "w.scale": torch.ones(2),
    "w.zero_point": torch.zeros(2, dtype=torch.int32),
    "b.codes": torch.zeros(2, dtype=torch.int32),
    "x.scale": torch.tensor(0.5),
    "x.zero_point": torch.tensor(3, dtype=torch.int32),
}
AGAIN = "run `reverie quantize` again"


def refusal(path, header=HEADER, **tensors):
    kept = {name: tensor for name, tensor in (TENSORS | tensors).items() if tensor is not None}
    save_file(kept, path, metadata={"reverie": header if isinstance(header, str) else json.dumps(header)})
    with pytest.raises(ConfigError) as caught:
        read_packed(path)
    return str(caught.value).removeprefix(f"{path}: ")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "network.safetensors"


def test_the_whole_one_is_read(path):
    save_file(TENSORS, path, metadata={"reverie": json.dumps(HEADER)})
    tensors, header = read_packed(path)
    assert header == HEADER
    assert tensors["w.codes"].shape == (2, 5)
    with safe_open(path, framework="pt") as file:
        assert len(file.keys()) == 6


def layer(**changed):
    return HEADER | {"layers": {"conv": HEADER["layers"]["conv"] | changed}}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("{", f"must be JSON, got 'EOF while parsing an object at line 1 column 1'; {AGAIN}"),
        ("[]", f"it must be an object, got []; {AGAIN}"),
        (HEADER | {"format": "other"}, f"must be a packed network, got the format 'other'; {AGAIN}"),
        (HEADER | {"layers": []}, f"layers must be an object, got []; {AGAIN}"),
        (layer(bits="4"), f"layers.conv.bits must be a valid integer, got '4'; {AGAIN}"),
        (layer(bits=9), f"layer 'conv': bits must be 2 to 8, got 9; {AGAIN}"),
        (
            layer(shape=[10**12, 10**6]),
            f"layer 'conv': w.codes must be torch.uint8 of shape (500000000000000000,), got torch.uint8 of shape (5,); {AGAIN}",
        ),
        (layer(shape=[-2, -5]), f"layer 'conv': shape must have sizes of at least 1, got (-2, -5); {AGAIN}"),
        (layer(weight="v"), f"layer 'conv': v.codes must be torch.uint8 of shape (5,), got nothing; {AGAIN}"),
        (
            HEADER | {"tensors": {"x": 8, "y": 8}},
            f"tensor 'y': y.scale must be torch.float32 of shape (), got nothing; {AGAIN}",
        ),
    ],
)
def test_a_header_that_says_otherwise_is_refused(path, header, message):
    assert refusal(path, header) == message


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (
            "w.scale",
            torch.ones(3),
            f"layer 'conv': w.scale must be torch.float32 of shape (2,), got torch.float32 of shape (3,); {AGAIN}",
        ),
        (
            "w.scale",
            torch.tensor([1.0, float("nan")]),
            f"layer 'conv': w.scale must be positive and finite, got nan to nan; {AGAIN}",
        ),
        ("x.scale", torch.tensor(-0.5), f"tensor 'x': x.scale must be positive and finite, got -0.5 to -0.5; {AGAIN}"),
        (
            "b.codes",
            torch.zeros(2),
            f"layer 'conv': b.codes must be torch.int32 of shape (2,), got torch.float32 of shape (2,); {AGAIN}",
        ),
        ("x.zero_point", None, f"tensor 'x': x.zero_point must be torch.int32 of shape (), got nothing; {AGAIN}"),
    ],
)
def test_a_tensor_of_another_kind_is_refused(path, name, tensor, message):
    assert refusal(path, **{name: tensor}) == message


def test_a_pipe_does_not_keep_us_waiting(path):
    os.mkfifo(path)
    with pytest.raises(ConfigError) as caught:
        read_packed(path)
    assert str(caught.value) == f"{path}: must be a file, got a pipe; check the path"
