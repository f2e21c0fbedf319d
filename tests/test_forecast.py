"""What a run would take: every stage is there, counted as the run counts it, and nothing is touched."""

import pytest
import torch

from reverie import forecast as forecasts
from reverie.cli._forecast import show
from reverie.errors import BudgetError, ConfigError
from reverie.forecast import forecast
from reverie.memory import estimate
from reverie.pipeline import run
from reverie.progress import Silent
from reverie.recipes import presets, read
from reverie.stages import as_teacher

QUICK = {"images": 20, "held_out": 6, "estimate_images": 8, "synthesis.steps": 7, "synthesis.batch": 8, "export.method": "none"}


class Counting(Silent):
    """Steps by stage."""

    def __init__(self):
        self.steps = {}

    def start(self, stage, total, done=0):
        self.name = stage

    def advance(self, amount=1, note="", *, skipped=False):
        self.steps[self.name] = self.steps.get(self.name, 0) + amount


def steps_of(found):
    return {part.work: part.steps for part in found.parts}


@pytest.mark.parametrize(
    ("preset", "settings", "works"),
    [
        (
            "zeroq",
            {},
            {
                ("synthesize", "held-out images"): ["20 images and 6 held out by zeroq"],
                ("estimate images",): ["32 images to estimate"],
            },
        ),
        ("adaround", {"reconstruction.iterations": 9}, {("round",): ["4 units rounded"]}),
        (
            "gdfq",
            {"synthesis.refine_steps": 5, "distillation.steps": 12, "reconstruction.iterations": 9},
            {("distil",): ["distillation"], ("refine", "refine held-out"): ["their pixels refined"]},
        ),
    ],
)
def test_steps_are_counted_as_the_run_counts_them(tiny_cnn, tmp_path, preset, settings, works):
    recipe, network, counting = read(preset, QUICK | {"estimate_images": 32} | settings), tiny_cnn(), Counting()
    expected = steps_of(forecast(recipe, network))
    run(recipe, network, output=tmp_path / "run", progress=counting)
    for stages, names in works.items():
        told = [steps for work, steps in expected.items() for name in names if work.startswith(name)]
        assert len(told) == len(names) and sum(told) == sum(counting.steps[stage] for stage in stages)


@pytest.mark.parametrize("preset", presets())
def test_every_preset_is_foreseen_and_the_network_stays_as_it_was(tiny_cnn, preset):
    network = tiny_cnn()
    before = {key: value.clone() for key, value in network.module.state_dict().items()}
    state = torch.get_rng_state()
    real = network.held_out() if read(preset).synthesis.needs_capsule else None
    found = forecast(read(preset, {"export.method": "none"}), network, calibration=real)
    assert all(part.seconds >= 0 for part in found.parts) and found.seconds > 0 and 0 < found.timed_share <= 1
    assert {part.stage for part in found.parts} == {"capture", "synthesize", "quantize", "export", "measure"}
    # The libraries alone take more than this.
    assert found.memory.peak > 150e6
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in network.module.state_dict().items())


def test_what_is_timed_follows_the_steps(tiny_cnn, monkeypatch):
    monkeypatch.setattr(forecasts, "step_costs", lambda recipe, *_, **__: dict.fromkeys(forecasts.learning_steps(recipe), 0.5))
    recipe = read("adaround", QUICK | {"synthesis.steps": 40, "reconstruction.iterations": 60})
    seconds = {part.work: part.seconds for part in forecast(recipe, tiny_cnn()).parts if part.known == "timed"}
    assert seconds["20 images and 6 held out by zeroq"] == 20
    assert seconds["4 units rounded"] == 30
    # With labels there is nothing to estimate.
    network = tiny_cnn()
    assert not any("estimate" in part.work for part in forecast(recipe, network, evaluation=network.held_out()).parts)
    shortened = forecast(recipe, network, budget=25 / 60)
    assert shortened.budget.factor == pytest.approx(0.5)
    assert steps_of(shortened)["4 units rounded"] == 4 * 30


def test_memory_grows_with_what_is_kept_up_to_the_cache(tiny_cnn):
    def memory(**settings):
        keys = {key.replace("__", "."): value for key, value in settings.items()}
        return forecast(read("qdrop", QUICK | {"reconstruction.iterations": 9} | keys), tiny_cnn()).memory

    few = memory(calibration_images=4)
    many = memory(images=100_000, calibration_images=100_000)
    capped = memory(images=100_000, calibration_images=100_000, reconstruction__cache_gib=0.5)
    assert few.peak < capped.peak < many.peak and many.mapped < capped.mapped
    # Word for word what a run says of itself.
    keys = {"reconstruction.iterations": 9, "images": 100_000, "calibration_images": 100_000}
    assert many == estimate(read("qdrop", QUICK | keys), as_teacher(tiny_cnn()), {})


def test_real_images_that_are_kept_apart_are_forecast_too(tiny_cnn):
    apart = {"real_apart": True, "distillation.steps": 3, "distillation.after": "rounding"}
    recipe, real = read("qdrop", QUICK | apart | {"reconstruction.iterations": 3}), tiny_cnn().held_out().evenly(8)
    assert "quantize" in {part.stage for part in forecast(recipe, tiny_cnn(), calibration=real).parts}
    found = forecast(recipe, tiny_cnn(), calibration=real, only_images=True)
    assert {part.stage for part in found.parts} == {"capture", "synthesize", "measure"}


def test_files_that_the_cache_has_no_room_for_are_told(tiny_cnn, capsys, tmp_path):
    many = {"reconstruction.iterations": 9, "images": 20_000, "calibration_images": 20_000, "reconstruction.cache_gib": 0.5}
    found = forecast(read("qdrop", QUICK | many), tiny_cnn())
    show(found, tmp_path, {}, json=False)
    (told,) = [part for part in capsys.readouterr().out.splitlines() if part.startswith("memory: ")]
    assert told == f"{found.memory.told()} from the network, the batches and the images held"
    assert "GiB of files" in told and found.as_dict()["file_bytes"] == found.memory.mapped > 0
    # Less memory is more of a file.
    limit = found.memory.peak / 2**30 - 0.2
    less = forecast(read("qdrop", QUICK | many), tiny_cnn(), memory_limit=limit).memory
    assert less.peak <= limit * 2**30 + 1 and less.peak + less.mapped == found.memory.peak + found.memory.mapped


def test_images_alone_take_no_quantization(tiny_cnn):
    found = forecast(read("gdfq", QUICK), tiny_cnn(), only_images=True)
    assert {part.stage for part in found.parts} == {"capture", "synthesize", "measure"}
    with pytest.raises(ConfigError, match=r"^images must be at least 1, got 0$"):
        forecast(read("zeroq", {"images": 0}), tiny_cnn(), only_images=True)


def test_what_a_run_would_refuse_is_refused(tiny_cnn):
    with pytest.raises(ConfigError, match=r"^bits\.weights must name "):
        forecast(read("zeroq", QUICK | {"bits.weights": {"nowhere": 4}}), tiny_cnn())
    with pytest.raises(BudgetError, match=r"^budget must be at least "):
        forecast(read("adaround", QUICK | {"reconstruction.iterations": 900}), tiny_cnn(), budget=1e-5)
