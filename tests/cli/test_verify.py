"""`reverie verify` and `reverie benchmark` on a finished run, and what they say when a file of it was changed."""

import importlib
import json
import shutil

import numpy as np
import onnx
import pytest

from reverie import runtimes
from reverie.cli import main
from reverie.errors import ConfigError, ExportError
from reverie.export._certificate import attached
from reverie.export._metadata import content_hash
from reverie.files import file_hash
from reverie.report.measure import sizes


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run that may be changed."""
    path = tmp_path / "run"
    shutil.copytree(finished, path)
    return path


def refused(capsys, *arguments):
    assert main([str(argument) for argument in arguments]) == 1
    return capsys.readouterr().err.removeprefix("reverie: ").rstrip("\n")


def change_weights(path, change):
    model = onnx.load(path)
    tensor = next(tensor for tensor in reversed(model.graph.initializer) if tensor.name.endswith("weight_scale"))
    values = onnx.numpy_helper.to_array(tensor)
    tensor.CopyFrom(onnx.numpy_helper.from_array(change(values), tensor.name))
    onnx.save(model, path)


def test_a_run_holds_a_certificate_that_names_what_it_is_about(finished):
    issued = attached(finished / "network.onnx")
    metrics = json.loads((finished / "metrics.json").read_text())
    assert issued == metrics["certificate"]
    assert issued["runtime"] == "onnxruntime"
    assert issued["runtimes"].keys() == runtimes.installed(".onnx").keys()
    assert issued["sha256"]["checkpoint"] == file_hash(finished / "network.safetensors")
    assert issued["sha256"]["content"] == content_hash(finished / "network.onnx")
    proof = issued["runtimes"]["onnxruntime"]
    assert proof["failure"] is None
    assert proof["float_layers"] == []
    assert proof["max_code_difference"] <= 1
    assert all(found == [0, 0.0] for found in proof["codes"].values())
    reference = issued["reference"]
    assert (reference["runtime"], reference["images"], reference["float_layers"]) == ("onnxruntime", proof["images"], [])
    assert (reference["max_code_difference"], reference["differing_share"], reference["top1_agreement"]) == (0, 0.0, 1.0)
    recorded = json.loads((finished / "run.json").read_text())["facts"]["sha256"]
    names = ("network.safetensors", "images.safetensors", "network.onnx", "metrics.json", "recipe.toml", "real_images.json")
    names += ("details.json", "report.html")
    assert recorded == {name: file_hash(finished / name) for name in names}


def test_verify_repeats_it_in_every_installed_runtime(finished, capsys):
    assert main(["verify", str(finished), "--images", "5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("  ")[0] == "file"
    rows = [words for words in map(str.split, lines) if words and words[-1] in ("holds", "fails")]
    told = {words[1]: words for words in rows if words[0] == "network.onnx"}
    assert told.keys() == runtimes.installed(".onnx").keys()
    assert told["onnxruntime"][-1] == "holds"
    (third,) = [words for words in map(str.split, lines) if words[1:2] == ["reference,"]]
    assert third[2:] == ["beside", "onnxruntime", "0", "0.000%", "100.00%", third[7], "of", third[9], "equal"]
    assert third[7] == third[9]
    assert "reference: integer arithmetic alone, run freely on 5 of them" in lines
    assert "images: 5" in lines
    assert f"network.onnx: content sha256 {content_hash(finished / 'network.onnx')}" in lines


def test_verify_prints_certificates_for_machines(finished, capsys):
    assert main(["verify", str(finished), "--runtime", "onnxruntime", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["images"] == 8
    assert told["files"]["network.onnx"]["runtimes"].keys() == {"onnxruntime"}
    assert told["files"]["network.onnx"]["same_checkpoint"] is True


def test_a_file_that_was_changed_is_named(run, capsys):
    path, before = run / "network.onnx", content_hash(run / "network.onnx")
    change_weights(path, lambda scale: scale * 2)
    assert refused(capsys, "verify", run) == (
        f"{path}: must hold what its certificate was issued for (sha256 {before[:12]}), got other content "
        f"({content_hash(path)[:12]}); export it again"
    )


def test_a_file_whose_own_runtime_is_not_there_is_not_verified(run, capsys, monkeypatch):
    pytest.importorskip("openvino", reason="the extra `openvino` is not installed")
    load = runtimes.load

    def without(name):
        if name == "onnxruntime":
            raise ConfigError("runtime 'onnxruntime': must be installed, got no module 'onnxruntime'; install it")
        return load(name)

    monkeypatch.setattr(runtimes, "load", without)
    # OpenVINO reads the file and agrees, which proves nothing about ONNX Runtime.
    assert refused(capsys, "verify", run) == (
        "network.onnx: must be asked in the runtime that it is made for, and runtime 'onnxruntime': must be installed, "
        "got no module 'onnxruntime'; install it"
    )
    assert main(["verify", str(run), "--runtime", "openvino"]) == 0


def test_a_reference_that_cannot_be_compared_is_told_and_is_no_failure(run, capsys, monkeypatch):
    def fails(*_, **__):
        raise ExportError("logits: reading the codes must not change them, got others; ask for them too")

    monkeypatch.setattr("reverie.export._certificate.oppose", fails)
    assert main(["verify", str(run), "--runtime", "onnxruntime"]) == 0
    assert (
        "network.onnx: not compared with the reference: logits: reading the codes must not change them, got others; ask for them too"
    ) in capsys.readouterr().out.splitlines()


def test_a_file_without_a_certificate_fails_by_its_numbers(run, capsys):
    path = run / "network.onnx"
    change_weights(path, lambda scale: np.ascontiguousarray(-scale))
    model = onnx.load(path)
    del model.metadata_props[:]
    onnx.save(model, path)
    said = refused(capsys, "verify", run, "--runtime", "onnxruntime")
    assert said.startswith("network.onnx in onnxruntime: ")
    assert said.endswith("; the file does not say what was quantized, please report it")


@pytest.mark.parametrize("name", ["network.safetensors", "images.safetensors"])
def test_a_file_of_the_run_that_breaks_off_is_named(run, name, capsys):
    path, before = run / name, file_hash(run / name)
    path.write_bytes(path.read_bytes()[:-1])
    expected = (
        f"{path}: must be the file that the run wrote (sha256 {before[:12]}), got a changed or incomplete one "
        f"({file_hash(path)[:12]}); put that file back, or run `reverie quantize` again with a new --output"
    )
    assert refused(capsys, "verify", run) == expected
    assert refused(capsys, "export", run) == expected


def test_a_run_without_images_wants_some(run, capsys):
    (run / "images.safetensors").unlink()
    assert refused(capsys, "verify", run) == f"{run}: must hold images.safetensors, got none; give images with --data"


def test_a_run_without_an_exported_file_is_refused(run, capsys):
    (run / "network.onnx").unlink()
    expected = f"{run}: must hold an exported network, got none; `reverie export` makes one"
    assert refused(capsys, "verify", run) == expected
    assert refused(capsys, "benchmark", run) == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["verify", "--images", "0"], "images must be at least 1, got 0"),
        (["benchmark", "--threads", "0"], "threads must be at least 1, got 0"),
        (["benchmark", "--repeats", "0"], "repeats must be at least 1, got 0"),
        (["benchmark", "--batch", "1", "0"], "batch must be at least 1, got 0"),
        (["verify", "--runtime", "tensorrt"], f"unknown runtime 'tensorrt'; choose one of {', '.join(runtimes.names())}"),
        (["benchmark", "--runtime", "tensorrt"], f"unknown runtime 'tensorrt'; choose one of {', '.join(runtimes.names())}"),
    ],
)
def test_what_cannot_be_is_refused(finished, arguments, expected, capsys):
    assert refused(capsys, arguments[0], finished, *arguments[1:]) == expected


@pytest.mark.slow
def test_an_openvino_file_is_exported_verified_and_timed(run, capsys):
    pytest.importorskip("openvino", reason="the extra `openvino` is not installed")
    assert main(["export", str(run), "--target", "openvino"]) == 0
    told = capsys.readouterr().out
    assert told.startswith(f"wrote {run / 'network.xml'}, {run / 'network.bin'}, ")
    assert "same class as the checkpoint on 8 of its own images" in told
    assert attached(run / "network.xml")["runtime"] == "openvino"
    assert main(["verify", str(run), "--json"]) == 0
    issued = json.loads(capsys.readouterr().out)["files"]
    assert list(issued) == ["network.onnx", "network.xml"]
    assert issued["network.xml"]["runtimes"]["openvino"]["unrounded"] == []
    assert main(["benchmark", str(run), "--repeats", "3", "--batch", "1", "2", "--json"]) == 0
    benchmark = json.loads(capsys.readouterr().out)
    assert {(row["form"], row["runtime"]) for row in benchmark["rows"]} == {
        ("full precision", "onnxruntime"),
        ("full precision", "openvino"),
        ("network.onnx", "onnxruntime"),
        ("network.onnx", "openvino"),
        ("network.xml", "openvino"),
    }
    for row in benchmark["rows"]:
        assert row["latency_ms"].keys() == {"1", "2"}
        low, high = row["latency_ms"]["1"]["quartiles"]
        assert 0 < low <= row["latency_ms"]["1"]["median"] <= high
        files = [run / row["form"]] if row["form"] != "full precision" else []
        assert not files or row["bytes"] == sum(part.stat().st_size for part in runtimes.parts(files[0]))
    assert any("that buys a smaller file and not speed" in note for note in benchmark["notes"])


@pytest.mark.slow
def test_the_benchmark_prints_a_table(finished, capsys):
    assert main(["benchmark", str(finished), "--repeats", "3", "--batch", "1", "--runtime", "onnxruntime"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[2:4]] == ["full precision", "network.onnx"]
    assert lines[4] == "1 thread, 3 calls of each, taking turns in one process"


def test_a_file_that_a_runtime_cannot_execute_is_told_and_the_others_are_timed(run, capsys, monkeypatch):
    (run / "broken.onnx").write_bytes((run / "network.onnx").read_bytes()[:-9])
    module = importlib.import_module("reverie.cli.benchmark")
    monkeypatch.setattr(module, "exported_files", lambda run: sorted(run.glob("*.onnx")))
    timing = ["benchmark", str(run), "--repeats", "2", "--batch", "1", "--runtime", "onnxruntime", "--json"]
    assert main(timing) == 0
    told = json.loads(capsys.readouterr().out)
    assert [row["form"] for row in told["rows"]] == ["full precision", "network.onnx"]
    assert told["notes"][0].startswith("not timed: broken.onnx in onnxruntime: onnxruntime: it must load broken.onnx, got ")


def test_an_openvino_file_without_its_weights_is_named(run):
    (run / "network.xml").write_text("")
    with pytest.raises(ExportError) as caught:
        sizes({"network.xml": run / "network.xml"})
    assert str(caught.value) == (
        f"{run / 'network.xml'}: must consist of {run / 'network.xml'}, {run / 'network.bin'}, got no network.bin; export it again"
    )


@pytest.mark.parametrize("command", [["evaluate", "--data", "nowhere"], ["benchmark"], ["push", "me/digits", "--dry-run"]])
def test_an_exported_file_that_was_changed_is_not_measured_and_goes_nowhere(run, capsys, command):
    path = run / "network.onnx"
    change_weights(path, lambda scale: scale * 2)
    words = [command[0], run, *command[1:]]
    assert refused(capsys, *words).startswith(f"{path}: must be the file that the run wrote (sha256 ")


def test_resume_of_a_complete_run_names_a_file_that_was_changed(run, capsys):
    assert main(["resume", str(run)]) == 0
    with (run / "report.html").open("a") as file:
        file.write("!")
    assert refused(capsys, "resume", run).startswith(f"{run / 'report.html'}: must be the file that the run wrote (sha256 ")


def test_an_error_about_a_new_file_names_it_and_not_the_one_aside(run, capsys, monkeypatch):
    def fails(quantized, path, *_, **__):
        raise ExportError(f"{path}: must be proven, got nothing; try again")

    monkeypatch.setattr("reverie.export._certificate.certify", fails)
    said = refused(capsys, "export", run, "--output", run / "other.onnx")
    assert said == f"{run / 'other.onnx'}: must be proven, got nothing; try again"
    assert not (run / "other.onnx").exists()


def test_a_program_of_torch_is_exported_proven_and_verified(run, capsys):
    assert main(["export", str(run), "--target", "torch"]) == 0
    told = capsys.readouterr().out
    assert told.startswith(f"wrote {run / 'network.pt2'}, ")
    assert "same class as the checkpoint on 8 of its own images" in told
    issued = attached(run / "network.pt2")
    assert issued["runtime"] == "torch"
    assert issued["runtimes"]["torch"]["failure"] is None
    # Uncompiled; that Inductor makes int8 kernels of it is tested where it is written.
    assert len(issued["runtimes"]["torch"]["float_layers"]) == issued["runtimes"]["torch"]["layers"]
    assert issued["reference"]["runtime"] == "torch"
    assert issued["reference"]["top1_agreement"] == 1
    (run / "network.onnx").unlink()
    assert main(["verify", str(run), "--json"]) == 0
    verified = json.loads(capsys.readouterr().out)["files"]
    assert verified.keys() == {"network.pt2"}
    assert verified["network.pt2"]["sha256"] == issued["sha256"]
    assert main(["benchmark", str(run), "--repeats", "2", "--batch", "1", "--runtime", "torch", "--json"]) == 0
    timed = json.loads(capsys.readouterr().out)
    assert [(row["form"], row["runtime"]) for row in timed["rows"]] == [("full precision", "torch"), ("network.pt2", "torch")]
    assert timed["rows"][0]["bytes"] > timed["rows"][1]["bytes"]
    assert timed["rows"][1]["latency_ms"]["1"]["times_full_precision"] > 0
    assert (
        "torch executes a program uncompiled here, every layer in float: torch.compile makes int8 kernels of it"
        in timed["notes"]
    )
