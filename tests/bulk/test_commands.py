"""Dry runs, relabelling and drift, from the command line."""

import json
import shutil
from dataclasses import replace

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest

from pipelines import cli
from pipelines.bulk.drift import compare
from pipelines.model_folder import read_model_folder, write_pipeline_file
from pipelines.storage.listing import list_files
from tests.jobs import read_scored


def run(capsys, *arguments, code=0):
    assert cli.main(list(map(str, arguments))) == code
    captured = capsys.readouterr()
    return json.loads(captured.out) if code in (0, 3) else captured.err


def score(capsys, folder, source, output, *more, code=3):
    return run(capsys, "score", folder.path, "--input", source, "--output", output, "--replicas", 0, "--json",
               "--set", "dtype=float32", "--set", "unit_bytes=9000", *more, code=code)  # fmt: skip


@pytest.mark.parametrize("kind", ["binary", "multilabel"])
def test_relabel_matches_scoring_with_thresholds(folders, source, tmp_path, capsys, kind):
    score(capsys, folders[kind], source, tmp_path / "scored", "--prefix", "m_")
    scores = np.array([row for row in read_scored(tmp_path / "scored")["m_scores"].to_pylist() if row is not None])
    median = round(float(np.median(scores[:, -1])), 4)
    thresholds = f"{{spam: {median}}}" if kind == "binary" else f"[0.3, 0.6, {median}]"
    expected = score(
        capsys, folders[kind], source, tmp_path / "again", "--prefix", "m_", "--set", f"thresholds={thresholds}"
    )
    summary = run(capsys, "relabel", tmp_path / "scored", "--thresholds", thresholds, "--output", tmp_path / "new",
                  "--json", code=3)  # fmt: skip
    assert read_scored(tmp_path / "new").equals(read_scored(tmp_path / "again"))
    assert not read_scored(tmp_path / "new").equals(read_scored(tmp_path / "scored"))
    content = json.loads((tmp_path / "new" / "_summary.json").read_text())
    for name in ("rows_out", "rows_in_error", "positive_rates", "histograms", "tokens"):
        assert content[name] == expected[name], name
    assert not content["seconds"], "its own summary, not that of the scoring"
    assert (summary["rows"], summary["rows_in_error"]) == (expected["rows_out"], expected["rows_in_error"])
    scored = summary["rows"] - summary["rows_in_error"]
    assert {k: v / scored for k, v in summary["rows_now"].items()} == pytest.approx(expected["positive_rates"])
    assert summary["rows_before"] != summary["rows_now"]
    first = list_files(str(tmp_path / "new"))[0]
    limits = json.loads(pq.read_schema(first).metadata[b"pipelines.thresholds"])
    assert list(limits.values()) == ([median] if kind == "binary" else [0.3, 0.6, median])
    again = ("relabel", tmp_path / "scored", "--thresholds", "0.1", "--output", tmp_path / "new", "--json")
    assert "contains another run; give a new folder" in run(capsys, *again, code=2)


def test_other_thresholds_end_a_promise(folders, source, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(folders["binary"].path, folder)
    promised = {"objective": "recall=0.9", "confidence": 0.95, "joint": False, "rows": 50, "labels": {}}
    found = replace(read_model_folder(folder), guarantees=promised)
    write_pipeline_file(replace(found, path=folder, decision=replace(found.decision, thresholds=(0.4,))))

    def promise_in(name):
        metadata = pq.read_schema(list_files(str(tmp_path / name))[0]).metadata
        return json.loads(metadata.get(b"pipelines.guarantees", b"null"))

    def warned(*arguments):
        assert cli.main([str(argument) for argument in arguments]) == 3
        return "nothing is promised" in capsys.readouterr().err

    common = ("--input", source, "--replicas", 0, "--set", "dtype=float32")
    assert not warned("score", folder, *common, "--output", tmp_path / "scored")
    assert promise_in("scored") == promised
    assert warned("score", folder, *common, "--output", tmp_path / "other", "--set", "thresholds=0.6")
    assert promise_in("other") is None
    assert warned("relabel", tmp_path / "scored", "--thresholds", "0.7", "--output", tmp_path / "new")
    assert promise_in("new") is None
    assert not warned("relabel", tmp_path / "scored", "--thresholds", "[0.4]", "--output", tmp_path / "same")
    assert promise_in("same") == promised
    write_pipeline_file(replace(found, path=folder, decision=replace(found.decision, thresholds=(0.55,))))
    assert not warned("relabel", tmp_path / "scored", "--model", folder, "--output", tmp_path / "tuned")
    assert promise_in("tuned") == promised, "that of the thresholds of now"
    assert not warned("score", folder, *common, "--output", tmp_path / "directly")
    assert read_scored(tmp_path / "tuned").equals(read_scored(tmp_path / "directly"))
    metadata = [pq.read_schema(list_files(str(tmp_path / name))[0]).metadata for name in ("tuned", "directly")]
    for name in (b"pipelines.settings_hash", b"pipelines.thresholds", b"pipelines.decision"):
        assert metadata[0][name] == metadata[1][name]
    run(capsys, "relabel", tmp_path / "scored", "--thresholds", "0.7", "--output", tmp_path / "once", "--json", code=3)
    run(capsys, "relabel", tmp_path / "once", "--model", folder, "--output", tmp_path / "twice", "--json", code=3)
    assert read_scored(tmp_path / "twice").equals(read_scored(tmp_path / "directly"))
    write_pipeline_file(replace(found, path=folder, guarantees={**promised, "confidence": 0.8}))
    error = run(capsys, "relabel", tmp_path / "once", "--model", folder, "--output", tmp_path / "twice", code=2)
    assert "contains another run" in error, "the same thresholds with another promise"
    calibrated = replace(found, path=folder, calibration=replace(found.calibration, temperature=2.0))
    write_pipeline_file(calibrated)
    error = run(capsys, "relabel", tmp_path / "scored", "--model", folder, "--output", tmp_path / "no", code=2)
    assert "scored with other calibration, windows or labels than" in error


def test_relabel_in_an_object_store(folders, source, tmp_path, capsys):
    score(capsys, folders["binary"], source, tmp_path / "scored")
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "scored"), "/store/scored/", recursive=True)
    for scored, new in (("memory://store/scored", "memory://store/new"), (tmp_path / "scored", tmp_path / "new")):
        run(capsys, "relabel", scored, "--thresholds", "0.1", "--output", new, "--json", code=3)
    memory.get("/store/new/", str(tmp_path / "copy"), recursive=True)
    assert read_scored(tmp_path / "copy").equals(read_scored(tmp_path / "new"))


def test_relabel_and_drift_refuse_runs_without_an_end(folders, source, tmp_path, capsys):
    score(capsys, folders["binary"], source, tmp_path / "scored")
    (tmp_path / "scored" / "_summary.json").unlink()
    error = run(capsys, "relabel", tmp_path / "scored", "--thresholds", "0.1", "--output", tmp_path / "x", code=2)
    assert "contains an unfinished run; finish it with the command that began it" in error
    score(capsys, folders["binary"], source, tmp_path / "none", "--filter", "label == 'neither'", code=0)
    assert "has no scored rows to compare" in run(capsys, "drift", tmp_path / "none", tmp_path / "none", code=2)


def test_relabel_refuses_invalid_input(folders, source, tmp_path, capsys):
    error = run(capsys, "relabel", source, "--thresholds", "0.1", "--output", tmp_path / "x", code=2)
    assert "was not written by `pipelines score`" in error
    score(capsys, folders["multiclass"], source, tmp_path / "scored")
    error = run(capsys, "relabel", tmp_path / "scored", "--thresholds", "0.1", "--output", tmp_path / "x", code=2)
    assert "thresholds are for kinds binary and multilabel" in error
    score(capsys, folders["binary"], source, tmp_path / "binary")
    error = run(capsys, "relabel", tmp_path / "binary", "--thresholds", "{egg: 1}", "--output", tmp_path / "x", code=2)
    assert "thresholds names 'egg'; allowed labels: spam" in error


def test_dry_run_estimates_match_run(folders, source, tmp_path, capsys):
    found = score(capsys, folders["binary"], source, tmp_path / "out", "--dry-run", "--rate", "1000", code=0)
    assert not (tmp_path / "out").exists()
    summary = score(capsys, folders["binary"], source, tmp_path / "out")
    assert (found["files"], found["rows"], found["units"]) == (1, 60, summary["units"])
    assert found["tokens"] == pytest.approx(summary["tokens"], rel=0.5)
    assert found["windows"] == pytest.approx(summary["windows"], rel=0.5)
    assert found["replica_hours"] == pytest.approx(found["tokens_in_windows"] / 1000 / 3600, rel=0.01, abs=1e-4)
    measured = score(capsys, folders["binary"], source, tmp_path / "none", "--dry-run", code=0)
    assert measured["rate_is"] == "measured here"
    hours = measured["tokens_in_windows"] / measured["tokens_per_second_per_replica"] / 3600
    assert measured["replica_hours"] == pytest.approx(hours, rel=0.01, abs=1e-4)


def test_drift_of_equal_and_shifted_scores(folders, source, tmp_path, capsys):
    one = score(capsys, folders["binary"], source, tmp_path / "one")
    score(capsys, folders["binary"], source, tmp_path / "two", "--filter", "label == 'spam'", code=0)
    same = run(capsys, "drift", tmp_path / "one", tmp_path / "one", "--json")
    assert (same["spam"]["psi"], same["spam"]["ks"], same["spam"]["reading"]) == (0.0, 0.0, "stable")
    plot = tmp_path / "drift.png"
    moved = run(capsys, "drift", tmp_path / "one", tmp_path / "two", "--json", "--plot", plot)
    assert moved["spam"]["rows_before"] == 59 > moved["spam"]["rows_after"]
    assert moved["spam"]["psi"] > 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    error = run(capsys, "drift", folders["binary"].path, tmp_path / "one", code=2)
    assert "has no score histograms" in error
    shutil.copytree(folders["binary"].path, tmp_path / "model")
    write_pipeline_file(replace(folders["binary"], path=tmp_path / "model", histograms=one["histograms"]))
    assert run(capsys, "drift", tmp_path / "model", tmp_path / "one", "--json") == same


def test_psi_and_ks_against_hand_counts():
    found = compare([50, 50], [80, 20])
    left, right = np.array([50.5, 50.5]) / 101, np.array([80.5, 20.5]) / 101
    assert found.psi == pytest.approx(((right - left) * np.log(right / left)).sum())
    assert found.ks == pytest.approx(0.3)
    assert found.reading == "moved far"
