"""Evaluation and tuning of a model folder: the report page and the result objects."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipelines.cli import main
from pipelines.errors import DataError, ModelFolderError, SettingsError
from pipelines.evaluation.labelled import evaluate_folder
from pipelines.evaluation.tuning import TuneOptions, tune_folder
from pipelines.model_folder import read_model_folder
from pipelines.settings import NEVER, UNCALIBRATED, ComputeSettings, DataSettings
from tests.jobs import FLOAT32

COMPUTE = ComputeSettings(**FLOAT32)


def run(capsys, *arguments, code=0):
    assert main(list(map(str, arguments))) == code
    return json.loads(capsys.readouterr().out)


def test_report_path_and_optional_texts(folders, source, tmp_path, capsys):
    command = ["evaluate", folders["binary"].path, "--data", source, "--json", "--set", "dtype=float32", "--report"]
    found = run(capsys, *command, tmp_path / "new" / "out.html", code=3)
    page = (tmp_path / "new" / "out.html").read_text()
    assert f"<td>{found['mcc']:.4g}</td>" in page
    lengths = [len(text or "") for text in pq.read_table(source)["text"].to_pylist()]
    assert f"a.parquet, row {int(np.argmax(lengths))}<" in page
    assert "a.parquet, row 7<" not in page, "row 7 has no text"
    assert "sha256:" in page
    assert "Subject: " not in page
    run(capsys, *command, tmp_path / "texts.html", "--report-texts", code=3)
    assert "Subject: " in (tmp_path / "texts.html").read_text()


def test_files_and_table_give_same_metrics(folders, source):
    folder = str(folders["binary"].path)
    files = evaluate_folder(folder, str(source), DataSettings(), COMPUTE)
    table = evaluate_folder(folder, pq.read_table(source), DataSettings(), COMPUTE)
    assert files.metrics == table.metrics
    assert (files.rows, files.rows_in_error) == (table.rows, table.rows_in_error) == (60, 1)
    assert "60 rows, 1 in error" in repr(files)
    assert files.to_json()["mcc"] == files.metrics["mcc"]
    limited = evaluate_folder(folder, pq.read_table(source), DataSettings(limit=10), COMPUTE)
    assert limited.rows == 10
    with pytest.raises(DataError, match="the table in memory has no column 'nope'"):
        evaluate_folder(folder, pq.read_table(source), DataSettings(label_column="nope"), COMPUTE)


def test_tune_refuses_url_and_multiclass(folders, source):
    with pytest.raises(ModelFolderError, match="is a URL; tune a local folder"):
        tune_folder("s3://models/spam", str(source), DataSettings(), COMPUTE, TuneOptions())
    with pytest.raises(SettingsError, match="is of kind multiclass, which has no thresholds"):
        tune_folder(str(folders["multiclass"].path), str(source), DataSettings(), COMPUTE, TuneOptions())


def test_tune_calibrates(folders, source, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(folders["binary"].path, folder)
    command = ["tune", folder, "--data", source, "--set", "dtype=float32", "--json"]
    found = run(capsys, *command, "--calibrate", "per_label", code=3)
    assert 0 <= found["calibration_error"] != found["calibration_error_before"]
    assert read_model_folder(folder).calibration.scales
    kept = run(capsys, *command, code=3)
    assert kept["thresholds"] == found["thresholds"]
    assert "calibration_error" not in kept
    assert run(capsys, "evaluate", *command[1:], code=3)["f1_score"] == kept["f1_score"]
    reset = run(capsys, *command, "--calibrate", "none", code=3)
    assert reset["calibration_error"] == pytest.approx(found["calibration_error_before"])
    assert read_model_folder(folder).calibration == UNCALIBRATED


def test_promises_are_written_shown_and_forgotten(source, folders, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(folders["binary"].path, folder)
    command = ["tune", folder, "--data", source, "--set", "dtype=float32"]
    options = ["--objective", "recall=0.8", "--confidence", "0.9", "--joint"]
    found = run(capsys, *command, *options, "--json", code=3)
    kept = read_model_folder(folder).guarantees
    assert found["guarantees"] == kept
    assert (kept["objective"], kept["confidence"], kept["joint"], kept["rows"]) == ("recall=0.8", 0.9, True, 59)
    assert {label: one["threshold"] for label, one in kept["labels"].items()} == dict(
        zip(["spam"], found["thresholds"], strict=True)
    )
    main(list(map(str, [*command, *options])))
    assert "recall=0.8: with confidence 0.9 for all labels together" in capsys.readouterr().out
    main(
        ["evaluate", str(folder), "--data", str(source), "--set", "dtype=float32", "--report", str(tmp_path / "r.html")]
    )
    assert "with confidence 0.9 for all labels together" in (tmp_path / "r.html").read_text()
    capsys.readouterr()
    strict = ["--objective", "precision=0.999", "--confidence", "0.99"]
    assert set(run(capsys, *command, *strict, "--json", code=3)["thresholds"]) == {NEVER}
    main(
        ["evaluate", str(folder), "--data", str(source), "--set", "dtype=float32", "--report", str(tmp_path / "r.html")]
    )
    capsys.readouterr()
    assert "guarantees" not in run(capsys, *command, "--json", code=3)
    assert read_model_folder(folder).guarantees == {}
    assert main([*map(str, command), "--confidence", "0.9"]) == 2
    assert "confidence is for objective precision=P or recall=R" in capsys.readouterr().err
