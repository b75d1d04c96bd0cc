"""Send a training to MLflow or Weights & Biases: settings, losses, metrics and the report.

A tracker must not cost a run: if it fails, training continues without it, and a warning says so.
"""

from __future__ import annotations

import importlib
import logging
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from pipelines.errors import SettingsError, first_line
from pipelines.storage.locations import commit_json, exists, read_json
from pipelines.training.checkpoints import TRACKING_FILE
from pipelines.training_settings import TrainSettings

PACKAGES = {"mlflow": "mlflow", "wandb": "wandb"}
"""The package of each tracker, which is also the name of the extra."""
SILENCE = {"mlflow": {"MLFLOW_DISABLE_TELEMETRY": "true"}, "wandb": {"WANDB_ERROR_REPORTING": "false"}}
"""Variables, unless they are set, with which a package does not report its use or its errors to its makers."""
PROJECT = "ray-text-classification"
LONGEST_VALUE = 500
"""Characters of a setting that are sent. MLflow refuses longer ones."""
logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """A run at a tracking system."""

    run_id: str

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send numbers by name."""

    def log_file(self, path: Path) -> None:
        """Send a file."""

    def end(self, *, is_finished: bool) -> None:
        """End the run, unless it is the caller's own."""


class Tracking:
    """A tracker, or none. After the first failure of the tracker, nothing more is sent."""

    def __init__(self, tracker: Tracker | None = None) -> None:
        self._tracker = tracker

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Send the numbers among some values."""
        numbers = {
            name: float(value)
            for name, value in values.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        }
        self._try(lambda tracker: tracker.log(numbers, step))

    def log_files(self, *paths: Path) -> None:
        """Send files, as far as they exist."""
        for path in paths:
            if path.is_file():
                self._try(lambda tracker, path=path: tracker.log_file(path))

    def end(self, *, is_finished: bool) -> None:
        """End the run."""
        self._try(lambda tracker: tracker.end(is_finished=is_finished))

    def _try(self, action: Any) -> None:
        if self._tracker is None:
            return
        try:
            action(self._tracker)
        except Exception as error:  # noqa: BLE001  whatever a tracker raises, it must not end the training
            self._tracker = None
            logger.warning("tracking has failed, and training continues without it: %s", first_line(error))


def check_tracking(settings: TrainSettings) -> None:
    """Raise SettingsError if the package of the tracker is not installed."""
    if settings.tracking != "none":
        _package(settings.tracking)


@contextmanager
def tracked(settings: TrainSettings, output: str, values: Mapping[str, Any], *, is_shown: bool) -> Iterator[Tracking]:
    """Track a training. A run that is resumed continues its run at the tracker.

    Args:
        settings: tracking and tracking_project.
        output: Output folder of the training. Its name is the name of the run.
        values: Settings of the run, by name.
        is_shown: Whether this process tracks: only rank 0 does.
    """
    if settings.tracking == "none" or not is_shown:
        yield Tracking()
        return
    tracking = Tracking(_started(settings, output, values))
    is_finished = False
    try:
        yield tracking
        is_finished = True
    finally:
        tracking.end(is_finished=is_finished)


def _started(settings: TrainSettings, output: str, values: Mapping[str, Any]) -> Tracker | None:
    before = read_json(output, TRACKING_FILE) if exists(output, TRACKING_FILE) else {}
    run_id = before.get("run_id") if before.get("tracker") == settings.tracking else None
    name = output.rstrip("/").rpartition("/")[2]
    texts = {key: str(value)[:LONGEST_VALUE] for key, value in values.items()}
    kind = _MlflowRun if settings.tracking == "mlflow" else _WandbRun
    project = settings.tracking_project or os.environ.get(kind.VARIABLE) or PROJECT
    try:
        tracker: Tracker = kind(_package(settings.tracking), project, name, texts, run_id)
    except Exception as error:  # noqa: BLE001  as above
        logger.warning("tracking has failed, and training continues without it: %s", first_line(error))
        return None
    commit_json(output, TRACKING_FILE, {"tracker": settings.tracking, "run_id": tracker.run_id})
    return tracker


def _package(tracker: str) -> Any:
    for name, value in SILENCE[tracker].items():
        os.environ.setdefault(name, value)
    try:
        return importlib.import_module(PACKAGES[tracker])
    except ImportError as error:
        raise SettingsError(
            f"tracking={tracker} needs a package: pip install 'ray-text-classification[{tracker}]'"
        ) from error


class _MlflowRun:
    """A run of MLflow, at MLFLOW_TRACKING_URI. A run that the caller has started is used and stays open."""

    VARIABLE = "MLFLOW_EXPERIMENT_NAME"
    """Names the experiment if the settings do not."""

    def __init__(self, mlflow: Any, project: str, name: str, settings: Mapping[str, str], run_id: str | None) -> None:
        self._mlflow = mlflow
        active = mlflow.active_run()
        self._is_own = active is None
        if active is None:
            mlflow.set_experiment(project)
            active = mlflow.start_run(run_id=run_id) if run_id else mlflow.start_run(run_name=name)
        self.run_id = str(active.info.run_id)
        if run_id is None:
            mlflow.log_params(dict(settings))

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._mlflow.log_metrics(dict(values), step=step)

    def log_file(self, path: Path) -> None:
        self._mlflow.log_artifact(str(path))

    def end(self, *, is_finished: bool) -> None:
        if self._is_own:
            self._mlflow.end_run("FINISHED" if is_finished else "KILLED")


class _WandbRun:
    """A run of Weights & Biases. A run that the caller has started is used and stays open."""

    VARIABLE = "WANDB_PROJECT"
    """Names the project if the settings do not."""

    def __init__(self, wandb: Any, project: str, name: str, settings: Mapping[str, str], run_id: str | None) -> None:
        self._is_own = wandb.run is None
        self._run = wandb.run or wandb.init(
            project=project,
            name=name,
            config=dict(settings),
            id=run_id,
            resume="allow" if run_id else None,
            settings=wandb.Settings(console="off"),  # it would take over stdout, which has the results
        )
        self.run_id = str(self._run.id)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, "step": step})

    def log_file(self, path: Path) -> None:
        copy = shutil.copy(path, self._run.dir)  # wandb itself would link to it, and it does not stay
        self._run.save(str(copy), base_path=self._run.dir, policy="now")

    def end(self, *, is_finished: bool) -> None:
        if self._is_own:
            self._run.finish(exit_code=0 if is_finished else 1)
