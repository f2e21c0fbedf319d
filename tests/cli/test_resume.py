"""A run that was interrupted goes on from its directory alone, to the same bytes, or says what changed."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.cli.conftest import SHAPE

from reverie import progress
from reverie.cli import main
from reverie.runs import RunDirectory, read_record, write_record

FILES = ("images.safetensors", "network.safetensors", "network.onnx")
QUICK = ["--images", "8", "--set", "held_out=4", "--set", "estimate_images=8", "--set", "synthesis.batch=4"]
QUICK += ["--set", "synthesis.steps=6", "--set", "reconstruction.iterations=4"]


def told(capsys) -> str:
    return capsys.readouterr().err.splitlines()[-1].removeprefix("reverie: ")


def refusal(capsys, *words) -> str:
    capsys.readouterr()
    assert main([str(word) for word in words]) == 1
    return told(capsys)


@pytest.fixture
def place(tmp_path, nets, weights, monkeypatch) -> Path:
    """A current folder with a network, its weights and two images in `real`."""
    (tmp_path / "real").mkdir()
    for name, shade in {"a.png": 30, "b.png": 200}.items():
        Image.fromarray(np.full((8, 8), shade, np.uint8)).save(tmp_path / "real" / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(output: str, *more: str) -> list[str]:
    names = ["quantize", "nets.py:normal", "--weights", "weights.safetensors", "--calibration", "real", *SHAPE]
    return [*names, "--weight-bits", "4", "--output", output, *QUICK, *more]


@pytest.fixture
def interrupt(monkeypatch):
    """Sends a signal in the middle of a stage."""

    def at(stage: str, step: int, number: int = signal.SIGINT) -> None:
        plain = progress.Lines.advance
        sent = []

        def advance(self, *arguments, **options):
            plain(self, *arguments, **options)
            if (self.name, self.done) == (stage, step) and not sent:
                sent.append(os.kill(os.getpid(), number))

        monkeypatch.setattr(progress.Lines, "advance", advance)

    return at


@pytest.fixture
def stopped(place, interrupt, capsys) -> Path:
    """A run that was stopped in its second batch of images."""
    interrupt("synthesize", 9)
    assert main(command("run")) == 130
    capsys.readouterr()
    return place / "run"


@pytest.mark.parametrize(
    ("stage", "step", "number", "status"),
    [
        ("synthesize", 9, signal.SIGINT, 130),
        ("round", 5, signal.SIGTERM, 143),
        ("round", 5, signal.SIGINT, 130),
        ("evaluate", 1, signal.SIGTERM, 143),
    ],
)
def test_a_signal_ends_the_step_and_says_how_to_go_on(place, interrupt, capsys, stage, step, number, status):
    assert main(command("whole")) == 0
    interrupt(stage, step, number)
    assert main(command("run")) == status
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == "reverie: stopped; go on with: reverie resume run"
    assert "stopping after this step; once more stops at once" in said
    assert not read_record(Path("run"))["complete"]
    # It was moved, and somebody works elsewhere.
    shutil.move("run", "moved")
    os.chdir("/")
    assert main(["resume", str(place / "moved")]) == 0
    assert "files: " in capsys.readouterr().out
    for file in FILES:
        assert (place / "moved" / file).read_bytes() == (place / "whole" / file).read_bytes(), file
    assert main(["resume", str(place / "moved")]) == 0
    assert capsys.readouterr().out == f"{place / 'moved'} is complete; there is nothing to resume\n"
    assert main(["resume", str(place / "moved"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((place / "moved" / "metrics.json").read_text())


def test_images_alone_are_resumed_too(place, interrupt, capsys):
    words = ["synthesize", "nets.py:normal", "--weights", "weights.safetensors", *SHAPE, *QUICK[:2], *QUICK[-6:-2]]
    words += ["--for", "imagefolder", "--output"]
    assert main([*words, "whole"]) == 0
    interrupt("synthesize", 9)
    assert main([*words, "run"]) == 130
    assert main(["resume", "run"]) == 0
    assert "for imagefolder: " in capsys.readouterr().out
    assert Path("run/images.safetensors").read_bytes() == Path("whole/images.safetensors").read_bytes()
    assert (place / "run/imagefolder").is_dir()


@pytest.mark.filterwarnings("ignore")
def test_a_resumed_run_is_logged_as_was_asked_for(place, interrupt):
    reader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed (extra 'tensorboard')"
    )
    interrupt("synthesize", 9)
    assert main(command("run", "--log", "tensorboard")) == 130
    assert main(["resume", "run"]) == 0
    events = reader.EventAccumulator("run/tensorboard").Reload()
    assert {"loss/synthesize", "loss/round"} <= set(events.Tags()["scalars"])
    metrics = json.loads(Path("run/metrics.json").read_text())
    assert events.Scalars("bytes/network")[0].value == metrics["bytes"]["network"]


def test_a_run_says_what_was_asked_for_and_which_images_were_read(stopped):
    facts = read_record(stopped)["facts"]
    asked = facts["request"]
    assert (asked["command"], asked["network"], asked["folder"]) == ("quantize", "nets.py:normal", str(stopped.parent))
    assert asked["options"] == {"weights": "weights.safetensors", "input_size": 8, "mean": [0.5], "std": [0.25], "classes": 3}
    assert (asked["calibration"], asked["unlabelled"], asked["evaluation"]) == (str(stopped.parent / "real"), None, None)
    assert facts["real_images"]["calibration"]["count"] == 2
    assert json.loads((stopped / "real_images.json").read_text())["calibration"]["sha256"].keys() == {"a.png", "b.png"}


def test_a_folder_of_images_that_is_gone_is_named(stopped, capsys):
    shutil.move(stopped.parent / "real", stopped.parent / "elsewhere")
    assert refusal(capsys, "resume", stopped) == (
        f"--calibration: {stopped.parent / 'real'}: must be a folder of images, an .npz or a .safetensors file, got no such path; "
        "check it"
    )


def test_images_that_changed_are_named(stopped, capsys):
    Image.fromarray(np.full((8, 8), 31, np.uint8)).save(stopped.parent / "real" / "a.png")
    assert re.fullmatch(
        rf"{re.escape(str(stopped))}: must be new or hold the same run, got one with calibration '\w{{16}}' instead of '\w{{16}}' "
        r"\(calibration: changed a\.png\); choose another --output, or delete the folder",
        refusal(capsys, "resume", stopped),
    )


def test_weights_that_changed_are_named(stopped, capsys):
    file = stopped.parent / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x3d")
    assert re.fullmatch(
        rf"{re.escape(str(stopped))}: must be new or hold the same run, got one with network '\w{{16}}' instead of '\w{{16}}'; choose "
        "another --output, or delete the folder",
        refusal(capsys, "resume", stopped),
    )


def test_versions_that_changed_are_refused_until_they_are_accepted(stopped, capsys):
    record = read_record(stopped)
    write_record(stopped, record | {"versions": record["versions"] | {"numpy": "1.0"}})
    expected = (
        f"must go on as it began, got numpy {np.__version__} instead of 1.0; go back to that (`reverie resume` takes the run's threads "
        "by itself), or add --accept-changes: it ends with other bytes than a run that was never interrupted"
    )
    assert refusal(capsys, "resume", stopped) == f"{stopped}: {expected}"
    assert refusal(capsys, *command("run")) == f"run: {expected}"
    assert main(["resume", str(stopped), "--accept-changes"]) == 0
    assert read_record(stopped)["earlier_versions"][0]["numpy"] == "1.0"


def test_the_runs_own_threads_are_used(stopped, capsys):
    torch.set_num_threads(2)
    try:
        assert "got threads 2 instead of 1; " in refusal(capsys, *command("run"))
        assert main(["resume", str(stopped)]) == 0
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(1)
    assert read_record(stopped)["earlier_versions"] == []


def test_a_run_that_python_code_began_is_not_for_the_command_line(tmp_path, capsys):
    RunDirectory.open(tmp_path, {"recipe": "a"}, facts={"request": None}).close()
    assert refusal(capsys, "resume", tmp_path) == (
        f"{tmp_path}: must be a run that a command line began, got one that Python code began; call the same function again with "
        "this output, it goes on"
    )


def test_a_folder_that_is_no_run_cannot_be_resumed(tmp_path, capsys):
    assert refusal(capsys, "resume", tmp_path) == (
        f"{tmp_path}: must be a run directory, got no run.json written by Reverie in it"
    )


def test_the_second_of_two_processes_is_refused(stopped, capsys):
    with RunDirectory.open(stopped, read_record(stopped)["identity"]):
        assert refusal(capsys, "resume", stopped) == (
            f"{stopped}: must be used by one process at a time, got another one working there; wait for it, or choose another --output"
        )


# Every byte and length of one is looked at in tests/test_checkpoints.py.
@pytest.mark.parametrize(
    ("name", "change"),
    [("checkpoints/images/images-0.safetensors", "flipped"), ("checkpoints/rounding/codes-0.safetensors", "cut off")],
)
def test_a_checkpoint_that_was_damaged_is_named_and_can_be_deleted(place, interrupt, capsys, name, change, monkeypatch):
    # Every part is kept, however little time it took.
    monkeypatch.setattr("reverie.attempt.SECONDS", 0.0)
    monkeypatch.setattr("reverie.attempt.SHARE", 1.0)
    assert main(command("whole")) == 0
    interrupt("synthesize" if "images" in name else "round", 9 if "images" in name else 6)
    assert main(command("run")) == 130
    file = place / "run" / name
    content = file.read_bytes()
    file.write_bytes(content[:-1] if change == "cut off" else content[:-1] + bytes([content[-1] ^ 1]))
    said = refusal(capsys, "resume", "run")
    assert said.startswith(f"{file}: must be a checkpoint that this run wrote, got a ")
    assert said.endswith("; delete it, what it held is made again")
    file.unlink()
    assert main(["resume", "run"]) == 0
    for made in FILES:
        assert (place / "run" / made).read_bytes() == (place / "whole" / made).read_bytes()


def test_images_that_were_damaged_are_named(place, interrupt, capsys):
    interrupt("round", 5)
    assert main(command("run")) == 130
    file = place / "run" / "images.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + bytes(4))
    assert refusal(capsys, "resume", "run").startswith(f"{file}: must be the file that the run wrote (sha256 ")


@pytest.mark.slow
def test_a_process_that_is_killed_again_and_again_ends_with_the_same_bytes(tmp_path):
    settings = ["images=24", "held_out=4", "estimate_images=8", "calibration_images=24", "synthesis.steps=12"]
    settings += [
        "synthesis.refine_steps=5",
        "distillation.steps=12",
        "distillation.synthetic=both",
        "reconstruction.iterations=8",
        "export.method=none",
    ]
    words = [sys.executable, "-m", "reverie", "quantize", "embedded:digits", "--recipe", "clusterq", "--json"]
    words += [word for setting in settings for word in ("--set", setting)]
    subprocess.run([*words, "--output", str(tmp_path / "whole")], check=True, capture_output=True)
    run = tmp_path / "run"
    for stage, share in (("synthesize", 0.5), ("distil", 0.6), ("round", 0.4)):
        again = [sys.executable, "-m", "reverie", "resume", str(run), "--json"]
        words_now = again if run.exists() else [*words, "--output", str(run)]
        with subprocess.Popen(words_now, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
            for line in process.stderr:
                event = json.loads(line)
                if event.get("stage") == stage and event["done"] >= share * event["total"] > 0:
                    process.send_signal(signal.SIGKILL)
                    break
        assert process.wait() == -signal.SIGKILL
        assert not read_record(run)["complete"]
    subprocess.run([sys.executable, "-m", "reverie", "resume", str(run)], check=True, capture_output=True)
    for file in FILES[:2]:
        assert (run / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
