"""Training is tracked by real MLflow and real Weights & Biases, with local stores."""

import json
import os
import subprocess
import sys

import pytest

from pipelines.errors import SettingsError
from pipelines.model_folder import read_model_folder
from pipelines.training import job as job_module
from pipelines.training import tracking
from pipelines.training.fit import fit
from pipelines.training.job import train_here
from tests.jobs import train_job

mlflow = pytest.importorskip("mlflow")
wandb = pytest.importorskip("wandb")


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A file store of MLflow."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(f"file://{tmp_path}/mlruns")
    yield mlflow.MlflowClient()
    mlflow.end_run()


def runs_of(client, project="ray-text-classification"):
    experiment = client.get_experiment_by_name(project)
    return client.search_runs([experiment.experiment_id])


def test_mlflow_gets_settings_curves_metrics_and_the_report(training_data, tmp_path, store):
    summary = train_here(train_job(training_data, tmp_path / "spam", tracking="mlflow", logging_steps=5))
    (run,) = runs_of(store)
    assert (run.info.run_name, run.info.status) == ("spam", "FINISHED")
    assert run.data.params["learning_rate"] == "0.001"
    assert run.data.params["kind"] == "binary"
    losses = store.get_metric_history(run.info.run_id, "loss")
    assert [point.step for point in losses] == list(range(5, summary.steps + 1, 5))
    assert run.data.metrics["final_mcc"] == pytest.approx(summary.valid["mcc"])
    assert run.data.metrics["valid/auprc"] == pytest.approx(summary.evaluations[-1]["auprc"])
    assert {file.path for file in store.list_artifacts(run.info.run_id)} == {"report.html", "pipeline.json"}
    assert not (tmp_path / "spam" / "_tracking.json").exists()


def test_resumed_run_continues_the_run_of_the_tracker(training_data, tmp_path, store, monkeypatch):
    def fit_interrupted(*arguments, **more):
        return fit(*arguments, **{**more, "is_interrupted": lambda: True})

    job = train_job(training_data, tmp_path / "spam", tracking="mlflow", logging_steps=1)
    monkeypatch.setattr(job_module, "fit", fit_interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_here(job)
    (first,) = runs_of(store)
    assert first.info.status == "KILLED"
    monkeypatch.setattr(job_module, "fit", fit)
    summary = train_here(job)
    (run,) = runs_of(store)
    assert (run.info.run_id, run.info.status) == (first.info.run_id, "FINISHED")
    assert len(store.get_metric_history(run.info.run_id, "loss")) == summary.steps


def test_experiment_of_the_environment_is_used(training_data, tmp_path, store, monkeypatch):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    train_here(train_job(training_data, tmp_path / "spam", tracking="mlflow"))
    assert len(runs_of(store, "mine")) == 1


def test_run_of_the_caller_is_used_and_stays_open(training_data, tmp_path, store):
    mlflow.set_experiment("sweep")
    with mlflow.start_run() as mine:
        train_here(train_job(training_data, tmp_path / "spam", tracking="mlflow"))
        assert mlflow.active_run().info.run_id == mine.info.run_id
    (run,) = runs_of(store, "sweep")
    assert "final_mcc" in run.data.metrics


def test_wandb_offline(training_data, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb.teardown()  # it reads its environment once in a process
    job = train_job(training_data, tmp_path / "spam", tracking="wandb", tracking_project="mail", logging_steps=5)
    train_here(job)
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert list(folder.glob("*.wandb"))
    assert (folder / "files" / "report.html").exists()
    assert wandb.run is None
    wandb.teardown()


def test_trackers_report_nothing_to_their_makers():
    """Asked in a new process, because both packages read these variables when they are imported, and spare CI."""
    program = (
        "from pipelines.training import tracking\n"
        "tracking._package('mlflow'), tracking._package('wandb')\n"
        "from mlflow.telemetry.utils import is_telemetry_disabled\n"
        "import wandb.env\n"
        "print(is_telemetry_disabled(), wandb.env.error_reporting_enabled())"
    )
    hidden = ("CI", "PYTEST_", "GITHUB_", "MLFLOW_DISABLE_TELEMETRY", "WANDB_ERROR_REPORTING")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    command = [sys.executable, "-W", "ignore", "-c", program]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=100)
    assert run.stdout.splitlines()[-1] == "True False", run.stderr


def test_failing_tracker_costs_no_run(training_data, tmp_path, store, monkeypatch, log_lines):
    def fail(*_, **__):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(mlflow, "log_metrics", fail)
    train_here(train_job(training_data, tmp_path / "spam", tracking="mlflow", logging_steps=5))
    assert read_model_folder(tmp_path / "spam").metrics
    warned = [line for line in log_lines if "training continues without it: no route to host" in line]
    assert len(warned) == 1
    monkeypatch.setattr(mlflow, "start_run", fail)
    train_here(train_job(training_data, tmp_path / "again", tracking="mlflow"))
    assert json.loads((tmp_path / "again" / "pipeline.json").read_text())["metrics"]


def test_missing_package_is_named_before_work(training_data, tmp_path, monkeypatch):
    monkeypatch.setitem(tracking.PACKAGES, "mlflow", "no_such_package")
    with pytest.raises(SettingsError, match=r"tracking=mlflow needs a package: pip install '.*\[mlflow\]'"):
        train_here(train_job(training_data, tmp_path / "out", tracking="mlflow"))
    assert not (tmp_path / "out").exists()
