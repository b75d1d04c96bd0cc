"""Training that is killed and resumed: the same weights as of a run that nothing interrupted."""

import json
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from pipelines.errors import JobError, OutputError
from pipelines.model_folder import local_folder, read_model_folder
from pipelines.training import checkpoints
from pipelines.training.checkpoints import STATE_FILE, fetch_newest, open_training, publish, remove_all
from pipelines.training.fit import fit
from pipelines.training.job import train_here
from tests.jobs import start_command, train_job, train_values

STEPS = {"epochs": 3, "save_steps": 4, "shuffle_buffer": 30, "weight": None}


def start(folder, settings):
    """The command in a process of its own."""
    (folder / "train.yaml").write_text(json.dumps(settings))
    return start_command("train", "--config", folder / "train.yaml", "--json")


def finish(process):
    """The summary and the log of a run that leaves out a row without a text."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 3, err[-3000:]
    return json.loads(out), err


def wait_for_checkpoint(output, process):
    deadline = time.monotonic() + 120
    while not list(Path(output).glob("checkpoints/step-*/training_state.json")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def same_weights(left, right):
    """All but the keys' biases: softmax does not depend on them, so Adam turns their rounding into full steps."""
    one, other = load_file(Path(left) / "model.safetensors"), load_file(Path(right) / "model.safetensors")
    assert one.keys() == other.keys()
    for name, weights in one.items():
        if name.endswith("key.bias"):
            continue
        np.testing.assert_allclose(weights, other[name], atol=2e-5, err_msg=name)


@pytest.mark.timeout(400)
def test_a_killed_run_resumes_and_ends_with_the_same_weights(training_data, tmp_path):
    output, whole = tmp_path / "killed", tmp_path / "whole"
    expected, _ = finish(start(tmp_path, train_values(training_data, whole, **STEPS)))  # each in a process of its own
    process = start(tmp_path, train_values(training_data, output, **STEPS))
    wait_for_checkpoint(output, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (output / "pipeline.json").exists()
    with pytest.raises(OutputError, match=r"unfinished run whose learning_rate was 0\.001 and is 0\.002"):
        train_here(train_job(training_data, output, **{**STEPS, "learning_rate": 2e-3}))
    with pytest.raises(OutputError, match="train was 'sha256:"):
        train_here(train_job(training_data, output, **STEPS, train=str(training_data / "data" / "0.parquet")))
    summary, log = finish(start(tmp_path, train_values(training_data, output, **{**STEPS, "save_steps": 5})))
    (resumed,) = re.findall(r"^resuming from step (\d+)$", log, re.MULTILINE)
    assert int(resumed) >= 4
    assert summary["steps"] == expected["steps"]
    np.testing.assert_allclose(summary["losses"], expected["losses"], rtol=1e-4)
    assert summary["thresholds"] == pytest.approx(expected["thresholds"], abs=1e-4)  # scores moved by 1e-7
    same_weights(output, whole)
    names = {path.name for path in output.iterdir()}
    assert not names & {"checkpoints", "_run.json"}, "nothing that only an unfinished run needs is left"
    with pytest.raises(OutputError, match="is not empty"):
        train_here(train_job(training_data, output, **STEPS))


@pytest.mark.filterwarnings("ignore")
def test_a_run_begins_in_an_object_store_and_resumes_from_its_newest_checkpoint(tmp_path, flaky_s3, monkeypatch):
    import fsspec

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    store = fsspec.filesystem("s3", skip_instance_cache=True)
    store.mkdir("trained")
    output = "s3://trained/new/model"
    assert not open_training(output, {"seed": 1}), "a folder that does not exist yet is empty"
    assert open_training(output, {"seed": 1})
    with pytest.raises(OutputError, match="seed was 1 and is 2"):
        open_training(output, {"seed": 2})
    written = tmp_path / "written"
    written.mkdir()
    (written / "tokenizer.json").write_text("{}")
    publish(written, output, last="tokenizer.json")
    for name in ("training_state.pt", STATE_FILE):
        (written / name).write_text("{}")
    for step in (4, 8):
        publish(written, f"{output}/checkpoints/step-{step:09d}", last=STATE_FILE)
    (tmp_path / "scratch").mkdir()
    newest = fetch_newest(output, tmp_path / "scratch")
    assert {file.name for file in newest.iterdir()} == {"tokenizer.json", "training_state.pt", STATE_FILE}
    fetched = {file.name for file in local_folder(output).iterdir()}
    assert fetched == {"_run.json", "tokenizer.json"}, "a process that tokenizes needs no checkpoint"
    remove_all(output)
    store.invalidate_cache()
    assert [name.rpartition("/")[2] for name in store.find("trained/new/model")] == ["tokenizer.json"]


def test_a_model_may_be_written_to_any_filesystem(training_data, tmp_path):
    settings = {**STEPS, "epochs": 1}
    train_here(train_job(training_data, "memory://trained/model", **settings))
    train_here(train_job(training_data, tmp_path / "out", **settings))
    found = read_model_folder("memory://trained/model")
    assert found.weights_hash == read_model_folder(tmp_path / "out").weights_hash
    same_weights(found.path, tmp_path / "out")


def test_only_the_newest_checkpoints_stay(training_data, tmp_path, monkeypatch):
    seen = []
    real = checkpoints.publish

    def recorded(folder, location, *, last):
        real(folder, location, last=last)
        seen.append(checkpoints.steps_of(str(tmp_path / "out")))

    monkeypatch.setattr(checkpoints, "publish", recorded)
    settings = {**STEPS, "epochs": 1, "save_steps": 2, "keep_checkpoints": 3, "save_each_epoch": False}
    train_here(train_job(training_data, tmp_path / "out", **settings))
    assert max(map(len, seen)) == 4, "three and the one just written"
    assert all(steps == sorted(steps) for steps in seen)


def test_a_checkpoint_is_written_for_a_machine_that_will_be_taken_away(training_data, tmp_path, monkeypatch, log_lines):
    written = []
    real = checkpoints.publish

    def recorded(folder, location, *, last):
        written.append(Path(location).name)
        real(folder, location, last=last)

    def fit_preempted(*arguments):
        return fit(*arguments, is_preempted=lambda: True)

    monkeypatch.setattr(checkpoints, "publish", recorded)
    monkeypatch.setattr("pipelines.training.job.fit", fit_preempted)
    settings = {**STEPS, "epochs": 1, "save_steps": None, "save_each_epoch": False}
    train_here(train_job(training_data, tmp_path / "out", **settings))
    assert written == ["step-000000010"], "once, and no other"
    assert "a machine of this run will be taken away: checkpoint at step 10" in log_lines


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(training_data, tmp_path):
    output = tmp_path / "nan"
    settings = {**STEPS, "learning_rate": 1e30, "warmup_ratio": 0.9, "save_steps": 1}
    with pytest.raises(JobError, match=r"the loss or its gradient is not finite at step \d+: lower learning_rate"):
        train_here(train_job(training_data, output, **settings))
    left = sorted(output.glob("checkpoints/step-*"))
    assert left, "the run can be inspected"
    for folder in left:
        weights = load_file(folder / "model.safetensors")
        assert all(np.isfinite(array).all() for array in weights.values())
