"""Reads real images, labelled or not, into network inputs.

Four layouts, told apart by what is there:

    DIR/labels.csv, or DIR/../labels.csv beside a flat DIR, or a CSV that is named   columns `file` and `label`
    DIR/CLASS/*.png                 one folder a class: its number, its ImageNet wnid, or its place in the sorted order
    DIR/*.png                       no labels
    FILE.npz, FILE.safetensors      arrays `images` (uint8) and `labels`; a set that `save_images` wrote

The arithmetic is that of torchvision's `Resize` and `CenterCrop` on a Pillow image: the shorter side becomes `resize`,
the longer one is rounded down, the corner of the crop is rounded half to even.

What is read may come from anywhere: `received.py` has the limits, and a file is decoded only as what its suffix may stand for.

Not here: augmentation, and rotation by EXIF tags (torchvision's loaders ignore them too).
"""

import csv
import io
import math
import os
import re
import struct
import tempfile
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from reverie import received
from reverie.errors import ConfigError, at
from reverie.graph.cache import Cache, CacheFull
from reverie.images import Images
from reverie.images.contract import InputContract
from reverie.images.store import load_images

# Bytes of network inputs, more of which go to a file: 2500 photographs of 224 px.
_IN_MEMORY = 3 * 2**29
_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
# Pillow looks at the content, and would hand a `.png` that is PostScript to Ghostscript.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
_MODES = {1: "L", 3: "RGB"}
# What to do about images without labels.
_ADD_TABLE = (
    "add a labels.csv with columns 'file' and 'label', or put the images of each class into a folder named by its number"
)
_ADD_ARRAY = "add an array 'labels' to the file"
# All that Pillow raises for files that are no images, are cut short or lie about their size.
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, ConfigError)


def read_folder(
    directory: Path,
    contract: InputContract,
    classes: int,
    *,
    require_labels: bool,
    labels: Path | None = None,
    limit: int | None = None,
) -> Images:
    """The images in `directory` as inputs of the network that `contract` belongs to.

    Args:
        directory: A folder, an `.npz` or a `.safetensors` file; see above.
        classes: Number of classes; a label must be below it.
        require_labels: Refuse a folder whose labels cannot be known; otherwise its images have none.
        labels: The CSV of labels, where it does not lie in `directory` or, for a flat one, beside it.
        limit: At most this many images, spread evenly over the list, so that every class has its share.

    Raises:
        ConfigError: Nothing there, no images, unreadable ones, or labels that are missing or outside the classes.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be at least 1, got {limit}")
    if labels is not None and not labels.is_file():
        raise ConfigError(f"{labels}: must be a CSV file with columns 'file' and 'label', got no such file; check the path")
    with at(str(directory)):
        if not directory.exists():
            raise ConfigError("must be a folder of images, an .npz or a .safetensors file, got no such path; check it")
        if directory.is_dir():
            return _read_files(directory, contract, classes, require_labels, labels, limit)
        received.check_file(directory)
        if directory.suffix == ".npz":
            return _read_arrays(directory, contract, classes, require_labels, limit)
        if directory.suffix == ".safetensors":
            return _read_saved(directory, contract, classes, require_labels, limit)
        raise ConfigError(f"must be a folder, an .npz or a .safetensors file, got a {directory.suffix or 'plain'} file")


def _read_files(
    directory: Path, contract: InputContract, classes: int, require_labels: bool, table: Path | None, limit: int | None
) -> Images:
    mode = _MODES.get(contract.channels)
    if mode is None:
        raise ConfigError(
            f"image files have 1 or 3 channels, the network takes {contract.channels}; "
            "give an .npz file with the arrays 'images' and 'labels' instead"
        )
    files, labels = _listed(directory, classes, require_labels, table)
    if not files:
        raise ConfigError(f"must hold images ({', '.join(sorted(_SUFFIXES))}), got none")
    chosen = _spread(len(files), limit)
    files = [files[index] for index in chosen]
    labels = None if labels is None else [labels[index] for index in chosen]
    names = tuple(os.path.relpath(file, directory) for file in files)
    unspoken = [name for name in names if _text(name) != name]
    if unspoken:
        raise ConfigError(f"images must have names in UTF-8, got {_text(unspoken[0])!r}; rename them")
    _check_labels(labels, names, classes, require_labels, _ADD_TABLE)
    inputs = _room(len(files), contract)

    def look(index: int) -> None:
        received.check_file(files[index])
        try:
            with Image.open(files[index], formats=_FORMATS) as image:
                if image.width * image.height > received.MOST_PIXELS:
                    large.append(index)
        except Image.DecompressionBombError:
            large.append(index)

    def decode(index: int) -> None:
        with Image.open(files[index], formats=_FORMATS) as image:
            pixels = np.asarray(fit(_eight_bit(image).convert(mode), contract))
        _place(inputs, index, pixels.reshape(contract.height, contract.width, -1), contract)

    large: list[int] = []
    with warnings.catch_warnings():
        # What Pillow warns of is not read: animations, EXIF, palettes' transparency. Its limit of pixels is above ours.
        warnings.filterwarnings("ignore", module="PIL")
        # Opening reads no pixels: it finds most broken files long before the last image is decoded.
        _for_each(names, look)
        if large:
            raise ConfigError(
                f"images must have at most {received.MOST_PIXELS} pixels, got more in {len(large)}: "
                f"{', '.join(names[index] for index in sorted(large)[:3])}; make them smaller"
            )
        _for_each(names, decode)
    return Images(
        inputs=inputs,
        labels=None if labels is None else torch.tensor(labels),
        sources=names,
        provenance={"method": "files", "folder": _text(directory.resolve().name)},
    )


def _room(count: int, contract: InputContract) -> Float[Tensor, "count channels height width"]:
    """For so many network inputs: in memory, or in a file without a name that the system reads and forgets as it needs."""
    try:
        return Cache(_IN_MEMORY).room(count, torch.empty(1, *contract.shape))
    except CacheFull as error:
        size = 4 * count * math.prod(contract.shape) / 2**30
        raise ConfigError(
            f"{count} images must fit into {tempfile.gettempdir()} as network inputs ({size:.1f} GiB), got no room for them; free some "
            "space there, or set TMPDIR to a larger place"
        ) from error


def _text(name: str) -> str:
    """A file's name as text that can be printed and stored, whatever its bytes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _eight_bit(image: Image.Image) -> Image.Image:
    # Pillow turns 16-bit grey into white above 255.
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)) if image.mode.startswith("I") else image


def _listed(directory: Path, classes: int, require_labels: bool, table: Path | None) -> tuple[list[Path], list[int] | None]:
    """The image files of `directory` in a fixed order, and their labels if they can be known."""
    loose = _images_in(directory, "*")
    # The parent's table is about `directory` only if the images lie right here, as in DIR/../labels.csv, DIR/a.png.
    holders = [directory, directory.resolve().parent] if loose else [directory]
    table = table or next((holder / "labels.csv" for holder in holders if (holder / "labels.csv").is_file()), None)
    if table is not None:
        return _tabled(directory, table)
    folders = [folder for folder in sorted(directory.iterdir()) if folder.is_dir() and not folder.name.startswith(".")]
    members = {folder.name: _images_in(folder, "**/*") for folder in folders}
    members = {name: files for name, files in members.items() if files}
    if loose and members:
        raise ConfigError(
            f"must hold either images or one folder a class, got both ({loose[0].name} and {next(iter(members))}/); "
            "move one of them away"
        )
    if loose or not members:
        return loose, None
    numbers = _class_numbers(list(members), classes)
    if numbers is None and require_labels:
        raise ConfigError(
            f"must have a folder for each of the {classes} classes, got {len(members)} whose names are neither class "
            "numbers nor ImageNet wnids; name each folder by the number of its class"
        )
    labels = None if numbers is None else [numbers[name] for name, files in members.items() for _ in files]
    return [file for files in members.values() for file in files], labels


def _images_in(folder: Path, pattern: str) -> list[Path]:
    found = (path for path in folder.glob(pattern) if path.suffix.lower() in _SUFFIXES and not path.name.startswith("."))
    # A link to nothing is not left out in silence: opening it says what is wrong.
    return sorted(path for path in found if not path.is_dir())


def _tabled(directory: Path, table: Path) -> tuple[list[Path], list[int]]:
    """The files and labels that the CSV `table` lists; the files lie in `directory` or in its folder `images`."""
    try:
        rows = list(csv.DictReader(io.StringIO(received.read_bytes(table).decode("utf-8-sig"), newline="")))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{table.name}: must be CSV in UTF-8, got {str(error)!r}; save it again") from error
    files, labels = [], []
    for number, row in enumerate(rows, start=2):
        name, label = row.get("file"), row.get("label")
        if not name or label is None or not re.fullmatch(r"\s*-?\d{1,18}\s*", label):
            raise ConfigError(
                f"{table.name}: row {number} must have a 'file' and a whole 'label', got file {name!r} and label {label!r}"
            )
        with at(f"{table.name}: row {number}"):
            received.check_inside(name, "an image")
        places = (directory / name, directory / "images" / name)
        file = next((place for place in places if place.is_file()), None)
        if file is None:
            raise ConfigError(
                f"{table.name}: row {number} must name an image that is there, got {name!r}; add it or delete the row"
            )
        files.append(file)
        labels.append(int(label))
    return files, labels


def _class_numbers(names: Sequence[str], classes: int) -> dict[str, int] | None:
    """The class that each folder name, of all in sorted order, stands for; None when that cannot be known."""
    if all(re.fullmatch(r"\d+", name) for name in names):
        return {name: int(name) for name in names}
    if classes == 1000 and all(re.fullmatch(r"n\d{8}", name) for name in names):
        wnids = (resources.files("reverie.images") / "imagenet_wnids.txt").read_text().split()
        if set(names) <= set(wnids):
            return {name: wnids.index(name) for name in names}
    return {name: index for index, name in enumerate(names)} if len(names) >= classes else None


def _read_arrays(path: Path, contract: InputContract, classes: int, require_labels: bool, limit: int | None) -> Images:
    try:
        with zipfile.ZipFile(path) as archive:
            received.check_archive(archive, path.stat().st_size)
            inside = {member.filename: member.file_size for member in archive.infolist()}
            stored = {name: _array(archive, f"{name}.npy", inside) for name in ("images", "labels") if f"{name}.npy" in inside}
    except ConfigError:
        raise
    except (OSError, ValueError, EOFError, struct.error, zipfile.BadZipFile, zlib.error, tokenize.TokenError) as error:
        raise ConfigError(f"must be a readable .npz file without pickled objects, got {str(error)!r}") from error
    pixels, labels = stored.get("images"), stored.get("labels")
    if pixels is None or pixels.dtype != np.uint8 or pixels.ndim != 4:
        got = "none" if pixels is None else f"{pixels.dtype} of shape {pixels.shape}"
        raise ConfigError(f"must have a uint8 array 'images' of shape (count, height, width, channels), got {got}")
    if labels is not None and (labels.shape != pixels.shape[:1] or not np.issubdtype(labels.dtype, np.integer)):
        raise ConfigError(f"must have one whole label an image ({len(pixels)}), got {labels.dtype} of shape {labels.shape}")
    if not len(pixels):
        raise ConfigError("must hold images, got none")
    pixels = _channels_last(pixels, contract)
    chosen = _spread(len(pixels), limit)
    labels = None if labels is None else labels[chosen].astype(np.int64)
    names = tuple(f"{_text(path.name)}[{index}]" for index in chosen)
    _check_labels(None if labels is None else labels.tolist(), names, classes, require_labels)
    inputs = _room(len(chosen), contract)
    for place, index in enumerate(chosen):
        _place(inputs, place, _fit_array(pixels[index], contract), contract)
    return Images(
        inputs=inputs,
        labels=None if labels is None else torch.from_numpy(labels),
        sources=names,
        provenance={"method": "files", "folder": _text(path.name)},
    )


def _array(archive: zipfile.ZipFile, member: str, sizes: dict[str, int]) -> np.ndarray:
    """An array of an `.npz` file, read once its header agrees with the bytes that are there."""
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(file)
        if dtype.hasobject:
            raise ValueError(f"objects in {member}")
        if not received.holds(shape, dtype.itemsize, sizes[member] - file.tell()):
            raise ValueError(f"{member} of shape {shape} and {sizes[member]} bytes")
    with archive.open(member) as file:
        found: np.ndarray = np.lib.format.read_array(file, allow_pickle=False)
    return found


def _channels_last(pixels: UInt8[np.ndarray, "count a b c"], contract: InputContract) -> UInt8[np.ndarray, "count _ _ _"]:
    """`pixels` with the channels in the last place, wherever they stand; the last place wins when both would do."""
    if pixels.shape[3] == contract.channels:
        return pixels
    if pixels.shape[1] == contract.channels:
        return pixels.transpose(0, 2, 3, 1)
    raise ConfigError(f"images must have {contract.channels} channels, got shape {pixels.shape[1:]}; convert them first")


def _read_saved(path: Path, contract: InputContract, classes: int, require_labels: bool, limit: int | None) -> Images:
    images = load_images(path)
    if images.inputs.shape[1:] != contract.shape:
        raise ConfigError(
            f"inputs must have shape {contract.shape}, got {tuple(images.inputs.shape[1:])}; make them anew, with image_scale = 1"
        )
    chosen = _spread(len(images), limit)
    images = replace(
        images,
        inputs=images.inputs[chosen],
        labels=None if images.labels is None else images.labels[chosen],
        logits=None if images.logits is None else images.logits[chosen],
        sources=tuple(images.sources[index] for index in chosen) if images.sources else (),
    )
    names = tuple(f"{_text(path.name)}[{index}]" for index in chosen)
    _check_labels(None if images.labels is None else images.labels.tolist(), names, classes, require_labels)
    return images


def fit(image: Image.Image, contract: InputContract) -> Image.Image:
    """`image` resized and centre-cropped to the contract's height and width; black where it is too small to fill them."""
    shorter = contract.resize or max(contract.height, contract.width)
    width, height = image.size
    if min(width, height) != shorter:
        scaled = (shorter, shorter * height // width) if width <= height else (shorter * width // height, shorter)
        image = image.resize(scaled, Image.Resampling[contract.interpolation.upper()])
    left, top = _margin(image.width, contract.width), _margin(image.height, contract.height)
    return image.crop((left, top, left + contract.width, top + contract.height))


def _margin(size: int, crop: int) -> int:
    # torchvision pads with the smaller half in front, but crops with the even half in front.
    return round((size - crop) / 2) if size >= crop else -((crop - size) // 2)


def _fit_array(pixels: UInt8[np.ndarray, "a b channels"], contract: InputContract) -> UInt8[np.ndarray, "_ _ channels"]:
    if pixels.shape[:2] == (contract.height, contract.width):
        return pixels
    # Channel by channel, since Pillow has no images of, say, five channels.
    return np.stack([np.asarray(fit(Image.fromarray(channel), contract)) for channel in np.moveaxis(pixels, 2, 0)], axis=2)


def _place(
    inputs: Float[Tensor, "count channels height width"],
    index: int,
    pixels: UInt8[np.ndarray, "height width channels"],
    contract: InputContract,
) -> None:
    """Writes the network input that `pixels` become into `inputs`, in place."""
    scaled = torch.from_numpy(np.array(pixels.transpose(2, 0, 1), order="C")).float() / 255
    inputs[index] = contract.normalize(scaled)


def _for_each(names: Sequence[str], read: Callable[[int], None]) -> None:
    """Calls `read` with every index from a few threads; afterwards names the images that it could not read."""

    def is_broken(index: int) -> bool:
        try:
            read(index)
        except _BROKEN:
            return True
        return False

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        broken = [name for name, failed in zip(names, pool.map(is_broken, range(len(names))), strict=True) if failed]
    if broken:
        more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
        raise ConfigError(
            f"all images must be readable, got {len(broken)} unreadable: {', '.join(broken[:3])}{more}; remove them"
        )


def _spread(count: int, limit: int | None) -> list[int]:
    chosen = min(count, limit or count)
    return [index * count // chosen for index in range(chosen)]


def _check_labels(
    labels: Sequence[int] | None, names: Sequence[str], classes: int, require_labels: bool, cure: str = _ADD_ARRAY
) -> None:
    """Called before anything is decoded, so that a wrong folder is refused at once."""
    if labels is None:
        if require_labels:
            raise ConfigError(f"must have labels 0 to {classes - 1}, got none; {cure}")
        return
    outside = [place for place, label in enumerate(labels) if not 0 <= label < classes]
    if outside:
        more = f" and {len(outside) - 1} more outside" if len(outside) > 1 else ""
        raise ConfigError(
            f"labels must be 0 to {classes - 1}, got {labels[outside[0]]} for {names[outside[0]]}{more}; "
            "check that these images belong to this network"
        )
