"""Fine-tuning in Ray Train workers. Tests that need no Ray are in tests/training."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from ray.train.torch import TorchTrainer

from pipelines.errors import JobError, SettingsError
from pipelines.model_folder import read_model_folder
from pipelines.on_ray.train import train
from pipelines.training.checkpoints import steps_of
from pipelines.training.job import TrainJob, train_here
from tests.jobs import clean_environment, start_command, train_job, train_values

HERE = Path(__file__).parent
STEPS = {"epochs": 3, "save_steps": 4, "shuffle_buffer": 30, "weight": None}


@pytest.mark.usefixtures("local_ray")
def test_two_workers_match_one_process(training_data, tmp_path, monkeypatch, log_lines):
    monkeypatch.chdir(training_data)
    paths = {"train": "data", "valid": "data/1.parquet", "model": "base"}
    alone = train(train_job(training_data, tmp_path / "0", shuffle_buffer=30))
    logs = {"tensorboard_dir": str(tmp_path / "logs"), "logging_steps": 3}
    settings = train_values(training_data, tmp_path / "2", num_workers=2, shuffle_buffer=30, **logs)
    workers = train(TrainJob.parse({**settings, **paths}))
    assert (alone.workers, workers.workers) == (1, 2)
    assert alone.rows_in_error == workers.rows_in_error == 1
    np.testing.assert_allclose(workers.losses[:15], alone.losses[:15], rtol=2e-4)
    assert workers.valid == pytest.approx(alone.valid, rel=1e-3)
    assert read_model_folder(tmp_path / "2").metrics == workers.valid
    assert "2 workers on CPUs" in log_lines
    assert sum("valid auprc" in line for line in log_lines) == 2, "one line per run, forwarded from the workers"
    assert "1.parquet row" in (tmp_path / "2" / "report.html").read_text(), "documents are named by file and row"
    assert list((tmp_path / "logs").glob("events.*"))


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_worker_error_keeps_checkpoints(training_data, tmp_path):
    settings = {"learning_rate": 1e30, "warmup_ratio": 0.9, "shuffle_buffer": 30, "save_steps": 1, "num_workers": 1}
    with pytest.raises(JobError, match=r"^the loss or its gradient is not finite at step"):
        train(train_job(training_data, tmp_path / "out", **settings))
    assert list((tmp_path / "out").glob("checkpoints/*"))


@pytest.mark.usefixtures("local_ray")
def test_too_many_workers_are_refused(training_data, tmp_path):
    with pytest.raises(SettingsError, match="needs 500 CPU at once, and the local Ray has"):
        train(train_job(training_data, tmp_path / "out", num_workers=500, limit=10))
    assert not (tmp_path / "out").exists()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_lost_worker_is_replaced(training_data, tmp_path):
    output = tmp_path / "lost"
    settings = train_values(training_data, output, **{**STEPS, "save_steps": None}, num_workers=2, save_minutes=0)
    (tmp_path / "train.yaml").write_text(json.dumps(settings))
    process = start_command("train", "--config", tmp_path / "train.yaml", "--json")
    deadline = time.monotonic() + 180
    while not list(output.glob("checkpoints/step-*/training_state.json")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    children = psutil.Process(process.pid).children(recursive=True)
    workers = [child for child in children if "TrainWorker" in title(child)]
    assert workers
    workers[-1].kill()
    out, err = process.communicate(timeout=300)
    assert process.returncode == 3, err[-3000:]
    assert re.search(r"resuming from step \d*0, ", err, re.MULTILINE), "save_minutes is checked every ten steps"
    summary = json.loads(out)
    expected = train_here(train_job(training_data, tmp_path / "undisturbed", **STEPS))
    assert summary["steps"] == expected.steps
    np.testing.assert_allclose(summary["losses"], expected.losses, rtol=2e-3)


def test_ray_still_lets_its_handler_be_replaced():
    """Otherwise Ctrl-C would abort the workers without a checkpoint."""
    assert callable(TorchTrainer._register_sigint_handler)


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_interrupt_with_workers_writes_a_checkpoint(training_data, tmp_path):
    settings = train_values(training_data, tmp_path / "out", epochs=2000, save_each_epoch=False, num_workers=2)
    (tmp_path / "train.yaml").write_text(json.dumps(settings))
    process = start_command("train", "--config", tmp_path / "train.yaml")
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("trained"):
            process.send_signal(signal.SIGINT)
            break
    _, rest = process.communicate(timeout=200)
    assert process.returncode == 130, "".join(lines)[-3000:] + rest[-3000:]
    step = int(re.search(r"the checkpoint of step (\d+) is kept", rest)[1])
    assert rest.count(f"interrupted: writing a checkpoint of step {step}") == 1, "only one rank says it"
    assert step % 10 == 0, "the workers agree every ten steps"
    assert "Traceback" not in rest
    assert steps_of(str(tmp_path / "out")) == [step]


def title(process):
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(700)
def test_elastic_workers(training_data, tmp_path):
    changes = {**STEPS, "save_steps": None, "epochs": 120}  # a node may need half a minute to join
    settings = train_values(training_data, tmp_path / "elastic", num_workers="1:2", resize_seconds=3, **changes)
    del settings["valid"]
    done = subprocess.run(
        [sys.executable, str(HERE / "elastic.py"), json.dumps(settings)],
        capture_output=True, text=True, timeout=680, check=False, env=clean_environment(), cwd=HERE.parent.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    lines = done.stderr.splitlines()
    begun = [line for line in lines if line.startswith("training on")]
    assert begun == [f"training on {count} workers" for count in (1, 2, 1)], "the number of workers grows and shrinks"
    (notice,) = [line for line in lines if "a machine of this run will be taken away" in line]
    resumed = [line.split()[3].strip(",") for line in lines if line.startswith("resuming from step")]
    assert int(resumed[-1]) >= int(notice.split()[-1])
    summary = json.loads(done.stdout.splitlines()[-1])
    assert len(summary["losses"]) == summary["steps"], "no step is missing or repeated"
    assert np.mean(summary["losses"][-100:]) < 0.01
