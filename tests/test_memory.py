"""The peak is estimated from the network, and a limit is kept or refused, with the same result."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from reverie import memory
from reverie.errors import ConfigError
from reverie.forecast import forecast
from reverie.interrupts import Interrupted
from reverie.models import InputContract, Network
from reverie.pipeline import run, run_synthesis
from reverie.progress import Silent
from reverie.recipes import read
from reverie.stages import as_teacher

QUICK = {"images": 16, "held_out": 8, "estimate_images": 8, "synthesis.steps": 4, "synthesis.batch": 8}


def test_activations_are_counted_tensor_by_tensor_and_views_are_not():
    module = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)).eval()
    contract = InputContract(channels=3, height=6, width=6, mean=(0.5,) * 3, std=(0.25,) * 3)
    total, largest = memory._activations(as_teacher(Network(name="n", module=module, input=contract, classes=5)))
    assert (total, largest) == (4 * (8 * 36 + 8 * 36 + 5), 4 * 8 * 36)


def test_the_estimate_grows_with_what_it_depends_on(tiny_cnn):
    network = as_teacher(tiny_cnn())

    def peak(preset="zeroq", **settings):
        return memory.estimate(read(preset, {key.replace("__", "."): value for key, value in settings.items()}), network, {})

    small = peak(synthesis__batch=8)
    assert peak(synthesis__batch=64).stages["synthesize"] > small.stages["synthesize"]
    assert peak(images=4096).peak - peak(images=64).peak >= 4 * 3 * 16 * 16 * (4096 - 64)
    held = memory.estimate(read("zeroq"), network, {"evaluation": tiny_cnn().held_out()})
    assert held.stages["measure"] - peak().stages["measure"] == 300 * 4 * 3 * 16 * 16
    real = {"calibration": tiny_cnn().held_out()}
    mixed, apart = ({"distillation.steps": 1, "real_apart": value} for value in (False, True))
    rounded = (memory.estimate(read("qdrop", settings), network, real).stages["round"] for settings in (mixed, apart))
    # What units read and answer, and the images themselves.
    assert next(rounded) - next(rounded) > 256 * 4 * 3 * 16 * 16
    assert peak("clusterq").stages.keys() == {"synthesize", "calibrate", "distil", "round", "measure"}
    assert small.told() == f"memory: about {small.peak / 2**30:.1f} GiB at the peak ({small.stage}), estimated"


def test_what_finds_no_room_in_the_cache_is_told_beside_the_peak(tiny_cnn):
    network, settings = as_teacher(tiny_cnn()), {"images": 20_000, "calibration_images": 20_000}
    all_in_memory = memory.estimate(read("qdrop", settings | {"reconstruction.cache_gib": 100.0}), network, {})
    in_files = memory.estimate(read("qdrop", settings | {"reconstruction.cache_gib": 0.5}), network, {})
    assert all_in_memory.mapped == 0 and "files" not in all_in_memory.told()
    assert in_files.cache == 2**29 and abs(in_files.cache + in_files.mapped - all_in_memory.cache) <= 1
    files = f"and up to {in_files.mapped / 2**30:.1f} GiB of files while there is room"
    assert in_files.told() == f"memory: about {in_files.peak / 2**30:.1f} GiB at the peak (round) {files}, estimated"


def test_what_cannot_fit_is_refused_before_anything_is_written(tiny_cnn, tmp_path):
    recipe = read("zeroq", QUICK | {"synthesis.batch": 4096, "images": 4096})
    needed = math.ceil(10 * memory.estimate(recipe, as_teacher(tiny_cnn()), {}).stages["synthesize"] / 2**30) / 10
    with pytest.raises(ConfigError) as caught:
        run(recipe, tiny_cnn(), output=tmp_path / "run", memory_limit=0.55)
    assert str(caught.value) == (
        f"--memory-limit must be at least the {needed:.1f} GiB that the stage 'synthesize' is estimated to take, got 0.55; lower "
        "synthesis.batch (now 4096) with --set, or image_scale"
    )
    # The folder is free for the cure.
    run(read("zeroq", QUICK), tiny_cnn(), output=tmp_path / "run", memory_limit=1.0)


def test_images_alone_are_refused_too_and_so_is_a_forecast(tiny_cnn, tmp_path):
    recipe = read("zeroq", QUICK)
    needed = math.ceil(10 * memory.estimate_images_alone(recipe, as_teacher(tiny_cnn()), {}).peak / 2**30) / 10
    expected = (
        f"--memory-limit must be at least the {needed:.1f} GiB that the stage 'synthesize' is estimated to take, got 0.1; lower "
        "synthesis.batch (now 8) with --set, or image_scale"
    )
    with pytest.raises(ConfigError) as caught:
        run_synthesis(recipe, tiny_cnn(), output=tmp_path / "run", memory_limit=0.1)
    assert str(caught.value) == expected
    with pytest.raises(ConfigError) as caught:
        forecast(recipe, tiny_cnn(), memory_limit=0.1, only_images=True)
    assert str(caught.value) == expected
    with pytest.raises(ConfigError, match=r"^--memory-limit must be at least "):
        forecast(recipe, tiny_cnn(), memory_limit=0.1)
    # What it names is enough, and the folder is free for it.
    run_synthesis(recipe, tiny_cnn(), output=tmp_path / "run", memory_limit=needed)


class Stopped(Silent):
    """Is interrupted when `stage` begins."""

    def __init__(self, at):
        self.at = at

    def start(self, stage, total, done=0):
        if stage == self.at:
            raise KeyboardInterrupt


def test_a_run_that_got_further_survives_a_limit_that_is_too_low(tiny_cnn, tmp_path):
    recipe = read("adaround", QUICK | {"reconstruction.iterations": 3})
    run(recipe, tiny_cnn(), output=tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(recipe, tiny_cnn(), output=tmp_path / "run", progress=Stopped("round"))
    before = (tmp_path / "run" / "run.json").read_bytes()
    with pytest.raises(ConfigError, match=r"^--memory-limit must be at least "):
        run(recipe, tiny_cnn(), output=tmp_path / "run", memory_limit=0.1)
    assert (tmp_path / "run" / "run.json").read_bytes() == before
    run(recipe, tiny_cnn(), output=tmp_path / "run")
    for file in ("images.safetensors", "network.safetensors"):
        assert (tmp_path / "run" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_a_limit_moves_the_cache_to_the_disk_and_changes_no_byte(tiny_cnn, tmp_path, monkeypatch):
    recipe = read("adaround", QUICK | {"reconstruction.iterations": 3})
    found = memory.estimate(recipe, as_teacher(tiny_cnn()), {})
    assert found.cache > 0
    # Other stages of so small a network take more than its cache.
    others = max(peak for stage, peak in found.stages.items() if stage != "round")
    limit = others / 2**30 + 1e-5

    def estimate(*arguments):
        return replace(found, stages=found.stages | {"round": others + found.cache})

    monkeypatch.setattr(memory, "estimate", estimate)
    rooms = []
    monkeypatch.setattr("reverie.graph.cache.Cache._file", spied(rooms))
    runs = {
        name: run(recipe, tiny_cnn(), output=tmp_path / name, memory_limit=each) for name, each in (("a", None), ("b", limit))
    }
    assert rooms
    for file in ("images.safetensors", "network.safetensors"):
        assert (runs["a"].path / file).read_bytes() == (runs["b"].path / file).read_bytes()
    metrics = json.loads((runs["b"].path / "metrics.json").read_text())
    assert others < metrics["estimated_memory_bytes"] <= limit * 2**30
    assert json.loads((runs["a"].path / "metrics.json").read_text())["estimated_memory_bytes"] == estimate().peak


def spied(rooms):
    from reverie.graph.cache import Cache

    plain = Cache._file

    def file(self, size, dtype):
        rooms.append(size)
        return plain(self, size, dtype)

    return file


def test_the_estimate_is_said_at_the_start(tiny_cnn, tmp_path):
    class Telling(Silent):
        def __init__(self):
            self.said = []

        def say(self, text):
            self.said.append(text)

    telling = Telling()
    recipe = read("zeroq", QUICK)
    run(recipe, tiny_cnn(), output=tmp_path / "run", progress=telling)
    assert telling.said[0] == memory.estimate(recipe, as_teacher(tiny_cnn()), {}).told()


def test_many_images_are_held_in_a_file(tmp_path, monkeypatch):
    from reverie.images import folder

    contract = InputContract(channels=1, height=4, width=4, mean=(0.5,), std=(0.5,))
    monkeypatch.setattr(folder, "_IN_MEMORY", 100)
    rooms = []
    monkeypatch.setattr("reverie.graph.cache.Cache._file", spied(rooms))
    room = folder._room(7, contract)
    room.copy_(torch.arange(7.0).view(7, 1, 1, 1).expand_as(room))
    assert rooms == [7 * 16 * 4] and room[6, 0, 3, 3] == 6
    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(
        ConfigError, match=r"^7 images must fit into .* as network inputs \(0\.0 GiB\), got no room for them; free"
    ):
        folder._room(7, contract)


def full(*arguments):
    raise OSError(28, "No space left on device")
