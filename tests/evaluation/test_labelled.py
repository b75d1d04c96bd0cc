"""Evaluation and tuning of a model folder: the report page and the result objects."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipelines.cli import main
from pipelines.errors import DataError, ModelFolderError, SettingsError
from pipelines.evaluation.labelled import evaluate_folder, tune_folder
from pipelines.settings import ComputeSettings, DataSettings
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
        tune_folder("s3://models/spam", str(source), DataSettings(), COMPUTE)
    with pytest.raises(SettingsError, match="is of kind multiclass, which has no thresholds"):
        tune_folder(str(folders["multiclass"].path), str(source), DataSettings(), COMPUTE)
