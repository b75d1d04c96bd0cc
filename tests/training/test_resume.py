"""Training that is killed and resumed ends with the same weights as an uninterrupted run."""

import json
import os
import re
import shutil
import signal
import socket
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from pipelines.errors import JobError, OutputError
from pipelines.model_files import local_folder
from pipelines.model_folder import read_model_folder
from pipelines.storage import marks
from pipelines.training import checkpoints
from pipelines.training import job as job_module
from pipelines.training.checkpoints import STATE_FILE, fetch_newest, open_training, publish, remove_all
from pipelines.training.fit import fit
from pipelines.training.job import train_here
from pipelines.training.loop import TENSORS_FILE
from tests.jobs import start_command, train_job, train_values
from tests.training.runs import stopped_at

STEPS = {"epochs": 3, "save_steps": 4, "shuffle_buffer": 30, "weight": None}


def start(folder, settings):
    """Start the train command in a new process."""
    (folder / "train.yaml").write_text(json.dumps(settings))
    return start_command("train", "--config", folder / "train.yaml", "--json")


def finish(process):
    """Wait for a run and return its summary and log. Exit code 3 means that one row has no text."""
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
    """Compare all weights except key biases. Softmax ignores those, so Adam amplifies their rounding errors."""
    one, other = load_file(Path(left) / "model.safetensors"), load_file(Path(right) / "model.safetensors")
    assert one.keys() == other.keys()
    for name, weights in one.items():
        if name.endswith("key.bias"):
            continue
        np.testing.assert_allclose(weights, other[name], atol=2e-5, err_msg=name)


@pytest.mark.timeout(400)
def test_killed_run_resumes_with_same_weights(training_data, tmp_path):
    output, whole = tmp_path / "killed", tmp_path / "whole"
    expected, _ = finish(start(tmp_path, train_values(training_data, whole, **STEPS)))  # both runs use a new process
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
    (resumed,) = re.findall(r"^resuming from step (\d+), in epoch", log, re.MULTILINE)
    assert int(resumed) >= 4
    assert summary["steps"] == expected["steps"]
    np.testing.assert_allclose(summary["losses"], expected["losses"], rtol=1e-4)
    assert summary["thresholds"] == pytest.approx(expected["thresholds"], abs=1e-4)  # scores moved by 1e-7
    same_weights(output, whole)
    names = {path.name for path in output.iterdir()}
    assert not names & {"checkpoints", "_run.json"}, "files of the unfinished run are removed"
    (output / "checkpoints" / "step-9").mkdir(parents=True)
    (output / "_run.json").write_text("{}")  # as a kill after the end of the run leaves them
    with pytest.raises(OutputError, match="is not empty"):
        train_here(train_job(training_data, output, **STEPS))
    assert {path.name for path in output.iterdir()} == names


@pytest.mark.filterwarnings("ignore")
def test_checkpoints_in_object_store(tmp_path, flaky_s3, monkeypatch):
    import fsspec

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    store = fsspec.filesystem("s3", skip_instance_cache=True)
    store.mkdir("trained")
    output = "s3://trained/new/model"
    assert not open_training(output, {"seed": 1}), "a missing folder counts as empty"
    assert open_training(output, {"seed": 1})
    with pytest.raises(OutputError, match="seed was 1 and is 2"):
        open_training(output, {"seed": 2})
    written = tmp_path / "written"
    written.mkdir()
    (written / "tokenizer.json").write_text("{}")
    publish(written, output, last="tokenizer.json")
    for name in ("training_state.pt", STATE_FILE):
        (written / name).write_text("{}")
    checkpoints.write_checksums(written)
    for step in (4, 8):
        publish(written, f"{output}/checkpoints/step-{step:09d}", last=STATE_FILE)
    (tmp_path / "scratch").mkdir()
    newest = fetch_newest(output, tmp_path / "scratch")
    names = {"tokenizer.json", "training_state.pt", "checksums.json", STATE_FILE}
    assert {file.name for file in newest.iterdir()} == names
    fetched = {file.name for file in local_folder(output).iterdir()}
    assert fetched == {"_run.json", "tokenizer.json"}, "checkpoints are not fetched for tokenization"
    remove_all(output)
    store.invalidate_cache()
    assert [name.rpartition("/")[2] for name in store.find("trained/new/model")] == ["tokenizer.json"]


def test_model_output_on_any_filesystem(training_data, tmp_path):
    settings = {**STEPS, "epochs": 1}
    train_here(train_job(training_data, "memory://trained/model", **settings))
    train_here(train_job(training_data, tmp_path / "out", **settings))
    found = read_model_folder("memory://trained/model")
    assert found.weights_hash == read_model_folder(tmp_path / "out").weights_hash
    same_weights(found.path, tmp_path / "out")


def test_only_newest_checkpoints_are_kept(training_data, tmp_path, monkeypatch):
    seen = []
    real = checkpoints.publish

    def recorded(folder, location, *, last):
        real(folder, location, last=last)
        seen.append(checkpoints.steps_of(str(tmp_path / "out")))

    monkeypatch.setattr(checkpoints, "publish", recorded)
    settings = {**STEPS, "epochs": 1, "save_steps": 2, "keep_checkpoints": 3, "save_each_epoch": False}
    train_here(train_job(training_data, tmp_path / "out", **settings))
    assert max(map(len, seen)) == 4, "three kept checkpoints and the new one"
    assert all(steps == sorted(steps) for steps in seen)


def test_checkpoint_on_preemption_notice(training_data, tmp_path, monkeypatch, log_lines):
    written = []
    real = checkpoints.publish

    def recorded(folder, location, *, last):
        written.append(Path(location).name)
        real(folder, location, last=last)

    def fit_preempted(*arguments, **more):
        return fit(*arguments, is_preempted=lambda: True, **more)

    monkeypatch.setattr(checkpoints, "publish", recorded)
    monkeypatch.setattr("pipelines.training.job.fit", fit_preempted)
    settings = {**STEPS, "epochs": 1, "save_steps": None, "save_each_epoch": False}
    train_here(train_job(training_data, tmp_path / "out", **settings))
    assert written == ["step-000000010"], "exactly one checkpoint is written"
    assert "a machine of this run will be taken away: checkpoint at step 10" in log_lines


def test_non_finite_loss_keeps_good_checkpoints(training_data, tmp_path):
    output = tmp_path / "nan"
    settings = {**STEPS, "learning_rate": 1e30, "warmup_ratio": 0.9, "save_steps": 1}
    with pytest.raises(JobError, match=r"the loss or its gradient is not finite at step \d+: lower learning_rate"):
        train_here(train_job(training_data, output, **settings))
    left = sorted(output.glob("checkpoints/step-*"))
    assert left, "checkpoints are kept for inspection"
    for folder in left:
        weights = load_file(folder / "model.safetensors")
        assert all(np.isfinite(array).all() for array in weights.values())


DAMAGE = {
    "empty state": lambda folder: (folder / STATE_FILE).write_text(""),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "truncated weights": lambda folder: os.truncate(folder / "model.safetensors", 99),
    "one byte of the weights": lambda folder: change_byte(folder / "model.safetensors"),
    "empty optimizer": lambda folder: os.truncate(folder / TENSORS_FILE, 0),
    "no optimizer": lambda folder: (folder / TENSORS_FILE).unlink(),
    "empty config": lambda folder: (folder / "config.json").write_text(""),
    "no checksums": lambda folder: (folder / "checksums.json").unlink(),
    "empty checksums": lambda folder: (folder / "checksums.json").write_text(""),
}


def change_byte(file):
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


@pytest.fixture(scope="module")
def stopped_run(training_data, tmp_path_factory):
    """The output of a run that was stopped with two checkpoints, and its settings."""
    output = tmp_path_factory.mktemp("stopped") / "out"
    settings = {"save_steps": 3, "keep_checkpoints": 2, "epochs": 2}
    with stopped_at(8):
        train_here(train_job(training_data, output, **settings))
    assert checkpoints.steps_of(str(output)) == [3, 6]
    return output, settings


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_checkpoint_is_left_out(stopped_run, tmp_path, log_lines, kind):
    shutil.copytree(stopped_run[0], tmp_path / "out")
    newest, older = (tmp_path / "out" / "checkpoints" / f"step-{step:09d}" for step in (6, 3))
    DAMAGE[kind](newest)
    assert fetch_newest(str(tmp_path / "out"), tmp_path) == older
    assert any(line.startswith("the checkpoint of step 6 is damaged (") for line in log_lines)
    DAMAGE[kind](older)
    with pytest.raises(JobError, match=r"all checkpoints in .* are damaged .*; remove this folder to start from"):
        fetch_newest(str(tmp_path / "out"), tmp_path)


def test_run_goes_back_to_the_older_checkpoint(stopped_run, training_data, tmp_path, log_lines):
    """The run is the same as one that was not stopped."""
    output, settings = stopped_run
    whole = train_here(train_job(training_data, tmp_path / "whole", **settings))
    DAMAGE["truncated weights"](output / "checkpoints" / "step-000000006")
    resumed = train_here(train_job(training_data, output, **settings))
    assert "resuming from step 3, in epoch 1" in log_lines
    np.testing.assert_allclose(resumed.losses, whole.losses, rtol=1e-5)


@pytest.mark.parametrize("is_begun", [False, True])
def test_a_training_that_slept_does_not_begin_a_finished_one_again(tmp_path, monkeypatch, is_begun):
    """It has looked at the folder, sleeps, and writes `_run.json` when another one has finished and removed it."""
    output, write = tmp_path / "out", checkpoints._write_run
    output.mkdir()
    if is_begun:
        open_training(str(output), {"seed": 1}, start="a")

    def late(*args, **options):
        (output / "pipeline.json").write_text("{}")
        (output / "_run.json").unlink(missing_ok=True)
        write(*args, **options)

    monkeypatch.setattr(checkpoints, "_write_run", late)
    with pytest.raises(OutputError, match=r"is not empty.* --overwrite to replace the model"):
        open_training(str(output), {"seed": 1}, start="b")
    assert [path.name for path in output.iterdir()] == ["pipeline.json"]


def test_two_trainings_into_one_folder(training_data, tmp_path, monkeypatch):
    """The second one is refused while the first one works, and may follow it when it was killed."""
    first = train_job(training_data, tmp_path / "out", limit=10)
    second = train_job(training_data, tmp_path / "out", limit=10, seed=3)
    original = job_module.fit

    def fit_later(*args, **more):
        monkeypatch.setattr(job_module, "fit", original)
        with pytest.raises(OutputError, match=r"another training writes to --output .* now \(process \d+ on"):
            train_here(second)
        return original(*args, **more)

    monkeypatch.setattr(job_module, "fit", fit_later)
    train_here(first)
    assert read_model_folder(tmp_path / "out").decision.labels == ("ham", "spam")
    assert not list((tmp_path / "out").glob("_running-*"))
    killed = tmp_path / "killed"
    killed.mkdir()
    mark = {"host": socket.gethostname(), "pid": 2**22 + 1, "time": time.time()}
    (killed / "_running-x.json").write_text(json.dumps(mark))
    train_here(train_job(training_data, killed, limit=10))
    assert read_model_folder(killed).decision.kind == "binary"


@pytest.mark.parametrize("second", [{}, {"overwrite": True, "seed": 3}, None])
def test_a_training_that_was_frozen_changes_nothing(training_data, tmp_path, monkeypatch, second):
    """Its mark is old when it goes on (a laptop that slept, a virtual machine that moved)."""
    output, original = tmp_path / "out", job_module.fit
    settings = {"limit": 20, "save_each_epoch": False, "valid": None}
    found = {}

    def fit_later(*args, **more):
        monkeypatch.setattr(job_module, "fit", original)
        if second is None:  # it is resumed, interrupted, and resumed once more
            (output / "_run.json").write_text(
                json.dumps(json.loads((output / "_run.json").read_text()) | {"start": "x"})
            )
        else:
            train_here(train_job(training_data, output, **settings, **second))
        found.update({path: path.read_bytes() for path in output.rglob("*") if path.is_file()})
        return original(*args, **more)

    monkeypatch.setattr(job_module, "fit", fit_later)
    monkeypatch.setattr(marks, "others_of", lambda *_: [])
    with pytest.raises(JobError, match=r"another training has taken over .* this one ends, and changes nothing there"):
        train_here(train_job(training_data, output, **settings, save_steps=1))
    left = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    running = {path for path in found if path.name.startswith("_running-")}
    assert left == {path: content for path, content in found.items() if path not in running}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupt_writes_a_checkpoint_and_says_what_is_kept(training_data, tmp_path, number):
    settings = train_values(training_data, tmp_path / "out", epochs=200, save_each_epoch=False)
    (tmp_path / "train.yaml").write_text(json.dumps(settings))
    first = start_command("train", "--config", tmp_path / "train.yaml")
    lines = []
    for line in first.stderr:
        lines.append(line)
        if "trained" in line and "steps" in line:
            first.send_signal(number)
            break
    _, rest = first.communicate(timeout=120)
    assert first.returncode == 130, "".join(lines) + rest
    assert "Traceback" not in rest
    step = int(re.search(r"the checkpoint of step (\d+) is kept", rest)[1])
    assert f"interrupted: writing a checkpoint of step {step}" in rest
    again = start_command("train", "--config", tmp_path / "train.yaml")
    for line in again.stderr:
        if "resuming from step" in line:
            break
    again.kill()
    again.communicate()
    assert re.search(rf"resuming from step {step}, in epoch \d+$", line.strip())


def test_interrupt_before_a_step_keeps_nothing(training_data, tmp_path, monkeypatch, log_lines):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(job_module, "fit", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train_here(train_job(training_data, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    assert "nothing is kept, because no checkpoint was written yet" in log_lines


def test_ignored_signals_stay_ignored(training_data, tmp_path):
    """As under nohup, or for a script that runs in the background of a shell."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with job_module._ends_at_interrupt() as is_interrupted:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not is_interrupted()
            os.kill(os.getpid(), signal.SIGTERM)
            assert is_interrupted()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_interrupt_at_the_last_step_loses_nothing(training_data, tmp_path, monkeypatch, log_lines):
    """A checkpoint of a finished run is never written, so the run must finish."""

    @contextmanager
    def interrupted():
        yield lambda: True

    monkeypatch.setattr(job_module, "_ends_at_interrupt", interrupted)
    summary = train_here(train_job(training_data, tmp_path / "out", limit=5, batch_size=50, valid=None))
    assert summary.steps == 1
    assert read_model_folder(tmp_path / "out").metrics == {}
