"""A real cluster on this machine under token auth: the job that `ray job submit` runs equals the local one."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from pipelines.shards import list_files

ROOT = Path(__file__).parent.parent.parent
RAY = shutil.which("ray", path=str(Path(sys.executable).parent)) or "ray"
PORT, DASHBOARD = 26379, 28265


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A head node with token auth; the environment in which a client talks to it."""
    home = tmp_path_factory.mktemp("home")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment.update(HOME=str(home), RAY_AUTH_MODE="token", RAY_USAGE_STATS_ENABLED="0",
                       PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")  # fmt: skip
    run([RAY, "get-auth-token", "--generate"], environment)
    start = [RAY, "start", "--head", "--block", f"--port={PORT}", f"--dashboard-port={DASHBOARD}", "--num-cpus=3",
             "--dashboard-agent-listen-port=0", "--object-store-memory=300000000",
             f"--temp-dir={tmp_path_factory.mktemp('ray')}"]  # fmt: skip
    head = subprocess.Popen(start, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{DASHBOARD}"
    try:
        wait_for(address, head)
        yield {**environment, "RAY_API_SERVER_ADDRESS": address}
    finally:  # not `ray stop`, which would end every other Ray of this machine too
        head.terminate()
        head.wait(timeout=60)


def wait_for(address, head):
    """Until the Jobs API answers, if only that it wants a token."""
    deadline = time.monotonic() + 90
    while True:
        assert head.poll() is None
        assert time.monotonic() < deadline
        try:
            assert httpx.get(f"{address}/api/jobs/", timeout=5).status_code == 401
            return
        except httpx.TransportError:
            time.sleep(0.5)


def run(command, environment, *, code=0, timeout=240):
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False,
                          cwd=ROOT)  # fmt: skip
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def submit(environment, settings, *, code=0):
    excludes = json.dumps({"excludes": [".git", ".venv", "docs", "tests", "benchmarks"]})
    command = [RAY, "job", "submit", "--working-dir", str(ROOT), "--runtime-env-json", excludes, "--",
               "python", "-m", "ray_jobs.score", str(settings)]  # fmt: skip
    return run(command, environment, code=code)


def rows(output):
    return pa.concat_tables([pq.read_table(path) for path in list_files(str(output))])


def test_a_submitted_job_scores_what_the_local_command_scores(cluster, spam_folder, input_folder, tmp_path):
    values = {"model": str(spam_folder.path), "input": str(input_folder), "dtype": "float32"}
    for name in ("local", "submitted"):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({**values, "output": str(tmp_path / name)}))
    local = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    command = [sys.executable, "-m", "ray_jobs.score", str(tmp_path / "local.yaml")]
    summary = json.loads(run(command, local, code=3))
    assert summary["rows_in_error"] == 2
    log = submit(cluster, tmp_path / "submitted.yaml", code=1)  # ray's own code for any failed job
    assert "exit code 3" in log, "rows in error: the job's own exit code is named"
    submitted = json.loads(next(line for line in log.splitlines() if line.startswith('{"units"')))
    assert submitted["rows_out"] == 60
    found, expected = rows(tmp_path / "submitted"), rows(tmp_path / "local")
    assert found.drop_columns(["scores", "score"]).equals(expected.drop_columns(["scores", "score"]))
    for name in ("scores", "score"):
        for left, right in zip(found[name].to_pylist(), expected[name].to_pylist(), strict=True):
            assert left == pytest.approx(right, abs=1e-5)


def test_bad_settings_end_a_job_with_code_2_and_a_sentence(cluster, tmp_path):
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump({"model": "x", "inptu": "y", "output": "z"}))
    log = submit(cluster, tmp_path / "bad.yaml", code=1)
    assert "unknown setting 'inptu'; did you mean 'input'" in log
    assert "exit code 2" in log


def test_a_stranger_cannot_submit(cluster, tmp_path):
    stranger = {**cluster, "HOME": str(tmp_path)}
    done = subprocess.run([RAY, "job", "submit", "--", "true"], env=stranger, capture_output=True, text=True,
                          timeout=60, check=False)  # fmt: skip
    assert done.returncode != 0
    assert httpx.get(f"{cluster['RAY_API_SERVER_ADDRESS']}/api/jobs/").status_code == 401
