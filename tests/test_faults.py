"""What the machine may do to a run: no space, no folder, no permission to write, a clock that jumps."""

import errno
import os
import shutil
import subprocess
import time
from itertools import count

import pytest

from reverie.errors import ConfigError
from reverie.pipeline import run
from reverie.progress import Silent
from reverie.recipes import read

QUICK = {"images": 16, "held_out": 8, "estimate_images": 8, "synthesis.steps": 6, "synthesis.batch": 8}
FILES = ("images.safetensors", "network.safetensors", "network.onnx")


@pytest.fixture(autouse=True)
def every_part_is_kept(monkeypatch):
    """However little time it took."""
    monkeypatch.setattr("reverie.attempt.SECONDS", 0.0)
    monkeypatch.setattr("reverie.attempt.SHARE", 1.0)


@pytest.fixture
def recipe():
    return read("adaround", QUICK | {"reconstruction.iterations": 4})


@pytest.fixture
def whole(tiny_cnn, recipe, tmp_path):
    """The bytes of an undisturbed run."""
    done = run(recipe, tiny_cnn(), output=tmp_path / "whole").path
    return {file: (done / file).read_bytes() for file in FILES}


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, of 200 kB, and what changes it; only where this process may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "reverie-test", place], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"needs the right to mount a file system: {made.stderr.strip()}")

    def change(options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", place], check=True)

    yield place, change
    subprocess.run(["umount", "-l", place], check=False, capture_output=True)


class Stopped(Exception):
    pass


class Doing(Silent):
    """Does something once, after so many steps."""

    def __init__(self, after, action):
        self.left, self.action = after, action

    def advance(self, amount=1, note="", *, skipped=False):
        self.left -= 1
        if self.left == 0:
            self.action()


def contents(path):
    return {file: (path / file).read_bytes() for file in FILES}


@pytest.mark.slow
def test_a_disk_that_is_full_from_any_write_on_is_one_line_and_the_run_goes_on_to_the_same_bytes(
    tiny_cnn, recipe, whole, tmp_path, monkeypatch
):
    output = tmp_path / "run"
    for last in (0, 3, 9, 16, 23, 30, 41):
        calls, real = count(), os.fsync

        def full(descriptor, calls=calls, last=last, real=real):
            if next(calls) >= last:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(descriptor)

        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", full)
            with pytest.raises(
                ConfigError, match=r": no space left to write .*; free some space and run the same command again"
            ):
                run(recipe, tiny_cnn(), output=output)
        assert not list(output.rglob("*.partial*"))
    assert contents(run(recipe, tiny_cnn(), output=output).path) == whole


def test_a_real_full_disk_is_one_line_and_the_run_goes_on_to_the_same_bytes(tiny_cnn, recipe, whole, small_disk):
    place, change = small_disk
    with pytest.raises(ConfigError, match=r": no space left.*; free some space"):
        run(recipe, tiny_cnn(), output=place / "run")
    assert not list(place.rglob("*.partial*")) and not (place / "run/metrics.json").exists()
    change("size=50m")
    assert contents(run(recipe, tiny_cnn(), output=place / "run").path) == whole


def test_a_read_only_disk_is_one_line_and_the_run_goes_on_to_the_same_bytes(tiny_cnn, recipe, whole, small_disk):
    place, change = small_disk
    change("size=50m")

    def stop():
        raise Stopped

    with pytest.raises(Stopped):
        run(recipe, tiny_cnn(), output=place / "run", progress=Doing(14, stop))
    change("ro")
    with pytest.raises(ConfigError) as caught:
        run(recipe, tiny_cnn(), output=place / "run")
    assert (
        str(caught.value)
        == f"{place / 'run'}: must be writable, got no permission to write in {place / 'run'}; choose another --output"
    )
    with pytest.raises(ConfigError) as caught:
        run(recipe, tiny_cnn(), output=place / "other")
    assert (
        str(caught.value)
        == f"{place / 'other'}: must be writable, got no permission to write in {place}; choose another --output"
    )
    change("rw")
    assert contents(run(recipe, tiny_cnn(), output=place / "run").path) == whole


def test_a_disk_that_is_taken_away_is_one_line_and_nothing_is_written_in_its_place(tiny_cnn, recipe, small_disk):
    place, change = small_disk
    change("size=50m")

    def unmount():
        subprocess.run(["umount", "-l", place], check=True)

    with pytest.raises(ConfigError, match=r"^/.*: must be "):
        run(recipe, tiny_cnn(), output=place / "run", progress=Doing(8, unmount))
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("after", [3, 14, 22])
def test_a_folder_that_is_deleted_under_a_run_ends_it_and_stays_deleted(tiny_cnn, recipe, tmp_path, after):
    output = tmp_path / "run"
    with pytest.raises(ConfigError) as caught:
        run(recipe, tiny_cnn(), output=output, progress=Doing(after, lambda: shutil.rmtree(output)))
    assert str(caught.value).startswith(str(output)) and ": must be " in str(caught.value)
    assert not output.exists()


def test_a_clock_that_jumps_changes_nothing(tiny_cnn, recipe, whole, tmp_path, monkeypatch):
    jumps = count()

    def jumping() -> float:
        return 1e9 + (-1) ** next(jumps) * 1e8

    monkeypatch.setattr(time, "time", jumping)
    monkeypatch.setattr(time, "time_ns", lambda: int(jumping() * 1e9))
    done = run(recipe, tiny_cnn(), output=tmp_path / "run")
    assert contents(done.path) == whole
    assert all(0 <= seconds < 100 for seconds in done.metrics["seconds"].values())
