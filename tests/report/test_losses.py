"""Losses pass by on their way to the display, and are kept thinned, also over a kill."""

import json

import pytest

from reverie.progress import Lines, Silent, loss_note
from reverie.report.losses import Recorder, read


class Clock:
    """Stands still unless it is told to go."""

    now = 0.0

    def __call__(self):
        return self.now


def descend(recorder, stage, total, *, done=0, skip=0, until=None, loss=lambda step: 100.0 - step):
    with recorder.stage(stage, total=total, done=done) as step:
        if skip:
            step(skip, skipped=True)
        for number in range(done + skip, total if until is None else until):
            step(note=loss_note(loss(number)))
        if until is not None:
            raise KeyboardInterrupt


def test_what_is_shown_is_what_was_told(tmp_path):
    said = []

    class Stream:
        def write(self, text):
            said.append(text)

        def flush(self):
            pass

        def isatty(self):
            return False

    recorder = Recorder(tmp_path / "losses.json", Lines(Stream()))
    recorder.say("hello")
    descend(recorder, "distil", 3)
    assert [line.partition(" after")[0] for line in "".join(said).splitlines()] == ["hello", "distil: started", "distil: done"]


def test_a_short_curve_is_whole_and_a_long_one_thinned(tmp_path):
    recorder = Recorder(tmp_path / "losses.json", Silent())
    descend(recorder, "distil", 5)
    descend(recorder, "round", 1000)
    found = read(tmp_path / "losses.json")
    assert found["distil"] == {"steps": [0, 1, 2, 3, 4], "losses": [100.0, 99.0, 98.0, 97.0, 96.0]}
    assert found["round"]["steps"] == list(range(0, 1000, 5))


def test_stages_that_do_not_learn_have_no_curve(tmp_path):
    recorder = Recorder(tmp_path / "losses.json", Silent())
    with recorder.stage("calibrate", total=2) as step:
        step()
        step()
    assert read(tmp_path / "losses.json") == {}


@pytest.mark.parametrize(("done", "skip"), [(4, 0), (0, 4)], ids=["told at its start", "skipped over"])
def test_a_killed_stage_has_the_curve_of_one_that_was_not(tmp_path, done, skip):
    descend(Recorder(tmp_path / "whole.json", Silent()), "synthesize", 10)
    with pytest.raises(KeyboardInterrupt):
        descend(Recorder(tmp_path / "killed.json", Silent()), "synthesize", 10, until=7)
    # It goes on from its last checkpoint, three steps before.
    descend(Recorder(tmp_path / "killed.json", Silent()), "synthesize", 10, done=done, skip=skip)
    assert read(tmp_path / "killed.json") == read(tmp_path / "whole.json")


def test_curves_are_on_the_disk_while_a_stage_goes_on(tmp_path):
    clock = Clock()
    recorder = Recorder(tmp_path / "losses.json", Silent(), clock)
    recorder.start("distil", 100)
    recorder.advance(note=loss_note(3.0))
    assert not (tmp_path / "losses.json").exists()
    clock.now = 6.0
    recorder.advance(note=loss_note(2.0))
    assert read(tmp_path / "losses.json")["distil"]["losses"] == [3.0, 2.0]


@pytest.mark.parametrize("text", ["", "{", '{"distil": [1]}', json.dumps({"distil": {"steps": ["a"]}})])
def test_a_damaged_file_is_no_reason_to_stop(tmp_path, text):
    (tmp_path / "losses.json").write_text(text)
    assert read(tmp_path / "losses.json") == {}
    descend(Recorder(tmp_path / "losses.json", Silent()), "distil", 2)
    assert read(tmp_path / "losses.json")["distil"]["steps"] == [0, 1]
