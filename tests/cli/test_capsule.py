"""`reverie capsule` from a folder to a file, and all that it refuses before it looks at an image."""

import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from tests.cli.conftest import SHAPE, refused, said

from reverie.cli import main
from reverie.export._metadata import content_hash
from reverie.images import Images
from reverie.images.store import load_images, save_images, save_pngs
from reverie.models.embedded import DIGITS_INPUT, digits_images, load
from reverie.report.outcome import numbers_text
from reverie.stages import as_teacher
from reverie.synthesis._capsule import Capsule, capsule_of, load_capsule, save_capsule


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def digits():
    return digits_images("train")


@pytest.fixture(scope="module")
def teacher():
    return as_teacher(load("digits"))


@pytest.fixture
def folder(digits, tmp_path):
    """One image of each digit but the seven, in a folder named by its number; the three is a one."""
    chosen = [int((digits.labels == (1 if label == 3 else label)).nonzero()[0]) for label in range(10)]
    files = save_pngs(Images(inputs=digits.inputs[chosen]), DIGITS_INPUT, tmp_path / "loose")
    for label, file in enumerate(files):
        if label != 7:
            (tmp_path / "one-each" / str(label)).mkdir(parents=True)
            file.rename(tmp_path / "one-each" / str(label) / "a.png")
    shutil.rmtree(tmp_path / "loose")
    return tmp_path / "one-each"


def test_a_folder_becomes_a_capsule(capsys, folder, teacher, tmp_path):
    shown = said(capsys, "capsule", "embedded:digits", "--calibration", folder, "--output", "centres.safetensors").splitlines()
    size = sum(file.stat().st_size for file in folder.rglob("*.png"))
    stored = (tmp_path / "centres.safetensors").stat().st_size
    assert shown == [
        "classes: 9 of 10 present, missing: 7",
        "misclassified: 3",
        f"file: centres.safetensors, {stored / 1e3:.1f} kB; the 9 images it stands for have {size / 1e3:.1f} kB in {folder}",
        "next: reverie quantize embedded:digits --recipe fdda --capsule centres.safetensors",
    ]
    got = load_capsule(tmp_path / "centres.safetensors", teacher)
    assert got.count.tolist() == [1, 1, 1, 1, 1, 1, 1, 0, 1, 1]


def test_a_set_of_arrays_becomes_the_capsule_of_its_images_and_an_older_one_is_replaced(capsys, digits, teacher, tmp_path):
    older = Capsule((), (), torch.zeros(3, dtype=torch.long), torch.zeros(3, dtype=torch.bool), (), "older")
    save_capsule(older, tmp_path / "centres.safetensors")
    few = Images(inputs=digits.inputs[:80], labels=digits.labels[:80])
    save_images(few, tmp_path / "few.safetensors")
    command = ["embedded:digits", "--calibration", "few.safetensors", "--output", "centres.safetensors", "--json"]
    told = json.loads(said(capsys, "capsule", *command))
    expected = capsule_of(teacher, few)
    assert told == {
        "network": "embedded:digits",
        "fingerprint": teacher.fingerprint,
        "images": 80,
        "classes": 10,
        "missing": [],
        "misclassified": [],
        "file": "centres.safetensors",
        "bytes": {
            "capsule": (tmp_path / "centres.safetensors").stat().st_size,
            "images": (tmp_path / "few.safetensors").stat().st_size,
        },
        "next": "reverie quantize embedded:digits --recipe fdda --capsule centres.safetensors",
    }
    got = load_capsule(tmp_path / "centres.safetensors")
    assert got.count.tolist() == expected.count.tolist()
    tensors = zip((*got.mean, *got.variance), (*expected.mean, *expected.variance), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in tensors)


def test_the_next_command_repeats_what_the_network_needs(capsys, nets, weights, tmp_path):
    np.savez(tmp_path / "set.npz", images=np.zeros((3, 8, 8, 1), np.uint8), labels=np.arange(3))
    shown = said(
        capsys,
        "capsule",
        f"{nets}:normal",
        *SHAPE,
        "--weights",
        weights,
        "--calibration",
        "set.npz",
        "--output",
        "c.safetensors",
    )
    assert shown.splitlines()[-1] == (
        f"next: reverie quantize {nets}:normal --weights {weights} --input-size 8 --mean 0.5 --std 0.25 --classes 3 "
        "--recipe fdda --capsule c.safetensors"
    )


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        ([], "none"),
        ([4], "4"),
        (range(10), "0, 1, 2, 3, 4, 5, 6, 7, 8, 9"),
        (range(1, 13), "1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 2 more"),
    ],
)
def test_at_most_ten_classes_are_listed(classes, expected):
    assert numbers_text(list(classes)) == expected


def test_a_folder_without_labels_is_refused(capsys, tmp_path):
    (tmp_path / "pictures").mkdir()
    Image.new("L", (32, 32)).save(tmp_path / "pictures" / "a.png")
    assert refused(capsys, "capsule", "embedded:digits", "--calibration", "pictures", "--output", "c.safetensors") == (
        "--calibration: pictures: must have labels 0 to 9, got none; add a labels.csv with columns 'file' and 'label', "
        "or put the images of each class into a folder named by its number"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["pictures"]


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("nowhere/c.safetensors", "nowhere/c.safetensors: must be in a folder that exists, got none; create it or choose another --output"),
        ("thesis", "thesis: must be a file, got a folder; choose another --output"),
        (
            "thesis/chapter.txt",
            "--output: thesis/chapter.txt: must be a file that `reverie capsule` wrote, got another or a damaged one; "
            "make one with `reverie capsule`",
        ),
    ],
)  # fmt: skip
def test_a_wrong_output_is_refused_and_left_alone_before_anything_else(capsys, monkeypatch, tmp_path, output, expected):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("precious")
    monkeypatch.setattr("reverie.models.load", lambda *_, **__: pytest.fail("the network was loaded"))
    assert refused(capsys, "capsule", "embedded:digits", "--calibration", "pictures", "--output", output) == expected
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "precious"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["embedded:digit", "--calibration", "pictures"],
            "unknown embedded network 'digit'; choose one of digits, or did you mean 'digits'?",
        ),
        (
            ["embedded:digits", "--calibration", "pictures"],
            "--calibration: pictures: must be a folder of images, an .npz or a .safetensors file, got no such path; check it",
        ),
        (
            ["embedded:digits", "--calibration", "pictures", "--device", "abacus"],
            "device must be one that PyTorch can use here, got 'abacus'; use 'cpu'",
        ),
    ],
)
def test_a_wrong_request_is_refused(capsys, tmp_path, arguments, expected):
    assert refused(capsys, "capsule", *arguments, "--output", "c.safetensors") == expected
    assert list(tmp_path.iterdir()) == []


def test_its_help_has_an_example(capsys):
    assert "Example: reverie capsule embedded:digits --calibration" in said(capsys, "capsule", "--help")


@pytest.fixture
def folded(tiny_cnn, tmp_path):
    """A small trained network as exporters leave it, and real images of it, in files."""
    network = tiny_cnn()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        free = {0: torch.export.Dim("batch")}
        torch.onnx.export(
            network.module, (torch.zeros(2, 3, 16, 16),), tmp_path / "net.onnx", dynamic_shapes=(free,), verbose=False
        )
    save_images(network.held_out(), tmp_path / "real.safetensors")
    return [str(tmp_path / "net.onnx"), "--mean", "0.5,0.5,0.5", "--std", "0.25,0.25,0.25"], tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(
    "way",
    [
        ["--capsule", "{capsule}", "--images", "16", "--set", "synthesis.steps=20", "--set", "held_out=8"],
        ["--recipe", "fdda", "--capsule", "{capsule}", "--images", "16", "--set", "synthesis.steps=3", "--set", "held_out=8",
         "--set", "distillation.steps=3", "--set", "reconstruction.iterations=3"],
        ["--images", "0", "--set", "held_out=0", "--calibration", "{real}"],
        ["--recipe", "squant", "--images", "0", "--set", "held_out=0", "--calibration", "{few}"],
    ],
    ids=["capsule", "capsule and fdda", "real images", "squant and a few images"],
)  # fmt: skip
def test_a_network_whose_batch_norms_were_folded_is_quantized_with_what_its_owner_has(folded, way):
    network, folder = folded
    images = load_images(folder / "real.safetensors")
    save_images(Images(inputs=images.inputs[:6]), folder / "few.safetensors")
    assert (
        main(
            ["capsule", *network, "--calibration", str(folder / "real.safetensors"), "--output", str(folder / "c.safetensors")]
        )
        == 0
    )
    places = {"capsule": folder / "c.safetensors", "real": folder / "real.safetensors", "few": folder / "few.safetensors"}
    run = folder / "run"
    command = ["quantize", *network, *(word.format(**places) for word in way), "--evaluate", str(places["real"])]
    assert main([*command, "--output", str(run)]) == 0
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["parity"]["max_code_difference"] <= 1
    assert metrics["exported"]["top1"] > (0.6 if "fdda" in way else 0.95)
    assert main(["export", str(run), "--output", str(folder / "again.onnx")]) == 0
    assert content_hash(folder / "again.onnx") == content_hash(run / "network.onnx")
