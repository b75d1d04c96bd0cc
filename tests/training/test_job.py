"""A fine-tuning job in this process: refused settings and output files."""

import json
import shutil

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import pipelines
from pipelines.bulk.score import score_here
from pipelines.cli import main
from pipelines.errors import DataError, JobError, ModelFolderError, OutputError, SettingsError
from pipelines.evaluation.labelled import evaluate_folder
from pipelines.model_folder import read_model_folder
from pipelines.settings import ComputeSettings, DataSettings
from pipelines.storage.shards import InputFile
from pipelines.training.job import TrainJob, _unit_bytes, train_here
from tests.jobs import score_job, train_job, train_values


def test_run_writes_folder_report_and_tensorboard(training_data, tmp_path, log_lines):
    logs = {"tensorboard_dir": str(tmp_path / "logs"), "logging_steps": 3}
    summary = train_here(train_job(training_data, tmp_path / "out", shuffle_buffer=30, **logs))
    assert (summary.workers, summary.rows_in_error) == (1, 1)
    assert sum("valid auprc" in line for line in log_lines) == 1
    assert read_model_folder(tmp_path / "out").metrics == summary.valid
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Training loss" in page
    assert "training fingerprint" in page
    assert "1.parquet row" in page, "documents are named by file and row"
    assert list((tmp_path / "logs").glob("events.*"))
    assert summary.model in repr(summary)
    assert json.dumps(summary.to_json())


def test_pair_training_and_scoring(training_data, tmp_path, emails):
    texts = [text[:200] for text in emails["text"].to_pylist()[:24]]
    table = pa.table({"text": ["is it spam?"] * 24, "mail": texts, "label": emails["label"].slice(0, 24)})
    pq.write_table(table, tmp_path / "pairs.parquet", row_group_size=8)
    pairs = {"train": str(tmp_path / "pairs.parquet"), "valid": None, "text_pair_column": "mail"}
    summary = train_here(train_job(training_data, tmp_path / "model", **pairs))
    assert summary.windows > 24, "the second text is cut into windows"
    folder = read_model_folder(tmp_path / "model")
    with pytest.raises(DataError, match="trained on pairs of texts: give the second text too"):
        score_here(score_job(folder, pairs["train"], tmp_path / "scored", text_pair_column=None))
    job = score_job(folder, pairs["train"], tmp_path / "scored")
    assert job.data.text_pair_column == "mail", "the folder remembers it"
    assert score_here(job).rows_in_error == 0
    data, compute = DataSettings(text_pair_column="mail"), ComputeSettings(device="cpu")
    assert evaluate_folder(summary.model, pairs["train"], data, compute).rows == 24
    with pytest.raises(DataError, match="trained on pairs of texts"):
        evaluate_folder(summary.model, pairs["train"], DataSettings(), compute)


def test_data_without_text_is_refused(training_data, tmp_path):
    empty = pa.table({"text": pa.nulls(9, pa.string()), "label": ["ham", "spam", "ham"] * 3})
    pq.write_table(empty, tmp_path / "empty.parquet", write_statistics=False)
    with pytest.raises(DataError, match=r"empty\.parquet, column 'text': no row has a text"):
        train_here(train_job(training_data, tmp_path / "out", train=str(tmp_path / "empty.parquet")))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("split", ["train", "valid"])
def test_all_null_texts_are_refused_from_footers(training_data, tmp_path, split, log_lines):
    empty = pa.table({"text": pa.nulls(9, pa.string()), "label": ["ham", "spam", "ham"] * 3})
    pq.write_table(empty, tmp_path / "empty.parquet", row_group_size=4)
    with pytest.raises(DataError, match=r"empty\.parquet, column 'text': no row has a text"):
        train_here(train_job(training_data, tmp_path / "out", **{split: str(tmp_path / "empty.parquet")}))
    assert log_lines == []
    assert not (tmp_path / "out").exists()


def test_ineffective_settings_are_refused(training_data, tmp_path):
    numbers = tmp_path / "numbers.parquet"
    pq.write_table(pa.table({"text": ["a", "b"], "label": [1.0, 2.0]}), numbers)
    for kind, settings, message in (
        ("regression", {"calibrate": "per_label", "train": str(numbers), "valid": str(numbers)}, "needs probabilities"),
        ("multiclass", {"objective": "precision=0.9"}, "kind multiclass has no thresholds"),
        ("binary", {"objective": "precision"}, "is none of: f1, fbeta=B"),
    ):
        with pytest.raises(SettingsError, match=message):
            train_here(train_job(training_data, tmp_path / "out", kind=kind, weight=None, **settings))
    with pytest.raises(SettingsError, match="calibrate='temperature' needs validation data"):
        train_here(train_job(training_data, tmp_path / "out", valid=None, calibrate="temperature"))
    assert not (tmp_path / "out").exists()


def test_unit_bytes():
    def of(rows, size):
        return [InputFile("a", "a", 1, "v", None, (rows,), (size,))]

    assert _unit_bytes(of(1000, 10**12), 16_384, 512) == 16_384 * 512 * 4
    assert _unit_bytes(of(600_000_000, 60 * 10**9), 16_384, 512) == 16_384 * 100
    assert _unit_bytes(of(0, 0), 16_384, 512) == 1


def test_relative_paths_become_absolute(training_data, monkeypatch):
    monkeypatch.chdir(training_data)
    values = train_values(training_data, "out", train="data", valid="data/1.parquet", model="base")
    paths = TrainJob.parse({**values, "tensorboard_dir": "logs"}).paths
    assert paths.train == str(training_data / "data")
    assert paths.valid == str(training_data / "data" / "1.parquet")
    assert paths.model == str(training_data / "base")
    assert paths.output == str(training_data / "out")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"train": "{base}/none"}, DataError, "does not exist"),
        ({"text_column": "body"}, DataError, "has no column 'body'; it has: text, label"),
        ({"label_column": "class"}, DataError, r"has no column 'class'; it has: .*; name the label column"),
        ({"labels": ["ham", "eggs"]}, DataError, "labels outside the label set: 'spam'"),
        ({"kind": "regression"}, DataError, "kind regression takes numbers"),
        ({"weight": [1, 2, 3]}, SettingsError, "weight has 3 values; there are 2 labels"),
        ({"pos_weight": [1, 2]}, SettingsError, "pos_weight is not for kind binary"),
        ({"thresholds": [0.1, 0.2]}, SettingsError, "thresholds has 2 values"),
        ({"stride": 0.99}, SettingsError, "steps 31 tokens .* would skip tokens"),
        ({"max_length": 4096}, SettingsError, "above the model's 130 positions"),
        ({"model": "{base}/data"}, ModelFolderError, r"has no config\.json"),
        ({"model": "no/such-model"}, ModelFolderError, "no/such-model"),
        ({"output": "{base}/data"}, OutputError, "is not empty; give a new folder"),
        ({"num_workers": "0:2"}, SettingsError, "minimum of 0"),
        ({"num_workers": "two"}, SettingsError, "neither a number nor MIN:MAX"),
    ],
)
def test_bad_jobs_are_refused_before_work(training_data, tmp_path, settings, error, message):
    filled = {k: v.format(base=training_data) if isinstance(v, str) else v for k, v in settings.items()}
    with pytest.raises(error, match=message):
        train_here(train_job(training_data, filled.pop("output", tmp_path / "out"), **filled))
    assert not (tmp_path / "out").exists(), "no output folder is left"


def test_filesystem_error_is_one_sentence(training_data, tmp_path):
    (tmp_path / "file").touch()
    expected = r"^training stopped: .*file.*; after the repair, the same command resumes the run$"
    with pytest.raises(JobError, match=expected):
        train_here(train_job(training_data, tmp_path / "out", tensorboard_dir=str(tmp_path / "file" / "logs")))


def test_unknown_valid_labels_name_their_file(training_data, tmp_path):
    pq.write_table(pa.table({"text": ["a", "b"], "label": ["ham", "eggs"]}), tmp_path / "valid.parquet")
    with pytest.raises(DataError, match=r"valid\.parquet: labels outside the label set: 'eggs'; the set is: ham, spam"):
        train_here(train_job(training_data, tmp_path / "out", valid=str(tmp_path / "valid.parquet")))


def test_single_class_and_pickle_are_refused(training_data, tmp_path):
    table = pq.read_table(training_data / "data")
    pq.write_table(table.filter(pa.compute.equal(table["label"], "ham")), tmp_path / "ham.parquet")
    with pytest.raises(DataError, match="the labels are all 'ham'"):
        train_here(train_job(training_data, tmp_path / "out", train=str(tmp_path / "ham.parquet"), weight=None))
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (pickled / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(ModelFolderError, match=r"as a pickle \(pytorch_model\.bin\)"):
        train_here(train_job(training_data, tmp_path / "out", model=str(pickled)))


@pytest.fixture
def renamed_data(training_data, tmp_path):
    """The training data with other column names."""
    table = pq.read_table(training_data / "data")
    pq.write_table(table.rename_columns(["body", "group"]), tmp_path / "renamed.parquet")
    return tmp_path / "renamed.parquet"


def test_folder_remembers_columns_and_settings(training_data, renamed_data, tmp_path, capsys):
    columns = {"text_column": "body", "label_column": "group"}
    data = {"train": str(renamed_data), "valid": str(renamed_data)}
    train_here(train_job(training_data, tmp_path / "out", **data, **columns))
    training = read_model_folder(tmp_path / "out").training
    assert training["columns"] == columns
    assert training["settings"] == {
        "epochs": 1, "batch_size": 5, "learning_rate": 1e-3, "train_dtype": "float32", "weight": [1, 4],
    }  # fmt: skip
    assert training["model"] == str(training_data / "base")
    measured = read_model_folder(tmp_path / "out").measured
    assert (training["documents"], measured["documents"]) == (59, 59)
    model = str(tmp_path / "out")
    assert main(["inspect", model]) == 0
    shown = capsys.readouterr().out
    assert "trained with text_column: body" in shown
    assert "trained with learning_rate: 0.001" in shown
    assert main(["evaluate", model, "--data", str(renamed_data), "--report", str(tmp_path / "page.html")]) == 3
    result = capsys.readouterr()
    assert "the columns are those of the training: text_column body, label_column group" in result.err
    assert "page.html" in result.out
    assert main(["tune", model, "--data", str(renamed_data), "--limit", "40"]) == 3
    tuned = read_model_folder(tmp_path / "out")
    assert tuned.measured["documents"] == 39
    assert tuned.measured["fingerprint"] != measured["fingerprint"]
    assert "On 39 validation documents" in (tmp_path / "out" / "README.md").read_text(), "not those of the training"
    assert read_model_folder(tmp_path / "out").training == training, "tune keeps it"
    assert score_here(score_job(read_model_folder(model), renamed_data, tmp_path / "scored")).rows_out == 60
    assert main(["evaluate", "--scored", str(tmp_path / "scored")]) == 3
    assert "mcc: " in capsys.readouterr().out
    with pytest.raises(DataError, match="has no column 'text'"):
        score_here(score_job(read_model_folder(model), renamed_data, tmp_path / "other", text_column="text"))
    assert pipelines.evaluate(model, pd.read_parquet(renamed_data)).rows == 60
    assert pipelines.evaluate(model, pd.read_parquet(training_data / "data")).rows == 60, "a frame with other names"
    scored = pipelines.score(model, pd.read_parquet(renamed_data))
    assert "body" not in scored.column_names


def test_overwrite_removes_a_model_or_a_run_and_nothing_else(training_data, tmp_path):
    job = train_job(training_data, tmp_path / "out", overwrite=True)
    first = train_here(job)
    (tmp_path / "out" / "notes.txt").write_text("of the old model")
    with pytest.raises(OutputError, match="is not empty; give a new folder, or add --overwrite"):
        train_here(train_job(training_data, tmp_path / "out"))
    assert train_here(job).valid == first.valid
    assert not (tmp_path / "out" / "notes.txt").exists()
    for name, value in (
        ("model", first.model),
        ("train", f"{first.model}/data"),
        ("valid", f"{first.model}/v.parquet"),
    ):
        place = tmp_path / "out" / "data" if name == "train" else tmp_path / "out" / "v.parquet"
        if name != "model" and not place.exists():
            shutil.copytree(training_data / "data", place) if name == "train" else shutil.copy(
                training_data / "data" / "1.parquet", place
            )
        with pytest.raises(SettingsError, match=f"--overwrite would remove --{name} "):
            train_here(train_job(training_data, tmp_path / "out", overwrite=True, **{name: value}))
    (tmp_path / "link").symlink_to(tmp_path / "out")
    for model, output in ((tmp_path / "link", tmp_path / "out"), (tmp_path / "out", tmp_path / "link")):
        with pytest.raises(SettingsError, match="--overwrite would remove --model "):
            train_here(train_job(training_data, output, overwrite=True, model=str(model)))
    assert read_model_folder(tmp_path / "out").metrics == first.valid, "nothing was removed"
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_bytes(b"1")
    with pytest.raises(OutputError, match="neither a model folder nor an unfinished run, so --overwrite does not"):
        train_here(train_job(training_data, tmp_path / "photos", overwrite=True))
    assert (tmp_path / "photos" / "one.jpg").exists()


def test_what_is_lost_without_valid_is_said(training_data, tmp_path, log_lines):
    train_here(train_job(training_data, tmp_path / "out", valid=None))
    assert any("no --valid: nothing measures the model" in line for line in log_lines)
    assert any("training on 341 windows of 59 documents; the longest has" in line for line in log_lines), log_lines


def test_label_that_only_valid_has(training_data, tmp_path):
    pq.write_table(pa.table({"text": ["a"], "label": ["phishing"]}), tmp_path / "valid.parquet")
    with pytest.raises(
        DataError, match=r"'phishing'; .*the first 20 rows of each input.*Name all labels with --labels"
    ):
        train_here(train_job(training_data, tmp_path / "out", valid=str(tmp_path / "valid.parquet"), limit=20))


def test_useless_model_is_called_so(training_data, tmp_path, log_lines):
    summary = train_here(train_job(training_data, tmp_path / "out", learning_rate=1e-9, thresholds=0.999))
    assert any(
        "the model is useless on the validation data: it calls every document 'ham'" in line for line in log_lines
    )
    assert summary.valid["mcc"] == 0
