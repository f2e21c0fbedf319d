"""Small pictures stand where the data says, with the network's own answers."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from reverie.images import Images
from reverie.report import thumbnails
from reverie.stages import as_teacher


@pytest.fixture(scope="module")
def teacher(tiny_cnn):
    return as_teacher(tiny_cnn())


def test_each_class_has_its_first_eight_images_real_ones_last(tmp_path, teacher, tiny_cnn):
    real = tiny_cnn().held_out()
    told = thumbnails.draw(teacher, {"real": real, "some": real.evenly(7)}, tmp_path)
    assert told["by_class"]
    assert [item["set"] for item in told["items"]] == ["some"] * 7 + ["real"] * 24
    classes = [item["class"] for item in told["items"][7:]]
    assert classes == [0] * 8 + [1] * 8 + [2] * 8
    first = real.labels.tolist().index(1)
    top = teacher.logits(real.inputs[first : first + 1]).softmax(1)[0]
    assert told["items"][7 + 8]["top"][0] == [int(top.argmax()), pytest.approx(float(top.max()), abs=1e-4)]
    with Image.open(tmp_path / told["file"]) as picture:
        pixels = np.asarray(picture)
    assert pixels.shape == (16 * told["rows"], 16 * told["columns"], 3)
    row, column = divmod(7 + 8, told["columns"])
    there = pixels[16 * row : 16 * (row + 1), 16 * column : 16 * (column + 1)].transpose(2, 0, 1) / 255
    here = teacher.input.denormalize(real.inputs[first]).clamp(0, 1).numpy()
    assert np.abs(there - here).max() <= 0.5 / 255 + 1e-6


def test_without_labels_images_stand_by_what_the_network_takes_them_for(tmp_path, teacher, tiny_cnn):
    images = dataclasses.replace(tiny_cnn().held_out().evenly(40), labels=None)
    told = thumbnails.draw(teacher, {"some": images}, tmp_path)
    answers = [item["top"][0][0] for item in told["items"]]
    assert answers == sorted(answers)
    assert {item["class"] for item in told["items"]} == {None}


def test_large_images_of_many_classes_are_made_small_and_spread_over_the_classes(tmp_path, teacher, monkeypatch):
    many = dataclasses.replace(teacher, classes=1000, input=dataclasses.replace(teacher.input, height=224, width=168))
    answers = torch.nn.functional.one_hot(torch.arange(200) * 5, 1000) * 20.0
    images = Images(inputs=torch.rand(200, 3, 224, 168), labels=torch.arange(200) * 5, logits=answers)
    told = thumbnails.draw(many, {"some": images}, tmp_path)
    assert told["size"] == [84, 112]
    classes = [item["class"] for item in told["items"]]
    assert len(classes) == 72 and classes == sorted(classes) and (classes[0], classes[-1]) == (0, 995)
    assert all(item["top"][0] == [item["class"], 1.0] for item in told["items"])
    assert told["file"].endswith(".jpg")
    assert (tmp_path / told["file"]).stat().st_size < 1_000_000
