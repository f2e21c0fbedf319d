import io
import json

import pytest

from reverie.progress import Bars, JsonLines, Lines, Progress, Silent, choose, duration_text


class Clock:
    """Stands still until it is told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def stream():
    return io.StringIO()


def test_lines_come_at_the_start_every_five_seconds_and_at_the_end(clock, stream):
    with Lines(stream, clock).stage("synthesize", 100) as step:
        for _ in range(100):
            clock.now += 0.125
            step(note="loss 0.4")
    assert stream.getvalue().splitlines() == [
        "synthesize: started",
        "synthesize: 40%, 7.5 s left, loss 0.4",
        "synthesize: 80%, 2.5 s left, loss 0.4",
        "synthesize: done after 12 s",
    ]


def test_time_left_overall_counts_the_stages_to_come_and_leaves_out_those_skipped(clock, stream):
    progress = JsonLines(stream, clock)
    progress.plan({"load": 5.0, "synthesize": 2.0, "quantize": 3.0, "export": 1.0})
    with progress.stage("synthesize", 4) as step:
        clock.now += 10
        step(2)
        clock.now += 10
        step(2)
    with progress.stage("quantize", 3) as step:
        clock.now += 20
        step(2)
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [event["event"] for event in events] == ["start", "advance", "advance", "finish", "start", "advance", "finish"]
    assert [event["seconds_left_overall"] for event in events] == [None, 50, 40, 40, 40, 20, 20]
    assert [event["seconds_left"] for event in events] == [None, 10, 0, 0, None, 10, 10]


def test_an_event_is_one_json_object_a_line(clock, stream):
    progress = JsonLines(stream, clock)
    progress.start("export", 1)
    clock.now += 1.5
    progress.advance(note="conv1")
    assert json.loads(stream.getvalue().splitlines()[1]) == {
        "event": "advance",
        "stage": "export",
        "done": 1,
        "total": 1,
        "seconds": 1.5,
        "seconds_left": 0,
        "seconds_left_overall": None,
        "note": "conv1",
    }


def test_a_stage_that_fails_is_not_called_done(clock, stream):
    with pytest.raises(KeyError), Lines(stream, clock).stage("synthesize", 3) as step:
        step()
        raise KeyError
    assert stream.getvalue().splitlines()[-1] == "synthesize: stopped at 1 of 3 after 0.0 s"


def test_bars_show_stage_and_outcome_on_standard_error(capsys, clock):
    bars = Bars(clock)
    for name in ("synthesize", "quantize"):
        with bars.stage(name, 2) as step:
            clock.now += 61
            step(2)
    captured = capsys.readouterr()
    assert captured.out == ""
    for text in ("synthesize", "quantize", "100%", "1 min 1 s"):
        assert text in captured.err


@pytest.mark.parametrize("total", [0, 3])
@pytest.mark.parametrize("make", [Silent, lambda: Lines(io.StringIO()), lambda: JsonLines(io.StringIO()), Bars])
def test_everyone_takes_the_same_events(make, total):
    progress = make()
    assert isinstance(progress, Progress)
    progress.plan({"a": 1.0, "b": 0.5})
    for name in ("a", "other", "b"):
        with progress.stage(name, total) as step:
            for _ in range(total):
                step(1, "note")


def test_the_stream_decides_what_is_shown(stream):
    assert isinstance(choose(stream, json=False), Lines)
    assert isinstance(choose(Terminal(), json=False), Bars)
    assert isinstance(choose(Terminal(), json=True), JsonLines)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.6, "1 min 0 s"), (3599.7, "1 h 0 min"), (7530.0, "2 h 5 min")],
)
def test_durations_read_naturally(seconds, text):
    assert duration_text(seconds) == text
