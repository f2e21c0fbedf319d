"""A run of MLflow in the experiment `experiment`, where `MLFLOW_TRACKING_URI` says, or else in `mlflow.db` of the current folder.

Losses go there in batches, since each call is a transaction. MLflow's own telemetry is switched off unless the environment says otherwise:
nothing that Reverie does asks the network unasked. A resumed run is another run of MLflow.
"""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from reverie.errors import ConfigError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

# MLflow takes at most 1,000 metrics and 100 parameters at once.
_METRICS, _PARAMETERS = 500, 100
# What is kept as an artifact.
_FILES = ("report.html", "README.md", "recipe.toml", "metrics.json", "images/contact_sheet.png")


@dataclass(frozen=True, kw_only=True)
class MLflow:
    """Runs of an experiment.

    Args:
        experiment: Its name; made if there is none.
    """

    library: ClassVar[str] = "mlflow"
    experiment: str = "reverie"

    def __post_init__(self) -> None:
        if not self.experiment:
            raise ConfigError("experiment must be a name, got ''")

    def open(self, run: Path, name: str) -> "Tracked":
        """A new run of the experiment, named after the run directory."""
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient

        client = MlflowClient()
        found = client.get_experiment_by_name(self.experiment)
        identity = client.create_experiment(self.experiment) if found is None else found.experiment_id
        return Tracked(client, client.create_run(identity, run_name=run.name, tags={"network": name}).info.run_id)


class Tracked:
    """One run of MLflow."""

    def __init__(self, client: "MlflowClient", identity: str) -> None:
        self._client, self._identity = client, identity
        self._waiting: list[Metric] = []

    def loss(self, name: str, step: int, value: float) -> None:
        """A point of a curve."""
        self._note(name, value, step)
        if len(self._waiting) >= _METRICS:
            self._send()

    def result(self, figures: Mapping[str, float], settings: Mapping[str, str], run: Path) -> None:
        """The figures as metrics, the recipe's settings as parameters, the report and the card as artifacts."""
        from mlflow.entities import Param

        for name, value in figures.items():
            self._note(name, value, 0)
        self._send()
        parameters = [Param(name, value) for name, value in settings.items()]
        for first in range(0, len(parameters), _PARAMETERS):
            self._client.log_batch(self._identity, params=parameters[first : first + _PARAMETERS])
        for file in _FILES:
            if (run / file).is_file():
                self._client.log_artifact(self._identity, str(run / file))

    def close(self, *, failed: bool) -> None:
        """Everything is there, and the run is over."""
        self._send()
        self._client.set_terminated(self._identity, "FAILED" if failed else "FINISHED")

    def _note(self, name: str, value: float, step: int) -> None:
        from mlflow.entities import Metric

        self._waiting.append(Metric(name, value, int(1000 * time.time()), step))

    def _send(self) -> None:
        for first in range(0, len(self._waiting), _METRICS):
            self._client.log_batch(self._identity, metrics=self._waiting[first : first + _METRICS])
        self._waiting.clear()


METHOD = MLflow
