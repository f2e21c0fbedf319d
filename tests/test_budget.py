"""A budget shortens what learns, all of it alike, once, and nothing else."""

import json
import tomllib
from dataclasses import replace

import pytest
import torch

from reverie import budget
from reverie.budget import Schedule, fit, learning_steps, step_costs
from reverie.checkpoints import Forgetful
from reverie.errors import ConfigError
from reverie.pipeline import run
from reverie.progress import Silent
from reverie.randomness import Seed
from reverie.recipes import from_tables, presets, read, tables
from reverie.stages import as_teacher, with_capsule
from reverie.synthesis.fdda import Fdda
from reverie.synthesis.gdfq import Gdfq

QUICK = {"images": 16, "held_out": 8, "synthesis.steps": 20, "synthesis.batch": 8, "quantization.weight_bits": 4}
FILES = ("images.safetensors", "network.safetensors")


class Saying(Silent):
    """Keeps what is said, and the stages with their totals."""

    def __init__(self):
        self.said, self.stages = [], []

    def say(self, text):
        self.said.append(text)

    def start(self, stage, total, done=0):
        self.stages.append((stage, total))


def costing(seconds):
    """A measurement that finds `seconds` for a step of each stage."""
    return lambda recipe, *_, **__: dict.fromkeys(learning_steps(recipe), seconds)


def same_bytes(first, second):
    return all((first / file).read_bytes() == (second / file).read_bytes() for file in FILES)


@pytest.fixture(scope="module")
def teacher(tiny_cnn):
    return as_teacher(tiny_cnn())


@pytest.fixture
def rounded():
    return read("adaround", QUICK | {"reconstruction.iterations": 40, "export.method": "none"})


@pytest.mark.parametrize(("preset", "placement"), [*((name, "integer") for name in presets()), ("gdfq", "literature")])
def test_every_stage_that_learns_is_timed_and_nothing_is_touched(tiny_cnn, teacher, preset, placement):
    more = {"quantization.placement": placement, "export.method": "none", "clipping.images": 3, "clipping.steps": 4}
    recipe, real = read(preset, more), tiny_cnn().held_out()
    teacher = with_capsule(teacher, recipe, real, None)
    weights = {name: value.clone() for name, value in teacher.graph.state_dict().items()}
    state, modes = torch.get_rng_state(), [module.training for module in teacher.graph.modules()]
    progress = Saying()
    costs = step_costs(recipe, teacher, real, progress=progress)
    assert set(costs) == set(learning_steps(recipe)) and min(costs.values()) > 0
    assert progress.stages == [("time steps", len(costs))]
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in teacher.graph.modules()] == modes
    after = teacher.graph.state_dict()
    assert all(torch.equal(after[name], value) and not after[name].requires_grad for name, value in weights.items())


@pytest.mark.parametrize(("synthetic", "cost"), [("kept", 7.0), ("fresh", 12.0), ("both", 12.0)])
def test_a_generator_that_goes_on_training_costs_a_step_of_its_own(teacher, monkeypatch, synthetic, cost):
    for stage, seconds in (("_synthesis", 5.0), ("_refinement", 1.0), ("_distillation", 7.0), ("_reconstruction", 2.0)):
        monkeypatch.setattr(budget, stage, lambda *_, seconds=seconds: seconds)
    costs = step_costs(read("gdfq", {"distillation.synthetic": synthetic}), teacher, None, progress=Silent())
    assert costs == {
        "synthesis.steps": 5.0,
        "synthesis.refine_steps": 1.0,
        "distillation.steps": cost,
        "reconstruction.iterations": 2.0,
    }


def test_no_stage_is_left_with_fewer_than_ten_steps_for_which_the_others_give_more():
    recipe = read("gdfq", {"synthesis.steps": 400, "synthesis.refine_steps": 40, "distillation.steps": 4})
    own = learning_steps(recipe)
    assert own["distillation.steps"] == 4
    costs = dict.fromkeys(own, 0.1) | {"synthesis.steps": 1.0}
    for minutes in (0.5, 1.0, 3.0):
        steps = budget.schedule(recipe, costs, minutes).steps
        assert steps["distillation.steps"] == 4 and steps["synthesis.refine_steps"] >= 10
        assert sum(steps[key] * costs[key] for key in own) == pytest.approx(60 * minutes, abs=0.6)


def test_all_stages_are_shortened_by_the_same_factor(teacher):
    settings = {"synthesis.steps": 4000, "reconstruction.iterations": 2000, "clipping.images": 4, "clipping.steps": 1000}
    recipe = read("adaround", QUICK | settings)
    own = learning_steps(recipe)
    assert own == {"synthesis.steps": 4000, "clipping.steps": 1000, "reconstruction.iterations": 2000}
    costs = step_costs(recipe, teacher, None, progress=Silent())
    # A tenth of what it takes, so that a machine whose load changes meanwhile does not matter.
    minutes = sum(own[key] * costs[key] for key in own) / 600
    schedule = fit(recipe, teacher, None, minutes, progress=Silent())
    assert 0 < schedule.factor < 1
    assert schedule.steps == {key: max(round(schedule.factor * number), 1) for key, number in own.items()}
    shorter = schedule.shorten(recipe)
    assert learning_steps(shorter) == schedule.steps
    assert schedule.shorten(shorter) == shorter
    assert (
        replace(shorter, synthesis=recipe.synthesis, clipping=recipe.clipping, reconstruction=recipe.reconstruction) == recipe
    )


def test_steps_of_distillation_and_of_a_generator_count_once(teacher, monkeypatch):
    steps = {"synthesis.steps": 400, "synthesis.refine_steps": 40, "distillation.steps": 560}
    recipe = read("gdfq", steps | {"rounding.method": "nearest"})
    monkeypatch.setattr(budget, "step_costs", costing(0.6))
    schedule = fit(recipe, teacher, None, 2.5, progress=Silent())
    assert schedule == Schedule(2.5, 0.25, {"synthesis.steps": 100, "synthesis.refine_steps": 10, "distillation.steps": 140})
    assert schedule.told(recipe) == (
        "budget 2.5 min: 400 -> 100 steps of synthesis, 40 -> 10 of refinement, 560 -> 140 of distillation "
        "(the recipe's own would take about 10 min 0 s)"
    )


def test_a_recipe_without_anything_learned_fits_any_budget(teacher):
    recipe = read("noise")
    assert fit(recipe, teacher, None, 1e-9, progress=Silent()) == Schedule(1e-9, 1.0, {})


def test_a_budget_that_is_too_small_is_refused(tiny_cnn, teacher, rounded, monkeypatch, tmp_path):
    monkeypatch.setattr(budget, "step_costs", costing(0.7))
    with pytest.raises(ConfigError) as caught:
        fit(rounded, teacher, None, 0.2, progress=Silent())
    # 10 steps of each of two stages are 14 s.
    assert str(caught.value) == (
        "budget must be at least 0.3 min for this network and recipe here, got 0.2; "
        "give it more, or choose a recipe whose steps cost less"
    )
    assert fit(rounded, teacher, None, 0.3, progress=Silent()).steps == {"synthesis.steps": 10, "reconstruction.iterations": 16}
    with pytest.raises(ConfigError, match=r"budget must be at least 0\.3 min"):
        run(rounded, tiny_cnn(), output=tmp_path / "small", budget=0.2)
    # So that a larger one can go there.
    assert [path.name for path in (tmp_path / "small").iterdir()] == [".lock"]
    with pytest.raises(ConfigError) as caught:
        run(rounded, tiny_cnn(), output=tmp_path / "run", budget=0.0)
    assert str(caught.value) == ("budget must be a number of minutes above 0, got 0; leave it out for the recipe's own steps")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_large_budget_changes_nothing(tiny_cnn, rounded, tmp_path):
    progress = Saying()
    free = run(rounded, tiny_cnn(), output=tmp_path / "free")
    rich = run(rounded, tiny_cnn(), output=tmp_path / "rich", budget=600.0, progress=progress)
    assert progress.said[1:] == ["budget 600 min: the recipe's own steps fit"]
    assert rich.metrics["budget"] == {"minutes": 600, "factor": 1.0, "steps": learning_steps(rounded)}
    assert "budget" not in free.metrics
    assert same_bytes(free.path, rich.path)
    with pytest.raises(ConfigError) as caught:
        run(rounded, tiny_cnn(), output=rich.path, budget=60.0)
    assert "got one with budget '600 min' instead of '60 min'; " in str(caught.value)


def test_a_resumed_run_keeps_the_numbers_of_its_first_process(tiny_cnn, rounded, tmp_path, monkeypatch):
    class Stopped(Exception):
        pass

    class Stopping(Saying):
        def advance(self, amount=1, note="", *, skipped=False):
            if self.stages[-1][0] == "round":
                raise Stopped

    # 20 and 40 steps of 1.2 s are 1.2 min.
    monkeypatch.setattr(budget, "step_costs", costing(1.2))
    with pytest.raises(Stopped):
        run(rounded, tiny_cnn(), output=tmp_path / "run", budget=0.6, progress=Stopping())
    monkeypatch.setattr(budget, "step_costs", costing(1e6))
    progress = Saying()
    resumed = run(rounded, tiny_cnn(), output=tmp_path / "run", budget=0.6, progress=progress)
    steps = {"synthesis.steps": 10, "reconstruction.iterations": 20}
    assert resumed.metrics["budget"] == {"minutes": 0.6, "factor": 0.5, "steps": steps}
    assert progress.said[1:] == [
        "budget 0.6 min: 20 -> 10 steps of synthesis, 40 -> 20 of reconstruction (the recipe's own would take about 1 min 12 s)"
    ]
    # A look at the complete run leaves its recipe alone as well.
    assert run(rounded, tiny_cnn(), output=tmp_path / "run", budget=0.6).metrics == json.loads(json.dumps(resumed.metrics))
    recipe = from_tables(tomllib.loads((resumed.path / "recipe.toml").read_text()))
    changed = tables(rounded)
    changed["synthesis"]["steps"], changed["reconstruction"]["iterations"] = 10, 20
    assert tables(recipe) == changed
    assert same_bytes(run(recipe, tiny_cnn(), output=tmp_path / "without").path, resumed.path)


def test_a_generator_says_its_size_when_it_is_made(teacher):
    progress = Saying()
    method = Gdfq(steps=1, batch=2, width=16)
    stream = method.stream(teacher, seed=Seed(0), checkpoints=Forgetful(), progress=progress)
    count = stream.generator.parameter_count
    assert progress.said == [
        f"gdfq: generator with {count / 1e6:.3g} M parameters, about {16 * count / 1e6:.1f} MB with gradients and Adam's "
        "moments (width 16)"
    ]
    # The literature's for ImageNet.
    assert Fdda(width=128)._size_text(41_405_315) == (
        "generator with 41.4 M parameters, about 0.66 GB with gradients and Adam's moments "
        "(width 128; synthesis.width=64 is lighter)"
    )
