"""What a command line asked for, as a run records it, so that `reverie resume` can ask once more.

Names and options stand as they were given, with the folder that they were given in; paths of images and capsules are absolute.
"""

import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reverie.cli._options import NetworkOptions

if TYPE_CHECKING:
    from reverie.best import Choice
    from reverie.recipe import Recipe


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
    from reverie.recipe import tables

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
