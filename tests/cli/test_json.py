"""What commands write with `--json` is what the schema in the package says."""

import json
import re
from importlib import resources
from pathlib import Path

import pytest
from tests.cli.conftest import TINY

import reverie
from reverie.cli import main
from reverie.images import Images
from reverie.images.store import save_images

jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed; it comes with the extra 'test'")

SCHEMA = json.loads((resources.files("reverie.cli") / "json.schema.json").read_text(encoding="utf-8"))


def check(name, document):
    """Refuses a document that is not what the schema says of `name`."""
    jsonschema.Draft202012Validator({"$ref": f"#/$defs/{name}", "$defs": SCHEMA["$defs"]}).validate(document)


def written(capfd, name, *arguments):
    """The document of a command, and its events, both as the schema says."""
    assert main([*map(str, arguments), "--json"]) == 0
    captured = capfd.readouterr()
    document = json.loads(captured.out)
    events = [json.loads(line) for line in captured.err.splitlines()]
    check(name, document)
    for event in events:
        check("event", event)
    return document, events


@pytest.fixture
def labelled(tmp_path):
    """A file with some of the held-out digits."""
    digits = reverie.load_network("embedded:digits").held_out()
    path = tmp_path / "digits.safetensors"
    save_images(Images(inputs=digits.inputs[:64], labels=digits.labels[:64]), path)
    return path


def test_the_schema_is_one_and_every_definition_is_used():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    page = (Path(__file__).parents[2] / "docs/json.md").read_text()
    referred = set(re.findall(r"#/\$defs/(\w+)", json.dumps(SCHEMA)))
    told = set(re.findall(r"`(\w+)`", page)) | {"event"}
    assert set(SCHEMA["$defs"]) <= referred | told


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("event", {"event": "note"}),
        ("event", {"event": "began", "text": "x"}),
        ("run", {"path": "x", "state": "complete"}),
        ("evaluate", {"images": 3, "agreement": {"exported": 1.5}, "divergence": {}}),
        ("quantize", {}),
    ],
)
def test_a_wrong_document_is_not_what_it_says(name, wrong):
    with pytest.raises(jsonschema.ValidationError):
        check(name, wrong)


def test_a_run(finished):
    check("quantize", json.loads((finished / "metrics.json").read_text()))


@pytest.mark.slow
def test_quantize_without_labels(capfd, tmp_path):
    document, events = written(capfd, "quantize", "quantize", "embedded:digits", "--output", tmp_path / "run", *TINY)
    assert document["estimate"] is not None
    assert {event["event"] for event in events} >= {"start", "advance", "finish"}


@pytest.mark.slow
def test_synthesize_and_what_it_would_take(capfd, tmp_path):
    command = ["synthesize", "embedded:digits", *TINY, "--output", tmp_path / "dreams"]
    expected, _ = written(capfd, "dry_run", *command, "--dry-run")
    assert not (tmp_path / "dreams").exists()
    assert {part["stage"] for part in expected["parts"]} == {"capture", "synthesize", "measure"}
    written(capfd, "synthesize", *command)


def test_looking_at_a_run(capfd, finished, labelled, tmp_path):
    document, _ = written(capfd, "evaluate", "evaluate", finished, "--data", labelled)
    assert set(document["top1"]) == {"full_precision", "exported"}
    written(capfd, "verify", "verify", finished, "--images", 2, "--runtime", "onnxruntime")
    written(capfd, "runs", "runs", finished.parent)
    written(capfd, "compare", "compare", finished, finished, "--output", tmp_path / "page.html")


@pytest.mark.slow
def test_benchmark(capfd, finished):
    written(capfd, "benchmark", "benchmark", finished, "--repeats", 2, "--batch", 1)


def test_a_capsule(capfd, labelled, tmp_path):
    written(capfd, "capsule", "capsule", "embedded:digits", "--calibration", labelled, "--output", tmp_path / "few.safetensors")


@pytest.mark.slow
def test_a_diagnosis_and_its_remedies(capfd, finished, tmp_path):
    document, _ = written(capfd, "diagnose", "diagnose", finished, "--images", 8, "--fix", "--output", tmp_path / "fixed.toml")
    assert document["fix"]["trials"]


@pytest.mark.parametrize("command", [["inspect", "embedded:digits"], ["methods"]])
def test_what_there_is(capfd, command):
    written(capfd, command[0], *command)


def test_events_that_a_stage_and_a_note_write():
    import io

    from reverie.progress import JsonLines

    stream = io.StringIO()
    progress = JsonLines(stream)
    progress.plan({"round": 1.0})
    progress.say("as it is")
    with progress.stage("round", 2, done=1) as step:
        step(note="loss 0.4")
    progress.show(lambda: pytest.fail("lines show no pictures"))
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["event"] for line in lines] == ["note", "start", "advance", "finish"]
    for line in lines:
        check("event", line)
