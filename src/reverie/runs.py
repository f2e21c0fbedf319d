"""A run is a directory that can be killed at any moment, resumed, and moved to another machine.

    RUN/run.json      what ran, on what, which stages are done and how long they took
    RUN/checkpoints/  what an interrupted stage needs to go on; gone when the run is complete
    RUN/.lock         held while a process works here

A file appears whole or not at all: it is written aside, flushed to the disk and renamed over the old one.

Not here: what the stages do, and in which order (`pipeline.py`). Locks are `flock` locks: POSIX systems only, and not
between machines that share a network file system without lock support.
"""

import errno
import fcntl
import json
import os
import platform
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from reverie.errors import ConfigError

_LIBRARIES = ("reverie", "torch", "numpy", "safetensors", "onnx", "onnxruntime", "openvino")
_OUT_OF_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_ASIDE = ".*.partial*"


def atomic_write(path: Path, data: bytes | Callable[[Path], object]) -> None:
    """Makes `path` hold `data`, whole; whatever happens, it holds either that or what it held before.

    Args:
        path: Its folder must exist.
        data: The content, or a function that writes it to the path it is given (which has the suffix of `path`).

    Raises:
        ConfigError: No space left, or `path` cannot be written.
    """
    aside = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        if isinstance(data, bytes):
            aside.write_bytes(data)
        else:
            data(aside)
        _flush(aside)
        aside.replace(path)
        _flush(path.parent)
    except Exception as error:
        if _out_of_space(error):
            size = _size_text(len(data)) if isinstance(data, bytes) else "it"
            raise ConfigError(
                f"{path}: no space left to write {size}; free some space and run the same command again, it resumes"
            ) from error
        if isinstance(error, OSError) and error.filename in (str(aside), str(path)):
            raise ConfigError(f"{path}: must be writable, got {error.strerror!r}; choose another place") from error
        raise
    finally:
        with suppress(OSError):
            aside.unlink()


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


def read_record(path: Path) -> dict[str, Any]:
    """What `run.json` in the run directory `path` says.

    Raises:
        ConfigError: `path` is not a run directory of ours.
    """
    try:
        record = json.loads((path / "run.json").read_bytes())
    except (OSError, ValueError):
        record = None
    if not isinstance(record, dict) or "reverie" not in record:
        raise ConfigError(f"{path}: must be a run directory, got no run.json written by Reverie in it")
    return record


def default_output(network: str, weight_bits: int | float, activation_bits: int | float) -> Path:
    """Where a run goes that was told nothing: `runs/embedded-digits-w4a8`, `runs/nets-resnet20-w2.5a8`."""
    if network.rpartition(":")[0].endswith(".py"):
        network = Path(network).name.replace(".py:", "-")
    words = re.sub(r"[^A-Za-z0-9._]+", "-", network).strip("-.")
    return Path("runs") / f"{words}-w{weight_bits:g}a{activation_bits:g}"


def check_output(path: Path, identity: dict[str, str] | None = None) -> None:
    """Refuses a place that no run can be written to; writes nothing.

    Args:
        identity: As much as is known of what the run to come is identified by.

    Raises:
        ConfigError: `path` is a file, holds something else than a run or another run, or cannot be written.
    """
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{path}: must be a folder, got a file; choose another --output")
    if path.is_dir() and _is_foreign(path):
        raise ConfigError(f"{path}: must be empty or hold a run, got other files in it; choose another --output")
    nearest = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    if not os.access(nearest, os.W_OK):
        raise ConfigError(f"{path}: must be writable, got no permission to write in {nearest}; choose another --output")
    if identity is not None and (path / "run.json").exists():
        _check_identity(path, read_record(path)["identity"], identity, set(identity))


class RunDirectory:
    """One run on disk, locked for this process until `close`; also a context manager.

    Every change to `record` is on the disk when the method that made it returns.

    Args:
        path: The directory. Nothing inside refers to it by name, so it can be moved.
        record: The content of `run.json`.
        lock: Descriptor of the locked file.
    """

    def __init__(self, path: Path, record: dict[str, Any], lock: int) -> None:
        self.path = path
        self.record = record
        self._lock = lock

    @classmethod
    def open(cls, path: Path, identity: dict[str, str]) -> "RunDirectory":
        """The run in `path`, new or resumed.

        Args:
            path: A new or empty folder, or one that holds the same run.
            identity: What makes two runs the same, such as the recipe's hash and the network's fingerprint.

        Raises:
            ConfigError: `path` is a file, holds something else or another run, cannot be written, or is in use.
        """
        # Before anything is written, so that a folder of someone else's stays untouched.
        check_output(path)
        lock = _locked(path)
        try:
            record = _resumed(path, identity) if (path / "run.json").exists() else _new_record(identity)
            for leftover in path.rglob(_ASIDE):
                leftover.unlink()
            if record["complete"]:
                _delete_checkpoints(path)
            # Not only a record: the first file written shows at once whether the folder can be written.
            atomic_json(path / "run.json", record)
        except BaseException:
            os.close(lock)
            raise
        return cls(path, record, lock)

    def close(self) -> None:
        """Lets other processes work here."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    @property
    def is_complete(self) -> bool:
        """Whether `complete` was called, in this process or an earlier one."""
        return bool(self.record["complete"])

    def done(self, stage: str) -> bool:
        """Whether `stage` was finished, in this process or an earlier one."""
        return stage in self.record["stages"]

    def finish(self, stage: str, seconds: float) -> None:
        """Records that `stage` is done and took `seconds` in this process, on top of what it took in earlier ones."""
        before = self.record["stages"].get(stage, {"seconds": 0.0})["seconds"]
        self.record["stages"][stage] = {"seconds": round(before + seconds, 3)}
        self._save()

    def note(self, **facts: Any) -> None:
        """Records facts that JSON can hold, such as the seed or the source of every image."""
        self.record["facts"].update(facts)
        self._save()

    def checkpoint(self, name: str) -> Path:
        """Where an interrupted stage keeps `name`; its folder exists, the file perhaps."""
        path = self.path / "checkpoints" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def complete(self) -> None:
        """Records that every stage is done, and deletes the checkpoints, which nothing needs now."""
        # In this order: a run that is killed in between is complete and has leftovers, which `open` deletes.
        self.record["complete"] = True
        self._save()
        _delete_checkpoints(self.path)

    def _save(self) -> None:
        atomic_json(self.path / "run.json", self.record)


def _delete_checkpoints(path: Path) -> None:
    if (path / "checkpoints").exists():
        shutil.rmtree(path / "checkpoints")


def environment() -> dict[str, str | int]:
    """Versions, platform and thread count: what, besides recipe, network and seed, decides the bytes of a result."""
    found: dict[str, str | int] = {"python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return found | {"platform": platform.platform(), "threads": torch.get_num_threads()}


def _new_record(identity: dict[str, str]) -> dict[str, Any]:
    versions = environment()
    return {
        "reverie": versions["reverie"],
        "identity": identity,
        "versions": versions,
        "earlier_versions": [],
        "facts": {},
        "stages": {},
        "complete": False,
    }


def _resumed(path: Path, identity: dict[str, str]) -> dict[str, Any]:
    record = read_record(path)
    _check_identity(path, record["identity"], identity, {*record["identity"], *identity})
    versions = environment()
    if versions != record["versions"]:
        record["earlier_versions"].append(record["versions"])
        record["versions"] = versions
    return record


def _check_identity(path: Path, there: dict[str, str], here: dict[str, str], parts: set[str]) -> None:
    different = [part for part in {**there, **here} if part in parts and there.get(part) != here.get(part)]
    if different:
        told = ", ".join(f"{part} {there.get(part)!r} instead of {here.get(part)!r}" for part in different)
        raise ConfigError(
            f"{path}: must be new or hold the same run, got one with {told}; choose another --output, or delete the folder"
        )


def _is_foreign(path: Path) -> bool:
    """Whether `path` holds files and is not a run. A run that was killed before its first file leaves only our own traces."""
    traces = {".lock"} | {aside.name for aside in path.glob(_ASIDE)}
    if all(entry.name in traces for entry in path.iterdir()):
        return False
    try:
        read_record(path)
    except ConfigError:
        return True
    return False


def _locked(path: Path) -> int:
    """Descriptor of the lock of the run in `path`; the system lets go of it when the process ends, however it ends."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ConfigError(f"{path}: must be writable, got {error.strerror!r}; choose another --output") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise ConfigError(
            f"{path}: must be used by one process at a time, got another one working there; wait for it, "
            "or choose another --output"
        ) from error
    return lock


def _flush(path: Path) -> None:
    """Waits until `path`, a file or a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _out_of_space(error: Exception) -> bool:
    # safetensors, being written in Rust, raises an error type of its own with the number in the text.
    number = re.search(r"\(os error (\d+)\)", str(error))
    return (int(number[1]) if number else getattr(error, "errno", None)) in _OUT_OF_SPACE


def _size_text(size: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} bytes"
