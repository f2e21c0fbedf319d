import io
import json

import pytest

from reverie.progress import JsonLines, Lines, Progress, Renamed, Silent, choose, duration_text
from reverie.progress._bars import Bars


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


def test_lines_come_at_the_start_with_an_estimate_every_five_seconds_and_at_the_end(clock, stream):
    with Lines(stream, clock).stage("synthesize", 100) as step:
        for _ in range(100):
            clock.now += 0.125
            step(note="loss 0.4")
    assert stream.getvalue().splitlines() == [
        "synthesize: started, 100 steps",
        "synthesize: 20 of 100 steps took 2.5 s, so about 12 s in all",
        "synthesize: 60%, 5.0 s left, loss 0.4",
        "synthesize: done after 12 s",
    ]


@pytest.mark.parametrize(
    ("total", "seconds", "expected"),
    [
        (400, 0.3, ["20 of 400 steps took 6.0 s, so about 2 min in all"]),
        (200, 0.3, ["20 of 200 steps took 6.0 s, so about 1 min 0 s in all"]),
        (40000, 0.3, ["20 of 40000 steps took 6.0 s, so about 3 h 20 min in all"]),
        # Quick stages stay quiet, and so do short ones.
        (400, 0.01, []),
        (19, 10.0, []),
    ],
)
def test_a_log_says_once_what_a_stage_will_take(clock, stream, total, seconds, expected):
    with Lines(stream, clock).stage("distil", total) as step:
        for _ in range(min(total, 30)):
            clock.now += seconds
            step()
    told = [line for line in stream.getvalue().splitlines() if " took " in line]
    assert told == [f"distil: {line}" for line in expected]
    assert stream.getvalue().startswith(f"distil: started, {total} steps\n" if total >= 20 else "distil: started\n")


def test_steps_that_were_done_before_are_no_work(clock, stream):
    with Lines(stream, clock).stage("distil", 400, done=160) as step:
        for _ in range(20):
            clock.now += 0.3
            step()
    assert stream.getvalue().splitlines() == [
        "distil: started, 400 steps, 160 of them done before",
        "distil: 44%, 1 min 7 s left",
        "distil: 20 of 240 steps took 6.0 s, so about 1 min 12 s in all",
        "distil: stopped at 180 of 400 after 6.0 s",
    ]


def test_steps_and_seconds_of_skipping_are_no_work(clock, stream):
    progress = JsonLines(stream, clock)
    progress.plan({"synthesize": 1.0, "round": 1.0})
    with progress.stage("synthesize", 10, done=10):
        pass
    with progress.stage("round", 100) as step:
        clock.now += 3
        step(50, skipped=True)
        clock.now += 10
        step(10)
        clock.now += 2
        step(20, skipped=True)
        clock.now += 10
        step(10)
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    keys = ("event", "done", "seconds", "seconds_left", "seconds_left_overall")
    assert [tuple(event[key] for key in keys) for event in events] == [
        ("start", 10, 0, 0, None),
        ("finish", 10, 0, 0, None),
        ("start", 0, 0, None, None),
        ("advance", 50, 3, None, None),
        ("advance", 60, 13, 40, 40),
        ("advance", 80, 15, 20, 20),
        ("advance", 90, 25, 10, 10),
        ("finish", 90, 25, 10, 10),
    ]


def test_what_is_said_stands_among_the_rest(clock, stream, capsys):
    Lines(stream, clock).say("fdda: [big] generator")
    JsonLines(stream, clock).say("fdda: [big] generator")
    assert stream.getvalue() == 'fdda: [big] generator\n{"event": "note", "text": "fdda: [big] generator"}\n'
    Silent().say("nothing")
    bars = Bars(clock)
    bars.say("before")
    with bars.stage("synthesize", 2, done=1) as step:
        bars.say("fdda: [big] generator")
        step()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("before\n") and "fdda: [big] generator\n" in captured.err


def test_the_whole_is_never_shorter_than_its_part(clock, stream):
    lines = Lines(stream, clock=clock)
    lines.plan({"a": 1.0, "b": 1.0, "c": 1.0})
    lines.start("a", 1)
    clock.now += 10
    lines.advance()
    lines.finish()
    # Ten times as slow as planned: 90 s of it are left, and c is expected to take what a and b took so far.
    lines.start("b", 10)
    clock.now += 10
    lines.advance()
    assert lines.seconds_left == 90
    assert lines.seconds_left_overall == pytest.approx(90 + 20 / 1.1)


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
            step(1, note="loss 0.4")
            step()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "synthesize        2 steps, in 1 min 1 s, loss 0.4",
        "quantize          2 steps, in 1 min 1 s, loss 0.4",
    ]


def test_a_stage_has_the_name_of_what_it_is_for(clock, stream):
    shown = Renamed(Lines(stream, clock), {"synthesize": "held-out images"})
    for name in ("synthesize", "refine"):
        with shown.stage(name, 1) as step:
            step()
    assert [line.partition(":")[0] for line in stream.getvalue().splitlines()] == ["held-out images"] * 2 + ["refine"] * 2


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
