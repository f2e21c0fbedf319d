"""The other tools themselves, as the examples use them: calibrated with synthetic images they lose no more than with noise."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

import reverie
from reverie.images import Images
from reverie.pipeline import run_synthesis

EXAMPLES = Path(__file__).parents[2] / "examples"
# What each tool cannot do without, and who brings it.
TOOLS = {"onnxruntime": "onnxruntime.quantization", "nncf": "nncf", "torchao": "torchao.quantization.pt2e"}


@pytest.fixture
def examples(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The network, its held-out digits, and images of three kinds to calibrate with."""
    pytest.importorskip("sklearn", reason="scikit-learn is not installed (extra 'digits')")
    from reverie.models.embedded import digits_images

    network = reverie.load_network("embedded:digits")
    sets = {"real": digits_images("train").evenly(32)}
    for recipe in ("noise", "zeroq"):
        folder = tmp_path_factory.mktemp(recipe)
        run_synthesis(reverie.read_recipe(recipe, {"images": 32, "synthesis.steps": 100} if recipe == "zeroq" else {"images": 32}),
                      network, output=folder)  # fmt: skip
        sets[recipe] = reverie.load_images(folder / "images.safetensors")
    return network, network.held_out(), sets


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tool", TOOLS)
def test_synthetic_images_are_no_worse_than_noise_and_as_good_as_real_ones(tool, digits, examples, tmp_path):
    pytest.importorskip(TOOLS[tool], reason=f"{tool} is not installed (extra {'onnx' if tool == 'onnxruntime' else tool!r})")
    task = importlib.import_module("task")
    quantize = importlib.import_module(f"calibrate_{tool}").quantize
    network, evaluation, sets = digits
    judge = task.Task(network, sets["zeroq"], evaluation).accuracy
    accuracy = {}
    for name, images in sets.items():
        (tmp_path / name).mkdir()
        accuracy[name] = judge(quantize(network, images, tmp_path / name))
    # Two of 599 digits: the standard error of a paired difference between copies that differ in a handful of answers.
    assert accuracy["zeroq"] >= accuracy["noise"] - 2 / 599
    assert accuracy["zeroq"] >= accuracy["real"] - 2 / 599
    assert accuracy["zeroq"] > 0.985


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tool", TOOLS)
def test_it_is_the_images_that_calibrate(tool, digits, examples, tmp_path):
    """What is calibrated with images next to nothing has ranges next to nothing: the images do reach the tool."""
    pytest.importorskip(TOOLS[tool], reason=f"{tool} is not installed (extra {'onnx' if tool == 'onnxruntime' else tool!r})")
    task = importlib.import_module("task")
    quantize = importlib.import_module(f"calibrate_{tool}").quantize
    network, evaluation, _ = digits
    grey = Images(inputs=torch.full((4, *network.input.shape), 1e-3))
    assert task.Task(network, grey, evaluation).accuracy(quantize(network, grey, tmp_path)) < 0.5


def test_the_examples_are_those_of_the_targets():
    """Every target has its example, and no example is of a target that is gone."""
    from reverie import formats, plugins

    named = {path.stem.partition("_")[2] for path in EXAMPLES.glob("*_*.py")}
    assert named == set(plugins.names(formats))
    assert str(EXAMPLES) not in sys.path
