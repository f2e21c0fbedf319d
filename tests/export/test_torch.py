"""The `.pt2` program answers what the student answers, without Reverie, and Inductor makes int8 kernels of it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from reverie.errors import ExportError
from reverie.export.torch import Torch
from reverie.graph.integer import as_integers
from reverie.graph.placement import place
from reverie.graph.quantized import finish

SHAPE = (3, 16, 16)
BITS = [(8, 8, 8), (4, 4, 8), (3, 5, 6), (2, 2, None)]

PAGE = Path(__file__).parents[2] / "docs/checkpoint.md"

RUN = """
import torch, torch.ao.quantization.fx._decomposed
from safetensors.torch import load_file, save_file
network, images = torch.export.load("network.pt2").module(), load_file("images.safetensors")["images"]
with torch.no_grad():
    found = {str(count): network(images[:count]) for count in (1, 7, len(images))}
save_file(found, "answers.safetensors")
"""
AFTER_THREE_LINES = """
from safetensors.torch import load_file, save_file
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code
images, found = load_file("images.safetensors")["images"], {}
with torch.no_grad():
    found["all"], code = run_and_get_code(network, images)
    for kernel in ("qconv_weight_prepack", "qlinear_weight_prepack"):
        found[kernel] = torch.tensor(counters["inductor"][f"{kernel}_matcher_count"])
    found["7"] = network(images[:7])
found["uint8"] = torch.tensor(sum("onednn.qconv_pointwise" in line and "torch.uint8" in line for line in code[0].splitlines()))
save_file(found, "answers.safetensors")
"""
WITHOUT_REVERIE = """
import sys
assert "reverie" not in {name.partition(".")[0] for name in sys.modules}
"""


def three_lines():
    """How the documentation says to compile the program."""
    (block,) = re.findall(r"<!-- three lines -->\n```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(list(filter(None, block.splitlines()))) == 3
    return block


def in_a_process_of_its_own(program, folder, images):
    """What `program` answers in a folder with `network.pt2`, where nothing of Reverie is imported."""
    save_file({"images": images}, folder / "images.safetensors")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return load_file(folder / "answers.safetensors")


@pytest.mark.parametrize("bits", BITS, ids=str)
def test_the_program_answers_what_the_student_answers(bits, quantized, images, tmp_path):
    network = quantized(*bits)
    Torch()(network, SHAPE, tmp_path / "network.pt2")
    program = torch.export.load(tmp_path / "network.pt2").module()
    with torch.no_grad():
        ours, student = program(images), network.graph(images)
    # One value tipped by rounding may be a step of the average's grid.
    assert (ours - student).abs().max() <= 0.02 * student.abs().max()
    assert (ours == student).double().mean() >= 0.98


@pytest.mark.slow
def test_it_loads_without_reverie_for_any_batch(quantized, images, tmp_path):
    network = quantized(4, 4, 8)
    Torch()(network, SHAPE, tmp_path / "network.pt2")
    found = in_a_process_of_its_own(RUN, tmp_path, images)
    with torch.no_grad():
        student = network.graph(images)
    for count in (1, 7, len(images)):
        assert (found[str(count)] - student[:count]).abs().max() <= 0.02 * student.abs().max()


def test_integers_are_stored_as_integers_and_nothing_else_of_size(quantized, tmp_path):
    network = quantized(4, 4, 8)
    Torch()(network, SHAPE, tmp_path / "network.pt2", facts={"reverie.network": "patterns"})
    facts = {"reverie.network": ""}
    program = torch.export.load(tmp_path / "network.pt2", extra_files=facts)
    assert facts == {"reverie.network": "patterns"}
    stored = dict(program.named_buffers())
    for layer in network.layers.values():
        assert torch.equal(stored.pop(f"{layer.weight}_codes"), layer.codes)
        assert torch.equal(stored.pop(f"{layer.weight}_scale"), layer.scale.flatten())
        assert not stored.pop(f"{layer.weight}_codes_zero_point").any()
        assert torch.equal(stored.pop(str(layer.bias)), network.graph.get_buffer(str(layer.bias)))
    assert stored.keys() == {"clamp_grid.high"}
    called = {node.target for node in program.graph.nodes if node.op == "call_function"}
    assert not {target for target in called if str(target).startswith("reverie")}


def test_the_same_network_gives_the_same_bytes_without_traces_of_this_machine(quantized, tmp_path):
    files = [tmp_path / name for name in ("first.pt2", "second.pt2")]
    for file in files:
        Torch()(quantized(4, 8, 8), SHAPE, file, facts={"reverie.network": "patterns"})
    first, second = (file.read_bytes() for file in files)
    assert first == second
    assert str(Path(__file__).parent).encode() not in first and b"stack_trace" not in first


def test_the_literature_placement_is_refused(patterns, tmp_path):
    student = place(patterns, "literature", weight_bits=4, activation_bits=4)
    for quantizer in student.activations.values():
        quantizer.set_qparams(torch.tensor(0.1), torch.tensor(0, dtype=torch.int32))
    with pytest.raises(ExportError) as caught:
        Torch()(finish(student), SHAPE, tmp_path / "network.pt2")
    assert str(caught.value) == (
        "export: the placement must be 'integer', got 'literature'; "
        "quantize again with placement 'integer', which is what integer runtimes execute"
    )
    assert not (tmp_path / "network.pt2").exists()


@pytest.mark.slow
# Its ends have 8 bits, and so no bounds; compiling takes half a minute.
@pytest.mark.parametrize("bits", [(4, 4, 8)], ids=str)
def test_inductor_makes_int8_kernels_of_it_that_keep_the_bounds_of_the_codes(bits, quantized, images, tmp_path):
    network = quantized(*bits)
    Torch()(network, SHAPE, tmp_path / "network.pt2")
    found = in_a_process_of_its_own(three_lines() + AFTER_THREE_LINES, tmp_path, images)
    assert found["qconv_weight_prepack"] == 6 and found["qlinear_weight_prepack"] == 1
    assert found["uint8"] == 6
    with torch.no_grad():
        student = as_integers(network)(images)
    for answer in (found["all"], found["7"]):
        apart = (answer - student[: len(answer)]).abs()
        assert apart.max() <= 0.02 * student.abs().max() and apart.mean() <= 0.001 * student.abs().max()
