"""Logs hold what the run told, and change nothing of it; read back with the tools' own readers."""

import json
import sys

import pytest

from reverie import loggers
from reverie.cli import main
from reverie.errors import ConfigError
from reverie.loggers import logged
from reverie.progress import Silent, loss_note, loss_of

TINY = [
    "--images",
    "8",
    "--weight-bits",
    "4",
    "--set",
    "synthesis.steps=3",
    "--set",
    "held_out=4",
    "--set",
    "estimate_images=0",
]
COMMAND = ["quantize", "embedded:digits", "--recipe", "adaround", *TINY, "--set", "reconstruction.iterations=2"]


class Kept:
    """A logger that keeps what it is told."""

    library = "json"

    def __init__(self):
        self.told = []

    def open(self, run, name):
        self.told.append(("open", run.name, name))
        return self

    def loss(self, name, step, value):
        self.told.append((name, step, value))

    def result(self, figures, settings, run):
        self.told.append((dict(figures), dict(settings), run.name))

    def close(self, *, failed):
        self.told.append(("close", failed))


def test_a_loss_travels_as_a_note():
    assert loss_note(0.41726) == "loss 0.4173"
    for value in (0.41726, 1e-9, 12345.6, -3.0):
        assert loss_of(loss_note(value)) == pytest.approx(value, rel=1e-3)
    assert loss_of("") is None
    assert loss_of("glossy 3") is None


def test_losses_go_on_by_stage_and_step_and_what_was_skipped_has_none(tmp_path):
    kept = Kept()
    with logged(Silent(), [kept], tmp_path, "tiny") as progress:
        progress.plan({"distil": 1.0})
        for _ in range(2):
            with progress.stage("distil", total=9, done=4) as step:
                step(2, "loss 9", skipped=True)
                step(note="loss 0.5")
                step()
                step(note="loss 0.25")
        progress.result(
            {"exported": {"top1": 0.5}, "bytes": {"fp32": 7}, "network": {"classes": 3}},
            {"seed": 0, "rounding": {"method": "a"}},
        )
    assert kept.told == [
        ("open", tmp_path.name, "tiny"),
        ("loss/distil", 7, 0.5),
        ("loss/distil", 9, 0.25),
        ("loss/distil-2", 7, 0.5),
        ("loss/distil-2", 9, 0.25),
        ({"exported.top1": 0.5, "bytes.fp32": 7.0}, {"seed": "0", "rounding.method": "a"}, tmp_path.name),
        ("close", False),
    ]


def test_a_run_that_fails_is_logged_as_failed(tmp_path):
    kept = Kept()
    with pytest.raises(ZeroDivisionError), logged(Silent(), [kept], tmp_path, "tiny") as progress:
        progress.plan({})
        raise ZeroDivisionError
    assert kept.told[-1] == ("close", True)


def test_nothing_is_opened_before_the_run_directory_is_ours(tmp_path):
    kept = Kept()
    with pytest.raises(ConfigError), logged(Silent(), [kept], tmp_path, "tiny"):
        raise ConfigError("the folder is someone else's")
    assert kept.told == []


def test_an_unknown_logger_is_refused_with_the_choices():
    with pytest.raises(ConfigError) as caught:
        loggers.load("tensorbord")
    assert str(caught.value) == "unknown logger 'tensorbord'; choose one of mlflow, tensorboard, or did you mean 'tensorboard'?"


def test_a_logger_without_its_library_names_the_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        loggers.load("mlflow")
    assert str(caught.value) == "logger 'mlflow': must be installed, got no module 'mlflow'; pip install 'reverie[mlflow]'"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_tensorboard_reads_back_losses_figures_and_images_and_no_byte_is_changed(tmp_path):
    reader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed (extra 'tensorboard')"
    )
    pytest.importorskip("sklearn", reason="scikit-learn is not installed (extra 'digits')")
    # Files for runtimes are not what is logged, and proving them takes longest.
    command = [*COMMAND, "--set", "export.method=none"]
    assert main([*command, "--output", str(tmp_path / "logged"), "--log", "tensorboard"]) == 0
    events = reader.EventAccumulator(str(tmp_path / "logged" / "tensorboard")).Reload()
    assert {"loss/synthesize", "loss/held-out images", "loss/round"} <= set(events.Tags()["scalars"])
    curve = events.Scalars("loss/round")
    # Two iterations of each of 16 layers.
    assert [point.step for point in curve] == list(range(1, 33))
    metrics = json.loads((tmp_path / "logged" / "metrics.json").read_text())
    assert events.Scalars("bytes/network")[0].value == metrics["bytes"]["network"]
    assert len(events.Images("images")) == 1
    assert "synthesis.method = zeroq" in events.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0].decode()
    assert main([*command, "--output", str(tmp_path / "plain")]) == 0
    for name in ("images.safetensors", "network.safetensors"):
        assert (tmp_path / "logged" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_mlflow_reads_back_losses_figures_settings_and_the_report(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed (extra 'mlflow')")
    from reverie.loggers.mlflow import MLflow

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    run = tmp_path / "run"
    run.mkdir()
    (run / "report.html").write_text("<p>")
    with logged(Silent(), [MLflow()], run, "tiny") as progress:
        progress.plan({})
        with progress.stage("distil", total=1200) as step:
            for number in range(1200):
                step(note=loss_note(1 / (1 + number)))
        progress.result({"exported": {"top1": 0.5}}, {"seed": 0, "rounding": {"method": "adaround"}})
    client = mlflow.MlflowClient()
    (found,) = client.search_runs([client.get_experiment_by_name("reverie").experiment_id])
    assert (found.info.status, found.info.run_name, found.data.tags["network"]) == ("FINISHED", "run", "tiny")
    assert found.data.metrics["exported.top1"] == 0.5
    assert found.data.params == {"seed": "0", "rounding.method": "adaround"}
    history = client.get_metric_history(found.info.run_id, "loss/distil")
    assert [point.step for point in history] == list(range(1, 1201))
    assert [part.path for part in client.list_artifacts(found.info.run_id)] == ["report.html"]
    assert "mlflow" in sys.modules
