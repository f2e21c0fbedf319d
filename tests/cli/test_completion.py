"""Real shells complete what the printed scripts tell them."""

import os
import pty
import select
import shutil
import subprocess
import time

import pytest
from tests.cli.test_commands import COMMANDS

from reverie.cli import main

# What is typed, and what the shell makes of it where there is one answer.
LINES = [
    ("reverie qu", ["quantize"]),
    ("reverie co", ["compare", "completion"]),
    ("reverie quantize --effective-b", ["--effective-bits"]),
    ("reverie synthesize a:b --dr", ["--dry-run"]),
    ("reverie completion f", ["fish"]),
    ("reverie runs --sort si", ["size"]),
]


def printed(shell, path):
    """The script for a shell, as the command prints it, in the file `path`."""
    with path.open("w") as file, pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", file)
        assert main(["completion", shell]) == 0
    return path


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    return printed("bash", tmp_path_factory.mktemp("completion") / "reverie.bash")


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


@pytest.mark.parametrize(("line", "expected"), LINES)
def test_bash_completes(script, line, expected):
    assert completed(script, line) == expected


def test_bash_offers_every_command(script):
    assert all(completed(script, f"reverie {command}") == [command] for command in COMMANDS)


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_get_a_script_with_every_command(capsys, shell):
    assert main(["completion", shell]) == 0
    printed = capsys.readouterr().out
    assert all(command in printed for command in COMMANDS)


@pytest.mark.skipif(shutil.which("fish") is None, reason="no fish here")
@pytest.mark.parametrize(("line", "expected"), LINES)
def test_fish_completes(tmp_path, line, expected):
    script = printed("fish", tmp_path / "reverie.fish")
    code = f"source {script}; complete -C '{line}'"
    done = subprocess.run(["fish", "--no-config", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    offered = [offer.split("\t")[0] for offer in done.stdout.splitlines()]
    # Files are offered behind the commands.
    assert [offer for offer in offered if offer != script.name] == expected
    assert done.stderr == ""


class Zsh:
    """A zsh at a terminal of its own."""

    def __init__(self, setup):
        self.child, self.terminal = pty.fork()
        if self.child == 0:
            os.execvpe("zsh", ["zsh", "-f", "-i"], os.environ | {"TERM": "dumb", "COLUMNS": "200"})
        os.write(self.terminal, f"PS1='> '; autoload -Uz compinit; {setup}; echo rea''dy\n".encode())
        self.read("ready\r\n")

    def read(self, until, seconds=30.0):
        """What it writes, up to `until`."""
        written, end = "", time.monotonic() + seconds
        while until not in written and time.monotonic() < end:
            if select.select([self.terminal], [], [], 0.1)[0]:
                written += os.read(self.terminal, 65536).decode()
        assert until in written, f"zsh wrote {written!r}"
        return written

    def close(self):
        os.write(self.terminal, b"\x15exit\n")
        os.close(self.terminal)
        os.waitpid(self.child, 0)


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh here")
@pytest.mark.parametrize("way", ["file", "eval"])
def test_zsh_completes(tmp_path, way):
    script = printed("zsh", tmp_path / "_reverie")
    # As `reverie completion --help` says.
    ready = "compinit -u -D"
    zsh = Zsh(f"fpath=({tmp_path} $fpath); {ready}" if way == "file" else f'{ready}; eval "$(cat {script})"')
    for line, expected in LINES:
        # At the second it shows what the first left open.
        os.write(zsh.terminal, f"{line}\t\t".encode())
        written = zsh.read(expected[-1])
        assert all(offer in written for offer in expected)
        os.write(zsh.terminal, b"\x15")
    zsh.close()


def test_an_unknown_shell_is_refused(capsys):
    assert main(["completion", "tcsh"]) == 2
    assert capsys.readouterr().err == (
        'reverie: Invalid value "tcsh" for SHELL. Choose from: "bash", "zsh", "fish". See --help.\n'
    )
