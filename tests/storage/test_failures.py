"""A filesystem that fails is no fault of the data: no row becomes one in error, and the job stops."""

import errno
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem

from pipelines.bulk import score as score_module
from pipelines.bulk.score import score_here as score
from pipelines.errors import DataError, JobError, OutputError
from pipelines.model.scorer import Scorer
from pipelines.storage import footers, rows
from pipelines.storage.footers import read_footers
from pipelines.storage.rows import read_units, together
from pipelines.storage.shards import split_into_units
from pipelines.text.tokenization import Tokenizer
from tests.jobs import read_scored, score_job


class Forbidden(Exception):
    """An error as of an object store's own library."""


FAILURES = [OSError(errno.EIO, "Input/output error"), FileNotFoundError(2, "gone"), PermissionError(13, "expired"),
            TimeoutError("the store does not answer"), Forbidden("403")]  # fmt: skip


class Broken:
    """A file whose reads fail after some calls."""

    def __init__(self, file, left, error):
        self._file, self.left, self._error = file, left, error

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()

    def _call(self, name, *args):
        self.left[0] -= 1
        if self.left[0] < 0:
            raise self._error
        return getattr(self._file, name)(*args)

    def read(self, *args):
        return self._call("read", *args)

    def readline(self, *args):
        return self._call("readline", *args)


@pytest.fixture
def store(monkeypatch):
    """Lets reads of input files fail after a number of calls: store(calls, error)."""
    opened = LocalFileSystem._open
    left, errors = [10**9], [None]

    def open_(self, path, mode="rb", **options):
        file = opened(self, path, mode=mode, **options)
        if mode != "rb" or "/in" not in str(path):
            return file
        if left[0] <= 0:
            raise errors[0]
        return Broken(file, left, errors[0])

    def fail(calls, error):
        left[0], errors[0] = calls, error

    monkeypatch.setattr(LocalFileSystem, "_open", open_)
    return fail


def write(folder, kind):
    folder.mkdir()
    rows = [{"id": number, "text": f"text {number} " * 400} for number in range(40)]
    if kind == "parquet":
        for part in range(2):
            table = pa.Table.from_pylist(rows[part * 20 : part * 20 + 20])
            pq.write_table(table, folder / f"{part}.parquet", row_group_size=5, use_dictionary=False)
    else:
        pa.Table.from_pylist(rows).to_pandas().to_json(folder / "a.jsonl", orient="records", lines=True)


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("kind", ["parquet", "json"])
def test_every_failing_call_stops_the_job(tmp_path, store, kind, error):
    """At whichever call the store goes away: an error of the job, or all rows."""
    write(tmp_path / "in", kind)
    files = read_footers(str(tmp_path / "in"), ["text"])
    units, schema = list(split_into_units(files, unit_bytes=9000)), together(files)
    failed = 0
    for calls in range(0, 60, 1 if error is FAILURES[0] else 7):
        store(calls, error)
        try:
            rows = [part for unit in units for part in read_units(str(tmp_path / "in"), [unit], schema,
                                                                  text_columns=["text"])]  # fmt: skip
        except JobError as caught:
            failed += "could not be read" in str(caught)
        else:
            assert [reason for part in rows for reason in part.errors] == [None] * 40
    store(10**9, error)
    assert failed > 3


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("kind", ["parquet", "json"])
def test_a_failing_scan_stops_the_job(tmp_path, store, kind, error):
    write(tmp_path / "in", kind)
    for calls in range(2):
        store(calls, error)
        with pytest.raises((JobError, DataError), match=r"could not be read|cannot be read"):
            read_footers(str(tmp_path / "in"), ["text"], lenient=True)


def test_a_job_whose_store_went_away_is_resumed(spam_folder, tmp_path, store):
    write(tmp_path / "in", "parquet")
    job = score_job(spam_folder, tmp_path / "in", tmp_path / "out", unit_bytes=9000)
    store(12, FAILURES[0])
    with pytest.raises(JobError, match=r"could not be read: .*Input/output error; no row is lost: start the job again"):
        score(job)
    store(10**9, None)
    assert score(job).rows_in_error == 0
    assert read_scored(tmp_path / "out")["id"].to_pylist() == list(range(40))


def test_input_that_changes_while_a_job_runs(spam_folder, tmp_path, monkeypatch):
    write(tmp_path / "in", "parquet")
    job = score_job(spam_folder, tmp_path / "in", tmp_path / "out", unit_bytes=9000)
    original = score_module.score_units_here

    def changed(checked, units):
        for number, counts in enumerate(original(checked, units)):
            yield counts
            if number == 0:
                pq.write_table(pa.table({"id": range(20), "text": ["other"] * 20}), tmp_path / "in" / "1.parquet")

    with pytest.raises(JobError, match=r"1\.parquet has changed since the job began"):
        score_module.run_job(score_module.check_job(job), changed)
    again = score(score_job(spam_folder, tmp_path / "in", tmp_path / "out", unit_bytes=9000, replace_changed=True))
    assert (again.rows_out, again.rows_in_error) == (40, 0)
    assert read_scored(tmp_path / "out")["num_tokens"].to_pylist().count(1) == 20


def test_output_that_is_removed_while_a_job_runs(spam_folder, tmp_path):
    write(tmp_path / "in", "parquet")
    job = score_job(spam_folder, tmp_path / "in", tmp_path / "out", unit_bytes=9000)
    original = score_module.score_units_here

    def removed(checked, units):
        for number, counts in enumerate(original(checked, units)):
            yield counts
            if number == 2:
                parts = sorted((tmp_path / "out").glob("part-*"))
                parts[0].unlink()
                os.truncate(parts[1], 0)

    with pytest.raises(JobError, match=r"2 of \d+ files are missing in .*part-000000.*start the job again"):
        score_module.run_job(score_module.check_job(job), removed)
    assert not (tmp_path / "out" / "_summary.json").exists()
    assert score(job).rows_out == len(read_scored(tmp_path / "out")) == 40


def test_too_little_memory_to_read_stops_the_job(spam_folder, tmp_path, monkeypatch):
    write(tmp_path / "in", "parquet")
    job = score_job(spam_folder, tmp_path / "in", tmp_path / "out", unit_bytes=9000)
    read, calls = rows._GroupReader._take, []

    def fails(self, count):
        calls.append(count)
        if len(calls) > 3:
            raise pa.ArrowMemoryError("malloc of size 64 failed")
        return read(self, count)

    with monkeypatch.context() as patch:
        patch.setattr(rows._GroupReader, "_take", fails)
        with pytest.raises(JobError, match=r"not enough memory to read row group 0 of .*no row is lost"):
            score(job)
    assert score(job).rows_in_error == 0


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_too_little_memory_to_score_stops_the_job(spam_folder, tmp_path, monkeypatch, error):
    """Smaller batches are tried first."""
    write(tmp_path / "in", "parquet")
    job = score_job(spam_folder, tmp_path / "in", tmp_path / "out", unit_bytes=9000)
    score_documents, sizes = Scorer.score_documents, []

    def fails(self, documents):
        sizes.append(len(documents))
        if len(documents) > most:
            raise error
        return score_documents(self, documents)

    monkeypatch.setattr(Scorer, "score_documents", fails)
    most = 0
    with pytest.raises(JobError, match="not enough memory to score a single document"):
        score(job)
    assert sizes[-1] == 1
    most = 1
    assert score(job).rows_in_error == 0


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_a_restart_does_not_scan_again(spam_folder, tmp_path, monkeypatch, name):
    (tmp_path / "in").mkdir()
    lines = ["text", *map(str, range(40))] if name.endswith("csv") else [f'{{"text": "{row}"}}' for row in range(40)]
    (tmp_path / "in" / name).write_text("\n".join(lines))
    job = score_job(spam_folder, tmp_path / "in", tmp_path / "out")
    assert score(job).rows_out == 40
    next((tmp_path / "out").glob("part-*")).unlink()
    with monkeypatch.context() as patch:
        patch.setattr(footers, "scan", None)
        assert score(job).rows_out == 40
    (tmp_path / "in" / name).write_text("\n".join(lines[:-1]))
    with pytest.raises(OutputError, match="1 input files are changed"):
        score(job)


@pytest.mark.parametrize(("name", "owner"), [("a.parquet", "pq.ParquetFile"), ("a.jsonl", "scan"), ("a.csv", "scan")])
def test_too_little_memory_to_open_a_file_stops_the_job(tmp_path, monkeypatch, name, owner):
    """It is not a file in error, whose rows are left out."""
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / name)
    if not name.endswith("parquet"):
        (tmp_path / name).write_text('{"text": "a"}\n' if name.endswith("jsonl") else "text\na\n")

    def fails(*_args, **_options):
        raise pa.ArrowMemoryError("malloc of size 64 failed")

    monkeypatch.setattr(f"pipelines.storage.footers.{owner}", fails)
    with pytest.raises(JobError, match=rf"not enough memory to (open|read) .*{name}; no row is lost"):
        read_footers(str(tmp_path), ["text"], lenient=True)


def test_too_little_memory_to_tokenize_stops_the_job(spam_folder, tmp_path, monkeypatch):
    write(tmp_path / "in", "parquet")
    monkeypatch.setattr(Tokenizer, "documents", lambda *_: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(JobError, match="not enough memory to score a unit; no row is lost"):
        score(score_job(spam_folder, tmp_path / "in", tmp_path / "out"))
