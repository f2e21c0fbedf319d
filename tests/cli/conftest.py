"""A small finished run that several tests look at."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from reverie.cli import main

TINY = ["--images", "8", "--set", "synthesis.steps=3", "--set", "held_out=4"]

NETS = """
from torch import nn

def plain():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))

def normal():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )

def interrupted():
    raise KeyboardInterrupt
"""
_VECTORS = ("0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var")
SHAPE = ["--input-size", "8", "--mean", "0.5", "--std", "0.25", "--classes", "3"]


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """`embedded:digits` at W4A8 with labels; the arithmetic is real, only the numbers of steps are tiny."""
    path = tmp_path_factory.mktemp("runs") / "digits"
    command = ["quantize", "embedded:digits", "--weight-bits", "4", "--evaluate", "held-out", "--output", str(path), *TINY]
    assert main([*command, "--set", "reconstruction.iterations=2"]) == 0
    return path


@pytest.fixture
def nets(tmp_path) -> Path:
    """A Python file with factories of networks."""
    path = tmp_path / "nets.py"
    path.write_text(NETS)
    return path


@pytest.fixture
def weights(tmp_path) -> Path:
    """Weights of the factory `normal`."""
    shapes = {"0.weight": (4, 1, 3, 3), "5.weight": (3, 4)} | dict.fromkeys(_VECTORS, (4,)) | {"5.bias": (3,)}
    generator = torch.Generator().manual_seed(0)
    path = tmp_path / "weights.safetensors"
    save_file({key: torch.rand(shape, generator=generator) for key, shape in shapes.items()}, path)
    return path


def said(capsys, *arguments):
    """What a command that succeeds writes to standard output."""
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def refused(capsys, *arguments):
    """The message of a command that ends with status 1, and says nothing else."""
    assert main([str(argument) for argument in arguments]) == 1
    return message(capsys)


def message(capsys):
    """The one line on standard error."""
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    return captured.err.removeprefix("reverie: ").rstrip("\n")
