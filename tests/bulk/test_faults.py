"""Faults in bulk jobs. No row may be lost."""

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.bulk import run_folder
from pipelines.bulk import score as score_module
from pipelines.bulk import unit as unit_module
from pipelines.bulk.job import check_job
from pipelines.bulk.manifest import run_of
from pipelines.bulk.score import score_here as score
from pipelines.errors import DataError, JobError, OutputError, SettingsError
from pipelines.model.scorer import Scorer
from pipelines.storage.footers import read_footers
from pipelines.storage.marks import heartbeat
from pipelines.storage.shards import split_into_units
from tests.jobs import read_scored, score_job


def test_resumed_run_reads_only_remaining_files(spam_folder, tmp_path, emails, log_lines):
    source = tmp_path / "in"
    source.mkdir()
    for shard in range(6):
        pq.write_table(emails.slice(shard * 10, 10), source / f"{shard}.parquet", compression=None)
    score(score_job(spam_folder, source, tmp_path / "whole", unit_bytes=20_000))
    whole = read_scored(tmp_path / "whole")
    out = tmp_path / "out"
    score(score_job(spam_folder, source, out, unit_bytes=20_000))
    parts = sorted(out.glob("part-*"))
    (out / "_summary.json").unlink()
    for part in parts[len(parts) // 2 :]:
        part.unlink()
    before = {part.name: part.stat().st_mtime_ns for part in parts[: len(parts) // 2]}
    files = read_footers(str(source), ["text"])
    plan = replace(split_into_units(files, unit_bytes=20_000), run=run_of(str(out)))
    left = {span.file.path for unit in plan if not (out / unit.output_name).exists() for span in unit.spans}
    finished = [file.path for file in files if file.path not in left]
    assert finished
    for path in finished:  # corrupt their pages, so that reading them again fails
        info, content = os.stat(path), bytearray(open(path, "rb").read())  # noqa: SIM115
        footer = int.from_bytes(content[-8:-4], "little") + 8
        content[4:-footer] = b"\xff" * (len(content) - 4 - footer)
        with open(path, "wb") as file:
            file.write(content)
        os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))
    (out / f".{parts[-1].name}.deadbeef").write_bytes(b"half a file")
    log_lines.clear()
    summary = score(score_job(spam_folder, source, out, unit_bytes=20_000))
    assert summary.units_before == len(before)
    assert (summary.rows_in, summary.rows_out, summary.rows_in_error) == (60, 60, 0)
    assert any(line.startswith("resuming: ") for line in log_lines)
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before
    assert read_scored(out).drop_columns(["scores", "score"]).equals(whole.drop_columns(["scores", "score"]))
    assert not list(out.glob(".part-*")), "files of the killed writer are removed"
    log_lines.clear()
    again = score(score_job(spam_folder, source, out))
    assert again == summary
    assert log_lines == [f"nothing to do: all {len(parts)} units of {out} are done"]


def test_changed_input_append_and_overwrite(spam_folder, tmp_path, emails):
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    pq.write_table(emails.slice(0, 10), source / "a.parquet")
    first = score(score_job(spam_folder, source, out))
    pq.write_table(emails.slice(10, 5), source / "b.parquet")
    with pytest.raises(OutputError, match=r"1 input files are new \(.*b\.parquet\); .* --append"):
        score(score_job(spam_folder, source, out))
    both = score(score_job(spam_folder, source, out, append=True))
    assert (first.rows_out, both.rows_out, both.units_before) == (10, 15, first.units)
    assert [row["source_row"] for row in read_scored(out).to_pylist()] == [*range(10), *range(5)]
    pq.write_table(emails.slice(20, 7), source / "a.parquet")
    with pytest.raises(OutputError, match=r"1 input files are changed \(.*a\.parquet\); .* --replace-changed"):
        score(score_job(spam_folder, source, out, append=True))
    with pytest.raises(OutputError, match=r"settings_hash was .* --overwrite"):
        score(score_job(spam_folder, source, out, thresholds=0.9))
    anew = score(score_job(spam_folder, source, out, overwrite=True))
    assert anew.rows_out == 12 == len(read_scored(out))


def test_appended_input_needs_same_columns(spam_folder, tmp_path, emails):
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    pq.write_table(emails.slice(0, 5), source / "a.parquet")
    score(score_job(spam_folder, source, out))
    pq.write_table(emails.slice(5, 5).append_column("more", [list(range(5))]), source / "b.parquet")
    with pytest.raises(OutputError, match=r"contains the columns .*, but the input now gives .*'more': 'int64'"):
        score(score_job(spam_folder, source, out, append=True))
    assert score(score_job(spam_folder, source, tmp_path / "ids", keep=["id"])).rows_out == 10


def test_overwrite_checks_input_first(spam_folder, tmp_path, emails):
    source, out, empty = tmp_path / "in", tmp_path / "out", tmp_path / "empty"
    for folder, rows in ((source, 5), (empty, 0)):
        folder.mkdir()
        pq.write_table(emails.slice(0, rows), folder / "a.parquet")
    score(score_job(spam_folder, source, out))
    first = (out / "_summary.json").read_bytes()
    with pytest.raises(DataError, match="has no rows: its 1 files are empty"):
        score(score_job(spam_folder, empty, out, overwrite=True))
    assert (out / "_summary.json").read_bytes() == first
    with pytest.raises(DataError, match="has no rows"):
        score(score_job(spam_folder, empty, tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_scoring_exception_affects_only_its_row(spam_folder, tmp_path, emails, monkeypatch):
    (tmp_path / "in").mkdir()
    pq.write_table(emails.slice(0, 9), tmp_path / "in" / "a.parquet")
    from pipelines.model.scorer import Scorer

    scored = Scorer.score_documents
    lengths = [len(text) for text in emails["text"].to_pylist()[:9]]
    worst = int(np.argmax(lengths))

    def raises(self, documents):
        if documents.num_tokens_D.max() == most[0]:
            raise ValueError("this one")
        return scored(self, documents)

    most = [Scorer.load(spam_folder).tokenizer.documents(emails.slice(0, 9), "text").num_tokens_D.max()]
    monkeypatch.setattr(Scorer, "score_documents", raises)
    summary = score(score_job(spam_folder, tmp_path / "in", tmp_path / "out"))
    assert summary.rows_in_error == 1
    rows = read_scored(tmp_path / "out").to_pylist()
    assert [row["source_row"] for row in rows if row["error"] == "scoring failed: ValueError"] == [worst]


def test_units_with_errors_are_scored_again(spam_folder, tmp_path, emails, monkeypatch):
    (tmp_path / "in").mkdir()
    pq.write_table(emails.slice(0, 12), tmp_path / "in" / "a.parquet", row_group_size=4)
    job = score_job(spam_folder, tmp_path / "in", tmp_path / "out", unit_bytes=10)
    again = score_job(spam_folder, tmp_path / "in", tmp_path / "out", unit_bytes=10, retry_errors=True)
    commit, committed = unit_module.commit_unit, []
    monkeypatch.setattr(
        unit_module, "commit_unit", lambda *args, **options: committed.append(args[1]) or commit(*args, **options)
    )

    def fails(self, documents):
        if len(committed) in (2, 3):
            raise ValueError
        return whole(self, documents)

    whole = Scorer.score_documents
    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "score_documents", fails)
        before = score(job)
    assert before.rows_in_error == 2
    assert score(job) == before, "errors are kept unless they are to be tried again"
    with (
        heartbeat(str(tmp_path / "out")),
        pytest.raises(OutputError, match="--retry-errors would replace files of a job"),
    ):
        score(again)
    del committed[:]
    with monkeypatch.context() as patch:
        patch.setattr(unit_module, "commit_unit", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            score(again)
    assert not (tmp_path / "out" / "_summary.json").exists()
    assert read_scored(tmp_path / "out")["error"].drop_null().length() == 2, "the old files are still there"
    summary = score(again)
    assert (len(committed), summary.rows_in_error, summary.rows_out) == (2, 0, 12)
    assert score(again) == summary


def test_broken_gpu_ends_the_job_and_not_the_process(spam_folder, tmp_path, emails, monkeypatch):
    (tmp_path / "in").mkdir()
    pq.write_table(emails.slice(0, 9), tmp_path / "in" / "a.parquet")
    from pipelines.model.scorer import Scorer

    def raises(self, documents):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    job = score_job(spam_folder, tmp_path / "in", tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "score_documents", raises)
        with pytest.raises(JobError, match="the GPU is unusable in this process: CUDA error"):
            score(job)
    assert score(job).rows_in_error == 0


def test_overwrite_beside_a_running_job_is_refused(spam_folder, tmp_path, emails, monkeypatch):
    (tmp_path / "in").mkdir()
    pq.write_table(emails.slice(0, 9), tmp_path / "in" / "a.parquet")
    job = score_job(spam_folder, tmp_path / "in", tmp_path / "out", overwrite=True)
    score(job)
    mark = {"host": socket.gethostname(), "pid": os.getppid(), "time": time.time()}
    (tmp_path / "out" / "_running-other.json").write_text(json.dumps(mark))
    before = sorted((tmp_path / "out").iterdir())
    with pytest.raises(OutputError, match=r"--overwrite would remove files of a job that runs now \(process \d+ on "):
        score(job)
    assert sorted((tmp_path / "out").iterdir()) == before
    (tmp_path / "out" / "_running-other.json").write_text(json.dumps({**mark, "time": time.time() - 3600}))
    (tmp_path / "out" / "notes.txt").write_text("mine")
    (tmp_path / "out" / "part-of-mine.parquet").write_text("mine")
    assert score(job).rows_out == 9
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "out" / "part-of-mine.parquet").read_text() == "mine"
    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "split_into_units", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            score(job)
    assert score(job).rows_out == 9
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("overwrite", [False, True])
def test_input_and_output_may_not_overlap(spam_folder, tmp_path, emails, overwrite):
    (tmp_path / "in").mkdir()
    pq.write_table(emails.slice(0, 9), tmp_path / "in" / "a.parquet")
    (tmp_path / "link").symlink_to(tmp_path / "in")
    score(score_job(spam_folder, tmp_path / "in" / "a.parquet", tmp_path / "out"))
    before = sorted(tmp_path.rglob("*.parquet"))
    names = {"text_column": "source_file", "keep": [], "overwrite": overwrite}
    for source, output, more in (("out", "out", names), ("out/*.parquet", "out", names), ("in/*", "in", {}),
                                 ("in/a.parquet", "link", {})):  # fmt: skip
        with pytest.raises(SettingsError, match="would read its own output"):
            score(score_job(spam_folder, tmp_path / source, tmp_path / output, **more))
    assert sorted(tmp_path.rglob("*.parquet")) == before
    assert score(score_job(spam_folder, tmp_path / "in", tmp_path / "in" / "_out")).rows_out == 9, "never read as data"


def test_output_inside_the_input_is_left_out(spam_folder, tmp_path, emails):
    (tmp_path / "in").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "in")
    pq.write_table(emails.slice(0, 9), tmp_path / "in" / "a.parquet")
    assert score(score_job(spam_folder, tmp_path / "in", tmp_path / "in" / "out")).rows_out == 9
    pq.write_table(emails.slice(9, 2), tmp_path / "in" / "b.parquet")
    more = {"append": True}
    assert score(score_job(spam_folder, tmp_path / "in", tmp_path / "in" / "out", **more)).rows_out == 11
    with pytest.raises(DataError, match=r"in/out in the input is the output of a scoring job; move it"):
        score(score_job(spam_folder, tmp_path / "in", tmp_path / "elsewhere"))
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "mail").symlink_to(tmp_path / "in")
    with pytest.raises(DataError, match=r"links/mail/out in the input is the output of a scoring job"):
        score(score_job(spam_folder, tmp_path / "links", tmp_path / "elsewhere"))
    assert score(score_job(spam_folder, tmp_path / "links", tmp_path / "in" / "out", overwrite=True)).rows_out == 11
    again = score_job(
        spam_folder, tmp_path / "in" / "out", tmp_path / "elsewhere", text_column="source_file", prefix="m_"
    )
    assert score(again).rows_out == 11, "an output that is the input itself can be scored"


@pytest.mark.parametrize(
    ("name", "content"),
    [("_manifest.json", b""), ("_manifest.json", b"[]"), ("_manifest.json", b'{"format_version": 2}'),
     ("_inputs-0000-*.parquet", None), ("_inputs-0000-*.parquet", b""),
     ("_inputs-0000-*.parquet", b"PAR1" + b"\xff" * 40 + b"\x14\x00\x00\x00PAR1")],
)  # fmt: skip
def test_damaged_run_is_named_and_can_be_overwritten(spam_folder, tmp_path, emails, name, content):
    (tmp_path / "in").mkdir()
    pq.write_table(emails.slice(0, 9), tmp_path / "in" / "a.parquet")
    score(score_job(spam_folder, tmp_path / "in", tmp_path / "out"))
    (file,) = (tmp_path / "out").glob(name)
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(OutputError, match=rf"{file.name} in --output .* is damaged or missing; add --overwrite"):
        score(score_job(spam_folder, tmp_path / "in", tmp_path / "out"))
    assert score(score_job(spam_folder, tmp_path / "in", tmp_path / "out", overwrite=True)).rows_out == 9


@pytest.mark.parametrize("name", ["_summary.json", "part-*"])
def test_damaged_results_are_computed_again(spam_folder, tmp_path, emails, name):
    (tmp_path / "in").mkdir()
    pq.write_table(emails.slice(0, 9), tmp_path / "in" / "a.parquet")
    first = score(score_job(spam_folder, tmp_path / "in", tmp_path / "out"))
    next((tmp_path / "out").glob(name)).write_bytes(b"")
    again = score(score_job(spam_folder, tmp_path / "in", tmp_path / "out"))
    assert (again.rows_out, again.positive_rates) == (first.rows_out, first.positive_rates)


def test_max_errors_stops_run(spam_folder, tmp_path):
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"text": ["fine", None, None, "fine"]}), tmp_path / "in" / "a.parquet")
    with pytest.raises(JobError, match=r"stopped: 2 of 4 rows have errors and max_errors=1 .*\(2: the text is null\)"):
        score(score_job(spam_folder, tmp_path / "in", tmp_path / "out", max_errors=1))
    with pytest.raises(JobError, match=r"max_errors=0\.25 allows 1"):
        score(score_job(spam_folder, tmp_path / "in", tmp_path / "share", max_errors=0.25))
    assert score(score_job(spam_folder, tmp_path / "in", tmp_path / "more", max_errors=0.5)).rows_in_error == 2


def test_full_disk_stops_job_and_next_resumes(spam_folder, tmp_path, emails, monkeypatch):
    from pipelines.storage import locations

    (tmp_path / "in").mkdir()
    pq.write_table(emails.slice(0, 12), tmp_path / "in" / "a.parquet", row_group_size=3)
    monkeypatch.setattr(locations, "FIRST_PAUSE_SECONDS", 0.001)
    written, original = [], locations._commit_locally

    def full_after_two(target, content, **options):
        if "part-" in target:
            written.append(target)
            if len(written) > 2:
                raise OSError(28, "No space left on device")
        original(target, content, **options)

    monkeypatch.setattr(locations, "_commit_locally", full_after_two)
    settings = {"unit_bytes": 1}
    with pytest.raises(JobError, match="No space left on device"):
        score(score_job(spam_folder, tmp_path / "in", tmp_path / "out", **settings))
    monkeypatch.setattr(locations, "_commit_locally", original)
    summary = score(score_job(spam_folder, tmp_path / "in", tmp_path / "out", **settings))
    assert summary.units_before == 2
    assert summary.rows_out == 12


def test_killed_job_is_not_reported_as_running(spam_folder, tmp_path, emails, log_lines):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    pq.write_table(emails.slice(0, 3), tmp_path / "in" / "a.parquet")
    beat = {"host": socket.gethostname(), "pid": dead.pid, "time": time.time()}
    (tmp_path / "out" / "_running-dead.json").write_text(json.dumps(beat))
    score(score_job(spam_folder, tmp_path / "in", tmp_path / "out"))
    assert not any("another job" in line for line in log_lines)
    assert not list((tmp_path / "out").glob("_running-*")), "the heartbeat file of the killed job is removed"


def test_filter_skips_and_counts_rows(spam_folder, tmp_path, emails):
    (tmp_path / "in").mkdir()
    pq.write_table(emails.slice(0, 40), tmp_path / "in" / "a.parquet", row_group_size=7)
    spam = [row for row in range(40) if emails["label"][row].as_py() == "spam"]
    settings = {"filter": "label == 'spam'", "keep": ["id"]}
    summary = score(score_job(spam_folder, tmp_path / "in", tmp_path / "out", **settings))
    assert (summary.rows_in, summary.rows_out, summary.rows_filtered) == (40, len(spam), 40 - len(spam))
    assert read_scored(tmp_path / "out")["source_row"].to_pylist() == spam
    none = score(score_job(spam_folder, tmp_path / "in", tmp_path / "none", filter="label == 'eggs'"))
    assert (none.rows_out, none.rows_filtered) == (0, 40)
    with pytest.raises(DataError, match="--filter names 'lable', which is not an input column"):
        score(score_job(spam_folder, tmp_path / "in", tmp_path / "typo", filter="lable == 'spam'"))


def test_memory_filesystem_needs_replicas_0(spam_folder, emails):
    import fsspec

    with fsspec.open("memory://bulk/in/a.parquet", "wb") as file:
        pq.write_table(emails.slice(0, 5), file)
    with pytest.raises(SettingsError, match="memory:// exists only in this process; add --replicas 0"):
        check_job(score_job(spam_folder, "memory://bulk/in", "memory://bulk/out", replicas=1))
    assert score(score_job(spam_folder, "memory://bulk/in", "memory://bulk/out")).rows_out == 5
    with fsspec.open("memory://bulk/out/_summary.json") as file:
        assert json.load(file)["rows_out"] == 5


def test_second_job_on_same_output_warns(spam_folder, tmp_path, emails, log_lines):
    from pipelines.storage.marks import heartbeat

    (tmp_path / "in").mkdir()
    pq.write_table(emails.slice(0, 12), tmp_path / "in" / "a.parquet")
    (tmp_path / "out").mkdir()
    with heartbeat(str(tmp_path / "out")):
        while not list((tmp_path / "out").glob("_running-*")):
            pass
        score(score_job(spam_folder, tmp_path / "in", tmp_path / "out"))
    assert any(f"another job writes to this folder (process {os.getpid()} on" in line for line in log_lines)
    assert not list((tmp_path / "out").glob("_running-*"))
    assert len(read_scored(tmp_path / "out")) == 12


def test_of_two_first_starts_one_begins_the_run(spam_folder, tmp_path, emails, monkeypatch):
    """The other one comes to the folder between the first one's look at it and its manifest."""
    (tmp_path / "in").mkdir()
    pq.write_table(emails.slice(0, 8), tmp_path / "in" / "a.parquet")
    jobs = [score_job(spam_folder, tmp_path / "in", tmp_path / "out", prefix=prefix) for prefix in ("", "m_")]
    commit, others, calls = run_folder.commit_new_json, [], []

    def late(location, name, content):
        calls.append(name)
        if len(calls) == 1:
            others.append(score(jobs[1]))
        commit(location, name, content)

    monkeypatch.setattr(run_folder, "commit_new_json", late)
    with pytest.raises(OutputError, match="prefix was 'm_' and is now ''"):
        score(jobs[0])
    assert "m_score" in read_scored(tmp_path / "out").column_names
    assert len(list((tmp_path / "out").glob("_inputs-*"))) >= 1
    assert score(jobs[1]).rows_out == others[0].rows_out == 8
    del calls[:]
    jobs = [score_job(spam_folder, tmp_path / "in", tmp_path / "same")] * 2
    assert score(jobs[0]).rows_out == 8, "the same job may be started twice"
    assert len(calls) == 2
    assert len(read_scored(tmp_path / "same")) == 8


def test_overwrite_waits_for_no_gap(spam_folder, tmp_path, emails, monkeypatch):
    """From its first write on, a job is seen by others; a run that was replaced all the same is an error."""
    (tmp_path / "in").mkdir()
    pq.write_table(emails.slice(0, 8), tmp_path / "in" / "a.parquet")
    job = score_job(spam_folder, tmp_path / "in", tmp_path / "out")
    other = score_job(spam_folder, tmp_path / "in", tmp_path / "out", prefix="m_", overwrite=True)
    original = score_module.open_run

    def opened(*args, **options):
        monkeypatch.setattr(score_module, "open_run", original)
        with pytest.raises(OutputError, match="--overwrite would remove files of a job that runs now"):
            score(other)
        return original(*args, **options)

    monkeypatch.setattr(score_module, "open_run", opened)
    assert score(job).rows_out == 8
    rest = score_module._score_rest

    def replaced(*args):
        monkeypatch.setattr(score_module, "_score_rest", rest)
        monkeypatch.setattr(run_folder, "others_of", lambda *_: [])
        score(other)
        return rest(*args)

    monkeypatch.setattr(score_module, "_score_rest", replaced)
    (tmp_path / "out" / "_summary.json").unlink()
    with pytest.raises(JobError, match="another job has replaced the run"):
        score(job)


@pytest.mark.timeout(600)
@pytest.mark.slow
def test_fifty_megabyte_document(spam_folder, tmp_path):
    (tmp_path / "in").mkdir()
    long = ("x" * 199 + " ") * (50 * 2**20 // 200)  # each word is one unknown token
    pq.write_table(pa.table({"text": ["short", long, "short too"]}), tmp_path / "in" / "a.parquet")
    summary = score(score_job(spam_folder, tmp_path / "in", tmp_path / "out"))
    rows = read_scored(tmp_path / "out").to_pylist()
    assert (summary.rows_out, summary.rows_in_error) == (3, 0)
    assert rows[1]["num_tokens"] == 50 * 2**20 // 200
    assert rows[1]["num_windows"] > 10_000
    assert not rows[1]["truncated"]
    assert rows[0]["num_windows"] == 1
