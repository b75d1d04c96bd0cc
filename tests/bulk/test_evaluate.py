"""Metrics of a scored folder are those of the model on the same rows."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import pipelines
from pipelines.bulk.evaluate import evaluate_scored
from pipelines.bulk.score import score_here
from pipelines.cli import main
from pipelines.errors import DataError
from pipelines.settings import DataSettings
from tests import tiny
from tests.jobs import FLOAT32, score_job


@pytest.fixture(scope="module")
def labelled_of_kinds(emails, tmp_path_factory):
    """30 emails with labels of each kind. One has no text."""
    folder = tmp_path_factory.mktemp("labelled")
    texts = [text[:500] for text in emails["text"].to_pylist()[:30]]
    texts[7] = None
    labels = {
        "binary": emails["label"].to_pylist()[:30],
        "multiclass": ["abc"[row % 3] for row in range(30)],
        "multilabel": [list("abc"[: row % 4]) for row in range(30)],
        "regression": [row / 7 for row in range(30)],
    }
    labels["vote"] = labels["binary"]
    for kind, values in labels.items():
        pq.write_table(pa.table({"text": texts, "label": values}), folder / f"{kind}.parquet", row_group_size=10)
    return {kind: folder / f"{kind}.parquet" for kind in labels}


@pytest.mark.parametrize("kind", list(tiny.DECISIONS))
def test_scored_folder_has_the_metrics_of_its_model(folders, labelled_of_kinds, tmp_path, kind):
    source = labelled_of_kinds[kind]
    score_here(score_job(folders[kind], source, tmp_path / "scored", unit_bytes=2000))
    found = pipelines.evaluate_scored(tmp_path / "scored", report=tmp_path / "page.html")
    expected = pipelines.evaluate(folders[kind].path, source, **FLOAT32)
    assert found.metrics.keys() == expected.metrics.keys()
    for name in expected.metrics:
        if name != "per_label":
            assert found.metrics[name] == pytest.approx(expected.metrics[name], rel=1e-5), name
    for label, numbers in expected.metrics.get("per_label", {}).items():
        assert found.metrics["per_label"][label] == pytest.approx(numbers, rel=1e-5)
    assert (found.rows, found.rows_in_error) == (expected.rows, expected.rows_in_error) == (30, 1)
    assert [row["label"] for row in found.labels] == [row["label"] for row in expected.labels]
    assert found.in_words == expected.in_words
    assert "Documents" in (tmp_path / "page.html").read_text()


def test_command_and_its_errors(folders, labelled_of_kinds, tmp_path, capsys):
    score_here(score_job(folders["binary"], labelled_of_kinds["binary"], tmp_path / "scored"))
    assert main(["evaluate", "--scored", str(tmp_path / "scored")]) == 3
    out = capsys.readouterr().out
    assert "precision" in out
    assert "mcc: " in out
    with pytest.raises(DataError, match=r"no label column 'truth'; its columns are label, .*score again with --keep"):
        evaluate_scored(str(tmp_path / "scored"), DataSettings(label_column="truth"))
    assert main(["evaluate", "--scored", str(tmp_path / "scored"), "--data", "x"]) == 2
    assert "leave out --data" in capsys.readouterr().err
    assert main(["evaluate"]) == 2
    assert "DIR and --data missing: give a model folder and --data FILES, or --scored" in capsys.readouterr().err
    path = str(folders["binary"].path)
    for command in (["evaluate", "--scored", path], ["relabel", path, "--thresholds", "0.5", "--output", "new"]):
        assert main(command) == 2
        assert "was not written by `pipelines score`" in capsys.readouterr().err
    (tmp_path / "scored" / "_summary.json").unlink()
    with pytest.raises(DataError, match="unfinished run"):
        evaluate_scored(str(tmp_path / "scored"), DataSettings())
