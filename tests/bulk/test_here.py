"""Small jobs are scored in this process, without Ray, unless the caller says otherwise."""

import json
import re
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.bulk import here
from pipelines.bulk.here import runs_here, seconds_here
from pipelines.bulk.job import check_job
from pipelines.bulk.score import score_here
from tests.jobs import clean_environment, score_job


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def is_here(folder, source, output, *, address=None, **settings):
    return runs_here(check_job(score_job(folder, source, output, **settings)), address=address)


def test_small_jobs_run_here_and_others_do_not(spam_folder, source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert is_here(spam_folder, source, out, replicas=None)
    assert not is_here(spam_folder, source, out, replicas=1)
    assert not is_here(spam_folder, source, out, replicas=None, replica_labels={"zone": "a"})
    assert not is_here(spam_folder, source, out, replicas=None, address="auto")
    monkeypatch.setattr(here, "SPEED", 1e3)
    assert not is_here(spam_folder, source, out, replicas=None)


def test_cluster_is_used_if_the_environment_names_one(spam_folder, source, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert not is_here(spam_folder, source, tmp_path / "out", replicas=None)


def test_run_that_was_begun_is_resumed_on_ray(spam_folder, source, tmp_path):
    """A row that killed the process before would kill it again."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "_manifest.json").write_text("{}")
    assert not is_here(spam_folder, source, tmp_path / "out", replicas=None)


def test_estimate_grows_with_input_and_model(spam_folder, source, tmp_path):
    checked = check_job(score_job(spam_folder, source, tmp_path / "out"))
    assert 0 < seconds_here(checked) < 1


def test_long_job_says_how_much_there_is(spam_folder, source, tmp_path, monkeypatch, log_lines):
    monkeypatch.setattr(here, "SPEED", 1e3)
    summary = score_here(score_job(spam_folder, source, tmp_path / "out", unit_bytes=1000))
    (line,) = [line for line in log_lines if "by a sample of" in line]
    windows, rows, sample = re.search(
        r"about ([\d,]+) windows .* in ([\d,]+) rows, by a sample of (\d+);", line
    ).groups()
    assert int(rows) == summary.rows_in > int(sample)
    assert int(windows.replace(",", "")) == pytest.approx(summary.windows, rel=0.5)


def test_command_says_so_and_starts_no_ray(spam_folder, source, tmp_path):
    command = [sys.executable, "-X", "importtime", "-m", "pipelines", "score", str(spam_folder.path), "--input",
               str(source), "--output", str(tmp_path / "out"), "--json"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=clean_environment(), timeout=120, check=False)
    assert done.returncode == 3, done.stderr[-2000:]
    assert json.loads(done.stdout)["rows_out"] == 60
    assert "scoring in this process" in done.stderr
    assert not any(line.rsplit("|")[-1].strip() == "ray" for line in done.stderr.splitlines())


def test_sample_that_says_little_is_no_estimate(spam_folder, tmp_path, monkeypatch, log_lines):
    """Rows that cannot be scored cost nothing, and their reasons are named."""
    monkeypatch.setattr(here, "SPEED", 1e3)
    texts = [None] * 30 + ["some words"] * 30
    pq.write_table(pa.table({"text": texts, "n": list(range(60))}), tmp_path / "in.parquet", row_group_size=30)

    def said(**settings):
        log_lines.clear()
        score_here(score_job(spam_folder, tmp_path / "in.parquet", tmp_path / f"out{len(settings)}", **settings))
        return [line for line in log_lines if " sample " in line or " a sample" in line]

    lines = said()
    assert lines[0] == "30 of 60 sample rows cannot be scored, such as: the text is null"
    assert lines[1].startswith("about 30 windows and 180 tokens in 60 rows, by a sample of 60")
    assert said(filter="n < 0") == ["no row of the sample passes the filter: how much there is to score is not known"]
    pq.write_table(pa.table({"text": ["some words"] * 30}), tmp_path / "in.parquet")
    broken = bytearray((tmp_path / "in.parquet").read_bytes())
    broken[4:40] = bytes(36)
    (tmp_path / "in.parquet").write_bytes(broken)
    (line,) = said(keep=[], prefix="m_")
    assert line.startswith("30 of 30 sample rows cannot be scored, such as: row group 0 of "), "and no number follows"
