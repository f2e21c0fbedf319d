import hashlib
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from reverie.errors import ConfigError
from reverie.images import Images
from reverie.images.contract import InputContract
from reverie.images.store import contact_sheet, load_images, save_images, save_pngs

CONTRACT = InputContract(channels=3, height=4, width=6, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


def some_images(channels: int = 3) -> Images:
    generator = torch.Generator().manual_seed(0)
    return Images(
        inputs=torch.randn(5, channels, 4, 6, generator=generator),
        labels=torch.tensor([3, 1, 4, 1, 5]),
        logits=torch.randn(5, 10, generator=generator),
        sources=("zeroq",) * 5,
        provenance={"recipe": "abc", "method": "zeroq", "seed": "0"},
    )


def test_everything_is_read_back_as_it_was_saved(tmp_path):
    images = some_images()
    save_images(images, tmp_path / "a.safetensors")
    back = load_images(tmp_path / "a.safetensors")
    for name in ("inputs", "labels", "logits"):
        assert torch.equal(getattr(back, name), getattr(images, name))
    assert (back.sources, back.provenance) == (images.sources, images.provenance)


def test_what_is_not_known_stays_unknown(tmp_path):
    save_images(Images(inputs=torch.zeros(2, 3, 4, 6)), tmp_path / "a.safetensors")
    back = load_images(tmp_path / "a.safetensors")
    assert (back.labels, back.logits, back.sources, back.provenance) == (None, None, (), {})


def test_equal_sets_give_equal_bytes_in_every_process(tmp_path):
    script = """
import sys, torch
from pathlib import Path
from reverie.images import Images
from reverie.images.store import save_images
facts = {f"key{index}": "value" for index in range(9)}
save_images(Images(inputs=torch.ones(2, 1, 4, 4), labels=torch.tensor([0, 1]), provenance=facts), Path(sys.argv[1]))
"""
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for path in paths:
        subprocess.run([sys.executable, "-c", script, str(path)], check=True)
    first, second = (hashlib.sha256(path.read_bytes()).hexdigest() for path in paths)
    assert first == second


def test_a_file_that_is_not_there_is_refused(tmp_path):
    path = tmp_path / "gone.safetensors"
    with pytest.raises(ConfigError) as caught:
        load_images(path)
    assert str(caught.value) == f"{path}: must be a .safetensors file of images, got no such file; check the path"


@pytest.mark.parametrize("kind", ["foreign", "damaged"])
def test_a_file_that_is_not_ours_is_refused(tmp_path, kind):
    path = tmp_path / "a.safetensors"
    if kind == "foreign":
        save_file({"weight": torch.zeros(3)}, path)
    else:
        save_images(some_images(), path)
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ConfigError) as caught:
        load_images(path)
    assert str(caught.value) == (
        f"{path}: must be a .safetensors file of images saved by Reverie, got another or a damaged one"
    )


def test_pngs_show_the_pixels_and_are_named_by_class(tmp_path):
    pixels = torch.randint(0, 256, (2, 3, 4, 6), generator=torch.Generator().manual_seed(1))
    images = Images(inputs=CONTRACT.normalize(pixels / 255), labels=torch.tensor([7, 0]))
    paths = save_pngs(images, CONTRACT, tmp_path / "images")
    assert [path.name for path in paths] == ["0000_class7.png", "0001_class0.png"]
    for path, expected in zip(paths, pixels, strict=True):
        assert np.array_equal(np.asarray(Image.open(path)), expected.permute(1, 2, 0).numpy())


def test_pixels_beyond_black_and_white_are_clamped(tmp_path):
    images = Images(inputs=torch.tensor([-99.0, 99.0]).repeat_interleave(72).view(2, 3, 4, 6))
    black, white = save_pngs(images, CONTRACT, tmp_path)
    assert (black.name, white.name) == ("0000.png", "0001.png")
    assert (np.asarray(Image.open(black)).max(), np.asarray(Image.open(white)).min()) == (0, 255)


def test_only_as_many_pngs_as_the_limit_are_written(tmp_path):
    assert len(save_pngs(some_images(), CONTRACT, tmp_path, limit=2)) == len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_images_without_three_channels_are_shown_in_grey(tmp_path, channels):
    contract = InputContract(channels=channels, height=4, width=6, mean=(0.0,) * channels, std=(1.0,) * channels)
    images = replace(some_images(), inputs=torch.rand(5, channels, 4, 6))
    path = save_pngs(images, contract, tmp_path, limit=1)[0]
    shown = Image.open(path)
    assert shown.mode == "L"
    assert np.array_equal(np.asarray(shown), (images.inputs[0, 0] * 255).round().numpy())


@pytest.mark.parametrize("channels", [1, 3])
def test_a_contact_sheet_shows_every_image_enlarged_in_its_cell(tmp_path, channels):
    contract = InputContract(channels=channels, height=8, width=8, mean=(0.0,) * channels, std=(1.0,) * channels)
    flat = torch.linspace(0, 1, 5).view(5, 1, 1, 1).expand(5, channels, 8, 8)
    contact_sheet(Images(inputs=flat, labels=torch.arange(5)), contract, tmp_path / "sheet.png", columns=3)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (2 * (96 + 24) + 8, 3 * (96 + 8) + 8, 3)
    for index, level in enumerate((flat[:, 0, 0, 0] * 255).round().int().tolist()):
        top, left = 8 + index // 3 * 120, 8 + index % 3 * 104
        assert (sheet[top : top + 96, left : left + 96] == level).all()
        assert sheet[top + 96 : top + 112, left : left + 96].min() < 128
    assert (sheet[128:, 216:] == 255).all()
