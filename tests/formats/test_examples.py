"""Every example runs as it stands; those whose tool is not installed are skipped, each with the tool's name."""

import importlib
import re
import runpy
import sys
from pathlib import Path

import pytest

import reverie
from reverie.pipeline import run_synthesis

EXAMPLES = Path(__file__).parents[2] / "examples"
# What each example imports beside Reverie, PyTorch and NumPy.
NEEDS = {
    "calibrate_aimet": "aimet_torch",
    "calibrate_mct": "model_compression_toolkit",
    "calibrate_modelopt": "modelopt",
    "calibrate_nncf": "nncf",
    "calibrate_onnxruntime": "onnxruntime.quantization",
    "calibrate_tflite": "tensorflow",
    "calibrate_torchao": "torchao.quantization.pt2e",
    "calibrate_ultralytics": "ultralytics",
    "read_imagefolder": "torchvision",
    "read_webdataset": "webdataset",
}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Images that all of them calibrate with, as `reverie synthesize` leaves them."""
    pytest.importorskip("sklearn", reason="scikit-learn is not installed (extra 'digits')")
    folder = tmp_path_factory.mktemp("dreams")
    run_synthesis(
        reverie.read_recipe("zeroq", {"images": 32, "synthesis.steps": 50}),
        reverie.load_network("embedded:digits"),
        output=folder,
    )
    return folder / "images.safetensors"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NEEDS)
def test_an_example_runs_and_keeps_the_accuracy(name, images, monkeypatch, capsys):
    monkeypatch.syspath_prepend(EXAMPLES)
    importlib.import_module("task")
    pytest.importorskip(NEEDS[name], reason=f"{NEEDS[name].partition('.')[0]} is not installed", exc_type=ImportError)
    # This one takes a folder in its tool's form, and makes images of its own without.
    monkeypatch.setattr(sys, "argv", [name] if name == "calibrate_ultralytics" else [name, "--images", str(images)])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    said = capsys.readouterr().out
    if name.startswith("read_"):
        right, of = re.search(r"(\d+) of (\d+) images", said).groups()
        assert int(of) == 32 and int(right) >= 30
    elif name != "calibrate_ultralytics":
        full, quantized = map(float, re.findall(r"([\d.]+) %", said))
        assert full == 99.67 and quantized > 98.5


def test_every_example_is_run():
    scripts = {path.stem for path in EXAMPLES.glob("*.py") if "__main__" in path.read_text()}
    assert scripts == set(NEEDS)
