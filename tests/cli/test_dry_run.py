"""Before a run: what it would do and take, and what it chooses by itself; nothing is written."""

import json
import re

import numpy as np
import pytest
import torch
from tests.cli.conftest import SHAPE, TINY, said

from reverie.cli import main


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def refused(capsys, *arguments):
    """The message of a command that ends with status 1; what was chosen may have been told before."""
    assert main([str(argument) for argument in arguments]) == 1
    return capsys.readouterr().err.splitlines()[-1].removeprefix("reverie: ")


def test_a_network_alone_is_enough_and_what_is_chosen_is_told(capsys, tmp_path):
    lines = said(capsys, "quantize", "embedded:digits", "--dry-run").splitlines()
    assert lines[:4] == [
        "recipe zeroq (chosen for 8-bit weights; --recipe overrides it); output runs/embedded-digits-w8a8 "
        "(named after network and bits; --output overrides it)",
        "bits: W8A8, 8 in the first and last layer (the recipe's; --weight-bits and --activation-bits override them)",
        "images: 64 by zeroq, no real ones (--calibration adds some)",
        "accuracy: estimated, as no labelled images were given (--evaluate held-out measures it)",
    ]
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_tells_stages_steps_time_and_memory(capsys, tmp_path):
    lines = said(
        capsys, "quantize", "embedded:digits", "--weight-bits", "4", *TINY, "--set", "reconstruction.iterations=7", "--dry-run"
    ).splitlines()
    rows = [re.split(r"  +", line) for line in lines[lines.index("") + 3 :]]
    rows = rows[: rows.index([""])]
    told = {row[1]: row[2] for row in rows}
    # Batches of 32 and 3 steps: one for the images, one for those held out.
    assert told["8 images and 4 held out by zeroq"] == "6"
    assert told["32 images to estimate the drop on"] == "40"
    assert told["16 units rounded"] == f"{16 * 7}"
    assert rows[0][0] == "capture"
    assert {row[-1] for row in rows} == {"steps timed here", "single images timed here", "a guess"}
    assert [line.partition(":")[0] for line in lines[-4:-1]] == ["time", "memory", "output"]
    assert lines[-1] == "nothing was written; the same command without --dry-run runs it"
    assert lines[-2] == "output: runs/embedded-digits-w4a8, new"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "recipe", "told"),
    [
        (["--effective-bits", "4"], "adaround", "W4A8 on average, chosen tensor by tensor for weights"),
        (
            ["--effective-activation-bits", "4"],
            "zeroq",
            "W8A4 on average, chosen tensor by tensor for activations, 8 in the first and last layer",
        ),
        (
            ["--set", "mixed_precision.bit_operations=16"],
            "adaround",
            "at most 16 bit operations for a multiplication, on average, chosen tensor by tensor for weights and activations",
        ),
    ],
)
def test_bits_that_are_chosen_are_told_as_such(capsys, options, recipe, told):
    quick = ["--set", "synthesis.steps=2", "--set", "mixed_precision.images=2", "--set", "estimate_images=0"]
    lines = said(capsys, "quantize", "embedded:digits", *options, *quick, "--images", "4", "--dry-run").splitlines()
    assert lines[0].startswith(f"recipe {recipe} (chosen for ")
    assert lines[1] == f"bits: {told}"


def test_what_best_chose_is_in_the_document_too(capsys):
    asked = ["quantize", "embedded:digits", "--recipe", "best", "--images", "4", "--set", "synthesis.steps=2", "--dry-run"]
    told = [line.removeprefix("best: ") for line in said(capsys, *asked).splitlines() if line.startswith("best: ")]
    choice = json.loads(said(capsys, *asked, "--json"))["choice"]
    assert choice == {"preset": "zeroq", "reasons": told} and told[-1].startswith("images: 4 by zeroq in 2 steps ")


@pytest.mark.parametrize("option", ["--effective-bits", "--effective-activation-bits"])
def test_no_mean_is_no_number_of_bits(capsys, option):
    told = refused(capsys, "quantize", "embedded:digits", option, "0", "--dry-run")
    assert told == f"{option} must be 2 to 8, got 0; leave it out for bits that are not chosen"


def test_a_class_term_wants_labels_of_real_images_at_once(capsys, tmp_path):
    np.savez(tmp_path / "real.npz", images=np.zeros((4, 8, 8, 1), dtype=np.uint8))
    taught = ["--set", "distillation.steps=2", "--set", "distillation.class_weight=0.5", "--calibration", "real.npz"]
    told = refused(capsys, "quantize", "embedded:digits", *taught, "--dry-run")
    assert told.startswith("--calibration: real.npz: ") and "labels" in told


@pytest.mark.slow
def test_a_dry_run_knows_the_run_that_is_there(capsys, finished, tmp_path):
    command = ["quantize", "embedded:digits", "--weight-bits", "4", "--evaluate", "held-out", "--output", finished, *TINY]
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    lines = said(capsys, *command, "--set", "reconstruction.iterations=2", "--dry-run").splitlines()
    assert lines[-2] == f"output: {finished} holds this run, complete: it would be shown at once"
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before
    # Other settings are another run, which is not to go there.
    assert refused(capsys, *command, "--dry-run").startswith(
        f"{finished}: must be new or hold the same run, got one with recipe "
    )


@pytest.mark.slow
def test_a_budget_is_fitted_in_advance(capsys):
    document = json.loads(
        said(capsys, "quantize", "embedded:digits", "--weight-bits", "4", "--budget", "0.2", "--dry-run", "--json")
    )
    assert 0 < document["budget"]["factor"] < 1
    learned = sum(part["seconds"] for part in document["parts"] if part["known"] == "timed" and "estimate" not in part["work"])
    capture = document["parts"][0]["seconds"]
    # Twelve seconds, but for the rounding of steps.
    assert learned - capture == pytest.approx(12, rel=0.1)


@pytest.mark.parametrize("command", [["quantize"], ["synthesize", "--output", "out"]])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            ["--set", "synthesis.method=noise", "--device", "abacus"],
            "device must be one that PyTorch can use here, got 'abacus'; use 'cpu'",
        ),
        (["--set", "synthesis.step=1"], "did you mean 'steps'?"),
    ],
)
def test_a_dry_run_refuses_what_a_run_would(capsys, tmp_path, command, options, expected):
    if torch.accelerator.current_accelerator() is not None and "--device" in options:
        pytest.skip("another device is here")
    assert refused(capsys, *command, "embedded:digits", *options, "--dry-run").endswith(expected)
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_refuses_bits_that_the_graph_does_not_have(capsys, tmp_path):
    told = refused(capsys, "quantize", "embedded:digits", "--set", "bits.weights={nowhere=4}", "--dry-run")
    assert told.startswith("bits.weights must name ")
    assert list(tmp_path.iterdir()) == []


def test_a_network_without_batch_norm_is_refused_before_anything_is_timed(capsys, nets):
    told = refused(capsys, "quantize", f"{nets}:plain", *SHAPE, "--dry-run")
    assert told.startswith(f"{nets}:plain: zeroq needs a batch norm with running statistics, got none in the network; ")
