import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from reverie.checkpoints import Folder
from reverie.environment import environment
from reverie.errors import ConfigError
from reverie.files import atomic_folder, atomic_json, atomic_text, atomic_write, file_hash
from reverie.runs import RunDirectory, check_hash, read_record, seal, write_record

IDENTITY = {"recipe": "aaaa", "network": "bbbb"}


@pytest.fixture
def full_disk(monkeypatch):
    def fsync(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.fixture
def small_files():
    """No file may grow beyond 64 kB, which to a writer looks like a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def refusal(path, identity=IDENTITY) -> str:
    with pytest.raises(ConfigError) as caught:
        RunDirectory.open(path, identity)
    return str(caught.value)


def test_a_file_is_whole_whenever_it_is_looked_at_and_when_its_writer_is_killed(tmp_path):
    script = """
import sys
from pathlib import Path
from reverie.files import atomic_write
for number in range(1_000_000):
    atomic_write(Path(sys.argv[1]), bytes([number % 256]) * 500_000)
    if number == 0:
        print("started", flush=True)
"""
    path = tmp_path / "file"
    with subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE) as writer:
        assert writer.stdout.readline() == b"started\n"
        seen = [path.read_bytes() for _ in range(200)]
        writer.send_signal(signal.SIGKILL)
    for content in [*seen, path.read_bytes()]:
        assert content == content[:1] * 500_000
    assert len(set(seen)) > 1


def test_the_old_file_survives_a_kill_in_the_middle_of_writing(tmp_path):
    script = """
import os, signal, sys
from pathlib import Path
from reverie.files import atomic_write
def write(aside):
    aside.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
atomic_write(Path(sys.argv[1]), write)
"""
    path = tmp_path / "file"
    path.write_text("old")
    assert subprocess.run([sys.executable, "-c", script, str(path)]).returncode == -signal.SIGKILL
    assert path.read_text() == "old"


def test_a_writer_gets_a_path_with_the_same_suffix_in_the_same_folder(tmp_path):
    seen = []
    atomic_write(tmp_path / "a.onnx", lambda aside: (seen.append(aside), aside.write_text("x")))
    assert (seen[0].suffix, seen[0].parent) == (".onnx", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.onnx"]


def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "a").write_text("old")

    def crash(aside):
        aside.write_text("half")
        raise KeyError("boom")

    with pytest.raises(KeyError):
        atomic_write(tmp_path / "a", crash)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "old")]


@pytest.mark.parametrize(
    ("size", "text"), [(12, "12 bytes"), (4_560, "4.6 kB"), (12_345_678, "12.3 MB")], ids=["bytes", "kB", "MB"]
)
def test_a_full_disk_is_one_line_and_leaves_the_old_file(tmp_path, full_disk, size, text):
    path = tmp_path / "images.safetensors"
    path.write_text("old")
    with pytest.raises(ConfigError) as caught:
        atomic_write(path, bytes(size))
    assert str(caught.value) == (
        f"{path}: no space left to write {text}; free some space and run the same command again, it resumes"
    )
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("images.safetensors", "old")]


@pytest.mark.parametrize("writer", ["python", "safetensors"])
def test_a_writer_that_runs_out_of_space_is_one_line_and_leaves_the_old_file(tmp_path, small_files, writer):
    path = tmp_path / "network.safetensors"
    path.write_text("old")

    def write(aside):
        if writer == "python":
            aside.write_bytes(bytes(100_000))
        else:
            save_file({"weight": torch.zeros(100_000)}, aside)

    with pytest.raises(ConfigError) as caught:
        atomic_write(path, write)
    assert str(caught.value) == (
        f"{path}: no space left to write it; free some space and run the same command again, it resumes"
    )
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("network.safetensors", "old")]


def test_a_file_in_a_folder_that_is_not_there_is_refused(tmp_path):
    path = tmp_path / "gone" / "file"
    with pytest.raises(ConfigError) as caught:
        atomic_write(path, b"x")
    assert str(caught.value) == f"{path}: must be writable, got 'No such file or directory'; choose another place"


def test_an_error_about_another_file_is_not_hidden(tmp_path):
    with pytest.raises(FileNotFoundError):
        atomic_write(tmp_path / "a", lambda aside: (tmp_path / "other").read_bytes())


def test_json_keeps_its_order_and_refuses_nan(tmp_path):
    path = tmp_path / "a.json"
    atomic_json(path, {"b": 1, "a": ["é"]})
    assert path.read_text(encoding="utf-8") == '{\n  "b": 1,\n  "a": [\n    "é"\n  ]\n}\n'
    with pytest.raises(ValueError, match=r"^Out of range float values are not JSON compliant"):
        atomic_json(path, {"accuracy": float("nan")})
    atomic_text(path, "é\n")
    assert path.read_bytes() == "é\n".encode()


def test_a_resumed_run_knows_what_is_done(tmp_path):
    with RunDirectory.open(tmp_path / "run", IDENTITY) as run:
        run.note(seed=7)
        run.finish("synthesize", 12.34567)
    with RunDirectory.open(tmp_path / "run", IDENTITY) as run:
        assert run.done("synthesize")
        assert not run.done("quantize")
        assert not run.is_complete
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["stages"] == {"synthesize": {"seconds": 12.346}}
    assert record["facts"] == {"seed": 7}
    assert record["identity"] == IDENTITY
    assert record["versions"]["torch"] == torch.__version__
    assert record["versions"] == environment()


def test_a_run_that_is_killed_can_be_resumed_at_once(tmp_path):
    script = """
import os, signal, sys
from pathlib import Path
from reverie.runs import RunDirectory
run = RunDirectory.open(Path(sys.argv[1]), {"recipe": "aaaa", "network": "bbbb"})
run.finish("synthesize", 1.0)
run.checkpoint("half").write_text("half")
(run.path / ".images.1.partial.safetensors").write_text("half")
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path)]).returncode == -signal.SIGKILL
    with RunDirectory.open(tmp_path, IDENTITY) as run:
        assert run.done("synthesize")
        assert run.checkpoint("half").read_text() == "half"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "checkpoints", "run.json"]


def test_a_run_that_was_killed_before_its_first_file_can_be_opened(tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / ".run.99.partial.json").touch()
    RunDirectory.open(tmp_path, IDENTITY).close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "checkpoints", "run.json"]


def test_a_complete_run_has_no_checkpoints(tmp_path):
    with RunDirectory.open(tmp_path, IDENTITY) as run:
        run.checkpoint("half").write_text("half")
        run.complete()
    assert not (tmp_path / "checkpoints").exists()
    with RunDirectory.open(tmp_path, IDENTITY) as run:
        assert run.is_complete


def test_a_run_can_be_moved(tmp_path):
    with RunDirectory.open(tmp_path / "here", IDENTITY) as run:
        run.finish("synthesize", 1.0)
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert str(tmp_path) not in (tmp_path / "there" / "run.json").read_text()
    with RunDirectory.open(tmp_path / "there", IDENTITY) as run:
        assert run.done("synthesize")


@pytest.fixture
def begun_elsewhere(tmp_path):
    """A run that began with another torch, on more threads, without OpenVINO, on an older kernel; and how it began."""
    RunDirectory.open(tmp_path, IDENTITY).close()
    record = read_record(tmp_path)
    before = record["versions"] | {"torch": "1.0", "threads": 64, "platform": "Linux-1.0"}
    before.pop("openvino", None)
    write_record(tmp_path, record | {"versions": before})
    return before


def test_a_run_does_not_go_on_with_other_versions_or_threads_unless_told_to(tmp_path, begun_elsewhere):
    here = environment()
    added = f", openvino {here['openvino']} instead of none" if "openvino" in here else ""
    for _ in range(2):
        assert refusal(tmp_path) == (
            f"{tmp_path}: must go on as it began, got torch {here['torch']} instead of 1.0, threads {here['threads']} instead of "
            f"64{added}; go back to that (`reverie resume` takes the run's threads by itself), or add --accept-changes: it ends with "
            "other bytes than a run that was never interrupted"
        )
    for _ in range(2):
        RunDirectory.open(tmp_path, IDENTITY, accept_changes=True).close()
    assert read_record(tmp_path)["earlier_versions"] == [begun_elsewhere]
    assert read_record(tmp_path)["versions"] == here
    RunDirectory.open(tmp_path, IDENTITY).close()


def test_another_kernel_of_the_system_is_noted_and_not_refused(tmp_path):
    RunDirectory.open(tmp_path, IDENTITY).close()
    record = read_record(tmp_path)
    write_record(tmp_path, record | {"versions": record["versions"] | {"platform": "Linux-1.0"}})
    RunDirectory.open(tmp_path, IDENTITY).close()
    assert [versions["platform"] for versions in read_record(tmp_path)["earlier_versions"]] == ["Linux-1.0"]


def test_a_complete_run_can_be_read_with_any_versions(tmp_path, begun_elsewhere):
    write_record(tmp_path, read_record(tmp_path) | {"complete": True})
    with RunDirectory.open(tmp_path, IDENTITY) as run:
        assert run.is_complete
    assert read_record(tmp_path)["versions"] == begun_elsewhere


def test_what_a_new_run_notes_is_in_its_first_file(tmp_path):
    RunDirectory.open(tmp_path, IDENTITY, facts={"request": {"network": "n"}}).close()
    RunDirectory.open(tmp_path, IDENTITY, facts={"request": {"network": "other"}}).close()
    assert read_record(tmp_path)["facts"] == {"request": {"network": "n"}}


def test_more_on_what_changed_stands_behind_the_hashes(tmp_path):
    RunDirectory.open(tmp_path, IDENTITY).close()
    with pytest.raises(ConfigError) as caught:
        RunDirectory.open(tmp_path, IDENTITY | {"network": "c"}, explain=lambda parts: [f"look at {parts}", "there"])
    assert str(caught.value) == (
        f"{tmp_path}: must be new or hold the same run, got one with network 'bbbb' instead of 'c' (look at ['network']; there); choose "
        "another --output, or delete the folder"
    )


@pytest.mark.parametrize("change", ["flipped", "stage added"])
def test_a_record_that_was_changed_is_named(tmp_path, change):
    with RunDirectory.open(tmp_path, IDENTITY) as run:
        run.finish("synthesize", 1.0)
    file = tmp_path / "run.json"
    before = json.loads(file.read_text())["sha256"]
    text = file.read_text()
    file.write_text(text.replace('"aaaa"', '"aaba"') if change == "flipped" else text.replace('"synthesize": {', '"export": {'))
    told = refusal(tmp_path, IDENTITY)
    assert re.fullmatch(
        rf"{re.escape(str(file))}: must be the record that the run wrote \(sha256 {before[:12]}\), got a changed one "
        r"\([0-9a-f]{12}\); put that record back, or start again with a new --output",
        told,
    )


@pytest.mark.parametrize("change", ["cut off", "flipped", "foreign"])
def test_a_file_that_was_changed_since_it_was_recorded_is_named(tmp_path, change):
    file = tmp_path / "images.safetensors"
    with RunDirectory.open(tmp_path, IDENTITY) as run:
        assert not run.sealed(file)
        file.write_bytes(bytes(range(200)))
        # Written, and killed before that was recorded.
        assert not run.sealed(file)
        run.finish("images", 1.0, file)
        assert run.sealed(file)
    before, content = file_hash(file), file.read_bytes()
    bad = {"cut off": content[:-1], "flipped": bytes([content[0] ^ 1]) + content[1:], "foreign": b"another file"}[change]
    file.write_bytes(bad)
    with RunDirectory.open(tmp_path, IDENTITY) as run:
        with pytest.raises(ConfigError) as caught:
            run.sealed(file)
        assert str(caught.value) == (
            f"{file}: must be the file that the run wrote (sha256 {before[:12]}), got a changed or incomplete one "
            f"({file_hash(file)[:12]}); put that file back, or run `reverie quantize` again with a new --output"
        )
        file.unlink()
        assert not run.sealed(file)


def test_a_file_that_is_added_to_a_complete_run_is_recorded(tmp_path):
    with RunDirectory.open(tmp_path, IDENTITY) as run:
        run.complete()
    (tmp_path / "network.xml").write_text("x")
    seal(tmp_path, tmp_path / "network.xml")
    (tmp_path / "network.xml").write_text("y")
    with pytest.raises(ConfigError, match=r"network\.xml: must be the file that the run wrote "):
        check_hash(tmp_path, tmp_path / "network.xml")


@pytest.mark.parametrize("how", ["deleted", "moved", "another run there"])
def test_a_folder_that_vanishes_under_a_run_stops_it_and_is_not_made_anew(tmp_path, how):
    path = tmp_path / "run"
    run = RunDirectory.open(path, IDENTITY)
    if how == "moved":
        path.rename(tmp_path / "elsewhere")
    else:
        shutil.rmtree(path)
    if how == "another run there":
        RunDirectory.open(path, {"recipe": "other"}).close()
    with pytest.raises(ConfigError) as caught:
        run.finish("synthesize", 1.0)
    assert str(caught.value) == (
        f"{path}: must stay in its place while a process works there, got it deleted, moved or unmounted; put it back and use "
        "`reverie resume`"
    )
    if how == "another run there":
        assert read_record(path)["identity"] == {"recipe": "other"}
    else:
        with pytest.raises(ConfigError):
            Folder(run.checkpoint("images")).save("part", {"a": torch.zeros(1)})
        assert not path.exists()


@pytest.mark.parametrize("content", ["notes", "other run.json", "broken run.json"])
def test_a_folder_of_someone_else_is_refused_and_stays_untouched(tmp_path, content):
    name = "notes.txt" if content == "notes" else "run.json"
    (tmp_path / name).write_text("{}" if content == "other run.json" else "{")
    expected = {
        "notes.txt": f"{tmp_path}: must be empty or hold a run, got other files in it; choose another --output",
        "run.json": f"{tmp_path / 'run.json'}: must be a record that Reverie wrote, got a damaged or foreign file; put it back, or "
        "choose another --output",
    }
    assert refusal(tmp_path) == expected[name]
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    assert refusal(tmp_path / "file") == f"{tmp_path / 'file'}: must be a folder, got a file; choose another --output"


def test_a_place_where_no_folder_can_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "run"
    assert refusal(path) == f"{path}: must be writable, got 'Not a directory'; choose another --output"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_write_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    assert refusal(tmp_path) == f"{tmp_path}: must be writable, got 'Permission denied'; choose another --output"


def test_a_full_disk_is_noticed_before_anything_runs(tmp_path, full_disk):
    assert refusal(tmp_path / "run").startswith(f"{tmp_path / 'run' / 'run.json'}: no space left to write ")


@pytest.mark.parametrize(
    ("identity", "parts"),
    [
        ({"recipe": "cccc", "network": "bbbb"}, "recipe 'aaaa' instead of 'cccc'"),
        ({"recipe": "cccc", "network": "dddd"}, "recipe 'aaaa' instead of 'cccc', network 'bbbb' instead of 'dddd'"),
        ({"recipe": "aaaa"}, "network 'bbbb' instead of None"),
    ],
)
def test_another_run_is_refused_and_named(tmp_path, identity, parts):
    RunDirectory.open(tmp_path, IDENTITY).close()
    assert refusal(tmp_path, identity) == (
        f"{tmp_path}: must be new or hold the same run, got one with {parts}; choose another --output, or delete the folder"
    )
    RunDirectory.open(tmp_path, IDENTITY).close()


def test_two_processes_never_work_on_one_run(tmp_path):
    script = """
import sys
from pathlib import Path
from reverie.runs import RunDirectory
run = RunDirectory.open(Path(sys.argv[1]), {"recipe": "aaaa", "network": "bbbb"})
print("open", flush=True)
sys.stdin.read()
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"open\n"
        assert refusal(tmp_path) == (
            f"{tmp_path}: must be used by one process at a time, got another one working there; wait for it, "
            "or choose another --output"
        )
    RunDirectory.open(tmp_path, IDENTITY).close()


def test_a_folder_without_a_run_has_no_record(tmp_path):
    with pytest.raises(ConfigError) as caught:
        read_record(tmp_path)
    assert str(caught.value) == f"{tmp_path}: must be a run directory, got no run.json written by Reverie in it"


def test_files_that_belong_together_appear_together_or_not_at_all(tmp_path):
    path = tmp_path / "network.xml"

    def write(aside, text, *, fail=False):
        aside.write_text(text)
        aside.with_suffix(".bin").write_text(text)
        if fail:
            raise RuntimeError("in between")

    atomic_write(path, lambda aside: write(aside, "first"), beside=(".bin",))
    assert [file.read_text() for file in sorted(tmp_path.iterdir())] == ["first", "first"]
    with pytest.raises(RuntimeError, match="in between"):
        atomic_write(path, lambda aside: write(aside, "second", fail=True), beside=(".bin",))
    assert [file.read_text() for file in sorted(tmp_path.iterdir())] == ["first", "first"]
    atomic_write(path, lambda aside: write(aside, "third"), beside=(".bin",))
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"network.bin": "third", "network.xml": "third"}


def test_a_folder_is_whole_or_not_there(tmp_path):
    def fill(folder):
        (folder / "a").mkdir()
        (folder / "a" / "b.txt").write_text("b")
        assert not path.exists()

    path = tmp_path / "new" / "folder"
    atomic_folder(path, fill)
    assert (path / "a" / "b.txt").read_text() == "b"
    assert [entry.name for entry in path.parent.iterdir()] == ["folder"]


def test_an_empty_folder_may_be_there_already(tmp_path):
    (tmp_path / "folder").mkdir()
    atomic_folder(tmp_path / "folder", lambda folder: (folder / "a").write_text("a"))
    assert (tmp_path / "folder" / "a").read_text() == "a"


def test_the_folder_that_one_is_in_may_be_filled(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path / "folder")
    atomic_folder(Path(), lambda folder: (folder / "a").write_text("a"))
    assert (tmp_path / "folder" / "a").read_text() == "a"


def test_a_folder_for_which_there_is_no_space_is_not_there(tmp_path, full_disk):
    with pytest.raises(ConfigError) as caught:
        atomic_folder(tmp_path / "folder", lambda folder: (folder / "a").write_text("a"))
    assert str(caught.value) == (
        f"{tmp_path / 'folder'}: no space left to write it; free some space and run the same command again"
    )
    assert list(tmp_path.iterdir()) == []
