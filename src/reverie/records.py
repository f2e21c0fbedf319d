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
class Budget:
    """What a budget made of the recipe (`budget.Schedule`)."""

    minutes: float
    factor: float
    steps: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What every run notes; what else is under `facts` is checked by whoever reads it."""

    sha256: dict[str, str] | None = None
    budget: Budget | None = None
    real_images: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Record:
    """`run.json`."""

    reverie: str
    identity: dict[str, str]
    versions: dict[str, str | int]
    earlier_versions: list[dict[str, str | int]]
    facts: Facts
    stages: dict[str, Stage]
    complete: bool
    sha256: str | None = None


def read_metrics(path: Path) -> dict[str, Any]:
    """What `metrics.json` in the run directory `path` says.

    Raises:
        ConfigError: It is not there, or no JSON object.
    """
    with at(str(path / "metrics.json")):
        found: dict[str, Any] = received.parse_json(received.read_bytes(path / "metrics.json"), dict[str, Any], PUT_BACK)
    return found
