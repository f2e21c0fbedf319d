"""A run is a directory that can be killed at any moment, resumed, and moved to another machine.

    RUN/run.json      what ran, on what, which stages are done and how long they took; hashes of itself and of the files
    RUN/checkpoints/  what an interrupted stage needs to go on; gone when the run is complete
    RUN/.lock         held while a process works here

What is read again is compared with the hash that was recorded when it was written.

Not here: what the stages do, and in which order (`pipeline.py`). Locks are `flock` locks: POSIX systems only, and not
between machines that share a network file system without lock support.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from reverie import received
from reverie.environment import changes, environment
from reverie.errors import ConfigError, at
from reverie.files import ASIDE, atomic_json, check_place, file_hash
from reverie.records import PUT_BACK, Record


def read_record(path: Path) -> dict[str, Any]:
    """What `run.json` in the run directory `path` says.

    Raises:
        ConfigError: `path` is not a run directory of ours, or its record has not the structure of one, or was changed by something else.
    """
    record = _parsed(path)
    if record is None:
        raise ConfigError(f"{path}: must be a run directory, got no run.json written by Reverie in it")
    with at(str(path / "run.json")):
        received.check_structure(record, Record, PUT_BACK)
    found = _record_hash(record)
    if record.get("sha256") not in (None, found):
        raise ConfigError(
            f"{path / 'run.json'}: must be the record that the run wrote (sha256 {record['sha256'][:12]}), got a changed one "
            f"({found[:12]}); put that record back, or start again with a new --output"
        )
    return record


def _parsed(path: Path) -> dict[str, Any] | None:
    """What `run.json` in `path` holds, as it is; None if there is none, or none of ours."""
    try:
        record: dict[str, Any] = received.parse_json(received.read_bytes(path / "run.json"), dict[str, Any], PUT_BACK)
    except ConfigError:
        return None
    return record if "reverie" in record else None


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Makes `record`, with its own hash, the `run.json` in the run directory `path`."""
    atomic_json(path / "run.json", {**record, "sha256": _record_hash(record)})


def _record_hash(record: Mapping[str, Any]) -> str:
    """SHA-256 of all of the record but its hash."""
    rest = {key: value for key, value in record.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def check_hash(run: Path, file: Path, record: Mapping[str, Any] | None = None) -> None:
    """Refuses a file in the run directory `run` that is not the one which the run recorded, if it recorded one.

    Args:
        record: What `run.json` says, where it is known.

    Raises:
        ConfigError: It was changed, or is incomplete.
    """
    recorded = (record or read_record(run))["facts"].get("sha256", {}).get(file.relative_to(run).as_posix())
    found = file_hash(file)
    if recorded not in (None, found):
        raise ConfigError(
            f"{file}: must be the file that the run wrote (sha256 {recorded[:12]}), got a changed or incomplete one "
            f"({found[:12]}); put that file back, or run `reverie quantize` again with a new --output"
        )


def seal(run: Path, *files: Path) -> None:
    """Records the hashes of files that were added to the run directory `run`, or written anew there."""
    with RunDirectory.open(run, read_record(run)["identity"]) as directory:
        directory.seal(*files)


def default_output(network: str, weight_bits: int | float, activation_bits: int | float) -> Path:
    """Where a run goes that was told nothing: `runs/embedded-digits-w4a8`, `runs/nets-resnet20-w2.5a8`, `runs/resnet20-w8a8`."""
    if network.rpartition(":")[0].endswith(".py"):
        network = Path(network).name.replace(".py:", "-")
    if network.endswith(".onnx"):
        network = Path(network.removeprefix("onnx:")).stem
    words = re.sub(r"[^A-Za-z0-9._]+", "-", network).strip("-.")
    return Path("runs") / f"{words}-w{weight_bits:g}a{activation_bits:g}"


def check_output(
    path: Path, identity: dict[str, str] | None = None, explain: Callable[[list[str]], list[str]] | None = None
) -> None:
    """Refuses a place that no run can be written to; writes nothing.

    Args:
        identity: As much as is known of what the run to come is identified by.
        explain: As for `RunDirectory.open`.

    Raises:
        ConfigError: `path` is a file, holds something else than a run or another run, or cannot be written.
    """
    check_place(path)
    if (path / "run.json").exists() and _parsed(path) is None:
        raise ConfigError(
            f"{path / 'run.json'}: must be a record that Reverie wrote, got a damaged or foreign file; put it back, or choose another "
            "--output"
        )
    if path.is_dir() and _is_foreign(path):
        raise ConfigError(f"{path}: must be empty or hold a run, got other files in it; choose another --output")
    if identity is not None and (path / "run.json").exists():
        _check_identity(path, read_record(path)["identity"], identity, set(identity), explain)


class RunDirectory:
    """One run on disk, locked for this process until `close`; also a context manager.

    Every change to `record` is on the disk when the method that made it returns.

    Args:
        path: The directory. Nothing inside refers to it by name, so it can be moved.
        record: The content of `run.json`.
        lock: Descriptor of the locked file.
        is_new: Nobody finished a stage here before this process.
    """

    def __init__(self, path: Path, record: dict[str, Any], lock: int, *, is_new: bool) -> None:
        self.path = path
        self.record = record
        self.is_new = is_new
        self._lock = lock

    @classmethod
    def open(
        cls,
        path: Path,
        identity: dict[str, str],
        *,
        facts: Mapping[str, Any] | None = None,
        accept_changes: bool = False,
        explain: Callable[[list[str]], list[str]] | None = None,
    ) -> "RunDirectory":
        """The run in `path`, new or resumed.

        Args:
            path: A new or empty folder, or one that holds the same run.
            identity: What makes two runs the same, such as the recipe's hash and the network's fingerprint.
            facts: What a new run notes with its very first file, such as what is needed to ask for it once more.
            accept_changes: Go on in another environment (versions, threads) than the one that the run began in.
            explain: More on what changed, given the parts of `identity` that did; stands behind their hashes.

        Raises:
            ConfigError: `path` is a file, holds something else or another run, cannot be written, or is in use; or the
                environment changed.
        """
        # Before anything is written, so that a folder of someone else's stays untouched.
        check_output(path)
        lock = _locked(path)
        try:
            known = (path / "run.json").exists()
            record = _resumed(path, identity, accept_changes, explain) if known else _new_record(identity, facts or {})
            for leftover in list(path.rglob(ASIDE)):
                if leftover.is_dir():
                    shutil.rmtree(leftover)
                else:
                    leftover.unlink(missing_ok=True)
            if record["complete"]:
                _delete_checkpoints(path)
            # Not only a record: the first file written shows at once whether the folder can be written.
            write_record(path, record)
            if not record["complete"]:
                (path / "checkpoints").mkdir(exist_ok=True)
        except BaseException:
            os.close(lock)
            raise
        return cls(path, record, lock, is_new=not record["stages"])

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

    def finish(self, stage: str, seconds: float, *files: Path) -> None:
        """Records that `stage` is done and took `seconds` in this process, on top of what it took in earlier ones.

        Args:
            files: What it wrote; recorded as by `seal`.
        """
        before = self.record["stages"].get(stage, {"seconds": 0.0})["seconds"]
        self.record["stages"][stage] = {"seconds": round(before + seconds, 3)}
        self.seal(*files)

    def seal(self, *files: Path) -> None:
        """Records the hashes of files of this run, by which `sealed` knows them again."""
        hashes = {file.relative_to(self.path).as_posix(): file_hash(file) for file in files}
        if hashes:
            self.record["facts"]["sha256"] = self.record["facts"].get("sha256", {}) | hashes
        self._save()

    def sealed(self, file: Path) -> bool:
        """Whether `file` is there and is the one whose hash was recorded; one that was written but not recorded is not.

        Raises:
            ConfigError: Another hash was recorded.
        """
        if not file.is_file() or file.relative_to(self.path).as_posix() not in self.record["facts"].get("sha256", {}):
            return False
        check_hash(self.path, file, self.record)
        return True

    def note(self, **facts: Any) -> None:
        """Records facts that JSON can hold, such as the seed or the source of every image."""
        self.record["facts"].update(facts)
        self._save()

    def checkpoint(self, name: str) -> Path:
        """Where an interrupted stage keeps `name`; its folder exists, the file perhaps."""
        return self.path / "checkpoints" / name

    @property
    def fingerprint(self) -> str:
        """What tells this run's checkpoints from those of another."""
        return hashlib.sha256(json.dumps(self.record["identity"], sort_keys=True).encode()).hexdigest()[:16]

    def complete(self) -> None:
        """Records that every stage is done, and deletes the checkpoints, which nothing needs now."""
        # In this order: a run that is killed in between is complete and has leftovers, which `open` deletes.
        self.record["complete"] = True
        gone = {name for name in self.record["facts"].get("sha256", {}) if name.startswith("checkpoints/")}
        for name in gone:
            del self.record["facts"]["sha256"][name]
        self._save()
        _delete_checkpoints(self.path)

    def _save(self) -> None:
        # A folder of the same name may have taken this one's place.
        try:
            here = os.path.samestat(os.fstat(self._lock), (self.path / ".lock").stat())
        except FileNotFoundError:
            here = False
        if not here:
            raise ConfigError(
                f"{self.path}: must stay in its place while a process works there, got it deleted, moved or unmounted; put it "
                "back and use `reverie resume`"
            )
        write_record(self.path, self.record)


def _delete_checkpoints(path: Path) -> None:
    if (path / "checkpoints").exists():
        shutil.rmtree(path / "checkpoints")


def _new_record(identity: dict[str, str], facts: Mapping[str, Any]) -> dict[str, Any]:
    versions = environment()
    return {
        "reverie": versions["reverie"],
        "identity": identity,
        "versions": versions,
        "earlier_versions": [],
        "facts": dict(facts),
        "stages": {},
        "complete": False,
    }


def _resumed(
    path: Path, identity: dict[str, str], accept_changes: bool, explain: Callable[[list[str]], list[str]] | None
) -> dict[str, Any]:
    record = read_record(path)
    _check_identity(path, record["identity"], identity, {*record["identity"], *identity}, explain)
    here, there = environment(), record["versions"]
    # What is complete is only read.
    if here != there and not record["complete"]:
        found = changes(there, here)
        if found and not accept_changes:
            raise ConfigError(
                f"{path}: must go on as it began, got {', '.join(found)}; go back to that (`reverie resume` takes the run's threads "
                "by itself), or add --accept-changes: it ends with other bytes than a run that was never interrupted"
            )
        record["earlier_versions"].append(there)
        record["versions"] = here
    return record


def _check_identity(
    path: Path,
    there: dict[str, str],
    here: dict[str, str],
    parts: set[str],
    explain: Callable[[list[str]], list[str]] | None,
) -> None:
    different = [part for part in {**there, **here} if part in parts and there.get(part) != here.get(part)]
    if different:
        told = ", ".join(f"{part} {there.get(part)!r} instead of {here.get(part)!r}" for part in different)
        more = [] if explain is None else explain(different)
        behind = f" ({'; '.join(more)})" if more else ""
        raise ConfigError(
            f"{path}: must be new or hold the same run, got one with {told}{behind}; choose another --output, or delete the folder"
        )


def _is_foreign(path: Path) -> bool:
    """Whether `path` holds files and is not a run. A run that was killed before its first file leaves only our own traces."""
    traces = {".lock"} | {aside.name for aside in path.glob(ASIDE)}
    return _parsed(path) is None and any(entry.name not in traces for entry in path.iterdir())


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
