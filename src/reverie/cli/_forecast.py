"""What `--dry-run` prints."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from reverie.cli._output import say, say_json, say_table, say_wrapped

if TYPE_CHECKING:
    from reverie.forecast import Forecast

_NONE = "-"
_KNOWN = {"timed": "steps timed here", "passes": "single images timed here", "guessed": "a guess"}


def show(found: "Forecast", output: Path, facts: dict[str, Any], *, json: bool) -> None:
    """Prints a forecast.

    Args:
        facts: What else the JSON document says.
    """
    from reverie.progress import duration_text

    if json:
        say_json({"dry_run": True, **facts, "output": str(output), **found.as_dict()})
        return
    say()
    rows = [
        (
            part.stage,
            part.work,
            _NONE if part.steps is None else f"{part.steps:,}",
            duration_text(part.seconds),
            _KNOWN[part.known],
        )
        for part in found.parts
    ]
    say_table(("stage", "what", "steps or images", "expected", "from"), rows, numbers=(2, 3))
    say()
    if found.budget is not None and found.budget.factor < 1:
        say(
            f"budget: steps are {found.budget.factor:.2f} of the recipe's, and at least 10 a stage, to learn in {found.budget.minutes:g} min"
        )
    say_wrapped(
        f"time: about {duration_text(found.seconds)}, {found.timed_share:.0%} of it from timed steps; stages that stop early take less"
    )
    say_wrapped(f"{found.memory.told()} from the network, the batches and the images held")
    say(f"output: {_state(output)}")
    say("nothing was written; the same command without --dry-run runs it")


def _state(output: Path) -> str:
    from reverie.runs import read_record

    if not (output / "run.json").is_file():
        return f"{output}, new"
    if read_record(output)["complete"]:
        return f"{output} holds this run, complete: it would be shown at once"
    return f"{output} holds this run, interrupted: it would go on, and take less"
