"""What commands write to standard output: aligned tables for people, one JSON document for programs."""

import json
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path


def say(text: str = "") -> None:
    """Writes a line."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def say_json(value: object) -> None:
    """Writes `value` as a JSON document."""
    say(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def say_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[int] = ()) -> None:
    """Writes the rows below their heads; the columns `numbers` are aligned to the right.

    A terminal that is too narrow gets the table on its side, a line for each head, or, where that is too wide as well, a paragraph for
    each row.
    """
    lines, width = _aligned(head, rows, numbers), _terminal_width()
    if width is not None and max(map(len, lines)) > width:
        sides = list(zip(head, *rows, strict=True))
        lines = _aligned(sides[0], sides[1:], range(1, len(rows) + 1))
        if max(map(len, lines)) > width:
            lines = [line for row in rows for line in _paragraph(head, row, width)]
    for line in lines:
        say(line)


def say_wrapped(text: str) -> None:
    """Writes a sentence, between words broken to the width of the terminal, if it is one."""
    width = _terminal_width()
    for line in [text] if width is None else textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False):
        say(line)


def _aligned(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int]) -> list[str]:
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    lines = []
    for row in (head, ["-" * width for width in widths], *rows):
        cells = (
            cell.rjust(width) if column in numbers else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join(cells).rstrip())
    return lines


def _paragraph(head: Sequence[str], row: Sequence[str], width: int) -> list[str]:
    """The first cell, and below it what the others are called and say."""
    told = [f"{name} {cell}".strip() for name, cell in zip(head[1:], row[1:], strict=True) if cell not in ("", "-")]
    indent = " " * 4
    # What belongs together stays in one line where it can.
    text = "; ".join(part.replace(" ", "\0") for part in told)
    found = textwrap.wrap(
        text, width, initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    return [row[0], *(line.replace("\0", " ") for line in found)]


def _terminal_width() -> int | None:
    """Columns of the terminal that standard output is; None where it is none, and nothing need fit."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def listing(folder: Path) -> str:
    """The folder, and what lies in it."""
    return f"{folder}: {', '.join(sorted(f'{entry.name}/' if entry.is_dir() else entry.name for entry in folder.iterdir()))}"
