"""`reverie runs`: the runs under a folder, with their figures."""

import re
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from reverie.cli._output import say, say_json, say_table
from reverie.report import overview
from reverie.report.overview import Overview

Order = Literal["network", "drop", "size", "time", "path"]


def runs(folder: Path = Path("runs"), /, *, sort: Order = "network", json: bool = False) -> None:
    """List the runs under a folder: network, bits, methods, accuracy or its estimated drop, size, state and time.

    Example: reverie runs

    Example: reverie runs experiments --sort drop

    Example: reverie runs experiments --json

    Args:
        folder: Where to look, with all folders below.
        sort: network (then bits, most first, then drop), drop (least first), size (smallest first), time (quickest first) or path;
            what is not known comes last.
        json: Print the figures as one JSON document.
    """
    found = sorted(overview.find(folder), key=lambda run: _key(run, sort))
    if json:
        say_json([asdict(run) for run in found])
    elif not found:
        say(f"no runs under {folder}; `reverie quantize` makes one")
    else:
        _tell(found)


def _key(run: Overview, order: Order) -> tuple[bool, object, object, object]:
    """Ascending; what has no figure behind what has one."""
    # An estimate beyond its calibration has only a lower bound.
    drop = None if run.drop is None else next(value for value in run.drop if value is not None)
    figures = {"drop": drop, "size": run.bytes, "time": run.seconds, "path": run.path}
    if order != "network":
        figure = figures[order]
        return figure is None, figure if figure is not None else 0, run.path, ""
    widths = [-float(number) for number in re.findall(r"[WA]([\d.]+)", run.bits or "")]
    return run.network is None, run.network or "", widths, (drop is None, drop or 0.0, run.path)


def _tell(found: list[Overview]) -> None:
    from reverie.progress import duration_text
    from reverie.report.comparison import accuracy_text, drop_text
    from reverie.report.outcome import NONE, size_text

    rows = [
        (
            run.path,
            run.network or NONE,
            "images only" if run.only_images else run.bits or NONE,
            run.recipe or NONE,
            accuracy_text(run),
            drop_text(run),
            NONE if run.bytes is None else size_text(run.bytes),
            run.state if run.stage is None else f"{run.state}, {'in' if run.state == 'in use' else 'at'} {run.stage}",
            NONE if run.seconds is None else duration_text(run.seconds),
        )
        for run in found
    ]
    head = ("run", "network", "bits", "methods", "accuracy", "drop, points", "size", "state", "time")
    say_table(head, rows, numbers=(4, 5, 6, 8))
    complete = sum(run.state == "complete" for run in found)
    say(f"{len(found)} {'run' if len(found) == 1 else 'runs'}, {complete} complete")
    compared = [
        run.path for run in found if run.state == "complete" and not run.only_images and run.network == found[0].network
    ]
    if len(compared) > 1:
        say(f"next: {shlex.join(['reverie', 'compare', *compared[:4]])}")
