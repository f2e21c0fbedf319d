"""`reverie methods`: what can be plugged together, read from the source files without running any of them."""

import ast
from dataclasses import asdict, dataclass
from pathlib import Path

import reverie
from reverie.cli._output import say, say_json, say_table

# What a recipe or the command line calls them, and the folder that is their registry.
_KINDS = {
    "network source": "models",
    "synthesis": "synthesis",
    "observer (activations, weights)": "observers",
    "rounding": "rounding",
    "export": "export",
    "runtime": "runtimes",
    "images for other tools": "formats",
    "logger": "loggers",
}


@dataclass(frozen=True)
class Method:
    """A plug-in: its file, the first sentence of its docstring, and its settings with their defaults."""

    kind: str
    name: str
    about: str
    settings: dict[str, str]


def methods(*, json: bool = False) -> None:
    """List every method that a recipe can name, every network source, export target and form of images, with their settings.

    Example: reverie methods --json

    Args:
        json: Print it as one JSON document.
    """
    found = [method for kind in _KINDS for method in methods_of(kind)]
    if json:
        say_json([asdict(method) for method in found])
        return
    for kind in _KINDS:
        say_table((kind, "settings", ""), [_row(method) for method in found if method.kind == kind])
        say()


def methods_of(kind: str) -> list[Method]:
    """The methods of a kind, by name."""
    folder = Path(reverie.__file__).parent / _KINDS[kind]
    files = sorted(file for file in folder.glob("*.py") if not file.name.startswith("_"))
    return [_read(kind, file) for file in files]


def _row(method: Method) -> tuple[str, str, str]:
    settings = ", ".join(f"{name}={default}" if default else name for name, default in method.settings.items())
    return method.name, settings or "none", method.about


def _read(kind: str, file: Path) -> Method:
    tree = _parsed(file)
    first = (ast.get_docstring(tree) or "").partition("\n\n")[0]
    return Method(kind, file.stem, " ".join(first.split()), _settings(tree))


def _settings(tree: ast.Module) -> dict[str, str]:
    """Fields of the class that `METHOD` names; for a network source, keywords of `load`."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "METHOD":
            return _fields(tree, ast.unparse(node.value))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == "load":
            keywords = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
            return {item.arg: ast.unparse(default) if default else "" for item, default in keywords}
    return {}


def _fields(tree: ast.Module, name: str) -> dict[str, str]:
    """Fields of the dataclass `name` of a file, those of its bases first; a base is in the same file or imported from ours."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            # As `dataclass` does: a field that a class says again keeps its place and takes the new default.
            found: dict[str, str] = {}
            for base in reversed(node.bases):
                found |= _fields(tree, ast.unparse(base))
            for item in node.body:
                if isinstance(item, ast.AnnAssign) and "ClassVar" not in ast.unparse(item.annotation):
                    found[ast.unparse(item.target)] = ast.unparse(item.value) if item.value else ""
            return found
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("reverie."):
            for alias in node.names:
                if name == (alias.asname or alias.name):
                    return _fields(_parsed(_file(node.module or "")), alias.name)
    return {}


def _file(module: str) -> Path:
    """The source file of one of our modules."""
    path = Path(reverie.__file__).parent.joinpath(*module.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))
