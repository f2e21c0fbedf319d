"""Real architectures with random weights, one for each kind of block; all of them: `benchmarks/export_all.py`."""

import importlib.util
from pathlib import Path

import pytest

NETWORKS = [
    "resnet18",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "googlenet",
    "regnet_x_400mf",
    "convnext_tiny",
    "deit_tiny_patch16_224",
]


@pytest.fixture(scope="module")
def export_all():
    """The benchmark's module."""
    file = Path(__file__).parents[2] / "benchmarks" / "export_all.py"
    spec = importlib.util.spec_from_file_location("export_all", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # A quarter of the benchmark's; a code that differs does so on any image.
    module.COMPARED = 4
    return module


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_all_layers_are_integers_and_all_tensors_the_students(name, export_all, tmp_path):
    found = export_all.measure(name, 8, "onnx", False, tmp_path / "network.onnx")
    assert found["verdict"] == ""
    assert found["integer"] == found["layers"] > 20
    assert found["codes"] <= 1
