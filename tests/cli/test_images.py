"""`reverie images`, and `reverie synthesize --for`: a run's images for other tools."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.cli.conftest import TINY, refused, said

from reverie import formats, plugins
from reverie.runs import RunDirectory

TARGETS = ", ".join(plugins.names(formats))


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_images_of_a_run_lie_in_a_folder_named_by_the_target(capsys, here, finished):
    assert said(capsys, "images", finished, "--for", "onnxruntime", "--output", "out") == (
        "wrote 8 images to out: calibration.py, inputs.npy\n"
    )
    inputs = load_file(finished / "images.safetensors")["inputs"]
    assert np.array_equal(np.load(here / "out" / "inputs.npy"), inputs.numpy())


def test_the_file_of_images_stands_for_its_run(capsys, here, finished):
    said(capsys, "images", finished / "images.safetensors", "--for", "tflite", "--output", "out", "--set", "units=levels")
    inputs = load_file(finished / "images.safetensors")["inputs"]
    levels = 255 * (0.3760 * inputs + 0.3053)
    stored = torch.from_numpy(np.load(here / "out" / "inputs.npy")).permute(0, 3, 1, 2)
    torch.testing.assert_close(stored, levels, atol=1e-3, rtol=0)


def test_synthesize_writes_them_beside_its_own_files(capsys, here):
    command = ["synthesize", "embedded:digits", *TINY, "--output", "dreams", "--for", "webdataset"]
    assert said(capsys, *command).splitlines()[-1] == "for webdataset: dreams/webdataset: images-000000.tar"
    assert (here / "dreams" / "images.safetensors").is_file()
    assert refused(capsys, *command) == (
        "dreams/webdataset: must be new or empty, got files in it; choose another --output, or delete the folder"
    )
    assert said(capsys, *command[:-1], "nncf").splitlines()[-1] == "for nncf: dreams/nncf: calibration.py, inputs.npy"


@pytest.mark.parametrize("command", [["synthesize", "embedded:digits", "--output", "new"], ["images", "nowhere"]])
def test_an_unknown_target_is_refused_before_anything_is_looked_at(capsys, here, command):
    assert refused(capsys, *command, "--for", "onnx-runtime") == (
        f"unknown target 'onnx-runtime'; choose one of {TARGETS}, or did you mean 'onnxruntime'?"
    )
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["nncf", "--set", "units=level"],
            "--for nncf: units must be 'inputs', 'pixels' or 'levels', got 'level'; did you mean 'levels'?",
        ),
        (["nncf", "--set", "unit=levels"], "--for nncf: unknown key 'unit'; choose one of units, or did you mean 'units'?"),
        (["imagefolder", "--set", "size=3"], "--for imagefolder: unknown key 'size'; ImageFolder has no settings"),
        (["webdataset", "--set", "per_shard=0"], "--for webdataset: per_shard must be at least 1, got 0"),
        (["webdataset", "--set", "per_shard=many"], "--for webdataset: per_shard must be a valid integer, got 'many'"),
    ],
)
def test_a_wrong_setting_is_refused(capsys, here, finished, arguments, expected):
    assert refused(capsys, "images", finished, "--output", "out", "--for", *arguments) == expected
    assert list(here.iterdir()) == []


def test_what_is_no_run_is_refused(capsys, here):
    (here / "empty").mkdir()
    assert refused(capsys, "images", "empty", "--for", "nncf") == (
        "empty: must be a run directory, got no run.json written by Reverie in it"
    )


def test_a_run_that_made_no_images_yet_is_refused(capsys, here, finished):
    (here / "run").mkdir()
    (here / "run" / "run.json").write_bytes((finished / "run.json").read_bytes())
    assert refused(capsys, "images", "run", "--for", "nncf", "--output", "out") == (
        "run/images.safetensors: must be a .safetensors file of images, got no such file; check the path"
    )


def test_images_that_png_cannot_hold_are_refused_before_they_are_made(capsys, here):
    (here / "five.py").write_text(
        "from torch import nn\n\n\ndef net():\n"
        "    return nn.Sequential(nn.Conv2d(5, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))\n"
    )
    shape = ["--input-size", "8", "--mean", "0.5,0.5,0.5,0.5,0.5", "--std", "1,1,1,1,1", "--classes", "3"]
    assert refused(capsys, "synthesize", "five.py:net", *shape, "--output", "out", "--for", "imagefolder") == (
        "images must have 1 or 3 channels to be PNG files, got 5; choose a target of arrays, such as onnxruntime"
    )
    assert not (here / "out").exists()


def test_what_a_killed_writer_left_is_cleared_away_by_the_next_run(tmp_path):
    identity = {"recipe": "aaaa"}
    RunDirectory.open(tmp_path, identity).close()
    leftover = tmp_path / ".nncf.123.partial"
    leftover.mkdir()
    (leftover / "inputs.npy").write_bytes(b"half")
    (leftover / ".x.5.partial.png").write_bytes(b"half")
    RunDirectory.open(tmp_path, identity).close()
    assert not leftover.exists()
