"""What a command line asked for, as a run records it, so that `reverie resume` can ask once more.

Names and options stand as they were given, with the folder that they were given in; paths of images and capsules are absolute.
"""

import shlex
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from reverie.cli._options import NetworkOptions
from reverie.cli._runs import Options
from reverie.errors import at

if TYPE_CHECKING:
    from reverie.best import Choice
    from reverie.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class _Choice:
    """What `best` chose."""

    preset: str
    settings: dict[str, Any]
    reasons: list[str]


@dataclass(frozen=True, kw_only=True)
class _Request:
    """What run.json keeps of a command line; `recipe` is checked by whoever reads recipes."""

    command: Literal["quantize", "synthesize"]
    line: str
    folder: str
    network: str
    options: Options
    recipe: dict[str, Any]
    choice: _Choice | None
    device: str
    calibration: str | None = None
    capsule: str | None = None
    evaluation: str | None = None
    unlabelled: str | None = None
    budget: float | None = None
    memory_limit: float | None = None
    target: str | None = None
    log: list[str] = field(default_factory=list)


def asked_in(run: Path) -> dict[str, Any] | None:
    """What `request` gave for the run in this folder; None for one that Python code began.

    Raises:
        ConfigError: No run directory, or its record is not as it was written.
    """
    from reverie import received
    from reverie.records import PUT_BACK
    from reverie.runs import read_record

    asked: dict[str, Any] | None = read_record(run)["facts"].get("request")
    if asked is not None:
        with at(f"{run / 'run.json'}: facts.request"):
            received.check_structure(asked, _Request, PUT_BACK)
        # What the other command, or an older version, has no option for.
        asked = (
            dict.fromkeys(("calibration", "capsule", "evaluation", "unlabelled", "budget", "memory_limit", "target")) | asked
        )
        asked.setdefault("log", [])
    return asked


def request(
    command: str,
    network: str,
    options: NetworkOptions,
    recipe: "Recipe",
    choice: "Choice | None" = None,
    *,
    places: dict[str, Path | str | None],
    **more: Any,
) -> dict[str, Any]:
    """What `run.json` keeps of a command line.

    Args:
        places: Folders and files of images and capsules, by what they are for; a text stays as it is.
        more: What else JSON can hold, such as the device.
    """
    from reverie.recipes import tables

    given = {key: str(value) if isinstance(value, Path) else value for key, value in options.given().items()}
    return {
        "command": command,
        "line": shlex.join(["reverie", *sys.argv[1:]]),
        "folder": str(Path.cwd()),
        "network": network,
        "options": given,
        "recipe": tables(recipe),
        "choice": None if choice is None else asdict(choice),
        **{name: str(place.absolute()) if isinstance(place, Path) else place for name, place in places.items()},
        **more,
    }
