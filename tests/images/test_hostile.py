"""Folders and arrays from somebody else: nothing hangs, blows up, runs or leaves its folder."""

import io
import os
import pickle
import struct
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from reverie import received
from reverie.errors import ConfigError
from reverie.images.folder import read_folder
from reverie.models import InputContract

GREY = InputContract(channels=1, height=4, width=4, mean=(0.5,), std=(0.5,))


def read(path, classes=3):
    return read_folder(path, GREY, classes, require_labels=False)


def refusal(path):
    began = time.perf_counter()
    with pytest.raises(ConfigError) as caught:
        read(path)
    assert time.perf_counter() - began < 2
    return str(caught.value).removeprefix(f"{path}: ")


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(*more, size=(4, 4)):
    """A grey picture whose header says `size`, with chunks behind the header."""
    head = chunk(b"IHDR", struct.pack(">II", *size) + b"\x08\0\0\0\0")
    pixels = chunk(b"IDAT", zlib.compress(bytes(20)))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + pixels + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(8192, 8193), (9000, 9000), (20000, 20000), (2**31 - 1, 2**31 - 1)])
def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path, size):
    (tmp_path / "a.png").write_bytes(png(size=size))
    (tmp_path / "b.png").write_bytes(png())
    assert refusal(tmp_path) == "images must have at most 67108864 pixels, got more in 1: a.png; make them smaller"


def test_the_largest_picture_is_a_limit_that_is_reached(tmp_path, monkeypatch):
    monkeypatch.setattr(received, "MOST_PIXELS", 16)
    (tmp_path / "a.png").write_bytes(png())
    assert len(read(tmp_path)) == 1


def test_what_pillow_says_of_an_animation_is_nobodys_concern(tmp_path):
    # It warns, which is an error in tests, that the animation is none; the picture is whole.
    (tmp_path / "a.png").write_bytes(png(chunk(b"acTL", bytes(8))))
    assert len(read(tmp_path)) == 1


@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP"])
def test_text_and_profiles_that_blow_up_are_refused(tmp_path, kind):
    (tmp_path / "a.png").write_bytes(png(chunk(kind, b"name\0\0" + zlib.compress(bytes(PngImagePlugin.MAX_TEXT_CHUNK + 1)))))
    assert refusal(tmp_path) == "all images must be readable, got 1 unreadable: a.png; remove them"


def test_a_picture_is_decoded_only_as_what_its_suffix_may_be(tmp_path, monkeypatch):
    # Pillow hands PostScript to a program of its own, whatever the file is called.
    def run(*_, **__):
        raise AssertionError("PostScript was executed")

    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", run)
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n%%EOF\n")
    with Image.open(tmp_path / "a.png") as image:
        assert image.format == "EPS"
    assert refusal(tmp_path) == "all images must be readable, got 1 unreadable: a.png; remove them"


def test_what_is_no_file_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    os.mkfifo(tmp_path / "b.png")
    (tmp_path / "c.png").symlink_to("nowhere")
    (tmp_path / "d.png").symlink_to("/dev/zero")
    (tmp_path / "e.png").mkdir()
    assert refusal(tmp_path) == "all images must be readable, got 3 unreadable: b.png, c.png, d.png; remove them"


@pytest.mark.parametrize("name", ["a.npz", "a.safetensors"])
def test_a_pipe_in_place_of_a_file_does_not_keep_us_waiting(tmp_path, name):
    os.mkfifo(tmp_path / name)
    assert refusal(tmp_path / name) == "must be a file, got a pipe; check the path"


def test_a_name_that_is_no_text_is_refused(tmp_path):
    (tmp_path / os.fsdecode(b"\xff.png")).write_bytes(png())
    assert refusal(tmp_path) == r"images must have names in UTF-8, got '\\xff.png'; rename them"


def test_a_name_with_markup_or_a_newline_is_a_name(tmp_path):
    names = ("a\nb.png", "<script>.png")
    for name in names:
        (tmp_path / name).write_bytes(png())
    assert set(read(tmp_path).sources) == set(names)


@pytest.mark.parametrize("name", ["../secret.png", "{folder}/secret.png"])
def test_a_table_cannot_name_pictures_elsewhere(tmp_path, name):
    (tmp_path / "secret.png").write_bytes(png())
    pictures, name = tmp_path / "pictures", name.format(folder=tmp_path)
    pictures.mkdir()
    (pictures / "labels.csv").write_text(f"file,label\n{name},0\n")
    assert refusal(pictures) == f"labels.csv: row 2: an image must lie in the folder itself, got {name!r}; move it there"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            b"file,label\n\xff,0\n",
            "labels.csv: must be CSV in UTF-8, got \"'utf-8' codec can't decode byte 0xff in position 11: ",
        ),
        (
            b"file,label\na.png," + b"9" * 5000,
            "labels.csv: row 2 must have a 'file' and a whole 'label', got file 'a.png' and label '999",
        ),
        (
            b'file,label\n"' + b"x" * 200_000,
            "labels.csv: must be CSV in UTF-8, got 'field larger than field limit (131072)'; save it again",
        ),
    ],
)
def test_a_damaged_table_is_refused(tmp_path, text, message):
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "labels.csv").write_bytes(text)
    assert refusal(tmp_path).startswith(message)


def archived(path, header, body=b"", version=b"\1\0"):
    """An `.npz` whose `images` have this very header."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images.npy", b"\x93NUMPY" + version + len(header).to_bytes(2, "little") + header + body)
    return path


def declared(shape, descr="'|u1'"):
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()


def test_an_array_that_says_more_than_it_holds_is_refused_before_it_is_made(tmp_path):
    path = archived(tmp_path / "a.npz", declared((10**9, 64, 64, 1)), bytes(64))
    assert refusal(path).startswith(
        "must be a readable .npz file without pickled objects, got 'images.npy of shape (1000000000, 64, 64, 1) and "
    )


@pytest.mark.parametrize(
    "header",
    [
        b"(" * 5000,
        b"{'descr': '|u1",
        b"__import__('os').getcwd()",
        declared((-1, 4, 4, 1)),
        declared((4,), "'nonsense'"),
        b"\xff",
    ],
)
def test_a_header_that_is_none_is_refused(tmp_path, header):
    assert refusal(archived(tmp_path / "a.npz", header)).startswith(
        "must be a readable .npz file without pickled objects, got "
    )


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickled_objects_are_refused_and_not_executed(tmp_path):
    mark, stream = tmp_path / "executed", io.BytesIO()
    np.lib.format.write_array(stream, np.array([Touch(mark)], dtype=object), allow_pickle=True)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("images.npy", stream.getvalue())
    assert refusal(tmp_path / "a.npz") == "must be a readable .npz file without pickled objects, got 'objects in images.npy'"
    assert not mark.exists()
    # The same bytes would have been executed by a reader that lets objects through.
    pickle.loads(pickle.dumps(Touch(mark)))
    assert mark.exists()


def test_arrays_that_blow_up_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(received, "FREE_BYTES", 1 << 16)
    np.savez_compressed(tmp_path / "a.npz", images=np.zeros((100, 64, 64, 1), np.uint8))
    assert "is it a decompression bomb?" in refusal(tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", images=np.zeros((100, 64, 64, 1), np.uint8))
    assert len(read(tmp_path / "a.npz")) == 100
