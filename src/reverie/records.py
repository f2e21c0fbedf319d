"""What `run.json` and `metrics.json` of a run hold, as far as anything depends on it when they are read back.

Both are text that travels with a run, so what reads them checks their structure first and says which part is not as it was written.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reverie import received
from reverie.errors import at

PUT_BACK = "put back the file that the run wrote"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A finished stage: how long it took, in all processes together."""

    seconds: float


@dataclass(frozen=True, kw_only=True)
class Record:
    """`run.json`. What is under `facts` is checked by whoever reads it."""

    reverie: str
    identity: dict[str, str]
    versions: dict[str, str | int]
    earlier_versions: list[dict[str, str | int]]
    facts: dict[str, Any]
    stages: dict[str, Stage]
    complete: bool


def read_metrics(path: Path) -> dict[str, Any]:
    """What `metrics.json` in the run directory `path` says.

    Raises:
        ConfigError: It is not there, or no JSON object.
    """
    with at(str(path / "metrics.json")):
        found: dict[str, Any] = received.parse_json(received.read_bytes(path / "metrics.json"), dict[str, Any], PUT_BACK)
    return found
