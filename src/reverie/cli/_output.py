"""What commands write to standard output: aligned tables for people, one JSON document for programs."""

import json
import sys
from collections.abc import Sequence


def say(text: str = "") -> None:
    """Writes a line."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def say_json(value: object) -> None:
    """Writes `value` as a JSON document."""
    say(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def say_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[int] = ()) -> None:
    """Writes the rows below their heads; the columns `numbers` are aligned to the right."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    for row in (head, ["-" * width for width in widths], *rows):
        cells = (
            cell.rjust(width) if column in numbers else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        say("  ".join(cells).rstrip())
