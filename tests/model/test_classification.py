"""The facades against Simple Transformers' own answers (golden/freeze_simpletransformers.py made them)."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.arguments import ARGUMENTS, markdown_table
from pipelines.classification import (
    ClassificationArgs,
    ClassificationModel,
    MultiLabelClassificationArgs,
    MultiLabelClassificationModel,
)
from pipelines.errors import DataError, ModelFolderError, OutputError, SettingsError
from pipelines.scoring import Scorer
from tests import tiny
from tests.model.golden import freeze_simpletransformers as golden

ANSWERS = json.loads((golden.HERE / "answers.json").read_text())
CASES = [(kind, case) for kind, cases in golden.CASES.items() for case in cases]
pytestmark = pytest.mark.filterwarnings("ignore:without effect here")


def open_model(kind, path=None, **case):
    facade = MultiLabelClassificationModel if kind == "multilabel" else ClassificationModel
    arguments = golden.arguments(kind, case)
    return facade("bert", str(path or golden.HERE / kind), num_labels=golden.NUM_LABELS[kind], args=arguments,
                  use_cuda=False)  # fmt: skip


@pytest.mark.parametrize(("kind", "case"), CASES)
def test_predictions_and_raw_outputs_are_theirs(kind, case):
    predictions, outputs = open_model(kind, **golden.CASES[kind][case]).predict(golden.read_texts())
    expected = ANSWERS[kind][case]
    np.testing.assert_allclose(predictions, expected["predictions"], atol=1e-4)
    assert len(outputs) == len(expected["outputs"]) == 50
    for found, theirs in zip(outputs, expected["outputs"], strict=True):
        assert np.shape(found) == np.shape(theirs)
        np.testing.assert_allclose(found, theirs, atol=1e-4)


def test_the_cases_tell_things_apart():
    binary, multiclass = ANSWERS["binary"], ANSWERS["multiclass"]
    for kind in (binary, multiclass):
        assert min(np.bincount(kind["windows"]["predictions"])) >= 5, "every label is predicted"
    assert binary["tie_0"]["predictions"] != binary["windows"]["predictions"]
    assert binary["int_stride"]["outputs"] != binary["windows"]["outputs"] != binary["plain"]["outputs"]
    assert multiclass["tie_0"]["predictions"] != multiclass["tie_2"]["predictions"]
    assert max(len(windows) for windows in binary["windows"]["outputs"]) > 5
    multilabel = ANSWERS["multilabel"]
    assert len({json.dumps(multilabel[case]["predictions"]) for case in ("plain", "zero", "list")}) == 3


@pytest.mark.parametrize("kind", golden.CASES)
def test_metrics_and_wrong_predictions_are_theirs(kind):
    frame = pd.DataFrame({"text": golden.read_texts(), "labels": golden.read_labels(kind)})
    result, outputs, wrong = open_model(kind).eval_model(frame)
    expected = ANSWERS[kind]["metrics"]
    for name, value in expected["result"].items():
        assert result[name] == pytest.approx(value, abs=1e-4), name
    assert [item.guid for item in wrong] == expected["wrong"]
    assert wrong[0].text_a == frame["text"][wrong[0].guid]
    np.testing.assert_allclose(outputs, ANSWERS[kind]["plain"]["outputs"], atol=1e-4)


def train_frame(kind, rows=24):
    return pd.DataFrame({"text": golden.read_texts()[:rows], "labels": golden.read_labels(kind)[:rows]})


@pytest.mark.parametrize("kind", golden.CASES)
@pytest.mark.parametrize("windows", [False, True])
def test_every_kind_trains_evaluates_predicts_saves_and_opens_again(kind, windows, tmp_path, capsys):
    model = open_model(kind, sliding_window=windows, output_dir=str(tmp_path / "out"), num_train_epochs=2)
    frame = train_frame(kind)
    steps, loss = model.train_model(frame)
    assert steps >= 6
    assert 0 < loss < 100
    result, outputs, _ = model.eval_model(frame, mine=lambda true, predicted: 7.0)
    assert result["mine"] == 7.0
    assert np.isfinite(result["eval_loss"])
    texts = frame["text"].tolist()
    first, second = model.predict(texts), model.predict(texts)
    assert np.array_equal(first[0], second[0]), "a second call answers, and the same"
    assert len(outputs) == len(first[1]) == 24
    again = type(model)("bert", str(tmp_path / "out"), use_cuda=False)
    assert again.args.sliding_window == windows
    reopened = again.predict(texts)
    assert np.array_equal(np.asarray(reopened[0]), np.asarray(first[0]))
    for left, right in zip(reopened[1], first[1], strict=True):
        np.testing.assert_allclose(left, right, atol=1e-6)
    core = Scorer.load(str(tmp_path / "out")).predict(texts).to_pylist()
    column = {"multilabel": "predicted_labels", "regression": "predicted_value"}.get(kind, "predicted_label")
    assert len(core) == 24
    assert core[0][column] is not None, "the folder is a finished one, for score and serve too"
    assert capsys.readouterr().out == "", "nothing is printed on stdout"


def test_string_labels_come_back_as_strings(tmp_path):
    frame = train_frame("binary").assign(labels=["ham", "spam"] * 12)
    args = {"labels_list": ["ham", "spam"], "output_dir": str(tmp_path / "out"), "silent": True}
    model = ClassificationModel("auto", str(golden.HERE / "binary"), args=args, use_cuda=False)
    model.train_model(frame)
    assert set(model.predict(["a", "b"])[0]) <= {"ham", "spam"}
    assert ClassificationModel("bert", str(tmp_path / "out")).args.labels_map == {"ham": 0, "spam": 1}
    with pytest.raises(DataError, match="labels outside the label set: 'eggs'"):
        model.eval_model(frame.assign(labels="eggs"))


def test_data_is_taken_as_frames_lists_parquet_and_pairs(tmp_path):
    model = open_model("binary", sliding_window=True, no_save=True)
    frame = train_frame("binary")
    rows = [[text, int(label)] for text, label in frame.itertuples(index=False)]
    pq.write_table(pa.Table.from_pandas(frame), tmp_path / "rows.parquet")
    unnamed = pd.DataFrame(rows)
    results = [model.eval_model(data)[0] for data in (frame, rows, str(tmp_path / "rows.parquet"), unnamed)]
    assert all(result == results[0] for result in results)
    pairs = pd.DataFrame({"text_a": frame["text"], "text_b": frame["text"] * 3, "labels": frame["labels"]})
    predictions, outputs = model.predict(pairs[["text_a", "text_b"]].to_numpy().tolist())
    assert len(predictions) == 24
    assert len(outputs[-1]) > 3, "pairs have windows too"
    assert model.eval_model(pairs)[0]["accuracy"] == np.mean(predictions == frame["labels"].to_numpy())
    assert len(model.predict([])[0]) == 0


def test_progress_is_kept_and_the_best_epoch_too():
    model = open_model("binary", evaluate_during_training=True, num_train_epochs=3, no_save=True, learning_rate=1e-2)
    frame = train_frame("binary")
    steps, progress = model.train_model(frame, eval_df=frame)
    assert progress["global_step"] == [3, 6, 9]
    assert steps == 9
    assert len(progress["mcc"]) == len(progress["train_loss"]) == 3
    assert model.eval_model(frame)[0]["mcc"] == pytest.approx(max(progress["mcc"]))


def test_a_seed_of_zero_counts():
    def losses(seed):
        model = ClassificationModel("bert", str(golden.HERE / "multiclass"), num_labels=3, use_cuda=False,
                                    args={"manual_seed": seed, "no_save": True, "silent": True})  # fmt: skip
        return model.train_model(train_frame("multiclass"))[1]

    assert losses(0) == losses(0) != losses(1)


@pytest.mark.parametrize("argument", ARGUMENTS, ids=lambda argument: argument.name)
def test_every_argument_is_accepted_at_its_default_and_refused_where_it_says_so(argument):
    for kind in (ClassificationArgs, MultiLabelClassificationArgs):
        assert getattr(kind(**{argument.name: argument.default}), argument.name) == argument.default
    if argument.use == "refused":
        with pytest.raises(SettingsError, match=f"argument {argument.name}=.* is refused: "):
            ClassificationArgs(**{argument.name: ["something else"]})
    assert argument.note


def test_the_table_in_the_docs_is_the_one_in_the_code():
    page = (Path(__file__).parent.parent.parent / "docs" / "simpletransformers.md").read_text()
    assert markdown_table() in page


def test_mistakes_are_named(tmp_path):
    path = str(golden.HERE / "binary")
    with pytest.raises(SettingsError, match="unknown argument 'num_train_epoch'; did you mean 'num_train_epochs'"):
        ClassificationModel("bert", path, args={"num_train_epoch": 3})
    with pytest.raises(SettingsError, match="did you mean 'max_seq_length'"):
        ClassificationArgs().max_seq_len = 3
    with pytest.raises(ModelFolderError, match=r"model_type is 'roberta' but .* holds a 'bert'"):
        ClassificationModel("roberta", path)
    with pytest.raises(SettingsError, match="tie_value=2 is no label id"):
        ClassificationModel("bert", path, args={"tie_value": 2})
    with pytest.raises(SettingsError, match="num_labels=3 but labels_list names 2"):
        ClassificationModel("bert", path, num_labels=3, args={"labels_list": ["a", "b"]})
    with pytest.raises(SettingsError, match="device='cuda' is not there"):
        ClassificationModel("bert", path, use_cuda=True)
    with pytest.raises(SettingsError, match="steps 115 tokens"):
        ClassificationModel("bert", path, args={"sliding_window": True, "max_seq_length": 64, "stride": 115})
    model = open_model("binary", output_dir=path)
    with pytest.raises(OutputError, match="set overwrite_output_dir=True"):
        model.train_model(train_frame("binary"))
    with pytest.raises(DataError, match="put the text into a list"):
        model.predict("text")
    with pytest.raises(DataError, match="needs text and labels"):
        model.eval_model(pd.DataFrame({"a": ["x"]}))
    with pytest.raises(DataError, match="text 1: the text is null"):
        model.predict(["a", None])
    with pytest.raises(DataError, match="evaluate_during_training needs eval_df"):
        open_model("binary", evaluate_during_training=True, no_save=True).train_model(train_frame("binary"))


def test_inert_arguments_warn_once_and_say_where_to_look():
    with pytest.warns(UserWarning, match=r"without effect here: .*use_multiprocessing.*docs/simpletransformers\.md"):
        ClassificationModel("bert", str(golden.HERE / "binary"), args={"use_multiprocessing": False}, use_cuda=False)


@pytest.mark.parametrize("family", ["albert", "distilbert", "electra", "roberta", "modernbert", "mpnet", "deberta-v2"])
def test_other_families_train_save_and_predict_the_same(family, tmp_path, emails):
    tiny.classifier(family, num_labels=2).save_pretrained(tmp_path / "base")
    tiny.save_tokenizer(tmp_path / "base", emails["text"].to_pylist()[:40])
    args = {"max_seq_length": 32, "sliding_window": True, "silent": True, "output_dir": str(tmp_path / "out")}
    model = ClassificationModel("auto", str(tmp_path / "base"), args=args, use_cuda=False)
    model.train_model(train_frame("binary", 8))
    texts = golden.read_texts()[:12]
    before = model.predict(texts)
    shutil.rmtree(tmp_path / "base")
    after = ClassificationModel("auto", str(tmp_path / "out"), use_cuda=False).predict(texts)
    assert np.array_equal(before[0], after[0])
    for left, right in zip(before[1], after[1], strict=True):
        np.testing.assert_allclose(left, right, atol=1e-5)
