"""The same way on a GPU: what a CPU cannot show."""

import pytest
import torch

from reverie.graph.batch_norm import Observed
from reverie.pipeline import as_teacher, run
from reverie.recipe import read

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device and a PyTorch that can use it"),
]


@pytest.mark.parametrize("level", ["batch", "sample"])
def test_statistics_on_a_gpu_are_those_of_the_cpu(tiny_cnn, level):
    network = tiny_cnn()
    inputs = network.held_out().inputs[:16]
    _, here = Observed(as_teacher(network, "cpu").graph, level)(inputs)
    _, there = Observed(as_teacher(network, "cuda").graph, level)(inputs.cuda())
    for part in ("mean", "variance"):
        for ours, theirs in zip(getattr(here, part), getattr(there, part), strict=True):
            assert torch.allclose(ours, theirs.cpu(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("preset", ["zeroq", "adaround"])
def test_a_run_on_a_gpu_ends_with_a_proven_file(tiny_cnn, preset, tmp_path):
    recipe = read(preset, {"images": 16, "held_out": 8, "synthesis.steps": 20, "reconstruction.iterations": 20})
    network = tiny_cnn()
    done = run(recipe, network, output=tmp_path / "run", evaluation=network.held_out(), device="cuda")
    assert done.metrics["exported"]["top1"] > 0.9
    assert done.metrics["parity"]["max_code_difference"] <= 1
