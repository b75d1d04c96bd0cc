import os
import threading

import pytest

from pipelines.settings import DecisionSettings
from tests import tiny


@pytest.fixture(scope="session")
def local_ray():
    """One local Ray for every test that runs in this process."""
    import ray

    from pipelines.on_ray.cluster import connected

    os.environ["RAY_DATA_PARQUET_FOOTER_NUM_ACTORS"] = "1"
    with connected():
        yield ray


@pytest.fixture(scope="session")
def spam_folder(tmp_path_factory, emails):
    """A finished binary model folder with random weights."""
    path = tmp_path_factory.mktemp("models") / "spam"
    path.mkdir()
    decision = DecisionSettings(kind="binary", labels=("ham", "spam"), thresholds=(0.4,))
    return tiny.model_folder(path, emails["text"].to_pylist()[:40], decision)


@pytest.fixture(scope="session")
def input_folder(tmp_path_factory, emails):
    """Emails in three shards of several row groups, one of them with rows that cannot be scored."""
    import pyarrow as pa
    import pyarrow.parquet as pq

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


@pytest.fixture
def flaky_s3(monkeypatch):
    """An S3 server on loopback that answers every fifth request with 503."""
    moto = pytest.importorskip("moto.server", reason="the S3 test server is in the dev extra")
    pytest.importorskip("s3fs", reason="in the s3 extra")
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
    values = {"ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}", "DEFAULT_REGION": "us-east-1",
              "ACCESS_KEY_ID": "key-of-mine", "SECRET_ACCESS_KEY": "secret-of-mine"}  # fmt: skip
    for name, value in values.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    yield counts
    server.shutdown()
