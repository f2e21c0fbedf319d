"""What a run says about the real images that it read."""

import hashlib
import json

import numpy as np
import torch
from PIL import Image

from reverie import real_images
from reverie.images import Images
from reverie.images.contract import InputContract
from reverie.images.folder import read_folder

CONTRACT = InputContract(channels=1, height=4, width=4, mean=(0.5,), std=(0.5,))


def folder_of(path, shades):
    for name, shade in shades.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4), shade, np.uint8)).save(path / name)
    return read_folder(path, CONTRACT, 2, require_labels=False)


def test_files_are_listed_by_the_hashes_that_anyone_can_compute(tmp_path):
    images = folder_of(tmp_path / "real", {"0/a.png": 1, "1/b.png": 200})
    found = real_images.listed({"calibration": images, "evaluation": None}, None, {"calibration": str(tmp_path / "real")})
    told = {name: hashlib.sha256((tmp_path / "real" / name).read_bytes()).hexdigest() for name in ("0/a.png", "1/b.png")}
    assert found == {"calibration": {"from": str(tmp_path / "real"), "count": 2, "hashes": "files", "sha256": told}}
    short = real_images.summary(found)["calibration"]
    assert short["count"] == 2 and len(short["sha256"]) == 64


def test_an_archive_has_one_hash_and_inputs_without_a_place_have_their_own(tmp_path):
    np.savez(tmp_path / "set.npz", images=np.zeros((3, 4, 4, 1), np.uint8))
    images = read_folder(tmp_path / "set.npz", CONTRACT, 2, require_labels=False)
    places = {"calibration": str(tmp_path / "set.npz")}
    found = real_images.listed({"calibration": images, "evaluation": images}, None, places)
    digest = hashlib.sha256((tmp_path / "set.npz").read_bytes()).hexdigest()
    assert found["calibration"] == {
        "from": places["calibration"],
        "count": 3,
        "hashes": "archive",
        "sha256": {"set.npz": digest},
    }
    own = hashlib.sha256(np.full((1, 4, 4), -1, np.float32).tobytes()).hexdigest()
    assert found["evaluation"] == {"from": None, "count": 3, "hashes": "inputs", "sha256": dict.fromkeys("012", own)}


def test_what_changed_in_a_folder_is_named(tmp_path):
    shades = {f"{number}.png": number for number in range(9)}
    places = {"calibration": str(tmp_path / "real")}
    before = real_images.listed({"calibration": folder_of(tmp_path / "real", shades)}, None, places)
    (tmp_path / real_images.FILE).write_text(json.dumps(before))
    for number in (1, 2, 4, 5, 7):
        (tmp_path / "real" / f"{number}.png").unlink()
    images = folder_of(tmp_path / "real", {"0.png": 99, "new.png": 5})
    now = real_images.listed({"calibration": images}, None, places)
    assert real_images.changes(tmp_path, now, ["recipe", "calibration"]) == [
        "calibration: changed 0.png, gone 1.png, 2.png, 4.png and 2 more, new new.png"
    ]
    assert real_images.changes(tmp_path, before, ["calibration"]) == []
    assert real_images.changes(tmp_path / "none", now, ["calibration"]) == []


def test_no_images_are_an_empty_list():
    assert real_images.listed({"calibration": None, "evaluation": None}, None, {}) == {}
    assert real_images.listed({"a": Images(inputs=torch.zeros(0, 1, 4, 4))}, None, {})["a"]["sha256"] == {}
