"""A real bash completes what the printed script tells it."""

import shutil
import subprocess

import pytest
from tests.cli.test_commands import COMMANDS

from reverie.cli import main


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """The script for bash, as the command prints it."""
    path = tmp_path_factory.mktemp("completion") / "reverie.bash"
    with path.open("w") as file, pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", file)
        assert main(["completion", "bash"]) == 0
    return path


def completed(script, line):
    """What bash offers at the end of `line`, as at the press of the tab key."""
    if shutil.which("bash") is None:
        pytest.skip("no bash here")
    words = line.split(" ")
    code = (
        f"source {script}; COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; COMP_LINE='{line}'; COMP_POINT={len(line)}; "
        "$(complete -p reverie | sed 's/.*-F \\([^ ]*\\) .*/\\1/'); printf '%s\\n' \"${COMPREPLY[@]}\""
    )
    done = subprocess.run(["bash", "--norc", "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("reverie qu", ["quantize"]),
        ("reverie co", ["compare", "completion"]),
        ("reverie quantize --effective-b", ["--effective-bits"]),
        ("reverie synthesize a:b --dr", ["--dry-run"]),
        ("reverie completion f", ["fish"]),
        ("reverie runs --sort si", ["size"]),
    ],
)
def test_bash_completes(script, line, expected):
    assert completed(script, line) == expected


def test_bash_offers_every_command(script):
    assert all(completed(script, f"reverie {command}") == [command] for command in COMMANDS)


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_get_a_script_with_every_command(capsys, shell):
    assert main(["completion", shell]) == 0
    printed = capsys.readouterr().out
    assert all(command in printed for command in COMMANDS)


def test_an_unknown_shell_is_refused(capsys):
    assert main(["completion", "tcsh"]) == 2
    assert capsys.readouterr().err == (
        'reverie: Invalid value "tcsh" for SHELL. Choose from: "bash", "zsh", "fish". See --help.\n'
    )
