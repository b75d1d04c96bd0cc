"""A real cluster with token authentication on this machine. Submitted jobs give the results of local jobs."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import httpx
import psutil
import pytest
import yaml

from tests.jobs import clean_environment, read_scored, wait_until, write_shards

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parent.parent.parent
RAY = shutil.which("ray", path=str(Path(sys.executable).parent)) or "ray"
PORT, DASHBOARD = 26379, 28265


class Nodes:
    """Raylets of one cluster with token authentication, and the environment of its clients."""

    def __init__(self, home: Path) -> None:
        self.environment = clean_environment()
        self.environment.update(HOME=str(home), RAY_AUTH_MODE="token", RAY_USAGE_STATS_ENABLED="0",
                                RAY_API_SERVER_ADDRESS=f"http://127.0.0.1:{DASHBOARD}",
                                PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")  # fmt: skip
        self._temp, self._raylets = Path(tempfile.mkdtemp(prefix="ray-")), []  # short, because socket names contain it
        run([RAY, "get-auth-token", "--generate"], self.environment)

    def start(self, *options, **more):
        """Start one more raylet. The first is the head.

        Each raylet has its own folder, as on separate machines. In a shared folder, a new node would unpack a job's
        package again while drivers use it.
        """
        first = not self._raylets
        where = ["--head", f"--port={PORT}", f"--dashboard-port={DASHBOARD}"]
        join = [f"--address=127.0.0.1:{PORT}"]
        command = [RAY, "start", "--block", "--dashboard-agent-listen-port=0", "--object-store-memory=200000000",
                   f"--temp-dir={self._temp}/{len(self._raylets)}", *(where if first else join), *options]  # fmt: skip
        process = subprocess.Popen(command, env={**self.environment, **more}, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
        self._raylets.append(process)
        if first:
            wait_for(self.environment["RAY_API_SERVER_ADDRESS"], process)
        return process

    def kill(self, process):
        """SIGKILL a raylet and all its child processes, as if its machine failed."""
        children = psutil.Process(process.pid).children(recursive=True)
        for victim in [*children, psutil.Process(process.pid)]:
            with contextlib.suppress(psutil.Error):
                victim.kill()
        process.wait(timeout=60)

    def stop(self):
        """Stop the raylets. `ray stop` would also stop every other Ray on this machine."""
        for process in reversed(self._raylets):
            if process.poll() is None:
                process.terminate()
                process.wait(timeout=60)
        shutil.rmtree(self._temp, ignore_errors=True)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    found = Nodes(tmp_path_factory.mktemp("home"))
    try:
        found.start("--num-cpus=3")
        yield found
    finally:
        found.stop()


@pytest.fixture
def cluster(nodes):
    """The environment of a client."""
    return nodes.environment


def wait_for(address, head):
    """Wait until the Jobs API answers with 401."""
    deadline = time.monotonic() + 90
    while True:
        assert head.poll() is None
        assert time.monotonic() < deadline
        try:
            assert httpx.get(f"{address}/api/jobs/", timeout=5).status_code == 401
            return
        except httpx.TransportError:
            time.sleep(0.5)


def run(command, environment, *, code=0, timeout=240, cwd=ROOT):
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False,
                          cwd=cwd)  # fmt: skip
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr if code else done.stdout


def submit(environment, settings, *options, job="score", code=0):
    command = [RAY, "job", "submit", "--working-dir", str(ROOT), *options, "--",
               "python", "-m", f"ray_jobs.{job}", str(settings)]  # fmt: skip
    return run(command, environment, code=code)


def write(path, **values):
    path.write_text(yaml.safe_dump(values))
    return path


def last_json(log):
    return json.loads([line for line in log.splitlines() if line.startswith("{")][-1])


def test_submitted_job_matches_local_command(cluster, spam_folder, input_folder, tmp_path):
    values = {"model": str(spam_folder.path), "input": str(input_folder), "dtype": "float32"}
    for name in ("local", "submitted"):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({**values, "output": str(tmp_path / name)}))
    local = clean_environment()
    command = [sys.executable, "-m", "ray_jobs.score", str(tmp_path / "local.yaml")]
    summary = last_json(run(command, local, code=3))
    assert summary["rows_in_error"] == 2
    log = submit(cluster, tmp_path / "submitted.yaml", code=1)  # Ray returns 1 for every failed job
    assert "exit code 3" in log, "rows in error: the log contains the job's exit code"
    submitted = last_json(log)
    assert submitted["rows_out"] == 60
    found, expected = read_scored(tmp_path / "submitted"), read_scored(tmp_path / "local")
    assert found.drop_columns(["scores", "score"]).equals(expected.drop_columns(["scores", "score"]))
    for name in ("scores", "score"):
        for left, right in zip(found[name].to_pylist(), expected[name].to_pylist(), strict=True):
            assert left == pytest.approx(right, abs=1e-5)


def test_bad_settings_exit_2(cluster, tmp_path):
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump({"model": "x", "inptu": "y", "output": "z"}))
    log = submit(cluster, tmp_path / "bad.yaml", code=1)
    assert "unknown setting 'inptu'; did you mean 'input'" in log
    assert "exit code 2" in log


def test_submit_without_token_is_401(cluster, tmp_path):
    stranger = {**cluster, "HOME": str(tmp_path)}
    done = subprocess.run([RAY, "job", "submit", "--", "true"], env=stranger, capture_output=True, text=True,
                          timeout=60, check=False)  # fmt: skip
    assert done.returncode != 0
    assert httpx.get(f"{cluster['RAY_API_SERVER_ADDRESS']}/api/jobs/").status_code == 401


@pytest.fixture
def source(tmp_path, emails):
    return write_shards(tmp_path / "in", emails, shards=3, row_group_size=20)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_lost_node_job_resumes_after_resubmit(nodes, spam_folder, source, tmp_path):
    doomed = nodes.start("--num-cpus=2", '--resources={"scorers": 1}')
    values = {"model": str(spam_folder.path), "input": str(source), "dtype": "float32", "unit_bytes": 6000}
    there = {"replicas": 1, "replica_resources": {"scorers": 0.5}, "num_threads": 1}
    output = tmp_path / "killed"
    job = write(tmp_path / "job.yaml", **values, **there, output=str(output))
    submit(nodes.environment, job, "--no-wait", "--submission-id=doomed")
    wait_until(lambda: len(list(output.glob("part-*"))) >= 3)
    nodes.kill(doomed)
    done = len(list(output.glob("part-*")))
    time.sleep(3)
    run([RAY, "job", "stop", "doomed"], nodes.environment)
    assert "was stopped" in run([RAY, "job", "status", "doomed"], nodes.environment)
    assert not (output / "_summary.json").exists(), "the job could not finish without its scorers"
    doomed = nodes.start("--num-cpus=2", '--resources={"scorers": 1}')
    log = submit(nodes.environment, job)
    nodes.kill(doomed)
    assert "resuming: " in log
    summary = last_json(log)
    assert (summary["rows_out"], summary["rows_in_error"]) == (180, 0)
    assert summary["units_before"] >= done
    local = clean_environment()
    undisturbed = write(tmp_path / "here.yaml", **values, replicas=0, output=str(tmp_path / "here"))
    run([sys.executable, "-m", "ray_jobs.score", str(undisturbed)], local)
    found, expected = read_scored(output), read_scored(tmp_path / "here")
    assert found.drop_columns(["scores", "score"]).equals(expected.drop_columns(["scores", "score"]))
    for left, right in zip(found["scores"].to_pylist(), expected["scores"].to_pylist(), strict=True):
        assert left == pytest.approx(right, abs=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_submitted_training_writes_model_folder(cluster, spam_folder, source, tmp_path):
    folder = tmp_path / "trained"
    job = write(tmp_path / "train.yaml", train=str(source), valid=str(source), model=str(spam_folder.path), epochs=1,
                kind="binary", output=str(folder), num_workers=2, max_length=64, device="cpu", limit=60)  # fmt: skip
    summary = last_json(submit(cluster, job, job="train"))
    assert summary["workers"] == 2
    assert summary["steps"] > 0
    assert (folder / "pipeline.json").exists()
    assert "not empty" in submit(cluster, job, job="train", code=1), "a second run into the same folder is refused"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_submitted_server_answers_until_stopped(cluster, spam_folder, tmp_path):
    job = write(tmp_path / "serve.yaml", model=str(spam_folder.path), port=28767, dtype="float32", device="cpu")
    submit(cluster, job, "--no-wait", "--submission-id=serving", job="serve")

    def answers():
        with contextlib.suppress(httpx.TransportError):
            return httpx.get("http://127.0.0.1:28767/readyz", timeout=5).status_code == 200
        return False

    wait_until(answers)
    answer = httpx.post("http://127.0.0.1:28767/v1/predict", json={"inputs": ["lunch at noon?"]}, timeout=30)
    assert answer.json()["labels"] == ["ham", "spam"]
    run([RAY, "job", "stop", "serving"], cluster)
    wait_until(lambda: not answers())


def pretend(tmp_path, code):
    """A folder for PYTHONPATH. Python runs its code at startup."""
    folder = tmp_path / "first"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(code)
    return str(folder)


def driver(environment, settings, **more):
    """Run the score command on this machine with the address of the cluster."""
    command = [str(Path(sys.executable).parent / "pipelines"), "score", "--config", str(settings),
               "--address", f"127.0.0.1:{PORT}"]  # fmt: skip
    return run(command, {**environment, **more}, code=2, cwd="/")


@pytest.mark.slow
def test_driver_with_other_ray_version(cluster, spam_folder, source, tmp_path):
    other = pretend(tmp_path, "import ray; ray.__version__ = '2.59.1'")
    job = write(tmp_path / "job.yaml", model=str(spam_folder.path), input=str(source), output=str(tmp_path / "out"))
    said = driver(cluster, job, PYTHONPATH=other)
    assert "Version mismatch" in said
    assert "Ray: 2.59.1" in said
    assert "install the cluster's Ray and Python here, or submit the job instead" in said
    assert not list((tmp_path / "out").glob("part-*"))


@pytest.mark.slow
def test_driver_without_token_is_refused(cluster, spam_folder, source, tmp_path):
    environment = {name: value for name, value in cluster.items() if name != "RAY_AUTH_MODE"}
    command = [sys.executable, "-m", "pipelines", "score", str(spam_folder.path), "--input", str(source),
               "--output", str(tmp_path / "out"), "--address", f"127.0.0.1:{PORT}"]  # fmt: skip
    assert "require a token, which RAY_AUTH_MODE=token sends" in run(command, environment, code=1)
    run(command, {**environment, "RAY_AUTH_MODE": "token"})


@pytest.mark.slow
def test_node_with_missing_or_other_package(nodes, spam_folder, source, tmp_path):
    job = write(tmp_path / "job.yaml", model=str(spam_folder.path), input=str(source), output=str(tmp_path / "out"))
    version = "import pipelines.version; pipelines.version.VERSION = '0.0.9'"
    wait_until(lambda: alive(nodes.environment) > 0)
    before = alive(nodes.environment)
    absent = "import sys; sys.modules['pipelines'] = None"
    for code, expected in ((absent, "cannot run this package: "), (version, "has version 0.0.9 of this package")):
        with contextlib.ExitStack() as stack:
            odd = nodes.start("--num-cpus=1", PYTHONPATH=pretend(tmp_path, code))
            stack.callback(nodes.kill, odd)
            wait_until(lambda: alive(nodes.environment) == before + 1)
            said = driver(nodes.environment, job)
        shutil.rmtree(tmp_path / "first")
        assert expected in said
        assert re.search(r"node \S+ \(\w{8}\)", said)
        assert re.search("install the same( version)? on every node", said)
        wait_until(lambda: alive(nodes.environment) == before)


def alive(environment):
    """The number of live nodes, as listed by the dashboard."""
    command = [RAY, "list", "nodes", "--format=json", "--filter=state=ALIVE"]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False).stdout
    return len(json.loads(answer)) if answer.startswith("[") else 0  # the output is empty while the head starts


def test_upload_excludes_unneeded_files(tmp_path):
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import create_package

    create_package(
        str(ROOT), tmp_path / "upload.zip", include_gitignore=True, excludes=get_runtime_env_default_excludes()
    )
    with zipfile.ZipFile(tmp_path / "upload.zip") as upload:
        names = [name for name in upload.namelist() if not name.endswith("/")]
    assert (tmp_path / "upload.zip").stat().st_size < 5e6
    tops = (
        {name.split("/")[1] for name in names}
        if all(n.startswith(ROOT.name) for n in names)
        else {n.split("/")[0] for n in names}
    )
    assert {"pipelines", "ray_jobs"} <= tops
    assert not tops & {".git", ".venv", "runs", "docs", "tests", "benchmarks"}
    assert not [name for name in names if name.endswith((".parquet", ".safetensors", ".pyc"))]
