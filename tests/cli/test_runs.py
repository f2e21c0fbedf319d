"""`reverie runs` and `reverie compare`, and tables on terminals that are too narrow for them."""

import json

import pytest
from tests.cli import conftest
from tests.cli.conftest import refused
from tests.report.test_overview import STAGES, made

from reverie.cli import _output


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def three(tmp_path):
    """Runs of two networks, one of them interrupted; named against their order."""
    made(tmp_path / "runs" / "c", weights=8, drop=0.001, low=-0.001, high=0.003, size=2_000_000, rounding="nearest")
    made(tmp_path / "runs" / "b", drop=0.02, size=1_000_000)
    made(tmp_path / "runs" / "a", network="z:net", fingerprint="0" * 16, stages=STAGES[:3])


def said(capsys, *arguments):
    """Line by line."""
    return conftest.said(capsys, *arguments).splitlines()


def test_runs_are_listed_with_their_figures_and_the_next_command(capsys, three):
    assert said(capsys, "runs") == [
        "run     network  bits  methods                   accuracy          drop, points    size  state                      time",
        "------  -------  ----  ------------------------  --------  --------------------  ------  ------------------------  -----",
        "runs/c  a:net    W8A8  zeroq, nearest             90.00 %  0.10 (-0.10 to 0.30)  2.0 MB  complete                   12 s",
        "runs/b  a:net    W4A8  zeroq, adaround by block   90.00 %   2.00 (1.00 to 3.00)  1.0 MB  complete                   12 s",
        "runs/a  z:net    W4A8  zeroq, adaround by block         -                     -       -  interrupted, at quantize  5.0 s",
        "3 runs, 2 complete",
        "next: reverie compare runs/c runs/b",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("order", "expected"),
    [("network", "cba"), ("drop", "cba"), ("size", "bca"), ("path", "abc")],
)
def test_runs_are_sorted_as_asked_and_the_unknown_comes_last(capsys, three, order, expected):
    assert [run["path"][-1] for run in json.loads("".join(said(capsys, "runs", "--sort", order, "--json")))] == list(expected)


def test_a_folder_without_runs_says_so(capsys, tmp_path):
    (tmp_path / "runs").mkdir()
    assert said(capsys, "runs") == ["no runs under runs; `reverie quantize` makes one"]
    assert refused(capsys, "runs", "nowhere") == "nowhere: must be a folder with runs, got nothing there"


def test_compare_writes_a_table_and_a_page(capsys, three, tmp_path):
    lines = said(capsys, "compare", "runs/b", "runs/c")
    assert lines[0].split("  ")[0] == "run"
    assert [line.split()[0] for line in lines[2:4]] == ["b", "c"]
    assert "1.0 MB (4.0 x smaller) *" in lines[2] and "0.10 (-0.10 to 0.30) *" in lines[3]
    assert lines[4] == "* ahead by the number alone; whether a difference is more than chance, the intervals tell"
    assert [line.split() for line in lines[6:]] == [
        ["differs", "b", "c"],
        ["------------------------", "--------", "-------"],
        ["quantization.weight_bits", "4", "8"],
        ["rounding.method", "adaround", "nearest"],
        ["page:", "compare.html"],
    ]
    # Our own page may be replaced.
    said(capsys, "compare", "runs/c", "runs/b")
    assert (tmp_path / "compare.html").read_text().count("<tr>") > 10


def test_compare_touches_no_file_of_others(capsys, three, tmp_path):
    (tmp_path / "mine.html").write_text("<p>thesis</p>")
    assert refused(capsys, "compare", "runs/b", "runs/c", "--output", "mine.html") == (
        "mine.html: must be new or a page of `reverie compare`, got another file; choose another --output"
    )
    assert (tmp_path / "mine.html").read_text() == "<p>thesis</p>"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["runs/b"], "compare must be given at least two runs, got 1"),
        (
            ["runs/b", "runs/a"],
            "runs/a: must be a complete run, got one that is interrupted; leave it out, or run it to its end",
        ),
        (["runs/b", "runs"], "runs: must be a run directory, got no run.json in it; `reverie runs` lists those that there are"),
        (
            ["runs/b", "runs/c", "--output", "no/x"],
            "no/x: must be in a folder that exists, got none; create it or choose another --output",
        ),
        (["runs/b", "runs/c", "--output", "runs"], "runs: must be a file, got a folder; choose another --output"),
    ],
)
def test_what_cannot_be_compared_is_refused_and_nothing_written(capsys, three, tmp_path, arguments, expected):
    assert refused(capsys, "compare", *arguments) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        (
            None,
            [
                "run  methods and more  size",
                "---  ----------------  ----",
                "a    zeroq                9",
                "b    nearest             10",
            ],
        ),
        (
            27,
            [
                "run  methods and more  size",
                "---  ----------------  ----",
                "a    zeroq                9",
                "b    nearest             10",
            ],
        ),
        (
            # On its side it is narrower.
            26,
            [
                "a\n    methods and more zeroq;\n    size 9\nb\n    methods and more nearest;\n    size 10",
            ],
        ),
    ],
)
def test_a_table_fits_the_terminal(capsys, monkeypatch, width, expected):
    monkeypatch.setattr(_output, "_terminal_width", lambda: width)
    _output.say_table(("run", "methods and more", "size"), [("a", "zeroq", "9"), ("b", "nearest", "10")], numbers=(2,))
    assert capsys.readouterr().out == "\n".join(expected) + "\n"


def test_a_wide_table_lies_on_its_side_where_that_fits(capsys, monkeypatch):
    monkeypatch.setattr(_output, "_terminal_width", lambda: 25)
    _output.say_table(
        ("", "accuracy", "latency", "size"), [("float", "99.67 %", "2 ms", "4 MB"), ("int", "99 %", "1 ms", "1 MB")]
    )
    assert capsys.readouterr().out.splitlines() == [
        "            float   int",
        "--------  -------  ----",
        "accuracy  99.67 %  99 %",
        "latency      2 ms  1 ms",
        "size         4 MB  1 MB",
    ]


def test_sentences_are_broken_between_words_on_a_terminal_alone(capsys, monkeypatch):
    for width, expected in ((None, "one two three\n"), (8, "one two\nthree\n")):
        monkeypatch.setattr(_output, "_terminal_width", lambda width=width: width)
        _output.say_wrapped("one two three")
        assert capsys.readouterr().out == expected
