"""The sink for MLflow: one run there for each of ours, with metrics `sae/event/figure`.

Speaks through the client alone: `mlflow.start_run` and the like keep one state for the whole process.
"""

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import islice

from pydantic import SecretStr

from .sink import Line, NewLines, Outcome, Shown

# whom the operator has not named, nothing is told; and whoever names a folder means it
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run
from mlflow.exceptions import MlflowException

TAG = "mistudio.run"
"""Holds the name of our run, by which a later attempt finds it."""
METRICS_AT_ONCE, PARAMS_AT_ONCE = 1000, 100
"""MLflow's limits of one call."""
PARAM_CHARACTERS = 500
"""Its limit, in the versions that allow the least."""
STATUS = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}


class MLflowRun:
    """A run of MLflow's, new or gone on with.

    Args:
        uri: of a tracking server, or a folder.
        experiment: its name, made if missing.
        shown: the run.

    """

    def __init__(self, uri: SecretStr | None, experiment: str, shown: Shown) -> None:
        if uri is None:
            raise ValueError("set MLFLOW_TRACKING_URI to a tracking server or a folder")
        self._client = MlflowClient(tracking_uri=uri.get_secret_value())
        run = self._run(self._experiment(experiment), shown)
        self._id, known = run.info.run_id, run.data.metrics
        self._new = NewLines(lambda curve: known.get(f"{curve}/step"))

    def write(self, lines: Sequence[Line]) -> None:
        """Log a metric a figure."""
        now = time.time_ns() // 1_000_000
        metrics = (
            Metric(f"{line.curve}/{name}", value, now, line.step)
            for line in self._new.among(lines)
            for name, value in line.figures.items()
        )
        while some := list(islice(metrics, METRICS_AT_ONCE)):
            self._client.log_batch(self._id, metrics=some)

    def close(self, outcome: Outcome) -> None:
        """Set the run's status."""
        self._client.set_terminated(self._id, STATUS[outcome])

    def _experiment(self, name: str) -> str:
        with suppress(MlflowException):  # it is there, or another job makes it just now
            return str(self._client.create_experiment(name))
        if (found := self._client.get_experiment_by_name(name)) is None:
            raise ValueError(f"MLflow has no experiment {name}, and none can be made")
        return str(found.experiment_id)

    def _run(self, experiment: str, shown: Shown) -> Run:
        found = self._client.search_runs([experiment], filter_string=f"tags.`{TAG}` = '{shown.name}'", max_results=1)
        if found:
            self._client.update_run(found[0].info.run_id, status="RUNNING")
            return found[0]
        run = self._client.create_run(experiment, run_name=shown.name, tags={TAG: shown.name})
        params = iter([Param(name, str(value)[:PARAM_CHARACTERS]) for name, value in shown.params.items()])
        while some := list(islice(params, PARAMS_AT_ONCE)):
            self._client.log_batch(run.info.run_id, params=some)
        return run
