"""Small files that every runtime is given: one in full precision and one quantized, with what they compute."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from reverie.export._onnx import export_float
from reverie.export.onnx import Onnx
from reverie.graph.capture import capture
from reverie.graph.placement import place
from reverie.graph.quantized import finish
from reverie.observers.minmax import MinMax
from reverie.progress import Silent
from reverie.recovery.ranges import calibrate_activations, calibrate_weights

SHAPE = (3, 8, 8)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.first(x))
        return self.head(torch.relu(self.second(x)).mean((2, 3)))


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """The captured network, its integer model at W4A8, their ONNX files, and twenty images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        graph = capture(Small().eval(), SHAPE)
    images = torch.randn(20, *SHAPE, generator=torch.Generator().manual_seed(1))
    student = place(graph, "integer", weight_bits=4, activation_bits=8, end_bits=8)
    calibrate_activations(graph, student, images, MinMax(), batch=10, progress=Silent())
    calibrate_weights(student, MinMax())
    quantized = finish(student)
    folder: Path = tmp_path_factory.mktemp("small")
    export_float(graph, SHAPE, folder / "float.onnx")
    Onnx()(quantized, SHAPE, folder / "network.onnx")
    return graph, quantized, folder, images.numpy().astype(np.float32)
