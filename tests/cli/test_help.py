"""Every example in the help is a command line that this very version takes, and so is every one in the README."""

import ast
import inspect
import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest
from tests.cli.test_commands import COMMANDS

from reverie import export, formats, plugins, recipes
from reverie.cli import app, main
from reverie.cli._help import reflowed
from reverie.cli._options import as_overrides

README = Path(__file__).parents[2] / "README.md"


def examples(command):
    """The examples in a command's docstring, as lists of words."""
    paragraphs = inspect.getdoc(app[command].default_command).split("\n\n")
    found = [" ".join(part.split()).removeprefix("Example: ") for part in paragraphs if part.startswith("Example: ")]
    return [shlex.split(text.partition(" > ")[0]) for text in found]


def readme_lines():
    """The command lines in the README's blocks of shell, without what is only said beside them."""
    blocks = re.findall(r"```sh\n(.*?)```", README.read_text(), re.DOTALL)
    lines = [line.partition("#")[0].strip() for block in blocks for line in block.splitlines()]
    commands = [part.strip() for line in lines for part in re.split(r";|&&", line)]
    return [command for command in commands if command.startswith("reverie ")]


def parsed(words):
    """What the app makes of a command line; wrong ones raise."""
    assert words[0] == "reverie"
    _, bound, _ = app.parse_args(words[1:])
    return bound.arguments


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_has_examples_that_it_takes(command):
    found = examples(command)
    assert found
    for words in found:
        assert words[:2] == ["reverie", command]
        given = parsed(words)
        named = given.get("recipe", given.get("name"))
        if command in ("quantize", "synthesize", "recipe", "diagnose") and named not in (None, "best"):
            recipes.read(named, as_overrides(given.get("settings")))
        if "target" in given and command in ("synthesize", "images", "export"):
            plugins.load(export if command == "export" else formats, given["target"])


@pytest.mark.parametrize("line", readme_lines())
def test_a_command_line_of_the_readme_is_taken(line):
    parsed(shlex.split(line))


def test_the_example_of_the_whole_is_one():
    (example,) = re.findall(r"Example: (reverie .*)", app.help)
    parsed(shlex.split(example))


@pytest.mark.parametrize(
    "words", [["reverie", "quantize", "a:b", "--wibble"], ["reverie", "quantise", "a:b"], ["reverie", "evaluate", "r"]]
)
def test_an_example_with_a_mistake_would_be_found(words):
    with pytest.raises(Exception, match=r"Unknown|requires"):
        parsed(words)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_a_command_is_explained(command):
    function = app[command].default_command
    explained = inspect.getdoc(function).partition("Args:\n")[2]
    source = ast.parse(inspect.getsource(function)).body[0].args
    names = [item.arg for item in (*source.posonlyargs, *source.kwonlyargs) if item.arg != "options"]
    assert [name for name in names if not re.search(rf"^    {name}: \S", explained, re.MULTILINE)] == []


def test_paragraphs_and_entries_are_one_line_each():
    docstring = """Head.

    One paragraph of
    two lines.

    Args:
        first: It goes
            on.
        second: Short.
    """
    assert reflowed(docstring) == ("Head.\n\nOne paragraph of two lines.\n\nArgs:\n    first: It goes on.\n    second: Short.")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_breaks_lines_only_where_the_terminal_ends(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main([command, "--help"]) == 0
    # What stands in the box of parameters, in its right column.
    lines = [line.strip("│ ") for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    words = [line.split() for line in lines]
    for line, below in pairwise(words):
        if len(line) == 1 and not line[0].startswith(("-", "*")):
            # A word stands alone in its line only as the last of an entry, or before one that is too long for the rest of it.
            assert not below or below[0].startswith(("-", "*", "[")) or len(below[0]) > 20, (command, line, below)
