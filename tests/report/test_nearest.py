"""A copy is found, and the numbers are those of a double loop."""

import pytest
import torch
from PIL import Image

from reverie.images import Images
from reverie.report import nearest
from reverie.stages import as_teacher


@pytest.fixture
def teacher(tiny_cnn):
    return as_teacher(tiny_cnn())


def noise(count, seed, shape=(3, 16, 16)):
    return Images(inputs=torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed)))


def test_distances_are_those_of_a_double_loop(teacher, tiny_cnn):
    synthetic, real = noise(7, 0), noise(5, 1)
    found = nearest.describe(teacher, synthetic, real)
    assert found["compared"] == found["of"] == {"synthetic": 7, "real": 5}
    for first, second, distance in found["pixels"]["nearest"]:
        all_of_them = [float((synthetic.inputs[first] - image).square().mean().sqrt()) for image in real.inputs]
        assert second == min(range(5), key=all_of_them.__getitem__)
        assert distance == pytest.approx(all_of_them[second], rel=1e-5)
    assert sorted(pair[0] for pair in found["pixels"]["nearest"]) == list(range(7))
    assert [pair[2] for pair in found["pixels"]["nearest"]] == sorted(pair[2] for pair in found["pixels"]["nearest"])
    between = [
        min(float((a - b).square().mean().sqrt()) for j, b in enumerate(real.inputs) if j != i)
        for i, a in enumerate(real.inputs)
    ]
    among = found["pixels"]["among_real"]
    assert among["least"] == pytest.approx(min(between), rel=1e-5)
    # The features are what the last layer of the network reads.
    with torch.no_grad():
        ours, theirs = (tiny_cnn().module[:-1](images.inputs) for images in (synthetic, real))
    assert found["features"]["nearest"][0][2] == pytest.approx(float(torch.cdist(ours, theirs).min()), rel=1e-3)


def test_a_copy_is_the_nearest_pair_at_distance_zero_in_both_spaces(teacher, tmp_path):
    synthetic, real = noise(20, 0), noise(30, 1)
    synthetic.inputs[13] = real.inputs[21]
    found = nearest.describe(teacher, synthetic, real)
    for space in nearest.SPACES:
        assert found[space]["nearest"][0] == [13, 21, 0.0]
        assert found[space]["nearest"][1][2] > 0
        assert found[space]["among_real"]["least"] > 0
    nearest.show(tmp_path / "nearest.png", found, synthetic, real, teacher.input)
    with Image.open(tmp_path / "nearest.png") as picture:
        # Eight pairs for each space, four in a row, enlarged to 96 pixels with gaps of 8.
        assert picture.size == (8 * 104 + 8, 4 * 104 + 8)
        pixels = picture.convert("RGB")
        assert pixels.crop((8, 8, 104, 104)).tobytes() == pixels.crop((112, 8, 208, 104)).tobytes()


def test_a_single_real_image_has_no_other(teacher):
    found = nearest.describe(teacher, noise(3, 0), noise(1, 1))
    assert found["pixels"]["among_real"] is None
    assert [pair[1] for pair in found["features"]["nearest"]] == [0, 0, 0]


def test_large_sets_are_compared_in_part_and_say_so(teacher, monkeypatch):
    monkeypatch.setattr(nearest, "_MOST", 4)
    found = nearest.describe(teacher, noise(9, 0), noise(8, 1))
    assert (found["compared"], found["of"]) == ({"synthetic": 4, "real": 4}, {"synthetic": 9, "real": 8})
    assert {pair[0] for pair in found["pixels"]["nearest"]} == {0, 2, 4, 6}


def test_rows_are_compared_piece_by_piece_alike(teacher, monkeypatch):
    synthetic, real = noise(9, 0), noise(8, 1)
    whole = nearest.describe(teacher, synthetic, real)
    monkeypatch.setattr(nearest, "_PAIRS", 16)
    parts = nearest.describe(teacher, synthetic, real)
    assert parts["pixels"]["among_real"] == pytest.approx(whole["pixels"]["among_real"])
    assert [pair[:2] for pair in parts["pixels"]["nearest"]] == [pair[:2] for pair in whole["pixels"]["nearest"]]
