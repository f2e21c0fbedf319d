"""A part is kept whole, known again, and worth its time."""

import re

import pytest
import torch
from safetensors.torch import save_file

from reverie import interrupts
from reverie.checkpoints import Checkpoints, Folder, Forgetful, Unfinished
from reverie.errors import ConfigError
from reverie.runs import RunDirectory

PART = {"codes": torch.arange(600).reshape(20, 30), "scale": torch.tensor(0.5), "none": torch.zeros(0)}


def refusal(folder: Folder, name: str = "part") -> str:
    with pytest.raises(ConfigError) as caught:
        folder.load(name)
    return str(caught.value)


def test_a_part_comes_back_as_it_was_saved(tmp_path):
    folder = Folder(tmp_path / "images", "run")
    assert folder.load("part") is None
    folder.save("part", PART)
    loaded = folder.load("part")
    assert loaded.keys() == PART.keys()
    assert all(torch.equal(loaded[key], PART[key]) and loaded[key].dtype == PART[key].dtype for key in PART)
    assert isinstance(folder, Checkpoints) and isinstance(Forgetful(), Checkpoints)


def test_a_part_of_another_run_is_named(tmp_path):
    Folder(tmp_path, "aaaa").save("part", PART)
    assert refusal(Folder(tmp_path, "bbbb")) == (
        f"{tmp_path / 'part.safetensors'}: must be a checkpoint that this run wrote, got one of another run (aaaa instead of bbbb); "
        "delete it, what it held is made again"
    )


def test_a_part_in_the_place_of_another_is_named(tmp_path):
    Folder(tmp_path, "aaaa").save("first", PART)
    (tmp_path / "first.safetensors").rename(tmp_path / "second.safetensors")
    assert re.fullmatch(
        rf"{re.escape(str(tmp_path))}/second\.safetensors: must be a checkpoint that this run wrote, got a changed one \(sha256 "
        r"[0-9a-f]{12} instead of [0-9a-f]{12}\); delete it, what it held is made again",
        refusal(Folder(tmp_path, "aaaa"), "second"),
    )


def test_any_changed_byte_and_any_length_is_found(tmp_path):
    folder = Folder(tmp_path, "aaaa")
    folder.save("part", PART)
    file = tmp_path / "part.safetensors"
    whole = file.read_bytes()
    generator = torch.Generator().manual_seed(0)
    places = torch.randperm(len(whole), generator=generator)[:300].tolist()
    header = 8 + int.from_bytes(whole[:8], "little")
    for place in [*range(header), *places]:
        file.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
        assert refusal(folder).startswith(f"{file}: must be a checkpoint that this run wrote, got "), place
    for length in (0, 1, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        assert refusal(folder) == (
            f"{file}: must be a checkpoint that this run wrote, got a damaged or foreign file; delete it, what it held is made again"
        )


@pytest.mark.parametrize("told", ["[]", '{"run": "aaaa"}', '{"run": 1, "sha256": ""}'])
def test_a_part_that_says_something_else_of_itself_is_refused(tmp_path, told):
    file = tmp_path / "part.safetensors"
    save_file(PART, file, {"reverie": told})
    assert refusal(Folder(tmp_path, "aaaa")) == (
        f"{file}: must be a checkpoint that this run wrote, got a damaged or foreign file; delete it, what it held is made again"
    )


def test_parts_are_due_when_writing_one_costs_less_than_its_share(tmp_path, monkeypatch):
    now = 100.0
    folder = Folder(tmp_path, seconds=1.0, share=0.02, clock=lambda: now)
    assert not folder.due()
    now = 101.0
    assert folder.due()

    def slow(*arguments):
        nonlocal now
        now += 0.5

    with monkeypatch.context() as patched:
        patched.setattr("reverie.checkpoints.atomic_write", slow)
        folder.save("part", PART)
    # 0.5 s are 2 % of 25 s, 24.5 of which are something else.
    now += 24.4
    assert not folder.due()
    now += 0.2
    assert folder.due()
    assert not Forgetful().due()


def test_the_first_part_is_due_when_what_it_is_expected_to_cost_is_a_small_share(tmp_path):
    now = 0.0
    folder = Folder(tmp_path, seconds=1.0, share=0.02, clock=lambda: now)
    now = 97.0
    # Half a gigabyte in two seconds, which are 2 % of a hundred.
    assert folder.due(1000) and not folder.due(500_000_000)
    now = 98.1
    assert folder.due(500_000_000)


def test_a_large_unfinished_part_waits_until_it_is_worth_its_time(tmp_path):
    now, asked = 0.0, []
    unfinished = Unfinished(Folder(tmp_path, seconds=1.0, share=0.02, clock=lambda: now), "part")

    def state():
        asked.append(now)
        return {"large": torch.zeros(1).expand(125_000_000)}

    now = 2.0
    unfinished.keep(state)
    now = 3.0
    unfinished.keep(state)
    # Put together once, to know how large it is.
    assert asked == [2.0] and not list(tmp_path.iterdir())


def test_a_part_is_due_at_once_when_the_process_is_asked_to_stop(tmp_path, monkeypatch):
    folder = Folder(tmp_path, seconds=1e9)
    assert not folder.due()
    monkeypatch.setattr(interrupts, "_asked", [2])
    assert folder.due()


def test_a_folder_whose_run_is_gone_is_not_made_anew(tmp_path):
    run = RunDirectory.open(tmp_path / "run", {"recipe": "a"})
    folder = Folder(run.checkpoint("images"))
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigError) as caught:
        folder.save("part", PART)
    assert str(caught.value) == (
        f"{tmp_path / 'run/checkpoints/images'}: must be a folder that can be made, got 'No such file or directory'; put the run back"
    )
    assert not (tmp_path / "run").exists()
