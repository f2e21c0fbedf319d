"""The whole way, on the tiny network: what a run leaves behind, and that it can be killed and repeated."""

import io
import json
import time
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from reverie import pipeline, runs
from reverie.errors import ConfigError, ExportError, ModelError
from reverie.export import _verify
from reverie.export._packed import restore
from reverie.forecast import forecast
from reverie.images.store import load_images
from reverie.models import InputContract, Network
from reverie.pipeline import run
from reverie.progress import Lines, Silent
from reverie.recipes import fingerprint, from_tables, presets, read, tables, to_toml
from reverie.stages import as_teacher, student_of

QUICK = {"images": 16, "held_out": 8, "estimate_images": 8, "synthesis.steps": 20, "synthesis.batch": 8}


@pytest.fixture
def quick():
    return read("zeroq", QUICK | {"quantization.weight_bits": 4})


def test_a_run_leaves_what_the_design_says_and_nothing_else(tiny_cnn, quick, tmp_path):
    network = tiny_cnn()
    done = run(quick, network, output=tmp_path / "run", evaluation=network.held_out())
    names = sorted(path.name for path in done.path.iterdir() if not path.name.startswith("."))
    assert names == [
        "README.md",
        "details.json",
        "images",
        "images.safetensors",
        "metrics.json",
        "network.onnx",
        "network.safetensors",
        "plots",
        "real_images.json",
        "recipe.toml",
        "report.html",
        "run.json",
    ]
    metrics = json.loads((done.path / "metrics.json").read_text())
    assert metrics == json.loads(json.dumps(done.metrics))
    for key in ("full_precision", "quantized", "exported"):
        assert metrics[key]["top1"] > 0.9 and metrics[key]["images"] == 300
    assert metrics["parity"]["max_code_difference"] <= 1
    assert metrics["parity"]["top1_agreement"] == 1.0
    assert set(metrics["bytes"]) >= {"fp32", "packed"}
    assert metrics["bytes"]["packed"] < metrics["bytes"]["fp32"]
    assert metrics["latency_ms"]["ratio"] == pytest.approx(metrics["latency_ms"]["fp32"] / metrics["latency_ms"]["quantized"])
    assert set(metrics["seconds"]) == {"capture", "synthesize", "quantize", "export", "measure"}
    assert metrics["peak_memory_bytes"] > 1e8
    assert sorted(path.name for path in (done.path / "plots").iterdir()) == [
        "deviations.png",
        "features.png",
        "nearest.png",
        "thumbnails.png",
    ]
    assert set(metrics["images"]["separation"]) == {"zeroq", "real"}
    assert [one["class"] for one in metrics["by_class"]["classes"]] == [0, 1, 2]
    details = json.loads((done.path / "details.json").read_text())
    assert set(details) == {"thumbnails", "plane", "deviations", "losses", "tensors", "looked_at"}
    assert details["looked_at"] == "evaluation" and "synthesize" in details["losses"]
    assert metrics["images"]["count"] == 16 and metrics["images"]["source"] == {"zeroq": 16}
    assert metrics["agreement"]["synthetic"]["images"] == 8
    assert from_tables(tomllib.loads((done.path / "recipe.toml").read_text())) == quick


def test_without_labels_accuracy_is_unknown_and_agreement_is_given(tiny_cnn, quick, tmp_path):
    done = run(quick, tiny_cnn(), output=tmp_path / "run")
    assert {done.metrics[key]["top1"] for key in ("full_precision", "quantized", "exported")} == {None}
    assert set(done.metrics["agreement"]) == {"synthetic"}


def test_without_labels_the_drop_is_estimated_on_images_made_for_it(tiny_cnn, quick, tmp_path):
    network = tiny_cnn()
    found = run(quick, network, output=tmp_path / "run").metrics["estimate"]
    assert found["images"] == 8
    assert 0 <= found["low"] <= found["drop"] <= found["high"] < 1
    report = (tmp_path / "run" / "report.html").read_text()
    assert f"{100 * found['drop']:.1f} points" in report and "The drop of accuracy is an estimate" in report
    labelled = run(quick, network, output=tmp_path / "labelled", evaluation=network.held_out())
    assert labelled.metrics["estimate"] is None
    asked = run(replace(quick, estimate_images=0), network, output=tmp_path / "unasked")
    assert asked.metrics["estimate"] is None
    weights = load_file(tmp_path / "run" / "network.safetensors")
    for other in (labelled, asked):
        same = load_file(other.path / "network.safetensors")
        assert same.keys() == weights.keys() and all(torch.equal(same[name], weights[name]) for name in weights)


@pytest.mark.slow
def test_the_same_recipe_and_seed_give_the_same_bytes_and_another_seed_others(tiny_cnn, quick, tmp_path):
    first, second = (run(quick, tiny_cnn(), output=tmp_path / name).path for name in ("first", "second"))
    other = run(read("zeroq", QUICK | {"seed": 1, "quantization.weight_bits": 4}), tiny_cnn(), output=tmp_path / "other").path
    for file in ("images.safetensors", "network.safetensors", "network.onnx"):
        assert (first / file).read_bytes() == (second / file).read_bytes()
        assert (first / file).read_bytes() != (other / file).read_bytes()


@pytest.mark.slow
def test_another_number_of_threads_is_worth_the_same(tiny_cnn, tmp_path):
    # The tolerance that docs/guides/interrupted.md states; `benchmarks/threads.py` measures it on a larger network.
    recipe = read("qdrop", QUICK | {"quantization.activation_bits": 8, "reconstruction.iterations": 20})
    found = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            network = tiny_cnn()
            found[threads] = run(recipe, network, output=tmp_path / f"{threads}", evaluation=network.held_out()).metrics
        finally:
            torch.set_num_threads(1)
    one, two = (metrics["exported"]["top1"] for metrics in found.values())
    assert abs(one - two) <= 0.01
    first, second = (load_images(tmp_path / f"{threads}" / "images.safetensors").inputs for threads in (1, 2))
    assert (first - second).abs().mean() < 0.05


@pytest.mark.slow
def test_a_complete_run_is_not_repeated(tiny_cnn, quick, tmp_path):
    first = run(quick, tiny_cnn(), output=tmp_path / "run")
    began = time.perf_counter()
    told = io.StringIO()
    again = run(quick, tiny_cnn(), output=tmp_path / "run", progress=Lines(told))
    assert again.metrics == json.loads(json.dumps(first.metrics))
    assert told.getvalue() == f"{tmp_path / 'run'}: complete already, nothing was done; its figures are those of then\n"
    assert time.perf_counter() - began < 1


@pytest.mark.slow
def test_a_run_stopped_anywhere_goes_on_to_the_same_bytes(tiny_cnn, tmp_path):
    recipe = read("adaround", QUICK | {"reconstruction.iterations": 10})
    whole = run(recipe, tiny_cnn(), output=tmp_path / "whole").path

    class Stopped(Exception):
        pass

    class Stopping(Silent):
        def __init__(self, after):
            self._left = after

        def advance(self, amount=1, note="", *, skipped=False):
            self._left -= amount
            if self._left < 0:
                raise Stopped

    # In the first and in the second batch of images, in the held-out ones, in those for the estimate, and in the rounding.
    for number, after in enumerate((5, 25, 50, 75, 125)):
        output = tmp_path / f"stopped-{number}"
        with pytest.raises(Stopped):
            run(recipe, tiny_cnn(), output=output, progress=Stopping(after))
        assert not (output / "metrics.json").exists()
        resumed = run(recipe, tiny_cnn(), output=output).path
        for file in ("images.safetensors", "network.safetensors", "network.onnx"):
            assert (resumed / file).read_bytes() == (whole / file).read_bytes(), (after, file)
        estimates = [json.loads((path / "metrics.json").read_text())["estimate"] for path in (resumed, whole)]
        assert estimates[0] == estimates[1] is not None
        assert not (resumed / "checkpoints").exists()


@pytest.mark.slow
def test_a_run_killed_while_it_completes_is_complete(tiny_cnn, quick, tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    def killed(path):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(runs, "_delete_checkpoints", killed)
        with pytest.raises(Killed):
            run(quick, tiny_cnn(), output=tmp_path / "run")
    assert (tmp_path / "run/checkpoints").is_dir()
    again = run(quick, tiny_cnn(), output=tmp_path / "run")
    assert again.metrics["exported"] and not (tmp_path / "run/checkpoints").exists()


def test_another_contract_or_other_labels_are_another_run(tiny_cnn, quick, tmp_path):
    network = tiny_cnn()
    labelled = network.held_out()
    run(quick, network, output=tmp_path / "run", evaluation=labelled)
    brighter = replace(network, input=replace(network.input, mean=(0.4, 0.4, 0.4)))
    with pytest.raises(ConfigError) as caught:
        run(quick, brighter, output=tmp_path / "run", evaluation=labelled)
    assert "got one with input " in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        run(quick, network, output=tmp_path / "run", evaluation=replace(labelled, labels=labelled.labels.flip(0)))
    assert "got one with evaluation " in str(caught.value)


@pytest.mark.slow
def test_a_finished_run_can_be_moved_and_its_network_restored(tiny_cnn, quick, tmp_path):
    network = tiny_cnn()
    done = run(quick, network, output=tmp_path / "run")
    moved = done.path.rename(tmp_path / "moved")
    _, student = student_of(as_teacher(network).graph, quick.quantization)
    quantized = restore(student, moved / "network.safetensors")
    inputs = network.held_out().inputs[:32]
    parity = _verify.measure_parity(quantized, moved / "network.onnx", inputs)
    assert parity.max_code_difference <= 1 and parity.top1_agreement == 1.0


def test_a_student_with_other_bits_restores_nothing(tiny_cnn, quick, tmp_path):
    network = tiny_cnn()
    file = run(quick, network, output=tmp_path / "run").path / "network.safetensors"
    _, student = student_of(as_teacher(network).graph, replace(quick.quantization, activation_bits=5))
    with pytest.raises(ConfigError) as caught:
        restore(student, file)
    told = {name: quantizer.grid.bits for name, quantizer in student.activations.items()}
    name = next(name for name, bits in told.items() if bits == 5)
    assert str(caught.value) == (
        f"{file}: tensor {name} must have the 8 bits that are stored, got a student with 5; place it with `stored_bits`"
    )


def test_the_checkpoint_stores_four_bit_weights_in_four_bits(tiny_cnn, quick, tmp_path):
    done = run(quick, tiny_cnn(), output=tmp_path / "run")
    with safe_open(done.path / "network.safetensors", framework="pt") as file:
        layers = json.loads(file.metadata()["reverie"])["layers"]
        for layer in layers.values():
            stored = file.get_tensor(f"{layer['weight']}.codes")
            assert stored.dtype == torch.uint8
            assert stored.numel() == -(-torch.Size(layer["shape"]).numel() * layer["bits"] // 8)
    assert {layer["bits"] for layer in layers.values()} == {4, 8}


def test_images_carry_soft_labels_and_provenance(tiny_cnn, quick, tmp_path):
    network = tiny_cnn()
    done = run(quick, network, output=tmp_path / "run")
    images = load_images(done.path / "images.safetensors")
    assert images.sources == ("zeroq",) * 16
    with torch.no_grad():
        assert torch.allclose(images.logits, network.module(images.inputs), atol=1e-4)
    assert (
        images.provenance["network"] and images.provenance["seed"] == "0" and images.provenance["recipe"] == fingerprint(quick)
    )


@pytest.mark.slow
def test_real_images_are_used_beside_synthetic_ones_and_alone(tiny_cnn, quick, tmp_path):
    network = tiny_cnn()
    real = network.held_out()
    mixed = run(quick, tiny_cnn(), output=tmp_path / "mixed", calibration=real)
    assert mixed.metrics["images"]["count"] == 316
    assert mixed.metrics["images"]["source"] == {"zeroq": 16, "real": 300}
    settings = QUICK | {"images": 0, "held_out": 0}
    alone = run(read("zeroq", settings), tiny_cnn(), output=tmp_path / "alone", calibration=real)
    assert alone.metrics["images"]["source"] == {"real": 300}
    # With nothing else to look at, parity is proven on the calibration images, and the report says which they are.
    assert alone.metrics["parity"]["images"] == 64
    assert set(alone.metrics["agreement"]) == {"calibration"}


def test_a_broken_export_is_not_called_a_success(tiny_cnn, quick, tmp_path, monkeypatch):
    honest = _verify.measure_parity

    def doubled(quantized, path, images, **options):
        # What a wrong emitter would do: the student's grid is not the file's.
        name = next(iter(quantized.activations))
        quantized.activations[name].scale.mul_(2)
        return honest(quantized, path, images, **options)

    monkeypatch.setattr(_verify, "measure_parity", doubled)
    with pytest.raises(ExportError):
        run(quick, tiny_cnn(), output=tmp_path / "run")
    assert not (tmp_path / "run/metrics.json").exists() and not (tmp_path / "run/network.onnx").exists()
    assert json.loads((tmp_path / "run/run.json").read_text())["complete"] is False


def test_the_literature_placement_runs_without_export_and_refuses_one(tiny_cnn, tmp_path):
    network = tiny_cnn()
    settings = QUICK | {"quantization.placement": "literature"}
    with pytest.raises(ConfigError) as caught:
        run(read("zeroq", settings), network, output=tmp_path / "refused")
    assert "the literature placement" in str(caught.value)
    assert not (tmp_path / "refused").exists()
    recipe = read("zeroq", settings | {"export.method": "none"})
    done = run(recipe, network, output=tmp_path / "run", evaluation=network.held_out())
    assert done.metrics["quantized"]["top1"] > 0.9
    assert done.metrics["exported"]["top1"] is None and not (done.path / "network.onnx").exists()


class Windows(nn.Module):
    """Two linear layers whose rows are windows of an image."""

    def __init__(self):
        super().__init__()
        self.stem, self.first, self.second, self.head = nn.Conv2d(3, 4, 1), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 5)

    def forward(self, x):
        windows = self.stem(x).flatten(2).mT.reshape(-1, 4, 4)
        windows = self.second(self.first(windows).relu())
        return self.head(windows.reshape(x.shape[0], 16, 4).mean(1))


def test_units_that_cannot_be_isolated_are_refused_before_images_are_made(tmp_path, monkeypatch):
    contract = InputContract(channels=3, height=4, width=4, mean=(0.5,) * 3, std=(0.25,) * 3)
    network = Network(name="windows", module=Windows().eval(), input=contract, classes=5)
    settings = {
        "rounding.method": "adaround",
        "reconstruction.iterations": 2,
        "export.method": "none",
        "images": 4,
        "held_out": 4,
    }

    def never(*arguments):
        raise AssertionError("images were made")

    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "synthesize", never)
        with pytest.raises(ModelError) as caught:
            run(read("noise", settings | {"reconstruction.unit": "block"}), network, output=tmp_path / "run")
    assert str(caught.value).endswith(" for 2 images; use --set reconstruction.unit=network")
    # The folder is free for the cure.
    run(read("noise", settings | {"reconstruction.unit": "network"}), network, output=tmp_path / "run")


def test_a_distillation_that_learns_nothing_is_refused_before_images_are_made(tmp_path, monkeypatch):
    module = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5, bias=False))
    contract = InputContract(channels=3, height=4, width=4, mean=(0.5,) * 3, std=(0.25,) * 3)
    network = Network(name="unbiased", module=module.eval(), input=contract, classes=5)
    kept = {"learned_weights": False, "learned_ranges": False, "weight_ranges": "fixed", "steps": 2}
    settings = {f"distillation.{key}": value for key, value in kept.items()}
    settings |= {"export.method": "none", "images": 4, "held_out": 4, "quantization.bias_correction": False}

    def never(*arguments):
        raise AssertionError("images were made")

    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "synthesize", never)
        for asked, output in ((run, {"output": tmp_path / "run"}), (forecast, {})):
            with pytest.raises(ConfigError) as caught:
                asked(read("noise", settings), network, **output)
            assert str(caught.value) == (
                "distillation.learned_weights must be true for a network without biases where no scale is learned, got false; leave it "
                "out, or use --set distillation.weight_ranges=learned"
            )
    # The folder is free for the cure.
    run(read("noise", settings | {"distillation.weight_ranges": "learned"}), network, output=tmp_path / "run")


def test_a_network_without_batch_norm_is_refused_before_anything_is_made(tmp_path, quick):
    module = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(2 * 36, 3))
    contract = InputContract(channels=1, height=8, width=8, mean=(0.0,), std=(1.0,))
    with pytest.raises(ModelError) as caught:
        run(quick, Network(name="plain", module=module.eval(), input=contract, classes=3), output=tmp_path / "run")
    assert str(caught.value).startswith("plain: zeroq needs a batch norm with running statistics, got none in the network; ")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 2, 4])
def test_any_channel_count_and_input_range_goes_the_whole_way(channels, tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = torch.nn.Sequential(
            torch.nn.Conv2d(channels, 8, 3, bias=False),
            torch.nn.BatchNorm2d(8),
            torch.nn.ReLU6(),
            torch.nn.AdaptiveAvgPool2d(1),
            torch.nn.Flatten(),
            torch.nn.Linear(8, 5),
        ).eval()
    # Raw 0..255 pixels.
    contract = InputContract(channels=channels, height=12, width=10, mean=(0.0,) * channels, std=(1 / 255,) * channels)
    recipe = read("zeroq", {"images": 4, "held_out": 2, "synthesis.steps": 2, "synthesis.learning_rate": 10.0})
    done = run(recipe, Network(name="raw", module=module, input=contract, classes=5), output=tmp_path / "run")
    assert done.metrics["parity"]["max_code_difference"] <= 1


@pytest.mark.parametrize("name", presets())
def test_a_preset_reads_back_as_itself(name):
    recipe = read(name)
    assert from_tables(tomllib.loads(to_toml(recipe))) == recipe
    assert from_tables(tables(recipe)) == recipe


@pytest.mark.slow
def test_the_readmes_python_example_runs(tmp_path, monkeypatch):
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    code = readme.partition("```python\n")[2].partition("```")[0]
    assert code.count("\n") >= 5
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert list(tmp_path.glob("runs/*/network.onnx"))
