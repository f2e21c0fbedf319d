"""What every target promises, whatever tool it is for."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from reverie import formats, plugins
from reverie.errors import ConfigError, ModelError
from reverie.formats import Format, calibration, write
from reverie.images import Images
from reverie.images.contract import InputContract
from reverie.images.store import save_images

CONTRACT = InputContract(channels=3, height=4, width=6, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
TARGETS = plugins.names(formats)
WITH_ADAPTER = [name for name in TARGETS if getattr(plugins.load(formats, name), "adapter", None) is not None]
# Arguments that an adapter cannot do without.
NEEDED = {"onnxruntime": {"input_name": "input"}}


def some_images(channels: int = 3, **more) -> Images:
    pixels = torch.rand(5, channels, 4, 6, generator=torch.Generator().manual_seed(0))
    given = {
        "inputs": CONTRACT.normalize(pixels) if channels == 3 else pixels,
        "labels": torch.tensor([3, 1, 4, 1, 5]),
        "sources": ("zeroq",) * 5,
        "provenance": {"method": "zeroq", "seed": "0"},
    }
    return Images(**given | more)


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(params=TARGETS)
def form(request):
    return plugins.load(formats, request.param)()


def test_a_target_is_a_format_and_the_same_images_give_the_same_bytes(form, tmp_path):
    assert isinstance(form, Format)
    for name in ("a", "b"):
        write(form, some_images(), CONTRACT, 10, tmp_path / name)
    assert content(tmp_path / "a")
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_five_channels_are_written_or_refused_before_there_is_a_file(form, tmp_path):
    five = InputContract(channels=5, height=4, width=6, mean=(0.5,) * 5, std=(0.2,) * 5)
    if hasattr(form, "adapter"):
        write(form, some_images(5), five, 10, tmp_path / "a")
        assert 5 in np.load(tmp_path / "a" / "inputs.npy").shape
        return
    with pytest.raises(ConfigError) as caught:
        write(form, some_images(5), five, 10, tmp_path / "a")
    assert str(caught.value) == (
        "images must have 1 or 3 channels to be PNG files, got 5; choose a target of arrays, such as onnxruntime"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_in_it_is_left_alone(form, tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ConfigError) as caught:
        write(form, some_images(), CONTRACT, 10, tmp_path)
    assert (
        str(caught.value) == f"{tmp_path}: must be new or empty, got files in it; choose another --output, or delete the folder"
    )
    assert content(tmp_path) == {"thesis.txt": b"precious"}


def test_images_of_another_size_become_the_networks(form, tmp_path):
    small = some_images(inputs=torch.zeros(5, 3, 2, 3))
    black_or_grey = some_images(inputs=torch.zeros(5, 3, 4, 6))
    write(form, small, CONTRACT, 10, tmp_path / "a")
    write(form, black_or_grey, CONTRACT, 10, tmp_path / "b")
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_images_of_another_size_keep_their_classes(form, tmp_path):
    write(
        form, some_images(inputs=torch.zeros(5, 3, 2, 3), labels=None, logits=torch.eye(10)[:5]), CONTRACT, 10, tmp_path / "a"
    )
    assert content(tmp_path / "a")


def test_what_fails_half_way_leaves_nothing(form, tmp_path, monkeypatch):
    def fail(self, *_):
        type(form).__call__.original(self, *_)
        raise RuntimeError("cut off")

    fail.original = type(form).__call__
    monkeypatch.setattr(type(form), "__call__", fail)
    with pytest.raises(RuntimeError, match="cut off"):
        write(form, some_images(), CONTRACT, 10, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", WITH_ADAPTER)
def test_the_script_needs_no_reverie_and_says_what_the_numbers_are(target, tmp_path):
    method = plugins.load(formats, target)
    write(method(), some_images(), CONTRACT, 10, tmp_path / "a")
    text = (tmp_path / "a" / "calibration.py").read_text()
    assert "mean (0.5, 0.4, 0.3), std (0.2, 0.3, 0.4)" in text
    assert "Made by: method zeroq, seed 0." in text
    assert method.adapter.__name__ in text.partition("inputs.npy")[0]
    script = f"""
import json, sys
sys.path.insert(0, {str(tmp_path / "a")!r})
import calibration
assert callable(getattr(calibration, {method.adapter.__name__!r}))
print(json.dumps([list(calibration.inputs.shape), str(calibration.inputs.dtype), "reverie" in sys.modules, "jaxtyping" in sys.modules]))
"""
    said = subprocess.run([sys.executable, "-I", "-c", script], check=True, capture_output=True, text=True).stdout
    shape = [5, 4, 6, 3] if method.channels_last else [5, 3, 4, 6]
    assert json.loads(said) == [shape, "float32", False, False]


def shown(given):
    """Everything that an adapter gives or shows, as one array."""
    if hasattr(given, "get_next"):
        return np.concatenate([batch["input"] for batch in iter(given.get_next, None)])
    if hasattr(given, "get_inference_data"):
        return np.concatenate(list(given.get_inference_data()))
    seen = []
    model = torch.nn.Module()
    model.forward = lambda x: seen.append(x.numpy())
    items = given() if given.__name__ == "batches" else given(model) or ()
    return np.concatenate([item for (item,) in items] or seen)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("target", WITH_ADAPTER)
def test_the_object_in_python_is_the_file_and_a_path_is_as_good_as_images(target, tmp_path):
    method = plugins.load(formats, target)
    if method.library is not None:
        pytest.importorskip(method.library, reason=f"{method.library} is not installed (extra {target!r})")
    save_images(some_images(), tmp_path / "images.safetensors")
    write(method(), some_images(), CONTRACT, 10, tmp_path / "a")
    stored = np.load(tmp_path / "a" / "inputs.npy")
    for given in (some_images(), tmp_path / "images.safetensors", str(tmp_path / "images.safetensors")):
        assert np.array_equal(shown(calibration(target, given, **NEEDED.get(target, {}))), stored)


def test_smaller_images_are_shown_in_the_networks_size():
    small = some_images(provenance={"method": "zeroq", "input_size": "8 x 12"})
    given = calibration("onnxruntime", small, input_name="input")
    assert np.array_equal(shown(given), small.resized(8, 12).inputs.numpy())


def test_an_unknown_target_is_refused_with_the_nearest():
    with pytest.raises(ConfigError) as caught:
        calibration("onxruntime", some_images())
    assert str(caught.value) == (
        f"unknown target 'onxruntime'; choose one of {', '.join(TARGETS)}, or did you mean 'onnxruntime'?"
    )


def test_a_target_of_files_has_no_python_object():
    with pytest.raises(ConfigError) as caught:
        calibration("webdataset", some_images())
    assert str(caught.value) == (
        "webdataset must be given files, got a call for a Python object; use `reverie images RUN --for webdataset`"
    )


def test_a_tool_that_is_not_installed_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(ModelError) as caught:
        calibration("nncf", some_images())
    assert str(caught.value) == (
        "nncf must be installed, got no module 'nncf'; "
        "install Reverie with its extra 'nncf': pip install -e '.[nncf]' in its folder"
    )
