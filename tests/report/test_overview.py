"""What is on the disk is read as it is, and nothing is written."""

import fcntl
import json

import pytest

from reverie.errors import ConfigError
from reverie.report import overview

RECIPE = """seed = 0
images = 128

[synthesis]
method = "zeroq"
steps = {steps}

[quantization]
placement = "integer"
weight_bits = {weights}
activation_bits = 8
end_bits = 8
sum_bits = 8

[mixed_precision]
effective_bits = {mean}
effective_activation_bits = 0.0
bit_operations = 0.0

[rounding]
method = "{rounding}"

[reconstruction]
unit = "block"

[distillation]
steps = {distillation}
after = "rounding"
"""
STAGES = ("capture", "images", "synthesize", "quantize", "export", "measure")


def metrics(*, top1=0.9, size=1000, latency=2.0, drop=0.02, low=0.01, high=0.03, agreement=0.95):
    """What `metrics.json` holds, as far as it is looked at; without `top1` there were no labels."""
    labelled = top1 is not None
    change = {"difference": -(drop or 0), "low": -high, "high": -low}
    return {
        "quantization": {"placement": "integer", "weight_bits": 4, "activation_bits": 8, "sum_bits": 8},
        "full_precision": {"top1": top1 + drop if labelled else None},
        "quantized": {"top1": top1},
        "exported": {"top1": top1},
        "difference": {"exported": change} if labelled else {},
        "estimate": None if labelled else {"drop": drop, "low": low, "high": high},
        "agreement": {
            "synthetic": {"images": 32, "quantized": 1.0, "exported": 1.0},
            **({"evaluation": {"images": 599, "quantized": 0.5, "exported": agreement}} if labelled else {}),
        },
        "bytes": {"network": 900, "packed": size, "fp32": 4 * size},
        "latency_ms": {"quantized": latency, "fp32": 2 * latency, "ratio": 2.0},
        "images": {"count": 128},
        "peak_memory_bytes": 500_000_000,
    }


def made(
    path, *, stages=STAGES, network="a:net", weights=4, mean=0.0, rounding="adaround", distillation=0, steps=100, fingerprint="f" * 16,
    evaluation="e" * 16, threads=1, only=None, **figures,
):  # fmt: skip
    """A run directory as a run leaves it, complete if all stages are done."""
    path.mkdir(parents=True, exist_ok=True)
    complete = "measure" in stages or (only is not None and "synthesize" in stages)
    identity = {"recipe": "r" * 16, "network": fingerprint, "evaluation": evaluation} | ({"only": only} if only else {})
    record = {
        "reverie": "0.1.0",
        "identity": identity,
        "versions": {"python": "3.11.7", "torch": "2.13.0", "threads": threads},
        "facts": {"network": network},
        "stages": {stage: {"seconds": 2.5} for stage in stages},
        "complete": complete,
    }
    (path / "run.json").write_text(json.dumps(record))
    text = RECIPE.format(steps=steps, weights=weights, mean=mean, rounding=rounding, distillation=distillation)
    (path / "recipe.toml").write_text(text)
    if complete:
        document = metrics(**figures) if only is None else {"images": {"count": 128}, "peak_memory_bytes": 1}
        if only is None:
            document["quantization"]["weight_bits"] = weights
        (path / "metrics.json").write_text(json.dumps(document))
    return path


def test_a_complete_run_in_figures(tmp_path):
    run = overview.look_at(made(tmp_path / "run"))
    assert (run.state, run.stage, run.network, run.bits) == ("complete", None, "a:net", "W4A8")
    assert (run.recipe, run.images) == ("zeroq, adaround by block", 128)
    assert (run.accuracy, run.full_precision) == (0.9, 0.92)
    # Lost is the other way round than gained.
    assert run.drop == (0.02, 0.01, 0.03) and not run.estimated
    assert run.agreement == (0.95, 599, "evaluation")
    assert (run.bytes, run.full_precision_bytes, run.latency_ms, run.speed) == (1000, 4000, 2.0, 2.0)
    # The set of images is a part of its stage.
    assert run.seconds == 12.5
    assert run.settings["synthesis.steps"] == 100 and run.settings["seed"] == 0


def test_without_labels_the_drop_is_the_estimate(tmp_path):
    run = overview.look_at(made(tmp_path / "run", top1=None))
    assert run.accuracy is None and run.drop == (0.02, 0.01, 0.03) and run.estimated
    assert run.agreement == (1.0, 32, "synthetic")


@pytest.mark.parametrize(
    ("settings", "bits", "methods"),
    [
        ({"weights": 8, "rounding": "nearest"}, "W8A8", "zeroq, nearest"),
        ({"mean": 3.5}, "mixed W3.5A8", "zeroq, adaround by block"),
        ({"rounding": "gptq", "distillation": 5}, "W4A8", "zeroq, gptq, distillation"),
    ],
)
def test_an_interrupted_run_says_what_it_was_to_be_and_where_it_stopped(tmp_path, settings, bits, methods):
    run = overview.look_at(made(tmp_path / "run", stages=STAGES[:3], **settings))
    assert (run.state, run.stage, run.bits, run.recipe, run.drop) == ("interrupted", "quantize", bits, methods, None)


def test_images_alone_are_complete_without_a_network(tmp_path):
    run = overview.look_at(made(tmp_path / "dreams", stages=STAGES[:3], only="images"))
    assert run.only_images and run.state == "complete" and run.bytes is None


def test_a_run_that_a_process_works_on_is_in_use_until_it_lets_go(tmp_path):
    path = made(tmp_path / "run", stages=STAGES[:1])
    with (path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert overview.look_at(path).state == "in use"
    assert overview.look_at(path).state == "interrupted"
    assert overview.look_at(path).stage == "synthesize"


@pytest.mark.parametrize("name", ["run.json", "metrics.json", "recipe.toml"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"complete": true}', b"\xff\xfe", b"images = ["])
def test_a_file_that_cannot_be_read_is_told_as_damage(tmp_path, name, content):
    path = made(tmp_path / "run")
    (path / name).write_bytes(content)
    assert overview.look_at(path).state == "damaged"


def test_runs_are_found_at_any_depth_and_nothing_is_written(tmp_path):
    for name in ("b", "deep/er/a", "c"):
        made(tmp_path / name)
    made(tmp_path / "c" / "inside")
    (tmp_path / ".hidden").mkdir()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert [run.path for run in overview.find(tmp_path)] == [str(tmp_path / name) for name in ("b", "c", "deep/er/a")]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_what_a_terminal_would_obey_is_not_repeated(tmp_path):
    run = overview.look_at(made(tmp_path / "run", network="a:\x1b]0;title\x07net\n"))
    assert run.network == "a:?]0;title?net?"


@pytest.mark.parametrize(("name", "got"), [("nowhere", "nothing there"), ("file", "a file")])
def test_what_is_no_folder_is_refused(tmp_path, name, got):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError) as caught:
        overview.find(tmp_path / name)
    assert str(caught.value) == f"{tmp_path / name}: must be a folder with runs, got {got}"
