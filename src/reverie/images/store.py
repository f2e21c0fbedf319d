"""Saves sets of images: for Reverie and other tools (safetensors), for the eye (PNG).

The safetensors file holds `inputs`, and `labels` and `logits` if known; its metadata has one entry, `reverie`, a JSON
object with `sources` and `provenance`. Equal sets give equal bytes.
"""

import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from reverie import received
from reverie.errors import ConfigError, at
from reverie.files import atomic_write
from reverie.images import Images
from reverie.images.contract import InputContract

_TENSORS = ("inputs", "labels", "logits")
_INTEGERS = frozenset({torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64})
_AGAIN = "make the images anew, or fetch the file again"
_CELL = 96
_GAP = 8
_CAPTION = 16


@dataclass(frozen=True, kw_only=True)
class _About:
    """What the metadata says."""

    sources: tuple[str, ...]
    provenance: dict[str, str]


def save_images(images: Images, path: Path) -> None:
    """Writes `images` to the safetensors file `path`, whole or not at all.

    Raises:
        ConfigError: No space left, or `path` cannot be written.
    """
    present = {name: getattr(images, name) for name in _TENSORS if getattr(images, name) is not None}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in present.items()}
    # One entry only: safetensors writes several in an order that changes from process to process.
    about = {"reverie": json.dumps({"sources": images.sources, "provenance": images.provenance}, sort_keys=True)}
    atomic_write(path, lambda aside: save_file(tensors, aside, about))


def load_images(path: Path) -> Images:
    """The set that `save_images` wrote to `path`.

    Raises:
        ConfigError: No such file, or not one that `save_images` wrote.
    """
    if not path.exists():
        raise ConfigError(f"{path}: must be a .safetensors file of images, got no such file; check the path")
    with at(str(path)):
        received.check_file(path)
        try:
            with safe_open(path, framework="pt") as file:
                text = (file.metadata() or {})["reverie"]
                tensors = {name: file.get_tensor(name) for name in _TENSORS if name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError) as error:
            raise ConfigError("must be a .safetensors file of images saved by Reverie, got another or a damaged one") from error
        about = received.parse_json(text, _About, _AGAIN)
        _check_tensors(tensors, about["sources"])
    return Images(
        inputs=tensors["inputs"],
        labels=tensors.get("labels"),
        logits=tensors.get("logits"),
        sources=tuple(about["sources"]),
        provenance=about["provenance"],
    )


def _check_tensors(tensors: dict[str, Tensor], sources: list[str]) -> None:
    """Refuses tensors that are no set of images, and numbers that no network can be fed with."""
    inputs = tensors.get("inputs")
    if inputs is None or inputs.dtype is not torch.float32 or inputs.dim() != 4 or not len(inputs):
        raise ConfigError(f"inputs must be float32 of shape (count, channels, height, width), got {_told(inputs)}; {_AGAIN}")
    for name, whole, dimensions in (("labels", True, 1), ("logits", False, 2)):
        tensor = tensors.get(name)
        if tensor is not None and (
            (tensor.dtype in _INTEGERS, tensor.dim()) != (whole, dimensions) or tensor.shape[0] != len(inputs)
        ):
            raise ConfigError(f"{name} must be one for each of {len(inputs)} images, got {_told(tensor)}; {_AGAIN}")
    if len(sources) not in (0, len(inputs)):
        raise ConfigError(f"sources must be one for each of {len(inputs)} images, got {len(sources)}; {_AGAIN}")
    for name in ("inputs", "logits"):
        if name in tensors and not bool(tensors[name].isfinite().all()):
            raise ConfigError(f"{name} must be finite, got NaN or infinite values; {_AGAIN}")


def _told(tensor: Tensor | None) -> str:
    return "nothing" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"


def save_pngs(images: Images, contract: InputContract, folder: Path, limit: int | None = None) -> list[Path]:
    """Writes the first `limit` images as `0000_class7.png` (`0000.png` without labels) into `folder`; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = _pictures(images, contract, limit)
    captions = [caption.replace(" ", "") for caption in _captions(images, len(pictures))]
    names = [f"{index:04d}_{caption}".rstrip("_") for index, caption in enumerate(captions)]
    paths = [folder / f"{name}.png" for name in names]
    for path, picture in zip(paths, pictures, strict=True):
        atomic_write(path, _png(Image.fromarray(picture)))
    return paths


def contact_sheet(images: Images, contract: InputContract, path: Path, columns: int = 8, limit: int = 64) -> None:
    """Writes the first `limit` images as one PNG, `columns` side by side, each with its class below; small ones enlarged."""
    pictures = _pictures(images, contract, limit)
    factor = max(1, round(_CELL / max(contract.height, contract.width)))
    width, height = contract.width * factor, contract.height * factor
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    below = _GAP if images.labels is None else _CAPTION + _GAP
    sheet = Image.new("RGB", (columns * (width + _GAP) + _GAP, rows * (height + below) + _GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for index, (picture, caption) in enumerate(zip(pictures, _captions(images, len(pictures)), strict=True)):
        left = _GAP + index % columns * (width + _GAP)
        top = _GAP + index // columns * (height + below)
        sheet.paste(Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST), (left, top))
        draw.text((left + width // 2, top + height + 2), caption, fill="#444444", font=font, anchor="mt")
    atomic_write(path, _png(sheet))


def encode_png(inputs: Float[Tensor, "channels height width"], contract: InputContract) -> bytes:
    """One image as a PNG file of 8 bits, clamped to valid pixels; in colour, or grey from the first channel when there are not three."""
    return _png(Image.fromarray(_picture(inputs, contract)))


def thumbnails(
    inputs: Float[Tensor, "count channels height width"], contract: InputContract, limit: int = 16
) -> UInt8[np.ndarray, "shown height width 3"]:
    """The first `limit` images as the eye sees them, for a display; grey ones in three equal channels."""
    pictures = [_picture(one, contract) for one in inputs[:limit]]
    return np.stack([picture if picture.ndim == 3 else np.stack([picture] * 3, axis=-1) for picture in pictures])


def show_images(images: Images, contract: InputContract, folder: Path, *, limit: int | None) -> None:
    """The first `limit` images (None: all) as PNG and a contact sheet of the first 64, in the folder `images` below `folder`."""
    pictures = folder / "images"
    pictures.mkdir(exist_ok=True)
    save_pngs(images, contract, pictures, limit=limit)
    contact_sheet(images, contract, pictures / "contact_sheet.png")


def _pictures(images: Images, contract: InputContract, limit: int | None) -> list[UInt8[np.ndarray, "height width *rgb"]]:
    return [_picture(inputs, contract) for inputs in images.inputs[:limit]]


def _picture(inputs: Float[Tensor, "channels height width"], contract: InputContract) -> UInt8[np.ndarray, "height width *rgb"]:
    """An image as the eye sees it: in colour, or grey from the first channel when there are not three."""
    pixels = contract.denormalize(inputs.detach().cpu()).clamp(0, 1)
    levels = (pixels * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return np.ascontiguousarray(levels if contract.channels == 3 else levels[..., 0])


def _captions(images: Images, count: int) -> list[str]:
    return [""] * count if images.labels is None else [f"class {label}" for label in images.labels[:count].tolist()]


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "png")
    return buffer.getvalue()
