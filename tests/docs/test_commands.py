"""Every command line that the documentation shows is one that Reverie takes."""

import re
import shlex
from pathlib import Path

import pytest

from reverie.cli import app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def commands(page: Path) -> list[str]:
    """The lines of its shell blocks that call `reverie`, without comments and what is beside them in a line."""
    found = []
    for block in re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            parts = re.split(r"&&|;|\|", line.partition(" # ")[0])
            found += [part.strip().removeprefix(".venv/bin/") for part in parts]
    return [command for command in found if command.startswith("reverie ")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_of_a_page_can_be_parsed(page):
    for command in commands(page):
        _, *words = shlex.split(command)
        app.parse_args(words, print_error=False, exit_on_error=False)


def test_there_are_commands_to_parse():
    assert len(commands(ROOT / "README.md")) > 20
    assert sum(len(commands(page)) for page in PAGES) > 45
