"""The folder is the registry, and a plug-in stands alone."""

import ast
import dataclasses
from pathlib import Path

import pytest

from reverie import export, formats, loggers, observers, plugins, rounding, runtimes, synthesis
from reverie.errors import ConfigError

PACKAGES = [export, formats, loggers, observers, rounding, runtimes, synthesis]
METHODS = [(package, name) for package in PACKAGES for name in plugins.names(package)]


def ids(pair):
    return f"{pair[0].__name__.rpartition('.')[2]}.{pair[1]}"


@pytest.mark.parametrize("pair", METHODS, ids=ids)
def test_a_method_is_a_frozen_dataclass_defined_in_the_file_of_its_name(pair):
    package, name = pair
    method = plugins.load(package, name)
    assert dataclasses.is_dataclass(method)
    assert method.__dataclass_params__.frozen
    assert method.__module__ == f"{package.__name__}.{name}"
    assert method.__name__.lower() == name.replace("_", "")
    method()


@pytest.mark.parametrize("pair", METHODS, ids=ids)
def test_a_method_says_every_setting_in_its_docstring(pair):
    package, name = pair
    method = plugins.load(package, name)
    # A setting that is inherited is said where it is defined.
    said = " ".join(kind.__doc__ or "" for kind in method.__mro__ if dataclasses.is_dataclass(kind))
    for setting in dataclasses.fields(method):
        assert setting.name in said, setting.name


@pytest.mark.parametrize("pair", METHODS, ids=ids)
def test_a_plug_in_imports_no_other_plug_in(pair):
    package, name = pair
    others = {f"{near.__name__}.{other}" for near, other in METHODS if near is package and other != name}
    source = Path(package.__path__[0], f"{name}.py").read_text()
    for statement in ast.walk(ast.parse(source)):
        if isinstance(statement, ast.ImportFrom):
            assert statement.module not in others
            assert not {f"{statement.module}.{alias.name}" for alias in statement.names} & others


def test_an_unknown_method_is_refused_with_the_choices_and_the_nearest():
    with pytest.raises(ConfigError) as caught:
        plugins.load(rounding, "adaruond")
    assert (
        str(caught.value)
        == "unknown rounding method 'adaruond'; choose one of adaround, gptq, nearest, squant, or did you mean 'adaround'?"
    )


def test_the_map_in_the_architecture_page_is_the_real_one():
    page = (Path(__file__).parents[1] / "docs/architecture.md").read_text()
    tree = page.partition("src/reverie/\n")[2].partition("```")[0]
    rooms = {line.split()[0]: line for line in tree.splitlines() if line[:2] == "  " and line[2] != " "}
    source = Path(export.__path__[0]).parent
    real = {path.name + "/" * path.is_dir() for path in source.iterdir() if not path.name.startswith(("_", "py.typed"))}
    assert {name for name in rooms if name.endswith(("/", ".py"))} == real
    for package in PACKAGES:
        line = rooms[package.__name__.rpartition(".")[2] + "/"]
        listed = line.partition("plug-ins: ")[2].partition(";")[0].split(", ")
        assert sorted(listed) == plugins.names(package)


def test_the_readmes_test_command_is_what_ci_runs():
    root = Path(__file__).parents[1]
    assert "<!-- tests -->" in (root / ".ci/run").read_text()
    assert "tools/check.py" in (root / "README.md").read_text().partition("<!-- tests -->")[2].partition("```\n\n")[0]
