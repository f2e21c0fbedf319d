"""The same way on a GPU: what a CPU cannot show."""

import pytest
import torch

from reverie.checkpoints import Folder
from reverie.export._packed import restore
from reverie.graph.batch_norm import Observed
from reverie.pipeline import run
from reverie.progress import Silent
from reverie.randomness import Seed
from reverie.recipes import presets, read
from reverie.stages import as_teacher, student_of

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


@pytest.mark.parametrize("preset", presets())
def test_a_run_on_a_gpu_ends_with_a_proven_file(tiny_cnn, preset, tmp_path):
    recipe = read(preset)
    # Shares of real images are weights in rounding.
    quick = {"images": 16, "held_out": 8, "reconstruction.iterations": 20, "real_share": 0.5}
    quick |= {"synthesis.steps": 20} if hasattr(recipe.synthesis, "steps") else {}
    # The shortened distillation is about devices, not about accuracy.
    quick |= {"distillation.steps": 20, "quantization.weight_bits": 8} if recipe.distillation.steps else {}
    network = tiny_cnn()
    real = network.held_out()
    done = run(read(preset, quick), network, output=tmp_path / "run", calibration=real, evaluation=real, device="cuda")
    assert done.metrics["exported"]["top1"] > 0.8
    assert done.metrics["parity"]["max_code_difference"] <= 1


def test_a_packed_network_is_read_back_on_a_gpu(tiny_cnn, tmp_path):
    network = tiny_cnn()
    recipe = read("zeroq", {"images": 16, "held_out": 8, "synthesis.steps": 5})
    made = run(recipe, network, output=tmp_path / "run", device="cuda").path / "network.safetensors"
    inputs, answers = network.held_out().inputs[:16], []
    for device in ("cpu", "cuda"):
        _, student = student_of(as_teacher(network, device).graph, recipe.quantization)
        answers.append(restore(student, made).graph(inputs.to(device)).cpu())
    assert torch.allclose(*answers, atol=1e-2)


def test_a_generator_restored_on_a_gpu_goes_on_to_the_same_batches(tiny_cnn, tmp_path):
    teacher = as_teacher(tiny_cnn(), "cuda")
    method = read("clusterq", {"synthesis.steps": 4, "synthesis.batch": 8}).synthesis
    made = [method.stream(teacher, seed=Seed(0), checkpoints=Folder(tmp_path), progress=Silent()) for _ in range(2)]
    first, second = (stream.draw(0, 0.0) for stream in made)
    assert torch.allclose(first.inputs, second.inputs, atol=1e-4)
