import dataclasses
import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tests.cli.conftest import SHAPE, TINY, said

import reverie
from reverie import plugins, recipes
from reverie.cli import app, main
from reverie.cli._options import as_overrides
from reverie.cli.methods import methods_of
from reverie.export._metadata import content_hash
from reverie.images.store import save_images
from reverie.runs import default_output
from reverie.stages import plan

COMMANDS = [
    "benchmark", "capsule", "compare", "completion", "diagnose", "evaluate", "export", "images", "inspect", "methods", "push", "quantize",
    "recipe", "resume", "runs", "synthesize", "verify",
]  # fmt: skip


def test_quantize_writes_the_files_of_a_run(finished):
    names = {path.name for path in finished.iterdir() if not path.name.startswith(".")}
    assert names == {
        "README.md", "details.json", "images", "images.safetensors", "metrics.json", "network.onnx", "network.safetensors",
        "plots", "real_images.json", "recipe.toml", "report.html", "run.json",
    }  # fmt: skip


def test_quantize_keeps_the_metrics_that_programs_read(finished):
    metrics = json.loads((finished / "metrics.json").read_text())
    for name in ("full_precision", "quantized", "exported"):
        assert 0.5 < metrics[name]["top1"] <= 1
        assert metrics[name]["images"] == 599
    assert set(metrics["agreement"]) == {"synthetic", "evaluation"}
    assert metrics["parity"]["max_code_difference"] <= 1
    assert metrics["bytes"]["packed"] < metrics["bytes"]["fp32"]
    times = metrics["latency_ms"]
    assert times["ratio"] == times["fp32"] / times["quantized"]
    assert set(metrics["seconds"]) == {"capture", "synthesize", "quantize", "export", "measure"}
    assert metrics["peak_memory_bytes"] > 10_000_000
    assert metrics["images"]["source"] == {"zeroq": 8}
    interval = metrics["difference"]["exported"]
    assert interval["low"] <= interval["difference"] <= interval["high"]


def test_best_says_what_it_chose_and_why_and_stays_with_it(capsys, tmp_path):
    command = ["quantize", "embedded:digits", "--recipe", "best", "--weight-bits", "4", "--activation-bits", "4", *TINY]
    command += ["--set", "reconstruction.iterations=2", "--set", "distillation.steps=2", "--output", tmp_path / "run"]
    lines = said(capsys, *command).splitlines()
    assert lines[0] == f"recipe best: qdrop; output {tmp_path / 'run'}"
    chosen = [line.removeprefix("best: ") for line in lines if line.startswith("best: ")]
    assert chosen == json.loads((tmp_path / "run" / "metrics.json").read_text())["choice"]
    assert chosen[0] == "qdrop: at W4A4 codes and ranges are learned together, block by block, half of all values unquantized"
    assert chosen[0] in (tmp_path / "run" / "report.html").read_text()
    # The same command again answers with the complete run.
    assert said(capsys, *command).splitlines()[0] == lines[0]


def test_quantize_shows_a_table_and_says_which_recipe_it_chose(capsys, finished):
    command = ["quantize", "embedded:digits", "--weight-bits", "4", "--evaluate", "held-out", "--output", finished, *TINY]
    lines = said(capsys, *command, "--set", "reconstruction.iterations=2").splitlines()
    assert lines[0] == (f"recipe adaround (chosen for weights below 8 bits; --recipe overrides it); output {finished}")
    assert lines[1:4] == [
        "bits: W4A8, 8 in the first and last layer (as asked)",
        "images: 8 by zeroq, no real ones (--calibration adds some)",
        "accuracy: measured on 599 labelled images",
    ]
    assert lines[5].split()[-1] == "speed"
    assert [line[:23].strip() for line in lines[7:10]] == ["full precision", "fake-quantized", "exported (ONNX Runtime)"]
    assert lines[11].startswith("embedded:digits at W4A8 reads ")
    # A line on parity for every runtime that is installed.
    assert list(dict.fromkeys(line.partition(":")[0] for line in lines[12:])) == [
        "parity",
        "images",
        "seconds",
        "files",
        "read",
        "next",
    ]


@pytest.mark.slow
def test_quantize_without_labels_shows_agreement_and_writes_json_alone_to_standard_output(capfd, tmp_path):
    assert main(["quantize", "embedded:digits", "--json", "--output", str(tmp_path / "run"), *TINY]) == 0
    captured = capfd.readouterr()
    metrics = json.loads(captured.out)
    assert metrics == json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["full_precision"]["top1"] is None
    assert metrics["agreement"]["synthetic"]["images"] == 4
    events = [json.loads(line) for line in captured.err.splitlines()]
    planned = plan(recipes.read(str(tmp_path / "run" / "recipe.toml")), labelled=False)
    assert [event["stage"] for event in events if event["event"] == "start"] == list(planned)


@pytest.mark.slow
def test_a_network_from_a_python_file_is_found_again_by_later_commands(capsys, nets, weights, tmp_path):
    run, images = tmp_path / "run", tmp_path / "dreams.safetensors"
    command = ["quantize", f"{nets}:normal", *SHAPE, "--weights", weights, "--recipe", "noise", "--images", "8"]
    assert "no labels" in said(capsys, *command, "--set", "held_out=4", "--output", run)
    (run / "images.safetensors").rename(images)
    shown = said(capsys, "evaluate", run, "--data", images).splitlines()
    assert shown[0].split() == ["agreement"]
    assert shown[-1] == f"images: 8 in {images}, no labels"
    nets.rename(tmp_path / "moved.py")
    assert main(["export", str(run), "--network", f"{tmp_path / 'moved.py'}:normal"]) == 0


def test_synthesize_writes_a_folder_for_any_tool(capsys, tmp_path):
    out = tmp_path / "dreams"
    command = ["synthesize", "embedded:digits", *TINY, "--set", "synthesis.class_weight=0.1", "--output", out, "--json"]
    metrics = json.loads(said(capsys, *command))
    assert metrics["images"]["count"] == 8
    assert sum(metrics["images"]["diversity"]["class_histogram"]) == 8
    stored = load_file(out / "images.safetensors")
    assert stored["inputs"].shape == (8, 1, 32, 32)
    assert stored["logits"].shape == (8, 10)
    assert len(list((out / "images").glob("0*_class*.png"))) == 8
    assert (out / "images" / "contact_sheet.png").is_file()
    assert "8 images were made out of the network alone by zeroq" in (out / "report.html").read_text()
    assert not (out / "checkpoints").exists()


def test_synthesize_prints_classes_entropy_and_similarity(capsys, tmp_path):
    shown = said(capsys, "synthesize", "embedded:digits", *TINY, "--output", tmp_path / "dreams").splitlines()
    assert re.fullmatch(
        r"images: 8 \(8 zeroq\),( \d){10} of each class, batch-norm distance \S+, class coverage \S+, entropy \S+, "
        r"feature similarity \S+",
        shown[0],
    )
    assert [line.partition(":")[0] for line in shown] == ["images", "seconds", "files", "next"]


@pytest.mark.parametrize(
    ("factory", "weights", "mean", "std"),
    [
        ("CifarResNet", "resnet20.pth", "0.485,0.456,0.406", "0.229,0.224,0.225"),
        ("TinyResNet8", "mlperf_tiny_resnet8.pth", "0,0,0", ",".join([str(1 / 255)] * 3)),
    ],
)
def test_a_real_network_is_told_by_flags_alone(assets, factory, weights, mean, std):
    flags = ["--weights", str(assets / "nets" / "cifar10" / weights), "--input-size", "32", "--classes", "10"]
    _, bound, _ = app.parse_args(["inspect", f"{assets / 'models.py'}:{factory}", *flags, "--mean", mean, "--std", std])
    network = bound.arguments["options"].load(bound.arguments["network"])
    mosaic = Image.open(assets / "data" / "cifar10" / "test.webp").convert("RGB")
    pixels = torch.from_numpy(np.array(mosaic.crop((0, 0, 3200, 160))))
    pixels = pixels.unflatten(0, (5, 32)).unflatten(2, (100, 32)).permute(0, 2, 4, 1, 3).flatten(0, 1)
    labels = torch.from_numpy(np.load(assets / "data" / "cifar10" / "test_labels.npy"))[:500]
    with torch.no_grad():
        answers = network.module(network.input.normalize(pixels.float() / 255)).argmax(dim=1)
    # 91.73 % and 87.19 % on all 10,000.
    assert float((answers == labels).float().mean()) > 0.85


def test_evaluate_measures_the_exported_file_beside_full_precision(capsys, finished, tmp_path):
    held_out = reverie.load_network("embedded:digits").held_out()
    save_images(held_out, tmp_path / "digits.safetensors")
    scores = json.loads(said(capsys, "evaluate", finished, "--data", tmp_path / "digits.safetensors", "--json"))
    metrics = json.loads((finished / "metrics.json").read_text())
    assert scores["images"] == 599
    assert scores["top1"]["full_precision"] == metrics["full_precision"]["top1"]
    assert scores["top1"]["exported"] == metrics["exported"]["top1"]
    assert scores["difference"]["exported"] == metrics["difference"]["exported"]


def test_evaluate_runs_the_file_it_is_told_to_in_its_own_runtime(capsys, finished, tmp_path):
    pytest.importorskip("openvino", reason="the extra `openvino` is not installed")
    run, data = tmp_path / "run", tmp_path / "digits.safetensors"
    shutil.copytree(finished, run)
    save_images(reverie.load_network("embedded:digits").held_out(), data)
    said(capsys, "export", run, "--target", "openvino")
    scores = json.loads(said(capsys, "evaluate", run, "--data", data, "--file", "network.xml", "--json"))
    exact = json.loads((run / "metrics.json").read_text())["quantized"]["top1"]
    assert scores["file"] == "network.xml"
    # One of 599 images may be a tie.
    assert abs(scores["top1"]["exported"] - exact) <= 1 / 599
    assert main(["evaluate", str(run), "--data", str(data), "--file", "network.pt2"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        "reverie: --file must be one of network.onnx, network.xml, got 'network.pt2'; `reverie export` makes others"
    )


def test_evaluate_tells_standard_error_how_far_it_is(capfd, finished, tmp_path):
    save_images(reverie.load_network("embedded:digits").held_out(), tmp_path / "digits.safetensors")
    assert main(["evaluate", str(finished), "--data", str(tmp_path / "digits.safetensors"), "--json"]) == 0
    events = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert [(event["event"], event["stage"]) for event in events] == [
        ("start", "evaluate"),
        *[("advance", "evaluate")] * 10,
        ("finish", "evaluate"),
    ]
    # 599 images are nine batches of 64 and a rest.
    assert (events[-1]["done"], events[-1]["total"]) == (10, 10)


@pytest.mark.slow
def test_export_writes_the_same_network_again(capsys, finished, tmp_path):
    shown = said(capsys, "export", finished, "--output", tmp_path / "again.onnx")
    # All but the certificate, which is about other images.
    assert content_hash(tmp_path / "again.onnx") == content_hash(finished / "network.onnx")
    assert shown.startswith(f"wrote {tmp_path / 'again.onnx'}, ")
    assert "same class as the checkpoint on 8 of its own images" in shown


def test_inspect_shows_layers_and_verdicts(capsys):
    shown = said(capsys, "inspect", "embedded:digits")
    assert "43,654 parameters, 1,986,528 multiply-accumulates an image, output 10" in shown
    assert "batch-norm matching" in shown
    facts = json.loads(said(capsys, "inspect", "embedded:digits", "--json"))
    assert len(facts["layers"]) == 16
    assert facts["network"] == "embedded:digits"
    assert all(verdict["reason"] for verdict in facts["verdicts"])


@pytest.mark.parametrize(
    ("kind", "package"),
    [
        ("synthesis", "synthesis"),
        ("observer (activations, weights)", "observers"),
        ("rounding", "rounding"),
        ("export", "export"),
    ],
)
def test_methods_read_from_the_source_are_those_that_load(kind, package):
    registry = importlib.import_module(f"reverie.{package}")
    found = methods_of(kind)
    assert [method.name for method in found] == plugins.names(registry)
    for method in found:
        fields = dataclasses.fields(plugins.load(registry, method.name))
        assert method.settings == {field.name: repr(field.default) for field in fields}
        assert method.about.endswith(".")


def test_methods_lists_the_network_sources_too(capsys):
    found = json.loads(said(capsys, "methods", "--json"))
    sources = {method["name"]: method for method in found if method["kind"] == "network source"}
    assert set(sources) == {"embedded", "file", "onnx", "package", "timm", "torchvision"}
    assert sources["file"]["settings"]["interpolation"] == "'bilinear'"
    assert "zeroq" in said(capsys, "methods")


@pytest.mark.parametrize("preset", recipes.presets())
def test_recipe_prints_what_reads_back_as_the_same_recipe(capsys, tmp_path, preset):
    (tmp_path / "mine.toml").write_text(said(capsys, "recipe", preset, "--set", "seed=7"))
    assert recipes.read(str(tmp_path / "mine.toml")) == recipes.read(preset, {"seed": 7})


def test_recipe_without_a_name_lists_the_presets(capsys):
    assert [line.partition(":")[0] for line in said(capsys, "recipe").splitlines()] == recipes.presets()


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("seed=3", {"seed": 3}),
        ("synthesis.learning_rate = 0.5", {"synthesis.learning_rate": 0.5}),
        ("synthesis.clamp=false", {"synthesis.clamp": False}),
        ("synthesis.level=sample", {"synthesis.level": "sample"}),
        ('synthesis.level="sample"', {"synthesis.level": "sample"}),
        ("a=b=c", {"a": "b=c"}),
    ],
)
def test_set_reads_toml_literals_and_bare_words(setting, expected):
    assert as_overrides((setting,)) == expected


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        ("embedded:digits", "embedded-digits"),
        ("timm:resnet18.a1_in1k", "timm-resnet18.a1_in1k"),
        ("path/to/nets.py:resnet20", "nets-resnet20"),
    ],
)
def test_the_default_output_is_named_after_the_network(network, expected):
    assert default_output(network, 4, 8) == Path("runs", f"{expected}-w4a8")


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_every_command_has_an_example(capsys, command):
    assert f"Example: reverie {command}" in said(capsys, command, "--help")


def test_every_command_is_tested_here():
    assert sorted(name for name in app if not name.startswith("-")) == COMMANDS


@pytest.mark.parametrize("command", [["--help"], ["--version"], ["quantize", "--help"], ["methods"]])
def test_what_needs_no_network_imports_nothing_heavy(command):
    script = (
        "import sys; from reverie.cli import main; status = main(sys.argv[1:]); "
        "heavy = sys.modules.keys() & {'torch', 'numpy', 'pydantic', 'onnxruntime', 'jinja2'}; "
        "sys.exit(status or (f'imported {heavy}' if heavy else 0))"
    )
    done = subprocess.run([sys.executable, "-c", script, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_reverie_imports_nothing_heavy_and_its_names_come_when_used():
    script = (
        "import sys, reverie; heavy = sys.modules.keys() & {'torch', 'numpy', 'pydantic', 'cyclopts', 'rich'}; "
        "assert not heavy, heavy; assert all(getattr(reverie, name) is not None for name in reverie.__all__); "
        "assert 'torch' in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_name_that_reverie_lacks_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"^module 'reverie' has no attribute 'quantise'$"):
        reverie.quantise  # noqa: B018


def test_the_module_runs_like_the_command():
    done = subprocess.run([sys.executable, "-m", "reverie", "--version"], capture_output=True, text=True)
    assert done.stdout.strip() == reverie.__version__


@pytest.mark.slow
def test_without_torchvision_nothing_complains_about_it(tmp_path):
    code = "import sys; sys.modules['torchvision'] = None; from reverie.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "quantize", "embedded:digits", *TINY, "--output", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    assert "torchvision::" not in done.stderr + done.stdout
