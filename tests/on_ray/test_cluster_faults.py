"""Jobs on clusters that lose nodes, with object stores that fail, and through a running Serve application."""

import json
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipelines.errors import SettingsError
from pipelines.on_ray.nodes import check_nodes
from pipelines.on_ray.score import score
from pipelines.storage.listing import list_files
from tests.jobs import clean_environment, read_scored, score_job

HERE = Path(__file__).parent
AZURITE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""The published default key of Azurite."""


def same(left, right):
    assert left.drop_columns(["scores", "score"]).equals(right.drop_columns(["scores", "score"]))
    for one, other in zip(left["scores"].to_pylist(), right["scores"].to_pylist(), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def shards(folder, emails, count=3, rows=60):
    folder.mkdir()
    for shard in range(count):
        pq.write_table(emails.slice(shard * rows, rows), folder / f"{shard}.parquet", row_group_size=20)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_lost_node_loses_no_rows(spam_folder, tmp_path, emails):
    source = shards(tmp_path / "in", emails)
    environment = clean_environment()
    done = subprocess.run(
        [sys.executable, str(HERE / "node_loss.py"), str(spam_folder.path), str(source), str(tmp_path / "out")],
        capture_output=True, text=True, timeout=380, check=False, env=environment, cwd=HERE.parent.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["lost"], "the node was removed while the job was running"
    assert (summary["rows_out"], summary["rows_in_error"]) == (180, 0)
    score(score_job(spam_folder, source, tmp_path / "here"))
    same(read_scored(tmp_path / "out"), read_scored(tmp_path / "here"))


def test_nodes_without_access_to_path_are_named(local_ray, spam_folder, input_folder, tmp_path):
    model, first = str(spam_folder.path), list_files(str(input_folder))[0]
    with pytest.raises(SettingsError, match=r"node \S+ \(\w+\) cannot see the output .*; use a path that every node"):
        check_nodes(model=model, files={"input": first}, output=str(tmp_path / "none"))
    with pytest.raises(SettingsError, match=r"cannot see the input /nowhere/a\.parquet; use a path that every node"):
        check_nodes(model=model, files={"input": "/nowhere/a.parquet"})
    with pytest.raises(SettingsError, match=r"cannot read the model /nowhere.*use a path that every node"):
        check_nodes(model="/nowhere", files={"input": first})


def score_in_store(protocol, store, folder, source, tmp_path):
    """Score twice in the bucket `bulk` and compare with a local run. Return all printed and written text."""
    store.put(str(source), "bulk/in", recursive=True)
    store.put(str(folder.path), "bulk/model", recursive=True)
    environment = {**clean_environment(), "XDG_CACHE_HOME": str(tmp_path)}
    model, into, out = (f"{protocol}://bulk/{name}" for name in ("model", "in", "out"))
    command = [sys.executable, "-m", "pipelines", "score", model, "--input", into, "--output", out, "--json",
               "--replicas", "1",
               "--set", "dtype=float32", "--set", "unit_bytes=9000"]  # fmt: skip
    runs = [subprocess.run(command, capture_output=True, text=True, timeout=180, check=False, env=environment)
            for _ in range(2)]  # fmt: skip
    assert [run.returncode for run in runs] == [0, 0], runs[0].stderr[-3000:] + runs[1].stderr[-3000:]
    assert "nothing to do" in runs[1].stderr
    store.invalidate_cache()
    store.get("bulk/out", str(tmp_path / "out"), recursive=True)
    score(score_job(folder, source, tmp_path / "here", unit_bytes=9000))
    found, expected = read_scored(tmp_path / "out"), read_scored(tmp_path / "here")
    same(found.drop_columns(["source_file"]), expected.drop_columns(["source_file"]))
    files = "".join(path.read_text() for path in (tmp_path / "out").glob("_*.json"))
    return files + "".join(run.stdout + run.stderr for run in runs)


@pytest.mark.timeout(400)
@pytest.mark.filterwarnings("ignore")
def test_flaky_object_store_matches_local_disk(spam_folder, tmp_path, emails, flaky_s3):
    import fsspec

    store = fsspec.filesystem("s3", skip_instance_cache=True)
    store.mkdir("bulk")
    written = score_in_store("s3", store, spam_folder, shards(tmp_path / "in", emails, count=2, rows=30), tmp_path)
    assert flaky_s3["failed"] > 10
    assert "secret-of-mine" not in written
    assert "key-of-mine" not in written


@pytest.fixture
def google_store(monkeypatch):
    """An emulator of Google Cloud Storage on loopback. Yields its fsspec protocol."""
    server = pytest.importorskip("gcp_storage_emulator.server", reason="the test server is in the dev extra")
    pytest.importorskip("gcsfs", reason="in the gcs extra")
    running = server.create_server("127.0.0.1", 0, in_memory=True, default_bucket="bulk")
    running.start()
    port = running._api._httpd.server_port
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    yield "gs"
    running.stop()


@pytest.fixture
def azure_store(monkeypatch, tmp_path):
    """Azurite on loopback, if it is on PATH. Yields its fsspec protocol."""
    azurite = shutil.which("azurite-blob")
    if azurite is None:
        pytest.skip("azurite-blob is not on PATH (npm install azurite)")
    pytest.importorskip("adlfs", reason="in the azure extra")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [azurite, "--blobPort", str(port), "--silent", "--skipApiVersionCheck", "--inMemoryPersistence"]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    for _ in range(60):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.5)
    monkeypatch.setenv(
        "AZURE_STORAGE_CONNECTION_STRING",
        f"DefaultEndpointsProtocol=http;AccountName=devstoreaccount1;AccountKey={AZURITE_KEY};"
        f"BlobEndpoint=http://127.0.0.1:{port}/devstoreaccount1;",
    )
    yield "abfs"
    running.terminate()
    running.wait(timeout=30)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["google_store", "azure_store"])
def test_other_object_stores_match_local_disk(request, kind, spam_folder, tmp_path, emails):
    import fsspec

    protocol = request.getfixturevalue(kind)
    store = fsspec.filesystem(protocol, skip_instance_cache=True)
    if protocol == "abfs":
        store.mkdir("bulk")
    written = score_in_store(protocol, store, spam_folder, shards(tmp_path / "in", emails, count=2, rows=30), tmp_path)
    assert "AccountKey" not in written
    assert AZURITE_KEY not in written


@pytest.mark.timeout(400)
@pytest.mark.slow
def test_via_serve_matches_own_replicas(local_ray, spam_folder, tmp_path, emails):
    from ray import serve

    from pipelines.on_ray.serve.app import application
    from pipelines.serving.job import ServeJob

    source = shards(tmp_path / "in", emails, count=2, rows=20)
    values = {"model": str(spam_folder.path), "dtype": "float32", "device": "cpu", "port": 18733}
    serve.start(http_options={"host": "127.0.0.1", "port": 18733})
    try:
        serve.run(application(ServeJob.parse(values)), name="bulk", route_prefix="/bulk")
        score(score_job(spam_folder, source, tmp_path / "served", via_serve="bulk", unit_bytes=9000, replicas=None))
    finally:
        serve.shutdown()
    score(score_job(spam_folder, source, tmp_path / "here", unit_bytes=9000))
    same(read_scored(tmp_path / "served"), read_scored(tmp_path / "here"))
