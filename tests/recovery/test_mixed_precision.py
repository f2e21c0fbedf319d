"""Bits of every tensor: within the budgets, where they are needed, and the same after a resume."""

import json
import sys
import tomllib

import pytest
import torch
from torch import nn

from reverie import pipeline
from reverie.cli import main
from reverie.errors import ConfigError, ModelError
from reverie.export._packed import stored_bits
from reverie.graph.capture import capture
from reverie.graph.placement import Bits, place
from reverie.observers.minmax import MinMax
from reverie.progress import Silent
from reverie.randomness import Seed
from reverie.recipes import from_tables, read, tables, to_toml
from reverie.recovery.mixed_precision import Decision, MixedPrecision, check_budgets, choose_bits
from reverie.report import outcome

QUICK = {"images": 16, "held_out": 8, "synthesis.steps": 20, "synthesis.batch": 8}


@pytest.fixture(scope="module")
def inputs(tiny_cnn):
    return tiny_cnn().held_out().inputs[:32]


def decide(teacher, inputs, fixed=None, **limits):
    fixed = fixed or Bits()
    student = place(teacher, "integer", weight_bits=4, activation_bits=8, end_bits=8, bits=fixed)
    return choose_bits(
        teacher,
        student,
        inputs,
        MixedPrecision(**{key: float(value) if key != "widths" else value for key, value in limits.items()}),
        shape=tuple(inputs.shape[1:]),
        fixed=fixed,
        activations=MinMax(),
        weights=MinMax(),
        seed=Seed(0),
        progress=Silent(),
    )


def mean(decision, kind):
    bits = decision.bits.weights if kind == "weight" else decision.bits.activations
    parts = [part for part in decision.sensitivities if part.kind == kind]
    return sum(part.elements * bits[part.name] for part in parts) / sum(part.elements for part in parts)


@pytest.mark.parametrize("limit", [2, 2.5, 3, 4.1, 8])
def test_the_mean_over_all_weights_is_what_is_reported_and_within_the_budget(teacher, inputs, limit):
    decision = decide(teacher, inputs, effective_bits=limit)
    assert decision.spent["effective_bits"] == mean(decision, "weight") <= limit
    assert set(decision.bits.activations.values()) == {8}
    if limit == 8:
        assert set(decision.bits.weights.values()) == {8}


def test_only_the_widths_allowed_are_chosen(teacher, inputs):
    decision = decide(teacher, inputs, effective_bits=5, widths=(4, 8))
    assert set(decision.bits.weights.values()) == {4, 8} and decision.spent["effective_bits"] <= 5


def test_activations_have_a_budget_of_their_own(teacher, inputs):
    decision = decide(teacher, inputs, effective_activation_bits=4)
    assert decision.spent["effective_activation_bits"] == mean(decision, "activation") <= 4
    # Those of a student of W4A8 with 8-bit ends.
    assert list(decision.bits.weights.values()) == [8, 4, 4, 8]


def test_bit_operations_choose_both(teacher, inputs):
    decision = decide(teacher, inputs, bit_operations=16)
    assert decision.spent["bit_operations"] <= 16
    assert len(set(decision.bits.weights.values())) > 1 or len(set(decision.bits.activations.values())) > 1
    student = place(teacher, "integer", weight_bits=8, activation_bits=8)
    counts = {"conv2d": 16 * 16 * 216, "conv2d_1": 8 * 8 * 1152, "conv2d_2": 4 * 4 * 2304, "linear": 48}
    operations = dict(zip(student.layers, counts.values(), strict=True))
    products = (
        count * decision.bits.weights[name] * decision.bits.activations[student.layers[name].source]
        for name, count in operations.items()
    )
    assert decision.spent["bit_operations"] == pytest.approx(sum(products) / sum(operations.values()))


def test_fixed_bits_stay(teacher, inputs):
    student = place(teacher, "integer", weight_bits=8, activation_bits=8)
    last = list(student.layers)[-1]
    decision = decide(teacher, inputs, Bits(weights={last: 7}), effective_bits=3)
    assert decision.bits.weights[last] == 7


def test_a_decision_survives_json(teacher, inputs):
    decision = decide(teacher, inputs, effective_bits=3)
    assert Decision.from_dict(json.loads(json.dumps(decision.as_dict()))) == decision


def test_a_budget_below_the_least_is_refused(teacher):
    student = place(teacher, "integer", weight_bits=4, activation_bits=8)
    fixed = Bits(weights=dict.fromkeys(list(student.layers)[:2], 8))
    student = place(teacher, "integer", weight_bits=4, activation_bits=8, bits=fixed)
    with pytest.raises(ConfigError) as caught:
        check_budgets(teacher, student, (3, 16, 16), MixedPrecision(effective_bits=3.0), fixed)
    # (1,368 weights of 8 bits and 2,352 of 2) / 3,720
    tensors = len(student.layers)
    assert str(caught.value) == (
        f"mixed_precision.effective_bits must be at least 4.21 for this network (2 of {tensors} tensors have "
        "fixed bits), got 3; raise it, or let tensors have fewer bits"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"effective_bits": 1.5}, "effective_bits must be 2 to 8, or 0 for no limit, got 1.5"),
        ({"effective_activation_bits": 9.0}, "effective_activation_bits must be 2 to 8, or 0 for no limit, got 9"),
        ({"bit_operations": 3.0}, "bit_operations must be 4 to 64, or 0 for no limit, got 3"),
        ({"images": 1}, "images must be at least 2, got 1"),
        ({"widths": (4, 9)}, "widths must be some of 2 to 8, got [4, 9]"),
    ],
)
def test_what_no_bits_can_meet_is_refused_at_once(settings, message):
    with pytest.raises(ConfigError) as caught:
        MixedPrecision(**settings)
    assert str(caught.value) == message


def test_a_recipe_with_bits_of_single_tensors_survives_toml():
    mixed = {"mixed_precision.effective_bits": 3.5, "mixed_precision.widths": [4, 8]}
    recipe = read("zeroq", {"bits.weights": {"fc": 8, "layer1_0_conv1": 3}} | mixed)
    assert from_tables(tomllib.loads(to_toml(recipe))) == recipe
    assert tables(recipe)["bits"] == {"weights": {"fc": 8, "layer1_0_conv1": 3}, "activations": {}}
    assert recipe.mean_bits == (3.5, 8)


def test_a_run_has_the_bits_that_it_says_also_after_a_resume(tiny_cnn, tmp_path):
    recipe = read("adaround", QUICK | {"reconstruction.iterations": 5, "mixed_precision.effective_bits": 3})
    whole = pipeline.run(recipe, tiny_cnn(), output=tmp_path / "whole")
    told = whole.metrics["mixed_precision"]
    assert told["effective_bits"] <= 3
    decision = Decision.from_dict(told)
    assert stored_bits(whole.path / "network.safetensors") == decision.bits
    assert whole.metrics["parity"]["max_code_difference"] <= 1
    assert "Which tensors need their bits?" in (whole.path / "report.html").read_text()

    class Stopped(Exception):
        pass

    class Stopping(Silent):
        def start(self, stage, total, done=0):
            if stage == "round":
                raise Stopped

    stages = []

    class Watching(Silent):
        def start(self, stage, total, done=0):
            stages.append(stage)

    with pytest.raises(Stopped):
        pipeline.run(recipe, tiny_cnn(), output=tmp_path / "stopped", progress=Stopping())
    resumed = pipeline.run(recipe, tiny_cnn(), output=tmp_path / "stopped", progress=Watching())
    assert "sensitivity" not in stages and "round" in stages
    assert resumed.metrics["mixed_precision"] == json.loads(json.dumps(told))
    for file in ("network.safetensors", "network.onnx"):
        assert (resumed.path / file).read_bytes() == (whole.path / file).read_bytes()


def test_bits_of_a_tensor_that_is_not_there_leave_nothing_behind(tiny_cnn, tmp_path):
    recipe = read("zeroq", QUICK | {"bits.weights": {"nowhere": 3}})
    with pytest.raises(ConfigError, match=r"^bits\.weights must name layers with weights, got 'nowhere'; "):
        pipeline.run(recipe, tiny_cnn(), output=tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists()


def test_without_scipy_the_run_is_refused_before_anything_is_done(tiny_cnn, monkeypatch, tmp_path):
    class Missing:
        def find_spec(self, name, path=None, target=None):
            if name == "scipy":
                raise ModuleNotFoundError("No module named 'scipy'", name="scipy")

    for name in [name for name in sys.modules if name.partition(".")[0] == "scipy"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    recipe = read("zeroq", QUICK | {"mixed_precision.effective_bits": 3})
    with pytest.raises(ModelError) as caught:
        pipeline.run(recipe, tiny_cnn(), output=tmp_path / "run")
    assert str(caught.value) == (
        "scipy must be installed, got no module 'scipy'; install Reverie with its extra 'mixed': pip install -e '.[mixed]' in its folder"
    )
    assert not (tmp_path / "run").exists()


def test_both_kinds_of_bits_on_the_command_line_are_refused(capsys):
    assert main(["quantize", "embedded:digits", "--weight-bits", "4", "--effective-bits", "3.5"]) == 1
    assert (
        capsys.readouterr()
        .err.strip()
        .endswith("--effective-bits must be without --weight-bits, got 3.5 and 4; leave one of them out")
    )


def test_bits_that_no_grid_has_are_refused_on_the_command_line(capsys):
    assert main(["quantize", "embedded:digits", "--effective-bits", "1.5"]) == 1
    assert (
        capsys.readouterr()
        .err.strip()
        .endswith("recipe adaround: [mixed_precision]: effective_bits must be 2 to 8, or 0 for no limit, got 1.5")
    )


@pytest.fixture(scope="module")
def in_float():
    """A student without any activation on a grid: there is nothing that clips."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)]
        graph = capture(nn.Sequential(*layers).eval(), (3, 16, 16))
    student = place(graph, "literature", weight_bits=4, activation_bits=4)
    assert not student.activations
    return graph, student


def test_without_activations_on_grids_weights_are_chosen_and_told(in_float, inputs):
    graph, student = in_float
    settings = MixedPrecision(effective_bits=4.0)
    decision = choose_bits(
        graph,
        student,
        inputs,
        settings,
        shape=tuple(inputs.shape[1:]),
        fixed=Bits(),
        activations=MinMax(),
        weights=MinMax(),
        seed=Seed(0),
        progress=Silent(),
    )
    assert set(decision.spent) == {"effective_bits", "bit_operations"}
    told = decision.as_dict()
    assert Decision.from_dict(told) == decision
    text = outcome.mixed_precision_text(told)
    assert text.endswith(" bit operations a multiply-accumulate") and "activation" not in text
    assert outcome.bits_text({"mixed_precision": told}).endswith("A32")


def test_a_budget_of_what_is_not_there_is_refused(in_float):
    graph, student = in_float
    with pytest.raises(ConfigError) as caught:
        check_budgets(graph, student, (3, 16, 16), MixedPrecision(effective_activation_bits=4.0), Bits())
    assert str(caught.value) == (
        "mixed_precision.effective_activation_bits must be 0 for a student that has no such tensors on a grid, got 4; leave it out"
    )
