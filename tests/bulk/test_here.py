"""Small jobs are scored in this process, without Ray, unless the caller says otherwise."""

import json
import re
import subprocess
import sys

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
