"""A run directory from somebody else: what its record says is checked, and code in it is not executed."""

import json

import pytest
import torch
from tests.cli.conftest import refused
from tests.models.test_weights import Touch

from reverie.recipes import read, tables

RECORD = {
    "reverie": "0.1.0",
    "identity": {"network": "0123"},
    "versions": {"torch": "2.13.0", "threads": 1},
    "earlier_versions": [],
    "facts": {"network": "embedded:digits", "options": {}},
    "stages": {"capture": {"seconds": 1.0}},
    "complete": True,
}
PUT_BACK = "put back the file that the run wrote"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Writes a run directory with this record."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "network.safetensors").write_bytes(b"")

    def write(**changed):
        (folder / "run.json").write_text(json.dumps(RECORD | changed))
        return folder

    return write


def test_a_python_file_that_came_with_a_run_is_not_executed(capsys, run, tmp_path):
    folder = run(facts={"network": "run/nets.py:net", "options": {}})
    (folder / "nets.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\ndef net(): ...\n")
    assert refused(capsys, "export", "run") == (
        "run: must name a network outside of this folder, got run/nets.py, which is code that would be executed; "
        "read it, and give --network run/nets.py:net if you trust it"
    )
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"facts": {"budget": {"minutes": 1.0, "factor": 1.0}}}, "facts.budget.steps must be there, got nothing"),
        ({"sha256": 5}, "sha256 must be a valid string, got 5"),
        ({"complete": "yes"}, "complete must be a valid boolean, got 'yes'"),
        ({"identity": []}, "identity must be an object, got []"),
        ({"stages": {"capture": {}}}, "stages.capture.seconds must be there, got nothing"),
        ({"facts": {}}, "facts: network must be there, got nothing"),
        ({"facts": {"network": 1, "options": {}}}, "facts: network must be a valid string, got 1"),
        ({"facts": {"network": "x", "options": {"mean": "0.5"}}}, "facts: options.mean must be a valid array, got '0.5'"),
        (
            {"facts": {"network": "x", "options": {}, "sha256": {"network.safetensors": 1}}},
            "facts.sha256.network.safetensors must be a valid string, got 1",
        ),
    ],
)
def test_a_record_of_another_structure_is_refused_with_the_place(capsys, run, changed, message):
    run(**changed)
    assert refused(capsys, "export", "run") == f"run/run.json: {message}; {PUT_BACK}"


REQUEST = {
    "command": "quantize",
    "line": "reverie quantize embedded:digits",
    "folder": "/",
    "network": "embedded:digits",
    "options": {},
    "recipe": {},
    "choice": None,
    "device": "cpu",
}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"command": "rm"}, "command must be 'quantize' or 'synthesize', got 'rm'"),
        ({"device": 3}, "device must be a valid string, got 3"),
        ({"log": "tensorboard"}, "log must be a valid array, got 'tensorboard'"),
        ({"choice": {"preset": "zeroq"}}, "choice.settings must be there, got nothing"),
        ({"options": {"weights": 1}}, "options.weights must be a valid string, got 1"),
    ],
)
def test_a_request_of_another_structure_is_refused_with_the_place(capsys, run, changed, message):
    run(complete=False, facts={"request": REQUEST | changed})
    assert refused(capsys, "resume", "run") == f"run/run.json: facts.request: {message}; {PUT_BACK}"


def test_a_python_file_that_came_with_an_interrupted_run_is_not_executed(capsys, run, tmp_path):
    asked = {"network": "run/nets.py:net", "folder": str(tmp_path), "recipe": tables(read("zeroq"))}
    folder = run(complete=False, facts={"request": REQUEST | asked})
    (folder / "nets.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\ndef net(): ...\n")
    assert refused(capsys, "resume", "run") == (
        f"{folder}: must name a network outside of this folder, got run/nets.py, which is code that would be executed; "
        "read it, and type the command that began the run if you trust it"
    )
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("command", ["export", "resume"])
def test_a_record_cannot_give_leave_to_execute_weights(capsys, run, tmp_path, command):
    mark, net, weights = tmp_path / "executed", tmp_path / "nets.py", tmp_path / "net.pt"
    net.write_text("from torch import nn\ndef net():\n    return nn.Sequential(nn.Flatten(), nn.Linear(4, 2))\n")
    torch.save({"weight": torch.zeros(1), "more": Touch(mark)}, weights)
    options = {"weights": str(weights), "execute_weights": True, "input_size": 2, "mean": [0.5], "std": [0.5], "classes": 2}
    asked = {"network": f"{net}:net", "options": options}
    request = REQUEST | asked | {"folder": str(tmp_path), "recipe": tables(read("zeroq"))}
    run(complete=command == "export", facts=asked | {"request": request})
    assert refused(capsys, command, "run").endswith("or let its code run with --execute-weights if you trust the file")
    # Nor say which code it is.
    assert refused(capsys, command, "run", "--execute-weights") == (
        "--execute-weights must come with --weights, got none: which code is executed is not for a run directory to say; name the file"
    )
    assert not mark.exists()
    typed = ("--weights", weights, "--execute-weights")
    assert "must be a state dict of tensors alone, got a NoneType at 'more'" in refused(capsys, command, "run", *typed)
    assert mark.exists()


def test_a_message_cannot_move_the_cursor(capsys, run):
    run(facts={"network": "\x1b[2J\u202e:x", "options": {}})
    assert "\\x1b[2J\\u202e" in refused(capsys, "export", "run")
