"""What holds for every runtime that is installed."""

import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from importlib import metadata

import numpy as np
import pytest
import torch

from reverie import runtimes
from reverie.errors import ConfigError, ExportError
from reverie.export.qnn import Qnn
from reverie.runtimes._memory import loaded_bytes

INSTALLED = sorted(runtimes.installed(".onnx"))


@pytest.fixture(params=INSTALLED)
def runtime(request):
    return runtimes.load(request.param)


def test_a_file_gives_the_logits_of_the_network(runtime, small):
    graph, _, folder, images = small
    with torch.no_grad():
        expected = graph(torch.from_numpy(images)).numpy()
    session = runtime.open(folder / "float.onnx", threads=1)
    # In bfloat16, where the processor has it, they would be off by some thousandths.
    assert np.abs(session(images) - expected).max() < 1e-5
    assert np.abs(session(images[:3]) - expected[:3]).max() < 1e-5


def test_layers_in_float_are_told_from_integer_ones(runtime, small):
    _, quantized, folder, _ = small
    layers = [*quantized.layers, "nowhere"]
    assert runtime.float_layers(folder / "network.onnx", layers) == ["nowhere"]
    assert runtime.float_layers(folder / "float.onnx", layers) == layers


def test_a_probe_gives_the_codes_and_leaves_the_logits_as_they_were(runtime, small):
    _, quantized, folder, images = small
    names = list(quantized.activations)
    probe = runtime.probe(folder / "network.onnx", names)
    logits, codes = probe(images)
    assert np.array_equal(logits, runtime.open(folder / "network.onnx")(images))
    assert codes.keys() | probe.unrounded == set(names)
    first = quantized.activations["x"]
    expected = np.clip(np.rint(images / first.scale.numpy()) + first.zero_point.numpy(), 0, 255)
    assert np.abs(codes["x"].astype(int) - expected).max() <= 1
    assert (codes["x"] == expected).mean() > 0.999


def test_a_tensor_that_is_not_there_is_named(runtime, small):
    path = small[2] / "network.onnx"
    with pytest.raises(ExportError) as caught:
        runtime.probe(path, ["nowhere"])
    assert str(caught.value) == (
        f"{path}: must hold the tensor 'nowhere', got none; compare a file with the network it was written from"
    )


def test_a_file_that_cannot_be_loaded_is_named(runtime, tmp_path):
    path = tmp_path / "network.onnx"
    path.write_bytes(b"not a model")
    with pytest.raises(ExportError, match=rf"^\w+: it must load {path}, got .*; try another version of \w+$"):
        runtime.open(path)


def test_images_of_another_shape_are_refused(runtime, small):
    session = runtime.open(small[2] / "network.onnx")
    with pytest.raises(ExportError, match=r"^\w+: it must run the network, got .*; try another version of \w+$"):
        session(np.zeros((1, 1, 8, 8), np.float32))


def test_a_file_for_one_image_at_a_time_is_given_one_at_a_time(runtime, small, tmp_path):
    _, quantized, _, images = small
    Qnn()(quantized, images.shape[1:], tmp_path / "network.onnx")
    session = runtime.open(tmp_path / "network.onnx")
    assert session(images).shape == (20, 5)
    assert np.array_equal(session(images[3:5]), np.concatenate([session(images[3:4]), session(images[4:5])]))
    name = next(iter(quantized.activations))
    logits, codes = runtime.probe(tmp_path / "network.onnx", [name])(images[:3])
    assert logits.shape == (3, 5)
    assert {len(found) for found in codes.values()} <= {3}


def test_its_version_is_that_of_its_library(runtime):
    assert runtimes.version(runtime).split(".")[0].isdecimal()


@pytest.mark.slow
def test_memory_is_measured_in_a_process_of_its_own(small):
    taken = loaded_bytes("onnxruntime", small[2] / "network.onnx", (3, 8, 8))
    assert taken is None or 0 < taken < 1e9


def test_an_unknown_runtime_is_refused():
    with pytest.raises(ConfigError) as caught:
        runtimes.load("onnxrutime")
    assert str(caught.value) == (
        f"unknown runtime 'onnxrutime'; choose one of {', '.join(runtimes.names())}, or did you mean 'onnxruntime'?"
    )


@pytest.mark.parametrize(
    ("name", "module", "extra"), [("openvino", "openvino", "openvino"), ("onnxruntime", "onnxruntime", "onnx")]
)
def test_a_runtime_that_is_not_installed_names_the_extra_and_no_other_is_lost(name, module, extra):
    script = (
        f"import sys; sys.modules[{module!r}] = None\n"
        "from reverie import runtimes\n"
        "from reverie.errors import ConfigError\n"
        f"assert {name!r} not in runtimes.installed()\n"
        f"try: runtimes.load({name!r})\n"
        "except ConfigError as error: print(error)\n"
    )
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert told == (
        f"runtime {name!r}: must be installed, got no module {module!r}; "
        f"install Reverie with its extra {extra!r}: pip install -e '.[{extra}]' in its folder\n"
    )


def test_a_runtime_whose_library_is_broken_is_told_from_one_that_is_not_there(tmp_path):
    (tmp_path / "openvino.py").write_text("raise ImportError('libtbb.so.12: cannot open shared object file')\n")
    script = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from reverie import runtimes\n"
        "from reverie.errors import ConfigError\n"
        "assert 'openvino' not in runtimes.installed()\n"
        "try: runtimes.load('openvino')\n"
        "except ConfigError as error: print(error)\n"
    )
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert told == (
        "runtime 'openvino': its library must be importable, got 'libtbb.so.12: cannot open shared object file'; "
        "install that again\n"
    )


def test_a_library_that_another_distribution_brings_says_its_version_itself(monkeypatch):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    before = runtimes.version(runtimes.load("onnxruntime"))
    # As with onnxruntime-gpu.
    monkeypatch.setattr(metadata, "version", absent)
    assert runtimes.version(runtimes.load("onnxruntime")) == before


def test_a_process_that_dies_is_an_error_of_the_file(tmp_path, monkeypatch):
    def dies(*_):
        raise BrokenProcessPool("ended")

    monkeypatch.setattr("concurrent.futures.Future.result", dies)
    with pytest.raises(ExportError) as caught:
        loaded_bytes("torch", tmp_path / "network.pt2", (3, 8, 8))
    assert str(caught.value) == (
        f"torch: it must load and run {tmp_path / 'network.pt2'}, got a process that ended; free some memory and try again"
    )


def test_runtimes_are_asked_without_torch():
    script = "import sys; from reverie import runtimes; runtimes.load('onnxruntime'); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "False\n"


def test_a_file_of_openvino_has_its_weights_beside_it(tmp_path):
    assert runtimes.parts(tmp_path / "network.onnx") == (tmp_path / "network.onnx",)
    assert runtimes.parts(tmp_path / "network.xml") == (tmp_path / "network.xml", tmp_path / "network.bin")
