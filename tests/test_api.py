"""The public functions of `import pipelines`."""

import pydoc
import re
import shutil
from dataclasses import replace

import datasets
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import pipelines
from pipelines.errors import DataError, SettingsError
from pipelines.model_folder import read_model_folder, write_pipeline_file
from pipelines.serving.job import ServeJob
from pipelines.settings import ComputeSettings
from tests.jobs import FLOAT32
from tests.serving.conftest import ApiClient

RUN = {"kind": "binary", "epochs": 1, "batch_size": 5, "max_length": 32, "train_dtype": "float32", **FLOAT32}


def test_train_evaluate_tune_and_score_from_frames(training_data, tmp_path):
    table = pq.read_table(training_data / "data").drop_null()
    frame, base = table.to_pandas(), training_data / "base"
    trained = pipelines.train(frame[:40], base, tmp_path / "model", valid=frame[40:], **RUN)
    assert trained.documents == 40
    assert "valid: " in repr(trained)
    evaluated = pipelines.evaluate(tmp_path / "model", frame, report=tmp_path / "page.html", **FLOAT32)
    assert evaluated.rows == len(frame)
    assert (tmp_path / "page.html").exists()
    tuned = pipelines.tune(tmp_path / "model", frame, objective="recall=0.9", **FLOAT32)
    assert tuned.labels == ("spam",)
    assert "TuneResult" in repr(tuned)
    scored = pipelines.score(tmp_path / "model", frame, **FLOAT32)
    assert scored.column_names[:2] == ["label", "predicted_label"]
    truth = [score is not None and score >= tuned.thresholds[0] for score in scored["scores"].to_pandas().str[1]]
    assert [label == "spam" for label in scored["predicted_label"].to_pylist()] == truth


def test_scorer_opens_paths_and_shows_what_it_is(spam_folder):
    scorer = pipelines.Scorer.load(spam_folder.path)
    assert repr(scorer).startswith("Scorer(binary: ham, spam; thresholds (0.4,); bert on cpu, torch in ")
    assert repr(scorer).endswith(f"windows of {scorer.plan.max_length} tokens)")


def test_predict_accounts_for_every_text(spam_folder):
    scorer = pipelines.Scorer.load(spam_folder.path)
    assert scorer.predict(pd.Series(["a", None]))["error"].to_pylist() == [None, "the text is null"]
    (fine, broken) = scorer.predict(["a", "b\ud800"])["error"].to_pylist()
    assert fine is None
    assert broken.startswith("the text is not valid UTF-8")
    assert scorer.predict([]).num_rows == 0
    for wrong in (b"hello", [1, "a"], [["a", "b", "c"]], None, 7, {"body": ["a"]}):
        with pytest.raises(DataError, match=r"list of texts|must be strings|every pair|has no column 'text'"):
            scorer.predict(wrong)


@pytest.mark.parametrize(
    "texts",
    [
        ["one", None],
        ("one", float("nan")),
        pd.Series(["one", pd.NA]),
        pd.Series(["one", None], dtype="string"),
        pl.Series(["one", None]),
        np.array(["one", None], dtype=object),
        iter(["one", None]),
        {"text": ["one", pd.NA]},
        [{"text": "one"}, {"text": None}],
        pd.DataFrame({"text": ["one", None], "id": [1, 2]}),
        pl.DataFrame({"id": [1, 2], "text": ["one", None]}),
        pa.table({"text": ["one", None]}),
        datasets.Dataset.from_dict({"text": ["one", None], "id": [1, 2]}),
        datasets.Dataset.from_dict({"text": ["one", None]})["text"],
    ],
    ids=lambda value: type(value).__module__.split(".")[0] + "." + type(value).__name__,
)
def test_predict_takes_every_form_of_texts(spam_folder, texts):
    scorer = pipelines.Scorer.load(spam_folder.path, compute=ComputeSettings(**FLOAT32))
    found = scorer.predict(texts)
    assert found["error"].to_pylist() == [None, "the text is null"]
    assert found["scores"].to_pylist()[0] == scorer.predict("one")["scores"].to_pylist()[0]
    pairs = scorer.predict([("one", "two"), ("one", None)])
    assert pairs["error"].to_pylist() == [None, "the text is null"]
    assert pairs.equals(scorer.predict({"text": ["one", "one"], "text_pair": ["two", None]}))


def test_score_files(spam_folder, input_folder, tmp_path):
    summary = pipelines.score(spam_folder.path, input_folder, tmp_path / "out", replicas=0, **FLOAT32)
    assert (summary.rows_out, summary.rows_in_error) == (60, 2)
    assert "60 rows scored, 2 in error" in repr(summary)
    with pytest.raises(SettingsError, match="names files: give output"):
        pipelines.score(spam_folder.path, input_folder)
    with pytest.raises(SettingsError, match="leave output out"):
        pipelines.score(spam_folder.path, {"text": ["a"]}, tmp_path / "out")


@pytest.mark.parametrize(
    "data",
    [
        {"text": ["one", None], "id": [1, 2]},
        [{"text": "one", "id": 1}, {"text": None, "id": 2}],
        pa.table({"text": ["one", None], "id": [1, 2]}),
        pd.DataFrame({"text": ["one", None], "id": [1, 2]}, index=[7, 8]),
    ],
    ids=["columns", "rows", "arrow", "pandas"],
)
def test_score_table_types(spam_folder, data):
    expected = pipelines.Scorer.load(str(spam_folder.path)).predict(["one", None])
    found = pipelines.score(spam_folder.path, data)
    assert found["id"].to_pylist() == [1, 2]
    assert found["error"].to_pylist() == [None, "the text is null"]
    np.testing.assert_allclose(found["scores"].to_pylist()[0], expected["scores"].to_pylist()[0], atol=1e-6)
    null = ["the text is null"]
    for empty, errors in (({"text": [], "id": []}, []), ({"text": [None]}, null), ({"text": pd.Series([pd.NA])}, null)):
        assert pipelines.score(spam_folder.path, empty)["error"].to_pylist() == errors
    assert pipelines.score(spam_folder.path, data, keep=[], prefix="m_").column_names[0] == "m_predicted_label"


def test_error_messages(spam_folder, tmp_path):
    with pytest.raises(DataError, match="int is not a table"):
        pipelines.score(spam_folder.path, 7)
    twice = pa.table([["a"], ["b"]], names=["text", "text"])
    with pytest.raises(DataError, match="has no row with a text that can be scored"):
        pipelines.evaluate(spam_folder.path, {"text": [None], "label": ["ham"]})
    for call in (pipelines.score, pipelines.evaluate):
        with pytest.raises(DataError, match="several columns named 'text'"):
            call(spam_folder.path, twice)
    with pytest.raises(DataError, match="the table cannot be read"):
        pipelines.score(spam_folder.path, pd.Series(["a"], name="text"))
    with pytest.raises(DataError, match="the table cannot be read"):
        pipelines.score(spam_folder.path, {"text": ["a"], "id": [2**70]})
    with pytest.raises(SettingsError, match="a path is empty"):
        pipelines.score(spam_folder.path, "", tmp_path / "out")
    with pytest.raises(DataError, match="a list must hold rows as mappings"):
        pipelines.score(spam_folder.path, ["a text"])
    with pytest.raises(DataError, match="column 'text' is one text; give a list of texts"):
        pipelines.score(spam_folder.path, {"text": "hello"})
    for name, value in {"filter": "id == 1", "max_errors": 0, "append": True, "replicas": 2, "via_serve": "a"}.items():
        with pytest.raises(SettingsError, match=f"{name}=.* is for files; for a table in memory there are thresholds"):
            pipelines.score(spam_folder.path, {"text": ["a"], "id": [1]}, **{name: value})
    shutil.copytree(spam_folder.path, tmp_path / "pairs")
    write_pipeline_file(replace(spam_folder, path=tmp_path / "pairs", reads_pairs=True))
    with pytest.raises(DataError, match="trained on pairs of texts"):
        pipelines.score(tmp_path / "pairs", {"text": ["a"]})
    with pytest.raises(SettingsError, match="did you mean 'text_column'"):
        pipelines.score(spam_folder.path, {"text": ["a"]}, text_colum="text")
    with pytest.raises(DataError, match="has no column 'text'; it has: body"):
        pipelines.score(spam_folder.path, {"body": ["a"]})


def test_convert_folder(spam_folder, tmp_path):
    old = tmp_path / "old"
    shutil.copytree(spam_folder.path, old)
    (old / "pipeline.json").unlink()
    made = pipelines.convert(old, tmp_path / "new", kind="binary")
    assert made.decision.labels == ("ham", "spam")


@pytest.mark.parametrize("kind", ["binary", "multilabel", "regression"])
def test_predict_gives_the_windows_that_the_server_gives(folders, kind, emails):
    scorer = pipelines.Scorer.load(folders[kind].path, compute=ComputeSettings(**FLOAT32))
    texts = [emails["text"][0].as_py(), None, "", "short \U0001f4b0 text"]
    found = scorer.predict(texts, windows=True)["windows"].to_pylist()
    assert found[1] is None
    client = ApiClient(ServeJob.parse({"model": str(folders[kind].path), **FLOAT32}))
    for row in (0, 2, 3):
        answer = client.post("/v1/predict", json={"inputs": [texts[row]], "windows": True}, headers={}).json()
        expected = answer["predictions"][0]["windows"]
        assert [(one["start"], one["end"]) for one in found[row]] == [(one["start"], one["end"]) for one in expected]
        for ours, theirs in zip(found[row], expected, strict=True):
            assert ours["scores"] == pytest.approx(theirs["scores"], abs=1e-5)
    client.close()
    assert scorer.predict(("one", "two"), windows=True).num_rows == 2
    assert scorer.predict([("one", "two three")], windows=True)["windows"][0].as_py()[0]["end"] == 9


def test_many_texts_show_progress_and_have_the_same_scores(spam_folder, monkeypatch, log_lines):
    scorer = pipelines.Scorer.load(spam_folder.path, compute=ComputeSettings(**FLOAT32))
    texts = [f"text number {number}" for number in range(50)]
    whole = scorer.predict(texts)
    monkeypatch.setattr("pipelines.model.scorer.CHUNK_ROWS", 8)
    monkeypatch.setattr("pipelines.progress.PROGRESS_SECONDS", 0)
    pieces = scorer.predict(texts)
    assert any(line.startswith("scored 16/50 texts (32%)") for line in log_lines), log_lines
    assert pieces.num_rows == 50
    assert np.allclose(pieces["score"].to_numpy(), whole["score"].to_numpy(), atol=1e-6)
    assert scorer.predict([]).num_rows == 0


def test_help_names_the_settings():
    text = pydoc.render_doc(pipelines, renderer=pydoc.plaintext)
    for name in pipelines.__all__:
        assert name in text
    assert "epochs (3): Number" in pipelines.train.__doc__
    assert "early_exit ('off'): " in pipelines.score.__doc__
    assert "Example:" in pipelines.train.__doc__


def test_what_model_folders_show(spam_folder):
    assert re.fullmatch(
        r"ModelFolder\(.*spam; binary: ham, spam; thresholds \(0.4,\); windows of .* tokens, merge mean\)",
        repr(read_model_folder(spam_folder.path)),
    )


def test_frames_with_other_columns_are_refused_in_words_of_python(training_data, tmp_path):
    table = pq.read_table(training_data / "data").rename_columns(["body", "topic"])
    columns = {"text_column": "body", "label_column": "topic"}
    pipelines.train(table, training_data / "base", tmp_path / "model", valid=table, **columns, **RUN)
    assert pipelines.evaluate(tmp_path / "model", table).rows == 60
    with pytest.raises(DataError, match=r"the table in memory has no column 'topic'; it has: body, y"):
        pipelines.evaluate(tmp_path / "model", table.rename_columns(["body", "y"]))
    with pytest.raises(
        DataError, match=r"has no column 'nope'; it has: body, topic; name the text column with text_col"
    ):
        pipelines.score(tmp_path / "model", table, text_column="nope")
    with pytest.raises(DataError, match=r"the table in memory has no column 'body'; it has: words, topic"):
        pipelines.evaluate(tmp_path / "model", table.rename_columns(["words", "topic"]))
    with pytest.raises(DataError) as wrong:
        pipelines.train(table, training_data / "base", tmp_path / "other", **RUN)
    assert re.match(
        r"the table has no column 'text'; it has: body, topic; name the text column with text_column", str(wrong.value)
    )
