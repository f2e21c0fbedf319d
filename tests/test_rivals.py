"""The side-by-side benchmark: which places are exceptions, what is kept, what a failure leaves."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from torch import fx, nn

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def load(file):
    spec = importlib.util.spec_from_file_location(f"benchmark_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their own module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def rivals(tmp_path, monkeypatch):
    module = load(BENCHMARKS / "rivals.py")
    monkeypatch.setattr(module, "BUILD", tmp_path)
    return module


RECORD = {
    "seconds": {"images": 60.0, "quantize": 30.0},
    "peak_memory_bytes": 2**30,
    "full_precision": 0.9,
    "quantized": 0.88,
    "settings": "some",
    "placement": {"weights": {"a": 4, "b": 8}, "activations": {"x": 8}},
    "versions": {"torch": "2"},
    "commands": ["one"],
}


class Residual(nn.Module):
    """Two sums: of a branch that only they read, and of one that a layer reads as well."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.branch, self.branch_norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.read, self.pool, self.drop = nn.Conv2d(4, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Dropout()
        self.flat, self.head = nn.Flatten(), nn.Linear(4, 2)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        x = x + self.branch_norm(self.branch(x))
        y = self.read(x)
        y = y + y.relu()
        return self.head(self.drop(self.flat(self.pool(y))))


def test_exceptions_are_the_ends_and_what_only_sums_read():
    found = load(BENCHMARKS / "rivals" / "task.py").places(fx.symbolic_trace(Residual()))
    assert (found.first.name, found.last.name) == ("stem", "head")
    assert [node.name for node in found.last_reads] == ["drop", "flat", "pool"]
    assert [node.name for node in found.summed] == ["branch"]


def test_a_row_is_kept_and_a_failed_one_is_tried_anew(rivals, monkeypatch):
    calls = []

    def tool(name, assets, seed):
        calls.append(name)
        if len(calls) == 1:
            raise rivals.ToolError("no more memory")
        return RECORD

    monkeypatch.setitem(rivals.TOOLS, "mct", tool)
    assert rivals.measured("resnet20-44-mct", Path(), 0) == {"error": "no more memory"}
    assert rivals.found("resnet20-44-mct") == [{"error": "no more memory"}]
    assert rivals.measured("resnet20-44-mct", Path(), 0) == RECORD
    assert rivals.measured("resnet20-44-mct", Path(), 0) == RECORD
    assert len(calls) == 2
    rivals.measured("resnet20-44-mct", Path(), 0, again=True)
    assert len(calls) == 3


def test_seeds_of_one_row_are_not_those_of_another_whose_name_goes_on(rivals):
    for name in ("resnet20-44-mct-0", "resnet20-44-mct-1", "resnet20-44-mct-gptq-0"):
        (rivals.BUILD / name).mkdir()
        (rivals.BUILD / name / "row.json").write_text(json.dumps(RECORD | {"settings": name}))
    assert [record["settings"] for record in rivals.found("resnet20-44-mct")] == ["resnet20-44-mct-0", "resnet20-44-mct-1"]


def test_the_table_has_means_and_says_what_failed(rivals):
    row = rivals.ROWS["resnet20-44-mct"]
    better = RECORD | {"quantized": 0.89, "seconds": {"images": 120.0, "quantize": 30.0}}
    assert rivals.line(row, [RECORD, better, {"error": "killed"}]) == (
        "| MCT, data generation + PTQ | 90.00 | 88.50 ± 0.71 | 1.50 ± 0.71 | 2.0 | 1.5 | 1.00 | 2; 1 failed |"
    )
    assert rivals.line(row, [{"error": "killed"}]) == "| MCT, data generation + PTQ | | failed: killed | | | | | 0 |"
    assert rivals.grids(RECORD["placement"]) == "2 weights (1 of 4 bits, 1 of 8 bits), 1 activations (1 of 8 bits)"


def test_a_failing_command_is_told_by_its_last_line_and_where_the_rest_is(rivals, monkeypatch, tmp_path):
    monkeypatch.setattr(rivals, "ROOT", tmp_path)
    with pytest.raises(rivals.ToolError) as caught:
        rivals.call([sys.executable, "-c", "raise SystemExit('first\\nthe cause')"], tmp_path / "row" / "log.txt")
    assert str(caught.value) == "the cause (row/log.txt)"
