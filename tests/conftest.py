"""Fixtures for all tests. Access to model hubs is disabled before any import, so no test uses the network."""

import os
import sys
import threading
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # a second thread does not speed up tiny models
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # threads that wait leave the core to the other process that runs tests
os.environ["MKL_CBWR"] = "AUTO,STRICT"  # otherwise memory alignment changes the last bits of products
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import hypothesis
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.progress import ROOT
from pipelines.settings import DecisionSettings
from pipelines.storage import locations
from tests import tiny
from tests.jobs import logged

hypothesis.settings.register_profile("shared-machine", deadline=None)  # a slow machine is not a failure
hypothesis.settings.load_profile("shared-machine")
sys.modules.setdefault("openvino_telemetry", None)  # for tests that import OpenVINO themselves, which reports its use

EMAILS = Path(__file__).parent.parent / "docs" / "demo" / "emails"


@pytest.hookimpl(tryfirst=True)  # before tests are selected by their markers
def pytest_collection_modifyitems(items):
    """Tests that use the local Ray, and all of `on_ray`, carry the marker `ray`."""
    for item in items:
        if "local_ray" in getattr(item, "fixturenames", ()) or "on_ray" in item.path.parts:
            item.add_marker("ray")


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    """Filesystem calls that fail are tried again at once."""
    monkeypatch.setattr(locations, "FIRST_PAUSE_SECONDS", 0.001)


@pytest.fixture(autouse=True)
def _clean_logging():
    """Restores the package's logger, because a command run in this process configures it."""
    before = (list(ROOT.handlers), ROOT.level, ROOT.propagate)
    yield
    ROOT.handlers, ROOT.propagate = before[0], before[2]
    ROOT.setLevel(before[1])


@pytest.fixture
def log_lines():
    """Messages that the package logs during a test."""
    with logged() as lines:
        yield lines


@pytest.fixture(scope="session")
def emails():
    """The demo's test emails: id, text, label."""
    return pq.read_table(EMAILS / "test")


@pytest.fixture(scope="session")
def folders(tmp_path_factory, emails):
    """One tiny model folder per kind, by name."""
    texts = emails["text"].to_pylist()[:40]
    return {
        name: tiny.model_folder(tmp_path_factory.mktemp(name), texts, decision)
        for name, decision in tiny.DECISIONS.items()
    }


@pytest.fixture(scope="session")
def spam_folder(tmp_path_factory, emails):
    """A finished binary model folder with random weights and a threshold."""
    path = tmp_path_factory.mktemp("models") / "spam"
    path.mkdir()
    decision = DecisionSettings(kind="binary", labels=("ham", "spam"), thresholds=(0.4,))
    return tiny.model_folder(path, emails["text"].to_pylist()[:40], decision)


@pytest.fixture(scope="session")
def input_folder(tmp_path_factory, emails):
    """Emails in three shards of several row groups. One shard has two rows that cannot be scored."""
    folder = tmp_path_factory.mktemp("input")
    for shard in range(3):
        table = emails.slice(shard * 20, 20)
        if shard == 1:
            texts = table["text"].to_pylist()
            texts[3] = None
            broken = pa.array([None if t is None else t.encode() for t in texts[:-1]] + [b"\xff\xfe"], pa.binary())
            table = table.set_column(table.schema.get_field_index("text"), "text", broken.view(pa.string()))
        pq.write_table(table, folder / f"shard-{shard}.parquet", row_group_size=7)
    return folder


@pytest.fixture(scope="session")
def training_data(tmp_path_factory, emails):
    """Pretrained weights without dropout in `base`, and training data of two shards in `data`."""
    folder = tmp_path_factory.mktemp("train")
    tiny.classifier(
        num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.1
    ).save_pretrained(folder / "base")
    tiny.save_tokenizer(folder / "base", emails["text"].to_pylist()[:40])
    (folder / "data").mkdir()
    texts = [text[:300] for text in emails["text"].to_pylist()[:60]]
    texts[5] = None
    for shard in range(2):
        rows = slice(shard * 30, shard * 30 + 30)
        table = pa.table({"text": texts[rows], "label": emails["label"].to_pylist()[rows]})
        pq.write_table(table, folder / "data" / f"{shard}.parquet", row_group_size=8)
    return folder


@pytest.fixture(scope="session")
def local_ray():
    """One local Ray for every test that runs in this process."""
    import ray

    from pipelines.on_ray.cluster import connected

    os.environ["RAY_DATA_PARQUET_FOOTER_NUM_ACTORS"] = "1"
    with connected():
        yield ray


@pytest.fixture
def fresh_s3():
    """Filesystems that fsspec made with the credentials of another test are not used again."""
    s3fs = pytest.importorskip("s3fs", reason="in the s3 extra")
    s3fs.S3FileSystem.clear_instance_cache()
    yield
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def flaky_s3(monkeypatch, fresh_s3):
    """An S3 server on loopback that answers every fifth request with 503."""
    moto = pytest.importorskip("moto.server", reason="the S3 test server is in the dev extra")
    from werkzeug.serving import make_server

    inner = moto.DomainDispatcherApplication(moto.create_backend_app)
    counts = {"all": 0, "failed": 0}

    def application(environ, respond):
        counts["all"] += 1
        if counts["all"] % 5 == 0:
            counts["failed"] += 1
            respond("503 Service Unavailable", [("Content-Type", "text/xml")])
            return [b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"]
        return inner(environ, respond)

    server = make_server("127.0.0.1", 0, application, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    values = {
        "ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
        "DEFAULT_REGION": "us-east-1",
        "ACCESS_KEY_ID": "key-of-mine",
        "SECRET_ACCESS_KEY": "secret-of-mine",
    }
    for name, value in values.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    yield counts
    server.shutdown()


@pytest.fixture
def source(tmp_path, emails):
    """60 emails in one file. Row 7 has no text."""
    folder = tmp_path / "in"
    folder.mkdir()
    table = emails.slice(0, 60)
    texts = table["text"].to_pylist()
    texts[7] = None
    table = table.set_column(table.schema.get_field_index("text"), "text", pa.array(texts))
    pq.write_table(table, folder / "a.parquet", row_group_size=7)
    return folder


@pytest.fixture
def catalog(tmp_path, monkeypatch):
    """An Iceberg catalog named prod, in a SQLite file."""
    pytest.importorskip("pyiceberg", reason="in the iceberg extra")
    import pyiceberg.catalog
    from pyiceberg.utils.config import Config

    settings = {"TYPE": "sql", "URI": f"sqlite:///{tmp_path}/catalog.db", "WAREHOUSE": f"file://{tmp_path}/warehouse"}
    for name, value in settings.items():
        monkeypatch.setenv(f"PYICEBERG_CATALOG__PROD__{name}", value)
    monkeypatch.setattr(pyiceberg.catalog, "_ENV_CONFIG", Config())  # pyiceberg reads the environment once
    return pyiceberg.catalog.load_catalog("prod")
