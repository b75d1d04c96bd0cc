"""Input files that are added, changed and removed between the starts of a job."""

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.bulk import finished, replaced, run_folder
from pipelines.bulk import score as score_module
from pipelines.bulk import unit as unit_module
from pipelines.bulk.manifest import add_table, known_files
from pipelines.bulk.score import score_here as score
from pipelines.errors import JobError, OutputError, SettingsError
from pipelines.model.scorer import Scorer
from pipelines.storage import shards
from pipelines.storage.listing import list_files
from pipelines.storage.marks import heartbeat
from pipelines.text.stage import TokenizedUnit
from tests.jobs import read_scored, score_job


def rows_of(output):
    """The rows of an output by file: their numbers and ids."""
    found = {}
    for row in read_scored(output).to_pylist():
        found.setdefault(row["source_file"].rsplit("/", 1)[1], []).append((row["source_row"], row["id"]))
    return found


def write(emails, folder, name, start, count):
    pq.write_table(emails.slice(start, count), folder / name)
    os.utime(folder / name, (start + 1, start + 1))  # a new version, even within the clock's resolution


class Killed(BaseException):
    pass


@pytest.fixture
def run(spam_folder, tmp_path):
    """Scores small files together, a few rows in each unit."""
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()

    def start(**options):
        job = score_job(spam_folder, source, out, unit_bytes=20_000, replace_changed=True, **options)
        return score(job)

    return source, out, start


def test_changed_files_replace_their_rows(run, emails):
    source, out, start = run
    for number, name in enumerate("abcd"):
        write(emails, source, f"{name}.parquet", 10 * number, 3)
    first = start()
    assert first.units < 4, "small files share a unit"
    before = rows_of(out)
    write(emails, source, "b.parquet", 50, 5)
    write(emails, source, "e.parquet", 60, 2)
    (source / "d.parquet").unlink()
    summary = start()
    assert (summary.rows_in, summary.rows_out, summary.files_gone) == (3 + 5 + 3 + 3 + 2, 16, 1)
    after = rows_of(out)
    assert {name: after[name] for name in ("a.parquet", "c.parquet", "d.parquet")} == {
        name: before[name] for name in ("a.parquet", "c.parquet", "d.parquet")
    }
    ids = emails["id"].to_pylist()
    assert after["b.parquet"] == list(enumerate(ids[50:55]))
    assert after["e.parquet"] == list(enumerate(ids[60:62]))
    again = start()
    assert again == summary, "nothing is left to do"
    for name in "abcd":
        write(emails, source, f"{name}.parquet", 70, 1)
    last = start()
    assert (last.rows_out, last.files_gone) == (6, 0)
    assert sum(map(len, rows_of(out).values())) == 6
    assert sum(last.histograms["spam"]) == 6


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 4)), min_size=1, max_size=3),
                min_size=1, max_size=3), st.integers(0, 3))  # fmt: skip
def test_any_sequence_of_changes(spam_folder, emails, tmp_path_factory, changes, killed):
    """Each start scores what is there. Some starts are killed before the old rows are removed."""
    folder = tmp_path_factory.mktemp("any")
    source, out = folder / "in", folder / "out"
    source.mkdir()
    expected, version = {}, 0
    for number, step in enumerate(changes):
        for name, count in step:
            version += 1
            write(emails, source, f"{name}.parquet", version * 5, count)
            expected[f"{name}.parquet"] = emails["id"].to_pylist()[version * 5 : version * 5 + count]
        if not any(expected.values()):
            continue
        job = score_job(spam_folder, source, out, unit_bytes=9_000, replace_changed=True)
        if number == killed:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(score_module, "remove_replaced_rows", kill)
                try:
                    score(job)
                except Killed:
                    assert not (out / "_summary.json").exists(), "an output with old rows is not finished"
        summary = score(job)
        found = rows_of(out)
        assert {name: [i for _, i in sorted(rows)] for name, rows in found.items()} == {
            name: ids for name, ids in expected.items() if ids
        }
        assert summary.rows_out == sum(map(len, expected.values()))


def kill(run, *_args, **_options):
    if list(run.with_replaced_rows()):
        raise Killed
    return ()


def test_a_start_that_dies_while_rows_are_removed(run, emails, monkeypatch):
    source, out, start = run
    for number, name in enumerate("abcd"):
        write(emails, source, f"{name}.parquet", 10 * number, 40)
    start()
    for name in "abcd":
        write(emails, source, f"{name}.parquet", 5, 2)
    clean, cleaned = replaced._clean, []

    def dies(location, unit, *rest):
        if cleaned:
            raise Killed
        cleaned.append(unit)
        return clean(location, unit, *rest)

    monkeypatch.setattr(replaced, "_clean", dies)
    monkeypatch.setattr(replaced, "FOOTER_THREADS", 1)
    with pytest.raises(Killed):
        start()
    monkeypatch.undo()
    assert start().rows_out == 8
    assert {name: len(rows) for name, rows in rows_of(out).items()} == {f"{name}.parquet": 2 for name in "abcd"}
    assert len(list_files(str(out))) < 8, "files without rows are removed"


def test_refused_changes_name_the_remedy(spam_folder, tmp_path, emails):
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for number, name in enumerate("ab"):
        write(emails, source, f"{name}.parquet", 10 * number, 3)
    score(score_job(spam_folder, source, out))
    (source / "b.parquet").unlink()
    with pytest.raises(OutputError, match=r"1 input files are gone .*--append to score new files and to keep the rows"):
        score(score_job(spam_folder, source, out))
    assert score(score_job(spam_folder, source, out, append=True)).files_gone == 1
    write(emails, source, "a.parquet", 30, 3)
    with pytest.raises(OutputError, match=r"1 input files are gone .*, 1 input files are changed .*--replace-changed"):
        score(score_job(spam_folder, source, out))
    with pytest.raises(SettingsError, match="overwrite and replace_changed exclude each other"):
        score_job(spam_folder, source, out, overwrite=True, replace_changed=True)
    both = score(score_job(spam_folder, source, out, replace_changed=True))
    assert (both.rows_out, both.files_gone) == (6, 1)


def test_a_filter_and_a_prefix(spam_folder, tmp_path, emails):
    """The counts of what is left are those of a run without the old rows."""
    source = tmp_path / "in"
    source.mkdir()
    options = {"filter": "label == 'ham'", "prefix": "m_", "keep": ["id"], "unit_bytes": 100_000}
    pq.write_table(emails.slice(0, 12), source / "a.parquet")
    pq.write_table(pa.concat_tables([emails.slice(12, 5)]), source / "b.parquet")
    score(score_job(spam_folder, source, tmp_path / "out", **options))
    pq.write_table(emails.slice(20, 9), source / "b.parquet")
    os.utime(source / "b.parquet", (9, 9))
    found = score(score_job(spam_folder, source, tmp_path / "out", replace_changed=True, **options))
    expected = score(score_job(spam_folder, source, tmp_path / "anew", **options))
    for name in ("rows_in", "rows_out", "rows_filtered", "positive_rates", "tokens", "windows", "histograms"):
        assert getattr(found, name) == getattr(expected, name)


def test_files_that_are_gone_before_they_are_scored(run, emails, monkeypatch):
    source, out, start = run
    for number, name in enumerate("ab"):
        write(emails, source, f"{name}.parquet", 10 * number, 40)
    commit, commits = unit_module.commit_unit, []

    def dies(*args, **options):
        if commits:
            raise Killed
        commits.append(commit(*args, **options))
        return commits[-1]

    monkeypatch.setattr(unit_module, "commit_unit", dies)
    with pytest.raises(Killed):
        start()
    monkeypatch.undo()
    (source / "b.parquet").rename(out.parent / "b.parquet")
    write(emails, source, "c.parquet", 60, 2)
    before = (out / "_manifest.json").read_bytes()
    with pytest.raises(OutputError, match=r"cannot be finished: .*b\.parquet is gone, and not all .* put it back"):
        start()
    assert (out / "_manifest.json").read_bytes() == before
    (out.parent / "b.parquet").rename(source / "b.parquet")
    assert start().rows_out == 82


def test_a_changed_file_that_cannot_be_read_keeps_its_rows(run, emails):
    source, out, start = run
    for number, name in enumerate("ab"):
        write(emails, source, f"{name}.parquet", 10 * number, 3)
    start()
    before = rows_of(out)
    (source / "a.parquet").write_bytes(b"PAR1 damaged")
    summary = start()
    assert list(summary.files_in_error) == [str(source / "a.parquet")]
    assert rows_of(out) == before
    write(emails, source, "a.parquet", 70, 2)
    assert start().files_in_error == {}
    assert {name: len(rows) for name, rows in rows_of(out).items()} == {"a.parquet": 2, "b.parquet": 3}


def test_files_are_not_added_beside_a_running_job(run, emails):
    source, out, start = run
    write(emails, source, "a.parquet", 0, 3)
    write(emails, source, "b.parquet", 10, 3)
    start()
    write(emails, source, "c.parquet", 20, 3)
    before = (out / "_manifest.json").read_bytes()
    with heartbeat(str(out)), pytest.raises(OutputError, match=r"change the run of a job that runs now \(process \d+"):
        start()
    assert (out / "_manifest.json").read_bytes() == before
    assert start().rows_out == 9


def test_a_job_whose_run_is_extended_while_it_works(run, spam_folder, emails, monkeypatch):
    """The marks are missed on purpose: the job that knew fewer files must not say that all are done."""
    source, out, start = run
    write(emails, source, "a.parquet", 0, 3)
    job = score_job(spam_folder, source, out)
    monkeypatch.setattr(run_folder, "others_of", lambda *_: [])

    def extended(checked, units):
        yield from score_module.score_units_here(checked, units)
        write(emails, source, "b.parquet", 10, 3)
        start()

    with pytest.raises(JobError, match=r"another job has added files to the run .* start this job again"):
        score_module.run_job(score_module.check_job(job), extended)
    assert start().rows_out == 6


def test_a_job_that_was_frozen_does_not_undo_what_another_one_added(run, spam_folder, emails, monkeypatch):
    """It has read the manifest, sleeps (a laptop, a virtual machine), and writes when the other one has finished."""
    source, out, start = run
    for number, name in enumerate("ab"):
        write(emails, source, f"{name}.parquet", 10 * number, 3)
    start()
    write(emails, source, "c.parquet", 20, 3)
    job = score_job(spam_folder, source, out, unit_bytes=20_000, append=True)
    commit, others = run_folder.commit_new_json, []

    def late(location, name, content):
        monkeypatch.setattr(run_folder, "commit_new_json", commit)
        write(emails, source, "d.parquet", 30, 2)
        others.append(start())
        commit(location, name, content)

    monkeypatch.setattr(run_folder, "commit_new_json", late)
    monkeypatch.setattr(run_folder, "others_of", lambda *_: [])
    summary = score(job)
    assert others[0].rows_out == summary.rows_out == 11
    assert {name[0]: len(rows) for name, rows in rows_of(out).items()} == {"a": 3, "b": 3, "c": 3, "d": 2}


def test_changes_stand_in_files_of_their_own(run, emails):
    """A job that was frozen cannot write its manifest over that of a later run."""
    source, out, start = run
    write(emails, source, "a.parquet", 0, 3)
    start()
    first = (out / "_manifest.json").read_bytes()
    for number, name in enumerate("bc"):
        write(emails, source, f"{name}.parquet", 10 + 10 * number, 3)
        start()
    assert (out / "_manifest.json").read_bytes() == first
    assert len(list(out.glob("_manifest-*"))) == 2
    assert start().rows_out == 9


def test_late_workers_of_a_retry_change_nothing(run, emails):
    """A worker that was thought dead, of this or of an earlier `--retry-errors`, finds that its unit is done."""
    source, out, start = run
    write(emails, source, "a.parquet", 0, 3)
    start()
    (part,) = out.glob("part-*")
    table = pq.read_table(part)
    (counts,) = run_folder.read_counts(str(out), [part.name])

    def writer_of_the_file(name, change):
        marked = table.replace_schema_metadata({**table.schema.metadata, b"by": name})
        run_folder.commit_unit(str(out), part.name, marked, counts, change=change)
        return pq.read_schema(part).metadata[b"by"]

    assert writer_of_the_file(b"second", 2) == b"second"
    assert writer_of_the_file(b"late", 2) == writer_of_the_file(b"later", 1) == b"second"
    assert writer_of_the_file(b"third", 3) == b"third"


@pytest.mark.parametrize("meanwhile", ["replace", "append", "table"])
def test_a_retry_that_slept_replaces_nothing_that_was_changed_since(run, emails, monkeypatch, tmp_path, meanwhile):
    """Its unit has rows of two files. While it sleeps before its commit, another job is done with the folder."""
    source, out, start = run
    for number, name in enumerate("ab"):
        write(emails, source, f"{name}.parquet", 10 * number, 3)
    monkeypatch.setattr(Scorer, "score_documents", lambda *_: 1 / 0)
    assert start().rows_in_error == 6
    monkeypatch.undo()
    monkeypatch.setattr(run_folder, "others_of", lambda *_: [])
    commit, states = unit_module.commit_unit, []

    def late(location, name, *rest, **how):
        if not states:
            states.append(None)
            if meanwhile == "table":
                add_table(location, "delta:/somewhere")
            else:
                write(emails, source, "b.parquet" if meanwhile == "replace" else "c.parquet", 30, 2)
                start(**({} if meanwhile == "replace" else {"append": True}))
            states[0] = content_of(out)
        return commit(location, name, *rest, **how)

    monkeypatch.setattr(unit_module, "commit_unit", late)
    with pytest.raises(JobError, match=r"while this one was\s+working"):
        start(retry_errors=True)
    assert content_of(out) == states[0]
    if meanwhile == "replace":
        assert {name: len(rows) for name, rows in rows_of(out).items()} == {"a.parquet": 3, "b.parquet": 2}


def content_of(folder):
    return {path.name: path.read_bytes() for path in folder.glob("part-*")}


def test_rows_that_were_read_before_their_file_changed_do_not_come_back(run, spam_folder, emails, monkeypatch):
    """A job sleeps between reading and writing, while another one replaces what it has read."""
    source, out, _ = run
    for number, name in enumerate("ab"):
        write(emails, source, f"{name}.parquet", 10 * number, 3)
    settings = {"unit_bytes": 10}
    monkeypatch.setattr(run_folder, "others_of", lambda *_: [])

    def late(checked, units):
        units = list(units)
        tables = list(checked.stage(units))
        write(emails, source, "a.parquet", 30, 2)
        assert score(score_job(spam_folder, source, out, replace_changed=True, **settings)).rows_out == 5
        setup = checked.replica_setup()
        scorer = unit_module.UnitScorer(setup, unit_module.load_scorer(setup))
        for unit, table in zip(units, tables, strict=True):
            yield scorer.score_unit(TokenizedUnit(unit.number, unit.output_name, table))

    expected = {"a.parquet": 2, "b.parquet": 3}
    with pytest.raises(JobError, match="another job has added files"):
        score_module.run_job(score_module.check_job(score_job(spam_folder, source, out, **settings)), late)
    assert {name: len(rows) for name, rows in rows_of(out).items()} == expected


def test_late_files_are_removed_when_nothing_is_left_to_do(run, emails):
    source, out, start = run
    write(emails, source, "a.parquet", 0, 3)
    start()
    (part,) = out.glob("part-*")
    (out / "part-000007-0123456789ab.parquet").write_bytes(part.read_bytes())
    (out / "part-mine.parquet").write_bytes(b"not of this package")
    assert start().rows_out == 3
    assert sorted(path.name for path in out.glob("part-*")) == sorted([part.name, "part-mine.parquet"])


def test_late_workers_of_a_replaced_run_change_nothing(run, spam_folder, emails):
    """A part of the cluster was cut off, the job was started again with --overwrite, and the old workers come back."""
    source, out, start = run
    write(emails, source, "a.parquet", 0, 3)
    start()
    (part,) = out.glob("part-*")
    content, table = part.read_bytes(), pq.read_table(part)
    (counts,) = run_folder.read_counts(str(out), [part.name])
    score(score_job(spam_folder, source, out, unit_bytes=20_000, overwrite=True))
    (new,) = out.glob("part-*")
    assert new != part
    for how in ({}, {"change": 9}):
        with pytest.raises(JobError, match="another job has replaced the run"):
            run_folder.commit_unit(str(out), part.name, table, counts, **how)
    part.write_bytes(content)  # it had looked at the run before it was replaced
    assert start().rows_out == 3
    assert list(out.glob("part-*")) == [new]


def test_a_run_of_an_earlier_version_keeps_the_names_of_its_files(run, emails):
    source, out, start = run
    for number, name in enumerate("ab"):
        write(emails, source, f"{name}.parquet", 10 * number, 9)
    start(limit=3)
    content = json.loads((out / "_manifest.json").read_text())
    del content["names_of_run"]
    (out / "_manifest.json").write_text(json.dumps(content))
    (part,) = out.glob("part-*")
    (old,) = shards.split_into_units(list(known_files(str(out)).values()), unit_bytes=20_000, limit=3)
    part.rename(out / old.output_name)
    (out / "_summary.json").unlink()
    assert start(limit=3).units_before == 1
    assert [path.name for path in out.glob("part-*")] == [old.output_name]


def test_a_job_that_slept_leaves_no_summary_of_an_earlier_state(run, emails, monkeypatch):
    source, out, start = run
    write(emails, source, "a.parquet", 0, 3)
    commit = finished.commit_json

    def late(location, name, content):
        monkeypatch.setattr(finished, "commit_json", commit)
        write(emails, source, "b.parquet", 10, 3)
        start()
        commit(location, name, content)

    monkeypatch.setattr(finished, "commit_json", late)
    monkeypatch.setattr(run_folder, "others_of", lambda *_: [])
    with pytest.raises(JobError, match=r"another job has added files to the run .* start this job again"):
        start()
    assert not (out / "_summary.json").exists()
    summary = start()
    assert (summary.rows_out, summary.units_before) == (6, summary.units)


def test_a_summary_of_another_state_does_not_count(run, emails, monkeypatch):
    """The process was killed after it had replaced the summary of a job that had scored the errors again."""
    source, out, start = run
    write(emails, source, "a.parquet", 0, 3)
    monkeypatch.setattr(Scorer, "score_documents", lambda *_: 1 / 0)
    assert start().rows_in_error == 3
    before = (out / "_summary.json").read_bytes()
    monkeypatch.undo()
    assert start(retry_errors=True).rows_in_error == 0
    (out / "_summary.json").write_bytes(before)
    assert start().rows_in_error == 0
