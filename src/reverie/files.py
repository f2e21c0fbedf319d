"""A file or a folder appears whole or not at all: it is written aside, flushed to the disk and renamed over the old one."""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from reverie.errors import ConfigError

_OUT_OF_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# What a process that was killed may leave of a file that it wrote aside.
ASIDE = ".*.partial*"


def atomic_write(path: Path, data: bytes | Callable[[Path], object], *, beside: Sequence[str] = ()) -> None:
    """Makes `path` hold `data`, whole; whatever happens, it holds either that or what it held before.

    Args:
        path: Its folder must exist.
        data: The content, or a function that writes it to the path it is given (which has the suffix of `path`).
        beside: Suffixes of files that `data` writes next to the one it is given and that belong to it. Then `path` is gone
            while they take their places, so that it never stands beside those of another.

    Raises:
        ConfigError: No space left, or `path` cannot be written.
    """
    aside = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    # A name without a suffix would lose `.partial` to `with_suffix`.
    written = [aside, *(aside.with_suffix(suffix) for suffix in beside)]
    try:
        if isinstance(data, bytes):
            aside.write_bytes(data)
        else:
            data(aside)
        for file in written:
            _flush(file)
        if beside:
            path.unlink(missing_ok=True)
        for suffix in beside:
            aside.with_suffix(suffix).replace(path.with_suffix(suffix))
        aside.replace(path)
        _flush(path.parent)
    except Exception as error:
        if out_of_space(error):
            size = _size_text(len(data)) if isinstance(data, bytes) else "it"
            raise ConfigError(
                f"{path}: no space left to write {size}; free some space and run the same command again, it resumes"
            ) from error
        if isinstance(error, OSError) and error.filename in (str(aside), str(path)):
            raise ConfigError(f"{path}: must be writable, got {error.strerror!r}; choose another place") from error
        raise
    finally:
        for file in written:
            with suppress(OSError):
                file.unlink()


def atomic_folder(path: Path, fill: Callable[[Path], object]) -> None:
    """Makes `path` the folder that `fill` writes, whole or not at all.

    Args:
        path: New, or an empty folder; the folders above it are made.
        fill: Is given an empty folder beside `path`, which becomes `path` once everything in it is on the disk.

    Raises:
        ConfigError: `path` holds something, no space is left, or it cannot be written.
    """
    check_new_folder(path)
    # "." has no name to put another beside.
    path = path.absolute()
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        aside.mkdir(parents=True)
        fill(aside)
        for entry in sorted(aside.rglob("*")):
            _flush(entry)
        _flush(aside)
        aside.replace(path)
        _flush(path.parent)
    except Exception as error:
        if out_of_space(error):
            raise ConfigError(f"{path}: no space left to write it; free some space and run the same command again") from error
        if isinstance(error, OSError) and error.filename in (str(aside), str(path)):
            raise ConfigError(f"{path}: must be writable, got {error.strerror!r}; choose another place") from error
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def atomic_text(path: Path, text: str) -> None:
    """Makes `path` hold `text` in UTF-8, whole or not at all."""
    atomic_write(path, text.encode())


def atomic_json(path: Path, value: object) -> None:
    """Makes `path` hold `value` as JSON, keys in their own order.

    Raises:
        ConfigError: No space left, or `path` cannot be written.
        ValueError: `value` holds NaN or an infinity, which JSON cannot.
    """
    atomic_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_new_folder(path: Path) -> None:
    """Refuses a place where `atomic_folder` cannot write; writes nothing.

    Raises:
        ConfigError: `path` is a file, holds anything, or cannot be written.
    """
    check_place(path)
    if path.is_dir() and any(path.iterdir()):
        raise ConfigError(f"{path}: must be new or empty, got files in it; choose another --output, or delete the folder")


def check_place(path: Path) -> None:
    """Refuses a place where no folder can be made or written to; writes nothing."""
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{path}: must be a folder, got a file; choose another --output")
    nearest = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    if not os.access(nearest, os.W_OK):
        raise ConfigError(f"{path}: must be writable, got no permission to write in {nearest}; choose another --output")


def _flush(path: Path) -> None:
    """Waits until `path`, a file or a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def out_of_space(error: Exception) -> bool:
    """Whether this is what a full disk, a quota or a limit on the size of files makes of writing."""
    # safetensors, being written in Rust, raises an error type of its own with the number in the text.
    number = re.search(r"\(os error (\d+)\)", str(error))
    return (int(number[1]) if number else getattr(error, "errno", None)) in _OUT_OF_SPACE


def _size_text(size: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} bytes"
