"""What MkDocs makes of the sources when it builds the site: a page for each method and recipe, and measured tables where pages ask.

    mkdocs build --strict

A method's page is its module docstring, its settings with defaults and meanings, and the rows of docs/benchmarks.md that name it.
Nothing is imported of a method: the source files are read. A page asks for a table, so that no figure is written twice, with

    <!-- measured: HEADING -->                the first table below HEADING of docs/benchmarks.md
    <!-- measured: ABOVE / HEADING -->        likewise, where several sections have that heading
    <!-- measured: README.md: HEADING -->     likewise of another file

and the build fails where there is none.
"""

import ast
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from reverie.cli.methods import methods_of

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "reverie"
# Title of the section, what `reverie methods` calls its kind, the folder.
SECTIONS = (
    ("Images", "synthesis", "synthesis"),
    ("Rounding", "rounding", "rounding"),
    ("Ranges", "observer (activations, weights)", "observers"),
    ("Export targets", "export", "export"),
    ("Runtimes", "runtime", "runtimes"),
    ("Images for other tools", "images for other tools", "formats"),
    ("Network sources", "network source", "models"),
    ("Loggers", "logger", "loggers"),
)
# Stages of recovery are no plug-ins: their settings are tables of a recipe, or a switch in one.
STAGES = {
    "reconstruction": "recovery/reconstruction.py",
    "distillation": "recovery/distillation.py",
    "mixed_precision": "recovery/mixed_precision.py",
    "clipping": "recovery/clipping.py",
    "batch_norm_adaptation": "recovery/batch_norm_adaptation.py",
    "bias_correction": "recovery/bias_correction.py",
    "equalize": "graph/equalize.py",
}
# What rows of the benchmarks call them, where it is not their name.
ALIASES = {"reconstruction": ("qdrop", "brecq", "genie_m"), "mixed_precision": ("on average",)}
ROOT_PAGES = ("CONTRIBUTING.md", "CHANGELOG.md")
# Longer tables of rows are folded.
MOST_ROWS_OPEN = 12
_REQUEST = re.compile(r"<!-- measured: (?:(?P<file>[\w./]+\.md): )?(?P<heading>.+?) -->")


@dataclass(frozen=True)
class Table:
    """A table of a Markdown file, and the headings above it."""

    headings: tuple[str, ...]
    head: str
    rule: str
    rows: tuple[str, ...]

    def text(self, rows: tuple[str, ...] | None = None) -> str:
        """As Markdown, with these rows of it."""
        return "\n".join((self.head, self.rule, *(self.rows if rows is None else rows)))


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Puts the generated pages into the navigation."""
    methods: list[dict[str, object]] = [{"Recipes": "methods/recipes.md"}]
    for title, kind, folder in SECTIONS:
        methods.append({title: [{method.name: f"methods/{folder}/{method.name}.md"} for method in methods_of(kind)]})
    methods.insert(4, {"Recovery": [{name: f"methods/recovery/{name}.md"} for name in STAGES]})
    for entry in config.nav or []:
        if "Methods" in entry:
            entry["Methods"] = methods
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages, and those that lie beside `docs/`."""
    measured = list(tables(ROOT / "docs" / "benchmarks.md"))
    pages = {"methods/recipes.md": recipes_page()}
    for _, kind, folder in SECTIONS:
        for method in methods_of(kind):
            file = SOURCE / folder / f"{method.name}.py"
            pages[f"methods/{folder}/{method.name}.md"] = method_page(method.name, file, method.settings, measured)
    for name, place in STAGES.items():
        pages[f"methods/recovery/{name}.md"] = stage_page(name, SOURCE / place, measured)
    for name in ROOT_PAGES:
        pages[name.lower()] = (ROOT / name).read_text().replace("](docs/", "](")
    for uri, content in pages.items():
        files.append(File.generated(config, uri, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Puts measured tables where the page asks for them."""

    def table(request: re.Match[str]) -> str:
        file, asked = request["file"] or "docs/benchmarks.md", tuple(request["heading"].split(" / "))
        found = [table for table in tables(ROOT / file) if table.headings[-len(asked) :] == asked]
        if len({table.headings for table in found}) != 1:
            places = len({table.headings for table in found})
            raise PluginError(
                f"{page.file.src_uri}: {file} must have one section {request['heading']!r} with a table, got {places}"
            )
        return framed(found[0].text())

    return _REQUEST.sub(table, markdown)


def tables(file: Path) -> Iterator[Table]:
    """The tables of a Markdown file, in order."""
    headings: list[str] = []
    block: list[str] = []
    fenced = False
    for line in [*file.read_text().splitlines(), ""]:
        fenced ^= line.startswith("```")
        if line.startswith("|") and not fenced:
            block.append(line)
            continue
        if len(block) > 2:
            yield Table(tuple(headings), block[0], block[1], tuple(block[2:]))
        block = []
        if not fenced and (heading := re.match(r"(#+) (.+)", line)):
            headings = [*headings[: len(heading[1]) - 1], heading[2]]


def recipes_page() -> str:
    """Every preset, and what it is for."""
    parts = ["# Recipes", "A recipe is a TOML file of flat tables; `reverie recipe NAME` prints one with every setting."]
    for file in sorted((SOURCE / "recipes").glob("*.toml")):
        about, _, text = file.read_text().partition("\n")
        parts += [f"## `{file.stem}`", prose(about.removeprefix("#").strip()), f"```toml\n{text.strip()}\n```"]
    return "\n\n".join(parts) + "\n"


def method_page(name: str, file: Path, settings: dict[str, str], measured: list[Table]) -> str:
    """The page of a plug-in, whose settings have these defaults."""
    tree = ast.parse(file.read_text())
    said = meanings(tree, "load" if file.parent.name == "models" else method_class(tree))
    parts = [f"# `{name}`", prose(ast.get_docstring(tree) or ""), "## Settings", settings_table(settings, said)]
    return "\n\n".join([*parts, "## Measured", rows_that_name(name, measured)]) + "\n"


def stage_page(name: str, file: Path, measured: list[Table]) -> str:
    """The page of a stage of recovery, whose settings are a table of the recipe, or a switch in one."""
    tree = ast.parse(file.read_text())
    title = name.title().replace("_", "")
    found = next((node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == title), None)
    parts = [f"# `{name}`", prose(ast.get_docstring(tree) or ""), "## Settings"]
    if found is None:
        parts.append(f"A switch of the recipe: `--set quantization.{name}=true` or `=false`.")
    else:
        fields = [item for item in found.body if isinstance(item, ast.AnnAssign)]
        defaults = {ast.unparse(item.target): ast.unparse(item.value) for item in fields if item.value is not None}
        parts += [
            f"The table `[{name}]` of a recipe; `--set {name}.KEY=VALUE` changes one.",
            settings_table(defaults, meanings(tree, title)),
        ]
    return "\n\n".join([*parts, "## Measured", rows_that_name(name, measured)]) + "\n"


def method_class(tree: ast.Module) -> str:
    """The name of the class that `METHOD` is."""
    assigned = (node for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "METHOD")
    return ast.unparse(next(assigned).value)


def meanings(tree: ast.Module, name: str) -> dict[str, str]:
    """What the docstring of a class (those of its bases first) or function says of each argument."""
    said: dict[str, str] = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            for base in reversed(getattr(node, "bases", [])):
                said |= meanings(tree, ast.unparse(base))
            return said | arguments(ast.get_docstring(node) or "")
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("reverie."):
            for alias in node.names:
                if alias.name == name:
                    path = SOURCE.joinpath(*(node.module or "").split(".")[1:])
                    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
                    return meanings(ast.parse(file.read_text()), name)
    return said


def arguments(docstring: str) -> dict[str, str]:
    """The section `Args:` by name; `a, b: ...` is said of both."""
    section = re.search(r"^Args:\n((?: .*\n?|\n)+)", docstring, re.MULTILINE)
    said: dict[str, str] = {}
    for entry in re.split(r"\n(?=\S)", textwrap.dedent(section[1])) if section else []:
        names, _, text = entry.partition(":")
        said |= {name.strip(): " ".join(text.split()) for name in names.split(",")}
    return said


def settings_table(defaults: dict[str, str], said: dict[str, str]) -> str:
    """Names, defaults and meanings."""
    if not defaults:
        return "None."
    rows = [
        f"| `{name}` | {f'`{default}`' if default else ''} | {escaped(said.get(name, '')).replace('|', '&#124;')} |"
        for name, default in defaults.items()
    ]
    return framed("\n".join(["| setting | default | |", "|---|---|---|", *rows]), "settings")


def rows_that_name(name: str, measured: list[Table]) -> str:
    """The rows of all tables that have the method's name, below their headings."""
    names = "|".join(re.escape(one.replace("_", " ")) for one in (name, *ALIASES.get(name, ())))
    word = re.compile(rf"(?<![\w/-])(?:{names})(?![\w/-])", re.IGNORECASE)
    parts = []
    for table in measured:
        rows = tuple(row for row in table.rows if word.search(row.replace("_", " ")))
        if not rows:
            continue
        title = " / ".join(table.headings[1:])
        link = f"[{title}](../../benchmarks.md)"
        if len(rows) > MOST_ROWS_OPEN:
            folded = textwrap.indent(framed(table.text(rows)), "    ")
            parts.append(f'??? note "{title}: {len(rows)} rows"\n\n    {link}\n\n{folded}')
        else:
            parts.append(f"{link}\n\n{framed(table.text(rows))}")
    return "\n\n".join(parts) or "No row of [the benchmarks](../../benchmarks.md) names it."


def framed(table: str, kind: str = "figures") -> str:
    """A table as one of its kind, which `site.css` knows."""
    return f'<div class="{kind}" markdown>\n\n{table}\n\n</div>'


def prose(docstring: str) -> str:
    """A docstring as Markdown: indented blocks are code, and the rest has no emphasis."""
    return "\n".join(line if line.startswith("    ") else escaped(line) for line in docstring.splitlines())


def escaped(line: str) -> str:
    """A line outside of code: what Markdown would take for markup stands as it is, and arXiv numbers become links."""
    parts = re.split(r"(`[^`]*`)", line)
    for index in range(0, len(parts), 2):
        plain = re.sub(r"([\\*_<\[\]])", r"\\\1", parts[index])
        parts[index] = re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", plain)
    return "".join(parts)
