"""Pictures in a terminal: what is written decodes to what was to be shown, and showing stays below a hundredth of the time."""

import base64
import io
import re
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from reverie.progress import _bars, _pictures
from reverie.progress._bars import Bars

BLACK, RED, BLUE = (0, 0, 0), (255, 0, 0), (0, 0, 255)


@pytest.fixture
def pictures():
    """A red one and a blue one, of 4 x 4."""
    return np.stack([np.full((4, 4, 3), colour, np.uint8) for colour in (RED, BLUE)])


def of_png(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def of_kitty(text):
    commands = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", text)
    assert [facts.rpartition("m=")[2] for facts, _ in commands] == ["1"] * (len(commands) - 1) + ["0"]
    assert all(len(piece) <= 4096 for _, piece in commands)
    assert commands[0][0].startswith("a=T,f=100,q=2,C=1,r=8,")
    return of_png(base64.b64decode("".join(piece for _, piece in commands)))


def of_iterm2(text):
    facts, data = re.fullmatch(r"\x1b\]1337;File=([^:]*):([^\x07]*)\x07\n", text).groups()
    assert facts == f"inline=1;size={len(base64.b64decode(data))};height=8;preserveAspectRatio=1"
    return of_png(base64.b64decode(data))


def of_sixel(text):
    """A decoder of its own, for what is written here: colours, repetitions, bands."""
    body = re.fullmatch(r"\x1bPq(.*)\x1b\\\n", text).group(1)
    palette = {int(n): tuple(round(int(c) * 2.55) for c in rgb) for n, *rgb in re.findall(r"#(\d+);2;(\d+);(\d+);(\d+)", body)}
    bands = re.sub(r"#\d+;2;\d+;\d+;\d+", "", body).split("-")[:-1]
    rows = []
    for band in bands:
        drawn = {}
        for line in band.split("$"):
            colour, at = int(re.match(r"#(\d+)", line).group(1)), 0
            for times, sixel in re.findall(r"!(\d+)(.)", line):
                for column in range(at, at + int(times)):
                    drawn |= {(bit, column): palette[colour] for bit in range(6) if (ord(sixel) - 63) >> bit & 1}
                at += int(times)
        rows += [[drawn[bit, column] for column in range(at)] for bit in range(6)]
    return np.array(rows, np.uint8)


def of_blocks(text):
    rows = []
    for line in text.splitlines():
        cells = re.findall(r"\x1b\[38;2;(\d+);(\d+);(\d+);48;2;(\d+);(\d+);(\d+)m\u2580", line)
        assert line.endswith("\x1b[0m")
        rows += [[cell[:3] for cell in cells], [cell[3:] for cell in cells]]
    return np.array(rows, int)


@pytest.mark.parametrize(
    ("painter", "decode", "height", "gap"),
    [
        (_pictures.kitty, of_kitty, 128, 8),
        (_pictures.iterm2, of_iterm2, 128, 8),
        (_pictures.sixel, of_sixel, 132, 8),
        (_pictures.blocks, of_blocks, 16, 1),
    ],
)
def test_what_is_written_is_the_pictures_side_by_side(painter, decode, height, gap, pictures):
    shown = decode(painter(pictures, 80))
    side = height if height != 132 else 128
    assert shown.shape == (height, 2 * side + gap, 3)
    assert np.abs(shown[:side, :side] - np.array(RED)).max() <= 3
    assert np.abs(shown[:side, side + gap :] - np.array(BLUE)).max() <= 3
    assert shown[:side, side : side + gap].max() <= 3


def test_as_many_are_shown_as_fit(pictures):
    many = np.concatenate([pictures] * 10)
    # Sixteen columns each, and one between two.
    assert of_blocks(_pictures.blocks(many, 80)).shape[1] == 4 * 17 - 1
    assert of_blocks(_pictures.blocks(many, 160)).shape[1] == 9 * 17 - 1
    assert of_blocks(_pictures.blocks(many, 3)).shape[1] == 16


def test_large_pictures_are_averaged_and_small_ones_stay_sharp():
    board = np.indices((32, 32)).sum(axis=0) % 2 * np.uint8(255)
    large = np.repeat(board.astype(np.uint8)[None, :, :, None], 3, axis=-1)
    assert set(of_blocks(_pictures.blocks(large, 80)).ravel()) <= {127, 128}
    assert set(of_blocks(_pictures.blocks(large[:, :4, :4], 80)).ravel()) == {0, 255}


@pytest.mark.parametrize(
    ("environment", "true_colour", "painter"),
    [
        ({"TERM": "xterm-kitty", "KITTY_WINDOW_ID": "1"}, True, _pictures.kitty),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "ghostty"}, True, _pictures.kitty),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, True, _pictures.iterm2),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm"}, True, _pictures.iterm2),
        ({"TERM": "xterm-256color", "LC_TERMINAL": "iTerm2"}, False, _pictures.iterm2),
        ({"TERM": "foot"}, True, _pictures.sixel),
        ({"TERM": "xterm-sixel"}, False, _pictures.sixel),
        ({"TERM": "xterm-256color"}, True, _pictures.blocks),
        ({"TERM": "tmux-256color", "TMUX": "/tmp/x", "KITTY_WINDOW_ID": "1"}, True, _pictures.blocks),
        ({"TERM": "screen.xterm-kitty"}, True, _pictures.blocks),
        ({"TERM": "xterm"}, False, None),
        ({"TERM": "tmux-256color", "TMUX": "/tmp/x", "KITTY_WINDOW_ID": "1"}, False, None),
        ({}, False, None),
    ],
)
def test_the_environment_tells_what_the_terminal_shows(environment, true_colour, painter):
    assert _pictures.choose_painter(environment, true_colour=true_colour) is painter


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def on_terminal(width=80, **options):
    """Bars on a terminal that keeps what is written, and their clock."""
    clock = Clock()
    bars, kept = Bars(clock), io.StringIO()
    options = {"color_system": "truecolor", "force_terminal": True, "width": width} | options
    bars.__dict__["_screen"] = Console(file=kept, _environ={}, **options)
    return bars, clock, kept


def rows(bars, width=80):
    """The lines that are drawn now, without colours."""
    sheet = Console(file=io.StringIO(), width=width, force_terminal=True)
    with sheet.capture() as captured:
        sheet.print(bars._rows())
    return [re.sub(r"\x1b\[[\d;]*m", "", line).rstrip() for line in captured.get().splitlines()]


def plain(kept):
    """The lines that were written, without what moves the cursor."""
    return [re.sub(r"\r|\x1b\[[\d;?]*[A-Za-z]", "", line) for line in kept.getvalue().split("\n")]


def test_strips_come_seldom_and_cost_a_hundredth_of_the_time_at_most(monkeypatch, pictures):
    bars, clock, kept = on_terminal()

    def slow(shown, columns):
        clock.now += 0.5
        return f"<{len(shown)} in {columns}>\n"

    monkeypatch.setattr(_bars, "choose_painter", lambda *_, **__: slow)
    for _ in range(2000):
        clock.now += 1
        bars.show(lambda: pictures)
    strips = kept.getvalue().count("<2 in 79>")
    assert strips == _bars._STRIPS
    bars, clock, kept = on_terminal()
    times = []
    while clock.now < 200:
        clock.now += 1
        bars.show(lambda: pictures)
        times += [clock.now] * (kept.getvalue().count("<") > len(times))
    # Half a second each, so fifty between two.
    assert min(later - earlier for earlier, later in pairwise(times)) >= 50


@pytest.mark.parametrize("options", [{"force_terminal": False}, {"no_color": True}, {"color_system": "standard"}])
def test_where_no_picture_can_be_shown_none_is_asked_for(options):
    bars, _, kept = on_terminal(**options)
    bars.show(lambda: pytest.fail("was asked for"))
    assert kept.getvalue() == ""


@pytest.mark.parametrize("width", [80, 160])
def test_stage_and_whole_fit_into_a_line_each(width):
    bars, clock, _ = on_terminal(width)
    bars.plan({"synthesize": 1.0, "adapt batch norms": 1.0})
    bars.start("synthesize", 10)
    clock.now = 7384.0
    bars.advance(9, note="loss 1.23e-05")
    # What a step does not say stays.
    bars.advance(0)
    lines = rows(bars, width)
    bars.finish()
    assert [line.split()[0] for line in lines] == ["synthesize", "all"]
    assert all(len(line) <= width for line in lines)
    assert lines[0].endswith("90% 13 min 40 s left, loss 1.23e-05")
    assert lines[1].endswith("45% 2 h 30 min left, stage 1 of 2")


def test_of_a_single_step_no_share_is_claimed():
    bars, _, kept = on_terminal()
    with bars.stage("export", 1) as step:
        assert rows(bars)[0].split() == ["export", "━" * 20]
        step()
    with pytest.raises(KeyError), bars.stage("verify", 1):
        raise KeyError
    written = plain(kept)
    assert "export            in 0.0 s" in written and "verify            stopped, in 0.0 s" in written


def test_the_bar_of_the_whole_never_goes_back():
    bars, clock, _ = on_terminal()
    bars.plan({"a": 1.0, "b": 1.0})
    with bars.stage("a", 2) as step:
        clock.now += 10
        step(2)
    with bars.stage("b", 10) as step:
        assert " 50% 10 s left" in rows(bars)[1]
        clock.now += 20
        step()
        # It takes ten times as long as was thought.
        assert " 50% 3 min 0 s left" in rows(bars)[1]


def test_a_stage_that_is_over_leaves_one_line(pictures):
    bars, clock, kept = on_terminal(color_system=None)
    with bars.stage("synthesize", 4) as step:
        clock.now += 3
        step(4, note="loss 0.4")
    with pytest.raises(KeyError), bars.stage("round", 4) as step:
        step(1)
        raise KeyError
    lines = plain(kept)
    assert [line for line in lines if " in " in line] == [
        "synthesize        4 steps, in 3.0 s, loss 0.4",
        "round             stopped at 1 of 4 steps, in 0.0 s",
    ]
