import csv
import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from reverie.errors import ConfigError
from reverie.images import Images
from reverie.images.contract import InputContract
from reverie.images.folder import fit, read_folder
from reverie.images.store import save_images

GREY = InputContract(channels=1, height=4, width=4, mean=(0.0,), std=(1.0,))
COLOUR = InputContract(channels=3, height=4, width=4, mean=(0.5,) * 3, std=(0.25,) * 3)


def write(path: Path, level: int = 0, size: tuple[int, int] = (4, 4), mode: str = "L") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, (level,) * 3 if mode == "RGB" else level).save(path)


def levels(images: Images) -> list[int]:
    return (images.inputs[:, 0, 0, 0] * 255).round().int().tolist()


def refusal(directory: Path, contract: InputContract = GREY, classes: int = 2, **options: object) -> str:
    with pytest.raises(ConfigError) as caught:
        read_folder(directory, contract, classes, **({"require_labels": True} | options))
    return str(caught.value)


@pytest.fixture
def reference(assets):
    """The asset folder's own loader, written without this package."""
    spec = importlib.util.spec_from_file_location("asset_models", assets / "models.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["mobilenet_v2-b0353104", "tf_efficientnet_lite0"])
@pytest.mark.parametrize("folder", ["nips2017", "nips2017/images"])
def test_photographs_equal_those_of_an_independent_loader(assets, reference, name, folder):
    resize, crop, _, mean, std = reference.IMAGENET_PREP[name]
    contract = InputContract(
        channels=3,
        height=crop,
        width=crop,
        mean=mean,
        std=std,
        resize=resize,
        interpolation="bilinear" if name.startswith("mobilenet") else "bicubic",
    )
    rows = reference.imagenet_rows("nips2017")
    images = read_folder(assets / "data" / folder, contract, 1000, require_labels=True, limit=6)
    for index in range(6):
        row = rows[index * len(rows) // 6]
        assert torch.equal(
            images.inputs[index], reference.load_image("nips2017", row["file"], *reference.IMAGENET_PREP[name])[0]
        )
        assert int(images.labels[index]) == int(row["label"])
        assert Path(images.sources[index]).name == row["file"]


def test_resize_and_crop_equal_torchvisions(tmp_path):
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    # In a process of its own: beside a CPU-only torch, torchvision imports only after this definition, made once.
    script = """
import sys, torch, numpy as np
from PIL import Image
try:
    import torchvision
except RuntimeError:
    for module in [name for name in sys.modules if name.startswith("torchvision")]:
        del sys.modules[module]
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
from torchvision.transforms import CenterCrop, Resize
images = np.load(sys.argv[1])
fitted = {name: np.asarray(CenterCrop(8)(Resize(int(name.split()[0]))(Image.fromarray(images[name])))) for name in images}
np.savez(sys.argv[2], **fitted)
"""
    random = np.random.default_rng(0)
    sizes = [(8, 8), (13, 9), (9, 13), (31, 8), (8, 30), (5, 6)]
    noise = {
        f"{resize} {width} {height}": random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        for resize in (5, 7, 8, 11)
        for width, height in sizes
    }
    np.savez(tmp_path / "noise.npz", **noise)
    subprocess.run([sys.executable, "-c", script, tmp_path / "noise.npz", tmp_path / "fitted.npz"], check=True)
    with (tmp_path / "fitted.npz").open("rb") as file, np.load(file) as theirs:
        for name, image in noise.items():
            contract = replace(COLOUR, height=8, width=8, resize=int(name.split()[0]))
            assert np.array_equal(np.asarray(fit(Image.fromarray(image), contract)), theirs[name]), name


def test_inputs_are_normalized_and_in_the_networks_channels(tmp_path):
    write(tmp_path / "grey.png", 51)
    inputs = read_folder(tmp_path, COLOUR, 2, require_labels=False).inputs
    assert torch.equal(inputs, torch.full((1, 3, 4, 4), (51 / 255 - 0.5) / 0.25))


def test_sixteen_bit_grey_keeps_its_levels(tmp_path):
    Image.fromarray(np.full((4, 4), 0x3300, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert levels(read_folder(tmp_path, GREY, 2, require_labels=False)) == [0x33]


def test_folder_names_that_are_numbers_are_the_labels(tmp_path):
    for label in (10, 2):
        write(tmp_path / str(label) / "a.png", label)
    images = read_folder(tmp_path, GREY, 11, require_labels=True)
    assert images.labels.tolist() == levels(images) == [10, 2]
    assert images.sources == ("10/a.png", "2/a.png")


def test_other_folder_names_count_in_sorted_order(tmp_path):
    for level, name in enumerate(("cat", "dog", "eel")):
        write(tmp_path / name / "a.PNG", level)
        write(tmp_path / name / "deeper" / "b.webp", level)
    images = read_folder(tmp_path, GREY, 3, require_labels=True)
    assert images.labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_a_few_wnid_folders_get_their_imagenet_classes(tmp_path):
    for wnid in ("n15075141", "n01440764", "n02123045"):
        write(tmp_path / wnid / "a.png")
    assert read_folder(tmp_path, GREY, 1000, require_labels=True).labels.tolist() == [0, 281, 999]


def test_labels_that_cannot_be_known_are_left_out_when_nobody_needs_them(tmp_path):
    write(tmp_path / "cat" / "a.png")
    assert read_folder(tmp_path, GREY, 2, require_labels=False).labels is None


def test_a_table_may_lie_anywhere(tmp_path):
    write(tmp_path / "images" / "a.png", 7)
    table = tmp_path / "truth.csv"
    table.write_text("label,file\n1,a.png\n")
    images = read_folder(tmp_path, GREY, 2, require_labels=True, labels=table)
    assert (images.labels.tolist(), levels(images)) == ([1], [7])


def test_a_limit_takes_images_from_every_class(tmp_path):
    for label in range(4):
        for index in range(5):
            write(tmp_path / str(label) / f"{index}.png")
    assert read_folder(tmp_path, GREY, 4, require_labels=True, limit=4).labels.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_arrays_of_any_channel_count_are_read_in_both_layouts(tmp_path, channels, last):
    contract = InputContract(channels=channels, height=6, width=7, mean=(0.0,) * channels, std=(1 / 255,) * channels)
    pixels = np.random.default_rng(1).integers(0, 256, (3, 6, 7, channels), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=pixels if last else pixels.transpose(0, 3, 1, 2), labels=np.array([0, 1, 0]))
    images = read_folder(tmp_path / "a.npz", contract, 2, require_labels=True)
    assert np.array_equal(images.inputs.round().numpy(), pixels.transpose(0, 3, 1, 2))
    assert images.labels.tolist() == [0, 1, 0]
    assert images.sources == ("a.npz[0]", "a.npz[1]", "a.npz[2]")


def test_arrays_of_another_size_are_fitted_like_files(tmp_path):
    pixels = np.random.default_rng(2).integers(0, 256, (1, 9, 12, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=pixels)
    Image.fromarray(pixels[0]).save(tmp_path / "a.png")
    from_file = read_folder(tmp_path, COLOUR, 2, require_labels=False)
    from_array = read_folder(tmp_path / "a.npz", COLOUR, 2, require_labels=False)
    assert torch.equal(from_file.inputs, from_array.inputs)


def test_a_saved_set_is_read_back(tmp_path):
    images = Images(inputs=torch.randn(4, 1, 4, 4), labels=torch.tensor([0, 1, 1, 0]), sources=("a", "b", "c", "d"))
    save_images(images, tmp_path / "a.safetensors")
    back = read_folder(tmp_path / "a.safetensors", GREY, 2, require_labels=True, limit=2)
    assert torch.equal(back.inputs, images.inputs[[0, 2]])
    assert (back.labels.tolist(), back.sources) == ([0, 1], ("a", "c"))


def test_a_missing_directory_is_refused(tmp_path):
    assert refusal(tmp_path / "gone") == (
        f"{tmp_path / 'gone'}: must be a folder of images, an .npz or a .safetensors file, got no such path; check it"
    )


def test_an_empty_folder_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing to see")
    assert refusal(tmp_path) == f"{tmp_path}: must hold images (.bmp, .jpeg, .jpg, .png, .webp), got none"


def test_unreadable_images_are_named(tmp_path):
    write(tmp_path / "good.png")
    for name in "abcde":
        (tmp_path / f"{name}.png").write_text("not a picture")
    assert refusal(tmp_path, require_labels=False) == (
        f"{tmp_path}: all images must be readable, got 5 unreadable: a.png, b.png, c.png and 2 more; remove them"
    )


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp"])
def test_an_image_that_was_cut_short_is_named(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / f"half.{suffix}"
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert refusal(tmp_path, require_labels=False) == (
        f"{tmp_path}: all images must be readable, got 1 unreadable: half.{suffix}; remove them"
    )


def test_files_for_a_network_of_five_channels_are_refused(tmp_path):
    contract = InputContract(channels=5, height=4, width=4, mean=(0.0,) * 5, std=(1.0,) * 5)
    assert refusal(tmp_path, contract) == (
        f"{tmp_path}: image files have 1 or 3 channels, the network takes 5; "
        "give an .npz file with the arrays 'images' and 'labels' instead"
    )


def test_arrays_of_the_wrong_channel_count_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 8, 8, 4), dtype=np.uint8))
    assert refusal(tmp_path / "a.npz", COLOUR) == (
        f"{tmp_path / 'a.npz'}: images must have 3 channels, got shape (8, 8, 4); convert them first"
    )


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "must have a uint8 array 'images' of shape (count, height, width, channels), got none"),
        (
            {"images": np.zeros((2, 4, 4, 1))},
            "must have a uint8 array 'images' of shape (count, height, width, channels), got float64 of shape (2, 4, 4, 1)",
        ),
        (
            {"images": np.zeros((2, 4, 4, 1), dtype=np.uint8), "labels": np.zeros(3, dtype=np.int64)},
            "must have one whole label an image (2), got int64 of shape (3,)",
        ),
        ({"images": np.zeros((0, 4, 4, 1), dtype=np.uint8)}, "must hold images, got none"),
    ],
)
def test_arrays_that_are_not_images_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    assert refusal(tmp_path / "a.npz") == f"{tmp_path / 'a.npz'}: {message}"


def test_a_damaged_array_file_is_refused(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04 and nothing more")
    assert refusal(tmp_path / "a.npz") == (
        f"{tmp_path / 'a.npz'}: must be a readable .npz file without pickled objects, got 'File is not a zip file'"
    )


def test_a_file_of_another_kind_is_refused(tmp_path):
    write(tmp_path / "a.png")
    assert (
        refusal(tmp_path / "a.png")
        == f"{tmp_path / 'a.png'}: must be a folder, an .npz or a .safetensors file, got a .png file"
    )


def test_labels_outside_the_classes_are_refused(tmp_path):
    for label in (0, 7, 8):
        write(tmp_path / str(label) / "a.png")
    assert refusal(tmp_path, classes=7) == (
        f"{tmp_path}: labels must be 0 to 6, got 7 for 7/a.png and 1 more outside; "
        "check that these images belong to this network"
    )


def test_images_without_labels_are_refused_where_labels_are_needed(tmp_path):
    write(tmp_path / "a.png")
    assert refusal(tmp_path) == (
        f"{tmp_path}: must have labels 0 to 1, got none; add a labels.csv with columns 'file' and 'label', "
        "or put the images of each class into a folder named by its number"
    )


def test_fewer_named_folders_than_classes_are_refused(tmp_path):
    for name in ("cat", "dog"):
        write(tmp_path / name / "a.png")
    assert refusal(tmp_path, classes=3) == (
        f"{tmp_path}: must have a folder for each of the 3 classes, got 2 whose names are neither class numbers "
        "nor ImageNet wnids; name each folder by the number of its class"
    )


def test_a_mixture_of_layouts_is_refused(tmp_path):
    write(tmp_path / "loose.png")
    write(tmp_path / "0" / "a.png")
    assert refusal(tmp_path) == (
        f"{tmp_path}: must hold either images or one folder a class, got both (loose.png and 0/); move one of them away"
    )


def test_a_table_that_names_a_missing_file_is_refused(tmp_path):
    write(tmp_path / "a.png")
    with (tmp_path / "labels.csv").open("w", newline="") as table:
        csv.writer(table).writerows([("file", "label"), ("a.png", 0), ("b.png", 1)])
    assert refusal(tmp_path) == (
        f"{tmp_path}: labels.csv: row 3 must name an image that is there, got 'b.png'; add it or delete the row"
    )


def test_a_table_without_whole_labels_is_refused(tmp_path):
    write(tmp_path / "a.png")
    (tmp_path / "labels.csv").write_text("file,label\na.png,tench\n")
    assert refusal(tmp_path) == (
        f"{tmp_path}: labels.csv: row 2 must have a 'file' and a whole 'label', got file 'a.png' and label 'tench'"
    )


def test_a_table_that_is_not_there_is_refused(tmp_path):
    table = tmp_path / "labels.csv"
    assert refusal(tmp_path, labels=table) == (
        f"{table}: must be a CSV file with columns 'file' and 'label', got no such file; check the path"
    )


def test_a_saved_set_of_another_shape_is_refused(tmp_path):
    save_images(Images(inputs=torch.zeros(1, 3, 8, 8)), tmp_path / "a.safetensors")
    assert refusal(tmp_path / "a.safetensors") == (
        f"{tmp_path / 'a.safetensors'}: inputs must have shape (1, 4, 4), got (3, 8, 8); make them anew, with image_scale = 1"
    )


def test_a_limit_below_one_is_refused(tmp_path):
    assert refusal(tmp_path, limit=0) == "limit must be at least 1, got 0"
