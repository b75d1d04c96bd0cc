"""Scored files become rows of a Delta or Iceberg table, once, wherever the job is killed."""

import json

import deltalake
import deltalake.transaction
import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pyiceberg.catalog.sql as sql
import pyiceberg.table.update.snapshot as snapshots
import pytest

from pipelines.bulk import publish as publish_module
from pipelines.bulk import score as score_module
from pipelines.bulk.score import score_here as score
from pipelines.errors import JobError, OutputError, SettingsError, UsageError
from tests.jobs import read_scored, score_job


class Killed(BaseException):
    pass


@pytest.fixture
def source(tmp_path, emails):
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(3):
        pq.write_table(emails.slice(number * 4, 4), folder / f"{number}.parquet")
    return folder


class Delta:
    def __init__(self, tmp_path):
        self.folder = tmp_path / "table"
        self.name, self.output = f"delta:{self.folder}", self.folder / "run"

    def rows(self):
        found = deltalake.DeltaTable(self.folder).to_pyarrow_dataset()  # noqa: F841  # DuckDB reads it by its name
        return duckdb.sql("select id, predicted_label, source_row, scores from found").fetchall()

    def commits(self):
        return len(deltalake.DeltaTable(self.folder).history())

    def exists(self):
        return (self.folder / "_delta_log").exists()


class Iceberg:
    def __init__(self, tmp_path, catalog):
        self.catalog = catalog
        self.name, self.output = "iceberg:prod.mail.scored", tmp_path / "out"

    def rows(self):
        connection = self.catalog.load_table("mail.scored").scan().to_duckdb("found")
        return connection.sql("select id, predicted_label, source_row, scores from found").fetchall()

    def commits(self):
        return len(self.catalog.load_table("mail.scored").metadata.snapshots)

    def exists(self):
        return self.catalog.table_exists("mail.scored")


@pytest.fixture(params=["delta", "iceberg"])
def table(request, tmp_path, catalog):
    return Delta(tmp_path) if request.param == "delta" else Iceberg(tmp_path, catalog)


def check(table, summary, emails, count):
    """Every row of the run is in the table once."""
    rows = sorted(table.rows())
    scored = read_scored(table.output)
    assert summary.rows_out == len(rows) == len(scored) == count
    assert [row[0] for row in rows] == sorted(emails["id"].to_pylist()[:count])
    assert sorted(zip(scored["id"].to_pylist(), scored["predicted_label"].to_pylist(), strict=True)) == [
        row[:2] for row in rows
    ]


def test_rows_are_added_once(spam_folder, source, table, emails):
    job = score_job(spam_folder, source, table.output, table=table.name)
    summary = score(job)
    assert summary.table.startswith(f"{table.name} at ")
    check(table, summary, emails, 12)
    for _ in range(2):
        score(job)
    assert table.commits() == 1
    pq.write_table(emails.slice(12, 4), source / "3.parquet")
    more = score(score_job(spam_folder, source, table.output, table=table.name, append=True))
    check(table, more, emails, 16)
    assert table.commits() == 2
    with pytest.raises(OutputError, match=r"are part of a table, so they cannot be removed"):
        score(score_job(spam_folder, source, table.output, table=table.name, overwrite=True))
    (table.output / "_manifest.json").write_text("damaged")
    with pytest.raises(OutputError, match=r"are part of a table, so they cannot be removed"):
        score(score_job(spam_folder, source, table.output, overwrite=True))


def test_changes_of_the_input_of_a_table(spam_folder, source, table, emails):
    """Rows cannot be removed from a table. Files that are gone keep their rows, as they do in a folder."""
    score(score_job(spam_folder, source, table.output, table=table.name))
    (source / "0.parquet").unlink()
    summary = score(score_job(spam_folder, source, table.output, table=table.name, append=True))
    check(table, summary, emails, 12)
    assert (summary.files_gone, table.commits()) == (1, 1)
    pq.write_table(emails.slice(20, 4), source / "1.parquet")
    with pytest.raises(OutputError, match="and the output is a table, in which its rows cannot be replaced"):
        score(score_job(spam_folder, source, table.output, replace_changed=True))


def test_table_of_a_run_that_is_finished_already(spam_folder, source, table, emails):
    score(score_job(spam_folder, source, table.output))
    assert not table.exists()
    manifest = table.output / "_manifest.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**content, "run": ""}))  # as earlier versions wrote it
    summary = score(score_job(spam_folder, source, table.output, table=table.name))
    check(table, summary, emails, 12)
    again = score(score_job(spam_folder, source, table.output, table=table.name))
    assert (again.table, table.commits()) == (summary.table, 1)
    assert json.loads((table.output / "_summary.json").read_text())["table"] == summary.table


def test_a_folder_with_odd_characters(spam_folder, source, tmp_path, emails):
    folder = tmp_path / "a%20b"
    for options in ({"source": source, "table": f"delta:{folder}"}, {"source": folder}):
        (folder / "_delta_log").mkdir(parents=True, exist_ok=True)
        with pytest.raises(UsageError, match=r"a%20b has an escaped character .* rename the folder"):
            score(score_job(spam_folder, output=folder / "run", **options))
    folder = tmp_path / "a b#c?d%e+f=g"
    summary = score(score_job(spam_folder, source, folder / "run", table=f"delta:{folder}"))
    assert summary.rows_out == len(deltalake.DeltaTable(folder).to_pyarrow_dataset().to_table()) == 12
    job = score_job(spam_folder, folder, tmp_path / "again", keep=["id"], text_column="predicted_label")
    assert score(job).rows_out == 12, "and it is read from there"


BEFORE = {
    "delta": [(deltalake.transaction, "_create_table_with_add_actions")],
    "iceberg": [(snapshots, "write_manifest"), (snapshots, "write_manifest_list"), (sql.SqlCatalog, "commit_table"),
                (sql.Session, "commit")],
}  # fmt: skip


@pytest.mark.parametrize("is_after", [False, True])
@pytest.mark.parametrize("step", range(4))
def test_a_kill_leaves_all_rows_or_none(spam_folder, source, table, emails, monkeypatch, step, is_after):
    """A kill before or after each step of the library that can be stopped at."""
    steps = BEFORE[type(table).__name__.lower()]
    if step >= len(steps):
        pytest.skip("the library has no more steps")
    owner, name = steps[step]
    original = getattr(owner, name)
    if owner is sql.Session:  # the first commits make the namespace
        table.catalog.create_namespace("mail")

    def dies(*args, **options):
        if is_after:
            original(*args, **options)
        raise Killed

    job = score_job(spam_folder, source, table.output, table=table.name)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, dies)
        with pytest.raises(Killed):
            score(job)
    assert not (table.output / "_summary.json").exists()
    commit_is_done = is_after and name in ("_create_table_with_add_actions", "commit_table", "commit")
    assert table.exists() == commit_is_done
    if commit_is_done:
        assert len(table.rows()) == 12
    check(table, score(job), emails, 12)
    assert table.commits() == 1


def test_a_kill_before_and_after_the_commit(spam_folder, source, table, emails, monkeypatch):
    job = score_job(spam_folder, source, table.output, table=table.name)
    with monkeypatch.context() as patch:
        patch.setattr(publish_module, "add_table", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            score(job)
    assert not table.exists()
    with monkeypatch.context() as patch:
        patch.setattr(score_module, "summarize", lambda *_, **__: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            score(job)
    assert table.commits() == 1
    check(table, score(job), emails, 12)
    assert table.commits() == 1


@pytest.mark.parametrize("is_new", [True, False])
def test_another_process_of_the_run_commits_first(spam_folder, source, table, emails, monkeypatch, is_new):
    """It commits between our look at the table and our commit. The libraries' own retries would add the rows twice."""
    count = 12
    if not is_new:
        score(score_job(spam_folder, source, table.output, table=table.name))
        pq.write_table(emails.slice(12, 4), source / "3.parquet")
        count = 16
    job = score_job(spam_folder, source, table.output, table=table.name, append=True)
    score(score_job(spam_folder, source, table.output, append=True))
    target = type(publish_module.output_table(table.name))
    existing, looks = target._existing, []

    def late(self):
        found = existing(self)
        looks.append(found)
        if len(looks) == 3:  # two checks of the columns came first
            score(job)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(target, "_existing", late)
        check(table, score(job), emails, count)
    assert len(looks) > 3
    assert table.commits() == (1 if is_new else 2)


def test_tables_that_do_not_fit_are_refused_before_work(spam_folder, source, table, tmp_path, emails):
    score(score_job(spam_folder, source, table.output, table=table.name))
    other = tmp_path / "table" / "other" if isinstance(table, Delta) else tmp_path / "other"
    with pytest.raises(OutputError, match=r"has other columns: .*; give another table"):
        score(score_job(spam_folder, source, other, table=table.name, keep=["label"]))
    assert not other.exists()
    pq.write_table(pa.table({"text": ["a"], "n": pa.array([1], pa.uint64())}), tmp_path / "odd.parquet")
    with pytest.raises(OutputError, match=r"column 'n' has the type uint64, and .* tables have no unsigned integers"):
        score(score_job(spam_folder, tmp_path / "odd.parquet", other, table=table.name))


def test_names_that_are_no_tables(spam_folder, source, tmp_path):
    for name, message in {
        "mail.scored": "must be delta:FOLDER or iceberg:CATALOG",
        f"delta:{tmp_path}/table": "must be a folder in the table .*; for example .*/table/scored",
        "iceberg:prod": "must be iceberg:CATALOG",
    }.items():
        with pytest.raises(SettingsError, match=message):
            score(score_job(spam_folder, source, tmp_path / "out", table=name))


def test_a_commit_that_fails_is_named(spam_folder, source, table, monkeypatch):
    job = score_job(spam_folder, source, table.output, table=table.name)
    score(score_job(spam_folder, source, table.output))
    owner, name = BEFORE[type(table).__name__.lower()][-2 if isinstance(table, Iceberg) else 0]

    def fails(*_args, **_options):
        raise OSError("the disk is full")

    monkeypatch.setattr(owner, name, fails)
    with pytest.raises(JobError, match=r"could not be added to --table .*: the disk is full; start the job again"):
        score(job)


@pytest.mark.usefixtures("flaky_s3")
def test_tables_on_s3(spam_folder, source, emails, monkeypatch, request):
    """Input, output and tables on a server that refuses every fifth request."""
    import s3fs

    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    filesystem = s3fs.S3FileSystem()
    filesystem.mkdir("lake")
    filesystem.put(str(source), "lake/in", recursive=True)
    table = "delta:s3://lake/table"
    summary = score(score_job(spam_folder, "s3://lake/in", "s3://lake/table/run", table=table))
    assert summary.rows_out == 12
    found = deltalake.DeltaTable("s3://lake/table").to_pyarrow_table()
    assert sorted(found["id"].to_pylist()) == sorted(emails["id"].to_pylist()[:12])
    again = score(score_job(spam_folder, "s3://lake/table", "s3://lake/again", text_column="id", prefix="m_"))
    assert again.rows_out == 12
    assert json.loads(filesystem.cat("lake/table/run/_summary.json"))["table"].startswith("delta:s3://lake/table at")


@pytest.mark.usefixtures("flaky_s3")
def test_iceberg_on_s3(spam_folder, source, emails, monkeypatch, tmp_path):
    """Data files and metadata on a server that refuses every fifth request, the catalog in a SQLite file."""
    import os

    import pyiceberg.catalog
    import s3fs
    from pyiceberg.utils.config import Config

    settings = {"TYPE": "sql", "URI": f"sqlite:///{tmp_path}/s3.db", "WAREHOUSE": "s3://berg/warehouse",
                "S3__ENDPOINT": os.environ["AWS_ENDPOINT_URL"], "S3__ACCESS_KEY_ID": os.environ["AWS_ACCESS_KEY_ID"],
                "S3__SECRET_ACCESS_KEY": os.environ["AWS_SECRET_ACCESS_KEY"], "S3__REGION": "us-east-1"}  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setenv(f"PYICEBERG_CATALOG__STORE__{name}", value)
    monkeypatch.setattr(pyiceberg.catalog, "_ENV_CONFIG", Config())
    s3fs.S3FileSystem().mkdir("berg")
    catalog = pyiceberg.catalog.load_catalog("store")
    catalog.create_namespace("mail")
    catalog.create_table("mail.raw", schema=emails.schema).append(emails.slice(0, 12))
    name = "iceberg:store.mail.scored"
    job = score_job(spam_folder, "iceberg:store.mail.raw", "s3://berg/run", table=name)
    assert score(job).rows_out == 12
    score(job)
    table = catalog.load_table("mail.scored")
    assert len(table.metadata.snapshots) == 1
    assert sorted(table.scan().to_arrow()["id"].to_pylist()) == sorted(emails["id"].to_pylist()[:12])
