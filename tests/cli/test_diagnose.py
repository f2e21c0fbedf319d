"""`reverie diagnose` on runs and networks; what it refuses is one whole line."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.cli.conftest import SHAPE, TINY, refused, said

from reverie import recipes
from reverie.images.store import save_images

FEW = ["--set", "images=8", "--set", "synthesis.steps=3"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_run_is_diagnosed_on_its_own_images(capsys, finished):
    shown = said(capsys, "diagnose", finished)
    lines = shown.splitlines()
    assert lines[0].startswith("KL from full precision ") and "of 8 images" in lines[0]
    assert lines[3].split() == ["tensor", "grid", "KL", "alone", "KL", "without", "SQNR", "dB", "clipped", "finding"]
    rows = lines[5 : lines.index(next(line for line in lines if line.startswith("... and ")))]
    assert len(rows) == 10
    alone = [float(row.split()[2]) for row in rows]
    assert alone == sorted(alone, reverse=True)
    assert max(map(len, lines)) <= 100


def test_all_shows_every_tensor(capsys, finished):
    known = json.loads(said(capsys, "diagnose", finished, "--json"))
    lines = said(capsys, "diagnose", finished, "--all").splitlines()
    assert {tuple(line.split()[:2]) for line in lines[5 : 5 + len(known["tensors"])]} == {
        (tensor["name"], f"{tensor['kind'][0].upper()}{tensor['bits']}") for tensor in known["tensors"]
    }
    assert "... and" not in "\n".join(lines)


def test_the_document_tells_each_tensor_and_what_was_measured_of_it(capsys, finished):
    known = json.loads(said(capsys, "diagnose", finished, "--json", "--images", "4"))
    assert (known["network"], known["run"], known["images"]) == ("embedded:digits", str(finished), 4)
    packed = load_file(finished / "network.safetensors")
    weights = [tensor for tensor in known["tensors"] if tensor["kind"] == "weight"]
    assert len(weights) == sum(name.endswith(".codes") and packed[name].dtype == torch.uint8 for name in packed)
    assert all(tensor["alone"] >= 0 and tensor["without"] >= 0 for tensor in known["tensors"])
    assert sorted(known["findings"], key=lambda finding: -finding["cost"]) == known["findings"]


def test_the_student_of_a_run_is_the_one_that_was_exported(capsys, finished):
    known = json.loads(said(capsys, "diagnose", finished, "--json", "--calibration", held_out(finished)))
    measured = json.loads((finished / "metrics.json").read_text())["divergence"]["evaluation"]["quantized"]
    # 64 of the 599 images that the run measured, and with tipped roundings.
    assert measured / 2 < known["divergence"] < measured * 2


def held_out(finished):
    import reverie

    path = finished.parent / "held-out.safetensors"
    save_images(reverie.load_network("embedded:digits").held_out(), path)
    return path


def test_a_run_of_mixed_precision_is_diagnosed_on_the_grids_it_chose(capsys):
    settings = [*TINY, "--recipe", "zeroq", "--activation-bits", "8", "--set", "bits.weights={_0_0=3}"]
    said(capsys, "quantize", "embedded:digits", "--effective-bits", "4", *settings, "--output", "mixed")
    chosen = json.loads(Path("mixed/metrics.json").read_text())["mixed_precision"]["tensors"]
    known = json.loads(said(capsys, "diagnose", "mixed", "--json"))["tensors"]
    bits = {(tensor["kind"], tensor["name"]): tensor["bits"] for tensor in chosen}
    assert {(tensor["kind"], tensor["name"]): tensor["bits"] for tensor in known} == bits
    assert len({count for (kind, _), count in bits.items() if kind == "weight"}) > 1


def test_fix_writes_a_recipe_that_quantize_takes(capsys, tmp_path):
    bad = ["--weight-bits", "8", "--activation-bits", "4", "--set", "activations.percentile=70"]
    shown = said(capsys, "diagnose", "embedded:digits", *bad, *FEW, "--fix", "--output", "mended.toml")
    lines = shown.splitlines()
    assert lines[0] == "recipe zeroq (chosen for 8-bit weights; --recipe overrides it)"
    assert lines[-2:] == ["wrote mended.toml", "next: reverie quantize embedded:digits --recipe mended.toml"]
    kept = [line for line in lines if line.endswith("  yes")]
    assert kept
    mended = recipes.read("mended.toml")
    assert mended.activations != recipes.read("zeroq", {"activations.percentile": 70.0}).activations
    assert mended.quantization.activation_bits == 4
    assert max(map(len, lines)) <= 100


@pytest.mark.slow
def test_fix_of_a_run_names_the_command_that_makes_the_improved_run(capsys, finished):
    found = json.loads(said(capsys, "diagnose", finished, "--fix", "--json", "--calibration", held_out(finished)))["fix"]
    assert found["images"] == 299
    assert [trial["remedy"] for trial in found["trials"]]
    for trial in found["trials"]:
        assert trial["kept"] == (trial["before"] - trial["after"] > trial["noise"])
    command = f"reverie quantize embedded:digits --recipe fixed.toml --output {finished}-fixed"
    assert found["next"] == (command if any(trial["kept"] for trial in found["trials"]) else None)


@pytest.mark.slow
def test_a_literature_run_is_diagnosed_with_its_adapted_batch_norms(capsys, tmp_path):
    command = [
        "quantize",
        "embedded:digits",
        "--placement",
        "literature",
        "--weight-bits",
        "3",
        "--activation-bits",
        "3",
        *TINY,
    ]
    adapted = ["--set", "quantization.batch_norm_adaptation=true", "--set", "rounding.method=nearest"]
    said(capsys, *command, *adapted, "--evaluate", "held-out", "--output", "run")
    everything = ["--calibration", held_out(tmp_path / "run"), "--images", "599"]
    known = json.loads(said(capsys, "diagnose", "run", "--json", *everything))
    measured = json.loads((tmp_path / "run" / "metrics.json").read_text())["divergence"]["evaluation"]["quantized"]
    assert known["divergence"] == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["nowhere"],
            "nowhere: must be a run directory or a network (SOURCE:NAME, or path/to/file.py:FACTORY), got neither; "
            "`reverie quantize` makes a run",
        ),
        (["."], ".: must be a run directory, got no run.json written by Reverie in it"),
        (
            ["embedded:digit"],
            "unknown embedded network 'digit'; choose one of digits, or did you mean 'digits'?",
        ),
        (["embedded:digits", "--images", "1"], "--images must be at least 2, got 1"),
        (
            ["embedded:digits", "--output", "fixed.toml"],
            "--output must come with --fix, got 'fixed.toml' alone; add --fix, or leave it out",
        ),
        (["embedded:digits", "--fix", "--output", "x.txt"], "x.txt: must end in .toml, got '.txt'; choose another --output"),
        (
            ["embedded:digits", "--fix", "--output", "no/x.toml"],
            "no/x.toml: must be in a folder that exists, got none; create it or choose another --output",
        ),
        (
            ["embedded:digits", "--set", "images=0"],
            "images must be at least 1 without --calibration, got 0; give --calibration with a folder of images",
        ),
        (
            ["embedded:digits", "--set", "bits.weights={nonsense=2}"],
            "bits.weights must name layers with weights, got 'nonsense'; such as '_0_0'",
        ),
        (
            ["embedded:digits", "--set", "mixed_precision.effective_bits=2", "--set", "bits.weights={_0_0=8}"],
            "mixed_precision.effective_bits must be at least 2.02 for this network (1 of 16 tensors have fixed bits), got 2; "
            "raise it, or let tensors have fewer bits",
        ),
        (
            ["embedded:digits", "--recipe", "fdda"],
            "embedded:digits: fdda needs real images, got none; give --calibration with a folder of images",
        ),
    ],
)
def test_what_cannot_be_diagnosed_is_refused(capsys, arguments, expected):
    assert refused(capsys, "diagnose", *arguments) == expected


def test_a_recipe_file_is_not_overwritten(capsys, tmp_path):
    (tmp_path / "fixed.toml").write_text("mine")
    expected = "fixed.toml: must not exist yet, got a file; choose another --output"
    assert refused(capsys, "diagnose", "embedded:digits", "--fix") == expected
    assert (tmp_path / "fixed.toml").read_text() == "mine"


def test_a_run_keeps_its_own_recipe(capsys, finished):
    expected = f"{finished}: --weight-bits must be left out for a run, whose own recipe counts; give the network instead"
    assert refused(capsys, "diagnose", finished, "--weight-bits", "8") == expected


def test_a_run_without_images_is_refused(capsys, finished):
    (finished / "images.safetensors").rename(finished / "aside")
    try:
        expected = f"{finished}: must hold images.safetensors, got none; give --calibration with a folder of images"
        assert refused(capsys, "diagnose", finished) == expected
    finally:
        (finished / "aside").rename(finished / "images.safetensors")


def test_a_network_without_batch_norms_is_refused(capsys, nets, weights):
    network = f"{nets}:plain"
    tensors = load_file(weights)
    from safetensors.torch import save_file

    save_file(
        {key.replace("5.", "4."): tensors[key] for key in ("0.weight", "0.bias", "5.weight", "5.bias")}, "plain.safetensors"
    )
    expected = f"{network}: zeroq needs a batch norm, got none in the network; give --calibration with a folder of images"
    assert refused(capsys, "diagnose", network, *SHAPE, "--weights", "plain.safetensors") == expected
