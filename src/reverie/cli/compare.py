"""`reverie compare`: runs of one network side by side, on the terminal and on a page."""

from pathlib import Path

from reverie.cli._output import say, say_json, say_table, say_wrapped
from reverie.errors import ConfigError


def compare(*runs: Path, output: Path = Path("compare.html"), any_network: bool = False, json: bool = False) -> None:
    """Put complete runs of one network side by side: a table here, and one HTML page that needs nothing else.

    Accuracy, drop with its interval, agreement, size, latency, time and memory, with a mark on whoever is ahead; then what differs in
    the recipes and in the versions. Figures that do not mean the same are not ranked, and a line says why.

    Example: reverie compare runs/embedded-digits-w8a8 runs/embedded-digits-w4a8

    Example: reverie compare runs/a runs/b runs/c --output abc.html

    Args:
        runs: Run directories that `reverie quantize` completed, at least two.
        output: The page; an older one of ours there is replaced.
        any_network: Compare runs of different networks, too.
        json: Print the comparison as one JSON document.
    """
    from reverie.report import comparison, overview

    _check_place(output)
    for run in runs:
        if not (run / "run.json").is_file():
            raise ConfigError(
                f"{run}: must be a run directory, got no run.json in it; `reverie runs` lists those that there are"
            )
    found = comparison.compare([overview.look_at(run) for run in runs], any_network=any_network)
    from reverie.files import atomic_text

    atomic_text(output, comparison.page(found))
    if json:
        say_json(found.as_dict() | {"page": str(output)})
        return
    rows = [(name, *(_marked(column, row) for column in found.columns)) for row, name in enumerate(found.names)]
    say_table(("run", *(column.name for column in found.columns)), rows, numbers=range(3, len(found.columns) + 1))
    say_wrapped(f"{comparison.MARK} ahead by the number alone; whether a difference is more than chance, the intervals tell")
    for note in found.notes:
        say_wrapped(note)
    say()
    differing = {f"{key}": values for key, values in found.recipe.items()} | {
        name: found.versions[name] for name in found.changed
    }
    if differing:
        texts = [(key, *map(comparison.setting_text, values)) for key, values in differing.items()]
        say_table(("differs", *found.names), texts)
    else:
        say("the recipes and versions are the same")
    say(f"page: {output}")


def _marked(column: object, row: int) -> str:
    from reverie.report.comparison import MARK, Column

    assert isinstance(column, Column)
    if not column.best:
        return column.texts[row]
    return f"{column.texts[row]} {MARK if row in column.best else ' '}"


def _check_place(output: Path) -> None:
    from reverie.report.comparison import GENERATOR

    if not output.absolute().parent.is_dir():
        raise ConfigError(f"{output}: must be in a folder that exists, got none; create it or choose another --output")
    if output.is_dir():
        raise ConfigError(f"{output}: must be a file, got a folder; choose another --output")
    if output.exists() and f'content="{GENERATOR}"'.encode() not in output.read_bytes():
        raise ConfigError(f"{output}: must be new or a page of `reverie compare`, got another file; choose another --output")
