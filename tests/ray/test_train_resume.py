"""Training that is killed, or loses workers, and goes on: the same weights as if nobody had disturbed it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file

from pipelines.errors import JobError, OutputError
from pipelines.model_folder import read_model_folder
from pipelines.on_ray.train import TrainRequest, train
from tests.ray.test_train import base, request  # noqa: F401 (a fixture)

HERE = Path(__file__).parent
STEPS = {"epochs": 3, "save_steps": 4, "shuffle_buffer": 30}


def values(base, output, **more):  # noqa: F811
    """The request as a settings file has it."""
    return {"train": str(base / "data"), "valid": str(base / "data" / "1.parquet"), "model": str(base / "base"),
            "output": str(output), "kind": "binary", "batch_size": 5, "max_length": 32, "learning_rate": 1e-3,
            "train_dtype": "float32", "dtype": "float32", "device": "cpu", **STEPS, **more}  # fmt: skip


def start(folder, settings):
    """The command in a process of its own."""
    (folder / "train.yaml").write_text(json.dumps(settings))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    command = [sys.executable, "-m", "pipelines", "train", "--config", str(folder / "train.yaml"), "--json"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    """The summary and what it reported, of a run that leaves out a row without a text."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 3, err[-3000:]
    return json.loads(out), err


def wait_for_checkpoint(output, process, number=1):
    deadline = time.monotonic() + 120
    while len(list(Path(output).glob("checkpoints/step-*/training_state.json"))) < number:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def same_weights(left, right):
    """All but the keys' biases: softmax does not see them, so that Adam blows their rounding up to full steps."""
    one, other = load_file(Path(left) / "model.safetensors"), load_file(Path(right) / "model.safetensors")
    assert one.keys() == other.keys()
    for name, weights in one.items():
        if name.endswith("key.bias"):
            continue
        np.testing.assert_allclose(weights, other[name], atol=2e-5, err_msg=name)


@pytest.fixture(scope="module")
def undisturbed(base, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("undisturbed") / "model"
    return folder, train(TrainRequest.parse(values(base, folder)))


@pytest.mark.timeout(400)
def test_a_killed_run_goes_on_and_ends_with_the_same_weights(base, tmp_path):  # noqa: F811
    output, whole = tmp_path / "killed", tmp_path / "whole"
    expected, _ = finish(start(tmp_path, values(base, whole)))  # each run in a process of its own, and so alike
    process = start(tmp_path, values(base, output))
    wait_for_checkpoint(output, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (output / "pipeline.json").exists()
    with pytest.raises(OutputError, match=r"unfinished run whose learning_rate was 0\.001 and is 0\.002; go on with"):
        train(TrainRequest.parse(values(base, output, learning_rate=2e-3)))
    with pytest.raises(OutputError, match="train was 'sha256:"):
        train(TrainRequest.parse(values(base, output, train=str(base / "data" / "0.parquet"))))
    summary, reported = finish(start(tmp_path, values(base, output, save_steps=5)))
    (went_on,) = re.findall(r"^going on from step (\d+)$", reported, re.MULTILINE)
    assert int(went_on) >= 4
    assert summary["steps"] == expected["steps"]
    np.testing.assert_allclose(summary["losses"], expected["losses"], rtol=1e-4)
    assert summary["thresholds"] == pytest.approx(expected["thresholds"], abs=1e-4)  # rounding: scores moved by 1e-7
    same_weights(output, whole)
    names = {path.name for path in output.iterdir()}
    assert not names & {"checkpoints", "_run.json"}, "nothing of the way there is left"
    with pytest.raises(OutputError, match="is not empty"):
        train(TrainRequest.parse(values(base, output)))


@pytest.mark.filterwarnings("ignore")
def test_a_run_begins_in_an_object_store_and_goes_on_from_its_newest_checkpoint(tmp_path, flaky_s3, monkeypatch):
    import fsspec

    from pipelines.checkpoints import STATE_FILE, fetch_newest, open_training, publish, remove_all
    from pipelines.model_folder import local_folder

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    store = fsspec.filesystem("s3", skip_instance_cache=True)
    store.mkdir("trained")
    output = "s3://trained/new/model"
    assert not open_training(output, {"seed": 1}), "a folder that is not there yet is empty"
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
    assert fetched == {"_run.json", "tokenizer.json"}, "whoever tokenizes needs no checkpoint"
    remove_all(output)
    store.invalidate_cache()
    assert [name.rpartition("/")[2] for name in store.find("trained/new/model")] == ["tokenizer.json"]


@pytest.mark.timeout(400)
def test_a_lost_worker_is_replaced_and_the_run_goes_on(base, tmp_path, undisturbed):  # noqa: F811
    output = tmp_path / "lost"
    process = start(tmp_path, values(base, output, num_workers=2, save_steps=None, save_minutes=0))
    wait_for_checkpoint(output, process)
    workers = [child for child in psutil.Process(process.pid).children(recursive=True) if "TrainWorker" in title(child)]
    assert workers
    workers[-1].kill()
    summary, err = finish(process)
    assert re.search(r"going on from step \d*0$", err, re.MULTILINE), "the clock is looked at every ten steps"
    _, expected = undisturbed
    assert summary["steps"] == expected["steps"]
    np.testing.assert_allclose(summary["losses"], expected["losses"], rtol=2e-3)


def title(process):
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def test_a_model_may_be_written_to_any_filesystem(base, undisturbed):  # noqa: F811
    train(TrainRequest.parse(values(base, "memory://trained/model")))
    found = read_model_folder("memory://trained/model")
    folder, _ = undisturbed
    assert found.weights_hash == read_model_folder(folder).weights_hash
    same_weights(found.path, folder)


def test_only_the_newest_checkpoints_stay(base, tmp_path, monkeypatch):  # noqa: F811
    import pipelines.checkpoints as checkpoints

    seen = []
    real = checkpoints.publish

    def publish(folder, location, *, last):
        real(folder, location, last=last)
        seen.append(checkpoints.steps_of(str(tmp_path / "out")))

    monkeypatch.setattr(checkpoints, "publish", publish)
    train(TrainRequest.parse(values(base, tmp_path / "out", save_steps=2, keep_checkpoints=3, save_each_epoch=False)))
    assert max(map(len, seen)) == 4, "three and the one just written"
    assert all(steps == sorted(steps) for steps in seen)


def test_a_machine_that_will_be_taken_away_is_a_reason_for_a_checkpoint(base, tmp_path, monkeypatch):  # noqa: F811
    import pipelines.checkpoints as checkpoints
    import pipelines.training as training

    written = []
    real = checkpoints.publish

    def publish(folder, location, *, last):
        written.append(Path(location).name)
        real(folder, location, last=last)

    def fit(*arguments):
        return training.fit(*arguments, is_preempted=lambda: True)

    monkeypatch.setattr(checkpoints, "publish", publish)
    monkeypatch.setattr("pipelines.on_ray.train.fit", fit)
    lines = []
    settings = values(base, tmp_path / "out", save_steps=None, save_each_epoch=False)
    train(TrainRequest.parse(settings), report=lines.append)
    assert written == ["step-000000010"], "once, and no other"
    assert "a machine of this run will be taken away: checkpoint at step 10" in lines


@pytest.mark.timeout(700)
def test_workers_come_and_go(base, tmp_path):  # noqa: F811
    settings = values(base, tmp_path / "elastic", num_workers="1:2", resize_seconds=3, save_steps=None, epochs=60)
    del settings["valid"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, str(HERE / "elastic.py"), json.dumps(settings)],
        capture_output=True, text=True, timeout=680, check=False, env=environment, cwd=HERE.parent.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    lines = done.stderr.splitlines()
    taken_up = [line for line in lines if line.startswith("training on")]
    assert taken_up == [f"training on {count} of them" for count in (1, 2, 1)], "up, and down again"
    (notice,) = [line for line in lines if line.startswith("a machine of this run will be taken away")]
    went_on = [line.split()[-1] for line in lines if line.startswith("going on from step")]
    assert int(went_on[-1]) >= int(notice.split()[-1])
    summary = json.loads(done.stdout.splitlines()[-1])
    assert len(summary["losses"]) == summary["steps"], "no step is missing, none was taken twice"
    assert np.mean(summary["losses"][-100:]) < 0.01


def test_a_loss_that_is_no_number_keeps_the_last_good_checkpoint(base, tmp_path):  # noqa: F811
    output = tmp_path / "nan"
    with pytest.raises(JobError, match=r"the loss or its gradient is not finite at step \d+: lower learning_rate"):
        train(TrainRequest.parse(values(base, output, learning_rate=1e30, warmup_ratio=0.9, save_steps=1)))
    left = sorted(output.glob("checkpoints/step-*"))
    assert left, "the run can be looked at"
    for folder in left:
        weights = load_file(folder / "model.safetensors")
        assert all(np.isfinite(array).all() for array in weights.values())
