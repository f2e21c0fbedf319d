"""The report's words about real images, whole."""

from reverie.report import privacy


def test_that_none_was_read_is_said():
    assert privacy.lines({"real_images": {}, "images": {}}) == ["No real image was read."]
    assert privacy.lines({"images": {}}) == []


def test_every_set_and_every_space_has_its_sentence():
    space = {"nearest": [[3, 7, 0.5], [1, 2, 0.75]], "median": 0.625, "among_real": {"median": 0.9, "least": 0.4}}
    metrics = {
        "real_images": {
            "calibration": {"from": "/x/few", "count": 10, "hashes": "files", "sha256": "0"},
            "evaluation": {"from": None, "count": 599, "hashes": "inputs", "sha256": "0"},
            "capsule": {"from": "/x/c.safetensors", "count": 5, "hashes": "archive", "sha256": "0"},
        },
        "images": {
            "nearest_real": {
                "compared": {"synthetic": 2, "real": 10},
                "pixels": space,
                "features": space | {"among_real": None},
            }
        },
    }
    assert privacy.lines(metrics) == [
        "calibration: 10 images from /x/few; their hashes are in real_images.json.",
        "evaluation: 599 images; hashes of the network inputs are in real_images.json.",
        "capsule: statistics of 5 images from /x/c.safetensors; the file's hash is in real_images.json.",
        "2 synthetic images to the nearest of 10 real ones, root of the mean squared difference of network inputs: median 0.625, "
        "least 0.5 (synthetic 3, real 7) (real ones to each other: median 0.9, least 0.4).",
        "2 synthetic images to the nearest of 10 real ones, in what the last layer reads: median 0.625, least 0.5 (synthetic 3, real 7).",
    ]
