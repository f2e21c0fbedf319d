"""Pictures: readers of each kind of folder get back pixels to half a level, and the network's own class numbers."""

import io
import json
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tests.formats.test_conformance import CONTRACT, some_images

from reverie.errors import ConfigError
from reverie.formats import write
from reverie.formats.imagefolder import ImageFolder
from reverie.formats.ultralytics import Ultralytics
from reverie.formats.webdataset import WebDataset
from reverie.images.folder import read_folder
from reverie.models import _torchvision_import


def assert_same_pixels(levels, inputs):
    """Rounded to a level of 8 bits: at most half a level from what it was."""
    expected = 255 * CONTRACT.denormalize(inputs).numpy().transpose(1, 2, 0)
    assert levels.dtype == np.uint8
    assert np.abs(levels - expected).max() <= 0.5 + 1e-3


def test_what_reverie_reads_back_from_a_folder_is_what_was_written(tmp_path):
    images = some_images()
    write(ImageFolder(), images, CONTRACT, 1000, tmp_path / "a")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["001", "003", "004", "005"]
    back = read_folder(tmp_path / "a", replace(CONTRACT, resize=4), 1000, require_labels=True)
    # Sorted by class, and within a class by number.
    order = [1, 3, 0, 2, 4]
    assert back.labels.tolist() == [1, 1, 3, 4, 5]
    # In inputs, half a level is half of 1/255 in units of the standard deviation.
    half = (0.5 / 255) / torch.tensor(CONTRACT.std).view(3, 1, 1)
    assert bool(((back.inputs - images.inputs[order]).abs() <= half * 1.01).all())


def test_the_order_of_folders_is_that_of_classes(tmp_path):
    write(ImageFolder(), some_images(labels=torch.tensor([0, 9, 10, 2, 99])), CONTRACT, 100, tmp_path / "a")
    assert [int(name) for name in sorted(path.name for path in (tmp_path / "a").iterdir())] == [0, 2, 9, 10, 99]


def test_torchvisions_image_folder_reads_it(tmp_path):
    datasets = _torchvision_import.torchvision().datasets
    images = some_images()
    write(ImageFolder(), images, CONTRACT, 1000, tmp_path / "a")
    dataset = datasets.ImageFolder(tmp_path / "a")
    assert [int(dataset.classes[label]) for _, label in dataset] == [1, 1, 3, 4, 5]
    assert_same_pixels(np.asarray(dataset[0][0]), images.inputs[1])


@pytest.mark.parametrize("labels", [None, torch.tensor([3, 1, 4, 1, 5])])
def test_what_the_network_says_is_the_class_whatever_was_asked_for(tmp_path, labels):
    logits = torch.eye(10)[torch.tensor([7, 7, 0, 2, 2])]
    write(ImageFolder(), some_images(labels=labels, logits=logits), CONTRACT, 10, tmp_path / "a")
    assert {path.name: len(list(path.iterdir())) for path in (tmp_path / "a").iterdir()} == {"0": 1, "2": 2, "7": 2}


def test_without_labels_and_logits_no_class_is_made_up(tmp_path):
    with pytest.raises(ConfigError) as caught:
        write(ImageFolder(), some_images(labels=None), CONTRACT, 10, tmp_path / "a")
    assert str(caught.value) == (
        "images must have the network's logits or labels to be sorted by class, got neither; choose a target of arrays"
    )
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_valid_pixel_is_clamped(tmp_path):
    write(ImageFolder(), some_images(inputs=torch.full((5, 3, 4, 6), 100.0)), CONTRACT, 10, tmp_path / "a")
    assert np.asarray(Image.open(tmp_path / "a" / "1" / "00000001.png")).min() == 255


def test_ultralytics_gets_a_yaml_with_places_relative_to_it(tmp_path):
    write(Ultralytics(), some_images(), CONTRACT, 6, tmp_path / "a")
    assert (tmp_path / "a" / "data.yaml").read_text() == (
        "train: train\nval: val\nchannels: 3\nnames:\n  0: '0'\n  1: '1'\n  2: '2'\n  3: '3'\n  4: '4'\n  5: '5'\n"
    )
    parts = [{str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.png")} for folder in
             (tmp_path / "a" / "train", tmp_path / "a" / "val")]  # fmt: skip
    assert parts[0] == parts[1]
    assert sorted(parts[0]) == ["1/00000001.png", "1/00000003.png", "3/00000000.png", "4/00000002.png", "5/00000004.png"]


def test_webdataset_begins_a_new_file_when_one_is_full(tmp_path):
    images = some_images()
    write(WebDataset(per_shard=2), images, CONTRACT, 10, tmp_path / "a")
    found = {}
    for path in sorted((tmp_path / "a").iterdir()):
        with tarfile.open(path) as file:
            found[path.name] = {member.name: file.extractfile(member).read() for member in file}
    assert [list(found[name]) for name in ("images-000000.tar", "images-000002.tar")] == [
        ["00000000.png", "00000000.cls", "00000000.json", "00000001.png", "00000001.cls", "00000001.json"],
        ["00000004.png", "00000004.cls", "00000004.json"],
    ]
    last = found["images-000002.tar"]
    assert last["00000004.cls"] == b"5"
    assert json.loads(last["00000004.json"]) == {"source": "zeroq", "provenance": {"method": "zeroq", "seed": "0"}}
    assert_same_pixels(np.asarray(Image.open(io.BytesIO(last["00000004.png"]))), images.inputs[4])


@pytest.mark.slow
def test_up_to_ten_thousand_images_are_one_file_and_the_next_begins_another(tmp_path):
    many = some_images(inputs=torch.zeros(10_001, 3, 4, 6), labels=torch.arange(10_001) % 10, sources=())
    write(WebDataset(), many, CONTRACT, 10, tmp_path / "a")
    with tarfile.open(tmp_path / "a" / "images-000001.tar") as file:
        assert file.getnames() == ["00010000.png", "00010000.cls", "00010000.json"]
    assert len(list((tmp_path / "a").iterdir())) == 2


# The library leaves its files to the garbage collector.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_webdataset_library_reads_it(tmp_path):
    webdataset = pytest.importorskip("webdataset", reason="webdataset is not installed")
    images = some_images()
    write(WebDataset(per_shard=3), images, CONTRACT, 10, tmp_path / "a")
    pattern = str(tmp_path / "a" / "images-{000000..000001}.tar")
    samples = list(webdataset.WebDataset(pattern, shardshuffle=False).decode("pil").to_tuple("png", "cls", "json"))
    assert [label for _, label, _ in samples] == [3, 1, 4, 1, 5]
    for (picture, _, _), inputs in zip(samples, images.inputs, strict=True):
        assert_same_pixels(np.asarray(picture), inputs)


@pytest.mark.parametrize("per_shard", [0, -1])
def test_a_file_for_no_images_is_refused(per_shard):
    with pytest.raises(ConfigError) as caught:
        WebDataset(per_shard=per_shard)
    assert str(caught.value) == f"per_shard must be at least 1, got {per_shard}"
