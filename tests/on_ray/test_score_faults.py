"""Faults that occur only with separate processes."""

import os
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from pipelines.bulk import job as job_module
from pipelines.bulk.job import check_job
from pipelines.errors import JobError
from pipelines.on_ray import replica
from pipelines.on_ray import score as score_module
from pipelines.on_ray.cluster import root_cause
from pipelines.on_ray.replica import CrashRecord, ScoreUnits
from pipelines.on_ray.score import score
from pipelines.storage.shards import split_into_units
from pipelines.text.attempts import RowsToTry
from pipelines.text.stage import TokenizeStage
from tests import tiny
from tests.jobs import read_scored, score_job


def deadly(words):
    """A replica class whose process dies on texts with one of the words. A local class is pickled by value."""

    class Deadly(ScoreUnits):
        def __init__(self, *args):
            super().__init__(*args)
            scorer = self._units._scorer
            bad = {int(scorer.tokenizer.encode([word]).ids[0]) for word in words}
            scored = scorer.score_documents

            def score_documents(documents):
                if bad & set(documents.tokens.ids.tolist()):
                    os._exit(1)
                return scored(documents)

            scorer.score_documents = score_documents

    return Deadly


@pytest.mark.slow  # half a minute; the next test does the same while rows are tokenized
@pytest.mark.timeout(600)
def test_row_that_kills_its_process_gets_error(local_ray, tmp_path, emails, monkeypatch):
    folder = tmp_path / "model"
    folder.mkdir()
    texts = [f"good text number {number}" for number in range(16)]
    texts[5] = "a deadly one"
    spam = tiny.model_folder(
        folder, [*texts, "deadly " * 50, *emails["text"].to_pylist()[:40]], tiny.BINARY, max_length=16
    )
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"text": texts}), tmp_path / "in" / "a.parquet", row_group_size=8)
    monkeypatch.setattr(score_module, "ScoreUnits", deadly(["deadly"]))
    monkeypatch.setattr(replica, "CRASHES_BEFORE_HALVING", 0)
    summary = score(score_job(spam, tmp_path / "in", tmp_path / "out", unit_bytes=10, replicas=1))
    rows = read_scored(tmp_path / "out").to_pylist()
    assert len(rows) == summary.rows_out == 16
    assert [row["source_row"] for row in rows if row["error"]] == [5]
    assert "died several times while it scored this row" in rows[5]["error"]


class DeadlyStage(TokenizeStage):
    """A stage whose process dies when it tokenizes a text, or reads a file."""

    def _tokenizer(self):
        tokenizer = super()._tokenizer()
        documents = tokenizer.documents

        def dies(table, *names):
            if "a deadly one" in table["text"].to_pylist():
                os._exit(1)
            return documents(table, *names)

        tokenizer.documents = dies
        return tokenizer


@pytest.mark.timeout(600)
def test_row_that_kills_its_tokenizing_process_gets_error(local_ray, spam_folder, tmp_path, monkeypatch):
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    texts = [f"good text number {number}" for number in range(16)]
    texts[5] = "a deadly one"
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"text": texts}), tmp_path / "in" / "a.parquet", row_group_size=8)
    monkeypatch.setattr(job_module, "TokenizeStage", DeadlyStage)
    monkeypatch.setattr(replica, "CRASHES_BEFORE_HALVING", 0)
    summary = score(score_job(spam_folder, tmp_path / "in", tmp_path / "out", replicas=1))
    rows = read_scored(tmp_path / "out").to_pylist()
    assert len(rows) == summary.rows_out == 16
    assert [row["source_row"] for row in rows if row["error"]] == [5]
    assert "died several times while it tokenized this row" in rows[5]["error"]


def test_a_unit_whose_reading_kills_its_process_stops_the_job(spam_folder, tmp_path):
    """Which of its rows is to blame cannot be found, so none becomes an error."""
    pq.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "a.parquet")
    checked = check_job(score_job(spam_folder, tmp_path / "a.parquet", tmp_path / "out"))
    units, record = list(split_into_units(checked.files)), CrashRecord()
    for _ in range(replica.CRASHES_BEFORE_HALVING + 1):
        record.begin(-1, 1)  # and the process dies
    with pytest.raises(JobError, match=r"died several times while it read rows of .*a\.parquet; leave the file out"):
        list(checked.stage(units, record))


def test_crashing_range_is_halved():
    record = CrashRecord()
    deadly_rows, is_done = {3, 10}, False
    crashes = 0
    while not is_done:
        rows = record.begin(7, 12)
        is_done = True
        for place, (start, stop) in enumerate(rows.ranges):
            if place:
                record.begin_range(7, (start, stop))
            if deadly_rows & set(range(start, stop)):
                crashes += 1
                is_done = False
                break
    assert set(rows.deadly) == deadly_rows
    assert sorted(row for start, stop in rows.ranges for row in range(start, stop)) == sorted(
        {*range(12)} - deadly_rows
    )
    assert crashes <= replica.CRASHES_BEFORE_HALVING + 2 * 5 + 1
    record.end(7)
    record.begin_range(7, (3, 6))
    assert record.begin(7, 12) == RowsToTry(((0, 12),)), "a range must not replace a whole unit"


def fails(kind):
    """A function that fails as tasks do."""

    def fail(_batch):
        if kind == "own":
            try:
                os.stat("/no/such/folder/file")
            except OSError as error:
                raise JobError("/out cannot be written: two\nlines") from error
        raise {"bug": TypeError("a bug\nof two lines"), "disk": OSError(28, "No space left on device"),
               "gone": FileNotFoundError(2, "no such file", "/in"), "empty": KeyError()}[kind]  # fmt: skip

    return fail


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(
    ("kind", "shown", "may_pass"),
    [("own", "/out cannot be written: two", True), ("bug", "TypeError: a bug", False), ("empty", "KeyError", False),
     ("disk", "OSError: [Errno 28] No space left on device", True),
     ("gone", "FileNotFoundError: [Errno 2] no such file: '/in'", False)],
)  # fmt: skip
def test_errors_of_tasks_are_shown_without_wrappers(kind, shown, may_pass):
    with pytest.raises(ray.exceptions.RayError) as caught:
        ray.data.range(1).map_batches(fails(kind)).materialize()
    cause = root_cause(caught.value)
    assert (str(cause), cause.may_pass) == (shown, may_pass)
